"""The train step and the evaluation step: pure functions, compiled ahead of time for each batch shape.

One train step, from top to bottom:

1. `_gradients` runs the model and the loss on each micro-batch and accumulates sums and gradients.
2. Sums and gradients are divided by the number of tokens with a loss in the whole batch, so the result does not depend
   on micro-batches or the mesh.
3. The gradient is clipped, and the optimizer computes new parameters. If the loss or the gradient is not finite, the
   old parameters and optimizer state are kept.
4. The fingerprint is updated with the batch.

There is no explicit communication here: parameters and batches have shardings (distributed/sharding.py), from which XLA
derives the collectives. Only losses, attention and Muon specify communication explicitly.
"""

import copy
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from jaxtrain.data import fingerprint
from jaxtrain.distributed import sharding
from jaxtrain.errors import UserError
from jaxtrain.interfaces import (
    BATCH_FIELDS,
    RECORDS,
    AveragingOptimizer,
    BoundedModel,
    LossFn,
    Model,
    Optimizer,
    Params,
)
from jaxtrain.losses.chunks import Vocabulary, for_each_position
from jaxtrain.losses.cross_entropy import CrossEntropy, softmax_terms
from jaxtrain.losses.distillation import DistillationFn
from jaxtrain.trainer.spikes import NO_LOSS, SpikeRule
from jaxtrain.trainer.state import State, abstract

Batch = Mapping[str, jax.Array]
Metrics = dict[str, jax.Array]

# A frozen teacher's parameters (if its records are in the batch: the tables of `Aligned`, or ()), and the weights of
# loss and divergence, fp32.
Teaching = tuple[Any, Any, Any]


@dataclasses.dataclass(frozen=True)
class Distilled:
    """What a teacher adds to a step.

    Attributes:
        teacher: The teacher model; None if its records are in the batch.
        abstract: Shapes, types and shardings of its parameters, or of the tables of `Aligned` (losses/cached.py).
        loss: The distillation loss, which replaces the step's loss.
        width: Bytes of a record per token; 0 with a teacher model.
    """

    teacher: Model | None
    abstract: Any
    loss: DistillationFn
    width: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Variant:
    """One way to compute a step. Variants of a step differ by rounding, memory and time.

    Attributes:
        micro_batches: Number of micro-batches.
        remat: The model's `remat`; None for what its config says.
        scan_layers: The model's `scan_layers`; None for what its config says.
        chunk_tokens: The loss's `chunk_tokens`; None for what its config says.
    """

    micro_batches: int
    remat: str | None = None
    scan_layers: bool | None = None
    chunk_tokens: int | None = None

    @property
    def how(self) -> str:
        """What it sets besides micro-batches, such as "remat=dots, loss in chunks of 1,024"."""
        said = [] if self.remat is None else [f"remat={self.remat}"]
        said += [] if self.chunk_tokens is None else [f"loss in chunks of {self.chunk_tokens:,}"]
        return ", ".join([*said, *(["layers unrolled"] if self.scan_layers is False else [])])

    def __str__(self) -> str:
        count = f"{self.micro_batches} micro-batch{'es' * (self.micro_batches > 1)}"
        return ", ".join(filter(None, (self.how, count)))


