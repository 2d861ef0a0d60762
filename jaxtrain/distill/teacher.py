"""The teacher of a distillation run: a frozen model on the run's mesh, or a cache of its outputs.

The tokenizer is checked against the run's; only a cache may be of a teacher with another. The parameters are an input
of the train step, not part of the train state, so they are neither trained nor saved. A checkpoint identifies the
teacher by a hash of its parameters as used, independent of the files they came from.
"""

import dataclasses
import functools
import hashlib
import math
import os
from collections.abc import Callable, Mapping
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxtrain import cli, hf
from jaxtrain.checkpoint import restore
from jaxtrain.data import fingerprint
from jaxtrain.data.io import retry
from jaxtrain.data.pipeline import PATIENCE_AT_START, DataConfig
from jaxtrain.data.stores import teacher_store
from jaxtrain.data.stores.teacher_store import TeacherManifest, TeacherStore
from jaxtrain.distributed import sharding
from jaxtrain.errors import UserError
from jaxtrain.interfaces import Json, Model, ModelConfig, Params, Source, Tokenizer
from jaxtrain.losses.cached import Aligned
from jaxtrain.plan import Plan
from jaxtrain.tokenizers import files
from jaxtrain.tokenizers.hf import HuggingFaceTokenizer
from jaxtrain.tokenizers.identity import PROBE
from jaxtrain.tokenizers.spelling import Speller, cells

T = TypeVar("T")

DTYPES = ("bfloat16", "float32")
# Entries of the identity that must match on resume. The others record where the teacher was found.
_ENFORCED = ("parameters", "model", "dtype")
# Fields that affect how a model is computed, not what it computes.
_HOW = ("dtype", "remat", "scan_layers", "attention", "max_seq_len", "initializer_std")


