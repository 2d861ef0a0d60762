"""Lasting names of config dataclasses, and records of version 0.1."""

import dataclasses
import importlib
import pkgutil
import sys
import types

import pytest

import jaxtrain
from jaxtrain import cli
from jaxtrain.cli import kinds, record, typed
from jaxtrain.config import Config
from jaxtrain.errors import UserError
from tests.cli.example import MinScore, Muon


def test_every_built_in_kind_is_a_config():
    for kind in kinds.BUILT_IN:
        cls = kinds.class_of(kind)
        assert dataclasses.is_dataclass(cls)
        assert kinds.kind_of(cls) == kind


# Frozen: records of version 0.1 hold these paths.
_VERSION_0_1 = {
    "jaxtrain.config.Config": "config",
    "jaxtrain.plan.stages.Stage": "stage",
    "jaxtrain.data.pipeline.DataConfig": "data",
    "jaxtrain.sharding.MeshConfig": "mesh",
    "jaxtrain.checkpoint.CheckpointConfig": "checkpoint",
    "jaxtrain.evaluate.EvalConfig": "eval",
    "jaxtrain.monitor.MonitorConfig": "monitor",
    "jaxtrain.teacher.Teacher": "teacher",
    "jaxtrain.model.llama.LlamaConfig": "llama",
    "jaxtrain.model.rope.LinearRopeScaling": "linear_rope_scaling",
    "jaxtrain.model.rope.Llama3RopeScaling": "llama3_rope_scaling",
    "jaxtrain.losses.cross_entropy.CrossEntropy": "cross_entropy",
    "jaxtrain.losses.distillation.Distillation": "distillation",
    "jaxtrain.losses.divergences.ForwardKL": "forward_kl",
    "jaxtrain.losses.divergences.ReverseKL": "reverse_kl",
    "jaxtrain.losses.divergences.JSD": "jsd",
    "jaxtrain.losses.divergences.TopK": "top_k",
    "jaxtrain.optim.adamw.AdamW": "adamw",
    "jaxtrain.optim.muon.Muon": "muon",
    "jaxtrain.optim.schedules.Constant": "constant",
    "jaxtrain.optim.schedules.Cosine": "cosine",
    "jaxtrain.optim.schedules.Linear": "linear",
    "jaxtrain.optim.schedules.WSD": "wsd",
    "jaxtrain.data.sources.huggingface.HuggingFace": "hugging_face",
    "jaxtrain.data.sources.webdataset.WebDataset": "webdataset",
    "jaxtrain.data.sources.text_files.TextFiles": "text_files",
    "jaxtrain.data.transforms.AtLeast": "at_least",
    "jaxtrain.data.transforms.MinLength": "min_length",
    "jaxtrain.data.transforms.Template": "template",
    "jaxtrain.tokenizers.sentencepiece.SentencePiece": "sentencepiece",
    "jaxtrain.tokenizers.hf.HuggingFaceTokenizer": "hugging_face_tokenizer",
    "jaxtrain.tokenizers.training.TrainTokenizer": "train_tokenizer",
}


def test_the_classes_of_version_0_1_are_all_built_in():
    assert {path: kinds.kind_of_path(path) for path in _VERSION_0_1} == _VERSION_0_1
    assert set(_VERSION_0_1.values()) <= set(kinds.BUILT_IN)
    assert len(set(_VERSION_0_1.values())) == len(_VERSION_0_1)


def _reachable(hint: object, found: set[type]) -> None:
    for option in typed.options(hint):
        for argument in getattr(option, "__args__", ()):
            _reachable(argument, found)
        if isinstance(option, type) and dataclasses.is_dataclass(option) and option not in found:
            found.add(option)
            for field in dataclasses.fields(option):
                _reachable(field.type, found)


def test_every_config_of_the_package_has_a_kind():
    """A component without a line in the table would record its module path and could never be moved."""
    reachable: set[type] = set()
    _reachable(Config, reachable)
    for found in pkgutil.walk_packages(jaxtrain.__path__, "jaxtrain."):
        if found.name.endswith(".main") or found.name.rpartition(".")[2].startswith("attention_"):
            continue
        module = importlib.import_module(found.name)
        for value in vars(module).values():
            # The dataclasses that are set in config files: keyword-only, with rules.
            is_here = isinstance(value, type) and dataclasses.is_dataclass(value) and value.__module__ == found.name
            if is_here and hasattr(value, "check") and dataclasses.fields(value)[0].kw_only:
                reachable.add(value)
    # The bases of schedules and of optax's optimizers have fields and rules, but build nothing.
    bases = ("WarmUp", "Decay", "OptaxConfig", "DecoupledConfig")
    missing = [cls for cls in reachable if ":" in kinds.kind_of(cls) and cls.__name__ not in bases]
    assert missing == []


