"""Generation against the whole forward pass, and sampling against the requested distribution."""

import dataclasses

import jax
import numpy as np
import pytest

from jaxtrain.distributed import sharding
from jaxtrain.distributed.sharding import MeshConfig
from jaxtrain.errors import UserError
from jaxtrain.model import generate as generate_module
from jaxtrain.model.generate import generate
from tests.model.test_llama import EVERYTHING, TINY, VOCAB, random_params

PROMPTS = [[5, 6, 7], [1], [int(i) for i in np.random.default_rng(0).integers(0, VOCAB, 70)]]
NEW = 9


def greedy_by_whole_forward_passes(model, params, prompt):
    hidden = jax.jit(model.hidden)
    ids = list(prompt)
    for _ in range(NEW):
        tokens = np.zeros((1, 96), np.int32)  # one shape for all lengths: later tokens are not visible
        tokens[0, : len(ids)] = ids
        x = hidden(params, tokens, np.ones_like(tokens), np.arange(96, dtype=np.int32)[None]).x
        ids.append(int(np.argmax((x[0, len(ids) - 1] @ model.head(params))[:VOCAB])))
    return ids[len(prompt) :]


@pytest.mark.parametrize(
    "config", [pytest.param(TINY, marks=pytest.mark.slow), EVERYTHING], ids=["plain", "everything"]
)
def test_greedy_is_the_argmax_of_whole_forward_passes(config):
    model = config.build(VOCAB, None)
    params = random_params(model)
    seen = []
    texts = generate(
        model, params, PROMPTS, max_new_tokens=NEW, temperature=0, on_token=lambda row, id: seen.append((row, id))
    )
    want = [greedy_by_whole_forward_passes(model, params, prompt) for prompt in PROMPTS]
    assert texts == want
    assert len({tuple(text) for text in texts}) == len(texts)
    assert seen == [(row, want[row][step]) for step in range(NEW) for row in range(len(PROMPTS))]


def test_a_text_ends_at_the_end_of_document_token():
    model = TINY.build(VOCAB, None)
    params = random_params(model)
    whole = generate(model, params, PROMPTS, max_new_tokens=NEW, temperature=0)
    eos_id = whole[0][4]
    assert eos_id not in whole[0][:4]
    texts = generate(model, params, PROMPTS, max_new_tokens=NEW, temperature=0, eos_id=eos_id)
    assert texts == [text[: text.index(eos_id)] if eos_id in text else text for text in whole]


@pytest.mark.parametrize(
    "mesh",
    [pytest.param({"fsdp": 4, "tensor": 2}, marks=pytest.mark.slow), {"fsdp": 2, "tensor": 2, "context": 2}],
    ids=str,
)
def test_a_mesh_changes_no_token(mesh):
    one = TINY.build(VOCAB, None)
    want = generate(one, random_params(one), PROMPTS, max_new_tokens=NEW, seed=3)
    built = MeshConfig(**mesh).build()
    model = TINY.build(VOCAB, built)
    params = jax.device_put(random_params(model), sharding.tree_shardings(built, model.axes))
    assert generate(model, params, PROMPTS, max_new_tokens=NEW, seed=3) == want


def test_a_seed_gives_the_same_text_and_another_another():
    model = TINY.build(VOCAB, None)
    params = random_params(model)
    first, again, other = (generate(model, params, PROMPTS, max_new_tokens=NEW, seed=s) for s in (1, 1, 2))
    assert first == again
    assert all(a != b for a, b in zip(first, other, strict=True))


LOGITS = np.log(np.array([0.4, 0.3, 0.15, 0.1, 0.05]))


@pytest.mark.parametrize(
    ("settings", "want"),
    [
        ((1.0, 5, 1.0), [0.4, 0.3, 0.15, 0.1, 0.05]),
        ((1.0, 2, 1.0), [4 / 7, 3 / 7, 0, 0, 0]),
        ((1.0, 5, 0.69), [4 / 7, 3 / 7, 0, 0, 0]),
        ((1.0, 5, 0.71), [0.4 / 0.85, 0.3 / 0.85, 0.15 / 0.85, 0, 0]),
        # Within the two likeliest the first one has 4 / 7 = 0.57.
        ((1.0, 2, 0.5), [1, 0, 0, 0, 0]),
        ((0.5, 5, 1.0), list(np.array([0.16, 0.09, 0.0225, 0.01, 0.0025]) / 0.285)),
    ],
)
def test_samples_follow_the_distribution(settings, want):
    draws = 20_000
    order = np.array([3, 0, 4, 1, 2])  # sorted logits would hide a mistake
    keys = jax.random.split(jax.random.key(0), draws)
    logits = np.tile(LOGITS[order], (draws, 1)).astype(np.float32)
    picked = generate_module._pick(keys, np.int32(0), logits, sampling="filtered", settings=settings)
    counts = np.bincount(order[np.asarray(picked)], minlength=5)
    # Five standard deviations of a count's share, at most.
    np.testing.assert_allclose(counts / draws, want, atol=5 * 0.5 / draws**0.5)
    assert not counts[np.array(want) == 0].any()


def test_rows_and_steps_draw_independently():
    keys = jax.random.split(jax.random.key(0), 500)
    logits = np.zeros((500, 100), np.float32)
    first, second = (
        np.asarray(generate_module._pick(keys, np.int32(n), logits, sampling="plain", settings=(1.0, 100, 1.0)))
        for n in (0, 1)
    )
    assert len(np.unique(first)) > 90
    assert np.mean(first == second) < 0.05


@pytest.mark.parametrize(
    ("prompts", "settings", "message"),
    [
        ([[1], []], {}, "Prompt 1 is empty"),
        ([[1, VOCAB]], {}, "Prompt 0 has the id 300, outside of the model's vocabulary of 300"),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens=0"),
        (
            [[1, 2]],
            {"max_new_tokens": 2047},
            "Prompt 0 has 2 tokens, .* context of 2048 .*: lower max_new_tokens to 2046",
        ),
        ([[1] * 2048], {}, r"Prompt 0 has 2048 tokens, .* \(max_seq_len\): shorten the prompt"),
        ([[1]], {"temperature": -1.0}, "temperature=-1"),
        ([[1]], {"top_k": 0}, "top_k=0"),
        ([[1]], {"top_p": 0.0}, "top_p=0"),
    ],
)
def test_what_cannot_be_generated_is_refused(prompts, settings, message):
    model = TINY.build(VOCAB, None)
    with pytest.raises(UserError, match=message):
        generate(model, {}, prompts, **({"max_new_tokens": 1} | settings))


def test_bfloat16_generates():
    model = dataclasses.replace(EVERYTHING, dtype="bfloat16").build(VOCAB, None)
    texts = generate(model, random_params(model), PROMPTS[:1], max_new_tokens=3, top_k=5, top_p=0.9)
    assert len(texts[0]) == 3


@pytest.mark.parametrize("rows", [1, 2])
def test_the_number_of_prompts_at_once_changes_no_text(rows):
    model = TINY.build(VOCAB, None)
    params = random_params(model)
    seen = []
    whole = generate(model, params, PROMPTS, max_new_tokens=NEW, seed=5)
    parts = generate(
        model,
        params,
        PROMPTS,
        max_new_tokens=NEW,
        seed=5,
        rows_at_once=rows,
        on_token=lambda row, id: seen.append((row, id)),
    )
    assert parts == whole
    assert sorted(seen) == sorted((row, id) for row, ids in enumerate(whole) for id in ids)
