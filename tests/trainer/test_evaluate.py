"""Evaluation is the same in any number of micro-batches, and fits next to what training keeps on a device."""

from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest

from jaxtrain.distributed import sharding
from jaxtrain.plan.plan import StagePlan
from jaxtrain.trainer import programs, state
from jaxtrain.trainer.evaluate import lower_eval_step
from jaxtrain.trainer.programs import DoesNotFitError, StagePrograms
from jaxtrain.trainer.session import bytes_besides_params
from tests.trainer.test_programs import Fake, make_components, make_plan

TRAINED = make_plan(("only", 8, 16))


def evaluation(rows: int, seq_len: int) -> StagePlan:
    return make_plan(("evaluation", rows, seq_len)).stages[0]


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Fake:
    """Replaces both lowerings: 1,000 bytes of arguments, and 100 for each token on a device at once."""
    fake = Fake()
    monkeypatch.setattr(programs, "lower_train_step", fake)
    monkeypatch.setattr(programs, "lower_eval_step", fake)
    return fake


def test_any_number_of_micro_batches_gives_the_same_sums() -> None:
    components, rng = make_components(fsdp=2), np.random.default_rng(0)
    ids = rng.integers(0, 100, (2, 8, 16)).astype(np.int32)
    batch = {
        "tokens": ids[0],
        "targets": ids[1],
        "segment_ids": np.ones((8, 16), np.int32),
        "positions": np.broadcast_to(np.arange(16, dtype=np.int32), (8, 16)),
        "loss_mask": rng.random((8, 16)) < 0.7,
    }
    arrays = jax.device_put(batch, sharding.batch_sharding(components.mesh))
    params = state.create(components.model, components.optimizer, components.mesh, seed=0)["params"]
    token_bytes = rng.integers(0, 9, 100).astype(np.int32)
    found = []
    for count in (1, 2, 4):
        executable = lower_eval_step(components, 8, 16, count).compile()
        found.append(jax.device_get(executable(params, arrays, token_bytes)))
    assert found[0]["tokens"] == batch["loss_mask"].sum()
    assert found[0]["bytes"] == token_bytes[batch["targets"]][batch["loss_mask"]].sum()
    for other in found[1:]:
        assert other["tokens"].dtype == np.int32
        np.testing.assert_array_equal(other["tokens"], found[0]["tokens"])
        np.testing.assert_array_equal(other["bytes"], found[0]["bytes"])
        np.testing.assert_allclose(other["nats"], found[0]["nats"], rtol=1e-6)


def test_what_training_keeps_counts(fake: Fake) -> None:
    """16 rows of 64 tokens need 103,400 bytes at once, 26,600 in four micro-batches."""
    made = StagePrograms(make_components(), TRAINED, None, limit=30_000, evaluation=evaluation(16, 64))
    assert made.evaluation().micro_batches == 4
    made = StagePrograms(make_components(), TRAINED, None, limit=30_000, evaluation=evaluation(16, 64), extra=10_000)
    assert made.evaluation().micro_batches == 8
    assert (
        "2.38e-05 of 3e-05 GB per device (state and batch 1.1e-05, temporary 1.28e-05)"
        in made.evaluation().describe(30_000)
    )


def test_an_evaluation_that_will_not_fit_is_named_before_the_first_step(fake: Fake) -> None:
    made = StagePrograms(make_components(), TRAINED, None, limit=20_000, evaluation=evaluation(16, 64), extra=13_000)
    made.begin(1)
    with pytest.raises(
        DoesNotFitError, match=r"Evaluation does not fit: even with one row of 64 .* needs 2.04e-05 GB"
    ) as e:
        made.settle(1)
    assert "eval.seq_len" in str(e.value)
    assert "remat" not in str(e.value)


def test_without_a_limit_it_is_compiled_when_it_is_due(fake: Fake) -> None:
    made = StagePrograms(make_components(), TRAINED, None, evaluation=evaluation(16, 64))
    made.begin(1)
    made.settle(1)
    made.get(8, 16)
    assert (16, 64, 1) not in fake.compiles
    assert made.evaluation().micro_batches == 1
    assert StagePrograms(make_components(), None, 128, evaluation=evaluation(16, 64)).evaluation().micro_batches == 8


def test_processes_agree_on_an_evaluations_micro_batches(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(programs.consensus, "largest", lambda value: max(value, 8))
    made = StagePrograms(make_components(), TRAINED, None, limit=30_000, evaluation=evaluation(16, 64))
    assert made.evaluation().micro_batches == 8


def test_bytes_beside_the_parameters() -> None:
    """AdamW's two moments, step, fingerprint and two counters, on each of two devices."""
    components: Any = make_components(fsdp=2)
    params = sum(leaf.size * 4 for leaf in jax.tree.leaves(components.model.shapes))
    # Norms are not sharded; everything else is halved.
    whole = sum(
        leaf.size * 4
        for path, leaf in jax.tree_util.tree_flatten_with_path(components.model.shapes)[0]
        if "norm" in jax.tree_util.keystr(path)
    )
    assert bytes_besides_params(components) == pytest.approx(2 * ((params - whole) / 2 + whole) + 20, abs=2 * whole)
    distilled = SimpleNamespace(abstract=state.abstract(components.model, components.optimizer, components.mesh))
    with_teacher: Any = SimpleNamespace(**{**vars(components), "distilled": distilled})
    assert bytes_besides_params(with_teacher) > bytes_besides_params(components)
