"""The train step and the evaluation step: pure functions (state, batch) → (state, metrics), compiled ahead of time."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxtrain.data import fingerprint
from jaxtrain.distributed import sharding
from jaxtrain.errors import UserError
from jaxtrain.interfaces import BATCH_FIELDS, RECORDS, LossFn
from jaxtrain.losses.distillation import DistillationFn
from jaxtrain.model.attention import compiler_options
from jaxtrain.model.llama import Llama
from jaxtrain.optim.base import Optimizer
from jaxtrain.optim.clip import clip_by_global_norm
from jaxtrain.trainer.state import State, abstract

Batch = Mapping[str, jax.Array]
Metrics = dict[str, jax.Array]


# A frozen teacher's parameters (() where its records come with the batch), and the weights of cross-entropy and
# divergence, fp32.
Teaching = tuple[Any, Any, Any]


@dataclasses.dataclass(frozen=True)
class Distilled:
    """What a teacher adds to a step. abstract: shapes, types and shardings of its parameters.

    teacher: None where its records come with the batch, `width` bytes for each token.
    """

    teacher: Llama | None
    abstract: Any
    loss: DistillationFn
    width: int = 0


@dataclasses.dataclass(frozen=True)
class StepComponents:
    """What a step is made of. clip_norm: the most that the gradient's global norm may be; None for no clipping.

    distilled: None for training without a teacher; evaluation always is.
    """

    model: Llama
    loss: LossFn
    optimizer: Optimizer
    mesh: Mesh
    clip_norm: float | None
    distilled: Distilled | None = None

    def flops_per_token(self, seq_len: int) -> float:
        """Of the model's training, and of the teacher's forward pass: a third of what its training would take."""
        flops = self.model.flops_per_token(seq_len)
        if self.distilled is None or self.distilled.teacher is None:
            return flops
        return flops + self.distilled.teacher.flops_per_token(seq_len) / 3

    @property
    def record_width(self) -> int:
        """Bytes of a teacher's record that come with each token of a batch; 0 for none."""
        return 0 if self.distilled is None else self.distilled.width


def accumulation(mesh: Mesh, batch_size: int, seq_len: int, micro_batch_tokens: int | None) -> int:
    """In how many micro-batches a batch is taken, so that a device has at most `micro_batch_tokens` at once.

    Raises UserError if the mesh does not divide the batch.
    """
    devices = mesh.shape["data"] * mesh.shape["fsdp"]
    if batch_size % devices:
        raise UserError(
            f"a batch of {batch_size} rows cannot be shared by mesh.data * mesh.fsdp = {devices}: batch sizes follow "
            f"from the config alone, so that another machine trains on the same batches. Sizes of data * fsdp that "
            f"work: {', '.join(str(d) for d in sharding.divisors(batch_size) if d <= 4096)}."
        )
    if seq_len % mesh.shape["context"]:
        raise UserError(f"seq_len={seq_len} cannot be shared by mesh.context={mesh.shape['context']}.")
    rows = batch_size // devices
    if micro_batch_tokens is None:
        return 1
    tokens = seq_len // mesh.shape["context"]
    return next(a for a in sharding.divisors(rows) if a == rows or rows // a * tokens <= micro_batch_tokens)


def split_batch(batch: Batch, count: int, mesh: Mesh) -> Batch:
    """[B, T] → [count, B / count, T]. Micro-batch a is rows a::count: each device splits its own rows."""

    def split(x_BT: jax.Array) -> jax.Array:
        x = x_BT.reshape(-1, count, *x_BT.shape[1:]).swapaxes(0, 1)
        return sharding.constrain(x, mesh, (None, "batch", "sequence"))

    return {name: split(x_BT) for name, x_BT in batch.items()}


def _loss_sums(parts: StepComponents, params: Any, batch: Batch) -> tuple[jax.Array, Metrics]:
    x_BTD = parts.model.hidden(params, batch["tokens"], batch["segment_ids"], batch["positions"])
    sums = parts.loss(x_BTD, parts.model.head(params), batch["targets"], batch["loss_mask"])
    return sums["loss"], sums


def _distilled_sums(parts: StepComponents, params: Any, batch: Batch, teaching: Teaching) -> tuple[jax.Array, Metrics]:
    distilled = parts.distilled
    assert distilled is not None
    # Both closed over and cut off: nothing of the teacher's forward pass is kept for a backward pass.
    frozen, ce_weight, kd_weight = jax.lax.stop_gradient(teaching)
    inputs = (batch["tokens"], batch["segment_ids"], batch["positions"])
    if distilled.teacher is None:
        says = (batch[RECORDS],)
    else:
        says = (distilled.teacher.hidden(frozen, *inputs), distilled.teacher.head(frozen))
    x_BTD = parts.model.hidden(params, *inputs)
    rest = (batch["targets"], batch["loss_mask"], ce_weight, kd_weight)
    sums = distilled.loss(x_BTD, parts.model.head(params), *says, *rest)
    return sums["loss"], sums


def _gradients(
    parts: StepComponents, params: Any, batch: Batch, count: int, teaching: Teaching | None
) -> tuple[Any, Metrics]:
    """Sums over the whole batch of the loss's parts, and the gradient of the sum, in fp32."""

    def sums(params: Any, batch: Batch) -> tuple[jax.Array, Metrics]:
        return _loss_sums(parts, params, batch) if teaching is None else _distilled_sums(parts, params, batch, teaching)

    differentiate = jax.grad(sums, has_aux=True)
    if count == 1:
        return differentiate(params, batch)

    def add(total: Any, micro_batch: Batch) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, differentiate(params, micro_batch)), None

    micro_batches = split_batch(batch, count, parts.mesh)
    shapes = jax.eval_shape(differentiate, params, {name: x[0] for name, x in micro_batches.items()})
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    layout = sharding.tree_shardings(parts.mesh, parts.model.axes)
    zeros = (jax.lax.with_sharding_constraint(zeros[0], layout), zeros[1])
    return jax.lax.scan(add, zeros, micro_batches)[0]


