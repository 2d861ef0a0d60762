"""Hundreds of faults of every kind, through the real clients and the whole data path: equal fingerprints, or the right
error. Nothing waits: pauses between attempts are recorded, and timeouts are short.
"""

import collections
import logging
import random
import re
import socket
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from jaxtrain.data import fingerprint
from jaxtrain.data.io import byte_ranges, rate_limit, retry
from jaxtrain.data.pipeline import DataConfig
from jaxtrain.data.sources import parquet, streams
from jaxtrain.data.sources.huggingface import HuggingFace
from jaxtrain.errors import CorruptError, TransientError, UserError
from jaxtrain.interfaces import Json, Source
from jaxtrain.plan import Stage
from tests.data.memory_source import documents
from tests.data.runs import Case, batches_of, plan_of
from tests.hub import LoopbackHub, csv_bytes, jsonl_bytes, parquet_bytes
from tests.tiers import nightly_but

ROWS = 400
STEPS = 40


@pytest.fixture(autouse=True)
def spans(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What the readers would have slept. Requests are small, so that there are many; timeouts are short."""
    slept: list[float] = []
    monkeypatch.setattr(retry, "sleep", slept.append)
    monkeypatch.setattr(
        rate_limit.RateLimiter, "wait", lambda self: None
    )  # its pauses are test_rate_limit's, and no clock moves here
    monkeypatch.setattr(byte_ranges, "_TIMEOUT", 0.5)
    monkeypatch.setattr(parquet, "_SMALLEST", 1500)
    monkeypatch.setattr(parquet, "_FIRST_TAIL", 600)
    monkeypatch.setattr(streams, "_REQUEST", 1500)
    return slept


def publish(hub: LoopbackHub) -> None:
    """Three datasets in other formats; parquet in many row groups, of which one request returns a few."""
    texts = [documents(ROWS, seed, 12) for seed in range(6)]
    web = {f"train-{n}.parquet": parquet_bytes(texts[n], row_group_size=25) for n in range(3)}
    hub.commit("org/web", web)
    hub.commit("org/code", {f"train-{n}.jsonl.gz": jsonl_bytes(texts[3 + n], compress=True) for n in range(2)})
    hub.commit("org/table", {"train.csv": csv_bytes([text or "7" for text in texts[5]])})


class Ready:
    """A source that has been looked up: the test is of reading."""

    max_samples = None
    transforms = ()

    def __init__(self, config: HuggingFace):
        self._source = config.resolve()

    def resolve(self, identity: Json | None = None) -> Source:
        return self._source


def case_of(sources: dict[str, Any], *, retry_minutes: float = 1e5, steps: int = STEPS) -> Case:
    data = DataConfig(sources=sources, num_lanes=4, shuffle_window=16, retry_minutes=retry_minutes)
    weights = {name: 1 / len(sources) for name in sources}
    plan = plan_of(data, [Stage(seq_len=32, batch_size=16, weights=weights)], 0, steps=steps)
    return Case(data, plan, 0, None)


def all_formats() -> Case:
    names = {"web": "org/web", "code": "org/code", "table": "org/table"}
    return case_of({source: Ready(HuggingFace(name=name, fetch_rows=20)) for source, name in names.items()})


def fingerprint_of(case: Case) -> str:
    """The run's fingerprint after its last step, as the trainer computes it."""
    words = np.zeros(2, np.uint32)
    with batches_of(case, states={}) as batches:
        for batch in batches:
            at = case.plan.at(batch.step)
            low, high = fingerprint.row_numbers(fingerprint.split(at.rows_before), at.batch_size)
            words += fingerprint.of_rows(batch.arrays, low, high)
    return fingerprint.text(words)


@pytest.fixture
def wanted(hub: LoopbackHub) -> str:
    """The fingerprint without faults."""
    publish(hub)
    return fingerprint_of(all_formats())


KINDS: tuple[dict[str, Any], ...] = (
    *({"kind": f"status:{status}"} for status in (408, 429, 500, 502, 503, 504, 520)),
    {"kind": "status:429", "retry_after": 30},
    {"kind": "status:503", "retry_after": 2},
    {"kind": "reset"},
    {"kind": "reset", "after_bytes": 300},
    {"kind": "truncate"},
    {"kind": "truncate", "after_bytes": 1},
    {"kind": "wrong_range"},
    {"kind": "ignore_range"},
    {"kind": "latency:0.02"},
)
SLOW = {"kind": "slow", "seconds": 0.8, "count": 6}


class NoNetwork:
    """Makes name lookups and connections fail at random, `times` in all. Open connections continue."""

    def __init__(self, patch: pytest.MonkeyPatch, seed: int, chance: float, times: int):
        self.rng, self.chance, self.left, self.fired = random.Random(seed), chance, times, 0
        self.lock = threading.Lock()
        look_up, connect = socket.getaddrinfo, socket.socket.connect

        def getaddrinfo(*args: Any, **kwargs: Any) -> Any:
            if self.fires():
                raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")
            return look_up(*args, **kwargs)

        def refuse(sock: socket.socket, address: Any) -> None:
            if self.fires():
                raise ConnectionRefusedError(111, "Connection refused")
            connect(sock, address)

        patch.setattr(socket, "getaddrinfo", getaddrinfo)
        patch.setattr(socket.socket, "connect", refuse)

    def fires(self) -> bool:
        with self.lock:
            hit = self.left > 0 and self.rng.random() < self.chance
            self.left -= hit
            self.fired += hit
            return hit


def spoil(hub: LoopbackHub, patch: pytest.MonkeyPatch, seed: int) -> Callable[[], int]:
    """Random faults of every kind; the result counts those that were injected."""
    rng = random.Random(seed)
    rules = [
        hub.fault("/train", probability=rng.uniform(0.01, 0.04), seed=rng.randrange(10**6), **kind) for kind in KINDS
    ]
    rules.append(hub.fault("/train", probability=0.02, seed=seed, **SLOW))
    # Complete, but wrong once: read again. (A CSV file has no checksum to detect it.)
    rules += [hub.fault(f"train-{n}.parquet", "corrupt", count=1, after=rng.randrange(20)) for n in range(3)]
    away = NoNetwork(patch, seed, 0.3, 100)
    return lambda: sum(rule.fired for rule in rules) + away.fired


def read_until_many(case: Case, wanted: str, fired: Callable[[], int]) -> None:
    """The number of requests, and so of faults, depends on thread timing: repeat until there were over 80."""
    for _ in range(10):
        assert fingerprint_of(case) == wanted
        if fired() > 80:
            return
    pytest.fail(f"only {fired()} faults")


def test_faults_of_every_kind_change_nothing(hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch, wanted: str) -> None:
    case = all_formats()
    fired = spoil(hub, monkeypatch, 0)
    read_until_many(case, wanted, fired)


@pytest.mark.slow
@pytest.mark.parametrize("seed", nightly_but([1, 2], range(1, 13)))
def test_many_more_faults_change_nothing(
    hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch, wanted: str, seed: int
) -> None:
    case = all_formats()
    fired = spoil(hub, monkeypatch, seed)
    read_until_many(case, wanted, fired)


def test_a_new_commit_in_mid_run_changes_nothing(hub: LoopbackHub, wanted: str) -> None:
    case = all_formats()
    words = np.zeros(2, np.uint32)
    with batches_of(case, states={}) as batches:
        for batch in batches:
            if batch.step == 3:
                hub.commit("org/web", {f"train-{n}.parquet": parquet_bytes(["1 2 3"] * 9) for n in range(3)})
                hub.commit("org/code", {"train-0.jsonl.gz": jsonl_bytes(["1"] * 9, compress=True)})
                hub.commit("org/table", {"more.csv": csv_bytes(["5"])}, delete=["train.csv"])
            at = case.plan.at(batch.step)
            low, high = fingerprint.row_numbers(fingerprint.split(at.rows_before), at.batch_size)
            words += fingerprint.of_rows(batch.arrays, low, high)
    assert fingerprint.text(words) == wanted


@pytest.mark.parametrize("suffix", ["parquet", "jsonl.gz"])
@pytest.mark.parametrize("same_size", [False, True])
def test_a_file_that_changes_in_mid_run_is_noticed(hub: LoopbackHub, suffix: str, same_size: bool) -> None:
    """At an address whose content can change, unlike a commit: detected by size or ETag."""
    texts = [" ".join(str(n) for _ in range(60)) for n in range(3000)]

    def data(of: list[str]) -> bytes:
        return parquet_bytes(of, row_group_size=50) if suffix == "parquet" else jsonl_bytes(of, compress=True)

    before = data(texts)
    other = bytearray(before)
    other[len(other) // 2] ^= 1
    after = bytes(other) if same_size else data([*texts[:100], "1 2 3", *texts[100:]])
    hub.commit("org/files", {f"a.{suffix}": before})
    url = f"{hub.endpoint}/datasets/org/files/resolve/main/a.{suffix}"
    builder = "parquet" if suffix == "parquet" else "json"
    case = case_of({"files": HuggingFace(name=builder, data_files=(url,), fetch_rows=20)}, steps=1000)
    with batches_of(case, states={}, prefetch=1) as batches:
        next(batches)
        hub.commit("org/files", {f"a.{suffix}": after})
        with pytest.raises(UserError, match=rf"a\.{suffix} changed while it was read"):
            collections.deque(batches, maxlen=0)


LASTING: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "401": ({"kind": "status:401"}, UserError, "no valid credentials"),
    "403": ({"kind": "status:403"}, UserError, "forbidden"),
    "404": ({"kind": "status:404"}, UserError, "no such file"),
    "410": ({"kind": "status:410"}, UserError, "no such file"),
    "500": ({"kind": "status:500"}, TransientError, r"the server answered 500.*Gave up after \d+ attempts in 60 s"),
    "429": ({"kind": "status:429", "retry_after": 9}, TransientError, r"the server answered 429.*Gave up"),
    "reset": ({"kind": "reset"}, TransientError, "Gave up"),
    "cut": ({"kind": "reset", "after_bytes": 100}, TransientError, "Gave up"),
    "truncate": ({"kind": "truncate"}, TransientError, "Gave up"),
    "wrong range": ({"kind": "wrong_range"}, TransientError, r"asked for .* got .*Gave up"),
    "ignored range": ({"kind": "ignore_range"}, TransientError, r"whole file instead of a range.*Gave up"),
    "stalled": ({"kind": "slow", "seconds": 0.8}, TransientError, "Gave up"),
    "corrupt": ({"kind": "corrupt"}, CorruptError, r"\(twice, at row \d+\).*data\.on_corrupt=skip"),
}


@pytest.mark.parametrize("name", LASTING)
def test_what_lasts_ends_with_the_right_error(
    hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch, spans: list[float], name: str
) -> None:
    """Soon, with source and file, and again at every further step; never as the end of the data."""
    kind, error, text = LASTING[name]
    if name == "stalled":
        monkeypatch.setattr(byte_ranges, "_TIMEOUT", 0.2)
    publish(hub)
    case = case_of({"web": HuggingFace(name="org/web", fetch_rows=20)}, retry_minutes=1, steps=10_000)
    with batches_of(case, states={}, prefetch=1) as batches:
        next(batches)
        hub.fault("/train", **kind)
        for _ in range(2):
            with pytest.raises(error, match=re.compile(text, re.DOTALL)) as caught:
                collections.deque(batches, maxlen=0)
            assert re.search(r"train-\d\.parquet", str(caught.value))
    if error is TransientError:
        # Each lane's reader waits until the deadline, and doubles its pauses.
        assert 60 - 1e-6 <= sum(spans) <= 60 * 4 * 2 + 1e-6
        assert max(spans) > 9
    else:
        assert not spans


def test_a_server_that_says_when_is_asked_then(hub: LoopbackHub, spans: list[float], wanted: str) -> None:
    case = all_formats()
    hub.fault("/train", "status:429", retry_after=17, count=25)
    assert fingerprint_of(case) == wanted
    assert len(spans) == 25
    assert all(17 <= seconds <= 60 for seconds in spans)


@pytest.mark.parametrize("kind", ["dns", "refused"])
def test_no_network_in_mid_run(
    hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    """Open connections are lost, and new ones fail: a lookup or a connection fails until the deadline."""
    publish(hub)
    case = case_of({"web": HuggingFace(name="org/web", fetch_rows=20)}, retry_minutes=1, steps=10_000)
    with batches_of(case, states={}, prefetch=1) as batches:
        next(batches)
        away = NoNetwork(monkeypatch, 0, 1.0, 10**9)
        if kind == "refused":
            monkeypatch.undo()
            monkeypatch.setattr(retry, "sleep", lambda seconds: None)
            refuse = ConnectionRefusedError(111, "Connection refused")

            def connect(sock: socket.socket, address: Any) -> None:
                raise refuse

            monkeypatch.setattr(socket.socket, "connect", connect)
        else:
            assert away.left
        hub.fault("/train", "reset")
        with pytest.raises(TransientError, match=r"network\?|[Rr]eset|disconnected.*Gave up"):
            collections.deque(batches, maxlen=0)


def test_one_line_for_an_outage(hub: LoopbackHub, caplog: pytest.LogCaptureFixture, wanted: str) -> None:
    """All readers of all sources run into it many times."""
    caplog.set_level(logging.INFO, "jaxtrain")
    case = all_formats()
    hub.fault("/train", "status:503", count=60)
    assert fingerprint_of(case) == wanted
    lines = [record.getMessage() for record in caplog.records if record.name == "jaxtrain"]
    begun = [line for line in lines if "Trying again until" in line]
    # A response in flight when the others had recovered may begin a second outage.
    assert 1 <= len(begun) <= 2, lines
    assert len([line for line in lines if "Reading continues after" in line]) == len(begun)
