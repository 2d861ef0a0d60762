"""The embedding lookup with a gradient that sums the rows of equal tokens in a fixed order.

XLA's own is a scatter. Where GPUs may not use atomic additions (`deterministic`), XLA sorts all of its elements, 134
million for 65,536 tokens of width 2,048; here only the tokens are sorted.
"""

import os

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from jaxtrain.distributed.sharding import spec


def is_wanted(platform: str) -> bool:
    """Whether XLA's flags ask for deterministic operations, on a platform that would use others."""
    flags = os.environ.get("XLA_FLAGS", "")
    names = ("--xla_gpu_exclude_nondeterministic_ops=true", "--xla_gpu_deterministic_ops=true")
    return platform == "gpu" and any(name in flags for name in names)


def lookup(embedding_VD: jax.Array, tokens_BT: jax.Array, mesh: Mesh | None, columns: PartitionSpec) -> jax.Array:
    """Returns rows of the embedding, [B, T, D].

    Args:
        embedding_VD: The embedding, sharded as `vocab` and `embed`.
        tokens_BT: Ids.
        mesh: The device mesh.
        columns: The sharding of the rows, and so of their gradients: several axes split B, one or none T.
    """
    table = spec(("vocab", "embed"))

    def sums(tokens_BT: jax.Array, rows_BTD: jax.Array) -> jax.Array:
        if mesh is None:
            return _sums(tokens_BT, rows_BTD, embedding_VD.shape[0], 0)
        size = embedding_VD.shape[0] // mesh.shape["tensor"]
        found = _sums(tokens_BT, rows_BTD, size, jax.lax.axis_index("tensor") * size)
        return jax.lax.psum(found, tuple(axis for axis in (*columns[0], columns[1]) if axis))

    @jax.custom_vjp
    def rows(embedding_VD: jax.Array) -> jax.Array:
        return embedding_VD[tokens_BT]

    def backward(_: None, gradient_BTD: jax.Array) -> tuple[jax.Array]:
        if mesh is None:
            return (sums(tokens_BT, gradient_BTD),)
        inputs = (PartitionSpec(*columns[:2]), columns)
        summed = jax.shard_map(sums, mesh=mesh, in_specs=inputs, out_specs=table, check_vma=False)
        return (summed(tokens_BT, gradient_BTD),)

    rows.defvjp(lambda embedding_VD: (rows(embedding_VD), None), backward)
    return rows(embedding_VD)


def _sums(tokens_BT: jax.Array, rows_BTD: jax.Array, size: int, first: jax.Array | int) -> jax.Array:
    """Returns the sum of the rows of each token from `first` on, [size, D]: a segmented scan over sorted tokens."""
    tokens_N, rows_ND = tokens_BT.reshape(-1), rows_BTD.reshape(-1, rows_BTD.shape[-1])
    order_N = jnp.argsort(tokens_N)  # stable
    tokens_N, rows_ND = tokens_N[order_N], rows_ND[order_N]
    changes = tokens_N[1:] != tokens_N[:-1]
    begins_N, ends_N = (jnp.concatenate(pair) for pair in ((jnp.ones(1, bool), changes), (changes, jnp.ones(1, bool))))

    def add(a: tuple[jax.Array, jax.Array], b: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        return a[0] | b[0], jnp.where(b[0][:, None], b[1], a[1] + b[1])

    _, sums_ND = jax.lax.associative_scan(add, (begins_N, rows_ND))
    # All other sums go to rows of their own outside, which are dropped.
    rows_N = tokens_N - first
    rows_N = jnp.where(ends_N & (rows_N >= 0) & (rows_N < size), rows_N, size + jnp.arange(len(tokens_N)))
    zeros = jnp.zeros((size, rows_ND.shape[1]), rows_ND.dtype)
    return zeros.at[rows_N].set(sums_ND, mode="drop", unique_indices=True)
