"""A Hugging Face Hub on the loopback interface, for the real, unmodified client libraries.

Serves datasets and models from memory (several commits and branches, gated and private repositories, ranges, redirects
to signed addresses), counts requests and bytes, and injects faults by rule. In a test:

    hub = LoopbackHub()
    sha = hub.commit("org/web", {"data/train-0.parquet": parquet_bytes(texts, row_group_size=100)})
    hub.fault("train-0", "status:503", count=3)
    subprocess.run([...], env={**os.environ, **hub.env()})
    assert hub.count("train-0") < 10

By hand: `python -m tests.hub --root DIR` serves DIR/datasets/ORG/NAME/... and DIR/models/ORG/NAME/... and prints the
environment variables to set. Set HF_ENDPOINT before importing the client, which reads it at import time (see
tests/hub_fixtures.py).
"""

import argparse
import contextlib
import dataclasses
import math
import pathlib
import random
import re
import shutil
import socket
import struct
import tempfile
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from tests.hub_store import (
    SECRET,
    TOKEN,
    Answer,
    AnswerError,
    Request,
    Store,
    csv_bytes,
    jsonl_bytes,
    parquet_bytes,
    text_bytes,
)

__all__ = ["SECRET", "TOKEN", "LoopbackHub", "csv_bytes", "jsonl_bytes", "parquet_bytes", "text_bytes"]


@dataclasses.dataclass
class Fault:
    """A rule added by `LoopbackHub.fault`."""

    match: str
    kind: str
    count: int | None
    after: int
    probability: float
    retry_after: float | None
    after_bytes: int | None
    seconds: float
    method: str | None
    rng: random.Random
    fired: int = 0

    def fires(self, method: str, path: str) -> bool:
        if self.method not in (None, method) or not (self.match in path or re.search(self.match, path)):
            return False
        if self.count is not None and self.fired >= self.count:
            return False
        if self.after > 0:
            self.after -= 1
            return False
        if self.rng.random() >= self.probability:
            return False
        self.fired += 1
        return True


@dataclasses.dataclass
class Limit:
    """A rate limit: `requests` are served per window of `seconds`, and the rest get 429."""

    match: str
    requests: int
    seconds: float
    began: float = 0.0
    taken: int = 0
    refused: int = 0

    def refuses(self, path: str) -> float | None:
        """Seconds until the next window if the request exceeds the limit, else None."""
        if self.match not in path:
            return None
        now = time.monotonic()
        if now >= self.began + self.seconds:
            self.began, self.taken = now, 0
        self.taken += 1
        if self.taken <= self.requests:
            return None
        self.refused += 1
        return self.began + self.seconds - now


