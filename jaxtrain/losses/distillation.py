"""Distillation from hidden states and heads of a student and a teacher, in chunks of positions.

Neither's logits of all positions ever exist. Shapes: see interfaces.py; E is the teacher's width, C positions.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxtrain.errors import UserError
from jaxtrain.interfaces import Schedule, ScheduleConfig
from jaxtrain.losses.cached import Layout
from jaxtrain.losses.chunks import NEVER, Sums, Vocabulary, chunked_loss
from jaxtrain.losses.cross_entropy import CrossEntropy, cross_entropy
from jaxtrain.losses.divergences import Divergence, ForwardKL, TopK, kept_and_tail, log_sum

# Larger vocabularies get smaller chunks, so that what a chunk takes does not grow with them.
_FULL_CHUNK_VOCABULARY = 32_768

# (x_BTD, w_DV, teacher's x_BTE, teacher's w_EV, targets_BT, mask_BT, ce_weight, kd_weight) → sums
DistillationFn = Callable[..., Sums]


@dataclasses.dataclass(kw_only=True)
class Distillation:
    """ce_weight * cross-entropy + kd_weight * T² * divergence of the student from the teacher, both softened by T.

    The factor T² keeps the gradient's size when the temperature changes (Hinton et al. 2015, section 2). The weights
    follow schedules of tokens, as the learning rate does: weight * schedule, the schedule from 0 to 1.

    divergence: ForwardKL, ReverseKL, JSD or TopK (losses/divergences.py).
    temperature: T; divides the logits of both.
    ce_weight, kd_weight: the peaks of the weights.
    ce_schedule, kd_schedule: such as Linear() to fade a term out, Constant(warmup_fraction=0.5) to fade it in
        (plan/schedules.py); None: always the peak.
    """

    divergence: Divergence = dataclasses.field(default_factory=ForwardKL)
    temperature: float = 1.0
    ce_weight: float = 0.5
    kd_weight: float = 0.5
    ce_schedule: ScheduleConfig | None = None
    kd_schedule: ScheduleConfig | None = None

    def check(self) -> None:
        if not 0.01 <= self.temperature <= 1000:
            raise UserError(f"temperature={self.temperature}: give 0.01 to 1000; 1 to 4 is usual.")
        for name in ("ce_weight", "kd_weight"):
            if getattr(self, name) < 0:
                raise UserError(f"{name}={getattr(self, name)}: a weight of 0 or more is needed.")
        if self.ce_weight == self.kd_weight == 0:
            raise UserError("ce_weight=0 and kd_weight=0: there is nothing to learn from; set one above 0.")

    def weights(self) -> tuple[Schedule, Schedule]:
        """The weights of cross-entropy and divergence as functions of (tokens, total tokens)."""
        return _scaled(self.ce_weight, self.ce_schedule), _scaled(self.kd_weight, self.kd_schedule)

    def build(self, vocab_size: int, mesh: Mesh | None, plain: CrossEntropy) -> DistillationFn:
        """The loss (x_BTD, w_DV, teacher's x_BTE, teacher's w_EV, targets_BT, mask_BT, ce_weight, kd_weight) → sums
        over the positions where mask is True, fp32 scalars.

        "loss" = ce_weight * "ce_loss" + "z_loss" + kd_weight * "kd_loss" is differentiable by x and w; no gradient
        reaches the teacher. "kd_loss" has its factor T². targets, vocab_size, "z_loss": see CrossEntropy.build.

        plain: for z_loss and chunk_tokens; vocabularies of more than 32,768 columns on a device get fewer positions.
        Raises UserError for a divergence that keeps more tokens than there are.
        """
        if isinstance(self.divergence, TopK) and self.divergence.k > vocab_size:
            raise UserError(
                f"divergence.k={self.divergence.k}: the vocabulary has {vocab_size} tokens; give that or fewer."
            )
        heat = self.temperature

        def chunk(
            logits_CV: jax.Array,
            vocabulary: Vocabulary,
            targets_C: jax.Array,
            mask_C: jax.Array,
            teacher_CE: jax.Array,
            head_EV: jax.Array,
            ce_weight: jax.Array,
            kd_weight: jax.Array,
        ) -> tuple[Sums, jax.Array]:
            sums, dlogits_CV, log_q_CV = cross_entropy(
                logits_CV, vocabulary, targets_C, mask_C, vocab_size, plain.z_loss, ce_weight
            )
            theirs_CV = jnp.dot(teacher_CE, head_EV, preferred_element_type=jnp.float32)
            log_p_CV = _log_softmax(theirs_CV, vocabulary, vocab_size, heat)
            if heat != 1:  # else the cross-entropy's serve
                log_q_CV = _log_softmax(logits_CV, vocabulary, vocab_size, heat)
            value_C, gradient_CV = self.divergence(log_q_CV, log_p_CV, vocabulary)
            sums["kd_loss"] = heat**2 * jnp.where(mask_C, value_C, 0.0).sum()
            sums["loss"] += kd_weight * sums["kd_loss"]
            # T² for the scale, 1 / T for the step from tempered logits to logits.
            return sums, dlogits_CV + jnp.where(mask_C[:, None], kd_weight * heat * gradient_CV, 0.0)

        loss = chunked_loss(chunk, mesh, _chunk_tokens(plain, vocab_size, mesh))

        def distillation(
            x_BTD: jax.Array,
            w_DV: jax.Array,
            teacher_BTE: jax.Array,
            head_EV: jax.Array,
            targets_BT: jax.Array,
            mask_BT: jax.Array,
            ce_weight: jax.Array,
            kd_weight: jax.Array,
        ) -> Sums:
            heads = (head_EV.astype(teacher_BTE.dtype),)
            rows = (targets_BT, mask_BT, teacher_BTE)
            return loss(x_BTD, w_DV, *rows, heads=heads, scalars=(ce_weight, kd_weight))

        return distillation

    def build_cached(self, layout: Layout, mesh: Mesh | None, plain: CrossEntropy) -> DistillationFn:
        """As `build`, from a teacher's stored records: the loss (x_BTD, w_DV, records uint8 [B, T, W], targets_BT,
        mask_BT, ce_weight, kd_weight) → sums.

        The divergence is forward KL over the stored tokens and one outcome for all others, as TopK's.
        Raises UserError for another divergence, k or temperature than the records serve.
        """
        if not (isinstance(self.divergence, TopK) and self.divergence.k == layout.k):
            raise UserError(
                f"distillation.divergence={self.divergence}: the teacher's cache holds its {layout.k} most likely "
                f"tokens and the mass of the others, which serves TopK(k={layout.k}) and nothing else. Set that "
                "(--config.distillation.divergence.k= changes k alone), or leave out teacher.cache."
            )
        heat, slot = self.temperature, layout.slot(self.temperature)

        def chunk(
            logits_CV: jax.Array,
            vocabulary: Vocabulary,
            targets_C: jax.Array,
            mask_C: jax.Array,
            records_CW: jax.Array,
            ce_weight: jax.Array,
            kd_weight: jax.Array,
        ) -> tuple[Sums, jax.Array]:
            sums, dlogits_CV, log_q_CV = cross_entropy(
                logits_CV, vocabulary, targets_C, mask_C, layout.vocab_size, plain.z_loss, ce_weight
            )
            if heat != 1:
                log_q_CV = _log_softmax(logits_CV, vocabulary, layout.vocab_size, heat)
            ids_CK, log_p_CK, tail_C = layout.unpack(records_CW, slot)
            # Ids of other devices' slices fall outside; below 0 they would count from the end.
            local_CK = ids_CK - vocabulary.columns[0, 0]
            local_CK = jnp.where(local_CK < 0, logits_CV.shape[1], local_CK)
            rows = jnp.arange(len(logits_CV))[:, None]
            log_p_CV = jnp.full(logits_CV.shape, NEVER).at[rows, local_CK].set(log_p_CK, mode="drop")
            value_C, gradient_CV = kept_and_tail(log_q_CV, log_p_CV, log_p_CV > NEVER, tail_C, vocabulary)
            sums["kd_loss"] = heat**2 * jnp.where(mask_C, value_C, 0.0).sum()
            sums["loss"] += kd_weight * sums["kd_loss"]
            return sums, dlogits_CV + jnp.where(mask_C[:, None], kd_weight * heat * gradient_CV, 0.0)

        loss = chunked_loss(chunk, mesh, _chunk_tokens(plain, layout.vocab_size, mesh))

        def distillation(
            x_BTD: jax.Array,
            w_DV: jax.Array,
            records_BTW: jax.Array,
            targets_BT: jax.Array,
            mask_BT: jax.Array,
            ce_weight: jax.Array,
            kd_weight: jax.Array,
        ) -> Sums:
            return loss(x_BTD, w_DV, targets_BT, mask_BT, records_BTW, scalars=(ce_weight, kd_weight))

        return distillation


def _chunk_tokens(plain: CrossEntropy, vocab_size: int, mesh: Mesh | None) -> int:
    columns = vocab_size if mesh is None else -(-vocab_size // mesh.shape["tensor"])
    return max(1, plain.chunk_tokens * _FULL_CHUNK_VOCABULARY // max(columns, _FULL_CHUNK_VOCABULARY))


def _scaled(weight: float, config: ScheduleConfig | None) -> Schedule:
    if config is None:
        return lambda tokens, total: weight
    schedule = config.build()
    return lambda tokens, total: weight * schedule(tokens, total)


def _log_softmax(logits_CV: jax.Array, vocabulary: Vocabulary, vocab_size: int, heat: float) -> jax.Array:
    x_CV = jnp.where(vocabulary.columns < vocab_size, logits_CV / heat, NEVER)
    return x_CV - log_sum(x_CV, vocabulary)[:, None]
