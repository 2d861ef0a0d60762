"""The train state: a plain dict of arrays, born sharded.

{"params": the model's, "opt": the optimizer's, "meta": {"step", "fingerprint", "skipped", "skipped_in_a_row"}}. This is
exactly what a checkpoint's arrays are.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxtrain.distributed import sharding
from jaxtrain.interfaces import Model, Optimizer, Params
from jaxtrain.optim.base import state_axes

State = dict[str, Any]


def shardings(model: Model, optimizer: Optimizer, mesh: Mesh) -> State:
    """The sharding of every array of the state. The optimizer's follow from the parameters they belong to."""
    whole = sharding.replicated(mesh)
    return {
        "params": sharding.tree_shardings(mesh, model.axes),
        "opt": sharding.tree_shardings(mesh, state_axes(optimizer, model.axes, model.shapes)),
        "meta": {"step": whole, "fingerprint": whole, "skipped": whole, "skipped_in_a_row": whole},
    }


def _initial(params: Params, optimizer: Optimizer) -> State:
    zero = jnp.zeros((), jnp.int32)
    meta = {
        "step": zero,  # the last one trained
        "fingerprint": jnp.zeros(2, jnp.uint32),  # of the data trained on so far
        "skipped": zero,  # updates left out because of non-finite gradients
        "skipped_in_a_row": zero,
    }
    return {"params": params, "opt": optimizer.init(params), "meta": meta}


def create(model: Model, optimizer: Optimizer, mesh: Mesh, seed: int) -> State:
    """A fresh state; no array is ever whole on one device or on the host."""
    layout = shardings(model, optimizer, mesh)
    build = jax.jit(lambda key: _initial(model.init(key), optimizer), out_shardings=layout)
    return build(jax.random.key(seed))


def create_from(params: Params, model: Model, optimizer: Optimizer, mesh: Mesh) -> State:
    """A state at step 0 with the given parameters, which are sharded as `shardings` says."""
    rest = shardings(model, optimizer, mesh)
    rest.pop("params")
    build = jax.jit(lambda params: {name: _initial(params, optimizer)[name] for name in rest}, out_shardings=rest)
    return {"params": params, **build(params)}


def abstract(model: Model, optimizer: Optimizer, mesh: Mesh) -> State:
    """Shapes, types and shardings of the state, for ahead-of-time compilation and restores. Makes no array."""
    return jax.tree.map(
        lambda leaf, layout: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=layout),
        jax.eval_shape(lambda params: _initial(params, optimizer), model.shapes),
        shardings(model, optimizer, mesh),
    )
