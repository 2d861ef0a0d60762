"""Ranges of bytes of files: on the Hub, behind a URL, in a bucket, on a local disk.

Each read is one attempt. Status, range and length of the response are checked, and only retry.py retries.
huggingface_hub's own file system retries for 23 s inside each read, accepts a 200 as a 206, and lists the file's folder
before it opens the file, so the Hub's files are read through its HTTP session instead. The address of the store that
the Hub redirects to is kept while it is valid, so a read is one request.

The client libraries are imported on first use: they read HF_HOME and HF_ENDPOINT at import, and a run may set those.
"""

import functools
import hashlib
import io
import math
import os
import re
import time
from collections.abc import Callable
from typing import Any, Protocol

from jaxtrain.cli.redaction import redact, unsigned
from jaxtrain.data.io import rate_limit, retry
from jaxtrain.data.io.exit_guard import gate
from jaxtrain.errors import TransientError, UserError
from jaxtrain.interfaces import Json

_TIMEOUT = 30.0  # seconds without a byte; 10 (the client's default) is too short when many hosts stream at once
_SLOWEST = 100_000  # bytes/s; a response that is slower for longer than the timeout is abandoned
_LOOKS = 3  # a server that ignores the range this many times in a row does not support ranges


class Bytes(Protocol):
    """The bytes of one file. Methods raise TransientError or UserError. Thread-safe."""

    what: str  # names the file in messages

    def size(self) -> int: ...

    def fetch(self, start: int, stop: int) -> bytes:
        """Bytes [start, stop), fewer only at the end of the file."""
        ...

    def tail(self, count: int) -> bytes:
        """The last `count` bytes, or all if there are fewer."""
        size = self.size()
        return self.fetch(max(size - count, 0), size)

    def stamp(self) -> Json:
        """A value that changes when the file does, as far as that is cheap to know."""
        ...

    def refresh(self) -> None:
        """Forgets what was learned about the file: the next read asks its origin."""


class LocalBytes(Bytes):
    """A local file."""

    def __init__(self, path: str):
        self.path = path
        self.what = path

    def size(self) -> int:
        with retry.classified(self.what):
            return os.path.getsize(self.path)

    def fetch(self, start: int, stop: int) -> bytes:
        with retry.classified(self.what), open(self.path, "rb") as file:
            file.seek(start)
            return file.read(stop - start)

    def stamp(self) -> Json:
        """Size and a digest of the first and last 64 kB. Not the time: a copy on another machine is the same file."""
        ends = self.fetch(0, 65536) + self.tail(65536)
        return {"size": self.size(), "digest": hashlib.blake2b(ends, digest_size=8).hexdigest()}


def file_system(url: str) -> tuple[Any, str]:
    """The file system behind a URL, and the path in it.

    Raises:
        UserError: Its package is not installed.
    """
    from fsspec.core import url_to_fs

    try:
        return url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise UserError(f"{unsigned(url)}: {error}. For s3 and gs install jaxtrain[s3] or jaxtrain[gcs].") from None


def ask(fs: Any, method: str, *args: Any, **kwargs: Any) -> Any:
    """Calls a method of a file system, and abandons it at the deadline of the current attempt.

    s3fs and gcsfs retry within each call: 25 requests of a minute each to a server that hangs.
    """
    if not fs.async_impl:
        return getattr(fs, method)(*args, **kwargs)
    from fsspec.asyn import sync

    left = retry.time_left()
    timeout = None if math.isinf(left) else max(left, 1.0)
    return sync(fs.loop, getattr(fs, f"_{method}"), *args, timeout=timeout, **kwargs)


class BucketBytes(Bytes):
    """A file in a bucket (s3://, gs://) or any other file system that fsspec knows."""

    def __init__(self, url: str):
        self.what = unsigned(url)
        self.fs, self.path = file_system(url)
        self.known_size: int | None = None

    def size(self) -> int:
        if self.known_size is None:
            self.known_size = int(self._ask("info")["size"])
        return self.known_size

    def fetch(self, start: int, stop: int) -> bytes:
        stop = min(stop, self.size())
        if start >= stop:
            return b""
        data = self._ask("cat_file", start=start, end=stop)
        if len(data) != stop - start:
            raise TransientError(f"{self.what}: {len(data)} of {stop - start} bytes arrived")
        return data

    def stamp(self) -> Json:
        info = self._ask("info")
        tag = next((info[name] for name in ("ETag", "etag", "md5Hash", "crc32c") if name in info), None)
        return {"size": int(info["size"]), "etag": str(tag).strip('"') if tag else None}

    def refresh(self) -> None:
        self.known_size = None
        self.fs.invalidate_cache(self.path)

    def _ask(self, method: str, **kwargs: Any) -> Any:
        retry.start_request()
        with retry.classified(self.what):
            found = ask(self.fs, method, self.path, **kwargs)
        retry.end_request()
        return found


