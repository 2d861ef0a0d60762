"""The train step: the same on every mesh and for any micro-batches; its guards; against a plain loss and gradient."""

import dataclasses
import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtrain.data import fingerprint
from jaxtrain.distributed import sharding
from jaxtrain.distributed.sharding import MeshConfig
from jaxtrain.errors import UserError
from jaxtrain.interfaces import ClippableModel, Hidden
from jaxtrain.losses.cross_entropy import CrossEntropy
from jaxtrain.model.llama import LlamaConfig
from jaxtrain.optim.adamw import AdamW
from jaxtrain.optim.muon import Muon
from jaxtrain.optim.schedule_free import ScheduleFreeAdamW
from jaxtrain.trainer import state
from jaxtrain.trainer.step import StepComponents, accumulation, eval_step, lower_train_step
from tests.tiers import nightly_but

VOCAB, BATCH, SEQ = 300, 8, 16
MODEL = LlamaConfig(
    hidden_size=32,
    intermediate_size=64,
    num_layers=2,
    num_heads=8,
    num_kv_heads=8,
    dtype="float32",
    remat="none",
    initializer_std=0.2,
)
# With such a large epsilon, a moment near 0 moves a parameter little: rounding cannot change a whole step.
ADAMW = AdamW(learning_rate=1e-2, epsilon=1e-2)
OPTIMIZERS: dict[str, Any] = {
    "adamw": ADAMW,
    "muon": Muon(learning_rate=1e-2, epsilon=1e-2),
    "schedule_free": ScheduleFreeAdamW(betas=(0.5, 0.9), epsilon=1e-2),
}
RATE = np.float32(1e-2)
SHAPES = [shape for shape in itertools.product((1, 2, 4, 8), repeat=3) if np.prod(shape) == 8]
QUICK, SLOW = [(2, 2, 2)], [(8, 1, 1), (1, 8, 1), (1, 2, 4)]
Mesh = jax.sharding.Mesh


def make_mesh(data: int = 1, fsdp: int = 1, tensor: int = 1, context: int = 1) -> Mesh:
    config = MeshConfig(data=data, fsdp=fsdp, tensor=tensor, context=context)
    return config.build(jax.devices()[: data * fsdp * tensor * context])


@functools.cache
def make_components(
    *shape: int, name: str = "adamw", clip_norm: float | None = 1.0, qk_clip: float | None = None
) -> StepComponents:
    mesh = make_mesh(*shape)
    model = MODEL.build(VOCAB, mesh)
    optimizer = OPTIMIZERS[name].build(model.axes, mesh)
    return StepComponents(model, CrossEntropy().build(VOCAB, mesh), optimizer, mesh, clip_norm, qk_clip=qk_clip)


_COMPILED: dict[tuple[int, int], Any] = {}


def compiled(components: StepComponents, micro_batches: int) -> Any:
    """The step, compiled once. components: of `make_components`, which keeps them alive."""
    key = (id(components), micro_batches)
    if key not in _COMPILED:
        _COMPILED[key] = lower_train_step(components, BATCH, SEQ, micro_batches).compile()
    return _COMPILED[key]


def make_batch(seed: int, masked: float = 0.3) -> dict[str, np.ndarray]:
    """Packed documents; the mask removes very different numbers of positions per row."""
    rng = np.random.default_rng(seed)
    segments = np.sort(rng.integers(1, 4, (BATCH, SEQ)), axis=1).astype(np.int32)
    starts = np.concatenate([np.ones((BATCH, 1), bool), segments[:, 1:] != segments[:, :-1]], axis=1)
    index = np.arange(SEQ)
    share = np.linspace(0, 2 * masked, BATCH)[:, None] if masked < 1 else 1.0
    return {
        "tokens": rng.integers(0, VOCAB, (BATCH, SEQ)).astype(np.int32),
        "targets": rng.integers(0, VOCAB, (BATCH, SEQ)).astype(np.int32),
        "segment_ids": segments,
        "positions": (index - np.maximum.accumulate(np.where(starts, index, 0), axis=1)).astype(np.int32),
        "loss_mask": rng.random((BATCH, SEQ)) >= share,
    }


def host(tree: Any) -> Any:
    return jax.tree.map(np.asarray, tree)


