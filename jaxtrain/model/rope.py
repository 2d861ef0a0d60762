"""Rotary position embeddings (Su et al. 2021, arXiv:2104.09864, section 3.4), in the half-split layout of Llama.

Shapes: see interfaces.py. A table is [B, T, h // 2]: one angle for each pair (i, i + h // 2) of a head.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from jaxtrain.errors import UserError


@dataclasses.dataclass(kw_only=True)
class LinearRopeScaling:
    """Divides positions by `factor` (Chen et al. 2023, arXiv:2306.15595).

    Attributes:
        factor: Ratio of the context length to the one trained on.
    """

    factor: float

    def check(self) -> None:
        if self.factor < 1:
            raise UserError(f"rope_scaling.factor={self.factor} would shorten the context: it must be at least 1.")

    def scale(self, frequencies: np.ndarray) -> np.ndarray:
        """Returns the scaled frequencies."""
        return frequencies / self.factor


@dataclasses.dataclass(kw_only=True)
class Llama3RopeScaling:
    """Divides low frequencies by `factor`, keeps high ones, and ramps between (Llama 3.1's published model code).

    Attributes:
        factor: Ratio of the context length to the one trained on.
        low_freq_factor: Start of the ramp, in turns over the original context.
        high_freq_factor: End of the ramp, in turns over the original context.
        original_max_position_embeddings: Context length trained on, in tokens.
    """

    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192

    def check(self) -> None:
        if self.factor < 1:
            raise UserError(f"rope_scaling.factor={self.factor} would shorten the context: it must be at least 1.")
        if not 0 < self.low_freq_factor < self.high_freq_factor:
            raise UserError(
                f"rope_scaling.low_freq_factor={self.low_freq_factor} must be above 0 and below "
                f"high_freq_factor={self.high_freq_factor}: they are the two ends of a ramp."
            )

    def scale(self, frequencies: np.ndarray) -> np.ndarray:
        """Returns the scaled frequencies."""
        turns = self.original_max_position_embeddings * frequencies / (2 * math.pi)
        kept = np.clip((turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor), 0, 1)
        return frequencies * (kept + (1 - kept) / self.factor)


RopeScaling = LinearRopeScaling | Llama3RopeScaling


def frequencies(head_dim: int, theta: float, scaling: RopeScaling | None) -> np.ndarray:
    """Returns radians per token for each pair of a head: float64 [h // 2]."""
    plain = theta ** -(np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    return plain if scaling is None else scaling.scale(plain)


def tables(positions_BT: jax.Array, frequencies: np.ndarray, dtype: jnp.dtype) -> tuple[jax.Array, jax.Array]:
    """Returns (cos, sin), each [B, T, h // 2] in `dtype`: fp32 or wider, as bf16 cannot tell position 256 from 257."""
    angles = positions_BT[..., None].astype(dtype) * frequencies.astype(dtype)[None, None]
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x_BTHh: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotates x by the tables' angles. Computes in the tables' dtype and returns x's."""
    cos, sin = cos[:, :, None], sin[:, :, None]
    a, b = jnp.split(x_BTHh.astype(cos.dtype), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x_BTHh.dtype)
