"""Attention against float64 NumPy, forward and backward: packed documents, GQA, windows, odd lengths."""

import dataclasses
import pathlib
import re
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import print_saved_residuals

from jaxtrain.distributed.sharding import MeshConfig
from jaxtrain.errors import UserError
from jaxtrain.model import attention, attention_cudnn, attention_splash, attention_xla, llama
from jaxtrain.model.attention import Shape, attend, choose
from jaxtrain.model.llama import LlamaConfig
from tests.model import reference

SHAPES = [  # B, T, H, K, h, window
    (3, 1, 4, 2, 8, None),
    (3, 7, 4, 4, 8, None),
    (5, 8, 4, 1, 16, 3),
    (2, 100, 6, 2, 16, None),
    (2, 300, 4, 2, 8, 40),
    (2, 768, 2, 1, 16, None),
    (1, 1100, 2, 1, 8, None),
    (1, 1100, 2, 1, 8, 200),
]


def problem(batch, seq_len, heads, kv_heads, width):
    rng = np.random.default_rng(0)
    q, dx = (rng.standard_normal((batch, seq_len, heads, width)).astype(np.float32) for _ in range(2))
    k, v = (rng.standard_normal((batch, seq_len, kv_heads, width)).astype(np.float32) for _ in range(2))
    return (q, k, v), reference.packed_segments(rng, batch, seq_len), dx


def forward_and_backward(arrays, segments, dx, **options):
    @jax.jit
    def run(arrays, segments, dx):
        x, pull = jax.vjp(lambda q, k, v: attend(q, k, v, segments, **options), *arrays)
        return x, pull(dx)

    return jax.device_get(run(arrays, segments, dx))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_xla_is_the_float64_reference(shape):
    batch, seq_len, heads, kv_heads, width, window = shape
    arrays, segments, dx = problem(batch, seq_len, heads, kv_heads, width)
    got = forward_and_backward(arrays, segments, dx, mesh=None, implementation="xla", sliding_window=window)
    want = reference.attention(arrays, segments, window, dx)
    # fp32 rounding of sums over up to T terms of size about 1
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=2e-5), got, want)


@pytest.mark.parametrize("shape", [SHAPES[1], (1, 300, 4, 2, 8, 40), (1, 256, 2, 1, 16, None)], ids=str)
def test_interpreted_splash_is_the_float64_reference(shape):
    batch, seq_len, heads, kv_heads, width, window = shape
    arrays, segments, dx = problem(batch, seq_len, heads, kv_heads, width)
    got = forward_and_backward(arrays, segments, dx, mesh=None, implementation="splash", sliding_window=window)
    want = reference.attention(arrays, segments, window, dx)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=5e-5), got, want)


@pytest.mark.parametrize("implementation", ["xla", "splash"])
def test_capped_scores_of_another_scale_are_the_float64_reference(implementation):
    arrays, segments, dx = problem(1, 300, 4, 2, 8)
    options = {"query_scalar": 3.0, "softcap": 1.5}
    got = forward_and_backward(
        arrays, segments, dx, mesh=None, implementation=implementation, sliding_window=40, **options
    )
    want = reference.attention(arrays, segments, 40, dx, **options)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=5e-5), got, want)


def test_splash_with_two_backward_kernels_is_the_float64_reference(monkeypatch):
    monkeypatch.setattr(attention_splash, "block_sizes", lambda length, kind: (128, False))
    arrays, segments, dx = problem(1, 256, 2, 1, 8)
    got = forward_and_backward(arrays, segments, dx, mesh=None, implementation="splash")
    want = reference.attention(arrays, segments, None, dx)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=5e-5), got, want)


@pytest.mark.parametrize(
    ("length", "kind", "expected"),
    [
        (128, "TPU v5 lite", (128, True)),
        (768, "TPU v5 lite", (256, True)),
        (2048, "TPU v6 lite", (512, True)),
        (4096, "TPU v5", (1024, True)),
        (8192, "TPU v5", (1024, False)),
        (8192, "TPU v6 lite", (2048, True)),
    ],
)
def test_splash_blocks_follow_the_table(length, kind, expected):
    assert attention_splash.block_sizes(length, kind) == expected


@pytest.fixture
def hopper(monkeypatch):
    """JAX's wrapper of cuDNN believes that there is a Hopper GPU."""
    monkeypatch.setattr(attention_cudnn.cudnn, "check_cudnn_version", lambda: 91900)
    monkeypatch.setattr(attention_cudnn.cudnn, "check_compute_capability", lambda capability: True)
    monkeypatch.setattr(attention_cudnn.cudnn, "is_cuda_compute_capability_equal", lambda capability: False)


