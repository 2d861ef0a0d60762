"""Muon against float64 NumPy, one layer at a time."""

import collections
import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtrain.distributed.sharding import MeshConfig, sharding
from jaxtrain.errors import UserError
from jaxtrain.optim.adamw import AdamW
from jaxtrain.optim.muon import Muon, newton_schulz
from tests.optim.battery import AXES, SIZES, Battery, assert_trees_close, run, sample

EXACT = Muon(learning_rate=0.01, newton_schulz_dtype="float32")


class TestMuon(Battery):
    config = EXACT
    sharded_rtol = 1e-3


def orthogonalized(matrix):
    """Jordan's five steps, float64, [m, n]."""
    x = matrix / (np.sqrt((matrix**2).sum()) + 1e-7)
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x - 4.7750 * gram @ x + 2.0315 * gram @ gram @ x
    return x


def reference(params, gradients, rate, momentum, weight_decay, shape):
    """The weight of one layer in its own shape; `shape` is [fan in, fan out]."""
    weight = np.asarray(params, np.float64).reshape(shape)
    buffer = np.zeros(shape)
    for gradient in gradients:
        gradient = np.asarray(gradient, np.float64).reshape(shape)
        buffer = momentum * buffer + gradient  # Jordan's first form: its scale cancels
        update = orthogonalized(gradient + momentum * buffer)
        weight = weight - rate * (0.2 * np.sqrt(max(shape)) * update + weight_decay * weight)
    return weight.reshape(params.shape)


MATRICES = {
    ("layers", "query", "kernel"): (SIZES["embed"], SIZES["heads"] * SIZES["head_dim"]),
    ("layers", "out", "kernel"): (SIZES["heads"] * SIZES["head_dim"], SIZES["embed"]),
    ("layers", "up"): (SIZES["embed"], SIZES["mlp"]),
    ("layers", "down"): (SIZES["mlp"], SIZES["embed"]),
}


def at(tree, path):
    for name in path:
        tree = tree[name]
    return tree


@pytest.mark.parametrize("path", MATRICES, ids=lambda path: path[1])
def test_each_layer_equals_float64(path):
    config = dataclasses.replace(EXACT, momentum=0.9, weight_decay=0.3)
    gradients = [sample(seed) for seed in range(1, 5)]
    params, _ = run(config.build(AXES), sample(0), gradients, rate=0.02)
    for layer in range(SIZES["layers"]):
        expected = reference(
            at(sample(0), path)[layer], [at(g, path)[layer] for g in gradients], 0.02, 0.9, 0.3, MATRICES[path]
        )
        np.testing.assert_allclose(at(params, path)[layer], expected, rtol=1e-4, atol=1e-4)


def test_the_rest_takes_adamw():
    gradients = [sample(seed) for seed in range(1, 5)]
    config = dataclasses.replace(EXACT, adam_ratio=0.5, decay_embeddings=True)
    params, state = run(config.build(AXES), sample(0), gradients, rate=0.02)
    adam, _ = run(AdamW(decay_embeddings=True).build(AXES), sample(0), gradients, rate=0.01)
    for path in [
        ("embedding",),
        ("head",),
        ("norm", "scale"),
        ("layers", "norm", "scale"),
        ("layers", "query", "bias"),
    ]:
        np.testing.assert_allclose(at(params, path), at(adam, path), rtol=1e-6)
    assert len(jax.tree.leaves(state["momentum"])) == len(MATRICES) + len(AXES["layers"]["experts"])
    assert len(jax.tree.leaves(state["adam"].mu)) == 5


def test_bfloat16_products_hardly_matter():
    """A bf16 product errs by 2^-8, which five steps with slopes up to 3.4 amplify on small singular values."""
    up, axes = {"up": sample(1)["layers"]["up"]}, {"up": AXES["layers"]["up"]}
    zero = jax.tree.map(jnp.zeros_like, up)
    exact, rounded = (run(config.build(axes), zero, [up], rate=1.0)[0]["up"] for config in (EXACT, Muon()))
    assert np.abs(exact - rounded).max() < 0.1 * np.abs(exact).max()
    assert (exact != rounded).any()


