"""How a step's program is chosen: from made-up tables, and what is kept."""

import dataclasses
import json
import logging
import os
import pathlib
from typing import Any

import jax
import pytest
from etils import epath

from jaxtrain import cli
from jaxtrain.config import Config
from jaxtrain.cost import clusters, memory
from jaxtrain.cost.clusters import Cluster
from jaxtrain.data.pipeline import DataConfig
from jaxtrain.data.sources.text_files import TextFiles
from jaxtrain.distributed.sharding import MESH_AXES, AutoMesh, MeshConfig
from jaxtrain.errors import UserError
from jaxtrain.losses.cross_entropy import CrossEntropy
from jaxtrain.model.llama import LlamaConfig
from jaxtrain.plan import Stage
from jaxtrain.tokenizers.hf import HuggingFaceTokenizer
from jaxtrain.trainer import compatibility, meshes, session, tuning, variants
from jaxtrain.trainer.programs import Choice
from jaxtrain.trainer.step import Variant
from jaxtrain.trainer.variants import Ranked, Target

ROOT = pathlib.Path(__file__).resolve().parents[2]
V5E = clusters.parse("v5e:2x4", "topology")
H200 = clusters.parse("h200:1x1", "topology")
MODEL = LlamaConfig(hidden_size=2048, intermediate_size=5632, num_layers=4, num_heads=16, num_kv_heads=8)


def make_config(*, steps: int | None = 1000, stages: tuple[Stage, ...] = (), **changes: Any) -> Config:
    config = Config(
        model=MODEL,
        tokenizer=HuggingFaceTokenizer(name="no/where", vocab_size=512),
        data=DataConfig(sources={"a": TextFiles()}),
        stages=stages or (Stage(name="only", seq_len=2048, batch_size=512),),
        steps=steps,
    )
    return dataclasses.replace(config, **changes)


def make_target(config: Config, cluster: Cluster | None = V5E, limit: int | None = None) -> Target:
    one = MeshConfig(fsdp=1).build(jax.devices()[:1])
    components = session.make_components(config, 512, config.plan(), one, None, None)
    if cluster is None:
        return Target(config=config, components=components, mesh=one.shape, cluster=None, limit=limit)
    mesh = dict[str, int](zip(MESH_AXES, config.mesh.sizes(cluster.num_chips), strict=True))
    limit = limit or memory.limit_of_chip(cluster.chip, None)
    return Target(config=config, components=components, mesh=mesh, cluster=cluster, limit=limit)


def choose(target: Target, measure: Any = None, start_step: int = 0) -> Choice:
    (choice,) = tuning.choose(target, target.config.plan(), measure, start_step).values()
    return choice


# ---- By the compiler's numbers


def table(*rows: tuple[str, float, float, float]) -> tuple[list[Ranked], Any, list[str]]:
    """remat, seconds by arithmetic, seconds and bytes by the compiler: (ranked, measure, what was compiled)."""
    found = {Variant(micro_batches=1, remat=name): row for name, *row in rows}
    ranked = [Ranked(variant=variant, seconds=row[0], bytes=1) for variant, row in found.items()]
    compiled: list[str] = []

    def measure(variant: Variant) -> Ranked | None:
        compiled.append(str(variant.remat))
        _, seconds, size = found[variant]
        return Ranked(variant=variant, seconds=seconds, bytes=size) if size else None

    return ranked, measure, compiled


