"""A teacher's records of whole documents, against its forward pass on each one alone; and a student that learns from
them as from the teacher itself.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from examples.gpt2 import GPT2Config
from jaxtrain.data import fingerprint
from jaxtrain.distill.scorer import Scorer, rows_of, windows
from jaxtrain.distributed import sharding
from jaxtrain.interfaces import RECORDS
from jaxtrain.losses.cached import Layout
from jaxtrain.losses.cross_entropy import CrossEntropy
from jaxtrain.losses.distillation import Distillation
from jaxtrain.losses.divergences import ForwardKL, TopK
from jaxtrain.trainer import state
from jaxtrain.trainer.step import Distilled, StepComponents, lower_train_step
from tests.trainer.test_step import ADAMW, BATCH, MODEL, RATE, SEQ, VOCAB, host, make_mesh
from tests.trainer.test_step_distilled import TEACHER

LENGTHS = (1, 7, 16, 17, 33, 40, 3, 3)


FAMILIES = {"llama": TEACHER, "gpt2": GPT2Config(hidden_size=32, num_layers=1, num_heads=2, num_positions=64)}


@functools.cache
def teacher(*shape: int, family: str = "llama") -> tuple[Any, Any]:
    mesh = make_mesh(*shape)
    model = FAMILIES[family].build(VOCAB, mesh)
    layout = sharding.tree_shardings(mesh, model.axes)
    return model, jax.jit(model.init, out_shardings=layout)(jax.random.key(1))


def documents(lengths: Any = LENGTHS) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, VOCAB, length, dtype=np.int32) for length in lengths]


def test_windows_cover_each_token_once_and_fill_rows() -> None:
    for context, stride in ((16, 8), (16, 16), (16, 1), (5, 3)):
        found = windows(LENGTHS, context, stride)
        for document, length in enumerate(LENGTHS):
            mine = [window for window in found if window.document == document]
            assert [token for window in mine for token in range(window.first, window.end)] == list(range(length))
            for window in mine:
                assert window.end - window.begin <= context
                # As much context before the first new token as the stride leaves, or all there is.
                assert window.first - window.begin >= min(context - stride, window.first)
        rows = rows_of(found, context)
        assert sorted(id(window) for row in rows for window in row) == sorted(map(id, found))
        assert all(sum(window.end - window.begin for window in row) <= context for row in rows)
        rows = rows_of(found, context, most=2)
        assert sorted(id(window) for row in rows for window in row) == sorted(map(id, found))
        assert max(map(len, rows)) == 2


@pytest.mark.parametrize("shape", [(), pytest.param((2, 2, 2), marks=pytest.mark.slow)])
def test_records_are_the_teachers(shape: tuple[int, ...]) -> None:
    """Whole documents, and windows of longer ones, with any neighbors in a row."""
    model, params = teacher(*shape)
    layout, context, stride = Layout(VOCAB, VOCAB, (1.0, 2.0)), 16, 8
    found = Scorer(model, params, layout, context, stride, rows=4)(documents())
    alone, weights = teacher()

    @jax.jit
    def log_p(tokens_T: jax.Array) -> jax.Array:
        """Padding comes after the tokens, which do not see it."""
        x = alone.hidden(weights, tokens_T[None], jnp.ones((1, context), jnp.int32), jnp.arange(context)[None]).x
        return jax.nn.log_softmax((x @ alone.head(weights))[0, :, :VOCAB])

    for tokens, records in zip(documents(), found, strict=True):
        assert records.shape == (len(tokens), layout.width)
        wanted = np.empty((len(tokens), VOCAB))
        for window in windows([len(tokens)], context, stride):
            padded = np.resize(tokens[window.begin : window.end], context)
            seen = np.asarray(log_p(padded))[: window.end - window.begin]
            wanted[window.first : window.end] = seen[window.first - window.begin :]
        ids, scores, _ = (np.asarray(part) for part in layout.unpack(jnp.asarray(records), 0))
        # float16: half a unit in the last place, plus the effect of normalizing the sum to 1.
        np.testing.assert_allclose(scores, np.take_along_axis(wanted, ids, axis=1), rtol=2**-11, atol=3e-4)


def run(components: StepComponents, batches: list[Any], teaching: Any) -> Any:
    step = lower_train_step(components, BATCH, SEQ, 2).compile()
    now, metrics = state.create(components.model, components.optimizer, components.mesh, seed=0), []
    for number, batch in enumerate(batches):
        arrays = jax.device_put(batch, sharding.batch_sharding(components.mesh))
        now, measured = step(now, arrays, RATE, fingerprint.split(number * BATCH), teaching)
        metrics.append(host(measured))
    return host(now), metrics


def whole_documents(seed: int) -> tuple[dict[str, np.ndarray], list[np.ndarray]]:
    """A batch whose rows have two whole documents each, and these documents, row by row."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, VOCAB, (BATCH, SEQ), dtype=np.int32)
    cuts = rng.integers(1, SEQ, BATCH)
    second = np.arange(SEQ) >= cuts[:, None]
    mask = np.ones((BATCH, SEQ), bool)
    mask[:, -1] = False
    mask[np.arange(BATCH), cuts - 1] = False
    batch = {
        "tokens": tokens,
        "targets": np.where(mask, np.roll(tokens, -1, axis=1), 0),
        "segment_ids": 1 + second.astype(np.int32),
        "positions": (np.arange(SEQ) - np.where(second, cuts[:, None], 0)).astype(np.int32),
        "loss_mask": mask,
    }
    return batch, [part for row, cut in zip(tokens, cuts, strict=True) for part in (row[:cut], row[cut:])]


