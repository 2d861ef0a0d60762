"""Generation within a memory limit: fewer prompts at a time, the same texts."""

import jax
import pytest

from jaxtrain.cost import memory
from jaxtrain.distributed.sharding import MeshConfig
from jaxtrain.errors import UserError
from jaxtrain.model import generate as unlimited
from jaxtrain.trainer import generation
from jaxtrain.trainer.generation import generate
from tests.model.test_llama import TINY, VOCAB, random_params

PROMPTS = [[number, 7, 9] for number in range(1, 9)]
NEW = 3


def test_less_memory_takes_fewer_prompts_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = TINY.build(VOCAB, MeshConfig(fsdp=2).build(jax.devices()[:2]))
    params = random_params(model)
    asked = []
    original = unlimited.generate

    def spied(*arguments, rows_at_once: int, **settings):
        asked.append(rows_at_once)
        return original(*arguments, rows_at_once=rows_at_once, **settings)

    monkeypatch.setattr(unlimited, "generate", spied)
    needs = {
        rows: max(memory.needed(one) or 0 for one in unlimited.compile_programs(model, params, PROMPTS, NEW, rows))
        for rows in (2, 8)
    }
    assert needs[2] < needs[8]
    whole = generate(model, params, PROMPTS, limit=None, max_new_tokens=NEW, seed=3)
    assert generate(model, params, PROMPTS, limit=needs[8], max_new_tokens=NEW, seed=3) == whole
    assert generate(model, params, PROMPTS, limit=needs[8] - 1, max_new_tokens=NEW, seed=3) == whole
    assert generate(model, params, PROMPTS, limit=needs[2] + 50, extra=50, max_new_tokens=NEW, seed=3) == whole
    assert generate(model, params, PROMPTS, limit=needs[8] + 50, extra=51, max_new_tokens=NEW, seed=3) == whole
    assert asked == [8, 8, 4, 2, 4]
    with pytest.raises(UserError, match="generation does not fit: even with one prompt at a time a device needs"):
        generate(model, params, PROMPTS, limit=1000, max_new_tokens=NEW)
    monkeypatch.setattr(generation.consensus, "largest", lambda count: max(count, 4))
    assert generate(model, params, PROMPTS, limit=needs[8], max_new_tokens=NEW, seed=3) == whole
    assert asked[-1] == 2
