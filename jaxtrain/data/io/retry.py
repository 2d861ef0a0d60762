"""What a failed read means, and when it is retried.

`classify` turns the errors of the client libraries into the kinds of errors.py. It uses names and attributes, not
classes: the libraries behind a URL (huggingface_hub with httpx or httpx2, aiohttp, botocore, gcsfs) are many, mostly
optional, and rename their bases between releases. Only `retrying` and `attempt` retry, so that the config's deadline
holds; readers make one attempt and raise.

Messages contain no token and no signature (cli/redaction.py).
"""

import contextlib
import contextvars
import email.utils
import errno
import logging
import math
import os
import random
import re
import socket
import ssl
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from jaxtrain.cli.redaction import redact as redact
from jaxtrain.errors import CorruptError, TransientError, UserError
from jaxtrain.interfaces import Block

T = TypeVar("T")

log = logging.getLogger("jaxtrain")
sleep = time.sleep  # replaced in tests, so that they do not wait

_LOGIN = "set HF_TOKEN to a token of an account that may read it, or run `hf auth login`"
_HUB_CLIENT = "huggingface_hub.constants"
_TRANSIENT_STATUS = (408, 425, 429)
# Invalid requests. Their base classes, below, are transient.
_MALFORMED_NAMES = {
    *("UnsupportedProtocol", "LocalProtocolError", "CookieConflict"),  # httpx and httpx2
    *("MissingSchema", "InvalidSchema", "InvalidHeader", "InvalidProxyURL", "URLRequired"),  # requests
    *("InvalidURL", "NonHttpUrlClientError"),  # also aiohttp's
}
_TRANSIENT_NAMES = {
    *("RequestError", "HTTPError"),  # httpx and httpx2: also redirect loops and transfers that cannot be decoded
    *("StreamClosed", "StreamConsumed", "RequestNotRead", "ResponseNotRead"),  # as above, if another thread closes it
    *(
        "RequestException",
        "ProtocolError",
        "IncompleteRead",
        "RemoteDisconnected",
        "MaxRetryError",
    ),  # requests, urllib3
    *("ClientError", "ClientConnectionError", "ClientPayloadError"),  # aiohttp
    *("HTTPClientError", "ConnectionClosedError", "ResponseStreamingError"),  # botocore (s3)
    *("TransportError",),  # google-auth and gcsfs
}
_TRANSIENT_ERRNO = {
    getattr(errno, name)
    for name in (
        *("ECONNRESET", "ECONNABORTED", "ECONNREFUSED", "EPIPE", "ETIMEDOUT", "ENETUNREACH", "ENETDOWN", "ENETRESET"),
        *("EHOSTUNREACH", "EHOSTDOWN", "ESTALE", "EAGAIN", "EBUSY", "EIO"),
    )
    if hasattr(errno, name)
}
_CORRUPT_NAMES = {
    *("ArrowInvalid", "BadGzipFile", "JSONDecodeError", "UnicodeDecodeError", "LZMAError", "ZstdError", "BadZipFile"),
    *("ParserError", "EOFError"),
}


def classify(error: BaseException, what: str = "") -> BaseException:
    """What an error means. Looks at the chain of its causes, since the libraries wrap errors.

    Args:
        error: What a client library raised.
        what: The dataset and file, for the message.

    Returns:
        A TransientError, CorruptError or UserError, or `error` itself if it is none of them. A CorruptError means
        "could not be decoded once"; `retrying` finds out whether it happens twice.
    """
    chain = list(_chain(error))
    for one in chain:
        if isinstance(one, TransientError | CorruptError | UserError):
            return one
    for rule in (_offline, _hub, _status, _network, _decoding, _local):
        for one in chain:
            found = rule(one, what)
            if found is not None:
                return found
    return error


@contextlib.contextmanager
def classified(what: str) -> Iterator[None]:
    """Raises an error inside as what `classify` makes of it, without the original, which may hold a signed address."""
    try:
        yield
    except Exception as error:
        fault = classify(error, what)
        if fault is error:
            raise
        raise fault from None


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    for _ in range(20):
        if error is None:
            return
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def _names(error: BaseException) -> set[str]:
    return {cls.__name__ for cls in type(error).__mro__}


