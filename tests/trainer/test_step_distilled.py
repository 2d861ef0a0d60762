"""The step with a teacher: against model and loss assembled by hand; identical on every mesh and split of the batch."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtrain.data import fingerprint
from jaxtrain.distributed import sharding
from jaxtrain.losses.cross_entropy import CrossEntropy
from jaxtrain.losses.distillation import Distillation
from jaxtrain.losses.divergences import JSD
from jaxtrain.trainer import state
from jaxtrain.trainer.step import Distilled, StepComponents, eval_step, lower_train_step
from tests.tiers import nightly_but
from tests.trainer.test_step import ADAMW, BATCH, MODEL, RATE, SEQ, VOCAB, assert_close, host, make_batch, make_mesh

TEACHER = dataclasses.replace(MODEL, hidden_size=48, intermediate_size=96, head_dim=4)
LOSS = Distillation(divergence=JSD(beta=0.3), temperature=2.0)
WEIGHTS = (np.float32(0.4), np.float32(0.6))


@functools.cache
def make_components(*shape: int) -> tuple[StepComponents, Any]:
    """StepComponents, and the teacher's parameters, which differ from the student's, though both come from seeds."""
    mesh = make_mesh(*shape)
    model, teacher = MODEL.build(VOCAB, mesh), TEACHER.build(VOCAB, mesh)
    layout = sharding.tree_shardings(mesh, teacher.axes)
    frozen = jax.jit(teacher.init, out_shardings=layout)(jax.random.key(1))
    abstract = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), frozen)
    distilled = Distilled(teacher, abstract, LOSS.build(VOCAB, mesh, CrossEntropy()))
    optimizer = ADAMW.build(model.axes, mesh)
    return StepComponents(model, CrossEntropy().build(VOCAB, mesh), optimizer, mesh, 1.0, distilled), frozen


def run(shape: tuple[int, ...], micro_batches: int = 1) -> Any:
    """(the state on the host after two steps, their metrics)"""
    components, frozen = make_components(*shape)
    step = lower_train_step(components, BATCH, SEQ, micro_batches).compile()
    now = state.create(components.model, components.optimizer, components.mesh, seed=0)
    metrics = []
    for number in range(2):
        arrays = jax.device_put(make_batch(number + 1), sharding.batch_sharding(components.mesh))
        now, measured = step(now, arrays, RATE, fingerprint.split(number * BATCH), (frozen, *WEIGHTS))
        metrics.append(host(measured))
    return host(now), metrics


@pytest.fixture(scope="module")
def alone() -> Any:
    return run(())


def test_loss_and_state(alone: Any) -> None:
    """By hand: logits of both, plain softmaxes. The state has no trace of the teacher, whose arrays are unchanged."""
    components, frozen = make_components()
    assert components.distilled is not None
    batch = make_batch(1)
    params = state.create(components.model, components.optimizer, components.mesh, seed=0)["params"]

    def log_softmax(model: Any, params: Any, heat: float) -> jax.Array:
        x_BTD = model.hidden(params, batch["tokens"], batch["segment_ids"], batch["positions"]).x
        return jax.nn.log_softmax((x_BTD @ model.head(params))[..., :VOCAB] / heat)

    log_q, log_p = log_softmax(components.model, params, 2.0), log_softmax(components.distilled.teacher, frozen, 2.0)
    p, q = jnp.exp(log_p), jnp.exp(log_q)
    m = 0.3 * p + 0.7 * q
    jsd = 0.3 * (p * jnp.log(p / m)).sum(-1) + 0.7 * (q * jnp.log(q / m)).sum(-1)
    ce = -jnp.take_along_axis(log_softmax(components.model, params, 1.0), batch["targets"][..., None], axis=-1)[..., 0]
    ce, kd = (float(x[batch["loss_mask"]].mean()) for x in (ce, 4 * jsd))
    measured = alone[1][0]
    np.testing.assert_allclose([measured["ce_loss"], measured["kd_loss"]], [ce, kd], rtol=1e-5)
    np.testing.assert_allclose(measured["loss"], 0.4 * ce + 0.6 * kd, rtol=1e-5)
    plain = state.abstract(components.model, components.optimizer, components.mesh)
    assert jax.tree.structure(alone[0]) == jax.tree.structure(plain)
    assert components.distilled.teacher is not None
    both = (components.model, components.distilled.teacher)
    mine, theirs = (model.flops_per_token(64) for model in both)
    assert components.flops_per_token(64) == mine + theirs / 3
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(frozen))


SHAPES = [(2, 2, 2), (1, 8, 1), (8, 1, 1), (1, 2, 2, 2)]


@pytest.mark.slow
@pytest.mark.parametrize("shape", nightly_but([((1, 2, 2, 2),)], zip(SHAPES)))
def test_every_mesh_gives_what_one_device_gives(shape: tuple[int, ...], alone: Any) -> None:
    found = run(shape)
    assert_close(found, alone)
    np.testing.assert_allclose(found[1][1]["kd_loss"], alone[1][1]["kd_loss"], rtol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("shape", "micro_batches"), nightly_but([((2, 2, 2), 2)], [((), 4), ((2, 2, 2), 2)]))
def test_accumulation_changes_nothing(shape: tuple[int, ...], micro_batches: int, alone: Any) -> None:
    assert_close(run(shape, micro_batches), alone)


@pytest.mark.slow
def test_nothing_of_the_teachers_forward_pass_is_kept() -> None:
    """A teacher of 8 layers needs no more temporary memory than one of 2, and no gradient flows through it."""

    def temporary(num_layers: int) -> int:
        mesh = make_mesh()
        config = dataclasses.replace(TEACHER, num_layers=num_layers)
        model, teacher = MODEL.build(VOCAB, mesh), config.build(VOCAB, mesh)
        abstract = jax.tree.map(
            lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
            teacher.shapes,
            sharding.tree_shardings(mesh, teacher.axes),
        )
        distilled = Distilled(teacher, abstract, LOSS.build(VOCAB, mesh, CrossEntropy()))
        optimizer = ADAMW.build(model.axes, mesh)
        components = StepComponents(model, CrossEntropy().build(VOCAB, mesh), optimizer, mesh, 1.0, distilled)
        memory = lower_train_step(components, BATCH, 128, 1).compile().memory_analysis()
        assert memory is not None
        return memory.temp_size_in_bytes

    layer = BATCH * 128 * TEACHER.hidden_size * 4  # the input of one layer alone
    assert temporary(8) - temporary(2) < layer


@pytest.mark.slow
def test_evaluation_is_of_the_cross_entropy_alone(alone: Any) -> None:
    components, _ = make_components()
    params = state.create(components.model, components.optimizer, components.mesh, seed=0)["params"]
    batch = make_batch(1)
    sums = jax.jit(eval_step(components))(params, batch, np.ones(VOCAB, np.int32))
    np.testing.assert_allclose(sums["nats"] / sums["tokens"], alone[1][0]["ce_loss"], rtol=1e-6)
