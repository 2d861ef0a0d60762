"""Base class of models. Derives everything that follows from a model's axes and shapes."""

import functools
import math
import threading
from collections.abc import Callable
from typing import Any, TypeVar

import jax

from jaxtrain.distributed import sharding
from jaxtrain.interfaces import Axes, Mesh, Model, Params

Method = TypeVar("Method", bound=Callable[..., Any])

# NNX modules are thread-safe only from flax 0.12.9 on, which does not support Python 3.11, and the next stage is traced
# in the background.
_nnx = threading.RLock()


def one_thread_at_a_time(method: Method) -> Method:
    """Decorates methods that run NNX modules. These run only during tracing, so no step ever waits for the lock."""

    @functools.wraps(method)
    def locked(*args: Any, **kwargs: Any) -> Any:
        with _nnx:
            return method(*args, **kwargs)

    return locked  # type: ignore[return-value]


class BaseModel(Model):
    """A model with the attributes of `interfaces.Model` derived, and its optional methods at their defaults.

    A subclass writes `init`, `hidden`, `head` and `flops_per_token`. It sets what `init` needs, then calls
    `super().__init__`, which raises UserError if the mesh does not divide the parameters.

    Attributes:
        experts_per_token: Experts that a token uses, of parameters with an axis "experts".
    """

    experts_per_token = 1

    def __init__(self, config: Any, vocab_size: int, mesh: Mesh | None, axes: Axes):
        self.config = config
        self.vocab_size = vocab_size
        self.mesh = mesh
        self.axes = axes
        self.shapes: Params = jax.eval_shape(self.init, jax.random.key(0))
        if mesh is not None:
            sharding.check_divides(mesh, axes, self.shapes)
        self.padded_vocab_size = jax.eval_shape(self.head, self.shapes).shape[1]
        all_axes = jax.tree.leaves(axes, is_leaf=sharding.is_axes)
        leaves = list(zip(all_axes, jax.tree.leaves(self.shapes), strict=True))

        def count(axes: Axes, leaf: Any, **sizes: int) -> int:
            return math.prod(sizes.get(a or "", n) for a, n in zip(axes, leaf.shape, strict=True))

        inner = [(axes, leaf) for axes, leaf in leaves if "vocab" not in axes]
        self.num_params = sum(count(*leaf, vocab=vocab_size) for leaf in leaves)
        self.num_params_non_embedding = sum(count(*leaf) for leaf in inner)
        self.num_active_params = sum(count(*leaf, experts=self.experts_per_token) for leaf in inner)

    def compiler_options(self, batch_size: int, seq_len: int) -> dict[str, str]:
        return {}

    def memory_advice(self) -> tuple[str, ...]:
        return ()