@pytest.mark.parametrize("implementation", ["splash", "xla", "cudnn"])
@pytest.mark.parametrize(("policy", "saves"), [("full", False), ("dots", True)])
def test_dots_saves_attention(implementation, policy, saves, capsys, hopper):
    (q, k, v), segments, _ = problem(1, 128, 2, 1, 8)
    q, k, v = (jnp.asarray(x, jnp.bfloat16) for x in (q, k, v))
    documents = attention.documents(jnp.asarray(segments), None, implementation, SMALL)

    def loss(q, k, v):
        return attend(q * 2, k, v, documents, mesh=None, implementation=implementation).sum()

    print_saved_residuals(jax.checkpoint(loss, policy=llama.remat_policy(policy)), q, k, v)
    kept = [line for line in capsys.readouterr().out.splitlines() if "from a constant" not in line]
    # The output and the log-sum-exp of each query, besides q, k and v.
    assert len([line for line in kept if "from the argument" not in line]) == (2 if saves else 0)


def test_splash_on_a_mesh_gives_what_one_device_gives():
    arrays, segments, dx = problem(2, 128, 4, 2, 8)
    mesh = MeshConfig(data=1, fsdp=2, tensor=2).build(jax.devices()[:4])
    got = forward_and_backward(arrays, segments, dx, mesh=mesh, implementation="splash")
    want = reference.attention(arrays, segments, None, dx)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=5e-5), got, want)


def forward_and_backward_of_cudnn(arrays, segments, dx, window=None):
    shape = dataclasses.replace(SMALL, num_heads=arrays[0].shape[2], head_dim=arrays[0].shape[3])

    @jax.jit
    def run(arrays, segments, dx):
        found = attention.documents(segments, None, "cudnn", shape)
        options = {"mesh": None, "implementation": "cudnn", "sliding_window": window}
        x, pull = jax.vjp(lambda q, k, v: attend(q, k, v, found, **options), *arrays)
        return x, pull(dx)

    return jax.device_get(run(arrays, segments, dx))


def as_documented(query, key, value, *, q_seqlen, kv_seqlen, q_offsets, kv_offsets, scale, mask_type, **options):
    """cuDNN as documented: the rows are one sequence, and document m is q_seqlen[m] tokens from q_offsets[m] on.

    Offsets are in elements. XLA passes as many documents as q_seqlen has elements.
    """
    assert mask_type == attention_cudnn.cudnn.MaskType.PADDING_CAUSAL
    assert q_seqlen is kv_seqlen
    assert q_offsets.shape == kv_offsets.shape == (q_seqlen.shape[0], q_seqlen.shape[1] + 1)
    (batch, seq_len, heads, width), kv_heads = query.shape, key.shape[2]
    index, lengths = jnp.arange(batch * seq_len), q_seqlen.reshape(-1)

    def inside(offsets, size):
        starts, token = offsets.reshape(1, -1)[:, : lengths.size], index[:, None] * size
        return (token >= starts) & (token < starts + lengths[None] * size)

    same = jnp.any(inside(q_offsets, heads * width)[:, None] & inside(kv_offsets, kv_heads * width)[None], axis=2)
    ago = np.arange(batch * seq_len)[:, None] - np.arange(batch * seq_len)[None]
    window = seq_len if options["sliding_window_length"] is None else options["sliding_window_length"]
    visible = same & (ago >= 0) & (ago < window)
    q, k, v = (x.reshape(-1, *x.shape[2:]) for x in (query, key, value))
    k, v = (jnp.repeat(x, heads // kv_heads, axis=1) for x in (k, v))
    scores = jnp.where(visible[None], jnp.einsum("thd,shd->hts", q, k) * scale, -1e30)
    return jnp.einsum("hts,shd->thd", jax.nn.softmax(scores, axis=-1), v).reshape(query.shape)


@pytest.mark.parametrize("window", [None, 5])
def test_cudnn_is_told_where_the_documents_are(window, monkeypatch):
    """The kernel itself needs a GPU: this stand-in follows its documentation, to test our part."""
    calls = []
    monkeypatch.setattr(
        attention_cudnn.cudnn, "dot_product_attention", lambda *a, **k: (calls.append(k), as_documented(*a, **k))[1]
    )
    arrays, segments, dx = problem(3, 40, 4, 2, 8)
    got = forward_and_backward_of_cudnn(arrays, segments, dx, window)
    want = reference.attention(arrays, segments, window, dx)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=2e-5), got, want)
    assert calls


