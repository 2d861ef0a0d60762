"""Muon for hidden matrices, AdamW for the rest."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax.traverse_util import flatten_dict, unflatten_dict

from jaxtrain.distributed import sharding
from jaxtrain.distributed.sharding import spec
from jaxtrain.errors import UserError
from jaxtrain.interfaces import Axes, Mesh, Optimizer, Params
from jaxtrain.optim import base
from jaxtrain.optim.adamw import AdamW

# Jordan 2024, https://kellerjordan.github.io/posts/muon: chosen for the steepest slope at 0, so that five steps bring
# every singular value into about 0.7 to 1.2 (it does not converge to 1, nor needs to).
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
STEPS = 5

Path = tuple[str, ...]


@dataclasses.dataclass(kw_only=True)
class Muon(AdamW):
    """Momentum orthogonalized by Newton-Schulz (Jordan 2024) for hidden matrices, with Moonlight's scale and decay.

    A matrix [m, n] moves by learning_rate * 0.2 * sqrt(max(m, n)) times the orthogonalized Nesterov momentum, whose
    entries then have the size of AdamW's (arXiv 2502.16982, equation 4): rates and decays tuned for AdamW carry over.
    Layers and experts are separate matrices, stacked or not, and a router is one. Embedding, output head, norms and
    biases use AdamW.

    Attributes:
        momentum: Decay rate of the matrices' momentum.
        adam_ratio: The learning rate of AdamW's parameters, as a multiple of the matrices' rate.
        newton_schulz_dtype: "bfloat16", which suffices (Jordan 2024), or "float32".
        qk_clip: After an update, the weights of a head's queries and keys shrink so that its largest attention logit of
            the step would have been at most this: MuonClip (Kimi K2, arXiv 2507.20534, algorithm 1), which uses 100.
            None for no clipping. Other fields: see AdamW.
    """

    momentum: float = 0.95
    adam_ratio: float = 1.0
    newton_schulz_dtype: str = "bfloat16"
    qk_clip: float | None = None

    def check(self) -> None:
        super().check()
        if not 0 <= self.momentum < 1:
            raise UserError(f"momentum={self.momentum}: give 0 or more, below 1; 0.95 is usual.")
        if self.adam_ratio < 0:
            raise UserError(f"adam_ratio={self.adam_ratio}: give 0 or more; 1 gives AdamW the same rate.")
        if self.qk_clip is not None and not self.qk_clip > 0:
            raise UserError(f"qk_clip={self.qk_clip}: give the largest attention logit, for example 100, or none.")
        if self.newton_schulz_dtype not in ("bfloat16", "float32"):
            raise UserError(f'newton_schulz_dtype={self.newton_schulz_dtype!r}: give "bfloat16" or "float32".')

    def build_scaled(self, axes: Axes, mesh: Mesh | None, width_ratio: float) -> Optimizer:
        """The optimizer. Newton-Schulz spreads layers and experts over the devices of `mesh`.

        Its state is {"momentum": matrices, "adam": ScaleByAdamState of the rest}, both as pruned parameter trees.

        Args:
            axes: The parameters' logical axes.
            mesh: The device mesh.
            width_ratio: The spectral norm of a matrix's update should be sqrt(n / m) (arXiv 2310.17813, condition 1),
                which no width changes in proportion; that of Moonlight's scale grows with its root.
        """
        adam = optax.scale_by_adam(*self.betas, eps=self.epsilon)
        axes = flat(axes)
        matrices = [path for path, leaf in axes.items() if base.is_matrix(leaf)]
        others = [path for path in axes if path not in matrices]
        decays: Any = base.decay_mask(axes, self.decay_embeddings)
        scales: Any = base.rate_scales(axes, width_ratio**-0.5)
        dtype = jnp.dtype(self.newton_schulz_dtype)

        def select(tree: dict[Path, Any], paths: list[Path]) -> dict[Path, Any]:
            return {path: tree[path] for path in paths}

        def init(params: Params) -> Any:
            momentum = jax.tree.map(jnp.zeros_like, unflatten_dict(select(flat(params), matrices)))
            return {"momentum": momentum, "adam": adam.init(unflatten_dict(select(flat(params), others)))}

        def update(grads: Params, state: Any, params: Params, learning_rate: jax.Array) -> tuple[Params, Any]:
            flat_grads, flat_params, momentum = flat(grads), flat(params), {}
            directions = {}
            for path, old in flat(state["momentum"]).items():
                grad = flat_grads[path]
                momentum[path] = (self.momentum * old + (1 - self.momentum) * grad).astype(old.dtype)
                nesterov = (1 - self.momentum) * grad + self.momentum * momentum[path]
                directions[path] = _orthogonalized(nesterov, axes[path], dtype, mesh)
            updates, adam_state = adam.update(unflatten_dict(select(flat_grads, others)), state["adam"])
            new = {}
            for paths, moves, rate in (
                (matrices, directions, learning_rate),
                (others, flat(updates), learning_rate * self.adam_ratio),
            ):
                masks = (select(decays, paths), select(scales, paths))
                new |= base.apply(select(flat_params, paths), moves, rate, self.weight_decay, *masks)
            return unflatten_dict(new), {"momentum": unflatten_dict(momentum), "adam": adam_state}

        return base.Functions(init, update)


def flat(tree: Any) -> dict[Path, Any]:
    """Flattens nested dicts to one dict, path → leaf."""
    return flatten_dict(tree)  # type: ignore[return-value]


def _orthogonalized(update: jax.Array, axes: sharding.Axes, dtype: jnp.dtype, mesh: Mesh | None) -> jax.Array:
    """0.2 * sqrt(max(m, n)) * orthogonalized matrices of an array with "embed" on one side, in its own shape, fp32."""
    stacked = [axis for axis in axes if axis in base.STACKS]
    inner = axes[len(stacked) :]
    assert "embed" in (inner[0], inner[-1]), f"a matrix must have its 'embed' axis first or last, not {axes}"
    sizes = update.shape[-len(inner) :]
    m = sizes[0] if inner[0] == "embed" else math.prod(sizes[:-1])
    n = math.prod(sizes) // m
    # Of the axes that share a side only the first is split: ("heads", "head_dim").
    sides = ("embed", inner[1]) if inner[0] == "embed" else (inner[0], "embed")
    # Experts come first, so that flattening the stacks keeps each device's own together.
    last = len(stacked) - 1
    x = jnp.moveaxis(update, last, 0) if last > 0 else update
    stack = "experts" if "experts" in stacked else None
    orthogonalize = functools.partial(newton_schulz, dtype=dtype)
    x_Lmn = _spread(orthogonalize, x.reshape(-1, m, n).astype(dtype), (stack, *sides), mesh)
    x = x_Lmn.astype(jnp.float32).reshape(x.shape)
    return 0.2 * math.sqrt(max(m, n)) * (jnp.moveaxis(x, 0, last) if last > 0 else x)


def newton_schulz(x_Lmn: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Roughly U V^T of each matrix U S V^T [L, m, n], computed and returned in `dtype`."""
    a, b, c = COEFFICIENTS
    x_Lmn = x_Lmn.astype(jnp.float32)
    # The Frobenius norm is at least the spectral one, so singular values start at 1 or below.
    x = (x_Lmn / (jnp.sqrt(jnp.sum(jnp.square(x_Lmn), (1, 2), keepdims=True)) + 1e-7)).astype(dtype)
    wide = x.shape[1] <= x.shape[2]
    x = x if wide else x.mT
    # Accelerators round fp32 factors by default.
    multiply = functools.partial(jnp.matmul, precision="highest" if dtype == jnp.float32 else None)
    for _ in range(STEPS):
        gram = multiply(x, x.mT)
        x = a * x + multiply(b * gram + c * multiply(gram, gram), x)
    return x if wide else x.mT


def _spread(
    function: Callable[[jax.Array], jax.Array], x_Lmn: jax.Array, axes: tuple[str | None, ...], mesh: Mesh | None
) -> jax.Array:
    """function(x), matrix by matrix, with whole matrices on each device and different ones on different devices.

    axes: logical axes of L, m and n. An all-to-all for each mesh axis that splits a side trades the split of the
    matrices for one of the layers; axes that only copy take a part of the layers each, while there are enough. In Auto
    mode XLA gathers all layers on every device for `fsdp`, and replicates the array where two mesh axes split it.
    """
    if mesh is None:
        return function(x_Lmn)
    layout = spec(axes)
    splits = [(name, dim) for dim, name in enumerate(layout) if dim > 0 and name is not None and mesh.shape[name] > 1]
    ways = math.prod(mesh.shape[name] for name, _ in splits)
    own = x_Lmn.shape[0] // (1 if layout[0] is None else mesh.shape[layout[0]])
    copies = []
    for name in ("data", "expert", "context"):
        if name != layout[0] and mesh.shape[name] > 1 and ways < own:
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
