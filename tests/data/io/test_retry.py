"""Errors as the client libraries raise them → what they mean; and reading through hundreds of faults."""

import collections
import errno
import gzip
import http.client
import json
import logging
import os
import random
import socket
import ssl
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Generator, Iterator

import httpx2
import pyarrow as pa
import pytest
from huggingface_hub import constants

from jaxtrain.data.io import retry
from jaxtrain.errors import CorruptError, TransientError, UserError
from jaxtrain.interfaces import Block
from tests.hub import SECRET, TOKEN, LoopbackHub


class Slept:
    """Replaces time.sleep: nothing waits, and the requested times are recorded."""

    def __init__(self) -> None:
        self.spans: list[float] = []

    def __call__(self, seconds: float) -> None:
        self.spans.append(seconds)


@pytest.fixture
def slept(monkeypatch) -> Slept:
    spans = Slept()
    monkeypatch.setattr(retry, "sleep", spans)
    return spans


def named(name: str, base: type[Exception] = Exception, **attributes: object) -> Exception:
    """An error of a library that is not installed here, with its class's name."""
    error = type(name, (base,), {})("it failed")
    for key, value in attributes.items():
        setattr(error, key, value)
    return error


def chained(outer: Exception, cause: Exception) -> Exception:
    outer.__cause__ = cause
    return outer


TRANSIENT = [
    ConnectionResetError(errno.ECONNRESET, "reset"),
    ConnectionRefusedError(errno.ECONNREFUSED, "refused"),
    OSError(errno.ENETUNREACH, "no route"),
    OSError(errno.ESTALE, "stale handle"),
    OSError(errno.EIO, "input/output error"),
    TimeoutError("timed out"),
    socket.gaierror(-3, "Temporary failure in name resolution"),
    ssl.SSLEOFError(8, "EOF occurred in violation of protocol"),
    http.client.IncompleteRead(b"abc", 10),
    http.client.RemoteDisconnected("closed"),
    named("ServerDisconnectedError", type("ClientConnectionError", (Exception,), {})),
    named("ClientResponseError", status=503, headers={"Retry-After": "3"}),
    named("ClientPayloadError"),
    named("ReadTimeoutError", type("HTTPClientError", (Exception,), {})),
    named("ClientError", response={"ResponseMetadata": {"HTTPStatusCode": 500, "HTTPHeaders": {}}}),
    named("HttpError", code=429),
    chained(FileNotFoundError("no such file"), ConnectionResetError(errno.ECONNRESET, "reset")),
    chained(named("LocalEntryNotFoundError", FileNotFoundError), named("ConnectError")),
    named("LocalEntryNotFoundError", FileNotFoundError),
    chained(RuntimeError("wrapped"), chained(ValueError("again"), TransientError("ours"))),
    RuntimeError("Cannot send a request, as the client has been closed."),
]
CORRUPT = [
    pa.ArrowInvalid("not a parquet file"),
    gzip.BadGzipFile("not gzip"),
    zlib.error("bad block"),
    json.JSONDecodeError("bad", "x", 0),
    EOFError("ended early"),
    UnicodeDecodeError("utf-8", b"\xff", 0, 1, "bad byte"),
    chained(RuntimeError("wrapped"), pa.ArrowInvalid("bad")),
]
USER = [
    named("OfflineModeIsEnabled", ConnectionError),
    chained(named("LocalEntryNotFoundError", FileNotFoundError), named("OfflineModeIsEnabled", ConnectionError)),
    named("GatedRepoError", type("RepositoryNotFoundError", (OSError,), {}), repo_id="org/x", repo_type="dataset"),
    named("RepositoryNotFoundError", OSError),
    named("RevisionNotFoundError", OSError),
    named("RemoteEntryNotFoundError", type("EntryNotFoundError", (Exception,), {})),
    named("ClientError", response={"ResponseMetadata": {"HTTPStatusCode": 403, "HTTPHeaders": {}}}),
    named("HttpError", code=404),
    named("NoCredentialsError"),
    FileNotFoundError(errno.ENOENT, "no such file", "x.parquet"),
    PermissionError(errno.EACCES, "denied", "x.parquet"),
    ssl.SSLCertVerificationError("CERTIFICATE_VERIFY_FAILED: self-signed"),
    UserError("ours"),
]
OTHER = [OSError(errno.ENOSPC, "disk full"), KeyError("x"), RuntimeError("a bug"), ZeroDivisionError(), MemoryError()]


@pytest.mark.parametrize("error", TRANSIENT, ids=repr)
def test_transient(error):
    assert type(retry.classify(error, "x.parquet of org/web")) is TransientError


