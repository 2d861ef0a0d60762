"""Chunked distillation against its definitions in float64; identities; extremes; meshes; memory."""

import dataclasses
import decimal
import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtrain.distributed.sharding import MeshConfig, batch_sharding, sharding
from jaxtrain.errors import UserError
from jaxtrain.losses.cross_entropy import CrossEntropy
from jaxtrain.losses.distillation import Distillation
from jaxtrain.losses.divergences import JSD, ForwardKL, ReverseKL, TopK
from jaxtrain.plan.schedules import Constant, Linear
from tests.losses.distillation_reference import forward_kl, jsd, reference, reverse_kl, top_k
from tests.tiers import diagonal, nightly_but

B, T, D, E, VOCAB, PADDED = 8, 6, 16, 24, 37, 64
KINDS = {
    "forward": (ForwardKL(), forward_kl),
    "reverse": (ReverseKL(), reverse_kl),
    "jsd_0": (JSD(beta=0.0), forward_kl),
    "jsd_0.1": (JSD(beta=0.1), jsd(0.1)),
    "jsd_0.5": (JSD(beta=0.5), jsd(0.5)),
    "jsd_0.9": (JSD(beta=0.9), jsd(0.9)),
    "jsd_1": (JSD(beta=1.0), reverse_kl),
    "top_5": (TopK(k=5), top_k(5)),
    "top_all": (TopK(k=VOCAB), top_k(VOCAB)),
}
WEIGHTS = (np.float32(0.3), np.float32(0.7))


def example(seed=0, batch=B, seq_len=T, dtype=jnp.float32):
    """x, w, teacher's x and w, targets, mask; targets are garbage where the mask is False."""
    rng = np.random.default_rng(seed)
    x = jnp.asarray(rng.normal(size=(batch, seq_len, D)), dtype)
    w = jnp.asarray(rng.normal(size=(D, PADDED)) / 2, jnp.float32)
    teacher = jnp.asarray(rng.normal(size=(batch, seq_len, E)), dtype)
    head = jnp.asarray(rng.normal(size=(E, PADDED)) / 2, dtype)
    mask = rng.random((batch, seq_len)) < 0.7
    targets = np.where(mask, rng.integers(0, VOCAB, mask.shape), rng.choice([-100, VOCAB, 10**9], mask.shape))
    return x, w, teacher, head, targets.astype(np.int32), mask


def build(divergence, mesh=None, *, heat=1.0, chunk_tokens=7, z_loss=0.0, vocab_size=VOCAB):
    plain = CrossEntropy(chunk_tokens=chunk_tokens, z_loss=z_loss)
    return Distillation(divergence=divergence, temperature=heat).build(vocab_size, mesh, plain)


def evaluate(loss, arrays, weights=WEIGHTS):
    def with_sums(*arrays):
        sums = loss(*arrays, *weights)
        return sums["loss"], sums

    (_, sums), (dx, dw) = jax.jit(jax.value_and_grad(with_sums, (0, 1), has_aux=True))(*arrays)
    return sums, dx, dw


def expected(arrays, divergence, **options):
    options = {"vocab_size": VOCAB, "ce_weight": WEIGHTS[0], "kd_weight": WEIGHTS[1]} | options
    return reference(*arrays, divergence=divergence, **options)


def assert_close(actual, wanted, rtol=1e-5):
    sums, *gradients = actual
    for name, value in sums.items():
        assert value.dtype == jnp.float32
        np.testing.assert_allclose(value, wanted[0][name], rtol=rtol, err_msg=name)
    for gradient, other in zip(gradients, wanted[1:], strict=True):
        gradient, other = np.asarray(gradient, np.float64), np.asarray(other, np.float64)
        np.testing.assert_allclose(gradient, other, rtol=rtol, atol=rtol * np.abs(other).max())


@pytest.mark.parametrize("kind", KINDS)
def test_the_reference_gradient_is_the_slope_of_the_reference_loss(kind):
    x, w, *rest = example()
    options = {"heat": 1.7, "z_loss": 0.01}
    _, dx, dw = expected((x, w, *rest), KINDS[kind][1], **options)
    rng = np.random.default_rng(1)
    step_x, step_w = rng.normal(size=x.shape) * 1e-5, rng.normal(size=w.shape) * 1e-5
    x, w = np.float64(x), np.float64(w)
    after = expected((x + step_x, w + step_w, *rest), KINDS[kind][1], **options)[0]["loss"]
    before = expected((x - step_x, w - step_w, *rest), KINDS[kind][1], **options)[0]["loss"]
    np.testing.assert_allclose(after - before, 2 * ((dx * step_x).sum() + (dw * step_w).sum()), rtol=1e-6)


