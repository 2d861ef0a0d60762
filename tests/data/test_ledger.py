"""Gathering the lanes' states: complete, from hosts with any number of lanes, and never from two that disagree.

And what each stage took from each source, from the lanes' states at its ends.
"""

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
import pytest

from jaxtrain.data import ledger
from jaxtrain.data.lanes import STATE_FIELDS
from jaxtrain.data.pipeline import DataConfig
from jaxtrain.errors import UserError
from jaxtrain.plan import Plan, Stage
from tests.data.memory_source import MemorySource, documents
from tests.data.runs import Case, plan_of


def states(lanes: range) -> dict[int, np.ndarray]:
    """States of 2 sources, with values above 32 bits."""
    return {lane: (lane + 1) * 2**33 + np.arange(2 * len(STATE_FIELDS)).reshape(2, -1) for lane in lanes}


@pytest.fixture
def gathered(monkeypatch):
    """Gathers from hosts with some lanes each, one thread per host: what every host receives, and how many bytes."""

    def gathered(hosts: list[dict[int, np.ndarray]], num_lanes: int) -> tuple[list[np.ndarray], int]:
        barrier, sent, here, received = threading.Barrier(len(hosts)), {}, threading.local(), []

        def allgather(array: np.ndarray) -> np.ndarray:
            assert array.dtype == np.uint32  # JAX truncates int64
            sent[here.host] = array
            barrier.wait()
            found = np.stack([sent[host] for host in range(len(hosts))])
            received.append(found.nbytes)
            barrier.wait()
            return found

        def on_host(host: int) -> np.ndarray:
            here.host = host
            return ledger.gather(hosts[host], num_lanes)

        monkeypatch.setattr(jax, "process_count", lambda: len(hosts))
        monkeypatch.setattr(ledger.multihost_utils, "process_allgather", allgather)
        with ThreadPoolExecutor(len(hosts)) as executor:
            return list(executor.map(on_host, range(len(hosts)))), sum(received) // len(hosts)

    return gathered


@pytest.mark.parametrize(
    "lanes",
    [[range(4), range(4, 8)], [range(1), range(1, 8)], [range(5), range(3, 8), range(2, 4)], [range(8), range(8)]],
    ids=str,
)
def test_all_hosts_get_all_lanes(gathered, lanes):
    found, _ = gathered([states(some) for some in lanes], 8)
    for one in found:
        assert one.dtype == np.int64
        np.testing.assert_array_equal(one, np.stack(list(states(range(8)).values())))


def test_one_host(monkeypatch):
    np.testing.assert_array_equal(ledger.gather(states(range(3)), 3), np.stack(list(states(range(3)).values())))


def test_what_travels_does_not_grow_with_hosts(gathered):
    """A host sends its own lanes: 32 lanes are 7 kB, however many hosts share them."""
    sizes = {hosts: gathered([states(range(32)[host::hosts]) for host in range(hosts)], 32)[1] for hosts in (2, 16)}
    assert sizes[16] - sizes[2] == 4 * (16 - 2)  # the number of lanes that each has
    assert sizes[2] == 32 * 8 * (1 + 2 * len(STATE_FIELDS)) + 4 * 2


def test_a_lane_that_nobody_has_or_two_disagree_on(gathered):
    with pytest.raises(AssertionError, match=r"no host reads lanes \[7\]"):
        ledger.join(np.arange(7), np.stack(list(states(range(7)).values())), 8)
    other = states(range(3, 8))
    other[3][1, 2] += 1
    with pytest.raises(AssertionError, match=r"hosts disagree on lanes \[3\]"):
        gathered([states(range(4)), other], 8)


def test_a_record_of_version_0_1_is_read():
    """It has no counts of cut documents and padding, and no rows of whole documents."""
    saved = ledger.to_json(np.stack(list(states(range(2)).values())), "ab")
    saved["fields"] = saved["fields"][:10]
    saved["lanes"] = [[*lane[:10], *lane[len(STATE_FIELDS) :][:10]] for lane in saved["lanes"]]
    for lane, state in ledger.from_json(saved, "ba", 2).items():
        np.testing.assert_array_equal(state[:, :10], states(range(2))[lane][::-1, :10])
        assert not state[:, 10:].any()
    saved["fields"] = saved["fields"][:9]
    with pytest.raises(UserError, match="continue with the version of jaxtrain that wrote it"):
        ledger.from_json(saved, "ba", 2)


COUNTED = {"tokens": 0, "unique_tokens": 0, "documents": 0, "epoch": 0}


