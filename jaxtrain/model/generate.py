"""Text generation: prefill of the prompts, then one sampled token at a time.

Prompts are padded on the left, so that all rows write to the same slot. Shapes: see interfaces.py; S is the combined
length of prompts and continuations.
"""

import functools
import logging
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxtrain.distributed import sharding
from jaxtrain.errors import UserError
from jaxtrain.interfaces import CachingModel, Model, Params, Tokenizer
from jaxtrain.losses.head import logits

Sampling = Literal["greedy", "plain", "filtered"]

# Lengths of prompts and caches are rounded up to a multiple of it, to compile few programs.
LENGTH_MULTIPLE = 64

logger = logging.getLogger("jaxtrain")


def generate(
    model: Model,
    params: Params,
    prompts_ids: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    seed: int = 0,
    eos_id: int | None = None,
    on_token: Callable[[int, int], None] | None = None,
    rows_at_once: int | None = None,
) -> list[list[int]]:
    """Continues each prompt. With several processes, all call it with the same arguments.

    Args:
        model: A CachingModel keeps keys and values; any other recomputes the whole text for each token.
        params: The model's parameters.
        prompts_ids: Ids of each prompt, at least one.
        max_new_tokens: Maximum length of a continuation.
        temperature: Softmax temperature; 0 picks the most likely token.
        top_k: Sample among the k most likely tokens; None for all.
        top_p: Sample among the fewest most likely tokens that together reach this probability (Holtzman et al. 2020,
            arXiv:1904.09751).
        seed: The same seed gives the same text.
        eos_id: Ends a continuation; not included in it.
        on_token: Called with (index of the prompt, id) for each token.
        rows_at_once: Prompts per batch; None for all. Results differ only by rounding.

    Returns:
        The ids of each continuation.

    Raises:
        UserError: An empty prompt, an id outside the vocabulary, a setting out of range, or a text longer than the
            model's context.
    """
    check(model, prompts_ids, max_new_tokens)
    if temperature < 0:
        raise UserError(f"temperature={temperature}: it must be 0 (the likeliest token) or above.")
    if top_k is not None and top_k < 1:
        raise UserError(f"top_k={top_k}: it must be at least 1, or none.")
    if not 0 < top_p <= 1:
        raise UserError(f"top_p={top_p}: give a probability above 0 and at most 1.")
    if not prompts_ids:
        return []
    sampling: Sampling = "greedy" if temperature == 0 else "plain" if top_k is None and top_p == 1 else "filtered"
    pick = functools.partial(
        _pick, sampling=sampling, settings=(temperature or 1.0, model.vocab_size if top_k is None else top_k, top_p)
    )
    prompt_length, length = _lengths(prompts_ids, max_new_tokens)
    prefill, decode_one = _programs(model)
    texts: list[list[int]] = [[] for _ in prompts_ids]
    rows = rows_at_once or len(prompts_ids)
    for first in range(0, len(prompts_ids), rows):
        batch = prompts_ids[first : first + rows]
        tokens_BT, start_B = _left_padded(model, batch, rows, prompt_length)
        numbers_B = np.arange(first, first + len(tokens_BT))
        keys_B = jax.vmap(functools.partial(jax.random.fold_in, jax.random.key(seed)))(numbers_B)
        logits_BV, cache = prefill(params, tokens_BT, start_B, length)
        running = set(range(len(batch)))
        for slot in range(prompt_length, prompt_length + max_new_tokens):
            next_B = np.asarray(pick(keys_B, np.int32(slot - prompt_length), logits_BV))
            for row in sorted(running):
                token = int(next_B[row])
                if token == eos_id:
                    running.remove(row)
                    continue
                texts[first + row].append(token)
                if on_token is not None:
                    on_token(first + row, token)
            if not running or slot == prompt_length + max_new_tokens - 1:
                break
            logits_BV, cache = decode_one(params, next_B, np.int32(slot), start_B, cache)
    return texts


