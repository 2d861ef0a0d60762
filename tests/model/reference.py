"""Attention in float64 NumPy, one head at a time with the whole [T, T] matrix, forward and backward."""

import numpy as np

Arrays = tuple[np.ndarray, ...]


def attention(
    qkv: Arrays,
    segments: np.ndarray,
    window: int | None,
    dx: np.ndarray,
    query_scalar: float | None = None,
    softcap: float = np.inf,
) -> tuple[np.ndarray, Arrays]:
    """qkv: q [B, T, H, h], k and v [B, T, K, h], segments [B, T], dx like q → (x, (dq, dk, dv)), all float64."""
    q, k, v, dx = (np.asarray(a, np.float64) for a in (*qkv, dx))
    batch, seq_len, heads, width = q.shape
    group, root = heads // k.shape[2], np.sqrt(query_scalar or width)
    x, dq, dk, dv = np.zeros_like(q), np.zeros_like(q), np.zeros_like(k), np.zeros_like(v)
    ago = np.arange(seq_len)[:, None] - np.arange(seq_len)[None]
    for b in range(batch):
        hidden = (ago < 0) | (segments[b][:, None] != segments[b][None])
        if window is not None:
            hidden |= ago >= window
        for head in range(heads):
            one = (b, slice(None), head)
            shared = (b, slice(None), head // group)
            scores = q[one] @ k[shared].T / root
            bent = np.tanh(scores / softcap) if softcap < np.inf else np.zeros_like(scores)
            scores = np.where(hidden, -np.inf, softcap * bent if softcap < np.inf else scores)
            weights = np.exp(scores - scores.max(1, keepdims=True))
            weights /= weights.sum(1, keepdims=True)
            x[one] = weights @ v[shared]
            dweights = dx[one] @ v[shared].T
            dscores = weights * (dweights - (dweights * weights).sum(1, keepdims=True)) / root * (1 - bent**2)
            dq[one] = dscores @ k[shared]
            dk[shared] += dscores.T @ q[one]
            dv[shared] += weights.T @ dx[one]
    return x, (dq, dk, dv)


def packed_segments(rng: np.random.Generator, batch: int, seq_len: int, documents: int = 4) -> np.ndarray:
    """Rows of up to `documents` documents of random lengths; the last row ends in padding (0)."""
    segments = np.sort(rng.integers(1, documents + 1, (batch, seq_len)), axis=1).astype(np.int32)
    segments[-1, seq_len - seq_len // 3 :] = 0
    return segments