@pytest.mark.parametrize(
    ("shape", "parts"),
    [
        ((256, 2048, 32, 128), 2),  # 2^31 exactly: the offset of the end wraps
        ((255, 2048, 32, 128), 1),
        ((512, 2048, 32, 128), 4),
        ((6, 131_072, 32, 128), 2),
        ((7, 131_072, 32, 128), 7),
        ((1, 524_287, 32, 128), 1),
    ],
)
def test_no_offset_of_cudnn_wraps(shape, parts):
    """Offsets up to B * T are multiplied by H * h in int32."""
    assert attention_cudnn.row_parts(shape) == parts
    rows, seq_len, heads, width = shape
    with np.errstate(over="ignore"):
        end = np.int32(rows // parts * seq_len) * np.int32(heads * width)
        whole = np.int32(rows * seq_len) * np.int32(heads * width)
    assert end == rows // parts * seq_len * heads * width
    assert (whole == rows * seq_len * heads * width) == (parts == 1)


def test_cudnn_takes_many_rows_in_parts(monkeypatch):
    calls = []
    monkeypatch.setattr(attention_cudnn, "MAX_OFFSET", 2 * 40 * 4 * 8)
    monkeypatch.setattr(
        attention_cudnn.cudnn,
        "dot_product_attention",
        lambda *a, **k: (calls.append(a[0].shape[0]), as_documented(*a, **k))[1],
    )
    arrays, segments, dx = problem(6, 40, 4, 2, 8)
    got = forward_and_backward_of_cudnn(arrays, segments, dx)
    want = reference.attention(arrays, segments, None, dx)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=2e-5), got, want)
    assert set(calls) == {2}
    assert attention_cudnn.most_documents((6, 40, 4, 8)) == (2, 64)


def test_documents_of_rows(monkeypatch):
    monkeypatch.setattr(attention_cudnn, "_LEAST_SLOTS", 9)
    segments = np.array([[1, 1, 1, 2, 2, 0], [1, 2, 3, 4, 5, 5], [7, 7, 7, 7, 7, 7]], np.int32)
    found = attention_cudnn.documents(jnp.asarray(segments), 2, 4)
    assert found.lengths.shape == (3, 3)
    np.testing.assert_array_equal(found.lengths.reshape(-1), [3, 2, 1, 1, 1, 1, 1, 2, 6])
    np.testing.assert_array_equal(found.starts.reshape(-1), [0, 3, 5, 6, 7, 8, 9, 10, 12, 18, 18, 18])
    assert attention_cudnn.most_documents((3, 6, 2, 4)) == (3, 9)


@pytest.mark.parametrize(
    ("rows", "seq_len", "slots"), [(1, 2048, 64), (2, 2048, 32), (32, 2048, 32), (8, 8192, 128), (64, 128, 2)]
)
def test_slots_of_a_row(rows, seq_len, slots):
    assert attention_cudnn.slots_per_row(rows, seq_len) == slots


def test_documents_are_what_jax_passes_to_cudnn():
    """JAX's function, which ours replaces, gives the same list where no row has more documents than its share."""
    source = pathlib.Path(attention_cudnn.cudnn.__file__).read_text()
    begin = source.index("def _fix_seqlen_offsets")
    scope = dict(vars(attention_cudnn.cudnn))
    exec(source[begin : source.index("\ndef ", begin)], scope)
    _, segments, _ = problem(3, 300, 4, 4, 8)
    found = attention_cudnn.documents(jnp.asarray(segments), 4, 8)
    slots = found.lengths.shape[1]
    starts, lengths = np.full((3, slots + 1), -1, np.int32), np.full((3, slots), -1, np.int32)
    for row, ids in enumerate(segments):
        begins = np.flatnonzero(np.diff(ids, prepend=-1))
        starts[row, : len(begins)], lengths[row, : len(begins)] = begins, np.diff(begins, append=len(ids))
    query = np.zeros((3, 300, 4, 8))
    q_seqlen, _, q_offsets, _ = scope["_fix_seqlen_offsets"](lengths, lengths, starts, starts, query, query)
    np.testing.assert_array_equal(found.lengths, q_seqlen)
    np.testing.assert_array_equal(found.starts * 4 * 8, q_offsets)