@pytest.mark.parametrize(
    ("rows", "taken", "compiled"),
    [
        ([("a", 1.0, 3.0, 5), ("b", 1.1, 2.0, 5), ("c", 1.2, 4.0, 5)], "bac", "abc"),
        ([("a", 1.0, 2.01, 5), ("b", 1.1, 2.0, 5), ("c", 1.2, 1.5, 11)], "ab", "abc"),  # a tie: by arithmetic
        ([("a", 1.0, 1.0, 11), ("b", 1.1, 2.0, 10)], "b", "ab"),  # too large
        ([("a", 1.0, 1.0, 0), ("b", 1.1, 2.0, 5)], "b", "ab"),  # the compiler gave up
        ([("a", 1.0, 3.0, 5), ("b", 1.3, 2.0, 5)], "a", "a"),  # by arithmetic not worth a compilation
        ([("a", 1.0, 3.0, 5), ("b", 1.0, 3.0, 5), ("c", 1.0, 3.0, 5), ("d", 1.0, 1.0, 5)], "abc", "abc"),
        ([("a", 1.0, 3.0, 11), ("b", 1.3, 3.0, 11), ("c", 1.4, 3.0, 11), ("d", 1.5, 1.0, 5)], "d", "abcd"),
        ([(name, 1.0, 1.0, 11) for name in "abcdefg"], "", "abcdef"),
        ([], "", ""),
    ],
)
def test_the_fastest_that_fits_is_taken(rows: list[Any], taken: str, compiled: str) -> None:
    ranked, measure, asked = table(*rows)
    choice = tuning.pick(ranked, 10, measure)
    assert "".join(str(variant.remat) for variant in choice.variants) == taken
    assert "".join(asked) == compiled
    for name, *_ in rows:
        assert f"remat={name}" in choice.why  # taken or left, and why
    assert ("does not fit" in choice.why) == any(size in (0, 11) for *_, size in rows)


def test_a_program_that_does_not_compile_is_left_out() -> None:
    ranked, measure, asked = table(("a", 1.0, 1.0, 5), ("b", 1.1, 3.0, 5), ("c", 1.2, 2.0, 5))

    def failing(variant: Variant) -> Ranked | None:
        found = measure(variant)
        if variant.remat == "a":
            raise jax.errors.JaxRuntimeError("INTERNAL: flattened\na page more")
        return found

    choice = tuning.pick(ranked, 10, failing)
    assert "".join(str(variant.remat) for variant in choice.variants) == "cb"
    assert "(does not compile: INTERNAL: flattened)" in choice.why
    assert asked == ["a", "b", "c"]
    with pytest.raises(jax.errors.JaxRuntimeError):
        tuning.pick(ranked[:1], 10, failing)


# ---- By arithmetic


def test_on_a_tpu_products_are_kept_and_layers_scanned() -> None:
    config = cli.load(str(ROOT / "configs/1b.py"), ())
    target = make_target(config)
    ranked = variants.rank(target, config.plan().stages[0])
    assert ranked[0].variant == Variant(micro_batches=16, remat="dots", scan_layers=True, chunk_tokens=1024)
    assert {one.variant.remat for one in ranked} == {"none", "dots", "full"}
    assert all(one.bytes <= (target.limit or 0) for one in ranked)
    assert [one.seconds for one in ranked] == sorted(one.seconds for one in ranked)
    # The head's gradient is read and written with each chunk, which takes longer than a v6e's products.
    v6e = make_target(config, clusters.parse("v6e:2x4", "topology"))
    assert variants.rank(v6e, config.plan().stages[0])[0].variant.chunk_tokens == 4096
    assert choose(target).later is None


def test_the_compiler_judges_what_arithmetic_finds_a_little_too_large() -> None:
    config = cli.load(str(ROOT / "configs/1b.py"), ())
    (stage,) = config.plan().stages
    exact = variants.rank(make_target(config), stage)[0]
    target = make_target(config, limit=int(exact.bytes / 1.05))
    assert exact not in variants.rank(target, stage)
    found = choose(target, lambda stage, variant: Ranked(variant=variant, seconds=1.0, bytes=target.limit or 0))
    assert found.variants[0] == exact.variant
    assert choose(target).variants[0] != exact.variant  # nobody else judges


def test_what_a_config_says_wins() -> None:
    model = dataclasses.replace(MODEL, remat="full", scan_layers=True)
    pinned = make_config(model=model, loss=CrossEntropy(chunk_tokens=2048), micro_batch_tokens=4096)
    for cluster in (V5E, H200, None):
        # The config itself sets what a variant leaves out.
        assert choose(make_target(pinned, cluster)).variants == (Variant(micro_batches=32 if cluster is V5E else 256),)
    some = make_config(model=dataclasses.replace(MODEL, remat="full"))
    assert {one.variant.remat for one in variants.rank(make_target(some), some.plan().stages[0])} == {None}
    assert choose(make_target(some, H200)).variants[0].chunk_tokens is not None


