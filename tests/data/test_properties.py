"""Properties of the whole data path over random configs, stop points and hosts.

Few examples, always the same, by default; more, different each time, in the slow tier, and many in the nightly one.
"""

import collections
import itertools
import json
import random
from collections.abc import Callable, Mapping, Sequence, Set

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from jaxtrain.data import ledger
from jaxtrain.data.forgotten import Forgotten
from jaxtrain.data.lanes import STATE_FIELDS
from jaxtrain.data.pipeline import DataConfig, StepBatch
from jaxtrain.interfaces import BATCH_FIELDS, Batch
from jaxtrain.plan import Plan, Stage, build_plan, stable_hash
from tests.data import reference
from tests.data.memory_source import MemorySource
from tests.data.runs import Case, batches_of, has_documents, plan_of, random_case, random_data
from tests.tiers import nightly_but

common = settings(
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
    phases=(Phase.explicit, Phase.generate),
    database=None,
)
Property = Callable[[random.Random], None]


def examples(property_: Property, count: int, derandomize: bool) -> None:
    """Checks a property on `count` examples, each from a seed that a failure names."""

    def check(seed: int) -> None:
        property_(random.Random(seed))

    settings(common, max_examples=count, derandomize=derandomize)(given(st.integers(0, 2**40))(check))()


def split(rng: random.Random, lanes: int) -> list[list[int]]:
    """Lanes distributed over hosts in any way; each host has at least one."""
    hosts = rng.randint(1, lanes)
    numbers = rng.sample(range(lanes), lanes)
    cuts = [0, *sorted(rng.sample(range(1, lanes), hosts - 1)), lanes]
    return [sorted(numbers[a:b]) for a, b in itertools.pairwise(cuts)]


def joined(hosts: Sequence[Sequence[int]], parts: Sequence[StepBatch]) -> tuple[Batch, dict[int, np.ndarray]]:
    """The global batch and the state of all lanes, from those of the hosts."""
    blocks: dict[int, dict[str, np.ndarray]] = {}
    states: dict[int, np.ndarray] = {}
    for lanes, part in zip(hosts, parts, strict=True):
        assert set(part.states) == set(lanes)
        states |= part.states
        pieces = {name: np.split(part.arrays[name], len(lanes)) for name in BATCH_FIELDS}
        blocks |= {lane: {name: pieces[name][index] for name in BATCH_FIELDS} for index, lane in enumerate(lanes)}
    ordered = [blocks[lane] for lane in range(len(blocks))]
    return {name: np.concatenate([block[name] for block in ordered]) for name in BATCH_FIELDS}, states


def through_json(states: dict[int, np.ndarray], names: Sequence[str]) -> dict[int, np.ndarray]:
    """As in a checkpoint."""
    stacked = np.stack([states[lane] for lane in range(len(states))])
    saved = json.loads(json.dumps(ledger.to_json(stacked, names)))
    return ledger.from_json(saved, names, len(states))


def stopped_and_resumed_is_uninterrupted(rng: random.Random) -> None:
    """Stopped up to three times and resumed on other hosts: batches and states are those of the slow version."""
    resumed_is_uninterrupted(rng, random_case(rng.randrange(10**9)), {})