class _NoRangeError(TransientError):
    """A whole file in response to a range request: usually a transient fault of a proxy."""


class HttpBytes(Bytes):
    """A file on the Hub or any other server that supports ranges (RFC 9110, section 14)."""

    pinned = False  # whether its address names its content

    def __init__(self, url: str, what: str | None = None):
        self.url = url
        self.what = what or unsigned(url)
        self.known_size: int | None = None
        self.etag: str | None = None
        self.signed: str | None = None  # where the last response came from, if redirected

    def size(self) -> int:
        if self.known_size is None:
            self.fetch(0, 1)
        assert self.known_size is not None
        return self.known_size

    def fetch(self, start: int, stop: int) -> bytes:
        if self.known_size is not None:
            stop = min(stop, self.known_size)
        if start >= stop:
            return b""
        data, first = self._range(f"bytes={start}-{stop - 1}", start, stop - start)
        expected = max(min(stop, self.size()) - start, 0)
        if first != start or len(data) != expected:
            raise TransientError(f"{self.what}: asked for {expected} bytes at {start}, got {len(data)} at {first}")
        return data

    def tail(self, count: int) -> bytes:
        if self.known_size is not None:
            return super().tail(count)
        data, first = self._range(f"bytes=-{count}", 0, count)
        if first != max(self.size() - count, 0) or len(data) != self.size() - first:
            raise TransientError(f"{self.what}: asked for the last {count} bytes, got {len(data)} at {first}")
        return data

    def stamp(self) -> Json:
        """Size and ETag.

        Raises:
            UserError: The server does not support ranges.
        """
        for look in range(1, _LOOKS + 1):
            self.refresh()
            self.etag = None
            try:
                return {"size": self.size(), "etag": self.etag}
            except _NoRangeError as error:
                if look == _LOOKS:
                    raise UserError(
                        f"{error}, {_LOOKS} times in a row. Use a server that answers Range requests, or download the "
                        "file."
                    ) from None
                retry.pause(1.0, str(error))
        raise AssertionError

    def refresh(self) -> None:
        self.known_size = None
        self.signed = None

    def _range(self, wanted: str, start: int, most: int) -> tuple[bytes, int]:
        """(body, position of its first byte) of a response of at most `most` bytes. Records the file's size."""
        signed = self.signed
        if signed is not None:
            answer = self._get(signed, {}, wanted, start, most)
            if answer is not None:
                return answer
            self.signed = None  # a signature lasts about an hour: ask the origin again
        answer = self._get(self.url, _hub_headers(self.url), wanted, start, most)
        assert answer is not None
        return answer

    def _get(self, url: str, headers: dict[str, str], wanted: str, start: int, most: int) -> tuple[bytes, int] | None:
        """One request; None if `url` is a signed address that has expired."""
        from huggingface_hub.utils import hf_raise_for_status

        headers = {**headers, "Range": wanted, "Accept-Encoding": "identity"}
        limiter = rate_limit.limiter_of(url)
        retry.start_request()
        limiter.wait()
        timeout = min(_TIMEOUT, max(retry.time_left(), 1.0))
        with (
            retry.classified(self.what),
            session().stream("GET", url, headers=headers, timeout=timeout, follow_redirects=True) as response,
        ):
            if url != self.url and response.status_code in (400, 401, 403, 404, 410):
                return None
            if response.status_code == 416:
                found = re.fullmatch(r"bytes \*/(\d+)", response.headers.get("Content-Range", "").strip())
                if found is not None:
                    self._note(int(found[1]), response)
                    return b"", start
            hf_raise_for_status(response)
            limiter.answered()
            first = self._check(response, start, most)
            body = _body(response, most, timeout, self.what)
            if url == self.url and str(response.url) != url:
                self.signed = str(response.url)
            return body, first

    def _check(self, response: Any, start: int, most: int) -> int:
        """The position of the response's first byte, if its headers match the requested range."""
        if response.headers.get("Content-Encoding", "identity") != "identity":
            raise TransientError(f"{self.what}: the server sent compressed data although the request forbids it")
        if response.status_code == 206:
            found = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+)", response.headers.get("Content-Range", "").strip())
            if found is None:
                raise TransientError(f"{self.what}: the response has no valid Content-Range")
            self._note(int(found[3]), response)
            return int(found[1])
        length = response.headers.get("Content-Length", "")
        if not length.isdecimal() or start or int(length) > most:
            raise _NoRangeError(f"{self.what}: the server sent the whole file instead of a range")
        self._note(int(length), response)
        return 0

    def _note(self, total: int, response: Any) -> None:
        if self.known_size not in (None, total):
            raise UserError(f"{self.what} changed while it was read: it had {self.known_size} bytes, now {total}.")
        self.known_size = total
        etag = (response.headers.get("ETag") or "").removeprefix("W/").strip('"') or None
        if not self.pinned and None not in (self.etag, etag) and self.etag != etag:
            raise UserError(f"{self.what} changed while it was read: its ETag was {self.etag}, is now {etag}.")
        self.etag = etag