class LoopbackHub(Store):
    """The server. It starts at once in a daemon thread. `close()` stops it and removes its temporary HF_HOME."""

    def __init__(self, port: int = 0):
        super().__init__()
        self.home = tempfile.mkdtemp(prefix="loopback-hub-")
        self.faults: list[Fault] = []
        self.limits: list[Limit] = []
        self.log: list[Request] = []
        hub = self

        class Handler(_Handler):
            pass

        Handler.hub = hub
        self.server = _Server(("127.0.0.1", port), Handler)
        self.endpoint = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True, name="loopback-hub").start()

    def clear(self) -> None:
        """Removes all repositories, faults and log entries."""
        with self.lock:
            self.repos.clear()
            self.faults.clear()
            self.limits.clear()
            self.log.clear()
            self.signature = 0
            self.redirect = False
            self.page_size = 1000

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        shutil.rmtree(self.home, ignore_errors=True)

    def __enter__(self) -> "LoopbackHub":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def env(self) -> dict[str, str]:
        """Environment variables for a process that uses this hub. Set them before it imports the client."""
        return {
            "HF_ENDPOINT": self.endpoint,
            "HF_HOME": self.home,
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_UPDATE_CHECK": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_UPDATE_DOWNLOAD_COUNTS": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_TOKEN": "",
            "HF_HUB_OFFLINE": "0",
            "NO_PROXY": "127.0.0.1,localhost",
            "no_proxy": "127.0.0.1,localhost",
        }

    # Faults and counts

    def fault(
        self,
        match: str,
        kind: str,
        *,
        count: int | None = None,
        after: int = 0,
        probability: float = 1.0,
        seed: int = 0,
        retry_after: float | None = None,
        after_bytes: int | None = None,
        seconds: float = 5.0,
        method: str | None = None,
    ) -> Fault:
        """Injects faults into requests whose path contains `match` (or matches it as a regular expression).

        Kinds: "status:N", "reset" (connection reset; within the body with `after_bytes`), "truncate" (orderly end after
        `after_bytes`, by default half of the body), "slow" (a pause of `seconds` in the middle of the body),
        "latency:S" (S seconds before the response), "wrong_range" (a 206 for other bytes), "ignore_range" (a 200 with
        the whole file), "loop" (a redirect to itself), "corrupt" (correct length, some bytes changed).
        The first `after` matching requests pass. The next `count` fail (all, if None), each with `probability`. The
        first rule that fires wins.
        """
        rng = random.Random(seed)
        rule = Fault(match, kind, count, after, probability, retry_after, after_bytes, seconds, method, rng)
        with self.lock:
            self.faults.append(rule)
        return rule

    def limit(self, match: str, requests: int, seconds: float) -> Limit:
        """Answers 429, with the Hub's own headers, beyond `requests` matching requests per `seconds`."""
        rule = Limit(match, requests, seconds)
        with self.lock:
            self.limits.append(rule)
        return rule

    def count(self, match: str = "", method: str | None = None) -> int:
        """Number of requests whose path matches."""
        return len(self.requests(match, method))

    def bytes(self, match: str = "") -> int:
        """Bytes of response bodies sent for matching paths."""
        return sum(request.sent for request in self.requests(match))

    def requests(self, match: str = "", method: str | None = None) -> list[Request]:
        return [
            request
            for request in list(self.log)
            if method in (None, request.method) and (match in request.path or re.search(match, request.path))
        ]


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignores clients that disconnect."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1  # sends headers and body in one segment; otherwise each response waits 40 ms for an ACK
    hub: LoopbackHub

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._serve()

    def do_HEAD(self) -> None:
        self._serve()

    def do_POST(self) -> None:
        self._serve()

    def _serve(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        address = urlsplit(self.path)
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None
        request = Request(self.command, unquote(address.path), range=self.headers.get("Range"), token=token)
        with self.hub.lock:
            self.hub.log.append(request)
            fault = next((rule for rule in self.hub.faults if rule.fires(self.command, request.path)), None)
            waits = [left for rule in self.hub.limits if (left := rule.refuses(request.path)) is not None]
        try:
            answer = self.hub.answer(request, parse_qs(address.query), body)
        except AnswerError as error:
            answer = error.answer
        kind, _, value = fault.kind.partition(":") if fault else ("", "", "")
        if kind == "latency":
            time.sleep(float(value))
        elif fault and kind == "status":
            headers = {} if fault.retry_after is None else {"Retry-After": f"{fault.retry_after:g}"}
            answer = Answer(int(value), b'{"error": "injected"}', headers)
        elif kind == "loop":
            answer = Answer(302, b"", {"Location": self.path})
        if waits:
            # The Hub has windows of 300 s and reports whole seconds, rounded up. So does this.
            left = {"ratelimit": f'"resolvers";r=0;t={math.ceil(max(waits))}'}
            answer = Answer(429, b'{"error": "too many requests"}', left)
        if fault and kind == "reset" and fault.after_bytes is None:
            self._reset()
            return
        if answer.status == 200:
            self._cut(answer, request.range, kind)
        self._send(answer, request, fault, kind)

    def _cut(self, answer: Answer, wanted: str | None, kind: str) -> None:
        """Reduces a whole file to the requested range (RFC 9110, section 14)."""
        size = len(answer.body)
        found = re.fullmatch(r"bytes=(\d*)-(\d*)", wanted or "")
        if (
            found is None
            or found.groups() == ("", "")
            or "Accept-Ranges" not in answer.headers
            or kind == "ignore_range"
        ):
            return
        first, last = found.groups()
        start = int(first) if first else max(size - int(last), 0)
        stop = min(int(last) + 1, size) if first and last else size
        if start >= size:
            answer.status, answer.body = 416, b""
            answer.headers["Content-Range"] = f"bytes */{size}"
            return
        if kind == "wrong_range":
            shift = -1 if start else 1
            start, stop = start + shift, min(stop + shift, size)
        answer.status, answer.body = 206, answer.body[start:stop]
        answer.headers["Content-Range"] = f"bytes {start}-{stop - 1}/{size}"

    def _send(self, answer: Answer, request: Request, fault: Fault | None, kind: str) -> None:
        body = answer.body
        if kind == "corrupt" and body:
            spoiled = bytearray(body)
            for at in range(len(body) // 3, len(body), max(len(body) // 7, 1)):
                spoiled[at] ^= 0x5A
            body = bytes(spoiled)
        request.status = answer.status
        self.send_response(answer.status)
        for name, text in {"Content-Length": str(len(body)), **answer.headers}.items():
            self.send_header(name, text)
        self.end_headers()
        if self.command == "HEAD":
            return
        stop = len(body)
        if fault and kind in ("reset", "truncate", "slow"):
            stop = len(body) // 2 if fault.after_bytes is None else min(fault.after_bytes, len(body))
        request.sent = stop
        self.wfile.write(body[:stop])
        if fault and kind == "slow":
            self.wfile.flush()
            time.sleep(fault.seconds)
            self.wfile.write(body[stop:])
            request.sent = len(body)
        elif kind == "reset":
            self.wfile.flush()
            self._reset()
        elif kind == "truncate":
            self.close_connection = True

    def _reset(self) -> None:
        """Closes the connection with a reset instead of an orderly end."""
        self.close_connection = True
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()


def load_folder(hub: LoopbackHub, root: pathlib.Path) -> None:
    """Commits every repository under ROOT/datasets/ORG/NAME and ROOT/models/ORG/NAME."""
    for repo_type in ("dataset", "model"):
        for folder in sorted(root.glob(f"{repo_type}s/*/*/")):
            files = {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
            hub.commit("/".join(folder.parts[-2:]), files, repo_type=repo_type)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=pathlib.Path, required=True, help="folder with datasets/ and models/")
    parser.add_argument("--port", type=int, default=0)
    args = parser.parse_args()
    with LoopbackHub(args.port) as hub:
        load_folder(hub, args.root)
        print(" ".join(f"{name}={text}" for name, text in hub.env().items()), flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            threading.Event().wait()


if __name__ == "__main__":
    main()
