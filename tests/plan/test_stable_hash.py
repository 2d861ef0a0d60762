"""Stable hashes: the only randomness of the data path. Golden values, independent references, and fairness."""

import hashlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxtrain.plan import stable_hash

parts = st.one_of(st.text(max_size=5), st.integers(-(10**30), 10**30))
WORD = 2**64 - 1


def philox_words(key: int, n: int) -> list[int]:
    """Philox4x64-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3", section 4.3) on plain ints."""
    words: list[int] = []
    counter = 0
    while len(words) < n:
        counter += 1  # NumPy counts before it draws
        c = [counter >> (64 * i) & WORD for i in range(4)]
        k = [key & WORD, key >> 64]
        for _ in range(10):
            first, second = 0xD2E7470EE14C6C93 * c[0], 0xCA5A826395121157 * c[2]
            c = [second >> 64 ^ c[1] ^ k[0], second & WORD, first >> 64 ^ c[3] ^ k[1], first & WORD]
            k = [(k[0] + 0x9E3779B97F4A7C15) & WORD, (k[1] + 0xBB67AE8584CAA73B) & WORD]
        words += c
    return words[:n]


def key_of(*parts: tuple[bytes, int]) -> int:
    digest = hashlib.blake2b(digest_size=16)
    for text, length in parts:
        digest.update(length.to_bytes(8, "little") + text)
    return int.from_bytes(digest.digest(), "little")


def splitmix(state: int, n: int) -> list[int]:
    """splitmix64 as a sequential generator on plain ints (Steele et al. 2014, figure 19)."""
    out = []
    for _ in range(n):
        state = state + 0x9E3779B97F4A7C15 & WORD
        z = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 & WORD
        z = (z ^ z >> 27) * 0x94D049BB133111EB & WORD
        out.append(z ^ z >> 31)
    return out


def test_philox_is_philox():
    key = key_of((b"smix", 4), (b"i7", 2))
    assert stable_hash.philox("mix", 7).random_raw(11).tolist() == philox_words(key, 11)


def test_golden_values():
    """These are part of every checkpoint: the same on every machine and in every version, or runs cannot continue."""
    assert stable_hash.philox("golden").random_raw(2).tolist() == [12738054363143858294, 9196707263632923308]
    assert stable_hash.permutation(10, "golden", 1).tolist() == [4, 0, 2, 3, 9, 8, 5, 1, 6, 7]
    assert stable_hash.document_hash("web", "a.parquet", np.array([0, 1, 10**12])).tolist() == [
        3147841795282361710,
        8626636909581124191,
        9782885769861024072,
    ]
    assert np.flatnonzero(stable_hash.is_held_out("web", "a.parquet", np.arange(100), 0.05)).tolist() == [
        32,
        36,
        37,
        38,
        83,
        91,
    ]


@given(st.lists(parts, max_size=4), st.lists(parts, max_size=4))
def test_keys_are_told_apart(one, two):
    alike = stable_hash.philox(*one).random_raw() == stable_hash.philox(*two).random_raw()
    assert alike == (one == two)


@pytest.mark.parametrize(
    ("one", "two"), [(("a", "bc"), ("ab", "c")), (("1",), (1,)), ((), ("",)), ((1, 2), (12,)), ((1, 2), (2, 1))]
)
def test_near_keys_are_told_apart(one, two):
    assert stable_hash.philox(*one).random_raw() != stable_hash.philox(*two).random_raw()


@given(st.integers(0, 500), st.lists(parts, max_size=3))
def test_permutation(n, key):
    order = stable_hash.permutation(n, *key)
    assert order.dtype == np.int64
    assert sorted(order) == list(range(n))
    words = philox_words(int.from_bytes(_digest(key), "little"), n)
    assert order.tolist() == sorted(range(n), key=words.__getitem__)


def _digest(key: list) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    for part in key:
        encoded = (("s" if isinstance(part, str) else "i") + str(part)).encode()
        digest.update(len(encoded).to_bytes(8, "little") + encoded)
    return digest.digest()


def test_permutations_are_fair():
    """Each of 6 elements gets each place about equally often: chi-square with 25 degrees of freedom."""
    trials = 3000
    placed = np.zeros((6, 6))
    for trial in range(trials):
        placed[np.arange(6), stable_hash.permutation(6, "fair", trial)] += 1
    assert ((placed - trials / 6) ** 2 / (trials / 6)).sum() < 52.6  # passed by 999 of 1,000 fair ones


def test_document_hash_is_splitmix():
    rows = np.arange(50)
    base = philox_words(key_of((b"sdocument", 9), (b"sweb", 4), (b"sf", 2)), 1)[0]
    hashes = stable_hash.document_hash("web", "f", rows)
    assert hashes.dtype == np.uint64
    assert hashes.tolist() == splitmix(base, 50)
    assert stable_hash.document_hash("web", "f", rows[::-3]).tolist() == hashes[::-3].tolist()


def test_held_out_fraction():
    rows = np.arange(200_000)
    for fraction in (0.001, 0.05, 0.5):
        held_out = stable_hash.is_held_out("web", "f", rows, fraction)
        deviation = np.sqrt(len(rows) * fraction * (1 - fraction))
        assert abs(held_out.sum() - len(rows) * fraction) < 4 * deviation
        # A larger fraction holds out more documents, and keeps all of the earlier ones.
        assert stable_hash.is_held_out("web", "f", rows[held_out], 1.5 * fraction).all()
    assert not stable_hash.is_held_out("web", "f", rows, 0.0).any()
    assert stable_hash.is_held_out("web", "f", rows, 1.0).all()


def test_held_out_documents_of_two_files_are_independent():
    rows = np.arange(100_000)
    one, two = (stable_hash.is_held_out("web", file, rows, 0.1) for file in ("f", "g"))
    assert abs((one & two).sum() - 1000) < 4 * np.sqrt(1000)
