"""Distillation losses by definition, from all logits at once, in float64.

Gradients use the derivative with respect to the student's probabilities and the softmax's Jacobian, so none of the
closed forms of jaxtrain.losses.divergences is repeated here.
"""

import numpy as np


def softmax(logits):
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def kl(a, b):
    return (a * np.log(a / b)).sum(-1)


def forward_kl(p, q):
    return kl(p, q), -p / q


def reverse_kl(p, q):
    return kl(q, p), np.log(q / p) + 1


def jsd(beta):
    def divergence(p, q):
        m = beta * p + (1 - beta) * q
        # By q itself, and through m.
        slope = (1 - beta) * (np.log(q / m) + 1) - (1 - beta) * (beta * p + (1 - beta) * q) / m
        return beta * kl(p, m) + (1 - beta) * kl(q, m), slope

    return divergence


def top_k(k):
    """The k largest entries of p unchanged, and the rest as one outcome."""

    def divergence(p, q):
        values, slopes = np.zeros(p.shape[:-1]), np.zeros(p.shape)
        for index in np.ndindex(p.shape[:-1]):
            order = np.argsort(-p[index])
            kept, rest = order[:k], order[k:]
            one_p, one_q = p[index], q[index]
            values[index] = kl(one_p[kept], one_q[kept])
            slopes[index][kept] = -one_p[kept] / one_q[kept]
            if len(rest):
                tail_p, tail_q = one_p[rest].sum(), one_q[rest].sum()
                values[index] += tail_p * np.log(tail_p / tail_q)
                slopes[index][rest] = -tail_p / tail_q
        return values, slopes

    return divergence


def reference(
    x, w, teacher, head, targets, mask, *, divergence, vocab_size, heat=1.0, ce_weight=0.5, kd_weight=0.5, z_loss=0.0
):
    """({"loss", "ce_loss", "kd_loss", "z_loss"}, dx, dw); x [B, T, D], w [D, V], teacher [B, T, E], head [E, V]."""
    x, w, teacher, head = (np.asarray(a, np.float64) for a in (x, w, teacher, head))
    logits, theirs = (x @ w)[..., :vocab_size], (teacher @ head)[..., :vocab_size]
    one_hot = np.eye(vocab_size)[np.where(mask, targets, 0)]
    q = softmax(logits)
    log_z = np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1)) + logits.max(-1)
    ce = (mask * -np.log((q * one_hot).sum(-1))).sum()
    z = (mask * z_loss * log_z**2).sum()
    p_soft, q_soft = softmax(theirs / heat), softmax(logits / heat)
    values, slopes = divergence(p_soft, q_soft)
    kd = heat**2 * (mask * values).sum()
    by_soft_logits = q_soft * (slopes - (q_soft * slopes).sum(-1, keepdims=True))
    dlogits = ce_weight * (q - one_hot) + 2 * z_loss * log_z[..., None] * q + kd_weight * heat * by_soft_logits
    dlogits = np.pad(mask[..., None] * dlogits, [(0, 0), (0, 0), (0, w.shape[1] - vocab_size)])
    sums = {"loss": ce_weight * ce + z + kd_weight * kd, "ce_loss": ce, "kd_loss": kd, "z_loss": z}
    return sums, dlogits @ w.T, np.einsum("btd,btv->dv", x, dlogits)
