"""Products of 8-bit values against float64, and what the compiler is given and makes of them."""

import dataclasses
import importlib.util
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtrain import cli
from jaxtrain.distributed.sharding import MeshConfig
from jaxtrain.errors import UserError
from jaxtrain.model import fp8
from jaxtrain.model.llama import Llama, LlamaConfig
from jaxtrain.trainer import offline
from jaxtrain.trainer.step import Variant

# The largest relative error of a value, and the largest error of one near zero in units of the scale.
ERROR = {fp8.FORWARD: (2**-4, 2**-10), fp8.BACKWARD: (2**-3, 2**-17)}
MODEL = LlamaConfig(
    hidden_size=32, intermediate_size=64, num_layers=3, num_heads=4, num_kv_heads=2, max_seq_len=32, remat="none"
)


def multiply(x, w):
    return fp8.matmul(x, w, lambda values: values)


@pytest.mark.parametrize("dtype", [fp8.FORWARD, fp8.BACKWARD])
@pytest.mark.parametrize("size", [1e-36, 1e-3, 1.0, 447.0, 3e38])
def test_rounding(dtype, size):
    x = np.random.default_rng(0).standard_normal(10_000).astype(np.float32)
    x *= size / np.abs(x).max()
    values, scale = jax.jit(fp8.rounded, static_argnums=1)(x, dtype)
    assert np.frexp(float(scale))[0] == 0.5
    relative, absolute = ERROR[dtype]
    error = np.abs(np.asarray(values, np.float64) * float(scale) - x)
    assert (error <= np.maximum(relative * np.abs(x), absolute * float(scale)) * (1 + 1e-6)).all()
    largest = np.abs(np.asarray(values, np.float64)).max()
    assert size == 1e-36 or float(jnp.finfo(dtype).max) / 4 < largest <= float(jnp.finfo(dtype).max)


@pytest.mark.parametrize("dtype", [fp8.FORWARD, fp8.BACKWARD])
def test_zeros_stay_zeros_and_what_is_not_finite_stays_so(dtype):
    """The step's guard sees the gradient's norm."""
    values, scale = fp8.rounded(jnp.zeros(3), dtype)
    assert not np.asarray(values, np.float32).any()
    assert np.isfinite(scale)
    for bad in (np.inf, -np.inf, np.nan):
        values, scale = fp8.rounded(jnp.array([1.0, bad]), dtype)
        assert not np.isfinite(float(values[1]) * float(scale))


@pytest.mark.parametrize("shape", [(48, 40), (3, 16, 40)])
def test_all_three_products_err_by_the_rounding_only(shape):
    rng = np.random.default_rng(0)
    x, w = rng.standard_normal(shape), rng.standard_normal((40, 24))
    dy = rng.standard_normal((*shape[:-1], 24))
    y, pull = jax.vjp(multiply, jnp.float32(x), jnp.float32(w))
    dx, dw = pull(jnp.float32(dy))
    flat_x, flat_dy = x.reshape(-1, 40), dy.reshape(-1, 24)
    forward, backward = ERROR[fp8.FORWARD], ERROR[fp8.BACKWARD]
    for got, a, b, errors in (
        (y, flat_x, w, (forward, forward)),
        (dx, flat_dy, w.T, (backward, forward)),
        (dw, flat_x.T, flat_dy, (forward, backward)),
    ):
        relative = (1 + errors[0][0]) * (1 + errors[1][0]) - 1
        tiny = sum(error[1] * np.abs(m).max() / 64 for error, m in zip(errors, (a, b), strict=True))
        bound = relative * (np.abs(a) @ np.abs(b)) + tiny * a.shape[1]
        error = np.abs(np.asarray(got, np.float64).reshape(a.shape[0], -1) - a @ b)
        assert (error <= bound).all()
        assert error.max() > 1e-3  # it does round


def eight_bit_products(jaxpr):
    """(8-bit products, all products) of a jaxpr: both factors are 8-bit values times a scale."""
    makers = {out: eqn for eqn in jaxpr.eqns for out in eqn.outvars}

    def is_scaled(var):
        scaled = makers.get(var)
        if scaled is None or scaled.primitive.name != "mul":
            return False
        cast = makers.get(scaled.invars[0])
        return (
            cast is not None
            and cast.primitive.name == "convert_element_type"
            and cast.invars[0].aval.dtype in map(jnp.dtype, ERROR)
        )

    found = np.zeros(2, int)
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            found += (all(map(is_scaled, eqn.invars)), 1)
        for inner in jax.tree.leaves(eqn.params, is_leaf=lambda p: hasattr(p, "eqns") or hasattr(p, "jaxpr")):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                found += eight_bit_products(inner)
    return found


