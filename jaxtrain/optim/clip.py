"""Gradient clipping by global norm."""

from typing import Any

import jax
import jax.numpy as jnp


def global_norm(tree: Any) -> jax.Array:
    """The Euclidean norm of all leaves together, an fp32 scalar, squares summed in fp32."""
    return jnp.sqrt(sum(jnp.sum(jnp.square(leaf.astype(jnp.float32))) for leaf in jax.tree.leaves(tree)))


def clip_by_global_norm(grads: Any, max_norm: float) -> tuple[Any, jax.Array]:
    """(grads scaled so that their global norm is at most max_norm, the norm before); Pascanu et al. 2013, algorithm 1.

    Leaves keep their dtype. A norm that is not finite gives gradients that are not: the step's guard skips those.
    """
    norm = global_norm(grads)
    scale = max_norm / jnp.maximum(norm, max_norm)
    return jax.tree.map(lambda g: (g * scale).astype(g.dtype), grads), norm
