"""AdamW."""

import dataclasses
from typing import Any

import jax
from jax.sharding import Mesh

from jaxtrain.optim import base
from jaxtrain.plan.schedules import Cosine


@dataclasses.dataclass(kw_only=True)
class AdamW:
    """Adam with decoupled weight decay (Loshchilov and Hutter, arXiv 1711.05101; the form of PyTorch and optax).

    The decay is multiplied by the learning rate, peak included. Norms and biases never decay.

    learning_rate: the peak, which `schedule` scales.
    schedule: a dataclass of plan/schedules.py.
    betas: decay rates of the two moments; 0.95 for the second is that of GPT-3 (arXiv 2005.14165, appendix B) and Llama
        (arXiv 2302.13971, section 2.3).
    epsilon: added to the second moment's root.
    weight_decay: per step, as a multiple of the learning rate; 0.1 in both.
    decay_embeddings: whether the embedding decays. Off as in OLMo 2 (arXiv 2501.00656): a decayed embedding makes small
        hidden states and so large gradients in the first layers. A separate output head always decays.
    """

    learning_rate: float = 3e-4
    schedule: base.ScheduleConfig = dataclasses.field(default_factory=Cosine)
    betas: tuple[float, float] = (0.9, 0.95)
    epsilon: float = 1e-8
    weight_decay: float = 0.1
    decay_embeddings: bool = False

    def check(self) -> None:
        base.check_fields(self)

    def build(self, axes: base.Params, mesh: Mesh | None = None) -> base.Optimizer:
        """axes: the parameters' tree of logical axes. The state is optax's ScaleByAdamState (count, mu, nu)."""
        adam, state_axes = base.adam(self.betas, self.epsilon, axes)
        decays = base.decay_mask(axes, self.decay_embeddings)

        def update(
            grads: base.Params, state: Any, params: base.Params, learning_rate: jax.Array
        ) -> tuple[base.Params, Any]:
            updates, state = adam.update(grads, state)
            return base.apply(params, updates, learning_rate, self.weight_decay, decays), state

        return base.Optimizer(adam.init, update, state_axes)