def _say(what: str, text: str) -> str:
    return f"{what}: {text}" if what else text


def _first_line(error: BaseException) -> str:
    lines = redact(str(error)).strip().splitlines()
    return f"{type(error).__name__}: {lines[0].strip()}" if lines else type(error).__name__


def _offline(error: BaseException, what: str) -> Exception | None:
    if "OfflineModeIsEnabled" not in _names(error):
        return None
    return UserError(_say(what, "is on the Hub, and HF_HUB_OFFLINE=1 forbids access. Unset it, or use local files."))


def _hub(error: BaseException, what: str) -> Exception | None:
    """The Hub's refusals, which are more specific than their status."""
    names = _names(error)
    text = str(error)
    repo, kind = getattr(error, "repo_id", None), getattr(error, "repo_type", None) or "dataset"
    if repo is None and (found := re.search(r"[Dd]ataset '([^' ]+)'", text)):
        repo = found[1]
    subject = what or (f"{kind} {repo}" if repo else "the repository")
    if "GatedRepoError" in names or ("DatasetNotFoundError" in names and "gated" in text):
        page = (
            f"its page https://huggingface.co/{'datasets/' if kind == 'dataset' else ''}{repo}" if repo else "its page"
        )
        return UserError(f"{subject} is gated. Accept its terms at {page} on the Hub, then {_LOGIN}.")
    if "RepositoryNotFoundError" in names or "DatasetNotFoundError" in names:
        return UserError(
            f"{subject} does not exist on the Hub, or it is private. Check its name; if private, {_LOGIN}."
        )
    if "RevisionNotFoundError" in names:
        return UserError(f"{subject}: the Hub does not have this revision (any more). Check its branches and tags.")
    if "EntryNotFoundError" in names and "LocalEntryNotFoundError" not in names:
        return UserError(_say(what, "the Hub has no such file at this revision. Check its name and the revision."))
    return None


def _status(error: BaseException, what: str) -> Exception | None:
    status, headers = _http_status(error)
    if status is None:
        return None
    where = _say(what, f"the server answered {status}")
    if status in _TRANSIENT_STATUS or not 400 <= status < 500:
        return TransientError(where, retry_after(headers))
    if status in (401, 407):
        return UserError(f"{where} (no valid credentials). For the Hub, {_LOGIN}; for a bucket, set its credentials.")
    if status == 403:
        return UserError(f"{where} (forbidden). Check what the account may read. For the Hub, {_LOGIN}.")
    if status in (404, 410):
        return UserError(f"{where} (there is no such file). Check the name, the revision and the URL.")
    return UserError(f"{where} (it refuses the request). Check the name, the revision and the URL.")


def _http_status(error: BaseException) -> tuple[int | None, Any]:
    """(status, headers) of an error for an HTTP response: httpx, requests, aiohttp, gcsfs, botocore."""
    response = getattr(error, "response", None)
    if isinstance(response, dict):  # botocore
        meta = response.get("ResponseMetadata", {})
        return meta.get("HTTPStatusCode"), meta.get("HTTPHeaders")
    if response is not None and isinstance(getattr(response, "status_code", None), int):
        return response.status_code, response.headers
    for name in ("status", "code"):
        if isinstance(value := getattr(error, name, None), int) and 400 <= value < 600:
            return value, getattr(error, "headers", None)
    return None, None


def retry_after(headers: Any) -> float | None:
    """Seconds to wait, from `Retry-After` (seconds or a date) or the Hub's rate limit header; None without either.

    The Hub sends `ratelimit: "api";r=0;t=55` (IETF draft-ietf-httpapi-ratelimit-headers-09): no request left, for 55 s.
    """
    if not headers:
        return None
    lowered = {str(name).lower(): str(text) for name, text in headers.items()}
    if text := lowered.get("retry-after"):
        if re.fullmatch(r"\d+(\.\d+)?", text.strip()):
            return float(text)
        if (date := email.utils.parsedate_tz(text)) is not None:
            return max(email.utils.mktime_tz(date) - time.time(), 0.0)
    found = re.search(r";\s*r\s*=\s*0\s*;\s*t\s*=\s*(\d+)", lowered.get("ratelimit", ""))
    return float(found[1]) if found else None


