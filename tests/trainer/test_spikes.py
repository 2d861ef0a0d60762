"""Spikes in the step: when, what a skipped update leaves, and each token's loss, against NumPy."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtrain.config import Config
from jaxtrain.data import fingerprint
from jaxtrain.distributed import sharding
from jaxtrain.errors import UserError
from jaxtrain.trainer import spikes, state
from jaxtrain.trainer.spikes import NO_LOSS, SpikeRule
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


def test_documents_that_stand_out() -> None:
    def documents(*losses: float) -> list[Any]:
        return [{"loss": loss, "tokens": 16} for loss in sorted(losses, key=lambda loss: -spikes._finite(loss))]

    assert spikes._standing_out([]) == 0
    assert spikes._standing_out(documents(9.0, 3.1, 3.0, 2.9, 3.05)) == 1
    assert spikes._standing_out(documents(float("nan"), float("inf"), 3.0, 2.9, 3.05)) == 2
    assert spikes._standing_out(documents(3.1, 3.0, 2.9, 3.05)) == 0
    assert spikes._standing_out(documents(*[float("nan")] * 3)) == 0
    # Few tokens say little, unless their loss is not finite.
    few = {"loss": 9.0, "tokens": 15}
    assert spikes._standing_out([*documents(3.1, 3.0, 2.9, 3.05), few]) == 0
    assert spikes._standing_out([few]) == 0
    assert spikes._standing_out([{"loss": float("inf"), "tokens": 1}, *documents(3.1, 3.0, 2.9, 3.05), few]) == 1


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
