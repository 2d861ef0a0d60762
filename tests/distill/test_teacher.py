"""A teacher of any origin: read identically, identified identically, and refused with a reason if it cannot teach."""

import dataclasses
import json
import pathlib
import re
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save

from jaxtrain import cli, hf
from jaxtrain.checkpoint.checkpointer import CheckpointConfig
from jaxtrain.data import fingerprint
from jaxtrain.distill.teacher import Frozen, Teacher, mismatch
from jaxtrain.distributed import sharding
from jaxtrain.distributed.sharding import MeshConfig
from jaxtrain.errors import UserError
from jaxtrain.model.llama import LlamaConfig
from jaxtrain.tokenizers.training import TrainTokenizer
from tests.hub import LoopbackHub

MODEL = LlamaConfig(
    hidden_size=32, intermediate_size=48, num_layers=2, num_heads=4, num_kv_heads=4, max_seq_len=64, tie_embeddings=True
)
TEXTS = [f"some words, {n} of them: {n * n} lazy dogs\n" for n in range(300)]


def make_mesh(**sizes: int) -> jax.sharding.Mesh:
    sizes = {"fsdp": 1} | sizes
    return MeshConfig(**sizes).build(jax.devices()[: int(np.prod(list(sizes.values())))])


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return TrainTokenizer(kind="bpe", vocab_size=300).train(TEXTS, tmp_path_factory.mktemp("a"), progress=False)


@pytest.fixture(scope="module")
def params(tokenizer: Any) -> Any:
    return MODEL.build(tokenizer.vocab_size, None).init(jax.random.key(0))