class HubBytes(HttpBytes):
    """A file of the Hub at a commit. It cannot change, though its ETag may when the Hub moves it between stores."""

    pinned = True

    def stamp(self) -> Json:
        return {}


def session() -> Any:
    """The HTTP session of the Hub's client.

    Raises:
        UserError: HF_ENDPOINT is no address.
    """
    try:
        from huggingface_hub import get_session

        _obey_deadlines()
    except ValueError as error:  # the client parses it when it is imported
        raise UserError(f"HF_ENDPOINT={redact(os.environ.get('HF_ENDPOINT', ''))!r}: {error}.") from None
    return get_session()


@functools.cache
def _obey_deadlines() -> None:
    """Makes every request of the Hub's client keep the deadline of the attempt under way in its thread.

    The client sets no time-out for most requests. For some it retries five times, which took 400 s of a Hub that hangs,
    or for as long as a 429 says.
    """
    from huggingface_hub import set_client_factory
    from huggingface_hub.utils import _http

    # At exit the client's own handler closes its connections, and a thread that waits for one then waits for the whole
    # time-out: the gate must close first.
    gate.close_first()
    make = _http._GLOBAL_CLIENT_FACTORY

    def client() -> Any:
        made = make()
        made.event_hooks["request"].append(_before_request)
        made.event_hooks["response"].append(_after_response)
        return made

    set_client_factory(client)


def _before_request(request: Any) -> None:
    if not retry.send_request():
        raise TransientError(f"{request.url.host} gave no valid response in time")
    limits = request.extensions.get("timeout", {})
    for name in ("connect", "read", "write", "pool"):
        limits[name] = min(limits.get(name) or _TIMEOUT, max(retry.time_left(), 1.0))
    request.extensions["timeout"] = limits


def _after_response(response: Any) -> None:
    status = response.status_code
    if status != 429 and status < 500:
        retry.end_request()
        return
    wait = retry.retry_after(response.headers)
    if status == 429:
        rate_limit.limiter_of(str(response.url)).refused(wait)
    if wait is not None and not math.isinf(retry.time_left()):
        raise TransientError(f"the server answered {status}", wait)


def _hub_headers(url: str) -> dict[str, str]:
    """The user's token, for the Hub's own addresses only."""
    from huggingface_hub import constants
    from huggingface_hub.utils import build_hf_headers

    return build_hf_headers() if url.startswith(constants.ENDPOINT + "/") else {}


def _body(response: Any, most: int, timeout: float, what: str) -> bytes:
    """The whole body. Fails if the server is too slow or sends more than requested."""
    parts, length, start = [], 0, time.monotonic()
    for part in response.iter_raw():
        parts.append(part)
        length += len(part)
        if length > most:
            raise TransientError(f"{what}: the server sent more than the {most} bytes requested")
        if time.monotonic() - start > timeout + length / _SLOWEST:
            raise TransientError(f"{what}: the server sent {length} bytes in {time.monotonic() - start:.0f} s")
    return b"".join(parts)


class RangeBuffer:
    """The last few ranges of a file that were fetched. For one thread.

    Attributes:
        source: The file.
        plan: Maps a wanted position to the end of the request that fetches it.
        keep: How many ranges are held.
    """

    def __init__(self, source: Bytes, plan: Callable[[int], int], keep: int):
        self.source = source
        self.plan = plan
        self.keep = keep
        self.held: list[tuple[int, bytes]] = []  # (position, bytes), the most recently used last

    def read(self, position: int, count: int) -> bytes:
        """Bytes from `position` on; fewer than `count` only at the end of the file."""
        parts = []
        while count > 0:
            part = self._held(position, count)
            if not part:
                gate.check()
                data = self.source.fetch(position, max(self.plan(position), position + 1))
                if not data:
                    break
                self.held = [*self.held[max(len(self.held) - self.keep + 1, 0) :], (position, data)]
                continue
            parts.append(part)
            position += len(part)
            count -= len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _held(self, position: int, count: int) -> bytes:
        for index, (start, data) in enumerate(self.held):
            if start <= position < start + len(data):
                self.held.append(self.held.pop(index))
                return data[position - start : position - start + count]
        return b""


class RangeFile(io.RawIOBase):
    """A read-only file object over a `RangeBuffer`."""

    def __init__(self, buffer: RangeBuffer):
        self.buffer = buffer
        self.position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self.position}
        self.position = offset + (base[whence] if whence in base else self.buffer.source.size())
        return self.position

    def read(self, size: int | None = -1) -> bytes:
        if size is None or size < 0:
            size = max(self.buffer.source.size() - self.position, 0)
        data = self.buffer.read(self.position, size)
        self.position += len(data)
        return data

    def readall(self) -> bytes:
        return self.read()

    def readinto(self, buffer: Any) -> int:
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)