QUICK = ("forward", "reverse", "jsd_0.5", "top_5")


@pytest.mark.parametrize(
    ("kind", "heat"),
    nightly_but(
        itertools.product(QUICK, [2.5]),
        itertools.product(KINDS, [2.5, 1.0]),
        slow=[*itertools.product(KINDS, [2.5]), ("top_5", 1.0), ("jsd_0.5", 1.0)],
    ),
)
def test_value_and_gradient(kind, heat):
    arrays, (divergence, definition) = example(), KINDS[kind]
    actual = evaluate(build(divergence, heat=heat), arrays)
    assert set(actual[0]) == {"loss", "ce_loss", "kd_loss"}
    assert_close(actual, expected(arrays, definition, heat=heat))
    assert not np.asarray(actual[2])[:, VOCAB:].any()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "chunk_tokens"),
    nightly_but(
        [("jsd_0.5", 1), ("top_5", 16), ("top_5", 1000)], itertools.product(["jsd_0.5", "top_5"], [1, 16, 1000])
    ),
)
def test_any_chunk_size_with_z_loss(kind, chunk_tokens):
    arrays, (divergence, definition) = example(), KINDS[kind]
    actual = evaluate(build(divergence, heat=2.0, chunk_tokens=chunk_tokens, z_loss=0.01), arrays)
    assert_close(actual, expected(arrays, definition, heat=2.0, z_loss=0.01))


@pytest.mark.slow
def test_without_mask_and_without_padding():
    *arrays, targets, _ = example()
    arrays = (*arrays, np.abs(targets) % PADDED, np.ones_like(targets, bool))
    for divergence, definition in (KINDS["reverse"], KINDS["top_5"]):
        actual = evaluate(build(divergence, vocab_size=PADDED), arrays)
        assert_close(actual, expected(arrays, definition, vocab_size=PADDED))


@pytest.mark.slow
@pytest.mark.parametrize("kind", QUICK)
def test_bf16_inputs(kind):
    x, w, *rest = example(dtype=jnp.bfloat16)
    w = w.astype(jnp.bfloat16).astype(jnp.float32)  # so that only products and gradients are rounded
    sums, dx, dw = evaluate(build(KINDS[kind][0]), (x, w, *rest))
    assert (dx.dtype, dw.dtype) == (jnp.bfloat16, jnp.float32)
    wanted = expected((x, w, *rest), KINDS[kind][1])
    assert_close((sums,), wanted[:1], rtol=1e-5)
    assert_close(({}, dx, dw), wanted, rtol=2**-7)


@pytest.mark.slow
def test_weights_are_arguments_and_the_reported_parts_are_without_them():
    arrays, loss = example(), build(ForwardKL())
    only_ce = evaluate(loss, arrays, (np.float32(1), np.float32(0)))
    x, w, _, _, targets, mask = arrays
    plain = CrossEntropy(chunk_tokens=7).build(VOCAB, None)
    dx, dw = jax.grad(lambda x, w: plain(x, w, targets, mask)["loss"], (0, 1))(x, w)
    assert_close(only_ce, ({**plain(x, w, targets, mask), "kd_loss": only_ce[0]["kd_loss"]}, dx, dw), rtol=1e-6)
    only_kd = evaluate(loss, arrays, (np.float32(0), np.float32(1)))
    np.testing.assert_allclose(only_kd[0]["loss"], only_ce[0]["kd_loss"], rtol=1e-6)
    both = evaluate(loss, arrays, (np.float32(2), np.float32(3)))
    np.testing.assert_allclose(both[2], 2 * only_ce[2] + 3 * only_kd[2], atol=1e-5)


