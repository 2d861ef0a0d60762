"""Spikes in the step: when, what a skipped update leaves, and each token's loss, against NumPy."""

import dataclasses
import functools
import json
from types import SimpleNamespace
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtrain.config import Config
from jaxtrain.data import fingerprint
from jaxtrain.distributed import sharding
from jaxtrain.errors import UserError
from jaxtrain.trainer import spikes, state
from jaxtrain.trainer.spikes import NO_LOSS, SpikeRule, SpikeWatch
from jaxtrain.trainer.step import lower_train_step
from tests.e2e.configs import tiny
from tests.trainer.test_step import BATCH, RATE, SEQ, host, make_batch, make_components

WINDOW = 8


@functools.cache
def compiled(shape: tuple[int, ...], micro_batches: int, skips: bool = True) -> tuple[Any, Any]:
    components = dataclasses.replace(make_components(*shape), spikes=SpikeRule(WINDOW, 6.0, skips))
    return components, lower_train_step(components, BATCH, SEQ, micro_batches).compile()


def run(shape: tuple[int, ...], micro_batches: int, history: np.ndarray, batch: Any, skips: bool = True) -> Any:
    """(the state before, the state after, the metrics, what was found)"""
    components, step = compiled(shape, micro_batches, skips)
    start = state.create(components.model, components.optimizer, components.mesh, seed=0)
    before = host(start)
    arrays = jax.device_put(batch, sharding.batch_sharding(components.mesh))
    after, metrics, found = step(start, arrays, RATE, fingerprint.split(0), history=history)
    return before, host(after), host(metrics), host(found)


def history_of(loss: float, norm: float = 1e6) -> np.ndarray:
    noise = 1 + 0.001 * np.arange(WINDOW, dtype=np.float32)
    return np.stack([loss * noise, norm * noise]).astype(np.float32)


@pytest.mark.parametrize("seed", range(5))
def test_the_rule_against_numpy(seed: int) -> None:
    rng = np.random.default_rng(seed)
    rule = SpikeRule(window=12, threshold=4.0, skips=False)
    for _ in range(20):
        history = (3 + rng.normal(size=(2, 12)) * rng.choice([1e-4, 0.3])).astype(np.float32)
        history[:, rng.random(12) < rng.choice([0.0, 0.3, 0.7])] = np.nan
        values = (3 + rng.normal(size=2) * 1.5).astype(np.float32)
        expected = False
        for row, value in zip(history, values, strict=True):
            known = row[np.isfinite(row)].astype(np.float64)
            if len(known) >= 6:
                median = np.median(known)
                spread = max(1.4826 * np.median(np.abs(known - median)), 0.01 * abs(median))
                expected |= value > median + 4 * spread
        assert bool(rule.applies(jnp.asarray(history), jnp.asarray(values))) == expected
        assert rule.applies_on_host(history, values) == expected
    assert rule.applies_on_host(rule.nothing(), np.array([1, np.nan], np.float32))
    assert not rule.applies_on_host(rule.nothing(), np.full(2, 1e9, np.float32))
    assert not rule.applies(jnp.asarray(rule.nothing()), jnp.full(2, 1e9))


@pytest.mark.slow
@pytest.mark.parametrize(("shape", "micro_batches"), [((1,), 1), ((2, 2, 2), 2)])
def test_a_spike_is_skipped_and_its_tokens_have_losses(shape: tuple[int, ...], micro_batches: int) -> None:
    batch = make_batch(1)
    before, after, metrics, found = run(shape, micro_batches, history_of(loss=1.0), batch)
    assert found["spike"]
    jax.tree.map(np.testing.assert_array_equal, after["params"], before["params"])
    jax.tree.map(np.testing.assert_array_equal, after["opt"], before["opt"])
    assert (after["meta"]["skipped"], after["meta"]["step"]) == (1, 1)
    np.testing.assert_array_equal(found["losses"] == NO_LOSS, ~batch["loss_mask"])
    # Each row's own mean by the loss itself: the mask of another step leaves only this row.
    mean = found["losses"][batch["loss_mask"]].astype(np.float64).mean()
    np.testing.assert_allclose(mean, metrics["ce_loss"], rtol=1e-5)
    np.testing.assert_allclose(found["values"], [metrics["loss"], metrics["grad_norm"]])
    np.testing.assert_array_equal(found["history"][:, :-1], history_of(loss=1.0)[:, 1:])
    np.testing.assert_array_equal(found["history"][:, -1], found["values"])
    for row in range(BATCH):
        alone = {**batch, "loss_mask": batch["loss_mask"] & (np.arange(BATCH) == row)[:, None]}
        if row in (0, 5) and alone["loss_mask"].any():
            _, _, of_row, _ = run(shape, micro_batches, history_of(loss=1.0), alone)
            mine = found["losses"][row][batch["loss_mask"][row]].mean()
            np.testing.assert_allclose(mine, of_row["ce_loss"], rtol=2e-5)


