"""What optimizers share: optax transformations as optimizers, and what logical axes say about a parameter.

An optimizer is two pure functions (interfaces.Optimizer). How its state is sharded follows from the state itself:
`state_axes`.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import optax

from jaxtrain.distributed import sharding
from jaxtrain.distributed.sharding import is_axes
from jaxtrain.errors import UserError
from jaxtrain.interfaces import Axes, Mesh, Optimizer, Params, ScheduleConfig
from jaxtrain.plan.schedules import Cosine


@dataclasses.dataclass(frozen=True)
class Functions:
    """An interfaces.Optimizer of two functions.

    Attributes:
        init: params -> state.
        update: (grads, state, params, learning rate) -> (new params, new state).
    """

    init: Callable[[Params], Any]
    update: Callable[[Params, Any, Params, jax.Array], tuple[Params, Any]]


STACKS = ("layers", "experts")  # axes that stack parameters of the same shape

Transformation = optax.GradientTransformation | Callable[[Any], optax.GradientTransformation]


def from_optax(transformation: Transformation) -> Optimizer:
    """Makes an optimizer of any optax transformation, including chains and contrib.

    Args:
        transformation: A function of the learning rate (an fp32 scalar, traced), such as `optax.lion`; or a
            transformation whose updates the learning rate multiplies, such as `optax.lion(1.0)`.
    """

    def at(learning_rate: Any) -> optax.GradientTransformation:
        if isinstance(transformation, optax.GradientTransformation):
            return optax.chain(transformation, optax.scale(learning_rate))
        return transformation(learning_rate)

    def update(grads: Params, state: Any, params: Params, learning_rate: jax.Array) -> tuple[Params, Any]:
        updates, state = at(learning_rate).update(grads, state, params)
        return optax.apply_updates(params, updates), state  # type: ignore[return-value]

    return Functions(lambda params: at(1.0).init(params), update)


@dataclasses.dataclass(kw_only=True)
class OptaxConfig:
    """The config of an optax optimizer. A subclass adds fields and writes `transformation`.

    Attributes:
        learning_rate: The peak rate, which `schedule` scales.
        schedule: A dataclass of plan/schedules.py.
    """

    learning_rate: float = 3e-4
    schedule: ScheduleConfig = dataclasses.field(default_factory=Cosine)

    def check(self) -> None:
        check_rate(self.learning_rate)

    def transformation(self, learning_rate: jax.Array, decays: Params) -> optax.GradientTransformation:
        """The transformation at a learning rate.

        Args:
            learning_rate: fp32 scalar, traced.
            decays: For optax's `mask`: which parameters weight decay should shrink (matrices and the head).
        """
        raise NotImplementedError

    def build(self, axes: Axes, mesh: Mesh | None = None) -> Optimizer:
        decays = decay_mask(axes, decay_embeddings=False)
        return from_optax(lambda learning_rate: self.transformation(learning_rate, decays))


def state_axes(optimizer: Optimizer, axes: Axes, params: Params) -> Any:
    """The logical axes of an optimizer's state: the state's tree with a tuple for each leaf.

    An array under a parameter's path is sharded like the parameter if it has its shape, or like its remaining
    dimensions if it lacks one (Adafactor's factored moments). Everything else is replicated.

    Args:
        axes: The parameters' logical axes.
        params: The parameters, or their shapes.
    """
    shapes = {_names(path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
    known = {_names(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(axes, is_leaf=is_axes)}

    def of(path: Any, leaf: jax.ShapeDtypeStruct) -> sharding.Axes:
        names = _names(path)
        name = next((names[begin:] for begin in range(len(names)) if names[begin:] in known), None)
        if name is None:
            return (None,) * leaf.ndim
        whole, shape = known[name], shapes[name]
        if leaf.shape == shape:
            return whole
        without = {whole[:i] + whole[i + 1 :] for i in range(len(shape)) if shape[:i] + shape[i + 1 :] == leaf.shape}
        # For a square matrix, either dimension may be the missing one.
        return without.pop() if len(without) == 1 else (None,) * leaf.ndim

    return jax.tree_util.tree_map_with_path(of, jax.eval_shape(optimizer.init, params))


def _names(path: Any) -> tuple[str, ...]:
    return tuple(jax.tree_util.keystr((key,), simple=True) for key in path)


def is_matrix(axes: sharding.Axes) -> bool:
    """Whether it is a hidden layer's matrix: "embed" on one side, any other axis but "vocab" on the other."""
    inner = [axis for axis in axes if axis not in STACKS]
    return "embed" in inner and len(inner) > 1 and "vocab" not in inner and None not in inner


def is_embedding(axes: sharding.Axes) -> bool:
    """Whether it is a table of [vocab, embed], looked up by token (and the output head too if tied)."""
    return axes[:1] == ("vocab",) and len(axes) > 1


def is_head(axes: sharding.Axes) -> bool:
    """Whether it is a separate output head, [embed, vocab]."""
    return axes[-1:] == ("vocab",) and len(axes) > 1


def decay_mask(axes_tree: Axes, decay_embeddings: bool) -> Params:
    """Which parameters weight decay shrinks (bools): matrices and the head; never norms and biases."""
    return jax.tree.map(
        lambda axes: is_matrix(axes) or is_head(axes) or (decay_embeddings and is_embedding(axes)),
        axes_tree,
        is_leaf=is_axes,
    )


def apply(params: Any, updates: Any, learning_rate: jax.Array, weight_decay: float, decays: Any) -> Any:
    """params - learning_rate * (updates + weight_decay * params), the decay where `decays` is True; dtypes are kept."""

    def step(p: jax.Array, u: jax.Array, decay: bool) -> jax.Array:
        return (p - learning_rate * (u + weight_decay * p if decay else u)).astype(p.dtype)

    return jax.tree.map(step, params, updates, decays)


def check_rate(learning_rate: float) -> None:
    if learning_rate <= 0:
        raise UserError(f"learning_rate={learning_rate}: give a peak rate above 0, for example 3e-4.")
