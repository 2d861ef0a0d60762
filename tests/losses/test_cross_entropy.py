"""Chunked cross-entropy against float64 NumPy with all logits at once."""

import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtrain.distributed.sharding import MeshConfig, batch_sharding, sharding
from jaxtrain.errors import UserError
from jaxtrain.losses.chunks import from_function
from jaxtrain.losses.cross_entropy import CrossEntropy
from jaxtrain.losses.head import SoftCapped
from tests.tiers import diagonal, nightly_but

B, T, D, VOCAB, PADDED = 8, 6, 16, 37, 64


def reference(x, w, targets, mask, vocab_size, z_loss=0.0):
    """float64 ({"loss", "ce_loss", "z_loss"}, dx, dw)."""
    x, w = np.asarray(x, np.float64), np.asarray(w, np.float64)
    logits = (x @ w)[..., :vocab_size]
    peak = logits.max(-1, keepdims=True)
    log_z = np.log(np.exp(logits - peak).sum(-1)) + peak[..., 0]
    one_hot = np.eye(vocab_size)[np.where(mask, targets, 0)]
    ce = (mask * (log_z - (logits * one_hot).sum(-1))).sum()
    z = (mask * z_loss * log_z**2).sum()
    dlogits = np.exp(logits - log_z[..., None]) * (1 + 2 * z_loss * log_z)[..., None] - one_hot
    dlogits = np.pad(mask[..., None] * dlogits, [(0, 0), (0, 0), (0, w.shape[1] - vocab_size)])
    return {"loss": ce + z, "ce_loss": ce, "z_loss": z}, dlogits @ w.T, np.einsum("btd,btv->dv", x, dlogits)


def example(seed=0, batch=B, seq_len=T, dtype=jnp.float32):
    """Targets are garbage (negative, past the vocabulary) where the mask is False."""
    rng = np.random.default_rng(seed)
    x = jnp.asarray(rng.normal(size=(batch, seq_len, D)), dtype)
    w = jnp.asarray(rng.normal(size=(D, PADDED)), jnp.float32)
    mask = rng.random((batch, seq_len)) < 0.7
    targets = np.where(mask, rng.integers(0, VOCAB, mask.shape), rng.choice([-100, VOCAB, 10**9], mask.shape))
    return x, w, targets.astype(np.int32), mask


def evaluate(config, mesh, arrays, vocab_size=VOCAB):
    loss = config.build(vocab_size, mesh)

    def with_sums(*arrays):
        sums = loss(*arrays)
        return sums["loss"], sums

    (_, sums), (dx, dw) = jax.jit(jax.value_and_grad(with_sums, (0, 1), has_aux=True))(*arrays)
    return sums, dx, dw


def assert_close(actual, expected, rtol=1e-5):
    sums, *gradients = actual
    expected_sums, *expected_gradients = expected
    for name, value in sums.items():
        assert value.dtype == jnp.float32
        np.testing.assert_allclose(value, expected_sums[name], rtol=rtol)
    for gradient, reference in zip(gradients, expected_gradients, strict=True):
        gradient = np.asarray(gradient, np.float64)
        np.testing.assert_allclose(gradient, reference, rtol=rtol, atol=rtol * np.abs(reference).max())


def test_the_reference_gradient_is_the_slope_of_the_reference_loss():
    x, w, targets, mask = example()
    _, dx, dw = reference(x, w, targets, mask, VOCAB, z_loss=0.01)
    rng = np.random.default_rng(1)
    step_x, step_w = rng.normal(size=x.shape) * 1e-5, rng.normal(size=w.shape) * 1e-5
    x, w = np.float64(x), np.float64(w)
    after, _, _ = reference(x + step_x, w + step_w, targets, mask, VOCAB, z_loss=0.01)
    before, _, _ = reference(x - step_x, w - step_w, targets, mask, VOCAB, z_loss=0.01)
    slope = 2 * ((dx * step_x).sum() + (dw * step_w).sum())
    np.testing.assert_allclose(after["loss"] - before["loss"], slope, rtol=1e-6)


@pytest.mark.parametrize("chunk_tokens", [1, 7, 16, 48, 1000])
@pytest.mark.parametrize("z_loss", [0.0, 0.01])
def test_value_and_gradient_for_any_chunk_size(chunk_tokens, z_loss):
    arrays = example()
    actual = evaluate(CrossEntropy(z_loss=z_loss, chunk_tokens=chunk_tokens), None, arrays)
    assert set(actual[0]) == ({"loss", "ce_loss", "z_loss"} if z_loss else {"loss", "ce_loss"})
    assert_close(actual, reference(*arrays, VOCAB, z_loss))
    assert not np.asarray(actual[2])[:, VOCAB:].any()


