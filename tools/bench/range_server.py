"""A local HTTP server for the files of a folder, with byte ranges. Counts requests and bytes."""

import contextlib
import functools
import os
import pathlib
import re
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class RangeServer(ThreadingHTTPServer):
    """Serves `GET /NAME` for the files of `folder`.

    Attributes:
        requests: Requests answered since `reset`.
        bytes: Bytes sent since `reset`.
        pause: Seconds before each response, to simulate a distant server.
    """

    daemon_threads = True
    request_queue_size = 128  # all lanes connect at once

    def __init__(self, folder: str):
        super().__init__(("127.0.0.1", 0), functools.partial(_Handler))
        self.folder = pathlib.Path(folder)
        self.lock = threading.Lock()
        self.pause = 0.0
        self.reset()

    def reset(self) -> None:
        self.requests, self.bytes = 0, 0

    def url(self, name: str) -> str:
        return f"http://127.0.0.1:{self.server_port}/{name}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignores clients that disconnect."""


@contextlib.contextmanager
def serving(folder: str) -> Iterator[RangeServer]:
    """Runs the server for the duration of the context, bypassing proxies set in the environment."""
    kept = {name: os.environ.get(name) for name in ("NO_PROXY", "no_proxy")}
    os.environ.update(dict.fromkeys(kept, "127.0.0.1"))
    server = RangeServer(folder)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True, name="range-server")
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
        for name, value in kept.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1  # sends headers and body together; otherwise each response waits 40 ms for an ACK
    server: RangeServer  # pyright: ignore[reportIncompatibleVariableOverride] - the base class declares BaseServer

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        time.sleep(self.server.pause)
        data = (self.server.folder / self.path.lstrip("/")).read_bytes()
        start, stop, status = 0, len(data), 200
        asked = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
        if asked is not None:
            status = 206
            if asked[1]:
                start, stop = int(asked[1]), min(int(asked[2] or len(data)) + 1, len(data))
            else:
                start = max(len(data) - int(asked[2]), 0)
        with self.server.lock:
            self.server.requests += 1
            self.server.bytes += stop - start
        self.send_response(status)
        self.send_header("Content-Length", str(stop - start))
        if status == 206:
            self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{len(data)}")
        self.end_headers()
        self.wfile.write(data[start:stop])
