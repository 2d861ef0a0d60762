"""Stored records: their content, and the loss from them, against definitions in float64."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtrain.distributed.sharding import MeshConfig, batch_sharding, sharding
from jaxtrain.errors import UserError
from jaxtrain.losses.cached import Layout, top_records
from jaxtrain.losses.cross_entropy import CrossEntropy
from jaxtrain.losses.distillation import Distillation
from jaxtrain.losses.divergences import ForwardKL, TopK
from tests.losses.distillation_reference import forward_kl, softmax, top_k
from tests.losses.test_distillation import VOCAB, WEIGHTS, assert_close, evaluate, example, expected

HEATS = (1.0, 0.5, 4.0)


def stored(teacher: Any, head: Any, layout: Layout) -> jax.Array:
    """[B, T, W]"""
    logits = np.asarray(teacher, np.float32) @ np.asarray(head, np.float32)[:, : layout.vocab_size]
    flat = jnp.asarray(logits.reshape(-1, layout.vocab_size))
    return top_records(flat, layout).reshape(*logits.shape[:2], layout.width)


@pytest.mark.parametrize(("vocab_size", "k", "width"), [(VOCAB, 5, 32), (70_000, 64, 332), (1 << 16, 64, 268)])
def test_a_record_holds_what_it_says(vocab_size: int, k: int, width: int) -> None:
    layout = Layout(vocab_size, k, HEATS)
    assert layout.width == width
    logits = np.random.default_rng(0).normal(size=(9, vocab_size)) * 3
    logits[0, vocab_size - 1] = 40.0  # nearly all of the mass, on the highest id
    logits[1] = logits[1, 0]  # a tail as heavy as it gets
    records = top_records(jnp.asarray(logits, jnp.float32), layout)
    assert (records.shape, records.dtype) == ((9, width), jnp.uint8)
    for slot, heat in enumerate(HEATS):
        ids, log_p, tail = (np.asarray(x, np.float64) for x in layout.unpack(records, slot))
        p = softmax(logits / heat)
        ids = ids.astype(int)
        np.testing.assert_array_equal(np.sort(ids[2:]), np.sort(np.argsort(-p[2:])[:, :k]))
        assert ids[0, 0] == vocab_size - 1
        kept = np.take_along_axis(p, ids, axis=1)
        # float16 has 11 bits; log-probabilities down to -30 / heat here.
        np.testing.assert_allclose(log_p, np.log(kept), atol=2**-11 * 45 / heat)
        np.testing.assert_allclose(np.exp(log_p), kept, rtol=0.03, atol=2e-4)
        np.testing.assert_allclose(np.exp(tail), 1 - kept.sum(1), rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(np.exp(log_p).sum(1) + np.exp(tail), 1, atol=1e-5)


def test_a_whole_vocabulary_has_no_tail() -> None:
    layout = Layout(VOCAB, VOCAB, (2.0,))
    _, log_p, tail = layout.unpack(top_records(jnp.zeros((2, VOCAB)), layout), 0)
    np.testing.assert_allclose(np.exp(log_p).sum(1), 1, rtol=1e-6)
    assert (np.exp(tail) == 0).all()


@pytest.mark.parametrize("heat", HEATS)
@pytest.mark.parametrize("k", [5, VOCAB])
def test_loss_and_gradients(k: int, heat: float) -> None:
    """Against the float64 reference of the teacher itself, within the rounding of float16; and within 1e-5 of the
    reference of the rounded teacher.
    """
    x, w, teacher, head, targets, mask = arrays = example()
    layout = Layout(VOCAB, k, HEATS)
    records = stored(teacher, head, layout)
    made = Distillation(divergence=TopK(k=k), temperature=heat)
    found = evaluate(made.build_cached(layout, None, CrossEntropy(chunk_tokens=7)), (x, w, records, targets, mask))
    assert_close(found, expected(arrays, top_k(k) if k < VOCAB else forward_kl, heat=heat), rtol=2e-3)
    # The stored distribution as a separate teacher: logits that produce it, with an even tail.
    ids, log_p, tail = (np.asarray(part, np.float64) for part in layout.unpack(records, HEATS.index(heat)))
    spread = np.log(max(VOCAB - k, 1))
    logits = np.repeat(tail[..., None] - spread, VOCAB, axis=-1)
    np.put_along_axis(logits, ids.astype(int), log_p, axis=-1)
    rounded = (x, w, heat * logits, np.eye(VOCAB), targets, mask)
    assert_close(found, expected(rounded, top_k(k) if k < VOCAB else forward_kl, heat=heat), rtol=1e-5)


@pytest.mark.parametrize("shape", [{"data": 2, "fsdp": 2, "tensor": 2}, {"fsdp": 2, "context": 2, "tensor": 2}])
def test_the_same_on_every_mesh(shape: dict[str, int]) -> None:
    x, w, teacher, head, targets, mask = example()
    layout = Layout(VOCAB, 5, (2.0,))
    arrays = (x, w, stored(teacher, head, layout), targets, mask)
    made = Distillation(divergence=TopK(k=5), temperature=2.0)
    wanted = evaluate(made.build_cached(layout, None, CrossEntropy(chunk_tokens=7)), arrays)
    mesh = MeshConfig(**shape).build()
    layouts = [batch_sharding(mesh)] * 5
    layouts[1] = sharding(mesh, ("embed", "vocab"))
    placed = tuple(jax.device_put(a, where) for a, where in zip(arrays, layouts, strict=True))
    found = evaluate(made.build_cached(layout, mesh, CrossEntropy(chunk_tokens=7)), placed)
    assert_close(found, wanted)
    assert WEIGHTS[1] > 0


def test_what_the_records_do_not_serve_is_refused() -> None:
    layout = Layout(VOCAB, 5, (1.0, 2.0))
    for divergence in (ForwardKL(), TopK(k=4)):
        with pytest.raises(UserError, match=r"only TopK\(k=5\) can use"):
            Distillation(divergence=divergence).build_cached(layout, None, CrossEntropy())
    with pytest.raises(UserError, match=r"temperature=3: .* the tail's mass for 1, 2 only"):
        Distillation(divergence=TopK(k=5), temperature=3.0).build_cached(layout, None, CrossEntropy())