@dataclasses.dataclass(kw_only=True)
class Teacher:
    """The teacher. Its own config determines its shape. Its vocabulary must equal the run's, except for padding, unless
    it is read from a cache.

    Attributes:
        model: A Hugging Face model (a folder or a Hub id), or a jaxtrain work directory or checkpoint.
        revision: A branch, tag or commit on the Hub; None for the newest.
        dtype: Type of its parameters and forward pass, "bfloat16" or "float32".
        tokenizer: Location of its tokenizer's files (a folder, a file or a Hub id), if not the model's.
        cache: A folder written by tools.cache_teacher, to read the teacher's outputs from; the model itself is then
            not needed. None runs the model during training.
    """

    model: str = ""
    revision: str | None = None
    dtype: str = "bfloat16"
    tokenizer: str | None = None
    cache: str | None = None

    def check(self) -> None:
        if self.cache == "" or (self.cache or "").startswith(("s3://", "gs://")):
            raise UserError(f"cache={self.cache!r}: give the local folder of a teacher's cache, or none.")
        if not self.model and self.cache is None:
            raise UserError("model='': give the teacher's folder, its id on the Hub, or a work directory.")
        if self.dtype not in DTYPES:
            raise UserError(f"dtype={self.dtype!r}: give one of {', '.join(DTYPES)}.")

    def build(self, tokenizer: Tokenizer, mesh: Mesh) -> "Frozen":
        """Builds the teacher without reading its parameters.

        Args:
            tokenizer: The run's tokenizer.
            mesh: The run's mesh.

        Raises:
            UserError: The model does not exist, is not supported, has another tokenizer, or does not fit the mesh.
            TransientError: The network is down.
        """
        fixed, where = self, f"teacher.model={self.model}"
        if not self.is_checkpoint:
            # Tokenizer, config and weights come from one commit, which the checkpoint records.
            commit = self._attempt(lambda: hf.commit(self.model, self.revision))
            fixed = dataclasses.replace(self, revision=commit)
        config, vocab_size = self._attempt(fixed._shape)
        remedy = (
            "Set `tokenizer` to the teacher's own (HuggingFaceTokenizer(name=...) for one of the Hub), choose a "
            "teacher with the run's, or write a cache, which serves any tokenizer: python -m tools.cache_teacher with "
            "this config, then teacher.cache."
        )
        if vocab_size < tokenizer.vocab_size:
            raise UserError(
                f"{where} has a vocabulary of {vocab_size:,}, the run's tokenizer has {tokenizer.vocab_size:,} ids: "
                f"during training student and teacher must share a tokenizer. {remedy}"
            )
        problem = fixed.other_tokenizer(tokenizer)
        if problem is not None:
            raise UserError(
                f"{where} has a different tokenizer than the run, so its probabilities refer to other tokens:\n"
                f"{problem}\n{remedy}"
            )
        return Frozen(fixed, config, tokenizer.vocab_size, mesh)

    def outline(self, vocab_size: int, mesh: Mesh) -> "Frozen":
        """Builds the teacher from its config alone, for compiling, without comparing tokenizers. Raises as `build`."""
        return Frozen(self, self._shape()[0], vocab_size, mesh)

    def _attempt(self, function: Callable[[], T]) -> T:
        return retry.attempt(function, what=f"the teacher {self.model}", deadline=PATIENCE_AT_START)

    def open_cache(self, data: DataConfig, resolved: Mapping[str, Source], tokenizer: Tokenizer) -> "Cached":
        """Opens the cache of the run's sources.

        Raises:
            UserError: The cache is incomplete or was written for a different run.
        """
        assert self.cache is not None
        if not data.document_mask:
            raise UserError(
                "teacher.cache needs data.document_mask=true: the teacher has seen each document alone, without the "
                "documents before it in a row."
            )
        manifests: dict[str, TeacherManifest] = {}
        for name, config in data.sources.items():
            folder = os.path.join(self.cache, name)
            manifests[name] = TeacherManifest.load(folder)
            teacher_store.check(manifests[name], folder, config, resolved[name], tokenizer)
            if manifests[name].add_bos != data.add_bos and not manifests[name].by_text:
                raise UserError(
                    f"the teacher's cache {folder} was written with data.add_bos={manifests[name].add_bos}, and the "
                    f"run has {data.add_bos}: set it back, or write another cache with tools.cache_teacher."
                )
        return Cached(self, manifests, tokenizer)

    @property
    def is_checkpoint(self) -> bool:
        """Whether `model` is a jaxtrain work directory or checkpoint rather than a Hugging Face model."""
        return restore.is_checkpoint(self.model)

    def _shape(self) -> tuple[ModelConfig, int]:
        if not self.is_checkpoint:
            return hf.config(self.model, self.revision)
        saved = restore.load_data(self.model)
        return cli.from_json(saved["config"]["model"]), saved["tokenizer"]["vocab_size"]

    def own_tokenizer(self) -> Tokenizer:
        """Loads the teacher's own tokenizer. Raises as `build`."""
        return self._attempt(self._own_tokenizer)

    def other_tokenizer(self, ours: Tokenizer) -> str | None:
        """Returns the differences between the teacher's tokenizer and the run's, one per line; None if ids agree."""
        return self._attempt(lambda: self._other_tokenizer(ours))

    def _own_tokenizer(self) -> Tokenizer:
        if self.is_checkpoint and self.tokenizer is None:
            saved, folder = restore.load_data(self.model), restore.step_folder(self.model)
            built = cli.from_json(saved["config"]["tokenizer"]).build(os.fspath(folder.parent.parent))
            if built.identity["hash"] != saved["tokenizer"]["hash"]:
                raise UserError(f"teacher.model={self.model}: its tokenizer's files have changed since its checkpoint.")
            return built
        name, revision = self._tokenizer_files()
        return HuggingFaceTokenizer(name=name, revision=revision).build("")

    def _tokenizer_files(self) -> tuple[str, str | None]:
        """Name and revision of the tokenizer's files."""
        return (self.model, self.revision) if self.tokenizer is None else (self.tokenizer, None)

    def _other_tokenizer(self, ours: Tokenizer) -> str | None:
        if self.is_checkpoint and self.tokenizer is None:
            theirs = restore.load_data(self.model)["tokenizer"]
            return None if theirs["hash"] == ours.identity["hash"] else _differences(ours.identity, theirs)
        found = files.find(*self._tokenizer_files())
        kinds = [kind for kind in (files.TOKENIZER_JSON, files.SENTENCEPIECE_MODEL) if kind in found.content]
        if not kinds:
            raise UserError(
                f"teacher.model={self.model}: {found.where} has neither {files.TOKENIZER_JSON} nor "
                f"{files.SENTENCEPIECE_MODEL}, so the meaning of its ids is unknown. Put its tokenizer there, or set "
                "teacher.tokenizer to its location."
            )
        if hashlib.sha256(found.content[kinds[0]]).hexdigest() == ours.identity["hash"]:
            return None
        theirs = self._own_tokenizer()
        # The same tokens in a different file, for example in another order or with another chat template.
        if ours.identity["probe"] == theirs.identity["probe"] and _texts(ours) == _texts(theirs):
            return None
        return _differences(ours.identity, theirs.identity)


