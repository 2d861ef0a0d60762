"""Stable names of config dataclasses, which records store instead of module paths.

A built-in has a short kind ("llama") that survives moving and renaming its class. A component from outside the package
is "package.module:Class". Checkpoints of version 0.1 name classes by module path, which `kind_of_path` reads.
"""

import dataclasses
import importlib
import sys
from collections.abc import Callable, Mapping

from jaxtrain.errors import UserError

# Kind -> module:class. A new built-in gets a line here; a kind, once released, never changes its meaning.
BUILT_IN = {
    "config": "jaxtrain.config:Config",
    "stage": "jaxtrain.plan.stages:Stage",
    "data": "jaxtrain.data.pipeline:DataConfig",
    "mesh": "jaxtrain.distributed.sharding:MeshConfig",
    "auto": "jaxtrain.distributed.sharding:AutoMesh",
    "checkpoint": "jaxtrain.checkpoint.checkpointer:CheckpointConfig",
    "eval": "jaxtrain.config:EvalConfig",
    "monitor": "jaxtrain.metrics.monitor:MonitorConfig",
    "teacher": "jaxtrain.distill.teacher:Teacher",
    "llama": "jaxtrain.model.llama:LlamaConfig",
    "experts": "jaxtrain.model.experts:Experts",
    "linear_rope_scaling": "jaxtrain.model.rope:LinearRopeScaling",
    "llama3_rope_scaling": "jaxtrain.model.rope:Llama3RopeScaling",
    "yarn_rope_scaling": "jaxtrain.model.rope:YarnRopeScaling",
    "cross_entropy": "jaxtrain.losses.cross_entropy:CrossEntropy",
    "distillation": "jaxtrain.losses.distillation:Distillation",
    "forward_kl": "jaxtrain.losses.divergences:ForwardKL",
    "reverse_kl": "jaxtrain.losses.divergences:ReverseKL",
    "jsd": "jaxtrain.losses.divergences:JSD",
    "top_k": "jaxtrain.losses.divergences:TopK",
    "uld": "jaxtrain.losses.divergences:ULD",
    "adamw": "jaxtrain.optim.adamw:AdamW",
    "muon": "jaxtrain.optim.muon:Muon",
    "lion": "jaxtrain.optim.directions:Lion",
    "signum": "jaxtrain.optim.directions:Signum",
    "adan": "jaxtrain.optim.directions:Adan",
    "adafactor": "jaxtrain.optim.directions:Adafactor",
    "schedule_free_adamw": "jaxtrain.optim.schedule_free:ScheduleFreeAdamW",
    "constant": "jaxtrain.plan.schedules:Constant",
    "cosine": "jaxtrain.plan.schedules:Cosine",
    "linear": "jaxtrain.plan.schedules:Linear",
    "wsd": "jaxtrain.plan.schedules:WSD",
    "hugging_face": "jaxtrain.data.sources.huggingface:HuggingFace",
    "webdataset": "jaxtrain.data.sources.webdataset:WebDataset",
    "text_files": "jaxtrain.data.sources.text_files:TextFiles",
    "at_least": "jaxtrain.data.transforms:AtLeast",
    "min_length": "jaxtrain.data.transforms:MinLength",
    "template": "jaxtrain.data.transforms:Template",
    "sentencepiece": "jaxtrain.tokenizers.sentencepiece:SentencePiece",
    "hugging_face_tokenizer": "jaxtrain.tokenizers.hf:HuggingFaceTokenizer",
    "train_tokenizer": "jaxtrain.tokenizers.training:TrainTokenizer",
}
_KIND_BY_PLACE = {place: kind for kind, place in BUILT_IN.items()}

# Where version 0.1 had the built-ins that have moved since. A built-in that moves leaves its former path here.
_FORMER = {
    "jaxtrain.sharding.MeshConfig": "mesh",
    "jaxtrain.checkpoint.CheckpointConfig": "checkpoint",
    "jaxtrain.evaluate.EvalConfig": "eval",
    "jaxtrain.monitor.MonitorConfig": "monitor",
    "jaxtrain.teacher.Teacher": "teacher",
    "jaxtrain.optim.schedules.Constant": "constant",
    "jaxtrain.optim.schedules.Cosine": "cosine",
    "jaxtrain.optim.schedules.Linear": "linear",
    "jaxtrain.optim.schedules.WSD": "wsd",
}


def kind_of(cls: type) -> str:
    """The stable name of a config dataclass."""
    place = f"{cls.__module__}:{cls.__qualname__}"
    return _KIND_BY_PLACE.get(place, place)


def kind_of_path(path: str) -> str:
    """The kind of a class that a record of version 0.1 names "package.module.Class"."""
    place = ":".join(path.rsplit(".", 1))
    return _FORMER.get(path) or _KIND_BY_PLACE.get(place, place)


def class_of(kind: str) -> type:
    """The dataclass that a record names.

    A record may come from anywhere and must not choose what is imported: a component from outside the package is found
    only if the user's config or `--import` has imported its module.

    Raises:
        UserError: The class does not exist, or its module is not imported.
    """
    module, _, name = BUILT_IN.get(kind, kind).partition(":")
    found = importlib.import_module(module) if kind in BUILT_IN else sys.modules.get(module)
    if found is None and name and not module.startswith("jaxtrain."):
        raise UserError(
            f"the checkpoint names {kind}, which is not part of jaxtrain, and nothing has imported {module}: give the "
            f"config that defines it, or --import={module}"
        )
    for part in name.split("."):
        found = getattr(found, part, None)
    is_foreign = module.split(".")[0] not in sys.stdlib_module_names
    if not (is_foreign and isinstance(found, type) and dataclasses.is_dataclass(found)):
        raise UserError(f"the checkpoint names {kind}, which this version of jaxtrain does not know")
    return found


def choices(current: object, accepts: Callable[[type], bool]) -> dict[str, type]:
    """The built-ins that can stand in a field, by class name.

    Args:
        current: The field's value. Protocols of a single method fit too many classes, so a built-in is replaced by one
            of its own package only.
        accepts: Whether the field takes instances of a class.
    """
    package = type(current).__module__.rpartition(".")[0] if kind_of(type(current)) in BUILT_IN else ""
    classes = [class_of(kind) for kind, place in BUILT_IN.items() if place.startswith(package)]
    return {cls.__name__: cls for cls in classes if accepts(cls)}


def chosen(text: str, known: Mapping[str, type]) -> type | None:
    """The class that a command line names: "Muon", "muon", or one from outside the package, "package.module:Class".

    Args:
        text: The name.
        known: The built-ins to choose from, by class name.

    Returns:
        The class, or None if the text names none.
    """
    wanted = text.lower()
    found = [cls for name, cls in known.items() if wanted in (name.lower(), kind_of(cls))]
    module, colon, _ = text.partition(":")
    if found or not colon or "/" in text:
        return found[0] if found else None
    try:
        importlib.import_module(module)
    except ImportError:
        return None
    return class_of(text)
