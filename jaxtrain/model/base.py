"""What models share: everything that follows from a model's axes and shapes."""

import functools
import math
import threading
from collections.abc import Callable
from typing import Any, TypeVar

import jax

from jaxtrain.distributed import sharding
from jaxtrain.interfaces import Axes, Mesh, Model, Params

Method = TypeVar("Method", bound=Callable[..., Any])

# NNX modules may be built and called in several threads only from flax 0.12.9 on, which Python 3.11 does not have, and
# the next stage is traced in the background.
_nnx = threading.RLock()


def one_thread_at_a_time(method: Method) -> Method:
    """For methods that run NNX modules. They run only while JAX traces, so no step ever waits for the lock."""

    @functools.wraps(method)
    def locked(*args: Any, **kwargs: Any) -> Any:
        with _nnx:
            return method(*args, **kwargs)

    return locked  # type: ignore[return-value]


class BaseModel(Model):
    """A model with the properties and optional methods of `interfaces.Model` derived or at their defaults.

    A subclass writes `init`, `hidden`, `head` and `flops_per_token`. What `init` needs is set before `super().__init__`,
    which raises UserError if the mesh does not divide the parameters.
    """

    def __init__(self, config: Any, vocab_size: int, mesh: Mesh | None, axes: Axes):
        self.config = config
        self.vocab_size = vocab_size
        self.mesh = mesh
        self.axes = axes
        if mesh is not None:
            sharding.check_divides(mesh, axes, self.shapes)

    @functools.cached_property
    def shapes(self) -> Params:
        return jax.eval_shape(self.init, jax.random.key(0))

    @functools.cached_property
    def padded_vocab_size(self) -> int:
        return jax.eval_shape(self.head, self.shapes).shape[1]

    @functools.cached_property
    def num_params(self) -> int:
        return self._count(lambda axes: True)

    @functools.cached_property
    def num_params_non_embedding(self) -> int:
        return self._count(lambda axes: "vocab" not in axes)

    def _count(self, counts: Callable[[sharding.Axes], bool]) -> int:
        sizes = jax.tree.map(
            lambda axes, leaf: (
                math.prod(
                    self.vocab_size if axis == "vocab" else size for axis, size in zip(axes, leaf.shape, strict=True)
                )
                * counts(axes)
            ),
            self.axes,
            self.shapes,
            is_leaf=sharding.is_axes,
        )
        return sum(jax.tree.leaves(sizes))

    def compiler_options(self, batch_size: int, seq_len: int) -> dict[str, str]:
        return {}

    def memory_advice(self) -> tuple[str, ...]:
        return ()