def run(
    components: StepComponents, batches: list[dict[str, np.ndarray]], micro_batches: int = 1, start: Any = None
) -> Any:
    """(the state on the host, the metrics of every step)"""
    step = compiled(components, micro_batches)
    layout = state.shardings(components.model, components.optimizer, components.mesh)
    now = state.create(components.model, components.optimizer, components.mesh, seed=0) if start is None else start
    now = jax.device_put(now, layout)
    metrics = []
    for number, batch in enumerate(batches):
        arrays = jax.device_put(batch, sharding.batch_sharding(components.mesh))
        now, measured = step(now, arrays, RATE, fingerprint.split(number * BATCH))
        metrics.append(host(measured))
    return host(now), metrics


def assert_close(found: Any, expected: Any, tolerance: float = 2e-5) -> None:
    """States and metrics within rounding; the fingerprint and the counts exactly."""
    for mine, theirs in zip(found[1], expected[1], strict=True):
        for name in ("loss", "ce_loss", "grad_norm"):
            np.testing.assert_allclose(mine[name], theirs[name], rtol=tolerance)
    for item in ("params", "opt"):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance),
            found[0][item],
            expected[0][item],
        )
    jax.tree.map(np.testing.assert_array_equal, found[0]["meta"], expected[0]["meta"])


@pytest.fixture(scope="module")
def alone() -> Any:
    """Two steps on one device."""
    return run(make_components(), [make_batch(1), make_batch(2)])


@pytest.mark.parametrize("shape", nightly_but(zip(QUICK), zip(SHAPES), slow=zip(SLOW)))
def test_every_mesh_gives_what_one_device_gives(shape: tuple[int, int, int], alone: Any) -> None:
    found = run(make_components(*shape), [make_batch(1), make_batch(2)])
    assert_close(found, alone)


@pytest.mark.slow
@pytest.mark.parametrize("shape", nightly_but([((2, 2, 1, 2),)], zip([(2, 2, 1, 2), (1, 4, 2, 1), (1, 1, 1, 8)])))
def test_every_mesh_with_muon(shape: tuple[int, ...]) -> None:
    batches = [make_batch(1), make_batch(2)]
    assert_close(run(make_components(*shape, name="muon"), batches), run(make_components(name="muon"), batches), 1e-3)


def test_loss_and_gradient_are_the_plain_ones(alone: Any) -> None:
    """One step against whole logits, a log-softmax and one gradient."""
    components, batch = make_components(), make_batch(1)
    params = state.create(components.model, components.optimizer, components.mesh, seed=0)["params"]

    def plain(params: Any) -> jax.Array:
        inputs = (jnp.asarray(batch[name]) for name in ("tokens", "segment_ids", "positions"))
        x_BTD = components.model.hidden(params, *inputs).x
        logits_BTV = jnp.einsum("btd,dv->btv", x_BTD, components.model.head(params))[..., :VOCAB]
        nats_BT = -jnp.take_along_axis(jax.nn.log_softmax(logits_BTV), batch["targets"][..., None], axis=-1)[..., 0]
        return (nats_BT * batch["loss_mask"]).sum() / batch["loss_mask"].sum()

    loss, gradient = jax.jit(jax.value_and_grad(plain))(params)
    norm = np.sqrt(sum(np.square(np.asarray(leaf, np.float64)).sum() for leaf in jax.tree.leaves(gradient)))
    first = alone[1][0]
    np.testing.assert_allclose(first["loss"], loss, rtol=1e-5)
    np.testing.assert_allclose(first["grad_norm"], norm, rtol=1e-5)
    words = fingerprint.of_rows(batch, *fingerprint.row_numbers(fingerprint.split(0), BATCH))
    np.testing.assert_array_equal(first["fingerprint"], words)


@pytest.mark.parametrize(
    ("shape", "micro_batches"),
    nightly_but([((), 4)], [((), 4), ((), 8), ((2, 2, 2), 2)], slow=[((2, 2, 2), 2)]),
)
def test_accumulation_changes_nothing(shape: tuple[int, ...], micro_batches: int, alone: Any) -> None:
    """Micro-batches with very different numbers of tokens: a mean of their means would be a different loss."""
    counts = make_batch(1)["loss_mask"].reshape(-1, micro_batches, SEQ).sum(axis=(0, 2))
    assert counts.max() > 1.1 * counts.min()
    assert_close(run(make_components(*shape), [make_batch(1), make_batch(2)], micro_batches), alone)


def test_a_masked_batch_changes_nothing_but_the_step(alone: Any) -> None:
    before = alone[0]
    after, (measured,) = run(make_components(), [make_batch(3, masked=1.0)], start=before)
    for item in ("params", "opt"):
        jax.tree.map(np.testing.assert_array_equal, after[item], before[item])
    assert after["meta"].pop("step") == before["meta"]["step"] + 1
    for name, value in after["meta"].items():
        np.testing.assert_array_equal(value, before["meta"][name])
    assert measured["loss"] == measured["grad_norm"] == 0


