"""Checkpoints read straight onto the mesh: each process reads what its own devices hold, tensor by tensor."""

import functools
import json
import logging
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes  # noqa: F401  (teaches NumPy bfloat16, which safetensors then finds)
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

from jaxtrain.data.io.retry import classify
from jaxtrain.errors import UserError
from jaxtrain.hf import families
from jaxtrain.interfaces import Json, Model, Params
from jaxtrain.model.llama import Llama, LlamaConfig

logger = logging.getLogger("jaxtrain")

# Tensors that say nothing: old Llama checkpoints keep the rotary frequencies.
IGNORED = re.compile(r".*\.rotary_emb\.inv_freq")

Shape = tuple[int, ...]

INDEX = "model.safetensors.index.json"


def config(folder_or_id: str, revision: str | None = None) -> tuple[LlamaConfig, int]:
    """(config, vocabulary size) of a checkpoint: a local folder or a repository of the Hub.

    Raises UserError for a checkpoint that is not there or not supported, TransientError where the network fails.
    """
    return families.from_json(_json(_folder(folder_or_id, revision, ["config.json"]) / "config.json"), folder_or_id)


def commit(folder_or_id: str, revision: str | None = None) -> str | None:
    """The commit that a revision of a repository of the Hub is now; None for a local folder. Raises as `config`."""
    folder = _folder(folder_or_id, revision, ["config.json"])
    return None if os.path.isdir(folder_or_id) else folder.name


def load(
    folder_or_id: str,
    model: Model,
    shardings: Any,
    *,
    revision: str | None = None,
    dtype: str = "float32",
    progress: bool = False,
) -> Params:
    """The checkpoint's parameters for `model`, born sharded.

    shardings: tree of shardings like `model.axes`, or one for all. dtype: of the parameters ("bfloat16" suits a
    teacher). progress: shows a bar. A vocabulary may be larger than the model's: what is beyond is left out.

    Host memory stays at about one tensor of one layer. Raises UserError where the checkpoint is not there, not whole,
    or not this model's: the first tensors that do not fit are named.
    """
    model = families.llama(model)
    folder = _folder(folder_or_id, revision, ["config.json", "*.safetensors", INDEX])
    files = _Files(folder, folder_or_id)
    paths = [_names(path) for path, _ in jax.tree_util.tree_flatten_with_path(model.shapes)[0]]
    wanted = {tensor.name for path in paths for tensor in families.tensors(path, model.config.num_layers)}
    _check_names(files, wanted, model, folder_or_id)
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


def _names(path: Any) -> tuple[str, ...]:
    return tuple(key.key for key in path)


def _folder(folder_or_id: str, revision: str | None, patterns: list[str]) -> Path:
    if os.path.isdir(folder_or_id):
        return Path(folder_or_id)
    if folder_or_id.startswith((".", "/", "~")):
        raise UserError(
            f"{folder_or_id} is not a folder. It takes one with config.json and *.safetensors, or a Hub id."
        )
    # Imported here, as it takes 0.3 s and local checkpoints do without.
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(folder_or_id, revision=revision, allow_patterns=patterns))
    except Exception as error:
        raise classify(error, f"the model {folder_or_id}") from error


def _json(path: Path) -> Json:
    if not path.exists():
        raise UserError(f"{path.parent} has no {path.name}: it is not a checkpoint in Hugging Face's format.")
    return json.loads(path.read_text())


class _Files:
    """The safetensors files of a folder, as one mapping from names to tensors."""

    def __init__(self, folder: Path, where: str):
        if (folder / INDEX).exists():
            names = sorted(set(_json(folder / INDEX)["weight_map"].values()))
        else:
            names = ["model.safetensors"]
        self._where: dict[str, Any] = {}
        for name in names:
            if not (folder / name).exists():
                raise UserError(
                    f"{where} has no {name}. Only safetensors are read: save_pretrained of transformers writes them."
                )
            try:
                opened = safe_open(folder / name, framework="numpy")
            except SafetensorError as error:
                raise UserError(f"{folder / name} cannot be read ({error}): download or export it again.") from error
            self._where |= dict.fromkeys(opened.keys(), opened)
        self.names = set(self._where)

    def slices(self, name: str) -> Any:
        """Something with `get_shape()` whose indexing reads only what it gives."""
        return self._where[name].get_slice(name)