@pytest.mark.slow
@pytest.mark.parametrize(("family", "k"), [("llama", VOCAB), ("llama", 6), ("gpt2", 6)])
def test_from_the_cache_as_on_the_fly(family: str, k: int) -> None:
    """On rows of whole documents, losses and parameters agree except for the rounding of the stored values."""
    model, frozen = teacher(family=family)
    student = MODEL.build(VOCAB, model.mesh)
    made = Distillation(divergence=TopK(k=k) if k < VOCAB else ForwardKL(), temperature=2.0)
    abstract = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), frozen)
    loss = CrossEntropy().build(VOCAB, model.mesh)
    optimizer = ADAMW.build(student.axes, model.mesh)
    live = Distilled(model, abstract, made.build(VOCAB, model.mesh, CrossEntropy()))
    layout = Layout(VOCAB, k, (1.0, 2.0))
    stored = dataclasses.replace(made, divergence=TopK(k=k)).build_cached(layout, model.mesh, CrossEntropy())
    cached = Distilled(None, (), stored, layout.width)
    weights = (np.float32(0.4), np.float32(0.6))
    scorer = Scorer(model, frozen, layout, SEQ, SEQ, rows=3)
    plain, with_records = [], []
    for seed in (1, 2):
        batch, found = whole_documents(seed)
        records = np.concatenate(scorer(found)).reshape(BATCH, SEQ, layout.width)
        plain.append(batch)
        with_records.append({**batch, RECORDS: records})
    components = functools.partial(StepComponents, student, loss, optimizer, model.mesh, 1.0)
    one, first = run(components(live), plain, (frozen, *weights))
    other, second = run(components(cached), with_records, ((), *weights))
    for live_one, cached_one in zip(first, second, strict=True):
        np.testing.assert_array_equal(live_one["fingerprint"], cached_one["fingerprint"])
        for name in ("loss", "ce_loss", "kd_loss"):
            np.testing.assert_allclose(cached_one[name], live_one[name], rtol=2e-4, err_msg=name)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=3e-5), other["params"], one["params"])
    assert components(cached).flops_per_token(SEQ) == student.flops_per_token(SEQ)
