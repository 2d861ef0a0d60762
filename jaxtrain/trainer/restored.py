"""Restores model, tokenizer and parameters from a work directory's checkpoint."""

import dataclasses
from typing import Any

import jax

from jaxtrain import cli
from jaxtrain.checkpoint.restore import load_data, restore_params, step_folder
from jaxtrain.distributed import sharding
from jaxtrain.errors import UserError
from jaxtrain.interfaces import Model, Params


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
