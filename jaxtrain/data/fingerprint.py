"""A hash of all rows trained on so far: two runs with equal fingerprints have seen the same data in the same order.

Two uint32 words. Every token's (token, target, segment id, mask, column) is mixed by the finalizer of MurmurHash3
(Appleby 2011, fmix32) and summed with wrap-around over the row; the sum is mixed with the row's number in the run; the
rows are summed. Integer sums do not depend on their order, so neither mesh nor hosts nor accumulation change them, and
the row's number makes the order of rows count. A row without any loss counts as nothing.

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
    """The sum to add to the fingerprint for a batch: uint32 [2].

    batch: fields of interfaces.BATCH_FIELDS, [B, T]. row_low, row_high: uint32 [B], the 64-bit number of each row.
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
    """A hash of every bit of all arrays of a tree of dicts, and of their names and places: uint32 [2].

    It does not depend on how they are sharded. Types of 2 or 4 bytes; types and shapes are not part of it.
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
    """The 64-bit numbers of `count` rows from `rows_before` (low, high) on, as uint32 [count] each."""
    low = rows_before[0] + xp.arange(count, dtype=xp.uint32)
    return low, rows_before[1] + (low < rows_before[0]).astype(xp.uint32)


def split(number: int) -> tuple[np.uint32, np.uint32]:
    """A 64-bit number as (low, high)."""
    return np.uint32(number & 0xFFFFFFFF), np.uint32(number >> 32)


def text(words: Array) -> str:
    """16 hexadecimal digits."""
    return "".join(f"{int(word):08x}" for word in words)