@pytest.mark.parametrize("kind", ["top_5", pytest.param("forward", marks=pytest.mark.slow)])
def test_no_gradient_reaches_the_teacher(kind):
    arrays, loss = example(), build(KINDS[kind][0])
    gradients = jax.grad(lambda *a: loss(*a, *WEIGHTS)["loss"], (2, 3))(*arrays)
    assert not any(np.asarray(g).any() for g in gradients)


@pytest.mark.slow
def test_a_student_like_its_teacher_has_nothing_to_learn():
    x, w, _, _, targets, mask = example()
    for divergence, _ in KINDS.values():
        sums, dx, _ = evaluate(build(divergence), (x, w, x, w, targets, mask), (np.float32(0), np.float32(1)))
        np.testing.assert_allclose(sums["kd_loss"], 0, atol=1e-5)
        np.testing.assert_allclose(dx, 0, atol=1e-6)


def kd(divergence, arrays, **options):
    sums, dx, dw = evaluate(build(divergence, **options), arrays, (np.float32(0), np.float32(1)))
    return float(sums["kd_loss"]), np.asarray(dx), np.asarray(dw)


@pytest.mark.slow
def test_generalized_jsd_at_its_ends_and_its_middle():
    x, w, teacher, head, targets, mask = example()
    # Close to each other; otherwise the limits are far off.
    arrays = x, w, teacher, head, targets, mask = x / 4, w, teacher / 4, head, targets, mask
    for beta, near, end in ((0.0, 1e-3, ForwardKL()), (1.0, 1 - 1e-3, ReverseKL())):
        at_end = kd(end, arrays)
        for a, b in zip(kd(JSD(beta=beta), arrays), at_end, strict=True):
            np.testing.assert_array_equal(a, b)
        # At the ends, the limits of the formula divided by its own weight.
        for a, b in zip(kd(JSD(beta=near), arrays), at_end, strict=True):
            np.testing.assert_allclose(np.asarray(a) / 1e-3, b, rtol=0.02, atol=0.02 * np.abs(b).max())
    middle = expected(arrays, jsd(0.5))[0]["kd_loss"]
    p, q = ((np.asarray(a, np.float64) @ np.asarray(b, np.float64))[..., :VOCAB] for a, b in ((teacher, head), (x, w)))
    p, q = (np.exp(a) / np.exp(a).sum(-1, keepdims=True) for a in (p, q))
    mean = [(a * np.log(2 * a / (p + q))).sum(-1) / 2 for a in (p, q)]
    np.testing.assert_allclose(middle, (mask * (mean[0] + mean[1])).sum(), rtol=1e-10)
    np.testing.assert_allclose(kd(JSD(beta=0.5), arrays)[0], middle, rtol=1e-5)


