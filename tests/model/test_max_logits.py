"""The largest attention logits against float64 NumPy, and QK-clip."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from examples.gpt2 import GPT2Config
from jaxtrain.distributed.sharding import MeshConfig
from jaxtrain.errors import UserError
from jaxtrain.interfaces import ClippableModel
from jaxtrain.model import attention
from jaxtrain.model.llama import LlamaConfig

TINY = LlamaConfig(
    hidden_size=32,
    intermediate_size=32,
    num_layers=1,
    num_heads=4,
    num_kv_heads=2,
    dtype="float32",
    initializer_std=0.5,
    attention_bias=True,
    scan_layers=True,
    remat="none",
)


def reference(q, k, segment_ids, window):
    """[H], query by query."""
    q, k = np.asarray(q, np.float64), np.asarray(k, np.float64)
    k = k.repeat(q.shape[2] // k.shape[2], axis=2)
    top = np.full(q.shape[2], -np.inf)
    for row, ids in enumerate(segment_ids):
        for t in np.flatnonzero(ids):
            seen = [s for s in range(t + 1) if ids[s] == ids[t] and (window is None or t - s < window)]
            top = np.maximum(top, (np.einsum("hd,shd->sh", q[row, t], k[row, seen]) / np.sqrt(q.shape[-1])).max(0))
    return top


def inputs(seq_len, heads=4, kv_heads=2, seed=0):
    rng = np.random.default_rng(seed)
    q, k = (rng.normal(size=(4, seq_len, n, 8)).astype(np.float32) for n in (heads, kv_heads))
    segment_ids = np.sort(rng.integers(1, 4, (4, seq_len)), axis=1).astype(np.int32)
    segment_ids[:, -3:] = 0  # padding
    # Below 0 everywhere for the first head, so that no padding counts as a logit.
    q[:, :, 0], k[:, :, 0] = -np.abs(q[:, :, 0]), np.abs(k[:, :, 0])
    return q, k, segment_ids


@pytest.mark.parametrize(("seq_len", "window"), [(20, None), (300, None), (300, 7)])
def test_equals_float64(seq_len, window):
    q, k, segment_ids = inputs(seq_len)
    find = jax.jit(attention.max_logits, static_argnames=("mesh", "sliding_window", "query_scalar"))
    top = find(q, k, segment_ids, mesh=None, sliding_window=window, query_scalar=2.0)
    assert (top[0] < 0) & (top[0] > -20)
    np.testing.assert_allclose(top, reference(q, k, segment_ids, window) * 2, rtol=1e-5)


@pytest.mark.parametrize(
    "sizes", [{"fsdp": 2, "tensor": 2, "data": 2}, {"context": 4, "fsdp": 2}, {"context": 8}], ids=str
)
def test_every_mesh_gives_what_one_device_gives(sizes):
    """With 8 devices in `context`, 4 heads cannot be traded."""
    q, k, segment_ids = inputs(32)
    mesh = MeshConfig(**{"fsdp": 1, **sizes}).build()
    top = jax.jit(lambda *x: attention.max_logits(*x, mesh=mesh, sliding_window=None))(q, k, segment_ids)
    np.testing.assert_allclose(top, reference(q, k, segment_ids, None), rtol=1e-5)


def batch(vocab=50):
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, vocab, (4, 16)).astype(np.int32)
    return jnp.asarray(tokens), jnp.ones_like(tokens), jnp.broadcast_to(jnp.arange(16, dtype=jnp.int32), tokens.shape)


def test_clipping_leaves_the_threshold():
    """One layer, so that its inputs do not change. Heads below the threshold keep their weights bit for bit."""
    model = TINY.build(50, None)
    assert isinstance(model, ClippableModel)
    assert model.hidden(model.init(jax.random.key(0)), *batch()).max_logits is None
    watching = model.watching_logits()
    hidden = jax.jit(watching.hidden)
    params = model.init(jax.random.key(0))
    attend = params["layers"]["attention"]
    attend["q"]["bias"] = jnp.ones_like(attend["q"]["bias"])
    attend["q"]["kernel"] = attend["q"]["kernel"].at[:, :, :8].multiply(4)  # the first head
    before = hidden(params, *batch()).max_logits
    groups = before.reshape(2, 2).max(1)
    threshold = float(groups.mean())
    assert groups[0] > threshold > groups[1]
    clipped = model.clip_logits(params, before, threshold)
    after = hidden(clipped, *batch()).max_logits
    # Query heads of a group shrink by the same factor.
    np.testing.assert_allclose(after[0, :2], before[0, :2] * threshold / groups[0], rtol=1e-5)
    np.testing.assert_array_equal(after[0, 2:], before[0, 2:])
    same = jax.tree.map(lambda a, b: bool((a == b).all()), clipped, params)
    changed = {jax.tree_util.keystr(path) for path, kept in jax.tree_util.tree_leaves_with_path(same) if not kept}
    assert {text.split("'")[5] for text in changed} == {"q", "k"}
    for name, heads in (("q", 2), ("k", 1)):
        kernel, old = (tree["layers"]["attention"][name]["kernel"] for tree in (clipped, params))
        np.testing.assert_array_equal(kernel[:, :, heads * 8 :], old[:, :, heads * 8 :])


@pytest.mark.parametrize("changes", [{"scan_layers": False}, {"remat": "dots"}, {"remat": "full"}], ids=str)
def test_scan_and_remat_change_nothing(changes):
    config = dataclasses.replace(TINY, num_layers=3, layers="1 local : 1 global nope", sliding_window=5)
    params = config.build(50, None).init(jax.random.key(0))

    def top(config):
        model = config.build(50, None).watching_logits()

        def loss(params):
            found = model.hidden(params, *batch())
            return jnp.square(found.x).sum(), found.max_logits

        return jax.jit(jax.grad(loss, has_aux=True))(params)[1]

    expected = top(config)
    assert expected.shape == (3, 4)
    np.testing.assert_allclose(top(dataclasses.replace(config, **changes)), expected, rtol=1e-6)


@pytest.mark.parametrize("bound", [{"qk_norm": True}, {"attn_logit_softcapping": 50.0}], ids=str)
def test_what_cannot_be_clipped(bound):
    with pytest.raises(UserError, match=f"{next(iter(bound))}, which already bounds the logits"):
        dataclasses.replace(TINY, **bound).build(50, None).watching_logits()


def test_who_cannot_be_clipped():
    assert not isinstance(GPT2Config(hidden_size=32, num_layers=1, num_heads=2).build(50, None), ClippableModel)