@dataclasses.dataclass(frozen=True)
class StepComponents:
    """The components of a step.

    Attributes:
        clip_norm: Maximum global norm of the gradient; None for no clipping.
        distilled: None for training without a teacher. Evaluation never uses it.
        options: XLA options for all programs.
        losses: Builds `loss` and `distilled` with other chunks (positions); None if the loss has no `chunk_tokens`.
        spikes: When a step is a spike; None to compare nothing.
        qk_clip: The largest attention logit that a step leaves; None for any. `model` is a ClippableModel, then.
    """

    model: Model
    loss: LossFn
    optimizer: Optimizer
    mesh: Mesh
    clip_norm: float | None
    distilled: Distilled | None = None
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    losses: Callable[[int], tuple[LossFn, Distilled | None]] | None = None
    spikes: SpikeRule | None = None
    qk_clip: float | None = None

    def arranged(self, variant: Variant) -> "StepComponents":
        """The same step, computed as a variant says."""
        # A copy shares what the model has found out about its attention kernels.
        model = copy.copy(self.model)
        changes = {"remat": variant.remat, "scan_layers": variant.scan_layers}
        changes = {name: value for name, value in changes.items() if value is not None}
        model.config = dataclasses.replace(model.config, **changes) if changes else model.config
        loss, distilled = self.loss, self.distilled
        if variant.chunk_tokens is not None and self.losses is not None:
            loss, distilled = self.losses(variant.chunk_tokens)
        return dataclasses.replace(self, model=model, loss=loss, distilled=distilled)

    def flops_per_token(self, seq_len: int) -> float:
        """FLOPs per token of training the model, plus the teacher's forward pass (a third of its training FLOPs)."""
        flops = self.model.flops_per_token(seq_len)
        if self.distilled is None or self.distilled.teacher is None:
            return flops
        return flops + self.distilled.teacher.flops_per_token(seq_len) / 3

    @property
    def record_width(self) -> int:
        """Bytes of a teacher's record per token of a batch; 0 without records."""
        return 0 if self.distilled is None else self.distilled.width

    def most_documents(self, batch_size: int, seq_len: int) -> list[tuple[int, int]]:
        """The bounds of the models on a micro-batch of this shape, see `interfaces.BoundedModel`."""
        models = (self.model, None if self.distilled is None else self.distilled.teacher)
        bounds = (one.most_documents(batch_size, seq_len) for one in models if isinstance(one, BoundedModel))
        return [bound for bound in bounds if bound is not None]

    def unbounded(self) -> "StepComponents":
        """The same components for any number of documents."""
        model, distilled = self.model, self.distilled
        if distilled is not None and isinstance(distilled.teacher, BoundedModel):
            distilled = dataclasses.replace(distilled, teacher=distilled.teacher.unbounded())
        if isinstance(model, BoundedModel):
            model = model.unbounded()
        return dataclasses.replace(self, model=model, distilled=distilled)

    def compiler_options(self, batch_size: int, seq_len: int) -> dict[str, Any]:
        """XLA options for a step with micro-batches of this shape. The models' own come last: they need those."""
        teacher = None if self.distilled is None else self.distilled.teacher
        options = {} if teacher is None else teacher.compiler_options(batch_size, seq_len)
        return {**self.options, **options, **self.model.compiler_options(batch_size, seq_len)}


def train_step(components: StepComponents, micro_batches: int) -> Callable[..., tuple[Any, ...]]:
    """Returns a function (state, batch, learning_rate fp32, rows_before[, teaching]) -> (state, metrics).

    `rows_before` is the number of rows trained on before this step as uint32 (low, high). `teaching` is given only with
    a teacher. It is not part of the state, so it is neither donated nor saved, and gets no gradient.

    Loss and gradient are means over all tokens of the batch that have a loss, independent of micro-batches. If the loss
    or gradient is not finite, parameters and optimizer state are kept and the skip is counted. A batch with no such
    tokens changes only the step.

    With `components.spikes` the function also takes `history`, fp32 [2, W], and returns a third value: the history with
    this step's `values` (loss and gradient norm) added, whether the step is a `spike`, and the cross-entropy of each
    token before the update (`losses`, [B, T]), which is zero unless it is one.

    Args:
        components: The components of the step.
        micro_batches: Number of micro-batches.
    """

    model: Any = components.model
    clips = components.qk_clip is not None
    watching = dataclasses.replace(components, model=model.watching_logits()) if clips else components

    def step(
        state: State,
        batch: Batch,
        learning_rate: jax.Array,
        rows_before: Any,
        teaching: Teaching | None = None,
        history: jax.Array | None = None,
    ) -> tuple[Any, ...]:
        params, opt, meta = state["params"], state["opt"], state["meta"]
        optimizer = components.optimizer
        point = optimizer.gradient_at(params, opt) if isinstance(optimizer, AveragingOptimizer) else params
        grads, sums, max_logits = _gradients(watching, point, batch, micro_batches, teaching)
        tokens = batch["loss_mask"].sum(dtype=jnp.int32)
        scale = 1.0 / jnp.maximum(tokens, 1).astype(jnp.float32)
        grads = jax.tree.map(lambda g: g * scale, grads)
        norm = optax.tree.norm(grads)
        if components.clip_norm is not None:
            # Pascanu et al. 2013, algorithm 1.
            shrink = components.clip_norm / jnp.maximum(norm, components.clip_norm)
            grads = jax.tree.map(lambda g: g * shrink, grads)
        finite = keeps = jnp.isfinite(norm) & jnp.isfinite(sums["loss"])
        watched = ()
        if components.spikes is not None and history is not None:
            found = _watch(components, point, batch, micro_batches, history, sums["loss"] * scale, norm)
            keeps = finite & ~found["spike"] if components.spikes.skips else finite
            watched = (found,)
        new = optimizer.update(grads, opt, params, learning_rate)
        if clips:
            new = (model.clip_logits(new[0], max_logits, components.qk_clip), new[1])
        # A select, not a branch: XLA fuses it into the update, and all devices do the same work.
        apply = keeps & (tokens > 0)
        params, opt = jax.tree.map(lambda a, b: jnp.where(apply, a, b), new, (params, opt))
        numbers = fingerprint.row_numbers(rows_before, batch["tokens"].shape[0], jnp)
        skipped = (~keeps).astype(jnp.int32)
        in_a_row = meta["skipped_in_a_row"]
        meta = {
            "step": meta["step"] + 1,
            "fingerprint": meta["fingerprint"] + fingerprint.of_rows(batch, *numbers, jnp),
            "skipped": meta["skipped"] + skipped,
            "skipped_in_a_row": jnp.where(tokens > 0, (in_a_row + 1) * skipped, in_a_row),
        }
        metrics = {name: value * scale for name, value in sums.items()}
        metrics |= {"grad_norm": norm, **{name: meta[name] for name in ("fingerprint", "skipped", "skipped_in_a_row")}}
        if max_logits is not None:
            metrics["max_logit"] = max_logits.max()
        return {"params": params, "opt": opt, "meta": meta}, metrics, *watched

    return step