def _texts(tokenizer: Tokenizer) -> list[str]:
    return [tokenizer.decode([token]) for token in range(tokenizer.vocab_size)]


def _differences(ours: Json, theirs: Json) -> str:
    lines = [
        f"  {name}: the run's {ours[name]}, the teacher's {theirs[name]}"
        for name in ("kind", "hash", "vocab_size")
        if ours[name] != theirs[name]
    ]
    if ours["probe"] != theirs["probe"]:
        lines.append(f"  ids of {PROBE[:24]!r}...: the run's {ours['probe'][:8]}, the teacher's {theirs['probe'][:8]}")
    return "\n".join(lines)


class Frozen:
    """A teacher that fits the run.

    Attributes:
        config: The config it was built from.
        model: The model, built for the run's mesh.
        abstract: Shapes, types and shardings of its parameters.
    """

    def __init__(self, config: Teacher, shape: ModelConfig, vocab_size: int, mesh: Mesh):
        """Builds the model of a config. Raises UserError if it does not fit the mesh."""
        self.config = config
        how = {"dtype": config.dtype, "remat": "none", "scan_layers": True, "attention": "auto"}
        fields = {field.name for field in dataclasses.fields(shape)}
        shape = dataclasses.replace(shape, **{name: value for name, value in how.items() if name in fields})
        try:
            self.model: Model = shape.build(vocab_size, mesh)
        except UserError as error:
            raise UserError(f"teacher.model={config.model}: {error}") from None
        self.abstract = jax.tree.map(
            lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(config.dtype), sharding=place),
            self.model.shapes,
            sharding.tree_shardings(mesh, self.model.axes),
        )

    def check_stages(self, plan: Plan) -> None:
        """Raises UserError if a stage has rows longer than the teacher's context."""
        for stage in plan.stages:
            if stage.seq_len > self.model.config.max_seq_len:
                raise UserError(
                    f"stage {stage.index} ({stage.name}): seq_len={stage.seq_len} is longer than the context of the "
                    f"teacher {self.config.model}, {self.model.config.max_seq_len} tokens; shorten the rows, or choose "
                    "a teacher with a longer context"
                )

    def check_memory(self, state: object, limit: int | None) -> None:
        """Checks that a device can hold the teacher and the train state, before anything is compiled.

        Args:
            state: The train state's abstract arrays. The rest of a step's memory is known once it is compiled.
            limit: Memory of a device in bytes, if known.

        Raises:
            UserError: They do not fit.
        """
        teacher, held = bytes_per_device(self.abstract), bytes_per_device(state)
        if limit is not None and teacher + held > limit:
            raise UserError(
                f"teacher.model={self.config.model} does not fit: {teacher / 1e9:.2f} GB of a device for its "
                f"parameters in {self.config.dtype} and {held / 1e9:.2f} GB for the train state, of {limit / 1e9:.2f} "
                "GB. Use more devices (mesh.fsdp shards both), a smaller teacher, or bfloat16."
            )

    def load(self) -> Params:
        """Reads the parameters directly into shards. All processes must call it. Raises as `build`."""
        config = self.config
        if config.is_checkpoint:
            return restore.restore_params(config.model, self.abstract)
        places = jax.tree.map(lambda leaf: leaf.sharding, self.abstract)
        # Downloads have their own retries and may take longer than PATIENCE_AT_START.
        return hf.load(config.model, self.model, places, revision=config.revision, dtype=config.dtype)

    def identity(self, params: Params) -> Json:
        """What a checkpoint records of the teacher."""
        words = jax.device_get(jax.jit(functools.partial(fingerprint.of_arrays, xp=jnp))(params))
        shape = cli.to_json(self.model.config)
        return {
            "parameters": fingerprint.text(np.asarray(words)),
            "model": _meaning(shape),
            "dtype": self.config.dtype,
            "found": cli.public("found", os.fspath(self.config.model)),
            "revision": self.config.revision,
        }