def _network(error: BaseException, what: str) -> Exception | None:
    names = _names(error)
    text = _first_line(error)
    if "NoCredentialsError" in names or "DefaultCredentialsError" in names:
        return UserError(_say(what, f"no credentials for the bucket ({text}). Set them as for the cloud's own tools."))
    if isinstance(error, ssl.SSLCertVerificationError) or "CERTIFICATE_VERIFY_FAILED" in str(error):
        return UserError(
            _say(what, f"the server's certificate is not trusted ({text}). Set SSL_CERT_FILE if you use a proxy.")
        )
    if names & _MALFORMED_NAMES:
        endpoint = os.environ.get("HF_ENDPOINT")
        hint = f"HF_ENDPOINT, which is {redact(endpoint)!r}, " if endpoint else ""
        return UserError(
            _say(what, f"the request is malformed ({text.rstrip('.')}). Check {hint}the URL and the token.")
        )
    if isinstance(error, socket.gaierror) or "Name or service not known" in str(error) or "getaddrinfo" in str(error):
        return TransientError(_say(what, f"the server's name cannot be looked up ({text}). Is there a network?"))
    if "ConnectError" in names or "ClientConnectorError" in names or isinstance(error, ConnectionRefusedError):
        return TransientError(_say(what, f"no connection ({text}). Is there a network?"))
    if names & _TRANSIENT_NAMES or isinstance(error, ConnectionError | TimeoutError | ssl.SSLError):
        return TransientError(_say(what, text))
    if "LocalEntryNotFoundError" in names or "client has been closed" in str(error):
        # The Hub's client closes its shared session when any thread has a connection error.
        return TransientError(_say(what, text))
    if isinstance(error, OSError) and error.errno in _TRANSIENT_ERRNO:
        return TransientError(_say(what, text))
    return None


def _decoding(error: BaseException, what: str) -> Exception | None:
    if not (_names(error) & _CORRUPT_NAMES or type(error).__module__ == "zlib"):
        return None
    return CorruptError(_say(what, f"cannot be decoded ({_first_line(error)})"), file=what, row=-1)


def _local(error: BaseException, what: str) -> Exception | None:
    if isinstance(error, OSError) and isinstance(error.filename, str) and (client := sys.modules.get(_HUB_CLIENT)):
        for name in ("HF_HOME", "HF_HUB_CACHE"):
            folder = getattr(client, name)
            if error.filename == folder or error.filename.startswith(os.path.join(folder, "")):
                fix = f"Set {name}, which is {folder}, to a folder that can be written, on a disk with space"
                return UserError(_say(what, f"files of the Hub cannot be kept here ({_first_line(error)}). {fix}."))
    if isinstance(error, FileNotFoundError | NotADirectoryError | IsADirectoryError):
        return UserError(_say(what, f"there is no such file ({_first_line(error)}). Check the path or the pattern."))
    if isinstance(error, PermissionError):
        return UserError(_say(what, f"may not be read ({_first_line(error)}). Check its permissions or credentials."))
    return None


class OutlastedError(TransientError):
    """A fault that outlasted a deadline. Callers with another deadline do not retry it."""


