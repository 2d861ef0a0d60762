"""The train state: a plain dict of arrays, created sharded.

{"params": the model's, "opt": the optimizer's, "meta": {"step", "fingerprint", "skipped", "skipped_in_a_row"}}. A
checkpoint contains exactly these arrays.
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
    """Returns the sharding of every array of the state. Optimizer arrays are sharded like their parameters."""
    whole = sharding.replicated(mesh)
    return {
        "params": sharding.tree_shardings(mesh, model.axes),
        "opt": sharding.tree_shardings(mesh, state_axes(optimizer, model.axes, model.shapes)),
        "meta": {"step": whole, "fingerprint": whole, "skipped": whole, "skipped_in_a_row": whole},
    }


def _initial(params: Params, optimizer: Optimizer) -> State:
    zero = jnp.zeros((), jnp.int32)
    meta = {
        "step": zero,  # the last step trained
        "fingerprint": jnp.zeros(2, jnp.uint32),  # of the data trained on so far
        "skipped": zero,  # updates skipped because of non-finite gradients
        "skipped_in_a_row": zero,
    }
    return {"params": params, "opt": optimizer.init(params), "meta": meta}


def create(model: Model, optimizer: Optimizer, mesh: Mesh, seed: int) -> State:
    """Creates a fresh state. No array ever exists unsharded, on a device or on the host."""
    layout = shardings(model, optimizer, mesh)
    build = jax.jit(lambda key: _initial(model.init(key), optimizer), out_shardings=layout)
    return build(jax.random.key(seed))


def create_from(params: Params, model: Model, optimizer: Optimizer, mesh: Mesh) -> State:
    """Creates a state at step 0 from parameters that are sharded as in `shardings`."""
    rest = shardings(model, optimizer, mesh)
    rest.pop("params")
    build = jax.jit(lambda params: {name: _initial(params, optimizer)[name] for name in rest}, out_shardings=rest)
    return {"params": params, **build(params)}


def abstract(model: Model, optimizer: Optimizer, mesh: Mesh) -> State:
    """Returns shapes, types and shardings of the state, for compilation and restores. Allocates no arrays."""
    return jax.tree.map(
        lambda leaf, layout: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=layout),
        jax.eval_shape(lambda params: _initial(params, optimizer), model.shapes),
        shardings(model, optimizer, mesh),
    )