def test_cudnn_lowers_for_gpus(hopper):
    """Forward and backward become cuDNN's packed custom calls: the private function exists and still fits."""
    arrays, segments, _ = problem(2, 256, 4, 2, 64)
    halves = tuple(jnp.asarray(a, jnp.bfloat16) for a in arrays)

    def loss(q, k, v, segments):
        found = attention.documents(segments, None, "cudnn", dataclasses.replace(SMALL, num_heads=4, head_dim=64))
        options = {"mesh": None, "implementation": "cudnn", "sliding_window": None}
        return attend(q, k, v, found, **options).astype(jnp.float32).sum()

    text = jax.jit(jax.grad(loss, (0, 1, 2))).trace(*halves, segments).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("__cudnn$fmhaSoftmax(") == 1
    assert text.count("__cudnn$fmhaSoftmaxBackward(") == 1
    assert '"max_seg_per_batch": 32' in text.replace("\\22", '"')
    assert not re.search(r"stablehlo\.(if|case)", text)
    # Keys keep their two heads.
    assert re.search(r"fmhaSoftmax\(.*tensor<2x256x4x64xbf16>, tensor<2x256x2x64xbf16>", text)


GPU = Shape(
    platform="gpu",
    compute_capability=(9, 0),
    rows=8,
    seq_len=2048,
    num_heads=16,
    num_kv_heads=8,
    head_dim=128,
    dtype="bfloat16",
    sliding_window=None,
)


@pytest.mark.parametrize(
    ("asked", "changes", "name", "reason"),
    [
        ("auto", {}, "cudnn", "flash kernel for gpu"),
        ("auto", {"compute_capability": (8, 0)}, "xla", r"\(8, 0\)"),
        ("auto", {"compute_capability": None}, "xla", "not an NVIDIA GPU"),
        ("auto", {"dtype": "float32"}, "xla", "not in float32"),
        ("auto", {"head_dim": 36}, "xla", "not 36"),
        ("auto", {"seq_len": 8}, "xla", "rows of 8 tokens"),
        ("auto", {"softcap": 50.0}, "xla", "no soft cap"),
        ("auto", {"platform": "tpu"}, "splash", "flash kernel for tpu"),
        ("auto", {"platform": "tpu", "seq_len": 64}, "xla", "rows of 64 tokens"),
        ("auto", {"platform": "cpu"}, "xla", "no flash kernel for cpu"),
        ("xla", {}, "xla", "config"),
        ("cudnn", {"seq_len": 8}, "cudnn", "config"),
    ],
)
def test_the_choice_and_its_reason(asked, changes, name, reason):
    choice = choose(asked, dataclasses.replace(GPU, **changes))
    assert choice.name == name
    assert re.search(reason, choice.reason)


@pytest.mark.parametrize(
    ("asked", "changes", "message"),
    [
        ("splash", {}, "attention='splash' needs a TPU, and this is a GPU"),
        ("cudnn", {"platform": "cpu"}, "attention='cudnn' needs a GPU, and this is a CPU"),
        ("cudnn", {"dtype": "float32"}, "not in float32. Use 'auto' or 'xla'"),
        ("cudnn", {"seq_len": 1 << 20, "num_heads": 32, "head_dim": 128}, "beyond cuDNN's int32 offsets"),
    ],
)
def test_an_implementation_that_cannot_run_is_refused(asked, changes, message):
    with pytest.raises(UserError, match=message):
        choose(asked, dataclasses.replace(GPU, **changes))


SMALL = Shape(
    platform="cpu",
    compute_capability=None,
    rows=2,
    seq_len=128,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    dtype="bfloat16",
    sliding_window=None,
)


def test_the_self_check_passes_a_right_kernel_and_names_what_is_wrong_with_another(monkeypatch):
    assert attention.self_check("splash", SMALL) is None

    def wrong_groups(q, k, v, segments, *, sliding_window, **_):
        return attention_xla.attend_xla(q, jnp.roll(k, 1, axis=1), v, segments, sliding_window)

    monkeypatch.setattr(attention, "_kernel", lambda name, mesh: attention._xla if name == "xla" else wrong_groups)
    assert re.match(r"its output differs from XLA's by \d+", attention.self_check("splash", SMALL) or "")

    def broken(*arrays, **_):
        raise RuntimeError("no such kernel\nin this library")

    monkeypatch.setattr(attention, "_kernel", lambda name, mesh: attention._xla if name == "xla" else broken)
    assert attention.self_check("splash", SMALL) == "RuntimeError: no such kernel"


