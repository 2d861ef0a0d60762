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
        kept_CV = log_p_CV >= vocabulary.kth_largest(log_p_CV, self.k)[:, None]
        tail_p_C = log_sum(jnp.where(kept_CV, NEVER, log_p_CV), vocabulary)
        return kept_and_tail(log_q_CV, log_p_CV, kept_CV, tail_p_C, vocabulary)


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
