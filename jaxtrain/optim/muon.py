"""Muon for hidden matrices, AdamW for the rest."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxtrain.distributed.sharding import Axes, is_axes, spec
from jaxtrain.errors import UserError
from jaxtrain.optim import base
from jaxtrain.plan.schedules import Cosine

# Jordan 2024, https://kellerjordan.github.io/posts/muon: chosen for the steepest slope at 0, so that five steps bring
# every singular value into about 0.7 to 1.2 (it does not converge to 1, nor needs to).
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
STEPS = 5


@dataclasses.dataclass(kw_only=True)
class Muon:
    """Momentum orthogonalized by Newton-Schulz (Jordan 2024) for hidden matrices, with Moonlight's scale and decay.

    A matrix [m, n] takes learning_rate * 0.2 * sqrt(max(m, n)) of the orthogonalized Nesterov momentum, whose entries
    then have the size of AdamW's (arXiv 2502.16982, equation 4): rates and decays tuned for AdamW carry over. Layers
    are separate matrices, stacked or not. Embedding, output head, norms and biases take AdamW.

    learning_rate: the peak, which `schedule` scales.
    schedule: a dataclass of plan/schedules.py.
    momentum: decay rate of the matrices' momentum.
    weight_decay: per step, as a multiple of the learning rate; matrices and head, never norms and biases.
    decay_embeddings: whether the embedding decays; see AdamW.
    adam_ratio: the learning rate of what takes AdamW, as a multiple of the matrices' rate.
    betas, epsilon: of what takes AdamW.
    newton_schulz_dtype: "bfloat16", which suffices (Jordan 2024), or "float32".
    """

    learning_rate: float = 3e-4
    schedule: base.ScheduleConfig = dataclasses.field(default_factory=Cosine)
    momentum: float = 0.95
    weight_decay: float = 0.1
    decay_embeddings: bool = False
    adam_ratio: float = 1.0
    betas: tuple[float, float] = (0.9, 0.95)
    epsilon: float = 1e-8
    newton_schulz_dtype: str = "bfloat16"

    def check(self) -> None:
        base.check_fields(self)
        if not 0 <= self.momentum < 1:
            raise UserError(f"momentum={self.momentum}: from 0 to below 1; 0.95 is usual.")
        if self.adam_ratio < 0:
            raise UserError(f"adam_ratio={self.adam_ratio}: 0 or more is needed; 1 gives AdamW the same rate.")
        if self.newton_schulz_dtype not in ("bfloat16", "float32"):
            raise UserError(f'newton_schulz_dtype={self.newton_schulz_dtype!r}: "bfloat16" or "float32" is needed.')

    def build(self, axes: base.Params, mesh: Mesh | None = None) -> base.Optimizer:
        """axes: the parameters' tree of logical axes. mesh: spreads the layers over its devices in Newton-Schulz.

        The state is {"momentum": matrices, "adam": ScaleByAdamState of the rest}, both as pruned parameter trees.
        """
        matrix = jax.tree.map(base.is_matrix, axes, is_leaf=is_axes)
        other = jax.tree.map(lambda is_matrix: not is_matrix, matrix)
        decays = base.decay_mask(axes, self.decay_embeddings)
        adam, adam_axes = base.adam(self.betas, self.epsilon, _select(axes, other))

        def init(params: base.Params) -> Any:
            momentum = jax.tree.map(jnp.zeros_like, _select(params, matrix))
            return {"momentum": momentum, "adam": adam.init(_select(params, other))}

        def direction(axes: Axes, grad: jax.Array, momentum: jax.Array) -> jax.Array:
            nesterov = (1 - self.momentum) * grad + self.momentum * momentum
            return _orthogonalized(nesterov, axes, jnp.dtype(self.newton_schulz_dtype), mesh)

        def update(
            grads: base.Params, state: Any, params: base.Params, learning_rate: jax.Array
        ) -> tuple[base.Params, Any]:
            matrix_grads = _select(grads, matrix)
            momentum = jax.tree.map(
                lambda m, g: (self.momentum * m + (1 - self.momentum) * g).astype(m.dtype),
                state["momentum"],
                matrix_grads,
            )
            directions = jax.tree.map(direction, _select(axes, matrix), matrix_grads, momentum, is_leaf=is_axes)
            updates, adam_state = adam.update(_select(grads, other), state["adam"])

            def step(keep: base.Params, updates: base.Params, rate: jax.Array) -> base.Params:
                return base.apply(_select(params, keep), updates, rate, self.weight_decay, _select(decays, keep))

            new_params = _merge(
                params,
                step(matrix, directions, learning_rate),
                step(other, updates, learning_rate * self.adam_ratio),
            )
            return new_params, {"momentum": momentum, "adam": adam_state}

        state_axes = {"momentum": _select(axes, matrix), "adam": adam_axes}
        return base.Optimizer(init, update, state_axes)


def _orthogonalized(update: jax.Array, axes: Axes, dtype: jnp.dtype, mesh: Mesh | None) -> jax.Array:
    """0.2 * sqrt(max(m, n)) * orthogonalized matrices of an array with "embed" on one side, in its own shape, fp32."""
    inner = axes[1:] if axes[0] == "layers" else axes
    assert "embed" in (inner[0], inner[-1]), f"a matrix has its 'embed' axis first or last, not {axes}"
    sizes = update.shape[-len(inner) :]
    m = sizes[0] if inner[0] == "embed" else math.prod(sizes[:-1])
    n = math.prod(sizes) // m
    # Of the axes that share a side only the first is split: ("heads", "head_dim").
    sides = ("embed", inner[1]) if inner[0] == "embed" else (inner[0], "embed")
    x_Lmn = _spread(functools.partial(newton_schulz, dtype=dtype), update.reshape(-1, m, n).astype(dtype), sides, mesh)
    return 0.2 * math.sqrt(max(m, n)) * x_Lmn.astype(jnp.float32).reshape(update.shape)


def newton_schulz(x_Lmn: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Roughly U V^T of each matrix U S V^T [L, m, n], computed and returned in `dtype`."""
    a, b, c = COEFFICIENTS
    x_Lmn = x_Lmn.astype(jnp.float32)
    # The Frobenius norm is at least the spectral one, so singular values start at 1 or below.
    x = (x_Lmn / (jnp.sqrt(jnp.sum(jnp.square(x_Lmn), (1, 2), keepdims=True)) + 1e-7)).astype(dtype)
    wide = x.shape[1] <= x.shape[2]
    x = x if wide else x.mT
    # Accelerators round fp32 factors unless told not to.
    multiply = functools.partial(jnp.matmul, precision="highest" if dtype == jnp.float32 else None)
    for _ in range(STEPS):
        gram = multiply(x, x.mT)
        x = a * x + multiply(b * gram + c * multiply(gram, gram), x)
    return x if wide else x.mT