def test_a_kernel_is_checked_with_the_window_of_each_kind_of_layer(monkeypatch):
    windows = []
    monkeypatch.setattr(attention, "choose", lambda *_: attention.Choice("cudnn", "the flash kernel"))
    monkeypatch.setattr(attention, "self_check", lambda name, shape: windows.append(shape.sliding_window))
    config = LlamaConfig(hidden_size=16, intermediate_size=16, num_layers=5, num_heads=2, num_kv_heads=2)
    config = dataclasses.replace(config, layers="3 local : 1 global", sliding_window=4)
    model = config.build(50, None)
    assert model.attention_choice(2, 300).name == "cudnn"
    assert windows == [4, None]
    monkeypatch.setattr(attention, "self_check", lambda name, shape: None if shape.sliding_window else "it is wrong")
    assert config.build(50, None).attention_choice(2, 300).name == "xla"


def test_a_kernel_that_fails_its_check_is_replaced_even_while_tracing(monkeypatch, caplog):
    monkeypatch.setattr(attention, "choose", lambda *_: attention.Choice("cudnn", "the flash kernel"))
    config = LlamaConfig(hidden_size=16, intermediate_size=16, num_layers=1, num_heads=2, num_kv_heads=2)
    model = config.build(50, None)
    inputs = [np.ones((1, 8), np.int32)] * 3
    x = jax.jit(model.hidden)(jax.jit(model.init)(jax.random.key(0)), *inputs).x
    assert x.shape == (1, 8, 16)
    assert "cudnn is not used for rows of 8" in caplog.text
    assert model.attention_choice(1, 8).name == "xla"


@pytest.mark.parametrize("elsewhere", [True, False])
def test_processes_agree_on_a_kernels_check(elsewhere, monkeypatch):
    """One check per row length, for any number of rows: threads that compile request others, without consensus."""
    checked, told = [], []
    monkeypatch.setattr(attention, "choose", lambda *_: attention.Choice("cudnn", "the flash kernel"))
    monkeypatch.setattr(attention, "self_check", lambda name, shape: checked.append(shape))
    monkeypatch.setattr(llama.consensus, "any_process", lambda failed: told.append(failed) or elsewhere)
    config = LlamaConfig(hidden_size=16, intermediate_size=16, num_layers=1, num_heads=2, num_kv_heads=2)
    model = config.build(50, None)
    choices = [model.attention_choice(rows, 8) for rows in (16, 4, 1)]
    assert {choice.name for choice in choices} == {"xla" if elsewhere else "cudnn"}
    assert len(checked) == len(told) == 1
    if elsewhere:
        assert "it fails on another process" in choices[0].reason


def test_xla_in_bfloat16_errs_by_bfloat16_rounding_only():
    arrays, segments, dx = problem(2, 200, 4, 2, 16)
    halves = tuple(jnp.asarray(a, jnp.bfloat16) for a in arrays)
    x, grads = forward_and_backward(
        halves, segments, jnp.asarray(dx, jnp.bfloat16), mesh=None, implementation="xla", sliding_window=None
    )
    assert x.dtype == jnp.bfloat16
    assert all(g.dtype == jnp.bfloat16 for g in grads)
    rounded = tuple(np.asarray(a, np.float64) for a in halves)
    want = reference.attention(rounded, segments, None, np.asarray(jnp.asarray(dx, jnp.bfloat16), np.float64))
    for a, b in zip(jax.tree.leaves((x, grads)), jax.tree.leaves(want), strict=True):
        assert np.abs(np.asarray(a, np.float64) - b).max() < 2**-7 * np.abs(b).max()


@pytest.mark.parametrize(
    "mesh", [{"fsdp": 8}, {"data": 2, "fsdp": 2, "tensor": 2}, {"fsdp": 2, "tensor": 2, "context": 2}], ids=str
)
def test_each_mesh_gives_what_one_device_gives(mesh):
    arrays, segments, dx = problem(8, 24, 4, 2, 8)
    options = {"implementation": "xla", "sliding_window": None}
    got = forward_and_backward(arrays, segments, dx, mesh=MeshConfig(**({"fsdp": 1} | mesh)).build(), **options)
    want = forward_and_backward(arrays, segments, dx, mesh=None, **options)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-6), got, want)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "tensor", "context", "share"),
    [
        (8, 2, 1, 2, (4, 1)),
        (8, 2, 1, 4, (2, 1)),
        (8, 1, 1, 8, (1, 1)),
        (12, 3, 1, 2, (6, 3)),
        (8, 2, 2, 4, (1, 1)),
        (6, 2, 1, 4, None),
    ],
)
def test_context_shares_heads(heads, kv_heads, tensor, context, share):
    """Key heads are repeated if there are too few; the sequence stays split outside of attention."""
    mesh = MeshConfig(fsdp=1, tensor=tensor, context=context).build(jax.devices()[: tensor * context])
    assert attention.share_of_context(mesh, heads, kv_heads) == share
    arrays, segments, dx = problem(2, 24, heads, kv_heads, 8)
    options = {"implementation": "xla", "sliding_window": 7}
    got = forward_and_backward(arrays, segments, dx, mesh=mesh, **options)
    want = reference.attention(arrays, segments, 7, dx)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=2e-5), got, want)