def compile_programs(
    model: Model, params: Params, prompts_ids: Sequence[Sequence[int]], max_new_tokens: int, rows_at_once: int
) -> list[Any]:
    """Compiles the programs of `generate` for these settings, to measure their memory. They stay in JAX's cache."""
    prompt_length, length = _lengths(prompts_ids, max_new_tokens)
    tokens_BT, start_B = _left_padded(model, (), rows_at_once, prompt_length)
    prefill, decode_one = _programs(model)
    prefilling = prefill.lower(params, tokens_BT, start_B, length).compile()
    _, cache = jax.eval_shape(functools.partial(prefill, length=length), params, tokens_BT, start_B)
    cache = jax.tree.map(
        lambda leaf, layout: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=layout),
        cache,
        prefilling.output_shardings[1],
    )
    return [prefilling, decode_one.lower(params, start_B, np.int32(0), start_B, cache).compile()]


def continuation(tokenizer: Tokenizer, prompt_ids: Sequence[int], ids: Sequence[int]) -> str:
    """Returns the text of `ids` after a prompt.

    Decoded alone, it would lose a leading space with sentencepiece, which strips the dummy prefix.
    """
    return tokenizer.decode([*prompt_ids, *ids]).removeprefix(tokenizer.decode(prompt_ids))


def check(model: Model, prompts_ids: Sequence[Sequence[int]], max_new_tokens: int) -> None:
    """Raises UserError if the model cannot continue the prompts."""
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens={max_new_tokens}: it must be at least 1.")
    for row, ids in enumerate(prompts_ids):
        if len(ids) == 0:
            raise UserError(f"Prompt {row} is empty: give at least one token, such as the end-of-document token.")
        outside = [id for id in ids if not 0 <= id < model.vocab_size]
        if outside:
            raise UserError(
                f"Prompt {row} has the id {outside[0]}, outside of the model's vocabulary of {model.vocab_size}: was "
                "it encoded with another tokenizer?"
            )
        room = model.config.max_seq_len - len(ids)
        if max_new_tokens > room:
            fix = f"lower max_new_tokens to {room} or less, or shorten the prompt" if room > 0 else "shorten the prompt"
            raise UserError(
                f"Prompt {row} has {len(ids)} tokens, with max_new_tokens={max_new_tokens} more than the model's "
                f"context of {model.config.max_seq_len} (max_seq_len): {fix}."
            )