def _check_names(files: _Files, wanted: set[str], model: Llama, where: str) -> None:
    spare = {"lm_head.weight"} if model.config.tie_embeddings else set()
    unknown = sorted(name for name in files.names - wanted - spare if not IGNORED.fullmatch(name))
    missing = sorted(wanted - files.names)
    for title, names in (("lacks", missing), ("has tensors that this model does not:", unknown)):
        if names:
            more = f" and {len(names) - 5} more" if len(names) > 5 else ""
            raise UserError(
                f"{where} {title} {', '.join(names[:5])}{more}. Is the model's config that of the checkpoint "
                "(tie_embeddings, biases, qk_norm, num_layers)?"
            )


def _leaf(
    files: _Files, path: tuple[str, ...], shape: Shape, sharding: Sharding, model: Llama, dtype: np.dtype
) -> jax.Array:
    tensors = families.tensors(path, model.config.num_layers)
    if path[0] != "layers":
        return _tensor(files, tensors[0], shape, sharding, model, dtype)
    stack = jax.jit(lambda: jnp.zeros(shape, dtype), out_shardings=sharding)()
    for layer, tensor in enumerate(tensors):
        one = _tensor(files, tensor, shape[1:], _of_one_layer(sharding), model, dtype)
        stack = _put(sharding)(stack, one, layer)
        # Or the host would read ahead of the device, and hold every layer at once.
        jax.block_until_ready(stack)
    return stack


@functools.cache
def _put(sharding: Sharding) -> Callable[[jax.Array, jax.Array, int], jax.Array]:
    return jax.jit(lambda stack, one, layer: stack.at[layer].set(one), donate_argnums=0, out_shardings=sharding)


def _of_one_layer(sharding: Sharding) -> Sharding:
    if not isinstance(sharding, NamedSharding):
        return sharding
    assert not sharding.spec or sharding.spec[0] is None, sharding
    return NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:]))


def _tensor(
    files: _Files, tensor: families.Tensor, shape: Shape, sharding: Sharding, model: Llama, dtype: np.dtype
) -> jax.Array:
    """One tensor as an array of `shape`, where the vocabulary's padding is zero."""
    stored = files.slices(tensor.name)
    size = tuple(stored.get_shape())
    expected = shape[::-1] if tensor.transposed else shape
    if tensor.vocabulary:
        expected = (model.vocab_size, *expected[1:])
    real = expected[::-1] if tensor.transposed else expected
    rows, ids = size[0], expected[0]
    # Many vocabularies are rounded up: rows that no id uses are left out.
    if size[1:] != expected[1:] or (rows < ids if tensor.vocabulary else rows != ids):
        raise UserError(
            f"{tensor.name} has shape {size}, where the model has {expected}: the model's config or vocabulary is not "
            "the checkpoint's."
        )
    if rows > ids:
        logger.info("%s: %d rows beyond the vocabulary of %d are left out", tensor.name, rows - ids, ids)

    def read(index: Any) -> np.ndarray:
        wanted = [part.indices(n)[:2] for part, n in zip(index, shape, strict=True)]
        if any(start >= n for (start, _), n in zip(wanted, real, strict=True)):
            return np.zeros([stop - start for start, stop in wanted], dtype)  # a shard of padding alone
        cut = tuple(slice(start, min(stop, n)) for (start, stop), n in zip(wanted, real, strict=True))
        part = stored[cut[::-1]].T if tensor.transposed else stored[cut]
        padding = [(0, stop - start - n) for (start, stop), n in zip(wanted, part.shape, strict=True)]
        return np.pad(part.astype(dtype), padding)

    return jax.make_array_from_callback(shape, sharding, read)