def test_gpus_go_over_to_unrolled_layers_at_a_fixed_step() -> None:
    target = make_target(make_config(), H200)
    choice = choose(target)
    assert choice.variants[0].scan_layers is True
    assert choice.later is not None
    assert (choice.later.scan_layers, choice.later.remat) == (False, "none")
    assert choice.from_step is not None
    assert choice.from_step > 10
    assert f"From step {choice.from_step}" in choice.why
    assert choose(target, start_step=500).from_step == 500 + choice.from_step
    assert choose(make_target(make_config(steps=10), H200)).later is None  # it would be compiled in vain
    scanned = make_config(model=dataclasses.replace(MODEL, scan_layers=True))
    assert choose(make_target(scanned, H200)).later is None
    assert choose(make_target(make_config(), clusters.parse("h200:1x8", "topology"))).later is not None
    assert choose(make_target(make_config(), V5E)).later is None


def test_only_the_shape_with_the_most_work_is_compiled() -> None:
    short = Stage(name="short", seq_len=1024, batch_size=1024, tokens=2**24)
    long = Stage(name="long", seq_len=2048, batch_size=512, tokens=2**26)
    target = make_target(make_config(stages=(short, long), steps=None))
    asked: list[int] = []

    def measure(stage: Any, variant: Variant) -> Ranked:
        asked.append(stage.seq_len)
        return Ranked(variant=variant, seconds=1.0, bytes=1)

    found = tuning.choose(target, target.config.plan(), measure)
    assert set(asked) == {2048}
    assert "by arithmetic" in found[1024, 1024].why
    assert "by estimate" in found[512, 2048].why


def test_cpus_have_no_search(monkeypatch: pytest.MonkeyPatch) -> None:
    def measure(*_: Any) -> Ranked:
        raise AssertionError("compiled")

    small = dataclasses.replace(MODEL, hidden_size=64, intermediate_size=128)
    config = make_config(model=small, stages=(Stage(name="only", seq_len=256, batch_size=32),))
    target = make_target(config, None)
    assert choose(target, measure).variants == (Variant(micro_batches=1, remat="none"),)
    of_memory = {"SC_PAGE_SIZE": 1 << 20, "SC_PHYS_PAGES": 100}
    monkeypatch.setattr(os, "sysconf", of_memory.__getitem__)
    assert choose(target, measure).variants[0].micro_batches > 1
    of_memory["SC_PHYS_PAGES"] = 10  # too little for anything: as little as possible
    assert choose(target, measure).variants == (Variant(micro_batches=32, remat="full"),)
    # With a limit the compiler decides, from today's first attempt on.
    assert choose(make_target(config, None, limit=1), measure).variants == (Variant(micro_batches=1, remat="none"),)
    pinned = dataclasses.replace(config, model=dataclasses.replace(small, remat="none"))
    assert choose(make_target(pinned, None, limit=1), measure).variants == ()


@pytest.mark.slow
def test_meshes(caplog: pytest.LogCaptureFixture) -> None:
    """Enough rows: all `fsdp`. Fewer rows than chips: something else has to split the work."""
    limit = memory.limit_of_chip(V5E.chip, None)
    config = make_config(mesh=AutoMesh())
    mesh, why = meshes.choose(config, config.plan(), V5E, limit)
    assert (mesh.data, mesh.fsdp, mesh.tensor, mesh.context) == (1, 8, 1, 1)
    assert why.startswith("fsdp=8, the fastest of ")
    few = make_config(stages=(Stage(name="only", seq_len=2048, batch_size=8),))
    large = clusters.parse("v5e:8x8", "topology")
    mesh, _ = meshes.choose(few, few.plan(), large, limit)
    assert mesh.data * mesh.fsdp <= 8
    assert mesh.tensor * mesh.context >= 8
    assert meshes.choose(config, config.plan(), V5E, 10**6) == (MeshConfig(), "no mesh fits by arithmetic")
    with caplog.at_level(logging.INFO, "jaxtrain"):
        assert session.with_mesh(config, config.plan(), V5E, limit).mesh == MeshConfig(fsdp=8)
        assert session.with_mesh(config, config.plan(), None, None).mesh == MeshConfig()
    assert "mesh=auto: fsdp=8, the fastest of" in caplog.text
    assert cli.override(make_config(), ("--config.mesh=auto",)).mesh == AutoMesh()
    # On a whole slice a scatter of gradients would be a sum of twice the bytes. By arithmetic this needs 16.2 GB of
    # 15.8, by the compiler 12.8 (docs/benchmarks.md).
    pod = cli.load(str(ROOT / "configs/4b.py"), ())
    assert session.with_mesh(pod, pod.plan(), large, limit).mesh == MeshConfig(data=2, fsdp=32)