@pytest.fixture(scope="module")
def exported(tokenizer: Any, params: Any, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """The model in transformers' format, in fp32."""
    folder = tmp_path_factory.mktemp("exported")
    hf.export(params, MODEL.build(tokenizer.vocab_size, None), str(folder), dtype="float32", tokenizer=tokenizer)
    return folder


@pytest.fixture(scope="module")
def workdir(tokenizer: Any, params: Any, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """The same model, saved by jaxtrain."""
    folder = tmp_path_factory.mktemp("workdir")
    checkpointer = CheckpointConfig().build(folder / "checkpoints")
    data = {"config": {"model": cli.to_json(MODEL)}, "tokenizer": tokenizer.identity}
    checkpointer.save(7, {"params": params}, data)
    checkpointer.close()
    return folder


def test_an_outline_needs_the_config_alone(exported: pathlib.Path, tokenizer: Any, tmp_path: pathlib.Path) -> None:
    (tmp_path / "config.json").write_bytes((exported / "config.json").read_bytes())
    mesh = make_mesh(fsdp=2)
    outline = Teacher(model=str(tmp_path)).outline(tokenizer.vocab_size, mesh)
    built = Teacher(model=str(exported)).build(tokenizer, mesh)
    assert outline.abstract == built.abstract
    assert outline.model.config == built.model.config


@pytest.mark.slow
def test_the_same_from_anywhere_onto_any_mesh(
    tokenizer: Any, exported: pathlib.Path, workdir: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(workdir.parent)
    found = {}
    for name, model, mesh in (
        ("exported", exported, make_mesh()),
        ("workdir", workdir.name, make_mesh()),
        ("sharded", exported, make_mesh(data=2, fsdp=2, tensor=2)),
    ):
        frozen = Teacher(model=str(model)).build(tokenizer, mesh)
        params = frozen.load()
        found[name] = frozen.identity(params)
        for leaf, wanted in zip(jax.tree.leaves(params), jax.tree.leaves(frozen.abstract), strict=True):
            assert leaf.dtype == jnp.bfloat16
            assert leaf.sharding.is_equivalent_to(wanted.sharding, leaf.ndim)
    assert len({one["parameters"] for one in found.values()}) == 1
    assert mismatch(found["exported"], found["workdir"]) is None
    assert mismatch(found["exported"], found["sharded"]) is None
    json.dumps(found)
    frozen = Teacher(model=str(exported), dtype="float32").build(tokenizer, make_mesh())
    said = mismatch(found["workdir"], frozen.identity(frozen.load()))
    assert said is not None
    assert f"was {workdir.name}, is {exported}" in said
    assert "dtype: was bfloat16, is float32" in said
    assert mismatch(None, None) is None
    assert mismatch(None, found["exported"]) == f"the teacher was none, is {exported}"


def test_a_hash_of_arrays_sees_every_bit_and_every_place() -> None:
    rng = np.random.default_rng(0)
    tree = {
        "a": {"b": rng.normal(size=(3, 4, 5)).astype(np.float32)},
        "c": rng.normal(size=(3, 4, 5)).astype(np.float32),
    }
    hashes = {fingerprint.text(fingerprint.of_arrays(tree))}
    np.testing.assert_array_equal(
        fingerprint.of_arrays(jax.tree.map(jnp.asarray, tree), jnp), fingerprint.of_arrays(tree)
    )
    for place in ((0, 0, 0), (2, 3, 4)):
        changed = tree["c"].copy()
        changed.view(np.uint32)[place] ^= 1
        hashes.add(fingerprint.text(fingerprint.of_arrays({**tree, "c": changed})))
    hashes.add(fingerprint.text(fingerprint.of_arrays({"a": {"b": tree["c"]}, "c": tree["a"]["b"]})))
    hashes.add(fingerprint.text(fingerprint.of_arrays({**tree, "c": tree["c"][::-1]})))
    assert len(hashes) == 5


@pytest.mark.slow
def test_rows_that_only_pad_the_vocabulary_do_not_matter(
    tokenizer: Any, exported: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    """A checkpoint whose embedding is rounded up to 512 rows: the extra rows are no token's."""
    size = tokenizer.vocab_size
    padded = MODEL.build(512, None)
    params = padded.init(jax.random.key(3))
    own = hf.load(str(exported), MODEL.build(size, None), jax.sharding.SingleDeviceSharding(jax.devices()[0]))
    params = {**own, "embedding": params["embedding"].at[:size].set(own["embedding"][:size])}
    hf.export(params, padded, str(tmp_path), dtype="float32", tokenizer=tokenizer)
    assert hf.config(str(tmp_path))[1] == 512
    mesh = make_mesh()
    mine, theirs = (Teacher(model=str(f), dtype="float32").build(tokenizer, mesh) for f in (exported, tmp_path))
    assert mine.identity(mine.load())["parameters"] == theirs.identity(theirs.load())["parameters"]


@pytest.mark.slow
def test_a_teacher_of_the_hub_is_one_commit(
    hub: LoopbackHub, tokenizer: Any, exported: pathlib.Path, workdir: pathlib.Path
) -> None:
    """Downloaded by the Hub's own client, in two shards; the same as its folder of origin. The branch moves on."""
    sha = hub.commit("org/teacher", sharded(exported), repo_type="model")
    frozen = Teacher(model="org/teacher").build(tokenizer, make_mesh(fsdp=8))
    hub.commit("org/teacher", {"config.json": b"{}"}, repo_type="model")
    found = frozen.identity(frozen.load())
    here = Teacher(model=str(exported)).build(tokenizer, make_mesh())
    assert found["parameters"] == here.identity(here.load())["parameters"]
    assert (found["found"], found["revision"]) == ("org/teacher", sha)
    pinned = Teacher(model="org/teacher", revision=sha).build(tokenizer, make_mesh())
    assert pinned.config.revision == sha
    hub.access("org/teacher", "gated", repo_type="model")
    with pytest.raises(UserError, match="gated"):
        Teacher(model="org/teacher").build(tokenizer, make_mesh())


def sharded(folder: pathlib.Path) -> dict[str, bytes]:
    """The files of an exported model, its tensors in two files, like published large models."""
    files = {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "model.safetensors"}
    tensors = sorted(load_file(folder / "model.safetensors").items())
    names: dict[str, str] = {}
    for number, part in enumerate((tensors[::2], tensors[1::2]), 1):
        name = f"model-{number:05d}-of-00002.safetensors"
        files[name] = save(dict(part))
        names |= dict.fromkeys((tensor for tensor, _ in part), name)
    files["model.safetensors.index.json"] = json.dumps({"metadata": {}, "weight_map": names}).encode()
    return files


def refusal(model: pathlib.Path, ours: Any, tokenizer: str | None = None) -> str:
    with pytest.raises(UserError) as refused:
        Teacher(model=str(model), tokenizer=tokenizer).build(ours, make_mesh())
    return str(refused.value)


def test_another_tokenizer_is_refused(
    tokenizer: Any, exported: pathlib.Path, workdir: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    other = TrainTokenizer(kind="bpe", vocab_size=300).train([t[::-1] for t in TEXTS], tmp_path / "b", progress=False)
    assert other.vocab_size == tokenizer.vocab_size
    for model in (exported, workdir):
        said = refusal(model, other)
        assert f"teacher.model={model} has a different tokenizer than the run" in said
        assert f"hash: the run's {other.identity['hash']}, the teacher's {tokenizer.identity['hash']}" in said
        assert "ids of 'The quick brown fox jump'...: the run's [" in said
        assert "Set `tokenizer` to the teacher's own" in said
        assert "write a cache, which serves any tokenizer: python -m tools.cache_teacher" in said
    larger = TrainTokenizer(kind="bpe", vocab_size=320).train(TEXTS, tmp_path / "c", progress=False)
    assert "has a vocabulary of 300, the run's tokenizer has 320 ids" in refusal(exported, larger)
    smaller = TrainTokenizer(kind="bpe", vocab_size=290).train(TEXTS, tmp_path / "d", progress=False)
    assert "vocab_size: the run's 290, the teacher's 300" in refusal(exported, smaller)


def test_the_same_tokens_in_another_file_are_the_same_tokenizer(
    tokenizer: Any, exported: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    tokenizer.save(tmp_path)
    file = tmp_path / "tokenizer.json"
    file.write_text(json.dumps(json.loads(file.read_text()), indent=3))
    Teacher(model=str(exported), tokenizer=str(tmp_path)).build(tokenizer, make_mesh())
    swapped = re.sub(
        r'"(l)"(: \d+),|"(d)"(: \d+),', lambda m: f'"{"d" if m[1] else "l"}"{m[2] or m[4]},', file.read_text()
    )
    assert swapped != file.read_text()
    file.write_text(swapped)
    assert "a different tokenizer" in refusal(exported, tokenizer, str(tmp_path))


def test_what_is_missing_is_named(tokenizer: Any, exported: pathlib.Path, tmp_path: pathlib.Path) -> None:
    assert "has no config.json" in refusal(tmp_path, tokenizer)
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((exported / name).read_bytes())
    said = refusal(tmp_path, tokenizer)
    assert "has neither tokenizer.json nor tokenizer.model" in said
    assert "set teacher.tokenizer to its location" in said
    (tmp_path / "model.safetensors").unlink()
    frozen = Teacher(model=str(tmp_path), tokenizer=str(exported)).build(tokenizer, make_mesh())
    with pytest.raises(UserError, match=r"has no model\.safetensors"):
        frozen.load()
    with pytest.raises(UserError, match=r"num_heads=4 is not divisible by mesh\.tensor=8"):
        Teacher(model=str(exported)).build(tokenizer, make_mesh(tensor=8))
    with pytest.raises(UserError, match="model=''"):
        Teacher().check()
    with pytest.raises(UserError, match="dtype='int8'"):
        Teacher(model="x", dtype="int8").check()


@pytest.fixture
def frozen(tokenizer: Any, exported: pathlib.Path) -> Frozen:
    return Teacher(model=str(exported)).build(tokenizer, make_mesh(fsdp=8))


def test_what_does_not_fit(frozen: Frozen) -> None:
    stages = [SimpleNamespace(index=1, name="a", seq_len=64), SimpleNamespace(index=2, name="b", seq_len=65)]
    frozen.check_stages(SimpleNamespace(stages=stages[:1]))  # pyright: ignore[reportArgumentType]
    with pytest.raises(UserError, match=r"stage 2 \(b\): seq_len=65 is longer than the context of the teacher .* 64 t"):
        frozen.check_stages(SimpleNamespace(stages=stages))  # pyright: ignore[reportArgumentType]
    model = dataclasses.replace(MODEL, dtype="float32").build(300, frozen.model.mesh)
    student = {
        "params": jax.tree.map(
            lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
            model.shapes,
            sharding.tree_shardings(make_mesh(fsdp=8), model.axes),
        )
    }
    # Per device an eighth of the sharded arrays, and whole norms: 32 (embedding 384, two layers of 4 x 32 + 3 x 48).
    matrices, norms = 32 * (384 + 2 * (4 * 32 + 3 * 48)), 5 * 32
    teacher, held = (size * (matrices // 8 + norms) for size in (2, 4))
    frozen.check_memory(student, None)
    frozen.check_memory(student, teacher + held)
    with pytest.raises(
        UserError, match=r"does not fit: .* GB of a device for its parameters in bfloat16 and .*mesh\.fsdp"
    ):
        frozen.check_memory(student, teacher + held - 1)
