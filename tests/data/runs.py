"""Random data configs, and running the data path on them, for its tests."""

import contextlib
import dataclasses
import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from jaxtrain.data.fit_packing import WINDOW
from jaxtrain.data.forgotten import Documents
from jaxtrain.data.pipeline import DataConfig, StepBatch, host_batches, pools
from jaxtrain.data.skipped_files import SkippedFiles
from jaxtrain.interfaces import Source, Tokenizer
from jaxtrain.plan import Plan, Stage, build_plan
from tests.data import reference
from tests.data.memory_source import MemorySource, WordTokenizer, documents


@dataclasses.dataclass
class Case:
    data: DataConfig
    plan: Plan
    seed: int
    epochs: int | None
    tokenizer: Tokenizer = dataclasses.field(default_factory=WordTokenizer)

    @property
    def last_step(self) -> int:
        assert self.plan.last_step is not None
        return self.plan.last_step

    @property
    def least_tokens(self) -> int:
        """As many as a lane can read of a source, if its documents have no more than 50 tokens."""
        steps = [self.plan.at(step) for step in range(1, self.last_step + 1)]
        window = 50 * WINDOW if any(at.fit for at in steps) else 2
        return sum(at.batch_size * at.seq_len for at in steps) + window

    def run(self, after: int = 0, states: Mapping[int, np.ndarray] | None = None, **options: Any) -> list[StepBatch]:
        with batches_of(self, after=after, states=states or {}, **options) as batches:
            return list(batches)


@contextlib.contextmanager
def batches_of(
    case: Case,
    *,
    after: int = 0,
    states: Mapping[int, np.ndarray],
    lanes: Sequence[int] | None = None,
    prefetch: int = 2,
    held_out: bool = False,
    skipped: SkippedFiles | None = None,
    forgotten: Documents | None = None,
    resolved: Mapping[str, Source] | None = None,
) -> Iterator[Iterator[StepBatch]]:
    """A host's batches; the threads end with the context. resolved: Sources to use instead of the case's own."""
    data = case.data
    if resolved is None:
        resolved = {name: source.resolve() for name, source in data.sources.items()}
    readers = data.build(resolved, seed=case.seed, held_out=held_out, skipped=skipped, forgotten=forgotten)
    threads = pools(data)
    rows = data.row_spec(case.tokenizer, case.epochs)
    wanted = range(data.num_lanes) if lanes is None else lanes
    found = host_batches(readers, case.plan, rows, wanted, threads, after=after, states=states, prefetch=prefetch)
    try:
        yield found
    finally:
        found.close()
        threads.readers.shutdown()
        threads.workers.shutdown()


def plan_of(data: DataConfig, stages: Sequence[Stage], seed: int, steps: int | None = None, **bounds: Any) -> Plan:
    return build_plan(
        stages,
        source_names=tuple(data.sources),
        num_lanes=data.num_lanes,
        seed=seed,
        total_tokens=bounds.get("total_tokens"),
        steps=steps,
        epochs=1,
        learning_rate=1.0,
        schedule=lambda tokens, total: 1.0,
    )


def random_source(rng: random.Random, name: str) -> MemorySource:
    """Few or many files, some empty; usually enough documents for 4 lanes."""
    if rng.random() < 0.5:
        sizes = rng.choices([0, 30, 61, 90], k=rng.randint(1, 4))
    else:
        sizes = rng.choices([0, 1, 4, 9, 21], k=rng.randint(5, 40))
    group, longest = rng.choice([3, 7, 40]), rng.choice([2, 9, 40])
    return MemorySource(
        rows=[documents(size, rng.randrange(1000), longest) for size in sizes],
        groups=[[min(group, size - first) for first in range(0, size, group)] for size in sizes],
        random_access=rng.random() < 0.5,
        block=rng.choice([1, 5, 50]),
        max_samples=rng.choice([None, None, 50, 77]),
        transforms=rng.choice([(), (), (Drop(7),)]),
        name=name,
    )


@dataclasses.dataclass
class Drop:
    """A filter: drops each document whose row number is a multiple of `every`."""

    every: int
    columns: tuple[str, ...] = ("number",)

    def __call__(self, document: dict[str, Any]) -> dict[str, Any] | None:
        return None if document["number"] % self.every == 0 else document


def random_data(rng: random.Random) -> DataConfig:
    return DataConfig(
        sources={name: random_source(rng, name) for name in ["b", "a", "c"][: rng.randint(1, 3)]},
        num_lanes=rng.choice([1, 2, 4]),
        shuffle=rng.random() < 0.7,
        shuffle_window=rng.choice([1, 3, 8, 100]),
        holdout=rng.choice([0.0, 0.0, 0.2]),
        document_mask=rng.random() < 0.6,
        add_bos=rng.random() < 0.3,
        workers=rng.choice([1, 3]),
    )


def random_stages(rng: random.Random, data: DataConfig) -> list[Stage]:
    names, stages, count = list(data.sources), [], rng.randint(1, 3)
    for index in range(count):
        used = rng.sample(names, rng.randint(1, len(names)))
        weights = rng.choices([1, 2, 5], k=len(used))
        seq_len, batch = rng.choice([1, 2, 5, 16, 33]), data.num_lanes * rng.randint(1, 4)
        packing = rng.choice(["concat", "concat", "fit"])
        stage = Stage(
            seq_len=seq_len,
            batch_size=batch,
            overlap=0.0 if packing == "fit" else rng.choice([0.0, 0.0, 0.3, 0.5, 0.95]),
            packing=packing,
            tokens=None if index == count - 1 else seq_len * batch * rng.randint(1, 6),
            weights={name: weight / sum(weights) for name, weight in zip(used, weights, strict=True)},
        )
        stages.append(stage)
    return stages


def random_case(seed: int, epochs: Sequence[int | None] = (1, 2, None)) -> Case:
    """A config that the data path accepts: every lane has documents in every source."""
    rng = random.Random(seed)
    while True:
        data, key = random_data(rng), rng.randrange(4)
        stages = random_stages(rng, data)
        last = stages[-1].seq_len * (stages[-1].batch_size or 1)
        total = sum(stage.tokens or 0 for stage in stages) + last * rng.randint(0, 8) + rng.randint(1, last)
        plan = plan_of(data, stages, key, total_tokens=total, steps=rng.choice([None, 14]))
        case = Case(data, plan, key, rng.choice(epochs))
        if has_documents(case):
            return case


def has_documents(case: Case) -> bool:
    """Whether every lane has a document with a token in the first epoch."""
    return all(
        any(text.split() for _, text in reference.lane_documents(case.data, name, case.seed, lane, 0))
        for name in case.data.sources
        for lane in range(case.data.num_lanes)
    )