def _spread(
    function: Callable[[jax.Array], jax.Array], x_Lmn: jax.Array, sides: tuple[str | None, ...], mesh: Mesh | None
) -> jax.Array:
    """function(x), matrix by matrix, with whole matrices on each device and different ones on different devices.

    sides: logical axes of m and n. An all-to-all for each mesh axis that splits a side trades the split of the matrices
    for one of the layers; axes that only copy take a part of the layers each, while there are enough. In Auto mode XLA
    gathers all layers on every device for `fsdp`, and replicates the array where two mesh axes split it.
    """
    if mesh is None:
        return function(x_Lmn)
    layout = spec((None, *sides))
    splits = [(name, dim) for dim, name in enumerate(layout) if name is not None and mesh.shape[name] > 1]
    ways = math.prod(mesh.shape[name] for name, _ in splits)
    copies = []
    for name in ("data", "context"):
        if mesh.shape[name] > 1 and ways < x_Lmn.shape[0]:
            copies.append(name)
            ways *= mesh.shape[name]

    def device(x: jax.Array) -> jax.Array:
        L = x.shape[0]
        x = jnp.pad(x, ((0, -L % ways), (0, 0), (0, 0)))
        for name, dim in splits:
            x = jax.lax.all_to_all(x, name, split_axis=0, concat_axis=dim, tiled=True)
        for name in copies:
            share = x.shape[0] // mesh.shape[name]
            x = jax.lax.dynamic_slice_in_dim(x, jax.lax.axis_index(name) * share, share)
        x = function(x)
        for name in reversed(copies):
            x = jax.lax.all_gather(x, name, tiled=True)
        for name, dim in reversed(splits):
            x = jax.lax.all_to_all(x, name, split_axis=dim, concat_axis=0, tiled=True)
        return x[:L]

    return jax.shard_map(device, mesh=mesh, in_specs=layout, out_specs=layout, check_vma=False)(x_Lmn)


def _select(tree: base.Params, keep: base.Params) -> base.Params:
    """The nested dict without the leaves that `keep` (bools) leaves out, and without dicts left empty."""
    selected = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            value = _select(value, keep[name])
            if value:
                selected[name] = value
        elif keep[name]:
            selected[name] = value
    return selected


def _merge(like: base.Params, *parts: base.Params) -> base.Params:
    """What `_select` took apart, in the order of `like`."""
    merged = {}
    for name, value in like.items():
        inside = [part[name] for part in parts if name in part]
        merged[name] = _merge(value, *inside) if isinstance(value, dict) else inside[0]
    return merged