def test_the_products_are_of_8_bit_values_and_those_alone():
    """Forward, both gradients, for the seven matrices of a layer; not those of attention."""
    model = MODEL.build(100, None).in_fp8()
    tokens = np.ones((2, 16), np.int32)

    def gradient(model):
        loss = lambda params: model.hidden(params, tokens, tokens, tokens).x.astype(jnp.float32).sum()  # noqa: E731
        return jax.jit(jax.grad(loss))

    eight, all_products = eight_bit_products(jax.make_jaxpr(gradient(model))(model.shapes).jaxpr)
    none, as_many = eight_bit_products(jax.make_jaxpr(gradient(Llama(MODEL, 100, None)))(model.shapes).jaxpr)
    assert (eight, none) == (7 * 3, 0)
    assert all_products == as_many
    text = gradient(model).lower(model.shapes).as_text()
    assert "f8E4M3FN" in text
    assert "f8E5M2" in text


def test_the_config_asks_for_it():
    mesh = MeshConfig().build(jax.devices()[:1])
    config = cli.load("configs/quickstart.py", ["--config.precision=fp8"])
    components = offline.components(config, 100, mesh, None)
    # It stays on what is made of them: for batches with many documents, and by the trainer's choice of remat.
    for made in (components, components.unbounded(), components.arranged(Variant(micro_batches=1, remat="dots"))):
        assert isinstance(made.model, Llama)
        assert made.model.is_fp8
    with pytest.raises(UserError, match="precision='fp4' is not known: give 'bf16' or 'fp8'"):
        cli.load("configs/quickstart.py", ["--config.precision=fp4"])
    with pytest.raises(UserError, match="precision='fp8' is not for a GPT2"):
        offline.components(cli.load("examples/gpt2.py", ["--config.precision=fp8"]), 100, mesh, None)


@pytest.mark.parametrize(
    "mesh",
    [
        pytest.param({"fsdp": 4}, marks=pytest.mark.slow),
        *(pytest.param({"fsdp": 2, axis: 2}, marks=pytest.mark.nightly) for axis in ("tensor", "context")),
    ],
    ids=str,
)
def test_a_mesh_changes_rounding_only(mesh):
    """Scales are of whole arrays, so that the values of 8 bits are equal on every mesh."""
    config = dataclasses.replace(MODEL, dtype="float32")
    one = config.build(100, None).in_fp8()
    made = MeshConfig(**{"fsdp": 1, **mesh}).build(jax.devices()[:4])
    many = config.build(100, made).in_fp8()
    params = jax.jit(one.init)(jax.random.key(0))
    tokens = np.random.default_rng(0).integers(0, 100, (4, 16), np.int32)
    ones, positions = np.ones_like(tokens), np.broadcast_to(np.arange(16, dtype=np.int32), (4, 16))

    def gradient(model):
        return jax.jit(jax.grad(lambda p: jnp.square(model.hidden(p, tokens, ones, positions).x).sum()))(params)

    def near(a, b):
        # A sum in another order may move a value to the next one of 8 bits.
        assert np.abs(a - b).max() <= 0.05 * np.abs(b).max()
        assert np.abs(a - b).mean() <= 0.002 * np.abs(b).max()

    jax.tree.map(near, jax.device_get(gradient(many)), jax.device_get(gradient(one)))


COMPILE = """
from jaxtrain.cost import clusters
clusters.prepare_environment()
import jax, jax.numpy as jnp, re
from jax.sharding import NamedSharding, PartitionSpec
from jaxtrain.distributed.sharding import MeshConfig
from jaxtrain.model import fp8
mesh = MeshConfig().build(clusters.devices(clusters.parse("h200:1x1", "topology")))
shard = NamedSharding(mesh, PartitionSpec())
def shape(*dims):
    return jax.ShapeDtypeStruct(dims, jnp.bfloat16, sharding=shard)
def both(x, w, dy):
    y, pull = jax.vjp(lambda x, w: fp8.matmul(x, w, lambda values: values), x, w)
    return y, *pull(dy)
lowered = jax.jit(both, compiler_options=fp8.GPU_OPTIONS).lower(shape(4096, 2048), shape(2048, 5632), shape(4096, 5632))
text = lowered.compile().as_text()
print("products", len(re.findall(r'custom_call_target="__cublas\\$lt\\$matmul\\$f8"', text)), text.count("__cublas$"))
"""


@pytest.mark.slow
@pytest.mark.skipif(
    not any(
        importlib.util.find_spec("jax_plugins") and importlib.util.find_spec(f"jax_plugins.xla_cuda{n}")
        for n in (12, 13)
    ),
    reason="needs JAX's CUDA plugin",
)
def test_xla_makes_8_bit_products_for_an_h200():
    done = subprocess.run([sys.executable, "-c", COMPILE], capture_output=True, text=True, check=True)
    assert "products 3 3\n" in done.stdout
