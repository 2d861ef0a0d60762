"""Reads checkpoints directly onto the mesh. Each process reads only its own devices' shards, tensor by tensor."""

import contextlib
import functools
import json
import logging
import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes  # noqa: F401  (registers bfloat16 with NumPy, for safetensors)
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

from jaxtrain.data.io.retry import classified
from jaxtrain.errors import UserError
from jaxtrain.hf import families
from jaxtrain.interfaces import Json, Model, Params
from jaxtrain.model.llama import Llama, LlamaConfig

logger = logging.getLogger("jaxtrain")

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
# Old checkpoints contain the rotary frequencies and Pythia's the causal mask, which the config determines.
IGNORED = re.compile(r".*\.rotary_emb\.inv_freq|.*\.attention\.(masked_)?bias")
_DTYPES = ("F64", "F32", "F16", "BF16")

Shape = tuple[int, ...]


def config(folder_or_id: str, revision: str | None = None) -> tuple[LlamaConfig, int]:
    """Reads the config of a checkpoint.

    If config.json ties the output head to the embedding but the checkpoint contains a different head, the head is used,
    as in transformers.

    Args:
        folder_or_id: a local folder or a Hub repository.
        revision: a branch, tag or commit on the Hub.

    Returns:
        The model's config and its vocabulary size.

    Raises:
        UserError: the checkpoint does not exist or is not supported.
        TransientError: the network fails.
    """
    folder = _folder(folder_or_id, revision, [CONFIG, INDEX])
    found, vocab_size = families.from_json(_json(folder / CONFIG), folder_or_id)
    names = families.frame(_json(folder / CONFIG)["model_type"])
    head, embedding = names[("head",)], names[("embedding",)]
    if found.tie_embeddings and head in _names(folder_or_id, folder):
        found.tie_embeddings = _Files(folder_or_id, revision).are_equal(head, embedding)
    return found, vocab_size


def commit(folder_or_id: str, revision: str | None = None) -> str | None:
    """Returns the commit of a Hub repository's revision; None for a local folder. Raises as `config`."""
    folder = _folder(folder_or_id, revision, [CONFIG])
    return None if os.path.isdir(folder_or_id) else folder.name


def dtype(folder_or_id: str, revision: str | None = None) -> str:
    """Returns the type in which transformers computes by default: "float32" or "bfloat16". Raises as `config`."""
    content = _json(_folder(folder_or_id, revision, [CONFIG]) / CONFIG)
    return "float32" if content.get("dtype", content.get("torch_dtype")) == "float32" else "bfloat16"


def load(
    folder_or_id: str,
    model: Model,
    shardings: Any,
    *,
    revision: str | None = None,
    dtype: str = "float32",
    progress: bool = False,
) -> Params:
    """Reads the checkpoint's parameters directly into shards. Host memory holds about one tensor of a layer at a time.

    Args:
        folder_or_id: a local folder or a Hub repository.
        model: the model to read for. If its vocabulary is smaller than the checkpoint's, extra rows are dropped.
        shardings: a tree of shardings like `model.axes`, or one sharding for all parameters.
        revision: a branch, tag or commit on the Hub.
        dtype: type of the parameters ("bfloat16" suits a teacher).
        progress: whether to show a progress bar.

    Raises:
        UserError: the checkpoint does not exist, is damaged, or does not match the model (named in the message).
        TransientError: the network fails.
    """
    model = families.llama(model)
    if model.config.width_transfer != "none":
        raise UserError(
            f"{folder_or_id} was trained without width transfer, and with width_transfer='mup' its weights would be "
            "another function: set model.width_transfer, base_width and base_head_dim to none."
        )
    files = _Files(folder_or_id, revision)
    paths = [tuple(key.key for key in path) for path, _ in jax.tree_util.tree_flatten_with_path(model.shapes)[0]]
    files.check(model, {tensor.name for path in paths for tensor in families.tensors(path, files.kind, model)})
    if isinstance(shardings, Sharding):
        shardings = jax.tree.map(lambda _: shardings, model.shapes)
    shapes, tree = jax.tree.flatten(model.shapes)
    todo = tqdm(
        zip(paths, shapes, tree.flatten_up_to(shardings), strict=True),
        total=len(paths),
        desc="Reading parameters",
        disable=not progress,
    )
    return tree.unflatten([_leaf(files, path, s.shape, place, model, jnp.dtype(dtype)) for path, s, place in todo])


