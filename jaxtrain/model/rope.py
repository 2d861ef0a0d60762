"""Rotary position embeddings (Su et al. 2021, arXiv:2104.09864, section 3.4), in the half-split layout of Llama.

Shapes: see interfaces.py. A table is [B, T, h]: the pair (i, i + h // 2) of a head shares an angle.
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
    """Returns ([cos, cos], [-sin, sin]) for `rotate`, each [B, T, h] in `dtype`.

    `dtype` must be fp32 or wider, as bf16 cannot tell position 256 from 257.
    """
    angles = positions_BT[..., None].astype(dtype) * frequencies.astype(dtype)[None, None]
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    return jnp.concatenate([cos, cos], axis=-1), jnp.concatenate([-sin, sin], axis=-1)


def rotate(x_BTHh: jax.Array, cos: jax.Array, sin: jax.Array, platform: str | None = None) -> jax.Array:
    """Rotates x by the angles of `tables`. Computes in the tables' dtype and returns x's.

    Multiplying whole heads by the tables keeps the rotation in one fusion, forward and backward. XLA's TPU compiler
    writes the halves of a split head to memory in fp32: 16% of a 1B model's step on a v6e (docs/benchmarks.md). On CPU
    halves are faster: 0.8 ms instead of 1.8 for 8 x 512 tokens of 6 heads of 64, forward and backward.

    Args:
        x_BTHh: Queries or keys.
        cos: [cos, cos] of `tables`.
        sin: [-sin, sin] of `tables`.
        platform: Of the devices that run it; None for JAX's default.
    """
    rotated = _rotate_halves if (platform or jax.default_backend()) == "cpu" else _rotate_heads
    return rotated(x_BTHh, cos[:, :, None], sin[:, :, None])


@jax.custom_vjp
def _rotate_heads(x_BTHh: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    halves = jnp.split(x_BTHh, 2, axis=-1)
    swapped = jnp.concatenate(halves[::-1], axis=-1)
    return (x_BTHh.astype(cos.dtype) * cos + swapped.astype(cos.dtype) * sin).astype(x_BTHh.dtype)


def _rotate_forward(x_BTHh, cos, sin):
    return _rotate_heads(x_BTHh, cos, sin), (cos, sin)


def _rotate_backward(tables, dx_BTHh):
    # The inverse of a rotation is the one by the opposite angle. Positions have no gradient.
    cos, sin = tables
    return _rotate_heads(dx_BTHh, cos, -sin), None, None


_rotate_heads.defvjp(_rotate_forward, _rotate_backward)


def _rotate_halves(x_BTHh: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    half = x_BTHh.shape[-1] // 2
    a, b = jnp.split(x_BTHh.astype(cos.dtype), 2, axis=-1)
    cos, sin = cos[..., :half], sin[..., half:]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x_BTHh.dtype)
