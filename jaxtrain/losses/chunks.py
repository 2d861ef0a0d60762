"""Sums of a loss over positions, and its gradient, with the logits of only one chunk of positions alive at a time.

A loss is given as what it does to one chunk of logits; this file cuts the positions into chunks, spreads them over the
mesh and gives the result its own backward pass. Shapes beyond the legend: C positions of a chunk; V may be a device's
slice of the vocabulary.

The gradient is computed in the forward pass and kept (dx is as large as x, dw as w), because the loss is a scalar: its
cotangent only scales them. So the logits are computed once: three matrix products for each chunk instead of the four of
a backward pass that computes the logits again. Where nothing is differentiated (evaluation) XLA drops the other two.

Positions stay on their devices: inside `shard_map` each device flattens its own rows. W is gathered once over `fsdp`
before the chunks, and its gradient reduced once after them; in Auto mode XLA reduces a [D, V] array in every chunk.
With `tensor` W stays split by vocabulary and only [C] statistics and dx are reduced over it.

A loss may take constants besides: heads of other models (a teacher's), laid out and gathered as w is, and scalars.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from jaxtrain.distributed.sharding import BATCH_MESH_AXES, spec
from jaxtrain.errors import UserError

Sums = dict[str, jax.Array]  # fp32 scalars; "loss" is the one that is differentiated
NEVER = -1e30  # the logit of padding: without probability, and finite, also after a division by a temperature
Arrays = tuple[jax.Array, ...]
Constants = tuple[Arrays, Arrays, Arrays]  # rows, heads, scalars


@dataclasses.dataclass
class Vocabulary:
    """The slice of the vocabulary that a device has. `sum` and `max` reduce over the devices that have the others."""

    columns: jax.Array  # int32 [1, V], the ids of the slice
    split: bool

    def sum(self, x: jax.Array) -> jax.Array:
        return jax.lax.psum(x, "tensor") if self.split else x

    def max(self, x: jax.Array) -> jax.Array:
        return jax.lax.pmax(x, "tensor") if self.split else x

    def kth_largest(self, x_CV: jax.Array, k: int) -> jax.Array:
        """The k-th largest value over the whole vocabulary, [C]; k is at most its size."""
        top = jax.lax.top_k(x_CV, min(k, x_CV.shape[1]))[0]
        if self.split:
            top = jax.lax.all_gather(top, "tensor", axis=1, tiled=True)
            top = jax.lax.top_k(top, k)[0]
        return top[:, -1]

    def pick(self, x_CV: jax.Array, ids_C: jax.Array) -> jax.Array:
        """x_CV at ids_C, fp32 [C]; 0 where the slice does not have the id."""
        local_C = ids_C - self.columns[0, 0]
        picked_C = jnp.take_along_axis(x_CV, local_C[:, None], axis=1, mode="clip")[:, 0]
        return jnp.where((local_C >= 0) & (local_C < x_CV.shape[1]), picked_C, 0.0)


# (logits_CV fp32, vocabulary, *rows of the chunk [C, ...], *heads [*, V], *scalars) → (sums, gradient of sums["loss"]
# by logits_CV). Rows of zeros are added to fill the last chunk: they must add nothing.
ChunkFn = Callable[..., tuple[Sums, jax.Array]]


def chunked_loss(chunk_fn: ChunkFn, mesh: Mesh | None, chunk_tokens: int) -> Callable[..., Sums]:
    """A function (x_BTD, w_DV, *rows, heads=(), scalars=()) → sums over all positions, fp32.

    Differentiable by x and w through sums["loss"]; no gradient passes through the other sums, which are for reports,
    nor to rows, heads and scalars. Logits are x @ w in x's dtype with fp32 accumulation; dw is accumulated in fp32 over
    chunks and devices.

    chunk_tokens: the most positions of a chunk, on each device. rows: [B, T, ...] each. heads: [*, V] each, as w.
    Raises UserError while tracing if the mesh does not divide the rows.
    """

    @jax.custom_vjp
    def loss(x_BTD: jax.Array, w_DV: jax.Array, constants: Constants) -> Sums:
        return _sharded(chunk_fn, mesh, chunk_tokens, x_BTD, w_DV, constants)[0]

    def forward(x_BTD: jax.Array, w_DV: jax.Array, constants: Constants) -> tuple[Sums, tuple]:
        sums, dx_BTD, dw_DV = _sharded(chunk_fn, mesh, chunk_tokens, x_BTD, w_DV, constants)
        return sums, (dx_BTD, dw_DV)

    def backward(gradients: tuple, cotangents: Sums) -> tuple:
        scale = cotangents["loss"]
        return (*((scale * g.astype(jnp.float32)).astype(g.dtype) for g in gradients), None)

    loss.defvjp(forward, backward)

    def with_constants(
        x_BTD: jax.Array, w_DV: jax.Array, *rows: jax.Array, heads: Arrays = (), scalars: Arrays = ()
    ) -> Sums:
        return loss(x_BTD, w_DV, (rows, heads, scalars))

    return with_constants


def _sharded(
    chunk_fn: ChunkFn, mesh: Mesh | None, chunk_tokens: int, x_BTD: jax.Array, w_DV: jax.Array, constants: Constants
) -> tuple[Sums, jax.Array, jax.Array]:
    if mesh is None:
        return _device(chunk_fn, chunk_tokens, {}, x_BTD, w_DV, constants)
    ways = {name: size for name, size in mesh.shape.items() if size > 1}
    for size, names, what in zip(x_BTD.shape, (BATCH_MESH_AXES, ("context",)), ("batch size", "seq_len"), strict=False):
        product = functools.reduce(lambda n, name: n * mesh.shape[name], names, 1)
        if size % product:
            raise UserError(
                f"{what} {size} is not divisible by mesh.{' * mesh.'.join(names)} = {product}. "
                f"Make {what} a multiple of {product}, or that part of the mesh smaller."
            )
    batch, head = spec(("batch", "sequence")), spec(("embed", "vocab"))
    return jax.shard_map(
        functools.partial(_device, chunk_fn, chunk_tokens, ways),
        mesh=mesh,
        in_specs=(batch, head, (batch, head, PartitionSpec())),
        out_specs=(PartitionSpec(), batch, head),
        check_vma=False,  # nothing is differentiated through it, so replication need not be tracked
    )(x_BTD, w_DV, constants)


def _device(
    chunk_fn: ChunkFn, chunk_tokens: int, ways: dict[str, int], x_BTD: jax.Array, w_DV: jax.Array, constants: Constants
) -> tuple[Sums, jax.Array, jax.Array]:
    """One device's part: its rows of x_BTD, its slices of w. ways: sizes of the mesh axes larger than 1."""
    rows, heads, scalars = constants
    B, T, D = x_BTD.shape
    N = B * T
    num_chunks = -(-N // chunk_tokens)
    C = -(-N // num_chunks)
    V = w_DV.shape[1]
    columns = jnp.arange(V, dtype=jnp.int32)[None, :]
    if "tensor" in ways:
        columns += jax.lax.axis_index("tensor") * V
    vocabulary = Vocabulary(columns, "tensor" in ways)
    head_DV = w_DV.astype(x_BTD.dtype)
    if "fsdp" in ways:
        head_DV, heads = jax.lax.all_gather((head_DV, heads), "fsdp", axis=0, tiled=True)

    def cut(rows: jax.Array) -> jax.Array:
        flat = rows.reshape(N, *rows.shape[2:])
        padding = [(0, num_chunks * C - N)] + [(0, 0)] * (flat.ndim - 1)
        return jnp.pad(flat, padding).reshape(num_chunks, C, *flat.shape[1:])

    def body(dw_DV: jax.Array, chunk: tuple[jax.Array, ...]) -> tuple[jax.Array, Any]:
        x_CD, *rows_C = chunk
        logits_CV = jnp.dot(x_CD, head_DV, preferred_element_type=jnp.float32)
        sums, dlogits_CV = chunk_fn(logits_CV, vocabulary, *rows_C, *heads, *scalars)
        dlogits_CV = dlogits_CV.astype(x_CD.dtype)
        # Reduced in fp32: a bf16 psum inside shard_map aborts XLA on CPU.
        dx_CD = vocabulary.sum(jnp.einsum("CV,DV->CD", dlogits_CV, head_DV, preferred_element_type=jnp.float32))
        dw_DV += jnp.einsum("CD,CV->DV", x_CD, dlogits_CV, preferred_element_type=jnp.float32)
        return dw_DV, (sums, dx_CD.astype(x_CD.dtype))

    zero_DV = jnp.zeros(head_DV.shape, jnp.float32)
    dw_DV, (sums, dx) = jax.lax.scan(body, zero_DV, tuple(cut(a) for a in (x_BTD, *rows)))
    dx_BTD = dx.reshape(num_chunks * C, D)[:N].reshape(B, T, D)
    sums = jax.tree.map(jnp.sum, sums)
    copies = tuple(name for name in ("data", "context") if name in ways)
    if "fsdp" in ways:
        dw_DV = jax.lax.psum_scatter(dw_DV, "fsdp", scatter_dimension=0, tiled=True)
        sums = jax.lax.psum(sums, "fsdp")
    if copies:
        dw_DV, sums = jax.lax.psum((dw_DV, sums), copies)
    return sums, dx_BTD, dw_DV.astype(w_DV.dtype)