class _Outage:
    """The readers of this process that are waiting: logged when the first one fails and when the last one recovers."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.waiting: set[int] = set()
        self.readers = 0
        self.since = 0.0

    def enter(self, reader: int, fault: BaseException, what: str, deadline: float) -> None:
        with self.lock:
            first = not self.waiting
            self.readers = 1 if first else self.readers + (reader not in self.waiting)
            self.waiting.add(reader)
            if first:
                self.since = time.monotonic()
                until = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(time.time() + deadline))
                log.warning("%s Trying again until %s (%g s).", _sentence(fault, what), until, round(deadline, 1))

    def leave(self, reader: int, recovered: bool) -> None:
        with self.lock:
            if reader not in self.waiting:
                return
            self.waiting.discard(reader)
            if recovered and not self.waiting:
                took = time.monotonic() - self.since
                log.warning("Reading continues after %.1f s (%d readers waited).", took, self.readers)


_outage = _Outage()


def _sentence(fault: BaseException, what: str) -> str:
    text = redact(_say(what, str(fault).removeprefix(f"{what}: ").rstrip(".")))
    return text if text.endswith("?") else f"{text}."


class Backoff:
    """Waits between attempts: doubling from `first` to `limit` seconds, with jitter, until a deadline.

    Each wait is drawn from the upper half of its range ("equal jitter": hosts that failed together retry at different
    times, none immediately). A server's Retry-After is a lower bound. The deadline counts from the start of the first
    failed request and covers all waiting: for responses, the rate limit, and between attempts. `recovered` ends an
    outage.

    Attributes:
        deadline_seconds: How long an outage may last.
        seed: For tests; by default every reader draws its own.
    """

    def __init__(self, deadline_seconds: float, first: float = 1.0, limit: float = 60.0, seed: int | None = None):
        self.deadline_seconds = deadline_seconds
        self.first = first
        self.limit = limit
        self.rng = random.Random(seed)
        self.attempts = 0  # failed attempts in this outage
        self.is_asking = self.was_sent = False  # a request without a valid response so far
        self.since = time.monotonic()
        self.slept = 0.0

    def start(self) -> None:
        """Call when a request starts. Unless one has failed, the deadline counts from here."""
        if not self.attempts:
            self.since, self.slept = time.monotonic(), 0.0

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """The context of one attempt: code that it calls in this thread can use `time_left`."""
        token = _running.set(self)
        self.is_asking = self.was_sent = False
        self.start()
        try:
            yield
        finally:
            _running.reset(token)

    def left(self) -> float:
        """Seconds to the deadline. Sleeps count even if a test's clock does not advance."""
        return self.deadline_seconds - max(time.monotonic() - self.since, self.slept)

    def wait(self, fault: TransientError, what: str = "") -> None:
        """Sleeps before the next attempt.

        Raises:
            OutlastedError: The deadline has passed.
        """
        if isinstance(fault, OutlastedError):
            raise fault
        self.attempts += 1
        left = self.left()
        if left <= 0:
            tried = f"{self.attempts} attempt{'s' if self.attempts > 1 else ''}"
            spent = f"{round(self.deadline_seconds - left, 1):g} s"
            raise OutlastedError(f"{_sentence(fault, what)} Gave up after {tried} in {spent}.")
        _outage.enter(id(self), fault, what, left)
        seconds = min(self.first * 2.0 ** (self.attempts - 1), self.limit) * self.rng.uniform(0.5, 1.0)
        if fault.retry_after is not None:
            seconds = max(seconds, fault.retry_after * self.rng.uniform(1.0, 1.1))
        self.sleep(min(seconds, left))

    def sleep(self, seconds: float) -> None:
        self.slept += seconds
        sleep(seconds)

    def recovered(self) -> None:
        """Call when an attempt has succeeded."""
        if self.attempts:
            self.attempts = 0
            self.start()
            _outage.leave(id(self), recovered=True)

    def close(self) -> None:
        """Call when no one waits here any more.

        The garbage collector closes a suspended reader in any thread, maybe one that holds the outage's lock. Such a
        reader is in no outage, so it must not take that lock.
        """
        if self.attempts:
            _outage.leave(id(self), recovered=False)


_running: contextvars.ContextVar[Backoff | None] = contextvars.ContextVar("running", default=None)


def start_request() -> None:
    """Call when a request starts or restarts. Until one fails, the deadline of the current attempt counts from here."""
    if (backoff := _running.get()) is not None and not backoff.is_asking:
        backoff.is_asking = True
        backoff.start()


def send_request() -> bool:
    """A client sends the request that started. Returns whether it may: not again after the deadline."""
    start_request()
    if (backoff := _running.get()) is None:
        return True
    is_repeated, backoff.was_sent = backoff.was_sent, True
    return not is_repeated or backoff.left() > 0


