"""Divergences of a student's distribution over the vocabulary from its teacher's, with gradients, for one chunk.

p is the teacher's distribution and q the student's, both at the temperature. Gradients are with respect to the
student's logits at the temperature (u, with q = softmax(u)). Log-probabilities are finite everywhere: padding has about
-1e30, so a probability of 0 times any difference of logs is 0. Shapes: see chunks.py; sums run over the whole
vocabulary.
"""

import dataclasses
import math
from typing import Protocol

import jax
import jax.numpy as jnp

from jaxtrain.errors import UserError
from jaxtrain.losses.chunks import NEVER, Vocabulary


class Divergence(Protocol):
    """A dataclass: (log q, log p), [C, V] each, → (values [C] in nats, gradients with respect to u [C, V])."""

    def __call__(
        self, log_q_CV: jax.Array, log_p_CV: jax.Array, vocabulary: Vocabulary
    ) -> tuple[jax.Array, jax.Array]: ...


@dataclasses.dataclass(kw_only=True)
class ForwardKL:
    """KL(p || q) = sum of p (log p - log q): the student covers what the teacher does (Hinton et al. 2015)."""

    def __call__(self, log_q_CV: jax.Array, log_p_CV: jax.Array, vocabulary: Vocabulary) -> tuple[jax.Array, jax.Array]:
        p_CV = jnp.exp(log_p_CV)
        value_C = vocabulary.sum((p_CV * (log_p_CV - log_q_CV)).sum(axis=1))
        return value_C, jnp.exp(log_q_CV) - p_CV


@dataclasses.dataclass(kw_only=True)
class ReverseKL:
    """KL(q || p) = sum of q (log q - log p): the student stays where the teacher finds tokens likely.

    (MiniLLM, Gu et al. 2023, arXiv:2306.08543.)
    """

    def __call__(self, log_q_CV: jax.Array, log_p_CV: jax.Array, vocabulary: Vocabulary) -> tuple[jax.Array, jax.Array]:
        q_CV, ratio_CV = jnp.exp(log_q_CV), log_q_CV - log_p_CV
        value_C = vocabulary.sum((q_CV * ratio_CV).sum(axis=1))
        return value_C, q_CV * (ratio_CV - value_C[:, None])


@dataclasses.dataclass(kw_only=True)
class JSD:
    """Generalized Jensen-Shannon divergence: beta KL(p || m) + (1 - beta) KL(q || m) with m = beta p + (1 - beta) q.

    (GKD, Agarwal et al. 2023, arXiv:2306.13649, equation 1.)

    Attributes:
        beta: 0.5 is the Jensen-Shannon divergence. At 0 and 1, where the formula is 0 for all p and q, the value is the
            limit of formula / beta and formula / (1 - beta): KL(p || q) and KL(q || p). So values and gradients shrink
            with beta toward the ends (roughly in proportion) and jump there.
    """

    beta: float = 0.5

    def check(self) -> None:
        """Raises UserError if beta is outside [0, 1]."""
        if not 0 <= self.beta <= 1:
            raise UserError(f"beta={self.beta}: give 0 (forward KL) to 1 (reverse KL).")

    def __call__(self, log_q_CV: jax.Array, log_p_CV: jax.Array, vocabulary: Vocabulary) -> tuple[jax.Array, jax.Array]:
        if self.beta in (0, 1):
            end = ForwardKL() if self.beta == 0 else ReverseKL()
            return end(log_q_CV, log_p_CV, vocabulary)
        log_beta, log_rest = math.log(self.beta), math.log1p(-self.beta)
        p_CV, q_CV, ratio_CV = jnp.exp(log_p_CV), jnp.exp(log_q_CV), log_p_CV - log_q_CV
        log_p_by_m_CV = -jnp.logaddexp(log_beta, log_rest - ratio_CV)
        log_q_by_m_CV = -jnp.logaddexp(log_rest, log_beta + ratio_CV)
        sums = jnp.stack([(p_CV * log_p_by_m_CV).sum(axis=1), (q_CV * log_q_by_m_CV).sum(axis=1)])
        from_p_C, from_q_C = vocabulary.sum(sums)
        # d JSD / dq = (1 - beta) log(q / m): the terms from m's dependence on q cancel.
        gradient_CV = (1 - self.beta) * q_CV * (log_q_by_m_CV - from_q_C[:, None])
        return self.beta * from_p_C + (1 - self.beta) * from_q_C, gradient_CV