def test_without_mask_and_without_padding():
    x, w, targets, _ = example()
    mask = np.ones_like(targets, bool)
    targets = np.abs(targets) % PADDED
    actual = evaluate(CrossEntropy(chunk_tokens=10), None, (x, w, targets, mask), vocab_size=PADDED)
    assert_close(actual, reference(x, w, targets, mask, PADDED))


def test_bf16_inputs():
    x, w, targets, mask = example(dtype=jnp.bfloat16)
    w = w.astype(jnp.bfloat16).astype(jnp.float32)  # so that only products and gradients are rounded
    sums, dx, dw = evaluate(CrossEntropy(chunk_tokens=10), None, (x, w, targets, mask))
    assert (dx.dtype, dw.dtype) == (jnp.bfloat16, jnp.float32)
    expected = reference(x, w, targets, mask, VOCAB)
    np.testing.assert_allclose(sums["loss"], expected[0]["loss"], rtol=1e-5)
    assert_close(({}, dx, dw), expected, rtol=2**-7)


def test_cotangent_scales_the_gradient():
    x, w, targets, mask = example()
    loss = CrossEntropy(z_loss=0.01, chunk_tokens=10).build(VOCAB, None)
    plain = jax.grad(lambda x, w: loss(x, w, targets, mask)["loss"], (0, 1))(x, w)
    # ce_loss is for reporting: it adds no gradient, though it is part of the loss.
    scaled = jax.grad(lambda x, w: sum(loss(x, w, targets, mask).values()) / 4, (0, 1))(x, w)
    for a, b in zip(plain, scaled, strict=True):
        np.testing.assert_allclose(a / 4, b, rtol=1e-6)


def test_all_masked_is_zero():
    x, w, targets, mask = example()
    sums, dx, dw = evaluate(CrossEntropy(z_loss=1e-4, chunk_tokens=10), None, (x, w, targets, np.zeros_like(mask)))
    for array in (*sums.values(), dx, dw):
        assert not np.asarray(array).any()  # NaN counts as true


def test_large_logits_do_not_overflow():
    x, w, targets, mask = example()
    arrays = (x * 100, w, targets, mask)
    # Logits of about 1,500 are rounded by 1e-4 in fp32, and that is the probabilities' relative error.
    assert_close(evaluate(CrossEntropy(chunk_tokens=10), None, arrays), reference(*arrays, VOCAB), rtol=2e-4)


MESHES = [
    {"data": 8, "fsdp": 1},
    {"fsdp": 8},
    {"tensor": 8},  # VOCAB 37 of 64: the last three slices are only padding
    {"data": 2, "fsdp": 2, "tensor": 2},
    {"data": 1, "fsdp": 2, "tensor": 2, "context": 2},
    {"data": 2, "fsdp": 2, "context": 2},
]


def on_mesh(mesh, arrays):
    x, w, targets, mask = arrays
    return (
        jax.device_put(x, sharding(mesh, ("batch", "sequence", "activation_embed"))),
        jax.device_put(w, sharding(mesh, ("embed", "vocab"))),
        *(jax.device_put(a, batch_sharding(mesh)) for a in (targets, mask)),
    )


DTYPES = [jnp.float32, jnp.bfloat16]


@pytest.mark.parametrize(
    ("sizes", "dtype"), nightly_but(diagonal(MESHES, DTYPES), itertools.product(MESHES, DTYPES)), ids=str
)
def test_any_mesh_equals_one_device(sizes, dtype):
    mesh = MeshConfig(**sizes).build()
    arrays = example(dtype=dtype)
    config = CrossEntropy(z_loss=0.01, chunk_tokens=5)
    sharded = evaluate(config, mesh, on_mesh(mesh, arrays))
    # bf16: a gradient may round the other way when its parts are summed in another order.
    assert_close(sharded, evaluate(config, None, arrays), rtol=1e-5 if dtype == jnp.float32 else 2**-7)
    assert sharded[1].sharding.is_equivalent_to(sharding(mesh, ("batch", "sequence", None)), 3)
    assert sharded[2].sharding.is_equivalent_to(sharding(mesh, ("embed", "vocab")), 2)


