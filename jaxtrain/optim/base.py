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
from jaxtrain.interfaces import (
    Axes,
    Mesh,
    Model,
    Optimizer,
    OptimizerConfig,
    Params,
    ScheduleConfig,
    WidthScaledConfig,
)
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
class DecoupledConfig:
    """An optimizer that moves along a direction of optax, with decoupled weight decay. Base of the built-in ones.

    A subclass adds fields and writes `direction`. A parameter p moves by -learning_rate * (direction + weight_decay
    * p) (Loshchilov and Hutter, arXiv 1711.05101, in the form of PyTorch and optax: the learning rate multiplies the
    decay). Norms and biases never decay.

    Attributes:
        learning_rate: The peak rate, which `schedule` scales.
        schedule: A dataclass of plan/schedules.py.
        weight_decay: Of each step, as a multiple of the learning rate.
        decay_embeddings: Whether the embedding decays. Off as in OLMo 2 (arXiv 2501.00656): a decayed embedding makes
            hidden states small, and so the gradients of the first layers large. A separate output head always decays.
    """

    learning_rate: float = 3e-4
    schedule: ScheduleConfig = dataclasses.field(default_factory=Cosine)
    weight_decay: float = 0.1
    decay_embeddings: bool = False

    def check(self) -> None:
        check_rate(self.learning_rate)
        if self.weight_decay < 0:
            raise UserError(f"weight_decay={self.weight_decay}: give 0 or more; 0.1 is usual.")

    def direction(self) -> optax.GradientTransformation:
        """The transformation of gradients to directions, without learning rate and weight decay."""
        raise NotImplementedError

    def build(self, axes: Axes, mesh: Mesh | None = None) -> Optimizer:
        """The optimizer, whose state is that of `direction`."""
        return self.build_scaled(axes, mesh, 1.0)

    def build_scaled(self, axes: Axes, mesh: Mesh | None, width_ratio: float) -> Optimizer:
        """See interfaces.WidthScaledConfig. The entries of a direction must have a size that no width changes."""
        direction = self.direction()
        decays, scales = decay_mask(axes, self.decay_embeddings), rate_scales(axes, 1 / width_ratio)

        def update(grads: Params, state: Any, params: Params, learning_rate: jax.Array) -> tuple[Params, Any]:
            updates, state = direction.update(grads, state, params)
            return apply(params, updates, learning_rate, self.weight_decay, decays, scales), state

        return Functions(direction.init, update)


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


def built(config: OptimizerConfig, model: Model, mesh: Mesh | None) -> Optimizer:
    """The optimizer of a model, which may have width transfer.

    Raises:
        UserError: The optimizer has no rule for width transfer.
    """
    ratio = getattr(model, "width_ratio", 1.0)
    if ratio == 1:
        return config.build(model.axes, mesh)
    if not isinstance(config, WidthScaledConfig):
        raise UserError(f"width_transfer='mup' needs the method `build_scaled`, which {type(config).__name__} lacks")
    return config.build_scaled(model.axes, mesh, ratio)


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


def rate_scales(axes_tree: Axes, scale: float) -> Any:
    """A learning rate's factor for each parameter: `scale` for the layers' matrices, 1 for all others.

    Of these the fan-in grows with the width (Tensor Programs V, arXiv 2203.03466, table 8). Norms, biases and the
    embedding have a finite one, and the output multiplier is what the head needs.
    """
    return jax.tree.map(lambda axes: scale if is_matrix(axes) else 1.0, axes_tree, is_leaf=is_axes)


def apply(
    params: Any,
    updates: Any,
    learning_rate: jax.Array,
    weight_decay: float,
    decays: Any,
    scales: Any,
    decayed: Any = None,
) -> Any:
    """params - learning_rate * (scale * update + weight_decay * decayed); dtypes are kept.

    Args:
        decays: Whether each parameter decays.
        scales: Of `rate_scales`. The decay has none, so that it does not vanish with the width.
        decayed: What the decay multiplies; None for the parameters themselves.
    """

    def step(p: jax.Array, u: jax.Array, decay: bool, scale: float, d: jax.Array) -> jax.Array:
        u = u if scale == 1 else scale * u
        return (p - learning_rate * (u + weight_decay * d if decay else u)).astype(p.dtype)

    return jax.tree.map(step, params, updates, decays, scales, params if decayed is None else decayed)


def check_decay_rates(name: str, rates: tuple[float, ...], example: str) -> None:
    """Raises UserError if a decay rate of moving averages is not from 0 to below 1."""
    if not all(0 <= rate < 1 for rate in rates):
        raise UserError(f"{name}={rates}: give numbers from 0 to below 1, for example {example}.")


def check_epsilon(epsilon: float) -> None:
    if epsilon <= 0:
        raise UserError(f"epsilon={epsilon}: give a value above 0, or unused parameters divide by zero.")


def check_rate(learning_rate: float) -> None:
    if learning_rate <= 0:
        raise UserError(f"learning_rate={learning_rate}: give a peak rate above 0, for example 3e-4.")
