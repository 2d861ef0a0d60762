"""A loss in one file: cross-entropy with label smoothing (Szegedy et al. 2016, arXiv:1512.00567, section 7).

python -m jaxtrain.main --config=examples/label_smoothing.py
"""

import dataclasses

import jax
import jax.numpy as jnp

from configs import quickstart
from jaxtrain.config import Config
from jaxtrain.errors import UserError
from jaxtrain.interfaces import LossFn, Mesh
from jaxtrain.losses.chunks import from_function


@dataclasses.dataclass(kw_only=True)
class LabelSmoothing:
    """Cross-entropy with a target of 1 - smoothing on the next token and the rest spread over the vocabulary.

    Attributes:
        smoothing: The share that is spread, 0 to below 1.
        chunk_tokens: The most positions whose logits exist at once on a device.
    """

    smoothing: float = 0.1
    chunk_tokens: int = 1024

    def check(self) -> None:
        if not 0 <= self.smoothing < 1:
            raise UserError(f"smoothing={self.smoothing}: give 0 or more, below 1; 0.1 is usual.")

    def build(self, vocab_size: int, mesh: Mesh | None) -> LossFn:
        def loss(x_CD: jax.Array, w_DV: jax.Array, targets_C: jax.Array, mask_C: jax.Array) -> dict[str, jax.Array]:
            logits_CV = jnp.dot(x_CD, w_DV, preferred_element_type=jnp.float32)[:, :vocab_size]  # without padding
            log_q_CV = jax.nn.log_softmax(logits_CV)
            ce_C = -jnp.take_along_axis(log_q_CV, targets_C[:, None], axis=1)[:, 0]
            smooth_C = (1 - self.smoothing) * ce_C - self.smoothing * log_q_CV.mean(axis=1)
            return {"loss": jnp.where(mask_C, smooth_C, 0).sum(), "ce_loss": jnp.where(mask_C, ce_C, 0).sum()}

        return from_function(loss, mesh, self.chunk_tokens)


def get_config(arg: str = "") -> Config:
    return dataclasses.replace(quickstart.get_config(), loss=LabelSmoothing())
