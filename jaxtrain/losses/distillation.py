"""Distillation from hidden states and heads of a student and a teacher, in chunks of positions.

Neither the student's nor the teacher's logits of all positions exist at once. Shapes: see interfaces.py; E is the
teacher's width, C positions per chunk.
"""

import dataclasses
from collections.abc import Callable
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxtrain.errors import UserError
from jaxtrain.interfaces import LossConfig, Schedule, ScheduleConfig
from jaxtrain.losses.cached import Aligned, Layout
from jaxtrain.losses.chunks import CHUNK_TOKENS, NEVER, ChunkFn, Sums, Vocabulary, chunked_loss
from jaxtrain.losses.divergences import (
    ULD,
    Divergence,
    ForwardKL,
    TopK,
    cells_and_tail,
    kept_and_tail,
    log_sum,
    sorted_distance,
)
from jaxtrain.losses.head import Head, logits

# Larger vocabularies get smaller chunks to keep a chunk's memory constant.
_FULL_CHUNK_VOCABULARY = 32_768

# (x_BTD, w_DV, teacher's x_BTE and w_EV or its records_BTW and the tables of `Aligned`, targets_BT, mask_BT, ce_weight,
# kd_weight) -> sums
DistillationFn = Callable[..., Sums]


@runtime_checkable
class ChunkLoss(Protocol):
    """A loss config that can share the student's logits with the divergence, as CrossEntropy does."""

    chunk_tokens: int | None

    def chunk_fn(self, vocab_size: int) -> ChunkFn:
        """(logits_CV, vocabulary, targets_C, mask_C, weight) -> (sums, gradient with respect to the logits)."""
        ...