def _watch(
    components: StepComponents,
    params: Params,
    batch: Batch,
    micro_batches: int,
    history_2W: jax.Array,
    loss: jax.Array,
    norm: jax.Array,
) -> Metrics:
    """Compares the step with those before it. If it is a spike, one more forward pass gives each token's loss."""
    assert components.spikes is not None
    values_2 = jnp.stack([loss, norm])
    counts = batch["loss_mask"].any()
    spike = counts & (components.spikes.applies(history_2W, values_2) | ~jnp.isfinite(values_2).all())
    added_21 = jnp.where(jnp.isfinite(values_2).all(), values_2, jnp.nan)[:, None]
    return {
        "history": jnp.where(counts, jnp.concatenate([history_2W[:, 1:], added_21], axis=1), history_2W),
        "values": values_2,
        "spike": spike,
        "losses": jax.lax.cond(
            spike,
            lambda: _token_losses(components, params, batch, micro_batches),
            lambda: jnp.zeros(batch["tokens"].shape, jnp.float32),
        ),
    }


def _token_losses(components: StepComponents, params: Params, batch: Batch, micro_batches: int) -> jax.Array:
    """Returns the cross-entropy of every token, fp32 [B, T]; NO_LOSS where there is no target."""

    def loss(logits_CV: jax.Array, vocabulary: Vocabulary, targets_C: jax.Array) -> jax.Array:
        _, _, log_z_C, target_C = softmax_terms(logits_CV, vocabulary, targets_C, components.model.vocab_size)
        return log_z_C - target_C

    losses_BT = of_positions(components, loss, params, batch, micro_batches)
    return jnp.where(batch["loss_mask"], losses_BT, NO_LOSS)


def of_positions(
    components: StepComponents, function: Callable[..., Any], params: Params, batch: Batch, micro_batches: int
) -> Any:
    """Returns values of each position, [B, T], that a function makes of the position's logits and target.

    Args:
        components: The components of the step.
        function: (logits_CV fp32, vocabulary, targets_C) -> arrays [C].
        params: The model's parameters.
        batch: The batch.
        micro_batches: Number of micro-batches.
    """
    model = components.model
    values = for_each_position(function, components.mesh)

    def of_part(part: Batch) -> Any:
        x_BTD = model.hidden(params, part["tokens"], part["segment_ids"], part["positions"]).x
        return values(x_BTD, model.head(params), part["targets"])

    if micro_batches == 1:
        return of_part(batch)
    found = jax.lax.map(of_part, split_batch(batch, micro_batches, components.mesh))
    return jax.tree.map(lambda array: array.swapaxes(0, 1).reshape(batch["tokens"].shape), found)