@pytest.fixture(scope="module")
def case() -> Case:
    """Three stages, of 5, 4 and 4 steps; the last batch counts 30 of its 80 tokens; `b` is read more than once."""
    sources: dict[str, Any] = {
        "a": MemorySource(rows=[documents(40, seed, 20) for seed in range(6)], name="a"),
        "b": MemorySource(rows=[documents(12, 9)], name="b"),
    }
    data = DataConfig(sources=sources, num_lanes=2, shuffle_window=4)
    stages = [
        Stage(seq_len=8, batch_size=8, tokens=5 * 64, weights={"a": 0.25, "b": 0.75}, overlap=0.5),
        Stage(seq_len=16, batch_size=4, tokens=4 * 64, weights={"a": 1.0}),
        Stage(seq_len=20, batch_size=4, weights={"a": 0.5, "b": 0.5}),
    ]
    return Case(data, plan_of(data, stages, 3, total_tokens=9 * 64 + 3 * 80 + 30), 3, None)


@pytest.fixture(scope="module")
def given(case: Case) -> dict[int, dict]:
    """The sources' totals after each step of the whole run."""
    names = case.plan.source_names
    return {batch.step: ledger.by_source(ledger.gather(batch.states, 2), names) for batch in case.run()}


def go(ends: ledger.StageEnds, given: dict[int, dict], after: int = 0) -> dict[int, dict]:
    """Step → the stage's totals, as in a run that logs every step."""
    found = {}
    for step in sorted(given):
        if step > after:
            ends.note(step, given[step])
            found[step] = ends.in_stage(step, given[step])
    return found


def test_what_a_stage_took(case, given):
    whole, plan = go(ends := ledger.StageEnds(case.plan), given), case.plan
    for step, parts in whole.items():
        at, names = plan.at(step), plan.source_names
        first = plan.stages[at.stage - 1].first_step
        wanted = plan.source_tokens_before(step + 1) - plan.source_tokens_before(first)
        assert [parts[name]["tokens"] for name in names] == wanted.tolist()
        assert [parts[name]["share"] for name in names] == pytest.approx((wanted / wanted.sum()).tolist())
    last = [whole[stage.last_step] for stage in plan.stages]
    assert (last[1]["b"]["tokens"], last[1]["b"]["documents"], last[1]["b"]["share"]) == (0, 0, 0.0)
    assert sum(part["tokens"] for part in last[2].values()) == 3 * 80 + 30
    assert 0 < last[0]["b"]["unique_tokens"] < last[0]["b"]["tokens"]  # rows of one lane overlap by half
    for name in plan.source_names:
        for key, own in (*((key, key) for key in list(COUNTED)[:3]), ("epoch", "epochs")):
            assert sum(part[name][own] for part in last) == given[13][name][key]
    assert [part["b"]["epochs"] for part in last] == [1, 0, 2]
    assert [(end["stage"], end["step"]) for end in ends.to_json()] == [(1, 5), (2, 9), (3, 13)]


def test_stages_ends_are_kept_over_a_resume_from_any_step(case, given):
    whole = go(ends := ledger.StageEnds(case.plan), given)
    for step in given:
        before = ledger.StageEnds(case.plan)
        go(before, {at: given[at] for at in given if at <= step})
        after = ledger.StageEnds(case.plan)
        after.restore(json.loads(json.dumps(before.to_json())), step, given[step])
        assert go(after, given, step) == {at: whole[at] for at in whole if at > step}
        assert after.to_json() == ends.to_json()


def test_a_checkpoint_that_does_not_tell(case, given):
    """From an earlier version: the totals of a stage that began before it are unknown, the next stage's are known."""
    whole = go(ledger.StageEnds(case.plan), given)
    for step in given:
        ends = ledger.StageEnds(case.plan)
        ends.restore([], step, given[step])
        for at, parts in go(ends, given, step).items():
            first = case.plan.stages[case.plan.at(at).stage - 1].first_step
            assert parts == (whole[at] if first == 1 or first > step else None)


def test_later_stages_may_be_others_now_and_sources_may_come(case, given):
    """The checkpoint's stage is cut at its step, and a recorded end that no longer is one is dropped."""
    cut = Stage(seq_len=8, batch_size=8, tokens=3 * 64, weights={"a": 0.25, "b": 0.75}, overlap=0.5)
    new = Stage(seq_len=8, batch_size=8, weights={"a": 0.5, "c": 0.5})
    data = DataConfig(sources={**case.data.sources, "c": MemorySource(rows=[["1 2"]])}, num_lanes=2)
    plan: Plan = plan_of(data, [cut, new], 3, total_tokens=5 * 64)
    ends = ledger.StageEnds(plan)
    recorded = [{"step": 2, "sources": given[2]}, {"step": 3, "sources": given[3]}]
    ends.restore(recorded, 3, {**given[3], "c": {**COUNTED, "share": 0.0}})
    assert [(end["stage"], end["step"]) for end in ends.to_json()] == [(1, 3)]
    later = {name: {key: value + 7 for key, value in counts.items()} for name, counts in given[3].items()}
    found = ends.in_stage(4, {**later, "c": {**COUNTED, "tokens": 14}})
    assert found is not None
    assert found["c"] == {"tokens": 14, "unique_tokens": 0, "documents": 0, "epochs": 0, "share": 0.5}
    assert found["a"] == {"tokens": 7, "unique_tokens": 7, "documents": 7, "epochs": 7, "share": 0.25}