def test_a_component_from_outside_is_read_back_if_the_user_has_imported_it():
    stored = cli.to_json(Muon(momentum=0.5))
    assert stored["_kind"] == "tests.cli.example:Muon"
    assert cli.from_json(stored) == Muon(momentum=0.5)


def test_a_record_imports_nothing(tmp_path, monkeypatch):
    (tmp_path / "evil.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match=r"names evil:Config, .* nothing has imported evil: .* --import=evil"):
        cli.from_json({"_kind": "evil:Config"})
    assert "evil" not in sys.modules


@pytest.mark.parametrize("kind", ["os:system", "subprocess:Popen", "unknown", "tests.cli.example:SourceConfig", ""])
def test_a_record_calls_nothing_but_configs(kind):
    with pytest.raises(UserError, match=r"this version of jaxtrain does not know|nothing has imported"):
        cli.from_json({"_kind": kind, "args": "true"})


def test_a_dataclass_of_the_standard_library_is_no_config(monkeypatch):
    module = types.ModuleType("statistics")
    monkeypatch.setitem(sys.modules, "statistics", module)
    module.Loud = dataclasses.make_dataclass("Loud", [], namespace={"__post_init__": lambda self: 1 / 0})  # type: ignore[attr-defined]
    with pytest.raises(UserError, match="this version of jaxtrain does not know"):
        cli.from_json({"_kind": "statistics:Loud"})


def test_a_field_that_this_version_does_not_know_is_named():
    with pytest.raises(UserError, match=r"adamw has beta3, unknown to this version"):
        cli.from_json({"_kind": "adamw", "beta3": 0.9})


def test_records_of_version_0_1_are_read_by_its_module_paths():
    old = {"_class": "tests.cli.example.Muon", "learning_rate": 0.5, "momentum": 0.9, "fallback": {
        "_class": "tests.cli.example.AdamW", "learning_rate": 0.1, "betas": [0.8, 0.9]}}  # fmt: skip
    found = cli.from_json(old)
    assert found.learning_rate == 0.5
    assert found.fallback.betas == (0.8, 0.9)
    assert cli.differences(cli.upgrade(old), cli.to_json(found)) == []
    assert cli.upgrade({"_class": "jaxtrain.model.llama.LlamaConfig"}) == {"_kind": "llama"}


def test_descriptions_of_transforms_are_upgraded_with_their_digest():
    old = {"class": "jaxtrain.data.transforms.MinLength", "characters": "5", "digest": "0123456789abcdef"}
    from jaxtrain.data.source_reader import describe
    from jaxtrain.data.transforms import MinLength

    assert cli.upgrade([old]) == [describe(MinLength(characters=5))]
    settings = {"class": "jaxtrain.data.sources.huggingface.HuggingFace", "name": "'x'"}
    assert cli.upgrade(settings) == {"_kind": "hugging_face", "name": "'x'"}
    # Names given by people: a source, a column, a label.
    assert cli.upgrade({"class": "text", "digest": "5"}) == {"class": "text", "digest": "5"}
    assert cli.upgrade({"class": {"digest": "5"}}) == {"class": {"digest": "5"}}


@dataclasses.dataclass(kw_only=True)
class Grown:
    """As in version 0.1, with only `size`."""

    size: int = 3
    remat: str = dataclasses.field(default="auto", metadata={cli.BEFORE: "full"})
    extra: tuple[MinScore, ...] = (MinScore(),)


def test_a_field_that_a_record_lacks_has_the_value_from_before_it_existed():
    old = {"_kind": cli.kind_of(Grown), "size": 4}
    assert cli.from_json(old) == Grown(size=4, remat="full")
    completed = cli.complete({"inside": [old]})["inside"][0]
    assert completed == cli.to_json(Grown(size=4, remat="full"))
    assert cli.complete({**old, "remat": "dots"})["remat"] == "dots"
    assert record.complete(5) == 5


def test_import_names_modules_before_a_work_directory_is_read(tmp_path, monkeypatch, capsys):
    (tmp_path / "outside_parts.py").write_text("print('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    command = cli.Command(name="x", description="d", examples=("x",), flags=(cli.IMPORT,), config="none")
    cli.parse_flags(command, ["--import=outside_parts"])
    assert capsys.readouterr().out == "imported\n"
    with pytest.raises(UserError, match="--import=not_there: ModuleNotFoundError"):
        cli.parse_flags(command, ["--import=not_there"])