@dataclasses.dataclass(kw_only=True)
class TopK:
    """Forward KL over the teacher's k most likely tokens and one outcome, the tail, that merges all others.

    A lower bound of the forward KL (merging outcomes never raises it), and equal to it for k = vocabulary. Dropping the
    tail and renormalizing would be neither. Tokens tied with the k-th are kept, too.

    Attributes:
        k: Tokens to keep.
    """

    k: int = 64

    def check(self) -> None:
        """Raises UserError if k is out of range."""
        if self.k < 1:
            raise UserError(f"k={self.k}: keep at least one token (64 is usual).")

    def __call__(self, log_q_CV: jax.Array, log_p_CV: jax.Array, vocabulary: Vocabulary) -> tuple[jax.Array, jax.Array]:
        kept_CV = log_p_CV >= vocabulary.largest(log_p_CV, self.k)[0][:, -1:]
        tail_p_C = log_sum(jnp.where(kept_CV, NEVER, log_p_CV), vocabulary)
        return kept_and_tail(log_q_CV, log_p_CV, kept_CV, tail_p_C, vocabulary)


@dataclasses.dataclass(kw_only=True)
class ULD:
    """L1 distance of the sorted probabilities: sum of |p_(i) - q_(i)|, whatever the tokens are.

    (Universal logit distillation, Boizard et al. 2024, arXiv:2402.12030, equation 5.) The k largest of each are
    compared one by one, and the others as one outcome, which never raises the distance: a lower bound, equal for
    k = vocabulary.

    Attributes:
        k: Probabilities to compare one by one.
    """

    k: int = 64

    def check(self) -> None:
        """Raises UserError if k is out of range."""
        if self.k < 1:
            raise UserError(f"k={self.k}: compare at least one probability (64 is usual).")

    def __call__(self, log_q_CV: jax.Array, log_p_CV: jax.Array, vocabulary: Vocabulary) -> tuple[jax.Array, jax.Array]:
        return sorted_distance(log_q_CV, vocabulary.largest(log_p_CV, self.k)[0], vocabulary)


def sorted_distance(log_q_CV: jax.Array, log_p_CK: jax.Array, vocabulary: Vocabulary) -> tuple[jax.Array, jax.Array]:
    """ULD's value and gradient.

    Args:
        log_q_CV: The student's log-probabilities.
        log_p_CK: The teacher's K largest log-probabilities, descending.
        vocabulary: The device's slice of the student's vocabulary, which has at least K tokens.

    Returns:
        Values [C] and gradients with respect to u [C, V].
    """
    log_top_CK, ids_CK = vocabulary.largest(log_q_CV, log_p_CK.shape[1])
    apart_CK = jnp.exp(log_top_CK) - jnp.exp(log_p_CK)
    rest_C = -apart_CK.sum(axis=1)  # both sum to 1
    local_CK = vocabulary.local(ids_CK, log_q_CV.shape[1])
    sign_CV = jnp.broadcast_to(jnp.sign(rest_C)[:, None], log_q_CV.shape)
    sign_CV = sign_CV.at[jnp.arange(len(log_q_CV))[:, None], local_CK].set(jnp.sign(apart_CK), mode="drop")
    q_CV = jnp.exp(log_q_CV)
    mean_C = vocabulary.sum((q_CV * sign_CV).sum(axis=1))
    return jnp.abs(apart_CK).sum(axis=1) + jnp.abs(rest_C), q_CV * (sign_CV - mean_C[:, None])


def kept_and_tail(
    log_q_CV: jax.Array, log_p_CV: jax.Array, kept_CV: jax.Array, tail_p_C: jax.Array, vocabulary: Vocabulary
) -> tuple[jax.Array, jax.Array]:
    """Forward KL over the kept tokens and one outcome for all others.

    Args:
        log_q_CV: The student's log-probabilities.
        log_p_CV: The teacher's log-probabilities; any finite value where a token is not kept.
        kept_CV: Which tokens are kept, bool.
        tail_p_C: The log of the teacher's mass of all other tokens.
        vocabulary: The device's slice of the vocabulary.

    Returns:
        Values [C] and gradients with respect to u [C, V].
    """
    tail_q_C = log_sum(jnp.where(kept_CV, NEVER, log_q_CV), vocabulary)
    p_CV = jnp.where(kept_CV, jnp.exp(log_p_CV), 0.0)
    value_C = vocabulary.sum((p_CV * (log_p_CV - log_q_CV)).sum(axis=1))
    value_C += jnp.exp(tail_p_C) * (tail_p_C - tail_q_C)
    # In the tail the gradient spreads p's mass in the student's own proportions.
    share_CV = jnp.exp(jnp.minimum(log_q_CV - tail_q_C[:, None], 0.0) + tail_p_C[:, None])
    return value_C, jnp.exp(log_q_CV) - jnp.where(kept_CV, p_CV, share_CV)


