"""Text from a model: prompts through the decoder once, then a token at a time with a key/value cache.

Shapes: see interfaces.py; S is the cache's length. Prompts are padded on the left, so that all rows write the same slot
of the cache.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxtrain.distributed import sharding
from jaxtrain.errors import UserError
from jaxtrain.interfaces import Tokenizer
from jaxtrain.model.attention import attend, compiler_options
from jaxtrain.model.llama import Llama, Params

Cache = tuple[jax.Array, jax.Array]  # keys and values, each [L, B, S, K, h] in the compute dtype
Sampling = Literal["greedy", "plain", "filtered"]

# Prompts and caches are rounded up to it, so that few lengths are compiled.
LENGTH_MULTIPLE = 64


def generate(
    model: Llama,
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
) -> list[list[int]]:
    """The continuation of each prompt: at most `max_new_tokens` ids, up to `eos_id` (which is left out).

    temperature: 0 takes the likeliest token. top_k, top_p: sample among the k likeliest tokens, and among the likeliest
    ones that together reach the probability p (Holtzman et al. 2020, arXiv:1904.09751). seed: the same one gives the
    same text. on_token: called with (prompt's index, id) as tokens are made. With several processes, all call it with
    the same arguments. Raises UserError for an empty prompt, an id outside the vocabulary, or settings out of range.
    """
    _check(model, prompts_ids, max_new_tokens, temperature, top_k, top_p)
    if not prompts_ids:
        return []
    sampling: Sampling = "greedy" if temperature == 0 else "plain" if top_k is None and top_p == 1 else "filtered"
    pick = functools.partial(
        _pick, sampling=sampling, settings=(temperature or 1.0, model.vocab_size if top_k is None else top_k, top_p)
    )
    tokens_BT, start_B = _left_padded(model, prompts_ids)
    prompt_length = tokens_BT.shape[1]
    length = -(-(prompt_length + max_new_tokens) // LENGTH_MULTIPLE) * LENGTH_MULTIPLE
    keys_B = jax.vmap(functools.partial(jax.random.fold_in, jax.random.key(seed)))(np.arange(len(tokens_BT)))
    logits_BV, cache = _prefill(model)(length, params, tokens_BT, start_B)
    texts: list[list[int]] = [[] for _ in prompts_ids]
    running = set(range(len(prompts_ids)))
    for slot in range(prompt_length, prompt_length + max_new_tokens):
        next_B = np.asarray(pick(keys_B, np.int32(slot - prompt_length), logits_BV))
        for row in sorted(running):
            token = int(next_B[row])
            if token == eos_id:
                running.remove(row)
                continue
            texts[row].append(token)
            if on_token is not None:
                on_token(row, token)
        if not running or slot == prompt_length + max_new_tokens - 1:
            break
        logits_BV, cache = _step(model, params, next_B, np.int32(slot), start_B, cache)
    return texts


def continuation(tokenizer: Tokenizer, prompt_ids: Sequence[int], ids: Sequence[int]) -> str:
    """The text of `ids` behind a prompt. Alone it would lack its first space with sentencepiece, which adds one itself
    in front of a text and takes one away.
    """
    return tokenizer.decode([*prompt_ids, *ids]).removeprefix(tokenizer.decode(prompt_ids))


def _check(model: Llama, prompts_ids: Any, max_new_tokens: int, temperature: float, top_k: int | None, top_p: float):
    for row, ids in enumerate(prompts_ids):
        if len(ids) == 0:
            raise UserError(f"Prompt {row} is empty: give at least one token, such as the end-of-document token.")
        outside = [id for id in ids if not 0 <= id < model.vocab_size]
        if outside:
            raise UserError(
                f"Prompt {row} has the id {outside[0]}, outside of the model's vocabulary of {model.vocab_size}: "
                "was it made by another tokenizer?"
            )
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens={max_new_tokens}: it must be at least 1.")
    if temperature < 0:
        raise UserError(f"temperature={temperature}: it must be 0 (the likeliest token) or above.")
    if top_k is not None and top_k < 1:
        raise UserError(f"top_k={top_k}: it must be at least 1, or none.")
    if not 0 < top_p <= 1:
        raise UserError(f"top_p={top_p}: a probability above 0 and at most 1 is needed.")


def _left_padded(model: Llama, prompts_ids: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    """(tokens int32 [B, T], where each prompt starts int32 [B]); B is padded to what the mesh divides."""
    ways = 1 if model.mesh is None else model.mesh.shape["data"] * model.mesh.shape["fsdp"]
    rows = -(-len(prompts_ids) // ways) * ways
    length = -(-max(map(len, prompts_ids)) // LENGTH_MULTIPLE) * LENGTH_MULTIPLE
    tokens_BT = np.zeros((rows, length), np.int32)
    start_B = np.full(rows, length - 1, np.int32)
    for row, ids in enumerate(prompts_ids):
        start_B[row] = length - len(ids)
        tokens_BT[row, start_B[row] :] = ids
    return tokens_BT, start_B


@functools.cache
def _prefill(model: Llama) -> Callable[..., tuple[jax.Array, Cache]]:
    options = compiler_options(model.mesh, "xla")
    return jax.jit(functools.partial(_prefilled, model), static_argnums=0, compiler_options=options)


def _prefilled(
    model: Llama, length: int, params: Params, tokens_BT: jax.Array, start_B: jax.Array
) -> tuple[jax.Array, Cache]:
    """(logits after the prompts [B, V], their cache of `length` slots)."""
    slots = jnp.arange(tokens_BT.shape[1])[None]
    segment_ids_BT = (slots >= start_B[:, None]).astype(jnp.int32)
    positions_BT = jnp.maximum(slots - start_B[:, None], 0)
    after = ((0, 0), (0, length - tokens_BT.shape[1]), (0, 0), (0, 0))

    def attend_and_keep(q_BTHh: jax.Array, k_BTKh: jax.Array, v_BTKh: jax.Array) -> tuple[jax.Array, Cache]:
        options: Any = {"mesh": model.mesh, "implementation": "xla", "sliding_window": model.config.sliding_window}
        x_BTHh = attend(q_BTHh, k_BTKh, v_BTKh, segment_ids_BT, **options)
        return x_BTHh, (jnp.pad(k_BTKh, after), jnp.pad(v_BTKh, after))

    x_BTD, cache = model.decode(params, tokens_BT, positions_BT, lambda _: attend_and_keep, None)
    return _logits(model, params, x_BTD[:, -1]), cache


@functools.partial(jax.jit, static_argnums=0, donate_argnums=5)
def _step(
    model: Llama, params: Params, token_B: jax.Array, slot: jax.Array, start_B: jax.Array, cache: Cache
) -> tuple[jax.Array, Cache]:
    """(logits after `token_B`, which goes into `slot` of the cache, and the cache)."""
    slots = jnp.arange(cache[0].shape[2])[None]
    visible_BS = (slots >= start_B[:, None]) & (slots <= slot)
    if model.config.sliding_window is not None:
        visible_BS &= slots > slot - model.config.sliding_window

    def with_cache(layer_cache: Cache) -> Any:
        def attend_to_cache(q_BTHh: jax.Array, k_BTKh: jax.Array, v_BTKh: jax.Array) -> tuple[jax.Array, Cache]:
            k_BSKh, v_BSKh = (
                jax.lax.dynamic_update_slice_in_dim(old, new, slot, 1)
                for old, new in zip(layer_cache, (k_BTKh, v_BTKh), strict=True)
            )
            return _attend_one(q_BTHh, k_BSKh, v_BSKh, visible_BS), (k_BSKh, v_BSKh)

        return attend_to_cache

    x_BTD, cache = model.decode(params, token_B[:, None], (slot - start_B)[:, None], with_cache, cache)
    return _logits(model, params, x_BTD[:, 0]), cache


def _attend_one(q_BTHh: jax.Array, k_BSKh: jax.Array, v_BSKh: jax.Array, visible_BS: jax.Array) -> jax.Array:
    """Attention of one query (T = 1)."""
    batch, _, heads, width = q_BTHh.shape
    q_BKGh = q_BTHh.reshape(batch, k_BSKh.shape[2], -1, width)
    wide = jnp.promote_types(q_BTHh.dtype, jnp.float32)
    scores = jnp.einsum("bkgh,bskh->bkgs", q_BKGh, k_BSKh, preferred_element_type=wide) * width**-0.5
    weights = jax.nn.softmax(jnp.where(visible_BS[:, None, None], scores, -jnp.inf), axis=-1)
    x_BKGh = jnp.einsum("bkgs,bskh->bkgh", weights.astype(v_BSKh.dtype), v_BSKh, preferred_element_type=wide)
    return x_BKGh.reshape(batch, 1, heads, width).astype(q_BTHh.dtype)


def _logits(model: Llama, params: Params, x_BD: jax.Array) -> jax.Array:
    """fp32 [B, V], whole on every device; the vocabulary's padding is left out."""
    wide = jnp.promote_types(x_BD.dtype, jnp.float32)
    logits_BV = jnp.dot(x_BD, model.head(params).astype(x_BD.dtype), preferred_element_type=wide)
    if model.mesh is not None:
        logits_BV = jax.lax.with_sharding_constraint(logits_BV, sharding.replicated(model.mesh))
    return logits_BV[:, : model.vocab_size]


@functools.partial(jax.jit, static_argnames="sampling")
def _pick(
    keys_B: jax.Array, count: jax.Array, logits_BV: jax.Array, *, sampling: Sampling, settings: tuple
) -> jax.Array:
    """The next token of each row; `count` tokens were picked before. settings: temperature, top_k, top_p."""
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