def forgotten_documents_leave_no_trace(rng: random.Random) -> None:
    """The same where documents are forgotten from steps of the run on, most of them just when they are read."""
    case = random_case(rng.randrange(10**9))
    listed = {
        (lane, name): [i for i, text in reference.lane_documents(case.data, name, case.seed, lane, 0) if text.split()]
        for lane, name in itertools.product(range(case.data.num_lanes), case.data.sources)
    }
    gone: dict[int, set[reference.Identity]] = collections.defaultdict(set)
    for documents in listed.values():
        for place in rng.sample(range(1, len(documents)), min(rng.randint(0, 9), len(documents) // 3)):
            gone[rng.randint(1, case.last_step)].add(documents[place])
    resumed_is_uninterrupted(rng, case, gone)


def before(forgotten: Forgotten, step: int) -> Forgotten:
    """The entries that hold before `step`."""
    found = Forgotten()
    for source, file, row, first in forgotten:
        if first < step:
            found.add(source, file, row, first)
    return found


def resumed_is_uninterrupted(rng: random.Random, case: Case, gone: Mapping[int, Set[reference.Identity]]) -> None:
    """gone: Documents by the first step without them."""
    names, last = case.plan.source_names, case.last_step
    lanes = reference.streams(case.data, case.seed, case.epochs, case.least_tokens * (2 if gone else 1))
    wanted = reference.batches(case.data, case.plan, lanes, last, gone)
    forgotten = Forgotten()
    for step, identities in gone.items():
        for name, file, row in identities:
            source = case.data.sources[name]
            assert isinstance(source, MemorySource)
            forgotten.add(name, source.files[file], row, step)
    stops = sorted(rng.sample(range(1, last), min(rng.randint(0, 3), last - 1)))
    whole = case.run(forgotten=forgotten.documents)
    states: dict[int, np.ndarray] = {}
    for begin, end in itertools.pairwise([0, *stops, last]):
        hosts = split(rng, case.data.num_lanes)
        case.data.workers = rng.choice([1, 2])
        prefetch = rng.choice([1, 3])
        # Those that hold from a later step on need not be known yet.
        known = forgotten.documents if rng.random() < 0.5 else before(forgotten, end + 1).documents
        # Hosts read beyond the step at which they stop.
        runs = [case.run(after=begin, states=states, lanes=host, prefetch=prefetch, forgotten=known) for host in hosts]
        for step in range(begin, end):
            batch, states = joined(hosts, [run[step - begin] for run in runs])
            for name in BATCH_FIELDS:
                np.testing.assert_array_equal(batch[name], wanted[step][name], err_msg=f"{name}, step {step + 1}")
            for lane, state in states.items():
                np.testing.assert_array_equal(state, whole[step].states[lane])
        states = through_json(states, names)
    for (lane, name), stream in lanes.items():
        state = dict(zip(STATE_FIELDS, states[lane][names.index(name)].tolist(), strict=True))
        counts = ("documents", "tokens", "unique", "cut", "padding")
        assert tuple(state[key] for key in counts) == stream.counts, (lane, name)


def numbered(data: DataConfig) -> None:
    """Gives every document a unique first word."""
    number = itertools.count()
    for source in data.sources.values():
        assert isinstance(source, MemorySource)
        source.rows = [[f"{next(number)} {text}" if text.strip() else text for text in rows] for rows in source.rows]


def expected(data: DataConfig, name: str, held_out: bool) -> collections.Counter[str]:
    """A source's documents by first word, directly from its rows, without lanes, units and orders."""
    source = data.sources[name]
    assert isinstance(source, MemorySource)
    listed = [(file, row) for file, rows in enumerate(source.rows) for row in range(len(rows))]
    found: collections.Counter[str] = collections.Counter()
    for file, row in listed[: source.max_samples]:
        text = source.rows[file][row]
        kept = all(transform({"text": text, "number": row}) is not None for transform in source.transforms)
        held = bool(stable_hash.is_held_out(name, source.files[file], np.array([row]), data.holdout)[0])
        if text.strip() and kept and held == held_out:
            found[text.split()[0]] += 1
    return found


def whole_epoch_case(rng: random.Random) -> Case:
    """One epoch of random sources in one stage without overlap, to its end, in rows of any length."""
    while True:
        data, key = random_data(rng), rng.randrange(4)
        numbered(data)
        weights = {name: float(rng.choice([1, 2, 5])) for name in data.sources}
        total = sum(weights.values())
        stage = Stage(
            seq_len=rng.choice([2, 7, 33, 200]),
            batch_size=data.num_lanes * rng.randint(1, 4),
            weights={name: weight / total for name, weight in weights.items()},
            packing=rng.choice(["concat", "fit"]),
        )
        case = Case(data, plan_of(data, [stage], key, steps=100_000), key, 1)
        if has_documents(case):
            return case


def begun(case: Case, held_out: bool = False) -> dict[str, collections.Counter[str]]:
    """First words of the documents that begin in the rows of a run to the end of its data, by source."""
    found: dict[str, collections.Counter[str]] = {name: collections.Counter() for name in case.data.sources}
    # Per lane and source: whether the next token begins a document.
    fresh = dict.fromkeys(itertools.product(range(case.data.num_lanes), found), True)
    with batches_of(case, states={}, held_out=held_out) as batches:
        for batch in batches:
            per_lane = case.plan.at(batch.step).batch_size // case.data.num_lanes
            for row, source in enumerate(case.plan.sources_of(batch.step).tolist()):
                name, lane = case.plan.source_names[source], row // per_lane
                used = batch.arrays["tokens"][row][batch.arrays["segment_ids"][row] > 0]
                for token in used.tolist():
                    if token == 0 and fresh[lane, name]:  # the beginning-of-document token
                        continue
                    if fresh[lane, name]:
                        found[name][str(token - 2)] += 1
                    fresh[lane, name] = token == 1
            if batch.ended:
                break
    return found


def an_epoch_has_every_document_once(rng: random.Random) -> None:
    """Training sees all documents that are not held out, evaluation sees the others."""
    case = whole_epoch_case(rng)
    for held_out in [False, True] if case.data.holdout else [False]:
        found = begun(case, held_out)
        for name in case.data.sources:
            assert found[name] == expected(case.data, name, held_out), (name, held_out)


def sources_keep_their_share(rng: random.Random) -> None:
    """Within one row at every step of every stage, for weights of any size."""
    names = tuple("abcdefg"[: rng.randint(1, 7)])
    lanes = rng.choice([1, 3, 4, 64])
    stages = []
    for index in range(rng.randint(1, 3)):
        used = rng.sample(names, rng.randint(1, len(names)))
        weights = [rng.choice([1.0, 3.0, rng.random() + 1e-3, 1e-3]) for _ in used]
        rows, seq_len = lanes * rng.randint(1, 3), rng.choice([8, 64])
        stages.append(
            Stage(
                name=str(index),
                seq_len=seq_len,
                batch_size=rows,
                tokens=rows * seq_len * rng.randint(5, 60),
                weights={name: weight / sum(weights) for name, weight in zip(used, weights, strict=True)},
            )
        )
    plan = share_plan(stages, names, lanes, rng.randrange(100))
    assert plan.last_step is not None
    given_rows = np.zeros(len(names), np.int64)
    stage = 0
    for step in range(1, plan.last_step + 1):
        at = plan.at(step)
        if at.stage != stage:
            stage, given_rows = at.stage, np.zeros(len(names), np.int64)
        given_rows += np.bincount(plan.sources_of(step), minlength=len(names))
        weights_S = [float(plan.stages[stage - 1].weights.get(name, 0)) for name in names]
        share_S = np.array(weights_S) / sum(weights_S) * given_rows.sum()
        assert (np.abs(given_rows - share_S) < 1 + 1e-6).all(), (step, given_rows, share_S)


def share_plan(stages: Sequence[Stage], names: tuple[str, ...], lanes: int, seed: int) -> Plan:
    total = sum(stage.tokens or 0 for stage in stages)
    return build_plan(
        stages,
        source_names=names,
        num_lanes=lanes,
        seed=seed,
        total_tokens=total,
        steps=None,
        epochs=None,
        learning_rate=1.0,
        schedule=lambda tokens, total: 1.0,
    )


PROPERTIES: tuple[Property, ...] = (
    stopped_and_resumed_is_uninterrupted,
    forgotten_documents_leave_no_trace,
    an_epoch_has_every_document_once,
    sources_keep_their_share,
)


@pytest.mark.parametrize("property_", PROPERTIES, ids=lambda property_: property_.__name__)
def test_few(property_: Property) -> None:
    examples(property_, 12, derandomize=True)


@pytest.mark.slow
@pytest.mark.parametrize("count", nightly_but([30], [30, 150]))
@pytest.mark.parametrize("property_", PROPERTIES, ids=lambda property_: property_.__name__)
def test_many(property_: Property, count: int) -> None:
    examples(property_, count, derandomize=False)
