"""The train state: a plain dict of arrays, born sharded."""

from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxtrain.distributed import sharding

State = dict[str, Any]


class Model(Protocol):
    """What the state needs of a model (see model/llama.py)."""

    @property
    def axes(self) -> Any: ...

    def init(self, key: jax.Array) -> Any: ...


class Optimizer(Protocol):
    """What the state needs of an optimizer (see optim/base.py)."""

    @property
    def init(self) -> Any: ...
    @property
    def state_axes(self) -> Any: ...


def shardings(model: Model, optimizer: Optimizer, mesh: Mesh) -> State:
    """The sharding of every array of the state."""
    whole = sharding.replicated(mesh)
    return {
        "params": sharding.tree_shardings(mesh, model.axes),
        "opt": sharding.tree_shardings(mesh, optimizer.state_axes),
        "meta": {"step": whole, "fingerprint": whole, "skipped": whole, "skipped_in_a_row": whole},
    }


def _initial(model: Model, optimizer: Optimizer, key: jax.Array) -> State:
    params = model.init(key)
    return {"params": params, "opt": optimizer.init(params), "meta": _meta()}


def _meta() -> State:
    """step: the last one trained. skipped: updates that the guard against non-finite gradients left out."""
    zero = jnp.zeros((), jnp.int32)
    return {"step": zero, "fingerprint": jnp.zeros(2, jnp.uint32), "skipped": zero, "skipped_in_a_row": zero}


def create(model: Model, optimizer: Optimizer, mesh: Mesh, seed: int) -> State:
    """A fresh state; no array is ever whole on one device or on the host."""
    build = jax.jit(lambda key: _initial(model, optimizer, key), out_shardings=shardings(model, optimizer, mesh))
    return build(jax.random.key(seed))


def create_from(params: Any, model: Model, optimizer: Optimizer, mesh: Mesh) -> State:
    """A state at step 0 with the given parameters, which lie as `shardings` says."""
    layout = shardings(model, optimizer, mesh)
    opt = jax.jit(optimizer.init, out_shardings=layout["opt"])(params)
    meta = jax.jit(_meta, out_shardings=layout["meta"])()
    return {"params": params, "opt": opt, "meta": meta}


def abstract(model: Model, optimizer: Optimizer, mesh: Mesh) -> State:
    """Shapes, types and shardings of the state, without making it: for ahead-of-time compilation and restores."""
    shapes = jax.eval_shape(lambda key: _initial(model, optimizer, key), jax.random.key(0))
    return jax.tree.map(
        lambda leaf, layout: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=layout),
        shapes,
        shardings(model, optimizer, mesh),
    )