def test_no_device_of_context_computes_another_s_share():
    """The scores of all devices together equal those of one device alone."""
    arrays, segments, dx = problem(1, 256, 8, 2, 16)

    def flops(mesh):
        def run(arrays, segments, dx):
            options = {"mesh": mesh, "implementation": "xla", "sliding_window": None}
            return jax.vjp(lambda q, k, v: attend(q, k, v, segments, **options), *arrays)[1](dx)

        return jax.jit(run).lower(arrays, segments, dx).compile()

    alone, shared = flops(None), flops(MeshConfig(fsdp=1, context=8).build())
    counts = [compiled.cost_analysis() for compiled in (alone, shared)]
    assert counts[0] is not None
    assert counts[1] is not None
    assert counts[1]["flops"] < counts[0]["flops"] / 8 * 1.2
    assert (shared.as_text() or "").count(" all-to-all(") >= 7  # q, k, v and x, and their gradients


def test_no_array_is_larger_than_a_block_row_of_scores():
    """At T = 2,048 the [T, T] scores of one head would be 4 times the limit here."""
    batch, seq_len, heads, kv_heads, width = 1, 2048, 4, 2, 16
    arrays, segments, dx = problem(batch, seq_len, heads, kv_heads, width)

    def run(arrays, segments, dx):
        options = {"mesh": None, "implementation": "xla", "sliding_window": None}
        return jax.vjp(lambda q, k, v: attend(q, k, v, segments, **options), *arrays)[1](dx)

    largest = max(_sizes(jax.make_jaxpr(run)(arrays, segments, dx).jaxpr))
    assert largest == batch * heads * attention_xla.BLOCK * seq_len
    assert largest < heads * seq_len * seq_len / 4


def test_a_window_computes_only_the_blocks_in_sight():
    groups = list(attention_xla._groups(1024, 200))
    assert [(stop - first) for _, stop, first in groups] == [128, 256, 384, 384, 384, 384, 384, 384]
    assert list(attention_xla._groups(4096, None))[-1] == (3584, 4096, 0)


def _sizes(jaxpr):
    for equation in jaxpr.eqns:
        for value in equation.outvars:
            yield int(np.prod(value.aval.shape))
        for inner in jax.tree.leaves(equation.params, is_leaf=lambda p: hasattr(p, "eqns") or hasattr(p, "jaxpr")):
            if hasattr(inner, "jaxpr"):
                inner = inner.jaxpr
            if hasattr(inner, "eqns"):
                yield from _sizes(inner)


@pytest.mark.parametrize(
    ("platform", "devices", "names", "spared"),
    [
        ("gpu", 8, ["xla"], True),
        ("gpu", 8, ["cudnn", "xla"], True),
        ("gpu", 8, ["cudnn"], False),
        ("gpu", 1, ["xla"], False),
        ("tpu", 8, ["xla"], False),
        ("cpu", 8, ["xla"], False),
    ],
)
def test_the_pass_that_aborts_on_block_rows_is_spared(platform, devices, names, spared):
    """It aborts for a 1B model on 8 A100s. Only for XLA's attention on GPUs: elsewhere the pass is useful."""
    chips = np.array([types.SimpleNamespace(platform=platform)] * devices)
    mesh: Any = types.SimpleNamespace(size=devices, devices=chips)
    passes = attention.compiler_options(mesh, *names).get("xla_disable_hlo_passes", "")
    assert ("collective-pipeliner-backward" in passes) == spared
    assert attention.compiler_options(None, "xla") == {}
    # Without a loop over layers, that over micro-batches has the loss's chunks inside.
    unrolled = attention.compiler_options(mesh, *names, unrolled=True)
    assert ("xla_disable_hlo_passes" in unrolled) == (platform == "gpu" and devices > 1)
