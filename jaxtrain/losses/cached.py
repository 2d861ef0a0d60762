"""The storage format of a teacher's top-k tokens: one fixed-width record per position, packed like tokens.

A record holds, little-endian: k ids (16 bits each, plus 8 if the vocabulary has more than 65,536 tokens), their
log-probabilities at temperature 1 (float16, most likely first), and for each temperature the log of the mass of all
other tokens (float32). Log-probabilities at temperature 1 determine those at another temperature up to a constant, and
the mass of the tail gives that constant. Shapes: see interfaces.py; K stored tokens, W bytes per record.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from jaxtrain.errors import UserError
from jaxtrain.losses.chunks import NEVER

# Within the range of float16; exp(-60,000) underflows to zero.
_LEAST = -60_000.0


@dataclasses.dataclass(frozen=True)
class Layout:
    """The layout of a record.

    Attributes:
        vocab_size: Size of the teacher's vocabulary.
        k: Tokens stored per position.
        temperatures: The temperatures at which the mass of the tail is stored.
    """

    vocab_size: int
    k: int
    temperatures: tuple[float, ...]

    @property
    def high_bytes(self) -> bool:
        """Whether ids take 24 bits."""
        return self.vocab_size > 1 << 16

    @property
    def width(self) -> int:
        """Bytes per record."""
        return self.k * (5 if self.high_bytes else 4) + 4 * len(self.temperatures)

    def slot(self, temperature: float) -> int:
        """The index of a temperature's tail. Raises UserError if the cache does not store that temperature."""
        for index, stored in enumerate(self.temperatures):
            if stored == temperature:
                return index
        known = ", ".join(f"{stored:g}" for stored in self.temperatures)
        raise UserError(
            f"distillation.temperature={temperature:g}: the teacher's cache holds the tail's mass for {known} only. "
            "Set one of these, or write another cache (tools.cache_teacher --temperatures=...)."
        )

    def pack(self, ids: jax.Array, log_p: jax.Array, tails: jax.Array) -> jax.Array:
        """Packs records.

        Args:
            ids: Token ids, int [..., K].
            log_p: Log-probabilities at temperature 1, fp32 [..., K].
            tails: Log of the mass of the tail at each temperature, fp32 [..., temperatures].

        Returns:
            uint8 [..., W].
        """
        parts = [_bytes_of((ids & 0xFFFF).astype(jnp.uint16))]
        if self.high_bytes:
            parts.append((ids >> 16).astype(jnp.uint8))
        parts.append(_bytes_of(jnp.maximum(log_p, _LEAST).astype(jnp.float16)))
        parts.append(_bytes_of(tails.astype(jnp.float32)))
        return jnp.concatenate(parts, axis=-1)

    def unpack(self, records: jax.Array, slot: int) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Unpacks records at the temperature of `slot`.

        The log-probabilities are renormalized to remove the rounding of the stored values: with the tail they sum to a
        mass of 1.

        Args:
            records: uint8 [..., W].
            slot: Index of the temperature, from `slot()`.

        Returns:
            ids int32 [..., K], log-probabilities fp32 [..., K], and the log of the mass of the tail fp32 [...].
        """
        k = self.k
        ids = _from_bytes(records[..., : 2 * k], jnp.uint16).astype(jnp.int32)
        at = 2 * k
        if self.high_bytes:
            ids |= records[..., at : at + k].astype(jnp.int32) << 16
            at += k
        scores = _from_bytes(records[..., at : at + 2 * k], jnp.float16).astype(jnp.float32)
        tails = _from_bytes(records[..., at + 2 * k :], jnp.float32)
        scores = scores / self.temperatures[slot]
        tail = jnp.maximum(tails[..., slot], NEVER)
        # log(1 - tail), for tails near 0 and near 1.
        kept = jnp.where(tail > -0.7, jnp.log(-jnp.expm1(jnp.minimum(tail, -1e-7))), jnp.log1p(-jnp.exp(tail)))
        log_p = scores - jax.nn.logsumexp(scores, axis=-1, keepdims=True) + kept[..., None]
        return ids, log_p, tail


@dataclasses.dataclass(frozen=True)
class Aligned:
    """How the records of a teacher with its own tokenizer are used.

    A record of zeros says nothing: where no token of the teacher ends with the student's. It has no weight in the
    loss.

    Attributes:
        vocab_size: Size of the student's vocabulary.
        tables: As from `tokenizers.spelling.cells`; () if the vocabularies are the same.
    """

    vocab_size: int
    tables: tuple[np.ndarray, ...]

    @property
    def most(self) -> int:
        """The most tokens of the student in the cell of a token of the teacher."""
        cells, _, starts = self.tables
        return int(np.diff(starts)[cells[cells >= 0]].max(initial=1))


def top_records(logits_CV: jax.Array, layout: Layout) -> jax.Array:
    """The records of C positions, uint8 [C, W]. logits_CV: fp32, without the padding columns of the vocabulary."""
    log_p_CV = jax.nn.log_softmax(logits_CV)
    log_p_CK, ids_CK = jax.lax.top_k(log_p_CV, layout.k)
    rows = jnp.arange(len(logits_CV))[:, None]
    rest_CV = log_p_CV.at[rows, ids_CK].set(NEVER)
    tails = []
    for heat in layout.temperatures:
        log_z_C = jax.nn.logsumexp(log_p_CV / heat, axis=1)
        tails.append(jax.nn.logsumexp(rest_CV / heat, axis=1) - log_z_C)
    # If no token remains, the sum runs over NEVER / heat, which is effectively zero mass.
    return layout.pack(ids_CK, log_p_CK, jnp.stack(tails, axis=-1))


def _bytes_of(x: jax.Array) -> jax.Array:
    """[..., n] → uint8 [..., n * itemsize], little-endian."""
    found = jax.lax.bitcast_convert_type(x, jnp.uint8)
    return found.reshape(*x.shape[:-1], x.shape[-1] * np.dtype(x.dtype).itemsize)


def _from_bytes(x: jax.Array, dtype: type) -> jax.Array:
    size = np.dtype(dtype).itemsize
    return jax.lax.bitcast_convert_type(x.reshape(*x.shape[:-1], x.shape[-1] // size, size), dtype)
