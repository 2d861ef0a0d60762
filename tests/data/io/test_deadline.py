"""The config's deadline covers all waiting (responses, the rate limit, backoff), in any thread."""

import asyncio
import functools
import os
import socketserver
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from fsspec.asyn import AsyncFileSystem

from jaxtrain.data.io import byte_ranges, rate_limit, retry
from jaxtrain.data.io.locations import stamps
from jaxtrain.data.sources.huggingface import HuggingFace
from jaxtrain.errors import TransientError
from jaxtrain.interfaces import Block, Json
from tests.hub import LoopbackHub, jsonl_bytes


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """[the time], which advances only by sleeping."""
    now = [100.0]
    monkeypatch.setattr(retry.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(retry, "sleep", lambda seconds: now.__setitem__(0, now[0] + seconds))
    return now


def asking(limiter: rate_limit.RateLimiter, retry_after: float) -> None:
    """A request that is always refused."""
    retry.start_request()
    limiter.wait()
    limiter.refused(retry_after)
    raise TransientError("the server answered 429", retry_after)


@pytest.mark.parametrize("retry_after", [0.1, 5.0, 93.0, 3600.0])
def test_waits_for_the_rate_limit_are_inside(clock: list[float], retry_after: float) -> None:
    limiter = rate_limit.RateLimiter("hub", seed=0)
    with pytest.raises(retry.OutlastedError, match=r"Gave up after \d+ attempts? in 18 s"):
        retry.attempt(functools.partial(asking, limiter, retry_after), what="x", deadline=18.0)
    assert clock[0] == pytest.approx(118.0)


def test_a_turn_that_comes_too_late_is_not_waited_for(clock: list[float]) -> None:
    """Others were refused; this reader's first request would have to wait longer than its deadline."""
    limiter = rate_limit.RateLimiter("hub", seed=0)
    limiter.refused(93.0)

    def open_at(row: int) -> Iterator[Block]:
        retry.start_request()
        limiter.wait()
        yield {"text": ["never"]}

    with pytest.raises(retry.OutlastedError, match="hub limits the rate of requests"):
        list(retry.retrying(open_at, 0, what="x", deadline=18.0))
    assert clock[0] == pytest.approx(118.0)
    limiter.wait()  # without a deadline it is waited for
    assert clock[0] > 118.0 + 70


def test_time_without_requests_does_not_count(clock: list[float]) -> None:
    """Decoding and skipping take long, and the first fault afterwards has the whole deadline."""
    tried: list[float] = []

    def open_at(row: int) -> Iterator[Block]:
        if not tried:
            clock[0] += 1000.0
        tried.append(clock[0])
        retry.start_request()
        raise TransientError("reset")
        yield

    with pytest.raises(retry.OutlastedError):
        list(retry.retrying(open_at, 0, what="x", deadline=18.0))
    assert len(tried) > 3
    assert clock[0] == pytest.approx(1118.0)


def test_other_threads_of_the_attempt_keep_it(clock: list[float]) -> None:
    class Slow(byte_ranges.LocalBytes):
        def stamp(self) -> Json:
            retry.pause(93.0, "the server is slow")
            return {"thread": threading.get_ident()}

    with pytest.raises(retry.OutlastedError, match="the server is slow"):
        retry.attempt(lambda: stamps(["a", "b"], [Slow("a"), Slow("b")]), what="x", deadline=18.0)
    assert clock[0] <= 100.0 + 2 * 18.0


@pytest.mark.parametrize("kind", ["latency:30", "loop", "status:503"])
def test_a_sick_server(hub: LoopbackHub, kind: str) -> None:
    """A deadline far below the client's own timeout."""
    hub.commit("org/web", {"a.jsonl": jsonl_bytes(["text"] * 5)})
    source = HuggingFace(name="org/web").resolve()
    hub.fault("/resolve/", kind)
    begun = time.monotonic()
    with pytest.raises(TransientError, match="Gave up after"):
        list(retry.retrying(functools.partial(source.open, 0), 0, what="x", deadline=1.5))
    assert time.monotonic() - begun < 6


@pytest.mark.parametrize(
    ("kind", "after"), [("latency:30", 0), ("latency:30", 1), ("status:429", 1), ("status:503", 2)]
)
def test_a_sick_server_at_the_look_up(hub: LoopbackHub, kind: str, after: int) -> None:
    """The Hub's client would retry for 400 s, or wait as long as the answer says."""
    hub.commit("org/web", {"a.jsonl": jsonl_bytes(["text"] * 5)})
    hub.fault("web", kind, after=after, retry_after=60.0)
    begun = time.monotonic()
    with pytest.raises(TransientError, match="Gave up after"):
        retry.attempt(HuggingFace(name="org/web").resolve, what="x", deadline=1.5)
    assert time.monotonic() - begun < 6


def test_time_between_the_requests_of_a_look_up_does_not_count(hub: LoopbackHub, clock: list[float]) -> None:
    hub.commit("org/web", {"a.jsonl": jsonl_bytes(["text"] * 5)})

    def look_up() -> int:
        size = byte_ranges.HttpBytes(f"{hub.endpoint}/datasets/org/web/resolve/main/a.jsonl").size()
        clock[0] += 1000.0
        assert byte_ranges.session().get(f"{hub.endpoint}/api/datasets/org/web").status_code == 200
        return size

    assert retry.attempt(look_up, what="x", deadline=18.0) > 0


class HungBucket(AsyncFileSystem):
    protocol = "hung"
    cachable = False

    async def _info(self, path: str, **_: Any) -> Any:
        await asyncio.sleep(3600)


def test_a_bucket_whose_client_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(byte_ranges, "file_system", lambda url: (HungBucket(), url))
    begun = time.monotonic()
    with pytest.raises(TransientError, match=r"hung://bucket/a: FSTimeoutError.* Gave up after 1 attempt"):
        retry.attempt(byte_ranges.BucketBytes("hung://bucket/a").size, what="x", deadline=1.0)
    assert time.monotonic() - begun < 6


class _Sick(socketserver.BaseRequestHandler):
    """A server that never answers, resets every connection, or is always overloaded."""

    def handle(self) -> None:
        kind = self.server.kind  # pyright: ignore[reportAttributeAccessIssue]
        if kind == "reset":
            return
        while self.request.recv(1 << 16):
            if kind == "503":
                self.request.sendall(b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\n\r\n")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["hung", "reset", "503"])
@pytest.mark.parametrize("url", ["s3://bucket/a.jsonl", "gs://bucket/a.jsonl"])
def test_the_clients_of_buckets_at_a_sick_server(url: str, kind: str) -> None:
    """s3fs and gcsfs themselves, in a process of their own: opening, listing and reading end at the deadline."""
    pytest.importorskip("s3fs" if url.startswith("s3") else "gcsfs")
    script = f"""
import time
from jaxtrain.data.io import byte_ranges, locations, retry
source = byte_ranges.BucketBytes({url!r})
source.known_size = 100
calls = source.stamp, lambda: source.fetch(0, 50), lambda: locations.expand([{url.replace("a.", "*.")!r}])
for call in calls:
    begun = time.monotonic()
    try:
        retry.attempt(call, what="x", deadline=1.5)
    except retry.OutlastedError as error:
        print(round(time.monotonic() - begun, 1), error)
"""
    server = socketserver.ThreadingTCPServer(("127.0.0.1", 0), _Sick)
    server.kind, server.daemon_threads = kind, True  # pyright: ignore[reportAttributeAccessIssue]
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    address = f"http://127.0.0.1:{server.server_address[1]}"
    keys = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}
    google = {"STORAGE_EMULATOR_HOST": address, "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false"}
    env = {**os.environ, **keys, **google, "AWS_ENDPOINT_URL": address, "PYTHONPATH": os.getcwd()}
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, timeout=120)
    server.shutdown()
    server.server_close()
    lines = done.stdout.splitlines()
    assert len(lines) == 3, done.stdout + done.stderr
    for line in lines:
        assert "Gave up after" in line
        assert float(line.split()[0]) < 8, line