def test_what_outlasted_a_deadline_is_not_retried(monkeypatch):
    """By a caller with a longer deadline: a look-up inside a look-up."""
    tried = []
    monkeypatch.setattr(retry, "sleep", lambda seconds: None)

    def inner():
        tried.append(1)
        raise retry.OutlastedError("x: reset. Gave up after 2 attempts in 18 s.")

    with pytest.raises(retry.OutlastedError, match="2 attempts in 18 s"):
        retry.attempt(inner, what="x", deadline=60.0)
    assert len(tried) == 1


@pytest.mark.parametrize("number", [errno.ENOENT, errno.ENOTDIR, errno.EACCES, errno.EROFS, errno.ENOSPC])
def test_a_cache_of_the_hub_that_cannot_be_used(monkeypatch, number):
    monkeypatch.setattr(constants, "HF_HOME", "/home/hf")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", "/models/hub")
    for path, name, folder in (
        ("/home/hf/token", "HF_HOME", "/home/hf"),
        ("/models/hub", "HF_HUB_CACHE", "/models/hub"),
    ):
        found = retry.classify(OSError(number, "refused", path), "the model org/m")
        assert type(found) is UserError
        assert "the model org/m: files of the Hub cannot be kept here" in str(found)
        assert f"Set {name}, which is {folder}, to a folder" in str(found)
    other = retry.classify(OSError(number, "refused", "/home/hf2/token"), "x")
    assert "HF_HOME" not in str(other)


def all_of(cls: type) -> Iterator[type]:
    yield cls
    for below in cls.__subclasses__():
        yield from all_of(below)


CLIENT = [
    *dict.fromkeys(all_of(httpx2.HTTPError)),
    *dict.fromkeys(all_of(httpx2.StreamError)),
    *(httpx2.InvalidURL, httpx2.CookieConflict),
]
FATAL = {"UnsupportedProtocol", "LocalProtocolError", "InvalidURL", "CookieConflict"}


@pytest.mark.parametrize("cls", [cls for cls in CLIENT if cls.__module__ == "httpx2"], ids=lambda cls: cls.__name__)
def test_every_error_of_the_client_has_a_class(cls):
    error = cls.__new__(cls)
    error.args = ("it failed",)
    if cls.__name__ == "StreamError":
        return  # never raised itself
    assert type(retry.classify(error, "x")) is (UserError if cls.__name__ in FATAL else TransientError)


@pytest.mark.parametrize("error", CORRUPT, ids=repr)
def test_corrupt(error):
    assert type(retry.classify(error)) is CorruptError


@pytest.mark.parametrize("error", USER, ids=repr)
def test_user(error):
    fault = retry.classify(error, "x.parquet of org/web")
    assert type(fault) is UserError
    assert str(fault).endswith((".", "ours"))


@pytest.mark.parametrize("error", OTHER, ids=repr)
def test_anything_else_stays_what_it_is(error):
    assert retry.classify(error) is error


def test_an_error_handled_long_before_is_no_cause():
    """`raise ... from None` cuts the chain."""

    def fail() -> None:
        try:
            raise ConnectionResetError("reset")
        except ConnectionResetError:
            raise RuntimeError("a bug") from None

    with pytest.raises(RuntimeError) as caught:
        fail()
    assert retry.classify(caught.value) is caught.value


@pytest.mark.parametrize(
    ("status", "kind"),
    [(s, TransientError) for s in (408, 425, 429, 500, 502, 503, 504, 520)]
    + [(s, UserError) for s in (400, 401, 403, 404, 405, 410, 418, 451)],
)
def test_statuses_of_the_real_client(hub: LoopbackHub, status, kind):
    from huggingface_hub import HfApi

    hub.commit("org/web", {"a": b""})
    hub.fault("org/web", f"status:{status}")
    with pytest.raises(Exception) as caught:
        HfApi(token=TOKEN).dataset_info("org/web")
    fault = retry.classify(caught.value, "dataset org/web")
    assert type(fault) is kind
    assert "dataset org/web" in str(fault)


def test_retry_after():
    assert retry.retry_after({"Retry-After": "12"}) == 12
    assert retry.retry_after({"retry-after": "1.5"}) == 1.5
    in_a_minute = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(time.time() + 60))
    assert 55 < (retry.retry_after({"Retry-After": in_a_minute}) or 0) < 65
    assert retry.retry_after({"ratelimit": '"api";r=0;t=55'}) == 55
    assert retry.retry_after({"ratelimit": '"api";r=12;t=55'}) is None
    assert retry.retry_after({"Retry-After": "soon"}) is None
    assert retry.retry_after(None) is None
    fault = retry.classify(named("ClientResponseError", status=429, headers={"Retry-After": "3"}))
    assert isinstance(fault, TransientError)
    assert fault.retry_after == 3