# ---- Kept choices


def resolve(target: Target, path: epath.Path, saved: Any = (), start: int = 0, measure: Any = None) -> Any:
    choices, kept = tuning.resolve(target, target.config.plan(), path, saved, start, measure)
    (choice,) = choices.values()
    return choice, kept


def test_a_choice_is_kept(tmp_path: pathlib.Path) -> None:
    path, target = epath.Path(tmp_path / "programs.json"), make_target(make_config(), H200)
    first, kept = resolve(target, path)
    assert json.loads(path.read_text()) == kept
    # Later, also from a checkpoint whose work directory has lost the file: the same, with the same step of the change.
    assert resolve(target, path, start=300)[0] == first
    path.unlink()
    assert resolve(target, path, saved=json.loads(json.dumps(kept)), start=300) == (first, kept)
    # Other hardware, another setting: a new choice beside it; back again: the first.
    other = dataclasses.replace(target, mesh={**target.mesh, "fsdp": 4, "data": 2})
    assert resolve(other, path, saved=kept, start=300)[0].from_step > 300
    pinned = make_target(make_config(memory_gb=20.0), H200, limit=20 * 10**9)
    assert resolve(pinned, path, saved=kept, start=300)[0].from_step > 300
    again, everything = resolve(target, path, saved=kept, start=400)
    assert again == first
    assert len(everything) == 3


def test_a_compiler_that_fails_does_not_end_the_run(tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture) -> None:
    def measure(*_: Any) -> Ranked:
        raise jax.errors.JaxRuntimeError("INTERNAL: no such topology")

    target = make_target(make_config())
    choice, _ = resolve(target, epath.Path(tmp_path / "programs.json"), measure=measure)
    assert choice.variants == choose(target).variants
    assert "no such topology" in caplog.text


@pytest.mark.parametrize("damaged", ["", "[", "null", '{"a": 1}', "[1]", "[{}]", '[{"key": {}}]', "3"])
def test_a_damaged_file_of_choices(damaged: str, tmp_path: pathlib.Path) -> None:
    path = epath.Path(tmp_path / "programs.json")
    path.write_text(damaged)
    with pytest.raises(UserError, match=r"is damaged .*: remove it"):
        resolve(make_target(make_config()), path)


def test_processes_take_the_choice_of_process_0(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target, path = make_target(make_config()), epath.Path(tmp_path / "programs.json")
    kept = [{**resolve(target, path)[1][0], "variants": [dataclasses.asdict(Variant(micro_batches=64, remat="full"))]}]
    sent = iter([kept, tuning.key_of(target)])
    monkeypatch.setattr(tuning.consensus, "on_process_0", lambda function, failed: None)
    monkeypatch.setattr(tuning.consensus, "broadcast_json", lambda value: next(sent))
    assert resolve(target, path)[0].variants == (Variant(micro_batches=64, remat="full"),)


def test_a_run_of_an_earlier_version_goes_on_as_it_was() -> None:
    old = cli.to_json(make_config(micro_batch_tokens=4096))
    del old["model"]["remat"], old["model"]["scan_layers"], old["loss"]["chunk_tokens"]
    saved = {"config": old}
    then = compatibility.settled(make_config(), saved)
    assert (then.model.remat, then.model.scan_layers, then.loss.chunk_tokens) == ("full", True, 1024)  # type: ignore
    assert then.micro_batch_tokens == 4096
    pinned = make_config(model=dataclasses.replace(MODEL, remat="dots"), micro_batch_tokens=2048)
    assert compatibility.settled(pinned, saved).model.remat == "dots"  # type: ignore
    assert compatibility.settled(pinned, saved).micro_batch_tokens == 2048
    # One that has chosen keeps its choices in the checkpoint, and its config open.
    assert compatibility.settled(make_config(), {**saved, "programs": []}) == make_config()
