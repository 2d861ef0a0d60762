"""Losses from a teacher with another tokenizer, against definitions in float64."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtrain.distributed.sharding import MeshConfig, batch_sharding, replicated, sharding
from jaxtrain.losses.cached import Aligned, Layout, top_records
from jaxtrain.losses.cross_entropy import CrossEntropy
from jaxtrain.losses.distillation import Distillation
from jaxtrain.losses.divergences import ULD, TopK
from tests.losses.distillation_reference import softmax
from tests.losses.test_cached import stored
from tests.losses.test_distillation import VOCAB, assert_close, build, evaluate, example, expected

THEIRS, K, HEAT = 23, 9, 2.0
ALONE = (np.float32(0), np.float32(1))  # the divergence alone
# Of the teacher's tokens, 0, 1 and 6 are of cell 3, and 4 and 5 of none. Of the student's, 5 and 6 are of 3, 7 of 4.
CELLS = np.array([3, 3, 4, 9, -1, -1, 3, *range(10, 26)], np.int32)
GROUPS = {3: [3, 5, 6], 4: [4, 7], 9: [9]} | {cell: [cell] for cell in range(10, 26)}
MEMBERS = np.array([id for cell in sorted(GROUPS) for id in GROUPS[cell]], np.int32)
STARTS = np.cumsum([0, *(len(GROUPS.get(cell, ())) for cell in range(VOCAB))], dtype=np.int32)
TABLES = CELLS, MEMBERS, STARTS


def uld(k: int) -> Any:
    def divergence(p: np.ndarray, q: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        p, order = -np.sort(-p, axis=-1), np.argsort(-q, axis=-1)
        apart = np.take_along_axis(q, order, -1) - p
        rest = apart[..., k:].sum(-1, keepdims=True)
        signs = np.sign(np.concatenate([apart[..., :k], np.broadcast_to(rest, apart[..., k:].shape)], axis=-1))
        slopes = np.empty_like(q)
        np.put_along_axis(slopes, order, signs, -1)
        return np.abs(apart[..., :k]).sum(-1) + np.abs(rest[..., 0]), slopes

    return divergence


@pytest.mark.parametrize("k", [5, VOCAB])
def test_sorted_probabilities(k: int) -> None:
    arrays = example()
    assert_close(evaluate(build(ULD(k=k), heat=HEAT), arrays), expected(arrays, uld(k), heat=HEAT))


def test_sorted_probabilities_of_another_vocabulary() -> None:
    """The teacher's ids do not matter: neither their order nor their number."""
    x, w, teacher, head, targets, mask = example()
    layout = Layout(VOCAB, 5, (HEAT,))
    records = stored(teacher, head, layout)
    made = Distillation(divergence=ULD(k=5), temperature=HEAT)
    found = evaluate(made.build_cached(layout, None, CrossEntropy(chunk_tokens=7)), (x, w, records, targets, mask))
    _, log_p, _ = (np.asarray(part, np.float64) for part in layout.unpack(records, 0))
    logits = np.full((*log_p.shape[:2], VOCAB), np.log((1 - np.exp(log_p).sum(-1, keepdims=True)) / (VOCAB - 5)))
    logits[..., 10:15] = log_p
    assert_close(found, expected((x, w, HEAT * logits, np.eye(VOCAB), targets, mask), uld(5), heat=HEAT), rtol=2e-5)


def theirs() -> tuple[Layout, jnp.ndarray]:
    """Records of a teacher with `THEIRS` tokens; every third position has none."""
    layout = Layout(THEIRS, K, (1.0, HEAT))
    logits = 2 * np.random.default_rng(3).normal(size=(48, THEIRS)).astype(np.float32)
    records = top_records(jnp.asarray(logits), layout).at[::3].set(0)
    return layout, records.reshape(8, 6, layout.width)