def end_request() -> None:
    """A request was answered: what is done until the next one is no waiting."""
    if (backoff := _running.get()) is not None:
        backoff.is_asking = backoff.was_sent = False


def time_left() -> float:
    """Seconds that the current attempt may still wait; infinite outside of one."""
    backoff = _running.get()
    return math.inf if backoff is None else max(backoff.left(), 0.0)


def pause(seconds: float, why: str) -> None:
    """Sleeps within the deadline of the current attempt.

    Raises:
        TransientError: The deadline came first.
    """
    backoff, left = _running.get(), time_left()
    (sleep if backoff is None else backoff.sleep)(min(seconds, left))
    if seconds > left:
        raise TransientError(f"{why}: the next request has to wait {seconds - left:.0f} s")


def attempt(function: Callable[[], T], *, what: str, deadline: float) -> T:
    """Calls `function`, and retries it on transient faults for `deadline` seconds, on a decoding error once.

    For lookups: sources, tokenizer files.

    Raises:
        UserError, CorruptError: From `classify`.
        OutlastedError: The deadline has passed.
        Exception: Whatever else `function` raises.
    """
    backoff = Backoff(deadline)
    is_suspect = False
    try:
        while True:
            try:
                with backoff.running():
                    result = function()
            except Exception as error:
                fault = _fault(error, what)
            else:
                backoff.recovered()
                return result
            if isinstance(fault, TransientError):
                backoff.wait(fault, what)
            elif isinstance(fault, CorruptError) and not is_suspect:
                is_suspect = True
                log.warning("%s; reading it again", redact(str(fault)))
            else:
                raise fault from None  # the original may hold a signed address
    finally:
        backoff.close()


def _fault(error: Exception, what: str) -> Exception:
    """What the error means. Raises an error that `classify` does not know, with its traceback."""
    fault = classify(error, what)
    if isinstance(fault, TransientError | CorruptError) or (fault is not error and isinstance(fault, Exception)):
        return fault
    raise error


def retrying(open_at: Callable[[int], Iterator[Block]], row: int, *, what: str, deadline: float) -> Iterator[Block]:
    """Yields the blocks of `open_at(row)` despite faults: none is truncated, repeated or skipped.

    Args:
        open_at: Opens the file at a row and yields consecutive blocks. After a transient fault it is called again with
            the next row, for up to `deadline` seconds without a new block. After a decoding error the file is opened
            and read once more.
        row: The first row.
        what: Names source and file in messages.
        deadline: Seconds.

    Raises:
        CorruptError: Decoding failed twice at the same row; its `row` is the first that could not be read.
        UserError: From `classify`.
        OutlastedError: The deadline has passed.
        Exception: Whatever else `open_at` raises.
    """
    backoff = Backoff(deadline)
    blocks: Iterator[Block] | None = None
    suspect = -1  # the row whose decoding failed once
    try:
        while True:
            try:
                with backoff.running():
                    if blocks is None:
                        blocks = open_at(row)
                    block = next(blocks, None)
            except Exception as error:
                fault = _fault(error, what)
            else:
                backoff.recovered()
                if block is None:
                    return
                yield block
                row += len(next(iter(block.values())))
                continue
            close(blocks)
            blocks = None
            if isinstance(fault, TransientError):
                backoff.wait(fault, what)
            elif isinstance(fault, CorruptError):
                if suspect == row:
                    # A reader opened inside a bad block reports where the block begins.
                    first = fault.row if 0 <= fault.row <= row else row
                    raise CorruptError(f"{fault} (twice, at row {first})", fault.file or what, first) from None
                suspect = row
                log.warning("%s at row %d; reading it again", redact(str(fault)), row)
            else:
                raise fault from None  # the original may hold a signed address
    finally:
        backoff.close()
        close(blocks)


def close(blocks: Iterator[Block] | None) -> None:
    """Closes a reader if it is a generator."""
    end = getattr(blocks, "close", None)
    if end is not None:
        end()