def test_updates_with_non_finite_gradients_are_left_out_and_counted(alone: Any) -> None:
    components, good = make_components(), alone[0]
    bad = host(good)
    leaves, tree = jax.tree.flatten(bad["params"])
    bad["params"] = tree.unflatten([np.full_like(leaves[0], np.nan), *leaves[1:]])
    after, measured = run(components, [make_batch(1), make_batch(2)], start=bad)
    assert [(m["skipped"], m["skipped_in_a_row"]) for m in measured] == [(1, 1), (2, 2)]
    assert not np.isfinite(measured[0]["loss"])
    for item in ("params", "opt"):
        jax.tree.map(np.testing.assert_array_equal, after[item], bad[item])
    # Their data counts: it was read, and a resume must not read it again.
    assert (after["meta"]["fingerprint"] != good["meta"]["fingerprint"]).any()
    assert after["meta"]["step"] == good["meta"]["step"] + 2
    _, (measured,) = run(components, [make_batch(1)], start={**after, "params": good["params"]})
    assert (measured["skipped"], measured["skipped_in_a_row"]) == (2, 0)


def test_clipping(alone: Any) -> None:
    """The reported norm is from before clipping; a limit near zero leaves only the decay."""
    components = make_components(clip_norm=1e-9)
    moved, (measured,) = run(components, [make_batch(1)])
    np.testing.assert_array_equal(measured["grad_norm"], alone[1][0]["grad_norm"])
    fresh = host(state.create(components.model, components.optimizer, components.mesh, seed=0))
    decay = 1 - RATE * ADAMW.weight_decay
    for before, after in zip(jax.tree.leaves(fresh["params"]), jax.tree.leaves(moved["params"]), strict=True):
        assert np.allclose(after, before, atol=1e-8) or np.allclose(after, before * decay, atol=1e-8)


@pytest.mark.slow
def test_qk_clip_scales_what_the_optimizer_gives(alone: Any) -> None:
    """By the largest logits of all micro-batches, after the update; the loss and the rest are as without."""
    components, clipping = make_components(name="muon"), make_components(name="muon", qk_clip=4.0)
    plain, (before,) = run(components, [make_batch(1)])
    clipped, (measured,) = run(clipping, [make_batch(1)])
    assert measured["loss"] == before["loss"]
    assert "max_logit" not in before
    model = components.model
    assert isinstance(model, ClippableModel)
    fresh = state.create(model, components.optimizer, components.mesh, seed=0)["params"]
    inputs = (make_batch(1)[name] for name in ("tokens", "segment_ids", "positions"))
    tops = model.watching_logits().hidden(fresh, *inputs).max_logits
    assert tops is not None
    np.testing.assert_allclose(measured["max_logit"], tops.max(), rtol=1e-5)
    assert tops.min() < 4 < tops.max()
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7),
        clipped["params"],
        host(model.clip_logits(plain["params"], tops, 4.0)),
    )
    jax.tree.map(np.testing.assert_array_equal, clipped["opt"], plain["opt"])
    parts, (again,) = run(clipping, [make_batch(1)], micro_batches=4)
    np.testing.assert_allclose(again["max_logit"], measured["max_logit"], rtol=1e-5)
    for name in ("q", "k"):
        found, expected = (after["params"]["layers"]["attention"][name]["kernel"] for after in (parts, clipped))
        # Muon's products in bfloat16 amplify rounding; without the clip, weights differ by 0.05.
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(2, 2, 2, 1), (1, 2, 1, 4)])
def test_qk_clip_on_every_mesh(shape: tuple[int, ...]) -> None:
    alone, sharded = (make_components(*sizes, name="muon", qk_clip=4.0) for sizes in ((), shape))
    batches = [make_batch(1), make_batch(2)]
    expected, found = run(alone, batches), run(sharded, batches, micro_batches=2)
    for mine, theirs in zip(found[1], expected[1], strict=True):
        np.testing.assert_allclose(mine["max_logit"], theirs["max_logit"], rtol=1e-3)
    assert_close(found, expected, tolerance=1e-3)