def by_definition(x: Any, w: Any, records: Any, layout: Layout) -> tuple[np.ndarray, np.ndarray]:
    """Values and gradients with respect to the student's logits, from sums of probabilities by cell."""
    q = softmax(np.float64(x @ w)[..., :VOCAB] / HEAT)
    ids, log_p, _ = (np.asarray(part, np.float64) for part in layout.unpack(records, 1))
    values, gradients = np.zeros(q.shape[:2]), np.zeros(q.shape)
    for at in np.ndindex(q.shape[:2]):
        if not np.asarray(records[at]).any():
            continue
        masses: dict[int, float] = {}
        for id, score in zip(ids[at].astype(int), log_p[at], strict=True):
            masses[int(CELLS[id])] = masses.get(int(CELLS[id]), 0.0) + np.exp(score)
        masses.pop(-1, None)
        groups = {cell: GROUPS[cell] for cell in masses}
        others = sorted(set(range(VOCAB)) - {id for group in groups.values() for id in group})
        slopes = np.zeros(VOCAB)
        for p, group in [*((masses[cell], groups[cell]) for cell in masses), (1 - sum(masses.values()), others)]:
            mass = q[at][group].sum()
            values[at] += p * np.log(p / mass)
            slopes[group] = -p / mass
        gradients[at] = q[at] * (slopes - (q[at] * slopes).sum()) / HEAT
    return HEAT**2 * values, HEAT**2 * gradients


def test_by_cells() -> None:
    x, w, _, _, targets, mask = example()
    layout, records = theirs()
    made = Distillation(divergence=TopK(k=K), temperature=HEAT)
    loss = made.build_cached(layout, None, CrossEntropy(chunk_tokens=7), Aligned(VOCAB, TABLES))
    sums, dx, dw = evaluate(loss, (x, w, records, *TABLES, targets, mask), ALONE)
    values, gradients = by_definition(x, w, records, layout)
    gradients *= mask[..., None]
    says = mask & np.asarray(records).any(-1)
    assert sums["kd_aligned"] == says.sum()
    wanted = np.einsum("BTV,DV->BTD", gradients, np.float64(w)[:, :VOCAB])
    padded = np.zeros(w.shape)
    padded[:, :VOCAB] = np.einsum("BTD,BTV->DV", np.float64(x), gradients)
    only = {name: sums[name] for name in ("loss", "kd_loss")}
    assert_close((only, dx, dw), (dict.fromkeys(only, (values * mask).sum()), wanted, padded), rtol=2e-5)
    assert not np.asarray(dx)[~says].any()  # exactly nothing where nothing is said


def test_the_same_vocabulary_is_the_cached_loss() -> None:
    x, w, teacher, head, targets, mask = example()
    layout = Layout(VOCAB, 5, (HEAT,))
    records = stored(teacher, head, layout)
    made, plain = Distillation(divergence=TopK(k=5), temperature=HEAT), CrossEntropy(chunk_tokens=7)
    wanted = evaluate(made.build_cached(layout, None, plain), (x, w, records, targets, mask))
    aligned = made.build_cached(layout, None, plain, Aligned(VOCAB, ()))
    sums, *gradients = evaluate(aligned, (x, w, records, targets, mask))
    assert sums.pop("kd_aligned") == mask.sum()
    # One unit in the last place: the compiler orders a sum differently.
    assert_close((sums, *gradients), wanted, rtol=2e-7)
    tables = (*(np.arange(VOCAB, dtype=np.int32),) * 2, np.arange(VOCAB + 1, dtype=np.int32))
    by_cells = made.build_cached(layout, None, plain, Aligned(VOCAB, tables))
    sums, *gradients = evaluate(by_cells, (x, w, records, *tables, targets, mask))
    del sums["kd_aligned"]
    assert_close((sums, *gradients), wanted, rtol=1e-5)


@pytest.mark.parametrize("divergence", [TopK(k=K), ULD(k=K)])
def test_the_same_on_every_mesh(divergence: Any) -> None:
    x, w, _, _, targets, mask = example()
    layout, records = theirs()
    made, aligned = Distillation(divergence=divergence, temperature=HEAT), Aligned(VOCAB, TABLES)
    arrays = (x, w, records, *TABLES, targets, mask)
    wanted = evaluate(made.build_cached(layout, None, CrossEntropy(chunk_tokens=7), aligned), arrays)
    mesh = MeshConfig(data=2, fsdp=2, tensor=2).build()
    rows, whole = batch_sharding(mesh), replicated(mesh)
    layouts = (rows, sharding(mesh, ("embed", "vocab")), rows, whole, whole, whole, rows, rows)
    placed = tuple(jax.device_put(array, where) for array, where in zip(arrays, layouts, strict=True))
    found = evaluate(made.build_cached(layout, mesh, CrossEntropy(chunk_tokens=7), aligned), placed)
    assert_close(found, wanted)