def test_secrets_stay_out():
    for text in (
        f"GET https://store.example/x.parquet?X-Amz-Signature={SECRET}&Expires=1 failed",
        f"https://user:{SECRET}@example.org/x",
        f"Authorization: Bearer {SECRET}",
        "token hf_abcdefghijkl was refused",
    ):
        shown = retry.redact(text)
        assert SECRET not in shown
        assert "abcdefghijkl" not in shown
    assert retry.redact("see https://example.org/a/b.parquet, please") == "see https://example.org/a/b.parquet, please"
    assert retry.redact("is it? https://a.b/c?d=e&token=f 'x'") == "is it? https://a.b/c?d=e 'x'"


# Backoff


def test_backoff_doubles_with_jitter_up_to_a_limit(slept):
    backoff = retry.Backoff(10_000, first=1.0, limit=60.0, seed=0)
    for _ in range(12):
        backoff.wait(TransientError("down"))
    for i, seconds in enumerate(slept.spans):
        span = min(2.0**i, 60.0)
        assert span / 2 <= seconds <= span
    assert len(set(slept.spans)) == 12
    backoff.recovered()
    backoff.wait(TransientError("down"))
    assert slept.spans[-1] <= 1.0
    backoff.close()


def test_two_readers_do_not_come_back_together(slept):
    for _ in range(2):
        backoff = retry.Backoff(100)
        backoff.wait(TransientError("down"))
        backoff.close()
    assert slept.spans[0] != slept.spans[1]


def test_retry_after_is_honoured(slept):
    backoff = retry.Backoff(1000, seed=0)
    backoff.wait(TransientError("slow down", retry_after=120))
    backoff.close()
    assert 120 <= slept.spans[0] <= 132


def test_deadline_is_for_each_outage_and_has_a_last_attempt(slept):
    backoff = retry.Backoff(30, seed=0)
    for _ in range(2):
        down = TransientError("x: down")
        with pytest.raises(TransientError, match=r"x: down\. Gave up after \d attempts in 30 s"):
            collections.deque((backoff.wait(down, "x") for _ in range(100)), maxlen=0)
        assert sum(slept.spans) == pytest.approx(30)
        slept.spans.clear()
        backoff.recovered()


def test_one_line_for_an_outage(slept, caplog):
    caplog.set_level(logging.INFO, "jaxtrain")
    readers = [retry.Backoff(100, seed=i) for i in range(5)]
    for _ in range(3):
        for i, reader in enumerate(readers):
            reader.wait(TransientError(f"file {i}: the server answered 503"), f"file {i}")
    for reader in readers:
        reader.recovered()
    begin, end = (record.getMessage() for record in caplog.records)
    assert begin.startswith("file 0: the server answered 503. Trying again until ")
    assert "100 s" in begin
    assert end.startswith("Reading continues after ")
    assert "5 readers" in end


# Continuing after faults


def rows(start: int, stop: int) -> Iterator[Block]:
    """Blocks of 1 to 5 rows."""
    rng = random.Random(start)
    while start < stop:
        end = min(start + rng.randint(1, 5), stop)
        yield {"text": [f"row {i}" for i in range(start, end)]}
        start = end


def read(blocks: Iterator[Block]) -> list[str]:
    return [text for block in blocks for text in block["text"]]


def test_hundreds_of_faults_change_nothing(slept):
    rng = random.Random(0)
    opened = []

    def open_at(row: int) -> Iterator[Block]:
        opened.append(row)
        if rng.random() < 0.3:
            raise rng.choice(TRANSIENT[:15])
        for block in rows(row, 2000):
            if rng.random() < 0.4:
                raise rng.choice(TRANSIENT[:15])
            yield block

    assert read(retry.retrying(open_at, 3, what="x", deadline=1e6)) == [f"row {i}" for i in range(3, 2000)]
    assert len(opened) > 300


def test_an_error_never_becomes_the_end(slept):
    def open_at(row: int) -> Iterator[Block]:
        yield {"text": ["one"]}
        raise ConnectionResetError("reset")

    blocks = retry.retrying(open_at, 0, what="x", deadline=60)
    assert next(blocks) == {"text": ["one"]}

    def down(row: int) -> Iterator[Block]:
        raise ConnectionResetError("reset")
        yield

    with pytest.raises(TransientError, match="Gave up"):
        list(retry.retrying(down, 0, what="x", deadline=60))


