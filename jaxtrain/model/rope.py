"""Rotary position embeddings (Su et al. 2021, arXiv:2104.09864, section 3.4), in the half-split layout of Llama.

Shapes: see interfaces.py. A table is [B, T, h], or as wide as the part of a head that
is rotated: the pair (i, i + h // 2) shares an angle.
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


@dataclasses.dataclass(kw_only=True)
class YarnRopeScaling:
    """Divides low frequencies by `factor`, keeps high ones, ramps between over pairs, and scales queries and keys.

    (YaRN, Peng et al. 2023, arXiv:2309.00071, sections 3.2 to 3.4.)

    Attributes:
        factor: Ratio of the context length to the one trained on.
        original_max_position_embeddings: Context length trained on, in tokens.
        beta_fast: Pairs that turn more often than this over the original context keep their frequency.
        beta_slow: Those that turn less often are divided by `factor`.
        attention_factor: Multiplies queries and keys; None for 0.1 ln(factor) + 1.
        truncate: Whether the ends of the ramp are whole pairs.
    """

    factor: float
    original_max_position_embeddings: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    truncate: bool = True

    def check(self) -> None:
        if self.factor < 1:
            raise UserError(f"rope_scaling.factor={self.factor} would shorten the context: it must be at least 1.")
        if not 0 < self.beta_slow <= self.beta_fast:
            raise UserError(
                f"rope_scaling.beta_slow={self.beta_slow} must be above 0 and at most beta_fast={self.beta_fast}: they "
                "are the two ends of a ramp."
            )

    @property
    def amplitude(self) -> float:
        """The factor on queries and keys."""
        return 0.1 * math.log(self.factor) + 1 if self.attention_factor is None else self.attention_factor

    def scale(self, frequencies: np.ndarray) -> np.ndarray:
        """Returns the scaled frequencies."""
        pairs = len(frequencies)
        # Pair i turns at theta^(-i / pairs): the pair, as a real number, that turns `beta` times.
        log_theta = -math.log(frequencies[1]) * pairs if pairs > 1 else 1.0
        low, high = (
            pairs * math.log(self.original_max_position_embeddings / (beta * 2 * math.pi)) / log_theta
            for beta in (self.beta_fast, self.beta_slow)
        )
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, 2 * pairs - 1)  # transformers bounds it by the width, not by the pairs
        divided = np.clip((np.arange(pairs) - low) / (high - low or 0.001), 0, 1)
        return frequencies * (1 - divided + divided / self.factor)


RopeScaling = LinearRopeScaling | Llama3RopeScaling | YarnRopeScaling


def frequencies(width: int, theta: float, scaling: RopeScaling | None) -> np.ndarray:
    """Returns radians per token for each pair of the rotated part of a head: float64 [width // 2]."""
    plain = theta ** -(np.arange(0, width, 2, dtype=np.float64) / width)
    return plain if scaling is None else scaling.scale(plain)


def tables(
    positions_BT: jax.Array, frequencies: np.ndarray, dtype: jnp.dtype, amplitude: float = 1.0
) -> tuple[jax.Array, jax.Array]:
    """Returns ([cos, cos], [-sin, sin]) for `rotate`, times `amplitude`, each [B, T, 2 * len(frequencies)] in `dtype`.

    `dtype` must be fp32 or wider, as bf16 cannot tell position 256 from 257.
    """
    angles = positions_BT[..., None].astype(dtype) * frequencies.astype(dtype)[None, None]
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    if amplitude != 1:
        cos, sin = cos * amplitude, sin * amplitude
    return jnp.concatenate([cos, cos], axis=-1), jnp.concatenate([-sin, sin], axis=-1)


def rotate(x_BTHh: jax.Array, cos: jax.Array, sin: jax.Array, platform: str | None = None) -> jax.Array:
    """Rotates x by the angles of `tables`. Computes in the tables' dtype and returns x's.

    Tables narrower than a head rotate its first elements only.

    Multiplying whole heads by the tables keeps the rotation in one fusion, forward and backward. XLA's TPU compiler
    writes the halves of a split head to memory in fp32: 16% of a 1B model's step on a v6e (docs/benchmarks.md). On CPU
    halves are faster: 0.8 ms instead of 1.8 for 8 x 512 tokens of 6 heads of 64, forward and backward.

    Args:
        x_BTHh: Queries or keys.
        cos: [cos, cos] of `tables`.
        sin: [-sin, sin] of `tables`.
        platform: Of the devices that run it; None for JAX's default.
    """
    width = cos.shape[-1]
    if width < x_BTHh.shape[-1]:
        first = rotate(x_BTHh[..., :width], cos, sin, platform)
        return jnp.concatenate([first, x_BTHh[..., width:]], axis=-1)
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
    # A rotation's transpose is the one by the opposite angle. Positions have no gradient.
    cos, sin = tables
    return _rotate_heads(dx_BTHh, cos, -sin), None, None


_rotate_heads.defvjp(_rotate_forward, _rotate_backward)


def _rotate_halves(x_BTHh: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    half = x_BTHh.shape[-1] // 2
    a, b = jnp.split(x_BTHh.astype(cos.dtype), 2, axis=-1)
    cos, sin = cos[..., :half], sin[..., half:]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x_BTHh.dtype)
