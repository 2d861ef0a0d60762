"""A hash of all rows trained on so far: runs with equal fingerprints have seen the same data in the same order.

Two uint32 words. Every token's (token, target, segment id, mask, column) is mixed by the MurmurHash3 finalizer (Appleby
2011, fmix32) and summed over the row modulo 2**32. The sum is mixed with the row's number in the run, and the rows are
summed. Integer sums do not depend on their order, so neither mesh nor hosts nor gradient accumulation change them, and
the row number makes the order of rows count. A row without any loss contributes nothing.

The functions take NumPy or JAX arrays; `xp` is the module.
"""

import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np

Array = Any  # numpy.ndarray or jax.Array

_WORDS = (0x243F6A88, 0x85A308D3)  # a seed for each word: digits of pi
_TOKEN, _TARGET, _SEGMENT, _MASK, _COLUMN, _ROW = (
    0x9E3779B1,
    0x85EBCA77,
    0xC2B2AE3D,
    0x27D4EB2F,
    0x165667B1,
    0xD3A2646D,
)


def _fmix32(h: Array, xp: Any) -> Array:
    h = (h ^ (h >> xp.uint32(16))) * xp.uint32(0x85EBCA6B)
    h = (h ^ (h >> xp.uint32(13))) * xp.uint32(0xC2B2AE35)
    return h ^ (h >> xp.uint32(16))


def of_rows(batch: Mapping[str, Array], row_low: Array, row_high: Array, xp: Any = np) -> Array:
    """A batch's contribution to the fingerprint.

    Args:
        batch: Fields of interfaces.BATCH_FIELDS, [B, T].
        row_low: Low words of the rows' 64-bit numbers, uint32 [B].
        row_high: High words, uint32 [B].
        xp: numpy or jax.numpy.

    Returns:
        The value to add, uint32 [2].
    """
    field = {name: values.astype(xp.uint32) for name, values in batch.items()}
    columns_T = xp.arange(batch["tokens"].shape[1], dtype=xp.uint32)
    counts_B = batch["loss_mask"].any(axis=1).astype(xp.uint32)
    words = []
    for seed in _WORDS:
        first_BT = field["tokens"] * xp.uint32(_TOKEN) + (columns_T * xp.uint32(_COLUMN) + xp.uint32(seed))[None, :]
        second_BT = (
            field["targets"] * xp.uint32(_TARGET)
            + field["segment_ids"] * xp.uint32(_SEGMENT)
            + field["loss_mask"] * xp.uint32(_MASK)
        )
        row_B = _fmix32(_fmix32(first_BT, xp) + second_BT, xp).sum(axis=1, dtype=xp.uint32)
        row_B = _fmix32(_fmix32(row_B + row_low * xp.uint32(_ROW), xp) + row_high + xp.uint32(seed), xp)
        words.append((row_B * counts_B).sum(dtype=xp.uint32))
    return xp.stack(words)


def of_arrays(tree: Any, xp: Any = np) -> Array:
    """Hashes every bit of all arrays of a tree of dicts, with their names and element positions.

    The result does not depend on sharding. Types and shapes are not hashed.

    Args:
        tree: Nested dicts of arrays with elements of 2 or 4 bytes.
        xp: numpy or jax.numpy.

    Returns:
        uint32 [2].
    """
    words = xp.zeros(2, xp.uint32)
    for name in sorted(tree):
        salt = zlib.crc32(name.encode())
        if isinstance(tree[name], Mapping):
            part = of_arrays(tree[name], xp)
        else:
            part = xp.stack([_of_array(tree[name], seed, xp) for seed in _WORDS])
        words = words + _fmix32(part + xp.uint32(salt), xp)
    return words


def _of_array(x: Array, seed: int, xp: Any) -> Array:
    bits = x.view(xp.uint16 if x.dtype.itemsize == 2 else xp.uint32).astype(xp.uint32)
    place, stride = xp.zeros((1,) * x.ndim, xp.uint32), 1
    for axis in reversed(range(x.ndim)):
        index = xp.arange(x.shape[axis], dtype=xp.uint32) * xp.uint32(stride & 0xFFFFFFFF)
        place = place + index.reshape([-1 if a == axis else 1 for a in range(x.ndim)])
        stride *= x.shape[axis]
    mixed = _fmix32(_fmix32(place * xp.uint32(_COLUMN) + xp.uint32(seed), xp) + bits * xp.uint32(_TOKEN), xp)
    return mixed.sum(dtype=xp.uint32)


def row_numbers(rows_before: tuple[Array, Array], count: int, xp: Any = np) -> tuple[Array, Array]:
    """The 64-bit numbers of `count` rows from `rows_before` (low, high) on, as (low, high), uint32 [count] each."""
    low = rows_before[0] + xp.arange(count, dtype=xp.uint32)
    return low, rows_before[1] + (low < rows_before[0]).astype(xp.uint32)


def split(number: int) -> tuple[np.uint32, np.uint32]:
    """Splits a 64-bit number into (low, high)."""
    return np.uint32(number & 0xFFFFFFFF), np.uint32(number >> 32)


def text(words: Array) -> str:
    """The fingerprint as 16 hexadecimal digits."""
    return "".join(f"{int(word):08x}" for word in words)
