"""The whole data path: against a slow obvious version, resumed from every step, split over hosts, through faults."""

import time

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxtrain.data import shared_file_reader
from jaxtrain.data.io import retry
from jaxtrain.data.lanes import STATE_FIELDS, LaneDataset, LaneSchedule
from jaxtrain.data.packing import Packer
from jaxtrain.data.pipeline import DataConfig, HostDataset, StepBatch, pools, resolve, texts
from jaxtrain.errors import UserError
from jaxtrain.interfaces import BATCH_FIELDS
from jaxtrain.plan import Stage
from tests.data import reference
from tests.data.memory_source import Fatal, Flaky, MemorySource, WordTokenizer, documents
from tests.data.runs import Case, batches_of, plan_of, random_case

few = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
seeds = st.integers(0, 10**6)


def same(a: StepBatch, b: StepBatch) -> None:
    assert a.step == b.step
    assert a.ended == b.ended
    for name in BATCH_FIELDS:
        np.testing.assert_array_equal(a.arrays[name], b.arrays[name], err_msg=f"{name}, step {a.step}")
    assert a.states.keys() == b.states.keys()
    for lane, state in a.states.items():
        np.testing.assert_array_equal(state, b.states[lane], err_msg=f"state of lane {lane}, step {a.step}")


@few
@given(seeds)
def test_batches_and_counts_are_those_of_the_slow_version(seed: int) -> None:
    case = random_case(seed)
    lanes = reference.streams(case.data, case.seed, case.epochs, case.least_tokens)
    found = case.run()
    assert [batch.step for batch in found] == list(range(1, case.last_step + 1))
    wanted = reference.batches(case.data, case.plan, lanes, len(found))
    for step, (batch, slow) in enumerate(zip(found, wanted, strict=True), 1):
        for name in BATCH_FIELDS:
            np.testing.assert_array_equal(batch.arrays[name], slow[name], err_msg=f"{name}, step {step}")
    weighted = {name for stage in case.plan.stages if stage.has_steps for name in stage.weights}
    for (lane, name), stream in lanes.items():
        state = dict(
            zip(STATE_FIELDS, found[-1].states[lane][list(case.data.sources).index(name)].tolist(), strict=True)
        )
        counts = ("documents", "tokens", "unique", "cut", "padding")
        assert tuple(state[name] for name in counts) == stream.counts
        assert bool(state["ended"]) == (stream.ended and name in weighted)
    for batch in found[-1:]:
        assert batch.arrays["loss_mask"].dtype == bool
        assert all(batch.arrays[name].dtype == np.int32 for name in BATCH_FIELDS[:-1])


@few
@given(seeds)
def test_every_step_can_be_resumed(seed: int) -> None:
    case = random_case(seed)
    with pytest.MonkeyPatch.context() as patch:
        whole = case.run()
        patch.setattr(shared_file_reader, "_IN_MEMORY_BYTES", 40)
        patch.setattr(shared_file_reader, "_OPEN_FILES", 1)
        for at in whole[:-1]:
            rest = case.run(after=at.step, states=at.states)
            for a, b in zip(whole[at.step :], rest, strict=True):
                same(a, b)