@pytest.mark.slow
def test_no_spike_is_the_plain_step() -> None:
    batch = make_batch(1)
    _, after, metrics, found = run((1,), 1, history_of(loss=100.0), batch)
    assert not found["spike"]
    assert not found["losses"].any()
    components = make_components(1)
    plain = lower_train_step(components, BATCH, SEQ, 1)
    # The branch exists only where spikes are watched.
    assert "stablehlo.case" not in plain.as_text()
    assert "stablehlo.if" not in plain.as_text()
    start = state.create(components.model, components.optimizer, components.mesh, seed=0)
    arrays = jax.device_put(batch, sharding.batch_sharding(components.mesh))
    expected, measured = plain.compile()(start, arrays, RATE, fingerprint.split(0))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-7), after, host(expected))
    np.testing.assert_allclose(metrics["loss"], measured["loss"], rtol=1e-6)


@pytest.mark.slow
def test_a_step_without_a_loss_or_with_infinity() -> None:
    _, _, _, found = run((1,), 1, history_of(loss=1.0), make_batch(1, masked=1.0))
    assert not found["spike"]
    np.testing.assert_array_equal(found["history"], history_of(loss=1.0))
    components, step = compiled((1,), 1)
    start = state.create(components.model, components.optimizer, components.mesh, seed=0)
    start["params"] = jax.tree.map(lambda leaf: leaf * np.float32(1e30), start["params"])
    _, metrics, found = step(start, make_batch(1), RATE, fingerprint.split(0), history=history_of(loss=1.0))
    assert found["spike"]
    assert metrics["skipped"] == 1
    assert np.isnan(found["history"][:, -1]).all()


class OneLane:
    """What the watch needs of a session: two stages, and the one document of each step."""

    def __init__(self) -> None:
        stages = [SimpleNamespace(first_step=1), SimpleNamespace(first_step=61)]
        self.plan: Any = SimpleNamespace(stages=stages, source_names=("web",))
        self.readers = [SimpleNamespace(source=SimpleNamespace(files=["a.parquet"]))]
        self.asked: list[int] = []
        self.unreadable = False

    def addresses(self, step: int, states: dict[int, int]) -> Any:
        self.asked.append(step)
        assert states == {0: step - 1}
        if self.unreadable:
            raise OSError("gone")
        return [(0, 0, [(0, step, 0, 30)])]

    def watch(self, saved: Any = None, after: int = 0) -> SpikeWatch:
        rule = SpikeRule(WINDOW, 10.0, skips=False)
        return SpikeWatch(cast(Any, self), rule, False, saved, cast(Any, {0: after}))

    def take(self, watch: SpikeWatch, step: int, loss: float) -> None:
        at: Any = SimpleNamespace(step=step, stage=1 if step < 61 else 2)
        assert watch.inputs(at) == {}
        metrics = {"loss": jnp.float32(loss), "grad_norm": jnp.float32(1.0)}
        watch.add(at, cast(Any, SimpleNamespace(states={0: step})), metrics)