@pytest.mark.parametrize("sizes", [None, {"fsdp": 2, "tensor": 2, "context": 2}], ids=str)
@pytest.mark.parametrize("written", ["by hand", "plainly"])
def test_capped_logits(sizes, written):
    x, w, targets, mask = example()

    def plain(x, w, targets, mask):
        log_p = jax.nn.log_softmax((3.0 * jnp.tanh((x @ w) / 3.0))[..., :VOCAB].astype(jnp.float32))
        return -jnp.where(mask, jnp.take_along_axis(log_p, targets[..., None], axis=-1)[..., 0], 0).sum()

    def of_head(x, w, targets, mask):
        log_p = jax.nn.log_softmax((x @ w)[..., :VOCAB])
        return -jnp.where(mask, jnp.take_along_axis(log_p, targets[..., None], axis=-1)[..., 0], 0).sum()

    mesh = None if sizes is None else MeshConfig(**sizes).build()
    loss = from_function(of_head, mesh, 7) if written == "plainly" else CrossEntropy(chunk_tokens=7).build(VOCAB, mesh)

    def with_cap(x, w):
        return loss(x, SoftCapped(w, 3.0), targets, mask)["loss"]

    got = jax.jit(jax.value_and_grad(with_cap, (0, 1)))(x, w)
    want = jax.value_and_grad(plain, (0, 1))(x, w, np.where(mask, targets, 0), mask)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * np.abs(b).max()), got, want)


@pytest.mark.parametrize(("batch", "seq_len", "name"), [(6, 4, "batch size 6"), (8, 3, "seq_len 3")])
def test_refuses_rows_that_the_mesh_does_not_divide(batch, seq_len, name):
    mesh = MeshConfig(data=2, fsdp=2, context=2).build()
    with pytest.raises(UserError, match=name):
        jax.eval_shape(CrossEntropy().build(VOCAB, mesh), *example(batch=batch, seq_len=seq_len))


def compiled(batch, seq_len, chunk_tokens, mesh=None, d=64, v=4096, gradient=True):
    """(temporary bytes, FLOPs, HLO text) of the loss, with or without its gradient."""
    loss = CrossEntropy(chunk_tokens=chunk_tokens).build(v - 5, mesh)

    def shape(sizes, dtype, axes):
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=None if mesh is None else sharding(mesh, axes))

    rows = [shape((batch, seq_len), dtype, ("batch", "sequence")) for dtype in (jnp.int32, jnp.bool_)]
    x = shape((batch, seq_len, d), jnp.float32, ("batch", "sequence", None))
    w = shape((d, v), jnp.float32, ("embed", "vocab"))
    function = jax.value_and_grad(lambda *a: loss(*a)["loss"], (0, 1)) if gradient else loss
    executable = jax.jit(function).lower(x, w, *rows).compile()
    memory, cost, text = executable.memory_analysis(), executable.cost_analysis(), executable.as_text()
    assert memory is not None
    assert cost is not None
    assert text is not None
    return memory.temp_size_in_bytes, cost["flops"], text


@pytest.mark.parametrize(("batch", "seq_len"), [(8, 512), (2048, 2)])
def test_memory_is_that_of_one_chunk(batch, seq_len):
    chunk_tokens, d, v = 128, 64, 4096
    temp, _, _ = compiled(batch, seq_len, chunk_tokens, d=d, v=v)
    longer, _, _ = compiled(batch, 4 * seq_len, chunk_tokens, d=d, v=v)
    logits = batch * seq_len * v * 4
    assert temp < 3 * chunk_tokens * v * 4 + 2 * d * v * 4 < logits / 5
    assert longer - temp <= 2 * (4 - 1) * batch * seq_len * d * 4  # x and dx in chunks, and no logits


def test_evaluation_computes_no_gradient():
    _, train, _ = compiled(8, 16, 32)
    _, evaluation, _ = compiled(8, 16, 32, gradient=False)
    assert evaluation < 0.5 * train


def test_head_is_gathered_and_its_gradient_reduced_once():
    """In Auto mode XLA reduces a [D, V] array in every chunk."""
    _, _, text = compiled(8, 64, 16, MeshConfig(data=2, fsdp=2, tensor=2).build())
    *functions, entry = text.strip().split("\nENTRY ")
    assert len(functions) == 1
    assert (entry.count(" all-gather("), entry.count(" reduce-scatter(")) == (1, 1)
    in_chunks = re.findall(r"= (\S+?)\{\S+ (all-\w+|reduce-scatter|collective-permute|all-to-all)\(", functions[0])
    # Over `tensor`: the maximum of the logits, (sum of exponentials, target's logit), and dx.
    assert in_chunks == [("f32[16]", "all-reduce"), ("f32[2,16]", "all-reduce"), ("f32[16,64]", "all-reduce")]