class Cached:
    """A teacher's cache that fits the run.

    Attributes:
        config: The config it was opened from.
        layout: Layout of its records, the same for all sources.
        aligned: How they are used if the teacher has its own tokenizer; None if it has the run's.
    """

    def __init__(self, config: Teacher, manifests: Mapping[str, TeacherManifest], tokenizer: Tokenizer):
        self.config = config
        self._manifests = manifests
        (first, one), *others = manifests.items()
        for name, manifest in others:
            for field in ("teacher", "layout", "context", "stride", "by_text", "tokenizer"):
                here, there = getattr(one, field), getattr(manifest, field)
                if here != there:
                    raise UserError(
                        f"teacher.cache={config.cache}: the sources were cached with different settings: {field} of "
                        f"{first} is {here}, of {name} {there}. Write all of them with one command."
                    )
        self.layout = one.layout
        self.aligned: Aligned | None = None
        self._speller: Speller | None = None
        if one.vocabulary is not None:
            self._speller = Speller(tokenizer, "the run's")
            theirs, ours = [text.encode("latin-1") for text in one.vocabulary], self._speller.tokenizer.spellings
            tables = cells(theirs, one.tokenizer["eos_id"], ours, tokenizer.eos_id)
            self.aligned = Aligned(tokenizer.vocab_size, tables or ())
        self._teacher = one.teacher
        found, wanted = one.teacher["found"], cli.public("found", os.fspath(config.model))
        if config.model and found != wanted:
            raise UserError(
                f"teacher.model={wanted}, and teacher.cache={config.cache} was written from {found}: set "
                "teacher.model to that, or remove it (a cache does not need it)."
            )

    @property
    def identity(self) -> Json:
        """What a checkpoint records of the teacher."""
        found = {**self._teacher, "cache": {name: manifest.identity for name, manifest in self._manifests.items()}}
        if self.aligned is not None:
            tables = b"".join(table.tobytes() for table in self.aligned.tables)
            found["mapping"] = hashlib.blake2b(tables, digest_size=8).hexdigest()
        return found

    @property
    def summary(self) -> str:
        """One line for the log."""
        some = next(iter(self._manifests.values()))
        tokens = sum(manifest.total("tokens") for manifest in self._manifests.values())
        said = (
            f"the {self.layout.k} most likely tokens by {self._teacher['found']} for each of {tokens:,} tokens, with "
            f"contexts of {some.context:,}, in {self.config.cache}"
        )
        if self.aligned is not None and self.aligned.tables:
            found = self.aligned.tables[0]
            said += (
                f", by its own tokenizer: it tells {len(np.unique(found[found >= 0])):,} of the run's "
                f"{self.aligned.vocab_size:,} tokens (kd_aligned is the share of positions where both end one)"
            )
        return said

    def records(self) -> dict[str, TeacherStore]:
        """The teacher stores by source."""
        assert self.config.cache is not None
        folders = {name: os.path.join(self.config.cache, name) for name in self._manifests}
        return {n: TeacherStore(folders[n], m, self._speller) for n, m in self._manifests.items()}


def bytes_per_device(abstract: object) -> int:
    """Bytes that each device needs for a tree of arrays with shardings."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * np.dtype(leaf.dtype).itemsize
        for leaf in jax.tree.leaves(abstract)
    )


def mismatch(saved: Json | None, now: Json | None) -> str | None:
    """Returns None if both describe the same teacher (or none), else a message that shows both."""
    if saved is None or now is None:
        return None if saved is now else f"the teacher was {_where(saved)}, is {_where(now)}"
    cached, was_cached = now.get("cache"), saved.get("cache")  # absent in older checkpoints
    if (cached is None) != (was_cached is None):
        was, is_now = ("the model itself" if each is None else "a cache" for each in (was_cached, cached))
        return f"the teacher was {was}, is {is_now} ({_where(now)}): they agree except for rounding and context"
    saved, now = ({**each, "model": _meaning(cli.complete(each["model"]))} for each in (saved, now))
    changed = [name for name in _ENFORCED if saved[name] != now[name]]
    if not changed and saved.get("mapping") != now.get("mapping"):
        return f"the mapping of the teacher's tokens to the run's was {saved.get('mapping')}, is {now.get('mapping')}"
    if not changed:
        before, after = was_cached or {}, cached or {}
        others = [name for name in before.keys() & after.keys() if before[name] != after[name]]
        return f"the teacher's cache was written again for {', '.join(sorted(others))}" if others else None
    lines = [f"the teacher has changed; it was {_where(saved)}, is {_where(now)}:"]
    lines += [f"  {name}: was {saved[name]}, is {now[name]}" for name in changed if name != "model"]
    if "model" in changed:
        lines.append(cli.format_differences(cli.differences(saved["model"], now["model"], "model")))
    return "\n".join(lines)


def _meaning(model: Json) -> Json:
    """The fields of a recorded model config that determine what the model computes, not how."""
    return {name: value for name, value in model.items() if name not in _HOW}


def _where(identity: Json | None) -> str:
    if identity is None:
        return "none"
    return identity["found"] + (f" ({identity['revision']})" if identity["revision"] else "")
