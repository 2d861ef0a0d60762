"""What optimizers share: their interface, and what a parameter's logical axes say about it."""

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol

import jax
import optax
from jax.sharding import Mesh

from jaxtrain.distributed.sharding import Axes, is_axes
from jaxtrain.errors import UserError
from jaxtrain.interfaces import ScheduleConfig

Params = dict[str, Any]  # nested dicts of arrays


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """Pure functions, to be called inside jit.

    init: params → state, a plain pytree.
    update: (gradients, state, params, learning rate: fp32 scalar) → (new params, new state). Weight decay is included;
        clipping and the schedule are not.
    state_axes: the state's tree with a tuple of logical axes for each leaf. Pin the output of a jitted `init` to them
        (`sharding.tree_shardings`): XLA replicates zeros otherwise.
    """

    init: Callable[[Params], Any]
    update: Callable[[Params, Any, Params, jax.Array], tuple[Params, Any]]
    state_axes: Any


class OptimizerConfig(Protocol):
    """What the trainer needs of an optimizer's config; the plan multiplies the peak rate by the schedule."""

    learning_rate: float
    schedule: ScheduleConfig

    def build(self, axes: Params, mesh: Mesh | None) -> Optimizer:
        """axes: the parameters' tree with a tuple of logical axes for each leaf."""
        ...


def is_matrix(axes: Axes) -> bool:
    """Whether it is a hidden layer's matrix: "embed" on one side, any other axis but "vocab" on the other."""
    inner = [axis for axis in axes if axis != "layers"]
    return "embed" in inner and len(inner) > 1 and "vocab" not in inner


def is_embedding(axes: Axes) -> bool:
    """Whether it is a table of [vocab, embed], looked up by token (and, where tied, the output head too)."""
    return axes[:1] == ("vocab",) and len(axes) > 1


def is_head(axes: Axes) -> bool:
    """Whether it is an output head of its own, [embed, vocab]."""
    return axes[-1:] == ("vocab",) and len(axes) > 1


def decay_mask(axes_tree: Params, decay_embeddings: bool) -> Params:
    """Which parameters weight decay shrinks (bools): matrices and the head; never norms and biases."""
    return jax.tree.map(
        lambda axes: is_matrix(axes) or is_head(axes) or (decay_embeddings and is_embedding(axes)),
        axes_tree,
        is_leaf=is_axes,
    )


def adam(betas: tuple[float, float], epsilon: float, axes_tree: Params) -> tuple[Any, Any]:
    """(optax's transformation, the logical axes of its state); Kingma and Ba, arXiv 1412.6980, algorithm 1."""
    state_axes: dict[str, Any] = {"count": (), "mu": axes_tree, "nu": axes_tree}
    return optax.scale_by_adam(*betas, eps=epsilon), optax.ScaleByAdamState(**state_axes)


def apply(params: Params, updates: Params, learning_rate: jax.Array, weight_decay: float, decays: Params) -> Params:
    """params - learning_rate * (updates + weight_decay * params), the decay where `decays` says so; dtypes are kept."""

    def step(p: jax.Array, u: jax.Array, decay: bool) -> jax.Array:
        return (p - learning_rate * (u + weight_decay * p if decay else u)).astype(p.dtype)

    return jax.tree.map(step, params, updates, decays)


def check_fields(config: Any) -> None:
    """The rules that AdamW and Muon share."""
    if config.learning_rate <= 0:
        raise UserError(f"learning_rate={config.learning_rate}: the peak rate is above 0, for example 3e-4.")
    if config.weight_decay < 0:
        raise UserError(f"weight_decay={config.weight_decay}: 0 or more is needed; 0.1 is usual.")
    if config.epsilon <= 0:
        raise UserError(f"epsilon={config.epsilon}: above 0 is needed, or unused parameters divide by zero.")
    if len(config.betas) != 2 or not all(0 <= beta < 1 for beta in config.betas):
        raise UserError(f"betas={config.betas}: two numbers from 0 to below 1, for example (0.9, 0.95).")
