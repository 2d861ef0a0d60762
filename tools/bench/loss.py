"""`bench loss`: compares memory, time and results of the chunked cross-entropy and one that materializes all logits."""

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxtrain.cli import Command, Flag, Flags
from jaxtrain.interfaces import Json
from jaxtrain.losses.cross_entropy import CrossEntropy
from tools.bench.common import at_least_one, cpus, in_turns, median, ratio, result, rounds_flag, short, walls
from tools.bench.jax_step import memory

COMMAND = Command(
    name="python -m tools.bench loss",
    description="Value and gradient of the cross-entropy, chunked as in training and plain: the compiler's temporary "
    "memory, time, and the difference between the two.",
    examples=("python -m tools.bench loss", "python -m tools.bench loss --tokens=16384 --dtype=bfloat16"),
    flags=(
        Flag(name="tokens", type=int, default=4096, help="positions, B * T"),
        Flag(name="vocab_size", type=int, default=50_304, help="tokens of the vocabulary"),
        Flag(name="hidden_size", type=int, default=512, help="width of the model"),
        Flag(name="chunk_tokens", type=int, default=1024, help="positions of a chunk"),
        Flag(name="dtype", type=Literal["float32", "bfloat16"], default="float32", help="dtype of the hidden states"),
        rounds_flag(3),
    ),
    config="none",
)


def measure(flags: Flags) -> Json:
    at_least_one(rounds=flags.rounds, tokens=flags.tokens, vocab_size=flags.vocab_size, chunk_tokens=flags.chunk_tokens)
    return result("loss", compare(**{flag.name: getattr(flags, flag.name) for flag in COMMAND.flags}), device=True)


def compare(*, tokens: int, vocab_size: int, hidden_size: int, chunk_tokens: int, dtype: str, rounds: int) -> Json:
    """Runs both on random hidden states. `difference` is of values, and of gradients by their largest element."""
    rng = np.random.default_rng(0)
    x_BTD = jnp.asarray(rng.standard_normal((1, tokens, hidden_size), np.float32), dtype)
    w_DV = jnp.asarray(0.02 * rng.standard_normal((hidden_size, vocab_size), np.float32))
    targets_BT = jnp.asarray(rng.integers(0, vocab_size, (1, tokens)).astype(np.int32))
    loss = CrossEntropy(chunk_tokens=chunk_tokens).build(vocab_size, None)
    mask_BT = jnp.ones((1, tokens), bool)

    def chunked(x_BTD: jax.Array, w_DV: jax.Array) -> jax.Array:
        return loss(x_BTD, w_DV, targets_BT, mask_BT)["loss"]

    def plain(x_BTD: jax.Array, w_DV: jax.Array) -> jax.Array:
        logits_BTV = jnp.dot(x_BTD, w_DV.astype(x_BTD.dtype), preferred_element_type=jnp.float32)
        # Not log_softmax, which keeps a third array of this size.
        picked_BT1 = jnp.take_along_axis(logits_BTV, targets_BT[..., None], axis=-1)
        return (jax.nn.logsumexp(logits_BTV, axis=-1, keepdims=True) - picked_BT1).sum()

    compiled = {name: _compiled(function, x_BTD, w_DV) for name, function in (("chunked", chunked), ("plain", plain))}
    got = {name: jax.device_get(run(x_BTD, w_DV)) for name, run in compiled.items()}
    runs = {name: lambda run=run: jax.block_until_ready(run(x_BTD, w_DV)) for name, run in compiled.items()}
    spent = in_turns(runs, rounds)
    temporaries = {name: memory(run)["temporaries_mb"] for name, run in compiled.items()}
    return {
        "tokens": tokens,
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "chunk_tokens": chunk_tokens,
        "dtype": dtype,
        **{
            name: {"temporaries_mb": short(temporaries[name]), "seconds": median(walls(spent[name]))}
            for name in compiled
        },
        "plain_temporaries_over_chunked": short(temporaries["plain"] / temporaries["chunked"]),
        "plain_seconds_over_chunked": ratio(walls(spent["plain"]), walls(spent["chunked"])),
        "plain_cpu_seconds_over_chunked": ratio(cpus(spent["plain"]), cpus(spent["chunked"])),
        "difference": _differences(got["chunked"], got["plain"]),
    }


def _compiled(function: Callable[..., jax.Array], *arguments: jax.Array) -> Callable:
    return jax.jit(jax.value_and_grad(function, argnums=(0, 1))).lower(*arguments).compile()


def _differences(these: tuple, those: tuple) -> Json:
    def relative(a: np.ndarray, b: np.ndarray) -> float:
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        return short(np.abs(a - b).max() / np.abs(b).max())

    (value, gradients), (other, others) = these, those
    return {
        "value": relative(value, other),
        "dx": relative(gradients[0], others[0]),
        "dw": relative(gradients[1], others[1]),
    }
