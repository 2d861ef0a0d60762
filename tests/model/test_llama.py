"""The decoder: gradients, and that packing, remat and meshes change nothing. test_hf*.py compares its logits."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtrain import cli
from jaxtrain.distributed import sharding
from jaxtrain.distributed.sharding import MeshConfig
from jaxtrain.errors import UserError
from jaxtrain.model.llama import Llama, LlamaConfig
from jaxtrain.model.rope import LinearRopeScaling, Llama3RopeScaling, YarnRopeScaling

VOCAB = 300
TINY = LlamaConfig(
    hidden_size=32, intermediate_size=64, num_layers=2, num_heads=4, num_kv_heads=2, dtype="float32", remat="none"
)
EVERYTHING = dataclasses.replace(
    TINY,
    num_layers=5,
    head_dim=6,
    layers="1 local : 1 global nope",
    sliding_window=5,
    rope_local_base_freq=100.0,
    partial_rotary_factor=0.7,
    norm="rms_plus_one",
    norm_position="both",
    hidden_act="gelu_pytorch_tanh",
    qk_norm_over="projection",
    query_pre_attn_scalar=9.0,
    attn_logit_softcapping=4.0,
    final_logit_softcapping=5.0,
    scale_embeddings=True,
    attention_bias=True,
    attention_output_bias=True,
    mlp_bias=True,
    qk_norm=True,
    tie_embeddings=True,
    rope_scaling=YarnRopeScaling(factor=4.0, original_max_position_embeddings=32),
)
PARALLEL = dataclasses.replace(TINY, norm="layer", parallel_residual=True, gated_mlp=False, hidden_act="gelu")
MESHES = [
    {"fsdp": 8},
    pytest.param({"data": 8}, marks=pytest.mark.nightly),
    pytest.param({"data": 2, "fsdp": 2, "tensor": 2}, marks=pytest.mark.slow),
    pytest.param({"fsdp": 4, "tensor": 2}, marks=pytest.mark.nightly),
    {"fsdp": 2, "tensor": 2, "context": 2},
]


def packed_batch(batch=8, seq_len=24):
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, VOCAB, (batch, seq_len)).astype(np.int32)
    segments = np.sort(rng.integers(1, 4, (batch, seq_len)), axis=1).astype(np.int32)
    starts = np.concatenate([np.ones((batch, 1), bool), segments[:, 1:] != segments[:, :-1]], axis=1)
    index = np.arange(seq_len)
    positions = index - np.maximum.accumulate(np.where(starts, index, 0), axis=1)
    return tokens, segments, positions.astype(np.int32)


def random_params(model: Llama):
    """Every parameter random: biases start at 0 and norms at 1, which would hide mistakes."""
    leaves, tree = jax.tree.flatten(model.shapes)
    rng = np.random.default_rng(0)
    arrays = [(0.2 * rng.standard_normal(leaf.shape)).astype(np.float32) for leaf in leaves]
    return jax.tree.map(lambda a, path: a + (path == "scale"), tree.unflatten(arrays), _last_names(model.shapes))


def _last_names(tree):
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key, tree)


def loss_of(model: Llama):
    def loss(params, batch):
        logits = model.hidden(params, *batch).x @ model.head(params)
        targets = jnp.roll(batch[0], -1, axis=1)
        return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], axis=-1))

    return loss


def loss_and_grads(model: Llama, params, batch):
    return jax.device_get(jax.jit(jax.value_and_grad(loss_of(model)))(params, batch))


@pytest.fixture(scope="module")
def expected():
    """Loss and gradients of EVERYTHING on one device, without remat, scanned."""
    model = EVERYTHING.build(VOCAB, None)
    return loss_and_grads(model, random_params(model), packed_batch())


def assert_close(got, want, tolerance):
    """Each array within `tolerance` of its own largest element."""
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * np.abs(b).max()), got, want)


def moved(tree, direction, step):
    return jax.tree.map(lambda a, d: a + step * d, tree, direction)


@pytest.mark.parametrize("config", [TINY, EVERYTHING, PARALLEL], ids=["plain", "everything", "parallel"])
def test_gradients_are_finite_differences(config):
    model = dataclasses.replace(config, dtype="float64").build(VOCAB, None)
    params = jax.tree.map(lambda a: a.astype(np.float64), random_params(model))
    batch = packed_batch(2, 10)
    rng = np.random.default_rng(1)
    direction = jax.tree.map(lambda a: rng.standard_normal(a.shape), params)
    with jax.enable_x64(True):
        _, grads = loss_and_grads(model, params, batch)
        loss = jax.jit(loss_of(model))
        step = 1e-6
        for name in ("embedding", "norm", "layers"):
            # One direction for each part, along all of its parameters at once.
            above, below = (
                loss(params | {name: moved(params[name], direction[name], s)}, batch) for s in (step, -step)
            )
            slope = jax.tree.reduce(np.add, jax.tree.map(lambda g, d: np.sum(g * d), grads[name], direction[name]))
            np.testing.assert_allclose(slope, (above - below) / (2 * step), rtol=1e-6)


def test_a_document_packed_with_others_has_the_hidden_states_it_has_alone():
    model = EVERYTHING.build(VOCAB, None)
    params = random_params(model)
    tokens, segments, positions = packed_batch(1, 150)
    hidden = jax.jit(model.hidden)
    packed = hidden(params, tokens, segments, positions).x
    for document in range(1, 4):
        (where,) = np.nonzero(segments[0] == document)
        alone = hidden(params, tokens[:, where], np.ones((1, len(where)), np.int32), positions[:, where]).x
        np.testing.assert_allclose(packed[:, where], alone, rtol=0, atol=2e-5)


def test_a_token_sees_nothing_after_it():
    model = TINY.build(VOCAB, None)
    params = random_params(model)
    tokens, segments, positions = packed_batch(2, 20)
    hidden = jax.jit(model.hidden)
    other = np.where(np.arange(20) < 12, tokens, tokens[::-1])
    before, after = (hidden(params, t, np.ones_like(segments), positions).x for t in (tokens, other))
    np.testing.assert_array_equal(before[:, :12], after[:, :12])
    assert np.abs(before[:, 12:] - after[:, 12:]).max() > 0.1


@pytest.mark.parametrize("changes", [{"remat": "full"}, {"remat": "dots"}, {"scan_layers": False, "remat": "full"}])
def test_remat_and_scan_change_nothing(changes, expected):
    model = dataclasses.replace(EVERYTHING, **changes).build(VOCAB, None)
    assert_close(loss_and_grads(model, random_params(model), packed_batch()), expected, 1e-5)


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_every_mesh_gives_what_one_device_gives(mesh, expected):
    built = MeshConfig(**({"fsdp": 1} | mesh)).build()
    model = EVERYTHING.build(VOCAB, built)
    params = jax.device_put(random_params(model), sharding.tree_shardings(built, model.axes))
    batch = jax.device_put(packed_batch(), sharding.batch_sharding(built))
    assert_close(loss_and_grads(model, params, batch), expected, 2e-5)


def test_parameters_are_born_sharded_with_the_values_of_one_device():
    mesh = MeshConfig(fsdp=4, tensor=2).build()
    model = TINY.build(VOCAB, mesh)
    shardings = sharding.tree_shardings(mesh, model.axes)
    params = jax.jit(model.init, out_shardings=shardings)(jax.random.key(0))
    kernel = params["layers"]["mlp"]["up"]["kernel"]
    assert kernel.addressable_shards[0].data.size == kernel.size // 8
    one = jax.jit(TINY.build(VOCAB, None).init)(jax.random.key(0))
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(params), jax.device_get(one))


def test_initial_parameters():
    model = dataclasses.replace(TINY, hidden_size=256, num_layers=8, attention_bias=True).build(VOCAB, None)
    params = jax.jit(model.init)(jax.random.key(3))
    layers = params["layers"]
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype(np.float32)}
    np.testing.assert_allclose(np.std(params["embedding"][:VOCAB]), 0.02, rtol=0.02)
    np.testing.assert_allclose(np.std(params["head"][:, :VOCAB]), 0.02, rtol=0.02)
    assert not np.any(params["embedding"][VOCAB:])
    assert not np.any(params["head"][:, VOCAB:])
    for name, std in (("q", 0.02), ("o", 0.02 / 4)):
        np.testing.assert_allclose(np.std(layers["attention"][name]["kernel"], axis=(1, 2)), std, rtol=0.02)
    np.testing.assert_allclose(np.std(layers["mlp"]["down"]["kernel"]), 0.02 / 4, rtol=0.02)
    assert not np.any(layers["attention"]["q"]["bias"])
    assert np.all(layers["mlp_norm"]["scale"] == 1)
    # No two matrices have the same size.
    firsts = [float(leaf.ravel()[5]) for leaf in jax.tree.leaves(params) if np.std(leaf) > 0]
    assert len(set(firsts)) == len(firsts)


def test_counts():
    config = LlamaConfig(hidden_size=1024, intermediate_size=2816, num_layers=12, num_heads=16, num_kv_heads=8)
    model = config.build(50_257, None)
    assert model.padded_vocab_size == 50_304
    layer = 1024 * 1024 * 2 + 1024 * 512 * 2 + 3 * 1024 * 2816 + 2 * 1024
    assert model.num_params_non_embedding == 12 * layer + 1024
    assert model.num_params == 12 * layer + 1024 + 2 * 50_257 * 1024
    weights = 12 * layer + 1024 + 50_257 * 1024
    assert model.flops_per_token(2048) == 6 * weights + 6 * 12 * 1024 * 2048
    windowed = dataclasses.replace(config, sliding_window=512, tie_embeddings=True).build(50_257, None)
    assert windowed.num_params == model.num_params - 50_257 * 1024
    # The first 512 tokens see 256 on average, the other 1,536 see 512: 448 of them all.
    assert windowed.flops_per_token(2048) == 6 * weights + 12 * 12 * 1024 * 448
    assert windowed.flops_per_token(100) == 6 * weights + 6 * 12 * 1024 * 100
    some = dataclasses.replace(config, sliding_window=512, layers="2 local : 1 global").build(50_257, None)
    assert some.flops_per_token(2048) == 6 * weights + 12 * 1024 * (8 * 448 + 4 * 1024)


def test_gemma3_1b_has_the_parameters_of_the_published_one():
    model = cli.load("configs/gemma3_1b.py", ()).model.build(262_144, None)
    assert model.num_params == 999_885_952


def test_bfloat16_activations():
    model = dataclasses.replace(EVERYTHING, dtype="bfloat16").build(VOCAB, None)
    params = random_params(model)
    batch = packed_batch(2, 16)
    hidden = jax.jit(model.hidden)(params, *batch).x
    assert hidden.dtype == jnp.bfloat16
    exact = jax.jit(EVERYTHING.build(VOCAB, None).hidden)(params, *batch).x
    assert np.abs(hidden.astype(np.float32) - exact).max() < 0.05 * np.abs(exact).max()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_kv_heads": 3}, "num_heads=4 is not a multiple of num_kv_heads=3.*1, 2, 4"),
        ({"hidden_size": 30}, "hidden_size=30 is not a multiple of num_heads=4: set head_dim"),
        ({"head_dim": 5}, "A head of width 5"),
        ({"num_layers": 0}, "num_layers=0"),
        ({"sliding_window": 0}, "sliding_window=0"),
        ({"layers": "1 local : 1 global"}, "sliding_window=None: set it to the tokens that local layers see"),
        ({"layers": "2 global", "sliding_window": 8}, "sliding_window=8: remove it, or make some layers local"),
        ({"layers": "2 global", "no_rope_every": 2}, "write 'nope' in the pattern"),
        ({"layers": "2 round"}, "'2 round' is not a number of layers and their kind"),
        ({"dtype": "float16"}, "dtype='float16' is not known. Use one of: bfloat16, float32"),
        ({"remat": "some"}, "remat='some'"),
        ({"attention": "flash"}, "attention='flash'"),
        ({"norm_eps": 0.0}, "norm_eps=0.0"),
        ({"norm": "batch"}, "norm='batch' is not known. Use one of: rms, rms_plus_one, layer"),
        ({"final_logit_softcapping": 0.0}, "final_logit_softcapping=0.0: it must be above 0"),
        ({"partial_rotary_factor": 1.5}, "partial_rotary_factor=1.5"),
        ({"partial_rotary_factor": 0.2}, "need an even part of it, at least 2"),
    ],
)
def test_a_config_that_cannot_be_is_refused(changes, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(TINY, **changes).check()


def test_scaling_of_positions_is_checked():
    with pytest.raises(UserError, match=r"factor=0\.5"):
        LinearRopeScaling(factor=0.5).check()
    with pytest.raises(UserError, match="beta_slow=0"):
        YarnRopeScaling(factor=8, original_max_position_embeddings=32, beta_slow=0).check()
    with pytest.raises(UserError, match="low_freq_factor=4"):
        Llama3RopeScaling(factor=8, low_freq_factor=4, high_freq_factor=4).check()


def test_a_mesh_that_does_not_divide_the_heads_is_refused():
    with pytest.raises(UserError, match=r"num_kv_heads=2 is not divisible by mesh\.tensor=4.*: 1, 2\."):
        TINY.build(VOCAB, MeshConfig(fsdp=2, tensor=4).build())
