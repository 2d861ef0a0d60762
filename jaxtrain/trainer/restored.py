"""Restores model, tokenizer and parameters from a work directory's checkpoint, or from a Hugging Face folder."""

import dataclasses
import json
from typing import Any

import jax
import tokenizers

from jaxtrain import cli, hf
from jaxtrain.checkpoint.restore import load_data, restore_params, step_folder
from jaxtrain.distributed import sharding
from jaxtrain.errors import UserError
from jaxtrain.interfaces import Model, Params
from jaxtrain.tokenizers.files import TOKENIZER_CONFIG, TOKENIZER_JSON
from jaxtrain.tokenizers.hf import HuggingFaceTokenizer


@dataclasses.dataclass
class Restored:
    """A trained model.

    Attributes:
        step: the checkpoint's step.
        add_bos: whether documents began with a beginning-of-sequence token (data.add_bos).
        params: fp32, sharded over all devices.
    """

    step: int
    add_bos: bool
    model: Model
    tokenizer: Any
    params: Params

    def prompt_ids(self, prompt: str) -> list[int]:
        """The ids of a text to continue, at least one, begun as documents were in training."""
        ids = self.tokenizer.encode_batch([prompt])[0].tolist()
        return [self.tokenizer.bos_id, *ids] if self.add_bos else ids or [self.tokenizer.eos_id]


def restore(workdir: str, step: int | None = None) -> Restored:
    """Restores the checkpoint of a step, by default the newest.

    Args:
        workdir: the work directory.
        step: the step; None for the newest checkpoint.

    Raises:
        UserError: there is no such checkpoint, it is damaged, or the tokenizer's files have changed since.
    """
    saved = load_data(workdir, step)
    mesh = sharding.MeshConfig().build()
    tokenizer = cli.from_json(saved["config"]["tokenizer"]).build(workdir)
    if tokenizer.identity["hash"] != saved["tokenizer"]["hash"]:
        raise UserError(f"The tokenizer of {workdir} has changed since its checkpoint: restore the run's own files.")
    model = cli.from_json(saved["config"]["model"]).build(tokenizer.vocab_size, mesh)
    wanted = jax.tree.map(
        lambda shape, layout: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=layout),
        model.shapes,
        sharding.tree_shardings(mesh, model.axes),
    )
    params = restore_params(workdir, wanted, step)
    return Restored(
        step=int(step_folder(workdir, step).name),
        add_bos="data" in saved["config"] and saved["config"]["data"]["add_bos"],  # tools.import_hf records no data
        model=model,
        tokenizer=tokenizer,
        params=params,
    )


def from_hf(folder_or_id: str) -> Restored:
    """Loads a model in Hugging Face's format, to evaluate it as transformers would compute it.

    Raises:
        UserError: it does not exist, is damaged, or is not supported.
    """
    mesh = sharding.MeshConfig().build()
    config, _ = hf.config(folder_or_id)
    tokenizer = HuggingFaceTokenizer(name=folder_or_id).build("")
    model = dataclasses.replace(config, dtype=hf.dtype(folder_or_id)).build(tokenizer.vocab_size, mesh)
    params = hf.load(folder_or_id, model, sharding.tree_shardings(mesh, model.axes))
    content = tokenizer.content()
    if TOKENIZER_JSON in content:
        ids = tokenizers.Tokenizer.from_buffer(content[TOKENIZER_JSON]).encode("a").ids
        add_bos = tokenizer.bos_id is not None and ids[:1] == [tokenizer.bos_id]
    else:
        add_bos = bool(json.loads(content[TOKENIZER_CONFIG]).get("add_bos_token"))
    return Restored(step=0, add_bos=add_bos, model=model, tokenizer=tokenizer, params=params)