def _folder(folder_or_id: str, revision: str | None, patterns: list[str]) -> Path:
    if os.path.isdir(folder_or_id):
        return Path(folder_or_id)
    if folder_or_id.startswith((".", "/", "~")):
        raise UserError(f"{folder_or_id} is not a folder. Give one with config.json and *.safetensors, or a Hub id.")
    # Imported here: it takes 0.3 s, and local checkpoints do not need it.
    from huggingface_hub import snapshot_download

    with classified(f"the model {folder_or_id}"):
        return Path(snapshot_download(folder_or_id, revision=revision, allow_patterns=patterns))


def _json(path: Path) -> Json:
    if not path.exists():
        raise UserError(f"{path.parent} has no {path.name}: it is not a checkpoint in Hugging Face's format.")
    try:
        value = json.loads(path.read_bytes())
    except ValueError as error:
        raise UserError(f"{path} is truncated or not JSON ({error}): download or export it again.") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} is not a JSON object: download or export it again.")
    return value


def _weight_map(folder: Path) -> dict[str, str]:
    """The index of a checkpoint split into several files: tensor name to file."""
    found = _json(folder / INDEX).get("weight_map")
    if not isinstance(found, dict) or not found or not all(isinstance(file, str) for file in found.values()):
        raise UserError(f"{folder / INDEX} lists no tensors: download or export it again.")
    return found


def _names(folder_or_id: str, folder: Path) -> Iterable[str]:
    """The names of the checkpoint's tensors, without downloading the tensors."""
    if (folder / SINGLE).exists():
        return _open(folder / SINGLE).keys()
    if (folder / INDEX).exists():
        return _weight_map(folder)
    if folder == Path(folder_or_id):
        return ()
    from huggingface_hub import errors, parse_safetensors_file_metadata

    with classified(f"the model {folder_or_id}"), contextlib.suppress(errors.EntryNotFoundError):
        return parse_safetensors_file_metadata(folder_or_id, SINGLE, revision=folder.name).tensors
    return ()


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="numpy")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} cannot be read ({error}): download or export it again.") from error


class _Files:
    """The safetensors files of a checkpoint, as one mapping from name to tensor."""

    def __init__(self, folder_or_id: str, revision: str | None):
        self._folder_or_id = folder_or_id
        folder = self._folder = _folder(folder_or_id, revision, [CONFIG, "model*.safetensors", INDEX])
        # transformers also prefers the single file.
        if (folder / SINGLE).exists() or not (folder / INDEX).exists():
            names = [SINGLE]
        else:
            names = sorted(set(_weight_map(folder).values()))
        if not all((folder / name).exists() for name in names):
            folder = _folder(folder_or_id, revision, names)
        self.kind = families.kind_of(_json(self._folder / CONFIG), folder_or_id)
        self._where: dict[str, Any] = {}
        for name in names:
            if not (folder / name).exists():
                raise UserError(
                    f"{folder_or_id} has no {name}. Only safetensors are read: save_pretrained of transformers writes "
                    "them."
                )
            opened = _open(folder / name)
            self._where |= dict.fromkeys(opened.keys(), opened)

    def slices(self, name: str) -> Any:
        """Returns a lazy tensor: it has `get_shape()`, and indexing it reads only the slice."""
        return self._where[name].get_slice(name)

    def are_equal(self, name: str, other: str) -> bool:
        """Whether two tensors have equal values."""
        one, two = self.slices(name), self.slices(other) if other in self._where else None
        if two is None or one.get_shape() != two.get_shape():
            return False
        rows = one.get_shape()[0]
        parts = [slice(start, min(start + 4096, rows)) for start in range(0, rows, 4096)]
        return all(np.array_equal(one[part], two[part]) for part in parts)

    def check(self, model: Llama, wanted: set[str]) -> None:
        """Raises UserError if tensors or shapes do not match the model, and warns if its computation differs."""
        where = self._folder_or_id
        theirs = families.from_json(_json(self._folder / CONFIG), where)[0]
        for name in ("num_heads", "num_kv_heads", "resolved_head_dim"):  # Same shapes, other heads.
            if getattr(model.config, name) != getattr(theirs, name):
                raise UserError(
                    f"model.{name.removeprefix('resolved_')}={getattr(model.config, name)}, but {where} has "
                    f"{getattr(theirs, name)}: its tensors would mean something else."
                )
        for name in families.SAME_TENSORS:
            ours, his = getattr(model.config, name), getattr(theirs, name)
            if ours != his:
                logger.warning("model.%s=%s, but %s was trained with %s.", name, ours, where, his)
        for name in sorted(wanted & self._where.keys()):
            if (dtype := self.slices(name).get_dtype()) not in _DTYPES:
                raise UserError(
                    f"{where}: {name} is {dtype}. Quantized checkpoints are not supported: save it with weights in "
                    "bfloat16, float16 or float32."
                )
        names = families.frame(self.kind)
        head, embedding = names[("head",)], names[("embedding",)]
        unknown = sorted(name for name in self._where.keys() - wanted - {head} if not IGNORED.fullmatch(name))
        for title, names in (
            ("lacks", sorted(wanted - self._where.keys())),
            ("has tensors that this model does not:", unknown),
        ):
            if names:
                more = f" and {len(names) - 5} more" if len(names) > 5 else ""
                raise UserError(
                    f"{where} {title} {', '.join(names[:5])}{more}. Does the model's config match the checkpoint "
                    "(tie_embeddings, biases, qk_norm, num_layers)?"
                )
        if head in self._where and head not in wanted and not self.are_equal(head, embedding):
            raise UserError(f"{where} has an output head separate from its embedding: set model.tie_embeddings=false.")