def train_step(parts: StepComponents, micro_batches: int) -> Callable[..., tuple[State, Metrics]]:
    """(state, batch, learning_rate fp32, rows_before (uint32 low, high)[, teaching]) → (state, metrics).

    teaching: with a teacher only. It is no part of the state: not donated, not saved, and has no gradient.

    Loss and gradient are means over the tokens of the whole batch that have a loss, however it is cut. A non-finite
    loss or gradient leaves parameters and optimizer alone and is counted. A batch without any such token changes
    nothing but the step.
    """

    def step(
        state: State, batch: Batch, learning_rate: jax.Array, rows_before: Any, teaching: Teaching | None = None
    ) -> tuple[State, Metrics]:
        params, opt, meta = state["params"], state["opt"], state["meta"]
        grads, sums = _gradients(parts, params, batch, micro_batches, teaching)
        tokens = batch["loss_mask"].sum(dtype=jnp.int32)
        scale = 1.0 / jnp.maximum(tokens, 1).astype(jnp.float32)
        grads = jax.tree.map(lambda g: g * scale, grads)
        grads, norm = clip_by_global_norm(grads, jnp.inf if parts.clip_norm is None else parts.clip_norm)
        finite = jnp.isfinite(norm) & jnp.isfinite(sums["loss"])
        apply = finite & (tokens > 0)
        new = parts.optimizer.update(grads, opt, params, learning_rate)
        params, opt = jax.tree.map(lambda a, b: jnp.where(apply, a, b), new, (params, opt))
        numbers = fingerprint.row_numbers(rows_before, batch["tokens"].shape[0], jnp)
        skipped = (~finite).astype(jnp.int32)
        meta = {
            "step": meta["step"] + 1,
            "fingerprint": meta["fingerprint"] + fingerprint.of_rows(batch, *numbers, jnp),
            "skipped": meta["skipped"] + skipped,
            "skipped_in_a_row": jnp.where(
                tokens > 0, (meta["skipped_in_a_row"] + 1) * skipped, meta["skipped_in_a_row"]
            ),
        }
        metrics = {name: value * scale for name, value in sums.items()}
        metrics |= {"grad_norm": norm, **{name: meta[name] for name in ("fingerprint", "skipped", "skipped_in_a_row")}}
        return {"params": params, "opt": opt, "meta": meta}, metrics

    return step


def eval_step(parts: StepComponents) -> Callable[..., Metrics]:
    """(params, batch, token_bytes int32 [V]) → sums: `nats`, `tokens`, and `bytes` that the targets stand for."""

    def step(params: Any, batch: Batch, token_bytes_V: jax.Array) -> Metrics:
        _, sums = _loss_sums(parts, params, batch)
        mask_BT = batch["loss_mask"]
        bytes_BT = jnp.where(mask_BT, token_bytes_V[batch["targets"]], 0)
        return {"nats": sums["ce_loss"], "tokens": mask_BT.sum(dtype=jnp.int32), "bytes": bytes_BT.sum(dtype=jnp.int32)}

    return step


def abstract_batch(mesh: Mesh, batch_size: int, seq_len: int, width: int = 0) -> dict[str, jax.ShapeDtypeStruct]:
    """width: bytes of a teacher's record for each token; 0 for a batch without."""
    layout = sharding.batch_sharding(mesh)
    types = {name: np.dtype(bool) if name == "loss_mask" else np.dtype(np.int32) for name in BATCH_FIELDS}
    batch = {name: jax.ShapeDtypeStruct((batch_size, seq_len), types[name], sharding=layout) for name in BATCH_FIELDS}
    if width:
        batch[RECORDS] = jax.ShapeDtypeStruct((batch_size, seq_len, width), np.uint8, sharding=layout)
    return batch


def lower_train_step(parts: StepComponents, batch_size: int, seq_len: int, micro_batches: int) -> Any:
    """The train step for one shape, traced; `.compile()` gives the executable. The state is donated."""
    whole = sharding.replicated(parts.mesh)
    state = abstract(parts.model, parts.optimizer, parts.mesh)
    layout = jax.tree.map(lambda leaf: leaf.sharding, state)
    scalar = jax.ShapeDtypeStruct((), np.float32, sharding=whole)
    word = jax.ShapeDtypeStruct((), np.uint32, sharding=whole)
    teacher = None if parts.distilled is None else parts.distilled.teacher
    models = (parts.model,) if teacher is None else (parts.model, teacher)
    kernels = (model.attention_choice(batch_size // micro_batches, seq_len).name for model in models)
    options = compiler_options(parts.mesh, *kernels)
    function = jax.jit(
        train_step(parts, micro_batches), donate_argnums=0, out_shardings=(layout, whole), compiler_options=options
    )
    inputs = (state, abstract_batch(parts.mesh, batch_size, seq_len, parts.record_width), scalar, (word, word))
    if parts.distilled is None:
        return function.lower(*inputs)
    return function.lower(*inputs, (parts.distilled.abstract, scalar, scalar))
