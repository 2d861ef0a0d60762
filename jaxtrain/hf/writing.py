"""Parameters written as a checkpoint that transformers' AutoModelForCausalLM loads."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import jax
import ml_dtypes
import numpy as np
from safetensors.numpy import save_file
from tqdm import tqdm

from jaxtrain.errors import UserError
from jaxtrain.hf import families
from jaxtrain.hf.reading import INDEX
from jaxtrain.interfaces import Json, Model, Params
from jaxtrain.model.llama import Llama

DTYPES = {"bfloat16": ml_dtypes.bfloat16, "float32": np.float32}
SHARD_BYTES = 2_000_000_000  # a file's tensors are in host memory at once


class SavedTokenizer(Protocol):
    """A tokenizer that can write its files for transformers."""

    eos_id: int
    bos_id: int | None

    def save(self, folder: Any) -> None: ...


def export(
    params: Params,
    model: Model,
    folder: str,
    dtype: str = "bfloat16",
    tokenizer: SavedTokenizer | None = None,
    *,
    progress: bool = False,
) -> None:
    """Writes safetensors (files of at most 2 GB), config.json, generation_config.json, and the tokenizer's files.

    params: whole on this process's devices. progress: shows a bar.

    config.json comes last: a folder with it is complete, and a second call after an interruption starts over. Raises
    UserError for a model that no architecture of transformers expresses.
    """
    if dtype not in DTYPES:
        raise UserError(f"dtype={dtype!r}: a checkpoint is written in one of {', '.join(DTYPES)}.")
    model = families.llama(model)
    eos_id, bos_id = (None, None) if tokenizer is None else (tokenizer.eos_id, tokenizer.bos_id)
    config = families.to_json(model.config, model.vocab_size, dtype, bos_id, eos_id)
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    for old in (path / "config.json", path / INDEX, *path.glob("model*.safetensors")):
        old.unlink(missing_ok=True)
    _write_tensors(params, model, path, np.dtype(DTYPES[dtype]), progress)
    if tokenizer is not None:
        tokenizer.save(path)
    _write_json(path / "generation_config.json", {"bos_token_id": bos_id, "eos_token_id": eos_id})
    _write_json(path / "config.json", config)


def _write_tensors(params: Params, model: Llama, folder: Path, dtype: np.dtype, progress: bool) -> None:
    leaves = jax.tree_util.tree_flatten_with_path(params)[0]
    itemsize = dtype.itemsize
    files: list[list[tuple[families.Tensor, Any, int | None]]] = [[]]
    room = SHARD_BYTES
    for tensor, leaf, layer in _tensors(leaves, model):
        size = itemsize * (leaf.size if layer is None else leaf.size // leaf.shape[0])
        if size > room and files[-1]:
            files.append([])
            room = SHARD_BYTES
        files[-1].append((tensor, leaf, layer))
        room -= size
    weight_map: dict[str, str] = {}
    total = 0
    for number, tensors in enumerate(tqdm(files, desc="Writing files", disable=not progress), 1):
        one = len(files) == 1
        name = "model.safetensors" if one else f"model-{number:05d}-of-{len(files):05d}.safetensors"
        arrays = {tensor.name: _array(tensor, leaf, layer, model, dtype) for tensor, leaf, layer in tensors}
        # transformers asks for the metadata.
        save_file(arrays, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(arrays, name)
        total += sum(array.nbytes for array in arrays.values())
    if len(files) > 1:
        _write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _tensors(leaves: list[tuple[Any, Any]], model: Llama) -> Iterator[tuple[families.Tensor, Any, int | None]]:
    """Each tensor of the checkpoint with its parameter, and its layer in it."""
    for path, leaf in leaves:
        names = tuple(key.key for key in path)
        for layer, tensor in enumerate(families.tensors(names, model.config.num_layers)):
            yield tensor, leaf, layer if names[0] == "layers" else None


def _array(tensor: families.Tensor, leaf: Any, layer: int | None, model: Llama, dtype: np.dtype) -> np.ndarray:
    array = np.asarray(leaf if layer is None else leaf[layer])
    if tensor.vocabulary:
        array = array[:, : model.vocab_size] if tensor.transposed else array[: model.vocab_size]
    return np.ascontiguousarray(array.T if tensor.transposed else array).astype(dtype)


def _write_json(path: Path, content: Json) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
