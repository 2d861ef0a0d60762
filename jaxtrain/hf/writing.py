"""Writes parameters as a checkpoint that transformers' AutoModelForCausalLM and AutoTokenizer load."""

import json
import logging
import math
from pathlib import Path
from typing import Any, Protocol

import jax
import ml_dtypes
import numpy as np
from safetensors.numpy import save_file
from tqdm import tqdm

from jaxtrain.errors import UserError
from jaxtrain.hf import families
from jaxtrain.hf.reading import CONFIG, INDEX, SINGLE
from jaxtrain.interfaces import Json, Model, Params
from jaxtrain.model.llama import Llama
from jaxtrain.tokenizers.files import GENERATION_CONFIG, TOKENIZER_CONFIG, TokenizerFiles

logger = logging.getLogger("jaxtrain")

DTYPES = {"bfloat16": ml_dtypes.bfloat16, "float32": np.float32}
SHARD_BYTES = 2_000_000_000  # all tensors of one file are in host memory together


class SavedTokenizer(Protocol):
    """A tokenizer that can be saved for transformers."""

    eos_id: int
    bos_id: int | None

    def content(self, add_bos: bool | None = None) -> dict[str, bytes]: ...


def export(
    params: Params,
    model: Model,
    folder: str,
    dtype: str = "bfloat16",
    tokenizer: SavedTokenizer | None = None,
    *,
    add_bos: bool = False,
    progress: bool = False,
) -> None:
    """Writes safetensors files (at most 2 GB each), config.json, generation_config.json and the tokenizer's files.

    config.json is written last, so a folder that has it is complete. After an interruption, a second call starts over.

    Args:
        params: the parameters, fully addressable by this process.
        model: the model.
        folder: output folder; created if missing.
        dtype: type of the tensors, "bfloat16" or "float32".
        tokenizer: its generation settings and stop tokens go into generation_config.json.
        add_bos: whether documents began with the BOS token in training (data.add_bos); the exported tokenizer adds
            it too.
        progress: whether to show a progress bar.

    Raises:
        UserError: no architecture in transformers can express the model.
    """
    model, params = families.llama(model).without_width_transfer(params)
    if dtype not in DTYPES:
        raise UserError(f"dtype={dtype!r}: give one of {', '.join(DTYPES)}.")
    content = {} if tokenizer is None else tokenizer.content(add_bos=add_bos)
    generation = _generation_config(content, tokenizer, model.vocab_size)
    special = {f"{name}_token_id": generation.get(f"{name}_token_id") for name in ("bos", "eos")}
    # No pad token: rows may be padded on either side, and padding takes no positions.
    config = families.to_json(model.config, model.vocab_size, dtype) | special | {"pad_token_id": None}
    if (
        tokenizer is not None
        and config["model_type"] == "qwen2"
        and b"Qwen2Tokenizer" not in tokenizer.content()[TOKENIZER_CONFIG]
    ):
        logger.warning(
            "AutoTokenizer applies the rules of Qwen2Tokenizer to every qwen2 model, which differ from this "
            "tokenizer's: load it with PreTrainedTokenizerFast.from_pretrained(%r).",
            folder,
        )
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    for old in (path / CONFIG, path / INDEX, *path.glob("model*.safetensors")):
        old.unlink(missing_ok=True)
    _write_tensors(params, model, path, np.dtype(DTYPES[dtype]), progress)
    for name, data in content.items():
        (path / name).write_bytes(data)
    _write_json(path / GENERATION_CONFIG, generation)
    _write_json(path / CONFIG, config)


def _generation_config(content: dict[str, bytes], tokenizer: SavedTokenizer | None, vocab_size: int) -> Json:
    """The generation settings of the tokenizer, with the end of a document added to its stop tokens."""
    if tokenizer is None:
        return {"bos_token_id": None, "eos_token_id": None}
    saved = TokenizerFiles("the tokenizer", content).json(GENERATION_CONFIG)
    stops = saved.get("eos_token_id")
    stops = [id for id in (stops if isinstance(stops, list) else [stops]) if type(id) is int and 0 <= id < vocab_size]
    if tokenizer.eos_id not in stops:
        stops.insert(0, tokenizer.eos_id)
    bos = saved.get("bos_token_id") if tokenizer.bos_id is None else tokenizer.bos_id
    return saved | {"bos_token_id": bos, "eos_token_id": stops if len(stops) > 1 else stops[0]}


def _write_tensors(params: Params, model: Llama, folder: Path, dtype: np.dtype, progress: bool) -> None:
    kind = families.family_of(model.config)
    # By name: the parts of each tensor, with the parameter that each belongs to.
    tensors: dict[str, list[tuple[families.Tensor, Any]]] = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]:
        for tensor in families.tensors(tuple(key.key for key in path), kind, model):
            tensors.setdefault(tensor.name, []).append((tensor, leaf))
    files: list[list[str]] = [[]]
    room = SHARD_BYTES
    for name, parts in tensors.items():
        size = sum(dtype.itemsize * math.prod(leaf.shape[len(tensor.index) :]) for tensor, leaf in parts)
        if size > room and files[-1]:
            files.append([])
            room = SHARD_BYTES
        files[-1].append(name)
        room -= size
    weight_map: dict[str, str] = {}
    total = 0
    for number, names in enumerate(tqdm(files, desc="Writing files", disable=not progress), 1):
        name = SINGLE if len(files) == 1 else f"model-{number:05d}-of-{len(files):05d}.safetensors"
        arrays = {name: _joined(tensors[name], model, dtype) for name in names}
        # transformers requires this metadata.
        save_file(arrays, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(arrays, name)
        total += sum(array.nbytes for array in arrays.values())
    if len(files) > 1:
        _write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _joined(parts: list[tuple[families.Tensor, Any]], model: Llama, dtype: np.dtype) -> np.ndarray:
    """A tensor of one parameter, or of the parts of several."""
    arrays = [_array(tensor, leaf, model, dtype) for tensor, leaf in parts]
    if (part := parts[0][0].part) is None:
        return arrays[0]
    whole = np.empty((part.rows, *arrays[0].shape[1:]), dtype)
    for (tensor, _), array in zip(parts, arrays, strict=True):
        assert tensor.part is not None
        whole[tensor.part.of(np.arange(len(array)))] = array
    return whole


def _array(tensor: families.Tensor, leaf: Any, model: Llama, dtype: np.dtype) -> np.ndarray:
    array = np.asarray(leaf[tensor.index])
    if tensor.vocabulary:
        array = array[:, : model.vocab_size] if tensor.transposed else array[: model.vocab_size]
    return np.ascontiguousarray(array.T if tensor.transposed else array).astype(dtype)


def _write_json(path: Path, content: Json) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