@pytest.mark.slow
def test_top_k_is_a_lower_bound_that_grows_to_the_forward_kl():
    arrays = example()
    values = [kd(TopK(k=k), arrays)[0] for k in (1, 2, 5, 20, VOCAB - 1, VOCAB)]
    whole = kd(ForwardKL(), arrays)
    assert values[0] > 0
    assert np.all(np.diff(values) > -1e-4)
    assert values[-3] < 0.999 * whole[0]
    for k in (VOCAB - 1, VOCAB):  # a tail of one token is that token
        for a, b in zip(kd(TopK(k=k), arrays), whole, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_the_tail_keeps_its_mass():
    """A teacher of (0.5, 0.1 x 5), a student of 1/6 each, k=1: KL of (0.5, 0.5) from (1/6, 5/6)."""
    logits = jnp.log(jnp.array([[[0.5] + [0.1] * 5]]))
    arrays = (jnp.zeros((1, 1, 6)), jnp.eye(6), logits, jnp.eye(6), np.zeros((1, 1), np.int32), np.ones((1, 1), bool))
    value, dx, _ = kd(TopK(k=1), arrays, vocab_size=6)
    assert value == pytest.approx(0.5 * math.log(0.5 / (1 / 6)) + 0.5 * math.log(0.5 / (5 / 6)), rel=1e-6)
    np.testing.assert_allclose(dx[0, 0], [1 / 6 - 0.5] + [1 / 6 - 0.5 / 5] * 5, rtol=1e-5)


def exact(logits, theirs, kind) -> Any:
    """The value and its gradient with respect to the logits, with 60 decimal digits and unbounded exponents."""
    with decimal.localcontext(prec=60, Emax=decimal.MAX_EMAX, Emin=decimal.MIN_EMIN):

        def distribution(values) -> Any:
            weights = [decimal.Decimal(v).exp() for v in values]
            return [weight / sum(weights) for weight in weights]

        def kl(a, b) -> Any:
            return sum(x * (x / y).ln() for x, y in zip(a, b, strict=True))

        p, q = distribution(theirs), distribution(logits)
        ids = range(len(p))
        if kind == "forward":
            value, slopes = kl(p, q), [-p[i] / q[i] for i in ids]
        elif kind == "reverse":
            value, slopes = kl(q, p), [(q[i] / p[i]).ln() for i in ids]
        elif kind == "jsd":
            m = [(p[i] + q[i]) / 2 for i in ids]
            value, slopes = (kl(p, m) + kl(q, m)) / 2, [(q[i] / m[i]).ln() / 2 for i in ids]
        else:
            kept = sorted(ids, key=lambda i: -p[i])[:2]
            tails: Any = [sum(a[i] for i in ids if i not in kept) for a in (p, q)]
            value = sum(p[i] * (p[i] / q[i]).ln() for i in kept) + tails[0] * (tails[0] / tails[1]).ln()
            slopes = [-p[i] / q[i] if i in kept else -tails[0] / tails[1] for i in ids]
        mean = sum(q[i] * slopes[i] for i in ids)
        return float(value), [float(q[i] * (slopes[i] - mean)) for i in ids]


@pytest.mark.parametrize(
    ("kind", "divergence"),
    [("forward", ForwardKL()), ("reverse", ReverseKL()), ("jsd", JSD(beta=0.5)), ("top", TopK(k=2))],
)
@pytest.mark.parametrize("size", [pytest.param(30.0, marks=pytest.mark.slow), 1e4])
def test_extreme_logits(kind, divergence, size):
    rng = np.random.default_rng(0)
    logits, theirs = (np.round(rng.uniform(-size, size, (1, 8, 6)), 1).astype(np.float32) for _ in range(2))
    theirs[0, 0] = logits[0, 1] = [size, -size, 0, 0, 0, 0]
    logits[0, 0] = [-size, size, 0, 0, 0, 0]
    eye = jnp.eye(6)
    arrays = (jnp.asarray(logits), eye, jnp.asarray(theirs), eye, np.zeros((1, 8), np.int32), np.ones((1, 8), bool))
    value, dx, _ = kd(divergence, arrays, vocab_size=6)
    wanted = [exact(a.tolist(), b.tolist(), kind) for a, b in zip(logits[0], theirs[0], strict=True)]
    # fp32 rounds a logit of 1e4 by 5e-4, and a probability by the same relative error.
    np.testing.assert_allclose(value, sum(one for one, _ in wanted), rtol=1e-4)
    gradients = np.array([gradient for _, gradient in wanted])
    np.testing.assert_allclose(dx[0], gradients, rtol=2e-3, atol=1e-5 * max(1, np.abs(gradients).max()))


def test_masked_rows_count_nothing():
    *arrays, mask = example()
    loss = build(TopK(k=5))
    for array in jax.tree.leaves(evaluate(loss, (*arrays, np.zeros_like(mask)))):
        assert not np.asarray(array).any()  # NaN counts as true
    some = evaluate(loss, (*arrays, mask))
    np.testing.assert_array_equal(np.asarray(some[1])[~mask], 0)


MESHES = [
    {"data": 8, "fsdp": 1},
    {"tensor": 8},  # VOCAB 37 of 64: the last three slices are only padding
    {"data": 2, "fsdp": 2, "tensor": 2},
    {"data": 1, "fsdp": 2, "tensor": 2, "context": 2},
]


def on_mesh(mesh, arrays):
    x, w, teacher, head, *rows = arrays
    hidden, head_layout = sharding(mesh, ("batch", "sequence", "activation_embed")), sharding(mesh, ("embed", "vocab"))
    return (
        jax.device_put(x, hidden),
        jax.device_put(w, head_layout),
        jax.device_put(teacher, hidden),
        jax.device_put(head, head_layout),
        *(jax.device_put(a, batch_sharding(mesh)) for a in rows),
    )


def compare_with_one_device(sizes, kind, dtype):
    mesh, arrays, divergence = MeshConfig(**sizes).build(), example(dtype=dtype), KINDS[kind][0]
    options = {"heat": 2.0, "chunk_tokens": 5, "z_loss": 0.01}
    sharded = evaluate(build(divergence, mesh, **options), on_mesh(mesh, arrays))
    alone = evaluate(build(divergence, **options), arrays)
    # bf16: a gradient may round the other way when its parts are summed in another order.
    assert_close(sharded, alone, rtol=1e-5 if dtype == jnp.float32 else 2**-7)
    assert sharded[2].sharding.is_equivalent_to(sharding(mesh, ("embed", "vocab")), 2)


def test_one_mesh_equals_one_device():
    compare_with_one_device({"data": 2, "fsdp": 2, "tensor": 2}, "top_5", jnp.float32)


DTYPES = {
    "top_5": jnp.float32,
    "top_all": jnp.float32,
    "jsd_0.5": jnp.float32,
    "forward": jnp.bfloat16,
    "reverse": jnp.bfloat16,
}
ON_MESHES = list(itertools.product(DTYPES, MESHES))


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "sizes"), nightly_but(diagonal(DTYPES, MESHES), ON_MESHES), ids=str)
def test_any_mesh_equals_one_device(kind, sizes):
    compare_with_one_device(sizes, kind, DTYPES[kind])


