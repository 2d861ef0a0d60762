"""Model, tokenizer and parameters of a work directory, from what its checkpoint says of itself."""

import dataclasses
from typing import Any

import jax

from jaxtrain import cli
from jaxtrain.checkpoint import checkpoints
from jaxtrain.distributed import sharding
from jaxtrain.errors import UserError
from jaxtrain.interfaces import Model, Params


@dataclasses.dataclass
class Restored:
    """step: the checkpoint's. params: fp32, over all devices of this process's run. add_bos: as data.add_bos says."""

    step: int
    add_bos: bool
    model: Model
    tokenizer: Any
    params: Params


def restore(workdir: str, step: int | None = None) -> Restored:
    """step: None for the newest checkpoint. Raises UserError where there is none, or it is damaged."""
    saved = checkpoints.load_data(workdir, step)
    mesh = sharding.MeshConfig().build()
    tokenizer = cli.from_json(saved["config"]["tokenizer"]).build(workdir)
    if tokenizer.identity["hash"] != saved["tokenizer"]["hash"]:
        raise UserError(f"The tokenizer of {workdir} has changed since its checkpoint: put the run's own back.")
    model = cli.from_json(saved["config"]["model"]).build(tokenizer.vocab_size, mesh)
    wanted = jax.tree.map(
        lambda shape, place: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=place),
        model.shapes,
        sharding.tree_shardings(mesh, model.axes),
    )
    params = checkpoints.restore_params(workdir, wanted, step)
    found = int(checkpoints.step_folder(workdir, step).name)
    # A model that tools.import_hf wrote has no data.
    return Restored(found, "data" in saved["config"] and saved["config"]["data"]["add_bos"], model, tokenizer, params)