@dataclasses.dataclass(kw_only=True)
class Distillation:
    """ce_weight * loss + kd_weight * T² * divergence of the student from the teacher, both softened by T.

    The factor T² keeps the gradient's scale independent of the temperature (Hinton et al. 2015, section 2). The weights
    follow schedules of tokens, like the learning rate: weight * schedule, with the schedule from 0 to 1.

    Attributes:
        divergence: ForwardKL, ReverseKL, JSD, TopK or ULD (losses/divergences.py).
        temperature: T, which divides the logits of both.
        ce_weight: The peak weight of the config's loss, by default the cross-entropy.
        kd_weight: The peak weight of the divergence.
        ce_schedule, kd_schedule: For example Linear() to fade a term out, Constant(warmup_fraction=0.5) to fade it in
            (plan/schedules.py). None keeps the peak throughout.
    """

    divergence: Divergence = dataclasses.field(default_factory=ForwardKL)
    temperature: float = 1.0
    ce_weight: float = 0.5
    kd_weight: float = 0.5
    ce_schedule: ScheduleConfig | None = None
    kd_schedule: ScheduleConfig | None = None

    def check(self) -> None:
        """Raises UserError if a value is out of range."""
        if not 0.01 <= self.temperature <= 1000:
            raise UserError(f"temperature={self.temperature}: give 0.01 to 1000; 1 to 4 is usual.")
        for name in ("ce_weight", "kd_weight"):
            if getattr(self, name) < 0:
                raise UserError(f"{name}={getattr(self, name)}: give a weight of 0 or more.")
        if self.ce_weight == self.kd_weight == 0:
            raise UserError("ce_weight=0 and kd_weight=0: there is nothing to learn from; set one above 0.")

    def weights(self) -> tuple[Schedule, Schedule]:
        """The weights of the loss and the divergence as functions of (tokens, total tokens)."""
        return _scaled(self.ce_weight, self.ce_schedule), _scaled(self.kd_weight, self.kd_schedule)

    def build(self, vocab_size: int, mesh: Mesh | None, loss: LossConfig) -> DistillationFn:
        """Builds the loss against a live teacher.

        "loss" = ce_weight * the config's loss + kd_weight * "kd_loss", which includes the factor T². With CrossEntropy,
        ce_weight does not scale "z_loss". No gradient reaches the teacher.

        Args:
            vocab_size: Columns of both heads from here on are padding.
            mesh: The run's mesh.
            loss: The config's loss. With CrossEntropy both terms share the student's logits.

        Returns:
            (x_BTD, w_DV, teacher's x_BTE, teacher's w_EV, targets_BT, mask_BT, ce_weight, kd_weight) -> sums.

        Raises:
            UserError: The divergence keeps more tokens than the vocabulary has.
        """
        self._check_k(vocab_size)

        def divergence(
            log_q_CV: jax.Array, vocabulary: Vocabulary, teacher_CE: jax.Array, head_EV: Head
        ) -> tuple[jax.Array, jax.Array, None]:
            theirs_CV = logits(teacher_CE, head_EV)
            return *self.divergence(log_q_CV, self._log_softmax(theirs_CV, vocabulary, vocab_size), vocabulary), None

        both = self._with_loss(divergence, vocab_size, mesh, loss)

        def distillation(x_BTD, w_DV, teacher_BTE, head_EV, targets_BT, mask_BT, ce_weight, kd_weight) -> Sums:
            # Padding of the vocabulary may differ, for example if the teacher is no Llama.
            columns = w_DV.shape[1]
            padded = jax.tree.map(
                lambda w: jnp.pad(w, ((0, 0), (0, max(columns - w.shape[1], 0))))[:, :columns], head_EV
            )
            heads = (padded.astype(teacher_BTE.dtype),)
            return both(x_BTD, w_DV, (targets_BT, mask_BT, teacher_BTE), heads, ce_weight, kd_weight)

        return distillation

    def build_cached(
        self, layout: Layout, mesh: Mesh | None, loss: LossConfig, aligned: Aligned | None = None
    ) -> DistillationFn:
        """Builds the loss against a teacher's stored records; otherwise like `build`.

        TopK is the forward KL over the stored tokens and one outcome for all others. With `aligned` there is also
        "kd_aligned", the number of positions with a record that says something.

        Args:
            layout: The layout of the records.
            mesh: The run's mesh.
            loss: The config's loss.
            aligned: If the teacher has its own tokenizer.

        Returns:
            (x_BTD, w_DV, records uint8 [B, T, W], *aligned.tables, targets_BT, mask_BT, ce_weight, kd_weight) -> sums.

        Raises:
            UserError: The records do not support the divergence, its k, or the temperature.
        """
        if not (isinstance(self.divergence, TopK | ULD) and self.divergence.k == layout.k):
            raise UserError(
                f"distillation.divergence={self.divergence}: the teacher's cache holds its {layout.k} most likely "
                f"tokens and the mass of the others, which only TopK(k={layout.k}) can use, and ULD. Set one of these "
                "(--config.distillation.divergence.k= changes only k), or remove teacher.cache."
            )
        slot = layout.slot(self.temperature)
        vocab_size = layout.vocab_size if aligned is None else aligned.vocab_size
        by_rank = isinstance(self.divergence, ULD)
        most = aligned.most if aligned is not None and aligned.tables else 0
        if by_rank:
            self._check_k(vocab_size)

        def divergence(
            log_q_CV: jax.Array, vocabulary: Vocabulary, records_CW: jax.Array, *tables: jax.Array
        ) -> tuple[jax.Array, jax.Array, jax.Array | None]:
            ids_CK, log_p_CK, tail_C = layout.unpack(records_CW, slot)
            if by_rank:
                value_C, gradient_CV = sorted_distance(log_q_CV, log_p_CK, vocabulary)
            elif tables:
                cells_V, members_V, starts = tables
                value_C, gradient_CV = cells_and_tail(
                    log_q_CV, log_p_CK, tail_C, cells_V[ids_CK], (members_V, starts, most), vocabulary
                )
            else:
                local_CK = vocabulary.local(ids_CK, log_q_CV.shape[1])
                rows = jnp.arange(len(log_q_CV))[:, None]
                log_p_CV = jnp.full(log_q_CV.shape, NEVER).at[rows, local_CK].set(log_p_CK, mode="drop")
                value_C, gradient_CV = kept_and_tail(log_q_CV, log_p_CV, log_p_CV > NEVER, tail_C, vocabulary)
            # Zeros are a tail with all of the mass, which no real record has.
            return value_C, gradient_CV, None if aligned is None else tail_C < 0

        both = self._with_loss(divergence, vocab_size, mesh, loss)

        def distillation(x_BTD, w_DV, records_BTW, *rest) -> Sums:
            *tables, targets_BT, mask_BT, ce_weight, kd_weight = rest
            return both(x_BTD, w_DV, (targets_BT, mask_BT, records_BTW), (), ce_weight, kd_weight, tables)

        return distillation

    def _check_k(self, vocab_size: int) -> None:
        if isinstance(self.divergence, TopK | ULD) and self.divergence.k > vocab_size:
            raise UserError(
                f"divergence.k={self.divergence.k}: the vocabulary has {vocab_size} tokens; give that or fewer."
            )

    def _with_loss(
        self,
        divergence: Callable[..., tuple[jax.Array, jax.Array, jax.Array | None]],
        vocab_size: int,
        mesh: Mesh | None,
        loss: LossConfig,
    ) -> DistillationFn:
        """(x_BTD, w_DV, rows, heads, ce_weight, kd_weight, tables) -> sums of the loss and the divergence together.

        Args:
            divergence: (log-probabilities of the student at the temperature [C, V], vocabulary, the teacher's rows
                [C, ...], its heads, the tables) -> (values [C], gradients with respect to the logits at the temperature
                [C, V], and where they count, bool [C], or None: everywhere).
        """
        heat = self.temperature
        loss_chunk = loss_alone = None
        tokens = CHUNK_TOKENS
        if isinstance(loss, ChunkLoss):
            loss_chunk, tokens = loss.chunk_fn(vocab_size), loss.chunk_tokens or CHUNK_TOKENS
        else:  # a second pass over the head
            loss_alone = loss.build(vocab_size, mesh)

        def chunk(
            logits_CV: jax.Array, vocabulary: Vocabulary, targets_C: jax.Array, mask_C: jax.Array, *rest: jax.Array
        ) -> tuple[Sums, jax.Array]:
            *teacher, ce_weight, kd_weight = rest
            sums, dlogits_CV = {"loss": jnp.float32(0)}, jnp.float32(0)
            if loss_chunk is not None:
                sums, dlogits_CV = loss_chunk(logits_CV, vocabulary, targets_C, mask_C, ce_weight)
            # At T = 1 XLA reuses the cross-entropy's value (common subexpression).
            log_q_CV = self._log_softmax(logits_CV, vocabulary, vocab_size)
            value_C, gradient_CV, says_C = divergence(log_q_CV, vocabulary, *teacher)
            if says_C is not None:
                mask_C &= says_C
                sums["kd_aligned"] = mask_C.sum(dtype=jnp.float32)
            sums["kd_loss"] = heat**2 * jnp.where(mask_C, value_C, 0.0).sum()
            sums["loss"] += kd_weight * sums["kd_loss"]
            # T² for the scale, 1 / T for the step from tempered logits to logits.
            return sums, dlogits_CV + jnp.where(mask_C[:, None], kd_weight * heat * gradient_CV, 0.0)

        columns = vocab_size if mesh is None else -(-vocab_size // mesh.shape["tensor"])
        tokens = max(1, tokens * _FULL_CHUNK_VOCABULARY // max(columns, _FULL_CHUNK_VOCABULARY))
        chunked = chunked_loss(chunk, mesh, tokens)

        def both(x_BTD, w_DV, rows, heads, ce_weight, kd_weight, tables=()) -> Sums:
            sums = chunked(x_BTD, w_DV, *rows, heads=heads, scalars=(*tables, ce_weight, kd_weight))
            if loss_alone is None:
                return sums
            others = loss_alone(x_BTD, w_DV, *rows[:2])
            return {**others, **sums, "loss": ce_weight * others["loss"] + sums["loss"]}

        return both

    def _log_softmax(self, logits_CV: jax.Array, vocabulary: Vocabulary, vocab_size: int) -> jax.Array:
        x_CV = jnp.where(vocabulary.columns < vocab_size, logits_CV / self.temperature, NEVER)
        return x_CV - log_sum(x_CV, vocabulary)[:, None]


def _scaled(weight: float, config: ScheduleConfig | None) -> Schedule:
    if config is None:
        return lambda tokens, total: weight
    schedule = config.build()
    return lambda tokens, total: weight * schedule(tokens, total)
