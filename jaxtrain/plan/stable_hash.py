"""Seeded permutations and document hashes: the only sources of randomness in the data path.

Everything is a pure function of a key, a tuple of strings and integers. NumPy guarantees that `Philox.random_raw` never
changes (unlike the methods of `Generator`), and a stable argsort of the raw words depends on nothing else. So the
values are the same on every machine and in every version; tests pin golden values.
"""

import hashlib

import numpy as np
from numpy.random.bit_generator import ISeedSequence

Part = str | int


class _Key(ISeedSequence):
    """Gives Philox its key. With `key=`, NumPy also draws a seed from the system, which takes longer than the rest."""

    def __init__(self, key: bytes):
        self._key = key

    def generate_state(self, n_words: int, dtype: object = np.uint64) -> np.ndarray:
        return np.frombuffer(self._key, "<u8").astype(np.uint64)


def philox(*key: Part) -> np.random.Philox:
    """A counter-based bit generator for `key`. Parts are length-prefixed, so ("a", "bc") and ("ab", "c") differ."""
    digest = hashlib.blake2b(digest_size=16)
    for part in key:
        encoded = f"{type(part).__name__[0]}{part}".encode()
        digest.update(len(encoded).to_bytes(8, "little") + encoded)
    return np.random.Philox(_Key(digest.digest()))  # type: ignore[arg-type] - NumPy takes any ISeedSequence


def permutation(n: int, *key: Part) -> np.ndarray:
    """A permutation of range(n), int64 [n], that depends only on `key`."""
    return np.argsort(philox(*key).random_raw(n), kind="stable")


def document_hash(source: str, file: str, rows: np.ndarray) -> np.ndarray:
    """Hashes each document identity (source, file, row).

    The file's key is mixed with the row by the splitmix64 finalizer (Steele et al. 2014, "Fast splittable pseudorandom
    number generators", figure 19), so any fraction of the range is an unbiased sample.

    Args:
        source: The source's name.
        file: The file's name.
        rows: Rows in the file, int [n].

    Returns:
        uint64 [n].
    """
    base = np.uint64(philox("document", source, file).random_raw())
    z = base + (rows.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def is_held_out(source: str, file: str, rows: np.ndarray, fraction: float) -> np.ndarray:
    """Which documents are held out of training: bool [n]. Independent of seed, order, lanes and mode."""
    return document_hash(source, file, rows) < np.uint64(min(int(fraction * 2.0**64), 2**64 - 1))
