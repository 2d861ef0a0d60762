"""Many readers of a Hub with a rate limit: the data is unchanged, and few requests are refused."""

import functools
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from jaxtrain.data.io import rate_limit, retry
from jaxtrain.data.io.rate_limit import RateLimiter
from jaxtrain.data.sources.huggingface import HuggingFace
from tests.data.memory_source import documents
from tests.hub import LoopbackHub, parquet_bytes

READERS = 64
ROWS, UNIT = 120, 10


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """[the time], which advances only by sleeping."""
    now = [100.0]
    monkeypatch.setattr(rate_limit.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(retry, "sleep", lambda seconds: now.__setitem__(0, now[0] + seconds))
    return now


def test_a_server_that_never_refuses_is_not_waited_for(clock: list[float]) -> None:
    one = RateLimiter(seed=0)
    for _ in range(100):
        one.wait()
        one.answered()
    assert clock == [100.0]


def test_a_refusal_holds_all_and_slows_down(clock: list[float]) -> None:
    one = RateLimiter(seed=0)
    for _ in range(8):
        one.refused(7.0)  # asked for together: one refusal
    assert one.pause == rate_limit.FIRST
    one.wait()
    assert 107.0 <= clock[0] <= 108.4
    begun = clock[0]
    for _ in range(20):
        one.wait()
    assert 0.6 < (clock[0] - begun) / (20 * rate_limit.FIRST) < 1.4
    clock[0] += 10.0
    one.refused(None)
    assert one.pause == 2 * rate_limit.FIRST
    for _ in range(200):
        one.answered()
    assert one.pause == 0.0


def test_each_server_has_its_own() -> None:
    assert rate_limit.limiter_of("http://a/x?y") is rate_limit.limiter_of("http://a/z")
    assert rate_limit.limiter_of("http://a/x") is not rate_limit.limiter_of("http://b/x")


@pytest.mark.slow
@pytest.mark.parametrize("hosts", [1, READERS])
def test_many_readers_of_a_hub_with_a_limit(hub: LoopbackHub, hosts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """64 readers, on one host or on 64, each with its own file; the limit is a fraction of the rate that they would
    need.
    """
    texts = [documents(ROWS, seed) for seed in range(READERS)]
    hub.commit(
        "org/web", {f"train-{n:02}.parquet": parquet_bytes(texts[n], row_group_size=UNIT) for n in range(READERS)}
    )
    source = HuggingFace(name="org/web", fetch_rows=UNIT).resolve()
    limiters = [RateLimiter() for _ in range(hosts)]
    mine = threading.local()
    monkeypatch.setattr(rate_limit, "limiter_of", lambda url: mine.limiter)
    limit = hub.limit("/resolve/", requests=100, seconds=1.0)
    resolved = hub.count("/api/")

    def read(index: int) -> list[str]:
        mine.limiter = limiters[index % hosts]
        found: list[str] = []
        for first in range(0, ROWS, UNIT):  # a unit opens its file again
            stop = first + UNIT
            open_at = functools.partial(source.open, index, stop=stop)
            blocks = retry.retrying(open_at, first, what=f"file {index}", deadline=300.0)
            found += [text for block in blocks for text in block["text"]]
        return found

    with ThreadPoolExecutor(READERS) as readers:
        found = list(readers.map(read, range(READERS)))
    asked = hub.count("/resolve/")
    print(f"\n{hosts} hosts: {asked} requests, {limit.refused} refused")
    assert found == texts
    assert 0 < limit.refused < asked / 2
    assert hub.count("/api/") == resolved  # nothing is looked up again