@few
@given(seeds)
def test_hosts_do_not_matter(seed: int) -> None:
    case = random_case(seed)
    lanes = case.data.num_lanes
    whole = case.run()
    for hosts in {2, lanes} - {1}:
        per_host = -(-lanes // hosts)
        parts = [range(first, min(first + per_host, lanes)) for first in range(0, lanes, per_host)]
        runs = [case.run(lanes=list(part), prefetch=1) for part in parts]
        for step, batch in enumerate(whole):
            for name in BATCH_FIELDS:
                joined = np.concatenate([run[step].arrays[name] for run in runs])
                np.testing.assert_array_equal(joined, batch.arrays[name])
            for run in runs:
                for lane, state in run[step].states.items():
                    np.testing.assert_array_equal(state, batch.states[lane])
            assert batch.ended == all(run[step].ended for run in runs)


@few
@given(seeds)
def test_transient_faults_change_nothing(seed: int) -> None:
    case = random_case(seed)
    whole = case.run()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(retry, "sleep", lambda seconds: None)
        for index, source in enumerate(case.data.sources.values()):
            assert isinstance(source, MemorySource)
            source.fault = Flaky(index, 0.3, 200)
        for a, b in zip(whole, case.run(), strict=True):
            same(a, b)


def simple(rows: list[list[str]], *, lanes: int = 4, epochs: int | None = None, steps: int = 20, **settings) -> Case:
    """One source "web", and rows of 16 tokens, 2 per lane."""
    source = MemorySource(rows=rows, **settings)
    data = DataConfig(sources={"web": source}, num_lanes=lanes, shuffle_window=4, workers=1)
    return Case(data, plan_of(data, [Stage(seq_len=16, batch_size=2 * lanes)], 0, steps=steps), 0, epochs)


@pytest.mark.parametrize("random_access", [True, False])
@pytest.mark.parametrize("prefetch", [1, 3])
def test_a_fatal_error_reaches_the_consumer_and_stays(random_access, prefetch):
    rows = [documents(60, seed, 20, 0) for seed in range(3)]
    case = simple(rows, random_access=random_access)
    whole = case.run()
    source = case.data.sources["web"]
    assert isinstance(source, MemorySource)
    source.fault = Fatal(1, 30)
    found: list[StepBatch] = []
    with batches_of(case, states={}, prefetch=prefetch) as batches:
        with pytest.raises(UserError, match="the file is gone"):
            found.extend(batches)
        for _ in range(3):
            with pytest.raises(UserError, match="the file is gone"):
                next(batches)
    assert len(found) < len(whole)
    for a, b in zip(whole, found, strict=False):
        same(a, b)


def test_any_error_stays(monkeypatch):
    """Some lanes have then taken a step, and others have not: continuing would shift them against each other."""
    cut, calls = Packer.cut, []

    def failing(self, *args):
        calls.append(self)
        if len(calls) == 7:
            raise FloatingPointError("once")
        return cut(self, *args)

    monkeypatch.setattr(Packer, "cut", failing)
    with batches_of(simple([documents(100, 1)]), states={}) as batches:
        next(batches)
        for _ in range(3):
            with pytest.raises(FloatingPointError, match="once"):
                next(batches)


def test_a_tokenizer_that_fails_is_an_error(monkeypatch):
    def fail(self, texts):
        raise ValueError("bad text")

    monkeypatch.setattr(WordTokenizer, "encode_batch", fail)
    with pytest.raises(ValueError, match="bad text"):
        simple([documents(100, 1)]).run()


def test_a_lane_without_documents_is_refused():
    with pytest.raises(UserError, match=r"lane 1 of data\.num_lanes=2 gets no document"):
        simple([documents(3, 1)], lanes=2).run()


def test_training_ends_when_every_lane_has_ended_in_every_source_to_come():
    sources = {name: MemorySource(rows=[documents(200, 5, 9, 0)], name=name) for name in ("a", "b")}
    data = DataConfig(sources=dict(sources), num_lanes=2, shuffle_window=4)
    stages = [
        Stage(seq_len=64, batch_size=8, tokens=64 * 8 * 10, weights={"a": 1.0}),
        Stage(seq_len=64, batch_size=8, weights={"b": 1.0}),
    ]
    found = Case(data, plan_of(data, stages, 0, steps=20), 0, 1).run()
    assert [batch.ended for batch in found] == [False] * 12 + [True] * 8  # 3 batches each; a's end is not the run's
    ended = STATE_FIELDS.index("ended")
    ended_in_a = [all(state[0, ended] for state in batch.states.values()) for batch in found]
    assert ended_in_a == [False] * 2 + [True] * 18
    assert not any(batch.arrays["loss_mask"].any() for batch in found[3:10])


def test_64_lanes_with_one_worker_and_slow_readers():
    case = simple([documents(3000, 2)], lanes=64, steps=5, random_access=False)
    source = case.data.sources["web"]
    assert isinstance(source, MemorySource)
    whole = case.run()
    source.fault = lambda file, row: time.sleep(0.0005)
    for a, b in zip(whole, case.run(), strict=True):
        same(a, b)


@pytest.mark.parametrize("seed", range(4))
def test_texts_are_the_first_documents_in_the_mix(seed):
    """For training the tokenizer: a function of the config, with max_samples documents or all of them."""
    sources = {name: MemorySource(rows=[documents(150, seed, 9)] * 2, name=name) for name in ("a", "b", "c")}
    data = DataConfig(sources=dict(sources), num_lanes=4, shuffle_window=8, holdout=0.1)
    weights = {"a": 0.8, "b": 0.2}
    plan = plan_of(data, [Stage(seq_len=16, batch_size=4, weights=weights)], 0, steps=100)
    readers = data.build(dict(sources), seed=seed)
    found = list(texts(data, readers, plan, 100))
    assert found == list(texts(data, readers, plan, 100))
    assert len(found) == 100
    streams = {
        name: {text for lane in range(4) for _, text in reference.lane_documents(data, name, seed, lane, 0)}
        for name in sources
    }
    assert set(found) <= streams["a"] | streams["b"]
    everything = list(texts(data, readers, plan, 10**6))
    total = sum(len(reference.lane_documents(data, name, seed, lane, 0)) for name in weights for lane in range(4))
    assert len(everything) == total  # c has no weight
    assert everything[:100] == found


def test_texts_read_windows_and_not_the_source():
    source = MemorySource(rows=[documents(10_000, 1)] * 3, groups=[[100] * 100] * 3)
    data = DataConfig(sources={"web": source}, num_lanes=16, shuffle_window=10)
    plan = plan_of(data, [Stage(seq_len=16, batch_size=16)], 0, steps=10)
    readers = data.build({"web": source}, seed=0)
    source.rows_read = 0
    assert len(list(texts(data, readers, plan, 50))) == 50
    assert source.rows_read < 400


def test_memory_is_bounded_by_what_the_lanes_hold():
    case = simple([documents(50, seed, 9) for seed in range(80)], steps=400)
    readers = case.data.build({"web": case.data.sources["web"].resolve()}, seed=0)
    threads = pools(case.data)
    rows = case.data.row_spec(WordTokenizer(), None)
    lanes = [LaneDataset(lane, LaneSchedule(case.plan, 4), readers, rows, threads) for lane in range(4)]
    iterator = iter(HostDataset(lanes, 0, {}))
    sizes = []
    for _ in range(400):
        next(iterator)
        packers = [source.packer for lane in iterator._lanes for source in lane._sources.values()]
        sizes.append(sum(len(packer._tokens) + len(packer._starts) for packer in packers))
    assert max(sizes[200:]) <= 1.5 * max(sizes[:100])
    iterator.close()
    threads.readers.shutdown()
    threads.workers.shutdown()


def test_a_plan_for_other_sources_is_refused():
    case = simple([documents(50, 1)])
    other = simple([documents(50, 1)])
    other.data.sources = {"code": other.data.sources["web"]}
    with pytest.raises(AssertionError, match="readers of"):
        Case(other.data, case.plan, 0, None).run()


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("num_lanes", 0, "num_lanes=0"),
        ("holdout", 1.0, "holdout=1.0"),
        ("mode", "lake", "mode='lake'"),
        ("retry_minutes", 0, "retry_minutes=0"),
        ("sources", {}, "sources="),
        ("sources", {"a.b": MemorySource(rows=[])}, "'a.b'"),
    ],
)
def test_wrong_settings_are_refused(field, value, message):
    data = DataConfig(sources={"web": MemorySource(rows=[])})
    data.check()
    setattr(data, field, value)
    with pytest.raises(UserError, match=message):
        data.check()
    if field == "sources":
        return
    tokenizer = WordTokenizer()
    tokenizer.bos_id = None
    data.add_bos = True
    with pytest.raises(UserError, match="add_bos"):
        data.row_spec(tokenizer, None)


def test_resolve_names_the_source_and_looks_new_ones_up():
    known, new = MemorySource(rows=[["1"]], name="known"), MemorySource(rows=[["1"]], name="new")
    data = DataConfig(sources={"known": known, "new": new})
    assert resolve(data, {"known": {"source": known.identity}}) == {"known": known, "new": new}
    with pytest.raises(UserError, match="source 'known': "):
        resolve(data, {"known": {"source": {"kind": "another"}}})
