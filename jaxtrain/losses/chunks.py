"""Losses over positions in chunks, sharded, with the logits of a single chunk alive at a time.

There are two ways to write a loss:

* `from_function`: a plain differentiable function of (hidden, head, targets, mask). JAX differentiates it.
* `chunked_loss`: a function of one chunk's logits that also returns their gradient. It is faster: the backward matrix
  products run in the compute dtype, and with `tensor` no device needs the whole head.

Both compute the gradient in the forward pass and keep it (dx is as large as x, dw as w). They can, because the loss is
a scalar: its cotangent only scales them. So logits are computed once, with three matrix products for each chunk instead
of the four of a backward pass that recomputes them. If nothing is differentiated (evaluation), XLA drops the other two.

Positions stay on their devices: inside `shard_map` each device flattens its own rows. W is gathered once over `fsdp`
before the chunks, and its gradient reduced once after them; in Auto mode XLA would reduce [D, V] in every chunk.
Shapes beyond the legend of interfaces.py: C positions of a chunk; V may be a device's slice of the vocabulary.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from jaxtrain.distributed.sharding import BATCH_MESH_AXES, spec
from jaxtrain.errors import UserError
from jaxtrain.interfaces import LossFn
from jaxtrain.losses.head import Head, before_cap, logits

Sums = dict[str, jax.Array]  # fp32 scalars; only "loss" is differentiated
NEVER = -1e30  # the logit of padding: zero probability, and finite after division by a temperature
CHUNK_TOKENS = 1024
Arrays = tuple[jax.Array, ...]
Constants = tuple[Arrays, Arrays, Arrays]  # rows, heads, scalars
Ways = dict[str, int]  # sizes of the mesh axes larger than 1


@dataclasses.dataclass
class Vocabulary:
    """A device's slice of the vocabulary.

    Attributes:
        columns: int32 [1, V], the ids of the slice.
        split: Whether other devices hold the rest. If so, `sum`, `max` and `largest` reduce over them.
    """

    columns: jax.Array
    split: bool

    def sum(self, x: jax.Array) -> jax.Array:
        """Sums x over the devices that share the vocabulary."""
        return jax.lax.psum(x, "tensor") if self.split else x

    def max(self, x: jax.Array) -> jax.Array:
        """The maximum of x over the devices that share the vocabulary."""
        return jax.lax.pmax(x, "tensor") if self.split else x

    def largest(self, x_CV: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
        """The k largest values over the whole vocabulary, descending, and their ids, [C, K]. k is at most its size."""
        top, ids = jax.lax.top_k(x_CV, min(k, x_CV.shape[1]))
        ids += self.columns[0, 0]
        if self.split:
            top, ids = (jax.lax.all_gather(found, "tensor", axis=1, tiled=True) for found in (top, ids))
            top, places = jax.lax.top_k(top, k)
            ids = jnp.take_along_axis(ids, places, axis=1)
        return top, ids

    def local(self, ids: jax.Array, size: int) -> jax.Array:
        """The columns of ids in a slice of this size. Those of other devices get `size`, which is out of bounds."""
        columns = ids - self.columns[0, 0]
        return jnp.where((columns >= 0) & (columns < size), columns, size)

    def pick(self, x_CV: jax.Array, ids_C: jax.Array) -> jax.Array:
        """x_CV at ids_C, fp32 [C]; 0 if the id is outside the slice."""
        local_C = ids_C - self.columns[0, 0]
        picked_C = jnp.take_along_axis(x_CV, local_C[:, None], axis=1, mode="clip")[:, 0]
        return jnp.where((local_C >= 0) & (local_C < x_CV.shape[1]), picked_C, 0.0)


# (logits_CV fp32, vocabulary, *rows of the chunk [C, ...], *heads [*, V], *scalars) -> (sums, gradient of sums["loss"]
# with respect to logits_CV). Rows of zeros pad the last chunk and must contribute nothing.
ChunkFn = Callable[..., tuple[Sums, jax.Array]]


def from_function(function: Callable[..., Any], mesh: Mesh | None, chunk_tokens: int = CHUNK_TOKENS) -> LossFn:
    """Turns a plain function into a loss: chunked, sharded, and differentiated by JAX.

    Args:
        function: (x_CD, w_DV, targets_C, mask_C) -> a dict of sums over the positions where the mask is True, fp32
            scalars, including "loss"; or the loss alone. x and w are in the compute dtype. w has all its columns;
            columns from the vocabulary size on are padding. The logits are `x @ w`. Targets are 0 where the mask is
            False.
        mesh: The run's mesh. Devices along `tensor` split the positions.
        chunk_tokens: The most positions per chunk on each device. The function may allocate arrays of [C, V].

    Returns:
        The loss function.
    """

    def device(ways: Ways, x_BTD: jax.Array, w_DV: Head, constants: Constants) -> tuple[Sums, Any, Any]:
        (targets_BT, mask_BT), _, _ = constants
        tensor = ways.get("tensor", 1)
        head_DV = _gather(w_DV.astype(x_BTD.dtype), ways)
        if tensor > 1:
            head_DV = jax.lax.all_gather(head_DV, "tensor", axis=1, tiled=True)
        (weights_DV,), tree = jax.tree.flatten(head_DV)
        rows = _cut((x_BTD, jnp.where(mask_BT, targets_BT, 0), mask_BT), chunk_tokens, tensor)
        if tensor > 1:
            share = rows[0].shape[0] // tensor
            begin = jax.lax.axis_index("tensor") * share
            rows = tuple(jax.lax.dynamic_slice_in_dim(array, begin, share) for array in rows)

        def loss(x_CD: jax.Array, weights_DV: jax.Array, *rest: jax.Array) -> tuple[jax.Array, Sums]:
            found = function(x_CD, tree.unflatten([weights_DV]), *rest)
            sums = found if isinstance(found, dict) else {"loss": found}
            return sums["loss"], sums

        def body(dw_DV: jax.Array, chunk: Arrays) -> tuple[jax.Array, Any]:
            (_, sums), (dx_CD, dw) = jax.value_and_grad(loss, (0, 1), has_aux=True)(chunk[0], weights_DV, *chunk[1:])
            return dw_DV + dw.astype(jnp.float32), (sums, dx_CD)

        dw_DV, (sums, dx) = jax.lax.scan(body, jnp.zeros(head_DV.shape, jnp.float32), rows)
        sums = jax.tree.map(jnp.sum, sums)
        if tensor > 1:
            dx = jax.lax.all_gather(dx, "tensor", tiled=True)
            dw_DV = jax.lax.psum_scatter(dw_DV, "tensor", scatter_dimension=1, tiled=True)
            sums = jax.lax.psum(sums, "tensor")
        return _reduced(sums, dx, dw_DV, x_BTD, w_DV, ways)

    return _differentiable(device, mesh)


def chunked_loss(chunk_fn: ChunkFn, mesh: Mesh | None, chunk_tokens: int) -> Callable[..., Sums]:
    """Builds a loss from a function of one chunk's logits.

    The loss is differentiable with respect to x and w through sums["loss"]. No gradient flows through the other sums,
    which are for reporting, or into rows, heads and scalars. Logits are x @ w in x's dtype with fp32 accumulation; dw
    is accumulated in fp32 over chunks and devices. With `tensor` the head stays split by vocabulary: only [C]
    statistics and dx are reduced.

    Args:
        chunk_fn: What the loss does to a chunk.
        mesh: The run's mesh.
        chunk_tokens: The most positions per chunk on each device.

    Returns:
        A function (x_BTD, w_DV, *rows, heads=(), scalars=()) -> sums over all positions, fp32. Each of `rows` is
        [B, T, ...]. Each of `heads` (a teacher's) is [*, V], sharded like w.
    """

    def device(ways: Ways, x_BTD: jax.Array, w_DV: Head, constants: Constants) -> tuple[Sums, Any, Any]:
        rows, heads, scalars = constants
        vocabulary = _vocabulary(w_DV, ways)
        head_DV, heads = _gather((w_DV.astype(x_BTD.dtype), heads), ways)
        (weights_DV,) = jax.tree.leaves(head_DV)

        def body(dw_DV: jax.Array, chunk: Arrays) -> tuple[jax.Array, Any]:
            x_CD, *rows_C = chunk
            logits_CV = logits(x_CD, head_DV)
            sums, dlogits_CV = chunk_fn(logits_CV, vocabulary, *rows_C, *heads, *scalars)
            dlogits_CV = before_cap(dlogits_CV, logits_CV, head_DV).astype(x_CD.dtype)
            # Reduced in fp32: a bf16 psum inside shard_map aborts XLA on CPU.
            dx_CD = vocabulary.sum(jnp.einsum("CV,DV->CD", dlogits_CV, weights_DV, preferred_element_type=jnp.float32))
            dw_DV += jnp.einsum("CD,CV->DV", x_CD, dlogits_CV, preferred_element_type=jnp.float32)
            return dw_DV, (sums, dx_CD.astype(x_CD.dtype))

        zero_DV = jnp.zeros(head_DV.shape, jnp.float32)
        dw_DV, (sums, dx) = jax.lax.scan(body, zero_DV, _cut((x_BTD, *rows), chunk_tokens, 1))
        return _reduced(jax.tree.map(jnp.sum, sums), dx, dw_DV, x_BTD, w_DV, ways)

    return _differentiable(device, mesh)


def for_each_position(function: Callable[..., Any], mesh: Mesh | None, chunk_tokens: int = CHUNK_TOKENS) -> Any:
    """Computes values of single positions from their logits, a chunk at a time. Not differentiable.

    Args:
        function: (logits_CV fp32, vocabulary, *rows of the chunk [C]) -> arrays [C].
        mesh: The run's mesh.
        chunk_tokens: The most positions per chunk on each device.

    Returns:
        A function (x_BTD, w_DV, *rows [B, T]) -> the arrays of all positions, [B, T], sharded like the batch.
    """

    def device(ways: Ways, x_BTD: jax.Array, w_DV: Head, rows: Arrays) -> Any:
        B, T, _ = x_BTD.shape
        vocabulary, head_DV = _vocabulary(w_DV, ways), _gather(w_DV.astype(x_BTD.dtype), ways)

        def values(chunk: Arrays) -> Any:
            return function(logits(chunk[0], head_DV), vocabulary, *chunk[1:])

        found = jax.lax.map(values, _cut((x_BTD, *rows), chunk_tokens, 1))
        return jax.tree.map(lambda array: array.reshape(-1)[: B * T].reshape(B, T), found)

    def apply(x_BTD: jax.Array, w_DV: Head, *rows: jax.Array) -> Any:
        if mesh is None:
            return device({}, x_BTD, w_DV, rows)
        batch = spec(("batch", "sequence"))
        return jax.shard_map(
            functools.partial(device, _ways(mesh)),
            mesh=mesh,
            in_specs=(batch, spec(("embed", "vocab")), batch),
            out_specs=batch,
            check_vma=False,  # as in `_differentiable`
        )(x_BTD, w_DV, rows)

    return apply


def _differentiable(device: Callable[..., tuple[Sums, Any, Any]], mesh: Mesh | None) -> Callable[..., Sums]:
    """The loss whose value and gradient `device` computes on each device from its rows of x and its slice of w."""

    def with_gradients(x_BTD: jax.Array, w_DV: Head, constants: Constants) -> tuple[Sums, Any, Any]:
        if mesh is None:
            return device({}, x_BTD, w_DV, constants)
        for size, names, what in (
            (x_BTD.shape[0], BATCH_MESH_AXES, "batch size"),
            (x_BTD.shape[1], ("context",), "seq_len"),
        ):
            product = math.prod(mesh.shape[name] for name in names)
            if size % product:
                raise UserError(
                    f"{what} {size} is not divisible by mesh.{' * mesh.'.join(names)} = {product}. Make {what} a "
                    f"multiple of {product}, or shrink that part of the mesh."
                )
        batch, head = spec(("batch", "sequence")), spec(("embed", "vocab"))
        return jax.shard_map(
            functools.partial(device, _ways(mesh)),
            mesh=mesh,
            in_specs=(batch, head, (batch, head, PartitionSpec())),
            out_specs=(PartitionSpec(), batch, head),
            check_vma=False,  # nothing differentiates through it, so replication need not be tracked
        )(x_BTD, w_DV, constants)

    @jax.custom_vjp
    def loss(x_BTD: jax.Array, w_DV: Head, constants: Constants) -> Sums:
        return with_gradients(x_BTD, w_DV, constants)[0]

    def forward(x_BTD: jax.Array, w_DV: Head, constants: Constants) -> tuple[Sums, tuple]:
        sums, dx_BTD, dw_DV = with_gradients(x_BTD, w_DV, constants)
        return sums, (dx_BTD, dw_DV)

    def backward(gradients: tuple, cotangents: Sums) -> tuple:
        scale = cotangents["loss"]
        scaled = jax.tree.map(lambda g: (scale * g.astype(jnp.float32)).astype(g.dtype), gradients)
        return (*scaled, None)

    loss.defvjp(forward, backward)
    return lambda x_BTD, w_DV, *rows, heads=(), scalars=(): loss(x_BTD, w_DV, (rows, heads, scalars))


def _ways(mesh: Mesh) -> Ways:
    return {name: size for name, size in mesh.shape.items() if size > 1}


def _vocabulary(w_DV: Head, ways: Ways) -> Vocabulary:
    V = w_DV.shape[1]
    columns = jnp.arange(V, dtype=jnp.int32)[None, :]
    if "tensor" in ways:
        columns += jax.lax.axis_index("tensor") * V
    return Vocabulary(columns, "tensor" in ways)


def _gather(heads: Any, ways: Ways) -> Any:
    return jax.lax.all_gather(heads, "fsdp", axis=0, tiled=True) if "fsdp" in ways else heads


def _cut(rows: Arrays, chunk_tokens: int, multiple: int) -> Arrays:
    """[B, T, ...] -> [chunks, C, ...], padded with zeros; the number of chunks is a multiple of `multiple`."""
    N = rows[0].shape[0] * rows[0].shape[1]
    num_chunks = -(-N // (chunk_tokens * multiple)) * multiple
    C = -(-N // num_chunks)

    def cut(array: jax.Array) -> jax.Array:
        flat = array.reshape(N, *array.shape[2:])
        padding = [(0, num_chunks * C - N)] + [(0, 0)] * (flat.ndim - 1)
        return jnp.pad(flat, padding).reshape(num_chunks, C, *flat.shape[1:])

    return tuple(map(cut, rows))


def _reduced(
    sums: Sums, dx: jax.Array, dw_DV: jax.Array, x_BTD: jax.Array, w_DV: Head, ways: Ways
) -> tuple[Sums, jax.Array, jax.Array]:
    """Combines a device's sums and gradients into the batch's: dx [chunks, C, D] in x's shape, dw in w's."""
    B, T, D = x_BTD.shape
    dx_BTD = dx.reshape(-1, D)[: B * T].reshape(B, T, D)
    copies = tuple(name for name in ("data", "expert", "context") if name in ways)
    if "fsdp" in ways:
        dw_DV = jax.lax.psum_scatter(dw_DV, "fsdp", scatter_dimension=0, tiled=True)
        sums = jax.lax.psum(sums, "fsdp")
    if copies:
        dw_DV, sums = jax.lax.psum((dw_DV, sums), copies)
    return sums, dx_BTD, jax.tree.map(lambda _: dw_DV.astype(w_DV.dtype), w_DV)