def _lengths(prompts_ids: Sequence[Sequence[int]], max_new_tokens: int) -> tuple[int, int]:
    """Returns (slots of the prompts, slots of prompts and continuations)."""
    prompt_length = -(-max(map(len, prompts_ids)) // LENGTH_MULTIPLE) * LENGTH_MULTIPLE
    return prompt_length, -(-(prompt_length + max_new_tokens) // LENGTH_MULTIPLE) * LENGTH_MULTIPLE


def _left_padded(
    model: Model, prompts_ids: Sequence[Sequence[int]], rows: int, length: int
) -> tuple[np.ndarray, np.ndarray]:
    """Returns (tokens int32 [B, length], first slot of each prompt int32 [B]). B is `rows`, padded to suit the mesh."""
    ways = 1 if model.mesh is None else sharding.batch_ways(model.mesh.shape)
    rows = -(-rows // ways) * ways
    tokens_BT = np.zeros((rows, length), np.int32)
    start_B = np.full(rows, length - 1, np.int32)
    for row, ids in enumerate(prompts_ids):
        start_B[row] = length - len(ids)
        tokens_BT[row, start_B[row] :] = ids
    return tokens_BT, start_B


class _Recomputing:
    """Makes any model a CachingModel. Its cache is the text so far, int32 [B, S], recomputed for each token."""

    def __init__(self, model: Model):
        self._model = model
        self.decoding_options: dict[str, str] = {}

    def prefill(
        self, params: Params, tokens_BT: jax.Array, start_B: jax.Array, length: int
    ) -> tuple[jax.Array, jax.Array]:
        tokens_BS = jnp.pad(tokens_BT, ((0, 0), (0, length - tokens_BT.shape[1])))
        return self._read(params, tokens_BS, start_B, jnp.int32(tokens_BT.shape[1] - 1)), tokens_BS

    def decode_one(
        self, params: Params, token_B: jax.Array, slot: jax.Array, start_B: jax.Array, cache: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        tokens_BS = jax.lax.dynamic_update_slice_in_dim(cache, token_B[:, None], slot, 1)
        return self._read(params, tokens_BS, start_B, slot), tokens_BS

    def _read(self, params: Params, tokens_BS: jax.Array, start_B: jax.Array, slot: jax.Array) -> jax.Array:
        slots = jnp.arange(tokens_BS.shape[1])[None]
        # Slots after the last token are zero; the causal mask hides them.
        segment_ids_BS = ((slots >= start_B[:, None]) & (slots <= slot)).astype(jnp.int32)
        positions_BS = jnp.clip(slots - start_B[:, None], 0, slot - start_B[:, None])
        x_BSD = self._model.hidden(params, tokens_BS, segment_ids_BS, positions_BS).x
        return jax.lax.dynamic_index_in_dim(x_BSD, slot, 1, keepdims=False)


@functools.cache
def _programs(model: Model) -> tuple[Any, Any]:
    """Compiled `prefill` and `decode_one` of the model, with logits fp32 [B, V] in place of hidden states."""
    if isinstance(model, CachingModel):
        decoder = model
    else:
        decoder = _Recomputing(model)
        logger.info("This model has no key/value cache: each token recomputes the whole text.")

    def prefill(params: Params, tokens_BT: jax.Array, start_B: jax.Array, length: int) -> tuple[jax.Array, Any]:
        x_BD, cache = decoder.prefill(params, tokens_BT, start_B, length)
        return _logits(model, params, x_BD), cache

    def decode_one(params: Params, token_B: Any, slot: Any, start_B: Any, cache: Any) -> tuple[jax.Array, Any]:
        x_BD, cache = decoder.decode_one(params, token_B, slot, start_B, cache)
        return _logits(model, params, x_BD), cache

    options = decoder.decoding_options
    return (
        jax.jit(prefill, static_argnums=3, compiler_options=options),
        jax.jit(decode_one, donate_argnums=4, compiler_options=options),
    )


def _logits(model: Model, params: Params, x_BD: jax.Array) -> jax.Array:
    """Returns logits fp32 [B, V], replicated on every device, without vocabulary padding."""
    logits_BV = logits(x_BD, model.head(params))
    if model.mesh is not None:
        logits_BV = jax.lax.with_sharding_constraint(logits_BV, sharding.replicated(model.mesh))
    return logits_BV[:, : model.vocab_size]


@functools.partial(jax.jit, static_argnames="sampling")
def _pick(
    keys_B: jax.Array, count: jax.Array, logits_BV: jax.Array, *, sampling: Sampling, settings: tuple
) -> jax.Array:
    """Picks the next token of each row, after `count` earlier ones. `settings` is (temperature, top_k, top_p)."""
    if sampling == "greedy":
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    temperature, top_k, top_p = settings
    logits_BV = logits_BV / temperature
    if sampling == "filtered":
        sorted_BV = -jnp.sort(-logits_BV, axis=-1)
        ranks = jnp.arange(logits_BV.shape[-1])[None]
        sorted_BV = jnp.where(ranks < top_k, sorted_BV, -jnp.inf)
        weights = jax.nn.softmax(sorted_BV, axis=-1)
        before = jnp.cumsum(weights, axis=-1) - weights
        least_B1 = jnp.min(jnp.where(before < top_p, sorted_BV, jnp.inf), axis=-1, keepdims=True)
        logits_BV = jnp.where(logits_BV >= least_B1, logits_BV, -jnp.inf)
    return jax.vmap(lambda key, row: jax.random.categorical(jax.random.fold_in(key, count), row))(keys_B, logits_BV)