@pytest.mark.parametrize("error", [UserError("no such column"), KeyError("a bug")])
def test_what_time_does_not_cure_is_raised_at_once(slept, error):
    def open_at(row: int) -> Iterator[Block]:
        raise error
        yield

    with pytest.raises(type(error)):
        list(retry.retrying(open_at, 0, what="x", deadline=60))
    assert slept.spans == []


def test_corrupt_once_is_read_again_and_twice_is_named(slept, caplog):
    bad = {10: 1, 20: 99}  # row → how often decoding fails there

    def open_at(row: int) -> Iterator[Block]:
        for block in rows(row, 30):
            for at in list(bad):
                if row <= at < row + len(block["text"]) and bad[at] > 0:
                    bad[at] -= 1
                    raise pa.ArrowInvalid("cannot make sense of this")
            yield block
            row += len(block["text"])

    blocks = retry.retrying(open_at, 0, what="x.parquet of org/web", deadline=60)
    got: list[str] = []
    with pytest.raises(CorruptError) as caught:
        got.extend(text for block in blocks for text in block["text"])
    assert got == [f"row {i}" for i in range(caught.value.row)]
    assert 15 < caught.value.row <= 20
    assert caught.value.file == "x.parquet of org/web"
    assert "x.parquet of org/web" in str(caught.value)


def test_an_outage_between_two_bad_reads_does_not_clear_the_suspicion(slept):
    failures = iter([pa.ArrowInvalid("bad"), ConnectionResetError("reset"), pa.ArrowInvalid("bad")])

    def open_at(row: int) -> Iterator[Block]:
        raise next(failures)
        yield

    with pytest.raises(CorruptError):
        list(retry.retrying(open_at, 7, what="x", deadline=60))


def test_readers_left_behind_are_closed(slept):
    closed = []

    def open_at(row: int) -> Iterator[Block]:
        try:
            yield from rows(row, 100)
        finally:
            closed.append(row)

    blocks = retry.retrying(open_at, 0, what="x", deadline=60)
    next(blocks)
    blocks.close()  # pyright: ignore[reportAttributeAccessIssue] (a generator)
    assert closed == [0]


def test_attempt(slept):
    failures = [ConnectionResetError("reset")] * 3

    def look_up() -> int:
        if failures:
            raise failures.pop()
        return 42

    assert retry.attempt(look_up, what="dataset org/web", deadline=60) == 42
    assert len(slept.spans) == 3
    with pytest.raises(TransientError, match=r"dataset org/web: .*Gave up"):
        retry.attempt(open_nothing, what="dataset org/web", deadline=60)
    with pytest.raises(ZeroDivisionError):
        retry.attempt(lambda: 1 // 0, what="x", deadline=60)


def open_nothing() -> None:
    raise socket.gaierror(-3, "Temporary failure in name resolution")


def test_a_reader_that_is_garbage_asks_for_no_lock():
    """The collector may close it in any thread, even one that holds the outage's lock; that used to stop all reads."""
    reader = retry.retrying(lambda row: iter([{"text": ["a"]}] * 2), 0, what="file", deadline=1)
    next(reader)
    assert isinstance(reader, Generator)
    closing = threading.Thread(target=reader.close, daemon=True)
    with retry._outage.lock:
        closing.start()
        closing.join(10)
        assert not closing.is_alive()


@pytest.mark.slow
@pytest.mark.parametrize("source", ["name='org/web'", "name='json', data_files=('hf://datasets/org/web/a.jsonl',)"])
def test_an_endpoint_that_is_no_address(source, tmp_path):
    """With the real command: the client reads HF_ENDPOINT at import."""
    config = tmp_path / "config.py"
    config.write_text(
        "from configs import quickstart\nfrom jaxtrain.data.sources.huggingface import HuggingFace\n"
        "def get_config(arg=''):\n    config = quickstart.get_config()\n"
        f"    config.data.sources = {{'web': HuggingFace({source})}}\n"
        "    config.stages = tuple(dataclasses.replace(s, weights={'web': 1.0}) for s in config.stages)\n"
        "    return config\nimport dataclasses\n"
    )
    command = [sys.executable, "-m", "jaxtrain.main", f"--config={config}", f"--workdir={tmp_path}/run", "--dry_run"]
    ended = subprocess.run(
        command, env={**os.environ, "HF_ENDPOINT": "garbage"}, capture_output=True, text=True, timeout=120, check=False
    )
    assert ended.returncode == 2, ended
    assert "Check HF_ENDPOINT, which is 'garbage'" in ended.stderr
    assert ended.stderr.count("error: ") == 1
    assert "Traceback" not in ended.stderr