def _gradients(
    components: StepComponents, params: Params, batch: Batch, count: int, teaching: Teaching | None
) -> tuple[Params, Metrics, jax.Array | None]:
    """Returns the gradient of the batch's summed loss, accumulated over `count` micro-batches, and all sums, fp32.

    The last value is the model's `max_logits` over all of them.
    """

    def loss(params: Params, batch: Batch) -> tuple[jax.Array, tuple[Metrics, jax.Array | None]]:
        sums, max_logits = _sums(components, params, batch, teaching)
        return sums["loss"], (sums, max_logits)

    def differentiate(params: Params, batch: Batch) -> tuple[Params, Metrics, jax.Array | None]:
        grads, (sums, max_logits) = jax.grad(loss, has_aux=True)(params, batch)
        return grads, sums, max_logits

    if count == 1:
        return differentiate(params, batch)

    def add(total: Any, micro_batch: Batch) -> tuple[Any, None]:
        *added, max_logits = differentiate(params, micro_batch)
        return (*jax.tree.map(jnp.add, total[:2], tuple(added)), jax.tree.map(jnp.maximum, total[2], max_logits)), None

    micro_batches = split_batch(batch, count, components.mesh)
    *shapes, tops = jax.eval_shape(differentiate, params, {name: x[0] for name, x in micro_batches.items()})
    grads, sums = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    # Otherwise XLA would replicate the zeros, and with them the sum.
    grads = jax.lax.with_sharding_constraint(grads, sharding.tree_shardings(components.mesh, components.model.axes))
    lowest = jax.tree.map(lambda leaf: jnp.full(leaf.shape, -jnp.inf, leaf.dtype), tops)
    return jax.lax.scan(add, (grads, sums, lowest), micro_batches)[0]


def split_batch(batch: Batch, count: int, mesh: Mesh) -> Batch:
    """Splits [B, T] into [count, B / count, T]. Micro-batch i has rows i::count, so each device splits its own rows."""

    def split(x_BT: jax.Array) -> jax.Array:
        x = x_BT.reshape(-1, count, *x_BT.shape[1:]).swapaxes(0, 1)
        return sharding.constrain(x, mesh, (None, "batch", "sequence"))

    return {name: split(x_BT) for name, x_BT in batch.items()}


def _sums(
    components: StepComponents, params: Params, batch: Batch, teaching: Teaching | None
) -> tuple[Metrics, jax.Array | None]:
    """Returns sums over a micro-batch's tokens with a loss: the loss, its terms, the model's losses and metrics.

    The last value is the model's `max_logits`.
    """
    inputs = (batch["tokens"], batch["segment_ids"], batch["positions"])
    x_BTD, losses, reports, max_logits = components.model.hidden(params, *inputs)
    head_DV = components.model.head(params)
    if components.distilled is None or teaching is None:
        sums = components.loss(x_BTD, head_DV, batch["targets"], batch["loss_mask"])
    else:
        teacher = components.distilled.teacher
        # Stopped gradients: nothing of the teacher's forward pass is kept for a backward pass.
        frozen, ce_weight, kd_weight = jax.lax.stop_gradient(teaching)
        says = (
            (batch[RECORDS], *frozen) if teacher is None else (teacher.hidden(frozen, *inputs).x, teacher.head(frozen))
        )
        rest = (batch["targets"], batch["loss_mask"], ce_weight, kd_weight)
        sums = components.distilled.loss(x_BTD, head_DV, *says, *rest)
    # The model reports means over the micro-batch. Scale them by its tokens, to sum and divide them like the loss.
    tokens = batch["loss_mask"].sum(dtype=jnp.int32).astype(jnp.float32)
    extra = {name: value * tokens for name, value in {**losses, **reports}.items()}
    taken = extra.keys() & {*sums, "grad_norm", "max_logit", "fingerprint", "skipped", "skipped_in_a_row"}
    if taken:
        raise ValueError(f"the model reports {', '.join(sorted(taken))}, which the trainer reports: choose other names")
    return {**sums, **extra, "loss": sum((extra[name] for name in losses), sums["loss"])}, max_logits


