"""The fingerprint: NumPy and jitted JAX agree; the batch's sharding does not matter, its content does."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtrain.data import fingerprint
from jaxtrain.distributed.sharding import MeshConfig, batch_sharding
from jaxtrain.interfaces import BATCH_FIELDS

HASHED = ("tokens", "targets", "segment_ids", "loss_mask")


def batch(rows: int = 16, columns: int = 8, seed: int = 0) -> dict[str, np.ndarray]:
    words = np.random.Philox(key=seed).random_raw(rows * columns * 5).reshape(5, rows, columns)
    made = {name: (words[index] % 50_000).astype(np.int32) for index, name in enumerate(BATCH_FIELDS)}
    made["loss_mask"] = made["loss_mask"] % 3 > 0
    return made


def of(made: dict[str, np.ndarray], first_row: int = 0) -> np.ndarray:
    return fingerprint.of_rows(made, *fingerprint.row_numbers(fingerprint.split(first_row), len(made["tokens"])))


def slow(made: dict[str, np.ndarray], first_row: int) -> list[int]:
    """The module's docstring in Python integers."""
    mod = 1 << 32

    def fmix(h):
        h = (h ^ h >> 16) * 0x85EBCA6B % mod
        h = (h ^ h >> 13) * 0xC2B2AE35 % mod
        return h ^ h >> 16

    words = []
    for seed in (0x243F6A88, 0x85A308D3):
        total = 0
        for row in range(len(made["tokens"])):
            token, target, segment, mask = (made[name][row].tolist() for name in HASHED)
            if not any(mask):
                continue
            inner = 0
            for t in range(len(token)):
                first = fmix((token[t] * 0x9E3779B1 + t * 0x165667B1 + seed) % mod)
                second = target[t] * 0x85EBCA77 + segment[t] * 0xC2B2AE3D + mask[t] * 0x27D4EB2F
                inner += fmix((first + second) % mod)
            low, high = (first_row + row) % mod, (first_row + row) // mod
            total += fmix((fmix((inner + low * 0xD3A2646D) % mod) + high + seed) % mod)
        words.append(total % mod)
    return words


@pytest.mark.parametrize("first_row", [0, 5, 2**32 - 7, 2**40 + 3])
def test_numpy_jax_and_plain_integers_agree(first_row):
    made = batch()
    made["loss_mask"][3] = False
    wanted = slow(made, first_row)
    assert of(made, first_row).tolist() == wanted
    assert of(made, first_row).dtype == np.uint32

    @jax.jit
    def jitted(made, before):
        return fingerprint.of_rows(made, *fingerprint.row_numbers(before, made["tokens"].shape[0], jnp), jnp)

    assert jitted(made, fingerprint.split(first_row)).tolist() == wanted


def test_golden():
    assert fingerprint.text(of(batch(), 3)) == "359625eefdf94bc6"
    assert fingerprint.text(np.array([1, 2**32 - 1], np.uint32)) == "00000001ffffffff"


@pytest.mark.parametrize("mesh", [MeshConfig(data=8, fsdp=1), MeshConfig(fsdp=2, tensor=2, context=2)], ids=str)
def test_the_mesh_does_not_matter(mesh):
    made = batch()
    arrays = jax.device_put(made, batch_sharding(mesh.build()))
    numbers = fingerprint.row_numbers(fingerprint.split(9), 16, jnp)
    assert (
        jax.jit(lambda b, n: fingerprint.of_rows(b, n[0], n[1], jnp))(arrays, numbers).tolist() == of(made, 9).tolist()
    )


def test_neither_do_micro_batches():
    made, low_high = batch(), fingerprint.row_numbers(fingerprint.split(2**32 - 5), 16)
    parts = [
        fingerprint.of_rows({name: x[a::4] for name, x in made.items()}, low_high[0][a::4], low_high[1][a::4])
        for a in range(4)
    ]
    np.testing.assert_array_equal(np.sum(parts, axis=0, dtype=np.uint32), of(made, 2**32 - 5))


@pytest.mark.parametrize("name", HASHED)
def test_every_value_of_every_field_matters(name):
    made, seen = batch(4, 5), set()
    seen.add(tuple(of(made)))
    for row in range(4):
        for column in range(5):
            other = {field: values.copy() for field, values in made.items()}
            other[name][row, column] = ~made[name][row, column] if name == "loss_mask" else made[name][row, column] + 1
            seen.add(tuple(of(other)))
    assert len(seen) == 21
    for word in range(2):
        assert len({found[word] for found in seen}) == 21


def test_places_matter():
    made = batch()
    seen = {tuple(of(made)), tuple(of(made, 1)), tuple(of(made, 2**32)), tuple(of(made, 2**33))}
    for axis in (0, 1):
        seen.add(tuple(of({name: np.roll(values, 1, axis) for name, values in made.items()})))
        swapped = {name: np.flip(values, axis) for name, values in made.items()}
        seen.add(tuple(of(swapped)))
    assert len(seen) == 8


def test_rows_without_a_loss_count_as_nothing_but_keep_their_numbers():
    made = batch()
    made["loss_mask"][:8] = False
    rest = {name: values[8:] for name, values in made.items()}
    np.testing.assert_array_equal(of(made), of(rest, 8))
    made["loss_mask"][:] = False
    assert not of(made).any()


def test_row_numbers_carry():
    low, high = fingerprint.row_numbers(fingerprint.split(2**32 - 2), 4)
    assert low.tolist() == [2**32 - 2, 2**32 - 1, 0, 1]
    assert high.tolist() == [0, 0, 1, 1]
    assert low.dtype == high.dtype == np.uint32