@pytest.mark.slow
def test_gradients_are_taken_where_the_optimizer_says(alone: Any) -> None:
    """The third step's loss is that of the point between the average and the newest iterate, equal until then."""
    components, batch = make_components(name="schedule_free"), make_batch(3)
    optimizer: Any = components.optimizer
    after, metrics = run(components, [make_batch(1), make_batch(2)])
    np.testing.assert_allclose(metrics[0]["loss"], alone[1][0]["loss"], rtol=1e-6)
    evaluated = jax.jit(eval_step(components))
    average, newest = after["params"], after["opt"].z
    losses = [
        sums["nats"] / sums["tokens"]
        for params in (optimizer.gradient_at(average, after["opt"]), average, newest)
        for sums in [evaluated(params, batch, np.zeros(VOCAB, np.int32))]
    ]
    _, (third,) = run(components, [batch], start=after)
    np.testing.assert_allclose(third["loss"], losses[0], rtol=1e-6)
    assert abs(losses[0] - losses[1]) > 1e-4 < abs(losses[0] - losses[2])


def test_evaluation_counts_nats_tokens_and_bytes() -> None:
    components, batch = make_components(), make_batch(1)
    params = state.create(components.model, components.optimizer, components.mesh, seed=0)["params"]
    token_bytes = np.random.default_rng(0).integers(0, 9, VOCAB).astype(np.int32)
    sums = jax.jit(eval_step(components))(params, batch, token_bytes)
    _, (measured,) = run(components, [batch])
    assert sums["tokens"] == batch["loss_mask"].sum()
    assert sums["bytes"] == token_bytes[batch["targets"][batch["loss_mask"]]].sum()
    np.testing.assert_allclose(sums["nats"] / sums["tokens"], measured["loss"], rtol=1e-6)


@pytest.mark.parametrize(
    ("shape", "micro_batch_tokens", "expected"),
    [
        ((1, 1, 1), None, 1),
        ((1, 1, 1), 128, 1),
        ((1, 1, 1), 127, 2),
        ((1, 1, 1), 1, 8),  # a row is never cut
        ((2, 2, 2), 16, 2),
        ((8, 1, 1), 1, 1),
    ],
)
def test_how_many_micro_batches(shape: tuple[int, int, int], micro_batch_tokens: int | None, expected: int) -> None:
    assert accumulation(make_mesh(*shape), BATCH, SEQ, micro_batch_tokens) == expected


def test_a_mesh_that_does_not_divide_the_batch() -> None:
    with pytest.raises(UserError, match=r"12 rows.*mesh.data \* mesh.fsdp = 8.*work: 1, 2, 3, 4, 6, 12"):
        accumulation(make_mesh(2, 4), 12, SEQ, None)
    with pytest.raises(UserError, match=r"seq_len=15.*mesh.context=2"):
        accumulation(make_mesh(4, 1, 1, 2), 8, 15, None)


def test_auxiliary_losses_are_added_and_reported_however_a_batch_is_cut(alone: Any) -> None:
    """A model's own loss, a mean over its rows, is weighted by each micro-batch's tokens."""
    components = make_components()

    class Routed:
        """The model, with a loss that differs between rows."""

        def __getattr__(self, name: str) -> Any:
            return getattr(components.model, name)

        def hidden(self, params: Any, tokens: Any, segment_ids: Any, positions: Any) -> Hidden:
            x = components.model.hidden(params, tokens, segment_ids, positions).x
            return Hidden(x, {"router_loss": 0.01 * jnp.mean(jnp.square(x))}, {"load": jnp.mean(tokens * 1.0)})

    model: Any = Routed()
    routed = dataclasses.replace(components, model=model)
    batch = make_batch(1)
    params = state.create(components.model, components.optimizer, components.mesh, seed=0)["params"]
    _, (whole,) = run(routed, [batch])
    np.testing.assert_allclose(whole["loss"], alone[1][0]["loss"] + whole["router_loss"], rtol=1e-6)
    x = model.hidden(params, batch["tokens"], batch["segment_ids"], batch["positions"]).x
    np.testing.assert_allclose(whole["router_loss"], 0.01 * np.mean(np.square(x)), rtol=1e-5)
    np.testing.assert_allclose(whole["load"], batch["tokens"].mean(), rtol=1e-6)
    assert whole["grad_norm"] != alone[1][0]["grad_norm"]
    _, (cut,) = run(routed, [batch], micro_batches=4)
    counts = batch["loss_mask"].reshape(-1, 4, SEQ).sum(axis=(0, 2))
    loads = batch["tokens"].reshape(-1, 4, SEQ).mean(axis=(0, 2))
    np.testing.assert_allclose(cut["load"], (counts * loads).sum() / counts.sum(), rtol=1e-6)
    np.testing.assert_allclose(cut["loss"], cut["ce_loss"] + cut["router_loss"], rtol=1e-6)
