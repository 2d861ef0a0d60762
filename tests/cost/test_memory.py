"""The search for the fewest micro-batches that fit, and what devices and compilers report about memory."""

from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtrain.config import Config
from jaxtrain.cost import memory
from jaxtrain.data.pipeline import DataConfig
from jaxtrain.data.sources.text_files import TextFiles
from jaxtrain.distributed import sharding
from jaxtrain.errors import UserError
from jaxtrain.model.llama import LlamaConfig
from jaxtrain.optim.adamw import AdamW
from jaxtrain.plan import Stage
from jaxtrain.plan.schedules import Constant
from jaxtrain.tokenizers.sentencepiece import SentencePiece

COUNTS = sharding.divisors(65_536)


class Sizes:
    """A program's bytes by its micro-batches, and which counts were compiled."""

    def __init__(self, sizes: Any):
        self.sizes = sizes
        self.asked: list[int] = []

    def __call__(self, count: int) -> int | None:
        self.asked.append(count)
        return self.sizes(count)


@pytest.mark.parametrize("most", [10**12, 512_000, 300_000, 100_900, 16_100, 10_040, 10_016])
def test_the_first_that_fits_is_found_by_bisection(most: int) -> None:
    sizes = Sizes(lambda count: 10_000 + 1_000_000 // count)
    found = memory.fewest(COUNTS, sizes, most)
    assert found == next(count for count in COUNTS if sizes.sizes(count) <= most)
    assert len(sizes.asked) <= (1 if most == 10**12 else 1 + len(COUNTS).bit_length())
    assert len(set(sizes.asked)) == len(sizes.asked)


@pytest.mark.parametrize("counts", [COUNTS[:length] for length in (1, 2, 3, 8, 17)])
def test_no_size_makes_the_search_wrong(counts: list[int]) -> None:
    """Steps, plateaus, and a compiler that fails above a size: the search still finds the first that fits."""
    rng = np.random.default_rng(0)
    for _ in range(100):
        falling = dict(zip(counts, np.sort(rng.integers(1, 40, len(counts)))[::-1].tolist(), strict=True))
        most = int(rng.integers(1, 40))
        known = [count for count in counts if falling[count] <= most + 5]
        sizes = Sizes(lambda count, known=known, falling=falling: falling[count] if count in known else None)
        fitting = [count for count in counts if falling[count] <= most]
        assert memory.fewest(counts, sizes, most) == (fitting[0] if fitting else None)


def test_what_the_devices_say(monkeypatch: pytest.MonkeyPatch) -> None:
    def mesh(*stats: dict[str, int] | None) -> Any:
        return SimpleNamespace(local_devices=[SimpleNamespace(memory_stats=lambda s=s: s) for s in stats])

    assert memory.limit(mesh(None, None), None) is None
    assert memory.limit(mesh({}), None) is None
    assert memory.limit(mesh(None), 0.5) == 500_000_000
    assert memory.limit(mesh({"bytes_limit": 80 << 30}, {"bytes_limit": 24 << 30}), None) == pytest.approx(
        0.92 * (24 << 30), rel=1e-6
    )
    monkeypatch.setattr(memory.consensus, "largest", lambda value: max(value, -(16 << 10)))  # another host has less
    assert memory.limit(mesh({"bytes_limit": 80 << 30}), None) == pytest.approx(0.92 * (16 << 30), rel=1e-6)


def test_what_an_error_of_the_devices_means() -> None:
    error = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 4398046511104 bytes.")
    assert "memory_gb" in str(memory.explained(error))
    assert memory.explained(jax.errors.JaxRuntimeError("INTERNAL: no")) is None
    assert memory.explained(ValueError("RESOURCE_EXHAUSTED")) is None


def test_what_a_tpus_compiler_says_that_it_used() -> None:
    text = "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 24.91G of 15.75G hbm. Exceeded hbm capacity"
    assert memory.used(jax.errors.JaxRuntimeError(text)) == " (it used 24.91G of 15.75G)"
    assert memory.used(jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")) == ""


def test_jax_says_resource_exhausted() -> None:
    with pytest.raises(jax.errors.JaxRuntimeError) as caught:
        jax.block_until_ready(jnp.zeros((1 << 22, 1 << 30), jnp.float32))
    assert memory.is_exhausted(caught.value)


def test_a_size_that_is_none() -> None:
    config = Config(
        model=LlamaConfig(hidden_size=16, intermediate_size=32, num_layers=1, num_heads=2, num_kv_heads=1),
        tokenizer=SentencePiece(path="x"),
        data=DataConfig(sources={"a": TextFiles()}),
        stages=(Stage(seq_len=16, batch_size=8),),
        optimizer=AdamW(schedule=Constant()),
        steps=1,
        memory_gb=0.0,
    )
    with pytest.raises(UserError, match=r"memory_gb=0\.0"):
        config.check()