def _leaf(
    files: _Files, path: tuple[str, ...], shape: Shape, sharding: Sharding, model: Llama, dtype: np.dtype
) -> jax.Array:
    tensors = families.tensors(path, files.kind, model)
    stacked = len(tensors[0].index)
    if not stacked:
        return _tensor(files, tensors[0], shape, sharding, model, dtype)
    of_one = sharding
    if isinstance(sharding, NamedSharding):
        of_one = NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[stacked:]))
    stack = jax.jit(lambda: jnp.zeros(shape, dtype), out_shardings=sharding)()
    for tensor in tensors:
        one = _tensor(files, tensor, shape[stacked:], of_one, model, dtype)
        stack = _put(sharding)(stack, one, tensor.index)
        # Otherwise the host reads ahead of the device and holds every layer at once.
        jax.block_until_ready(stack)
    return stack


@functools.cache
def _put(sharding: Sharding) -> Callable[[jax.Array, jax.Array, tuple[int, ...]], jax.Array]:
    return jax.jit(lambda stack, one, index: stack.at[index].set(one), donate_argnums=0, out_shardings=sharding)


def _tensor(
    files: _Files, tensor: families.Tensor, shape: Shape, sharding: Sharding, model: Llama, dtype: np.dtype
) -> jax.Array:
    """Reads one tensor as an array of `shape`. Vocabulary padding is zero."""
    stored = files.slices(tensor.name)
    size = tuple(stored.get_shape())
    expected = shape[::-1] if tensor.transposed else shape
    if tensor.vocabulary:
        expected = (model.vocab_size, *expected[1:])
    real = expected[::-1] if tensor.transposed else expected
    if tensor.part is not None:
        expected = (tensor.part.rows, *expected[1:])
    rows, ids = size[0], expected[0]
    # Many checkpoints round their vocabulary up. Rows that no id uses are dropped.
    if size[1:] != expected[1:] or (rows < ids if tensor.vocabulary else rows != ids):
        raise UserError(
            f"{tensor.name} has shape {size}, but the model has {expected}: the model's config or vocabulary does "
            "not match the checkpoint."
        )
    if rows > ids:
        logger.info("%s: %d rows beyond the vocabulary of %d are dropped", tensor.name, rows - ids, ids)

    def read(index: Any) -> np.ndarray:
        wanted = [part.indices(n)[:2] for part, n in zip(index, shape, strict=True)]
        if any(start >= n for (start, _), n in zip(wanted, real, strict=True)):
            return np.zeros([stop - start for start, stop in wanted], dtype)  # a shard of only padding
        cut = tuple(slice(start, min(stop, n)) for (start, stop), n in zip(wanted, real, strict=True))
        first, *others = cut[::-1] if tensor.transposed else cut
        if tensor.part is None:
            part = stored[(first, *others)]
        else:
            of_tensor = tensor.part.of(np.arange(first.start, first.stop))
            part = stored[(slice(of_tensor.min(), of_tensor.max() + 1), *others)][of_tensor - of_tensor.min()]
        part = part.T if tensor.transposed else part
        padding = [(0, stop - start - n) for (start, stop), n in zip(wanted, part.shape, strict=True)]
        return np.pad(part.astype(dtype), padding)

    return jax.make_array_from_callback(shape, sharding, read)
