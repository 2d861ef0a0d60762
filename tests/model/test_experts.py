"""Mixtures of experts against a loop over all experts in float64, on every mesh and under every load."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxtrain.distributed import sharding
from jaxtrain.distributed.sharding import MeshConfig
from jaxtrain.errors import UserError
from jaxtrain.model import experts as module
from jaxtrain.model.experts import Experts, MixtureOfExperts, losses_and_metrics
from jaxtrain.model.llama import LlamaConfig
from tests.model.test_llama import VOCAB, packed_batch, random_params

CONFIG = LlamaConfig(hidden_size=16, intermediate_size=24, num_layers=2, num_heads=2, num_kv_heads=2, dtype="float32")
EXPERTS = Experts(num_experts=8, experts_per_token=3, intermediate_size=12)
BATCH, SEQ = 8, 16
MESHES = [
    {"expert": 8},
    {"expert": 2, "fsdp": 2, "tensor": 2},
    pytest.param({"expert": 4, "context": 2}, marks=pytest.mark.slow),
    pytest.param({"fsdp": 4, "tensor": 2}, marks=pytest.mark.slow),
    pytest.param({"data": 2, "expert": 4}, marks=pytest.mark.nightly),
    pytest.param({"data": 2, "fsdp": 2, "context": 2}, marks=pytest.mark.nightly),
]


def build(mesh=None, experts=EXPERTS):
    graph, state = nnx.split(nnx.eval_shape(lambda: MixtureOfExperts(CONFIG, experts, mesh, nnx.Rngs(params=0))))
    return graph, nnx.to_pure_dict(state)


def random_arrays(skew=0.0, experts=EXPERTS):
    """(parameters, x, which tokens are real, the gradient of the output). `skew` favors the first experts."""
    rng = np.random.default_rng(0)
    params = {name: 0.5 * rng.standard_normal(leaf.shape) for name, leaf in build(experts=experts)[1].items()}
    x, dy = rng.standard_normal((2, BATCH, SEQ, CONFIG.hidden_size))
    x[..., 0] = 1
    params["router"][0] -= skew * np.arange(experts.num_experts)
    real = np.arange(SEQ) < np.array([SEQ, 5, SEQ, SEQ, 0, SEQ, SEQ, 9])[:, None]
    return params, x, real, dy


def reference(params, x, real, *, experts=EXPERTS):
    """All experts on all tokens, in a loop. Returns y, and balance, z, entropy and load."""
    E, k = experts.num_experts, experts.experts_per_token
    logits = x @ params["router"]
    probs = jax.nn.softmax(logits)
    least = jnp.sort(probs, axis=-1)[..., -k:].min(-1, keepdims=True)
    chosen = (probs >= least) & real[..., None]
    weights = jnp.where(chosen, probs, 0)
    if experts.normalize:
        weights = weights / jnp.maximum(weights.sum(-1, keepdims=True), 1e-30)
    y = jnp.zeros_like(x)
    for e in range(E):
        inner = jax.nn.silu(x @ params["gate"][e]) * (x @ params["up"][e])
        y += weights[..., e : e + 1] * (inner @ params["down"][e])
    share, mean = (jnp.where(real[..., None], v, 0).sum((0, 1)) / real.sum() for v in (1.0 * chosen, probs))
    entropy = -(probs * jnp.log(probs)).sum(-1)
    z = jax.scipy.special.logsumexp(logits, axis=-1) ** 2
    entropy, z = (jnp.where(real, v, 0).sum() / real.sum() for v in (entropy, z))
    return y, {"balance": E * (share * mean).sum(), "z": z, "entropy": entropy, "load": share * E / k}


def differentiated(function, params, x, real, dy):
    """y, the statistics, and the gradients of sum(dy * y) + balance + 0.1 z by the parameters and x."""

    def total(params, x):
        y, statistics = function(params, x, real)
        return (dy * y).sum() + statistics["balance"] + 0.1 * statistics["z"], (y, statistics)

    (_, out), grads = jax.jit(jax.value_and_grad(total, (0, 1), has_aux=True))(params, x)
    return jax.device_get((out, grads))


def through_module(graph):
    return lambda params, x, real: nnx.merge(graph, params)(x, real)


def assert_close(got, want, tolerance):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * np.abs(b).max()), got, want)


@pytest.mark.parametrize("flat", [True, False])
@pytest.mark.parametrize("normalize", [True, False])
def test_values_and_gradients_are_those_of_a_loop_over_all_experts(normalize, flat):
    experts = dataclasses.replace(EXPERTS, normalize=normalize)
    arrays = random_arrays(skew=0.4)
    given = [arrays[0], *(a.reshape(-1, *a.shape[2:]) if flat else a for a in arrays[1:])]
    with jax.enable_x64(True):
        want = differentiated(lambda *a: reference(*a, experts=experts), *arrays)
        got = differentiated(through_module(build(experts=experts)[0]), *given)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a.reshape(b.shape), b, rtol=0, atol=1e-12 * np.abs(b).max()), got, want
    )


@pytest.fixture(scope="module")
def single():
    """On one device in fp32, with even and with uneven loads."""
    found = {}
    for skew in (0.0, 3.0):
        arrays = jax.tree.map(lambda a: a.astype(np.float32) if a.dtype == np.float64 else a, random_arrays(skew))
        found[skew] = arrays, differentiated(through_module(build()[0]), *arrays)
    return found


@pytest.mark.parametrize("skew", [0.0, 3.0])
@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_every_mesh_gives_what_one_device_gives(mesh, skew, single):
    built = MeshConfig(**({"fsdp": 1} | mesh)).build()
    graph, _ = build(built)
    (params, x, real, dy), want = single[skew]
    rows = sharding.sharding(built, ("batch", "sequence"))
    got = differentiated(through_module(graph), params, *jax.device_put((x, real, dy), rows))
    assert_close(got, want, 2e-5)


def test_a_load_that_is_too_uneven_for_one_exchange_takes_several(single):
    """With skew 3 nearly all choices go to the first experts, so to few devices."""
    load = single[3.0][1][0][1]["load"]
    assert load.max() > module.SLACK
    assert load.min() < 0.05


def test_the_same_bits_each_time(single):
    built = MeshConfig(fsdp=2, expert=2, tensor=2).build()
    arrays = single[3.0][0]
    function = jax.grad(lambda p, x, r, dy: (through_module(build(built)[0])(p, x, r)[0] * dy).sum(), (0, 1))
    compiled = jax.jit(function).lower(*arrays).compile()
    assert "all-to-all" in (compiled.as_text() or "")
    first, second = jax.device_get([compiled(*arrays) for _ in range(2)])
    jax.tree.map(np.testing.assert_array_equal, first, second)
    # Sums that a scatter makes have no order.
    assert not re.findall(r"= scatter\S*\[", str(jax.make_jaxpr(function)(*arrays)))


def test_losses_and_metrics():
    params, x, real, _ = random_arrays(skew=0.4)
    _, one = reference(params, x, real)
    stacked = jax.tree.map(lambda a: jnp.stack([a, a]), one)
    losses, metrics = losses_and_metrics(EXPERTS, [stacked, one])
    assert losses["router_balance_loss"] == pytest.approx(0.01 * one["balance"])
    assert losses["router_z_loss"] == pytest.approx(0.001 * one["z"])
    assert metrics["expert_load_max"] == one["load"].max()
    assert metrics["expert_load_min"] == one["load"].min()
    assert metrics["expert_dropped"] == pytest.approx(0, abs=1e-6)


@pytest.mark.parity
def test_the_load_balance_loss_is_that_of_transformers():
    torch = pytest.importorskip("torch")
    mixtral = pytest.importorskip("transformers.models.mixtral.modeling_mixtral")
    params, x, real, _ = random_arrays(skew=0.4)
    logits = (x @ params["router"]).astype(np.float32)
    ids = jnp.where(real[..., None], jax.lax.top_k(logits, 3)[1], 8)
    got = module._statistics(EXPERTS, jnp.asarray(logits), ids, jnp.asarray(real))["balance"]
    flat = torch.tensor(logits.reshape(-1, 8))
    want = mixtral.load_balancing_loss_func((flat,), 8, 3, torch.tensor(real))
    assert got == pytest.approx(float(want), rel=1e-5)


@pytest.mark.parametrize(
    "changes",
    [{"experts_per_token": 9}, {"num_experts": 0}, {"balance_loss": -1.0}, {"z_loss": float("nan")}],
    ids=str,
)
def test_refuses(changes):
    with pytest.raises(UserError, match=next(iter(changes))):
        dataclasses.replace(EXPERTS, **changes).check()


# ---- Models with experts

MIXED = dataclasses.replace(
    CONFIG,
    num_layers=4,
    layers="1 global : 1 global experts",
    experts=dataclasses.replace(EXPERTS, num_experts=4, experts_per_token=2, shared_size=10),
    remat="none",
)


def loss_and_grads(config, mesh=None):
    """Of logits and auxiliary losses, with padding."""
    model = config.build(VOCAB, mesh)
    params = random_params(model)
    tokens, segments, positions = packed_batch()
    segments[3, 15:] = 0
    batch = (tokens, segments, positions)
    if mesh is not None:
        params = jax.device_put(params, sharding.tree_shardings(mesh, model.axes))
        batch = jax.device_put(batch, sharding.batch_sharding(mesh))

    def loss(params):
        x_BTD, losses, metrics, _ = model.hidden(params, *batch)
        targets = jnp.roll(batch[0], -1, axis=1)
        nats = -jnp.take_along_axis(jax.nn.log_softmax(x_BTD @ model.head(params)), targets[..., None], axis=-1)
        return jnp.mean(nats[..., 0], where=batch[1] != 0) + sum(losses.values()), (losses, metrics)

    return jax.device_get(jax.jit(jax.value_and_grad(loss, has_aux=True))(params))


@pytest.fixture(scope="module")
def mixed():
    return loss_and_grads(MIXED)


@pytest.mark.parametrize("mesh", MESHES[1:], ids=str)
def test_every_mesh_gives_the_models_loss_and_gradients(mesh, mixed):
    assert_close(loss_and_grads(MIXED, MeshConfig(**({"fsdp": 1} | mesh)).build()), mixed, 5e-5)


@pytest.mark.parametrize(
    "changes",
    [
        {"remat": "full"},
        pytest.param({"remat": "dots"}, marks=pytest.mark.slow),
        pytest.param({"scan_layers": False, "remat": "full"}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_remat_and_scan_change_nothing(changes, mixed):
    assert_close(loss_and_grads(dataclasses.replace(MIXED, **changes)), mixed, 1e-5)


def test_stacks_and_counts():
    model = MIXED.build(VOCAB, None)
    assert model.stacks == {"layers": [0, 2], "expert_layers": [1, 3]}
    assert model.shapes["expert_layers"]["mlp"]["gate"].shape == (2, 4, 16, 12)
    one = 3 * 16 * 12
    assert model.num_params_non_embedding - model.num_active_params == 2 * (4 - 2) * one
    every = dataclasses.replace(MIXED, layers=None).build(VOCAB, None)
    assert every.stacks == {"expert_layers": [0, 1, 2, 3]}
    assert MIXED.experts is not None
    more = dataclasses.replace(MIXED.experts, num_experts=8)
    assert dataclasses.replace(MIXED, experts=more).build(VOCAB, None).flops_per_token(32) == pytest.approx(
        model.flops_per_token(32) + 6 * 2 * 16 * 4  # more columns of the routers
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": "1 global"}, "write which layers have them"),
        ({"experts": None}, "set experts"),
        ({"experts": dataclasses.replace(EXPERTS, experts_per_token=0)}, "experts_per_token=0"),
    ],
)
def test_experts_and_the_pattern_agree(changes, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(MIXED, **changes).build(VOCAB, None)


def test_generation_with_a_cache_is_recomputation():
    model = MIXED.build(VOCAB, None)
    params = random_params(model)
    tokens = packed_batch(2, 12)[0]
    start = np.array([0, 3])
    prefill, decode = jax.jit(model.prefill, static_argnums=3), jax.jit(model.decode_one)
    x_BD, cache = prefill(params, tokens[:, :8], start, 12)
    for slot in range(8, 13):
        real = (np.arange(slot)[None] >= start[:, None]).astype(np.int32)
        positions = np.maximum(np.arange(slot)[None] - start[:, None], 0)
        want = jax.jit(model.hidden)(params, tokens[:, :slot], real, positions).x[:, -1] if slot in (8, 12) else x_BD
        np.testing.assert_allclose(x_BD, want, rtol=0, atol=1e-5)
        if slot < 12:
            x_BD, cache = decode(params, tokens[:, slot], np.int32(slot), start, cache)