def log_sum(x_CV: jax.Array, vocabulary: Vocabulary) -> jax.Array:
    """log of the sum of exp(x) over the whole vocabulary, [C]."""
    max_C = vocabulary.max(x_CV.max(axis=1))
    return jnp.log(vocabulary.sum(jnp.exp(x_CV - max_C[:, None]).sum(axis=1))) + max_C


def cells_and_tail(
    log_q_CV: jax.Array,
    log_p_CK: jax.Array,
    tail_p_C: jax.Array,
    cells_CK: jax.Array,
    members: tuple[jax.Array, jax.Array, int],
    vocabulary: Vocabulary,
) -> tuple[jax.Array, jax.Array]:
    """Forward KL over cells of tokens and one outcome for all others. See tokenizers/spelling.py.

    Args:
        log_q_CV: The student's log-probabilities.
        log_p_CK: The teacher's log-probabilities of K of its tokens.
        tail_p_C: The log of the teacher's mass of all other tokens.
        cells_CK: The cell of each of the K tokens, or -1. Several may have the same.
        members: The student's tokens by cell, where those of each cell begin, and the most of a cell, M.
        vocabulary: The device's slice of the student's vocabulary.

    Returns:
        Values [C] and gradients with respect to u [C, V].
    """
    size, rows = log_q_CV.shape[1], jnp.arange(len(log_q_CV))[:, None]
    tail_p_C = jnp.logaddexp(tail_p_C, jax.nn.logsumexp(jnp.where(cells_CK < 0, log_p_CK, NEVER), axis=1))
    # Not a scatter that adds, whose order of sums differs from run to run on a GPU.
    same_CKK = cells_CK[:, :, None] == cells_CK[:, None, :]
    log_p_CK = jax.nn.logsumexp(jnp.where(same_CKK, log_p_CK[:, None, :], NEVER), axis=2)
    counts_CK = (cells_CK >= 0) & (jnp.argmax(same_CKK, axis=2) == jnp.arange(cells_CK.shape[1])[None, :])
    tokens_N, starts, most = members
    place_CKM = starts[cells_CK][..., None] + jnp.arange(most)[None, None, :]
    inside_CKM = (cells_CK[..., None] >= 0) & (place_CKM < starts[cells_CK + 1][..., None])
    local_CKM = vocabulary.local(jnp.where(inside_CKM, jnp.take(tokens_N, place_CKM, mode="clip"), -1), size)
    log_q_CKM = log_q_CV.at[rows[..., None], local_CKM].get(mode="fill", fill_value=NEVER)
    max_CK = vocabulary.max(log_q_CKM.max(axis=2))
    log_q_CK = max_CK + jnp.log(vocabulary.sum(jnp.exp(log_q_CKM - max_CK[..., None]).sum(axis=2)))
    value_C = jnp.where(counts_CK, jnp.exp(log_p_CK) * (log_p_CK - log_q_CK), 0.0).sum(axis=1)
    kept_CV = jnp.zeros(log_q_CV.shape, bool).at[rows[..., None], local_CKM].set(True, mode="drop")
    ratio_CKM = jnp.broadcast_to((log_p_CK - log_q_CK)[..., None], local_CKM.shape)
    ratio_CV = jnp.zeros_like(log_q_CV).at[rows[..., None], local_CKM].set(ratio_CKM, mode="drop")
    tail_q_C = log_sum(jnp.where(kept_CV, NEVER, log_q_CV), vocabulary)
    # If the cells cover the student's whole vocabulary, it cannot say the rest.
    tail_C = jnp.where(tail_q_C > NEVER / 2, tail_p_C - tail_q_C, 0.0)
    value_C += jnp.exp(tail_p_C) * tail_C
    return value_C, jnp.exp(log_q_CV) - jnp.exp(log_q_CV + jnp.where(kept_CV, ratio_CV, tail_C[:, None]))
