"""The output head as losses see it: a matrix, or one whose logits are bounded. `x @ head` are the logits of both."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SoftCapped:
    """A head [D, V] whose logits are cap * tanh(x @ weights / cap) (Gemma 2, arXiv:2408.00118, section 2).

    It stands where a matrix does: it has a shape, can be cast, cut and multiplied from the left, and is a tree with one
    leaf for JAX's functions.
    """

    weights: jax.Array
    cap: float = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        return self.weights.shape

    @property
    def dtype(self) -> Any:
        return self.weights.dtype

    def astype(self, dtype: Any) -> "SoftCapped":
        return SoftCapped(self.weights.astype(dtype), self.cap)

    def __getitem__(self, index: Any) -> "SoftCapped":
        return SoftCapped(self.weights[index], self.cap)

    def __rmatmul__(self, x: jax.Array) -> jax.Array:
        return self.capped(x @ self.weights)

    def capped(self, logits: jax.Array) -> jax.Array:
        return self.cap * jnp.tanh(logits / self.cap)


Head = jax.Array | SoftCapped


def logits(x: jax.Array, head: Head) -> jax.Array:
    """x @ head of factors in x's dtype, accumulated and returned in fp32 or wider."""
    weights = head.weights if isinstance(head, SoftCapped) else head
    wide = jnp.promote_types(x.dtype, jnp.float32)
    found = jnp.dot(x, weights.astype(x.dtype), preferred_element_type=wide)
    return head.capped(found) if isinstance(head, SoftCapped) else found


def before_cap(dlogits: jax.Array, logits: jax.Array, head: Head) -> jax.Array:
    """The gradient with respect to x @ weights, from the one with respect to the logits."""
    return dlogits * (1 - jnp.square(logits / head.cap)) if isinstance(head, SoftCapped) else dlogits