def test_equals_unstacked_layers():
    gradients = [sample(seed) for seed in range(1, 4)]
    stacked, _ = run(EXACT.build(AXES), sample(0), gradients)
    single, _ = run(
        EXACT.build({"up": ("embed", "mlp")}),
        {"up": sample(0)["layers"]["up"][1]},
        [{"up": g["layers"]["up"][1]} for g in gradients],
    )
    np.testing.assert_allclose(single["up"], stacked["layers"]["up"][1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["up", "down"])
def test_each_expert_is_a_matrix(name):
    axes, (start, *gradients) = (
        AXES["layers"]["experts"][name],
        (sample(s)["layers"]["experts"][name] for s in range(4)),
    )
    stacked, _ = run(EXACT.build({"w": axes}), {"w": start}, [{"w": g} for g in gradients])
    layers = (axes[0], *axes[2:])
    for expert in range(SIZES["experts"]):
        of_one = [{"w": array[:, expert]} for array in (start, *gradients)]
        single, _ = run(EXACT.build({"w": layers}), of_one[0], of_one[1:])
        np.testing.assert_allclose(single["w"], stacked["w"][:, expert], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("shape", [(2, 24, 64), (2, 64, 24)])
def test_singular_values_come_near_one(dtype, shape):
    x = jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)
    y = newton_schulz(x, jnp.dtype(dtype))
    assert y.dtype == dtype
    y = np.asarray(y, np.float32)
    values = np.linalg.svd(y, compute_uv=False)
    assert 0.6 < values.min() < values.max() < 1.3  # Jordan 2024: 0.7 to 1.2
    u, _, vt = np.linalg.svd(x, full_matrices=False)
    assert np.abs(y - u @ vt).max() < 0.2


def test_products_are_of_the_short_side():
    flops = [
        (jax.jit(newton_schulz, static_argnums=1).lower(jnp.zeros(shape), jnp.float32).cost_analysis() or {})["flops"]
        for shape in [(1, 8, 64), (1, 64, 8)]
    ]
    np.testing.assert_allclose(*flops, rtol=0.01)


def test_update_has_the_size_of_adams():
    """Moonlight, section 2.2: the root mean square of AdamW's updates is 0.2 to 0.4."""
    up = {"up": sample(1)["layers"]["up"]}
    config = dataclasses.replace(EXACT, weight_decay=0.0)
    after, _ = run(config.build({"up": AXES["layers"]["up"]}), jax.tree.map(jnp.zeros_like, up), [up], rate=1.0)
    assert 0.13 < np.sqrt(np.mean(np.square(after["up"]))) < 0.25


@pytest.mark.parametrize("layers", [8, 6, 3])
@pytest.mark.parametrize(
    ("sizes", "moves"),
    [
        ({"fsdp": 8}, {"all-to-all": 2}),
        ({"fsdp": 4, "tensor": 2}, {"all-to-all": 4}),
        ({"data": 2, "fsdp": 2, "tensor": 2}, {"all-to-all": 4, "all-gather": 1}),
    ],
    ids=str,
)
def test_layers_are_spread_over_devices(sizes, moves, layers):
    """Each device orthogonalizes its share of whole matrices; by default XLA gathers all layers on every device."""
    mesh = MeshConfig(**sizes).build()
    axes = {"up": ("layers", "embed", "mlp")}
    optimizer = EXACT.build(axes, mesh)
    up = {"up": jax.ShapeDtypeStruct((layers, 64, 128), jnp.float32, sharding=sharding(mesh, axes["up"]))}
    state = {"momentum": up, "adam": jax.eval_shape(optimizer.init, up)["adam"]}
    text = jax.jit(optimizer.update).lower(up, state, up, jnp.float32(1)).compile().as_text()
    assert text is not None
    shares = set(re.findall(r"= f32\[([\d,]*)64,64\]\S* dot\(", text))
    split = math.prod(size for name, size in sizes.items() if name != "data")
    shared_by = split if split >= layers else 8
    share = -(-layers // shared_by)
    assert shares <= ({"", "1,"} if share == 1 else {f"{share},"})
    assert shares
    found = collections.Counter(re.findall(r" (all-to-all|all-gather|all-reduce|collective-permute)\(", text))
    assert found == {name: count for name, count in moves.items() if name != "all-gather" or shared_by == 8}


@pytest.mark.parametrize(
    "wrong", [{"momentum": 1.0}, {"adam_ratio": -1.0}, {"newton_schulz_dtype": "float16"}], ids=str
)
def test_refuses_wrong_fields(wrong):
    with pytest.raises(UserError, match=next(iter(wrong))):
        dataclasses.replace(EXACT, **wrong).check()


def test_params_keep_their_order():
    params, _ = run(EXACT.build(AXES), sample(0), [sample(1)])
    assert_trees_close(jax.tree.map(jnp.shape, params), jax.tree.map(jnp.shape, sample(0)), rtol=0)
    assert list(params) == list(sample(0))