def test_the_host_finds_spikes_of_a_run_without_a_threshold(caplog: pytest.LogCaptureFixture) -> None:
    session = OneLane()
    watch = session.watch()
    for step in range(1, 18):  # 16 at once, and the last two may still be running
        session.take(watch, step, 9.0 if step == 12 else 3.0)
        assert watch.spikes(2) == []
    session.take(watch, 18, 3.0)
    document = {"source": "web", "file": "a.parquet", "row": 12, "tokens": 30}
    expected = {"loss": 9.0, "grad_norm": 1.0, "standing_out": 0, "documents": [document]}
    assert watch.spikes(2) == [(12, expected)]
    assert "its 1 documents are in spikes.jsonl" in spikes.told(12, expected, "the run goes on")
    # A save compares all steps, so a resume goes on with the same history.
    assert watch.spikes(0) == []
    saved = watch.to_json()
    watch = session.watch(json.loads(json.dumps(saved)), after=18)
    session.unreadable = True
    session.take(watch, 19, float("nan"))
    assert [(step, spike["documents"]) for step, spike in watch.spikes(0)] == [(19, [])]
    assert "The documents of step 19 could not be read again: gone" in caplog.text
    session.take(watch, 20, 0.0)
    assert watch.spikes(0) == []
    # A run that diverges reads ten steps again. A new stage is not compared with the one before it.
    session.unreadable, session.asked = False, []
    for step in range(21, 70):
        session.take(watch, step, float("inf") if step < 61 else 50.0)
    found = watch.spikes(0)
    assert [step for step, _ in found] == list(range(21, 61))
    assert session.asked == list(range(21, 30))
    assert "tools.inspect_stream --at_step=60 lists its documents" in spikes.told(*found[-1], "the run goes on")


def test_documents_that_stand_out() -> None:
    def stand_out(*losses: float, tokens: Any = 16, usual: tuple[float, float] | None = (3.0, 3.3)) -> list[float]:
        """The losses of the documents that do."""
        each = np.broadcast_to(tokens, len(losses)).tolist()
        documents: Any = [
            {"source": "web", "file": "a", "row": row, "loss": loss, "tokens": count}
            for row, (loss, count) in enumerate(zip(losses, each, strict=True))
        ]
        ranked, count = spikes._ranked(documents, usual)
        assert sorted(map(str, ranked)) == sorted(map(str, documents))
        return [document["loss"] for document in ranked[:count]]

    nan, inf, others = float("nan"), float("inf"), (3.1, 3.0, 2.9, 3.05)
    for usual in ((3.0, 3.3), None):
        assert stand_out(3.1, 9.0, *others[1:], usual=usual) == [9.0]
        assert np.isinf(stand_out(3.1, inf, 3.0, 2.9, 3.05, usual=usual)).all()
        assert len(stand_out(nan, inf, 3.0, 2.9, 3.05, usual=usual)) == 2
        assert stand_out(*others, usual=usual) == []
        assert stand_out(nan, nan, nan, usual=usual) == []
        assert stand_out(9.0, usual=usual) == []
    # Few tokens say little, unless their loss is not finite.
    assert stand_out(5.0, 9.0, 3.0, 2.9, 3.05, tokens=(2, 64, 64, 64, 64)) == [9.0]
    assert stand_out(6.0, *others, tokens=(1, 64, 64, 64, 64)) == []
    assert stand_out(inf, *others, tokens=(1, 64, 64, 64, 64)) == [inf]
    # Without these two the step is none, though half of its documents hide them from each other.
    assert stand_out(9.0, 8.8, 3.0, 2.9) == [9.0, 8.8]
    assert stand_out(9.0, 8.8, 3.0, 2.9, usual=None) == []
    # Where the losses are near 0, a document of 0.3 is far from the others, but does not make the spike.
    assert stand_out(0.3, 4.9, 0.01, 0.02, 0.01, 0.03, usual=(0.05, 0.2)) == [4.9]
    # A spike of the gradient alone.
    assert stand_out(0.1, 0.01, 0.02, 0.01, 0.03, usual=(0.05, 0.2)) == []
    assert stand_out(0.6, *10 * (0.01, 0.02), usual=(0.05, 0.2)) == [0.6]


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"on_spike": "rewnd"}, "did you mean 'rewind'"),
        ({"on_spike": "rewind"}, "needs spike_threshold, for example 10"),
        ({"spike_threshold": 0.0}, "spike_threshold=0.0"),
        ({"spike_window": 0}, "spike_window=0"),
    ],
)
def test_settings_are_checked(fields: dict[str, Any], said: str) -> None:
    config: Config = dataclasses.replace(tiny.get_config(""), **fields)
    with pytest.raises(UserError, match=said):
        config.check()