def eval_step(components: StepComponents) -> Callable[..., Metrics]:
    """Returns a function (params, batch, token_bytes int32 [V]) -> sums.

    The sums are `nats` of the plain cross-entropy, `tokens`, and `bytes` of the targets' text.
    """
    cross_entropy = CrossEntropy().build(components.model.vocab_size, components.mesh)

    def step(params: Params, batch: Batch, token_bytes_V: jax.Array) -> Metrics:
        x_BTD = components.model.hidden(params, batch["tokens"], batch["segment_ids"], batch["positions"]).x
        mask_BT = batch["loss_mask"]
        arrays = (x_BTD, components.model.head(params), batch["targets"], mask_BT)
        sums = components.loss(*arrays)
        if "ce_loss" not in sums:
            sums = cross_entropy(*arrays)
        bytes_BT = jnp.where(mask_BT, token_bytes_V[batch["targets"]], 0)
        return {"nats": sums["ce_loss"], "tokens": mask_BT.sum(dtype=jnp.int32), "bytes": bytes_BT.sum(dtype=jnp.int32)}

    return step


def accumulation(mesh: Mesh, batch_size: int, seq_len: int, micro_batch_tokens: int | None) -> int:
    """Returns the number of micro-batches, such that each has at most `micro_batch_tokens` tokens per device.

    Args:
        mesh: The device mesh.
        batch_size: Rows of the batch.
        seq_len: Tokens per row.
        micro_batch_tokens: Maximum tokens per device in a micro-batch; None for no maximum.

    Raises:
        UserError: The mesh does not divide the batch.
    """
    devices = sharding.batch_ways(mesh.shape)
    if batch_size % devices:
        expert = " * mesh.expert" * (mesh.shape["expert"] > 1)
        raise UserError(
            f"a batch of {batch_size} rows is not divisible by mesh.data * mesh.fsdp{expert} = {devices}: batch sizes "
            "depend on the config alone, so that every machine trains on the same batches. Values of the product that "
            f"work: {', '.join(str(d) for d in sharding.divisors(batch_size) if d <= 4096)}."
        )
    if seq_len % mesh.shape["context"]:
        raise UserError(f"seq_len={seq_len} is not divisible by mesh.context={mesh.shape['context']}.")
    rows = batch_size // devices
    if micro_batch_tokens is None:
        return 1
    tokens = seq_len // mesh.shape["context"]
    return next(a for a in sharding.divisors(rows) if a == rows or rows // a * tokens <= micro_batch_tokens)


def abstract_batch(mesh: Mesh, batch_size: int, seq_len: int, width: int = 0) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns shapes, types and shardings of a batch.

    Args:
        mesh: The device mesh.
        batch_size: Rows.
        seq_len: Tokens per row.
        width: Bytes of a teacher's record per token; 0 for a batch without records.
    """
    layout = sharding.batch_sharding(mesh)
    types = {name: np.dtype(bool) if name == "loss_mask" else np.dtype(np.int32) for name in BATCH_FIELDS}
    batch = {name: jax.ShapeDtypeStruct((batch_size, seq_len), types[name], sharding=layout) for name in BATCH_FIELDS}
    if width:
        batch[RECORDS] = jax.ShapeDtypeStruct((batch_size, seq_len, width), np.uint8, sharding=layout)
    return batch


def lower_train_step(components: StepComponents, batch_size: int, seq_len: int, micro_batches: int) -> Any:
    """Traces the train step for one shape; `.compile()` returns the executable. The state is donated.

    `history` is given by name.
    """
    mesh = components.mesh
    whole = sharding.replicated(mesh)
    state = abstract(components.model, components.optimizer, mesh)
    layout = jax.tree.map(lambda leaf: leaf.sharding, state)
    scalar = jax.ShapeDtypeStruct((), np.float32, sharding=whole)
    word = jax.ShapeDtypeStruct((), np.uint32, sharding=whole)
    inputs = [state, abstract_batch(mesh, batch_size, seq_len, components.record_width), scalar, (word, word)]
    if components.distilled is not None:
        inputs.append((components.distilled.abstract, scalar, scalar))
    named = {}
    if components.spikes is not None:
        named["history"] = jax.ShapeDtypeStruct((2, components.spikes.window), np.float32, sharding=whole)
    watched = {"history": whole, "values": whole, "spike": whole, "losses": sharding.batch_sharding(mesh)}
    function = jax.jit(
        train_step(components, micro_batches),
        donate_argnums=0,
        out_shardings=(layout, whole) if components.spikes is None else (layout, whole, watched),
        compiler_options=components.compiler_options(batch_size // micro_batches, seq_len),
    )
    return function.lower(*inputs, **named)