def temporary_bytes(divergence, vocab_size, mesh=None, d=64, e=128, tokens=8192, dtype=jnp.bfloat16):
    loss = Distillation(divergence=divergence).build(vocab_size, mesh, CrossEntropy(chunk_tokens=128))
    shapes = [((8, tokens // 8, d), dtype), ((d, vocab_size), jnp.float32)]
    shapes += [((8, tokens // 8, e), dtype), ((e, vocab_size), dtype)]
    shapes += [((8, tokens // 8), jnp.int32), ((8, tokens // 8), jnp.bool_), ((), jnp.float32), ((), jnp.float32)]
    arguments = [jax.ShapeDtypeStruct(*shape) for shape in shapes]
    compiled = jax.jit(jax.value_and_grad(lambda *a: loss(*a)["loss"], (0, 1))).lower(*arguments).compile()
    memory = compiled.memory_analysis()
    assert memory is not None
    return memory.temp_size_in_bytes


@pytest.mark.parametrize("divergence", [ForwardKL(), pytest.param(TopK(k=64), marks=pytest.mark.slow)])
def test_memory_grows_with_the_vocabulary_by_the_heads_and_their_gradient_alone(divergence):
    small, large, d, e, tokens = 32_768, 131_072, 64, 128, 8192
    growth = temporary_bytes(divergence, large) - temporary_bytes(divergence, small)
    # The head's gradient in fp32 (accumulated, and scaled by the cotangent), and both heads in the products' dtype.
    allowed = (large - small) * (2 * d * 4 + (d + e) * 4)
    assert growth <= allowed
    logits = tokens * small * 4
    assert temporary_bytes(divergence, small) < logits / 5


def test_settings_that_cannot_be():
    with pytest.raises(UserError, match=r"k=38: the vocabulary has 37 tokens"):
        build(TopK(k=38))
    for wrong in ({"temperature": 0.0}, {"ce_weight": -1.0}, {"ce_weight": 0.0, "kd_weight": 0.0}):
        with pytest.raises(UserError, match=next(iter(wrong))):
            dataclasses.replace(Distillation(), **wrong).check()
    for wrong in (JSD(beta=1.5), TopK(k=0)):
        with pytest.raises(UserError, match=r"beta=1\.5|k=0"):
            wrong.check()


def test_weights_follow_schedules_of_tokens():
    config = Distillation(ce_weight=0.8, kd_weight=0.6, kd_schedule=Linear(), ce_schedule=Constant(warmup_fraction=0.5))
    ce, kd = config.weights()
    assert [ce(tokens, 100) for tokens in (0, 25, 50, 100)] == [0, 0.4, 0.8, 0.8]
    assert [kd(tokens, 100) for tokens in (0, 50, 100)] == pytest.approx([0.6, 0.3, 0])
    ce, kd = Distillation().weights()
    assert (ce(3, None), kd(3, None)) == (0.5, 0.5)
