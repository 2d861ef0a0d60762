"""What other processes do to a DiskCache in its tests: `python -m tests.data.cache_worker WHAT FOLDER ...`.

A file's content is a function of its key, so every reader can check it.
"""

import os
import random
import signal
import sys
import time
from collections.abc import Callable

from jaxtrain.data.io import disk_cache as cache_module
from jaxtrain.data.io.disk_cache import DiskCache, Sink

LIMIT = 30_000  # bytes


def content(key: str) -> bytes:
    """1,000 to 10,000 bytes, a function of the key."""
    rng = random.Random(key)
    return rng.randbytes(rng.randint(1000, 10_000))


def fetcher(key: str, log: str | None = None) -> Callable[[Sink], None]:
    """Writes the content in pieces. log: a file that gets one line with the key per fetch."""

    def fetch(sink: Sink) -> None:
        if log is not None:
            with open(log, "a") as lines:
                lines.write(f"{key}\n")
        data = content(key)
        for start in range(0, len(data), 700):
            sink.write(data[start : start + 700])

    return fetch


def read(cache: DiskCache, key: str, log: str | None = None) -> bool:
    """Whether the file has the right content."""
    data = content(key)
    with cache.open(key, len(data), fetcher(key, log)) as file:
        return file.read() == data


def busy(folder: str, seed: str, count: str) -> None:
    """Reads `count` files of a dozen, some of them twice, and drops some."""
    cache, rng = DiskCache(folder, LIMIT / 1e9), random.Random(seed)
    for _ in range(int(count)):
        key = f"file {rng.randrange(12)}"
        assert read(cache, key), key
        if rng.random() < 0.05:
            cache.drop(key)


def once(folder: str, log: str) -> None:
    """Reads three files, like other processes at the same time."""
    cache = DiskCache(folder, LIMIT / 1e9)
    print("ready", flush=True)
    sys.stdin.readline()
    assert all(read(cache, f"file {n}", log) for n in (0, 1, 2))


def half(folder: str, key: str) -> None:
    """Stops in the middle of a fetch while it pins another file."""
    cache, data = DiskCache(folder, LIMIT / 1e9), content(key)

    def fetch(sink: Sink) -> None:
        sink.write(data[:500])
        print("half", flush=True)
        time.sleep(600)

    with cache.open("pinned", len(content("pinned")), fetcher("pinned")), cache.open(key, len(data), fetch):
        pass


def killed(folder: str) -> None:
    """Gets killed at every system call that touches the cache, one after the other; checks the remains each time."""
    cache = DiskCache(folder, LIMIT / 1e9)
    for point in range(10_000):
        pid = os.fork()
        if pid == 0:
            _die_at(point)
            for n in (0, 1, 2, 0, 3, 4, 5, 6, 0, 7):
                assert read(cache, f"file {n}")
            cache.drop("file 0")
            os._exit(0)
        status = os.waitpid(pid, 0)[1]
        assert cache.used_bytes() <= LIMIT, point
        # Three files that need nearly all the space, so leftovers of dead processes must not count.
        assert all(read(cache, key) for key in ("file 1", "file 7", f"another {point % 3}")), point
        assert cache.used_bytes() <= LIMIT, point
        assert not [name for name in os.listdir(folder) if "." in name], point
        if os.WIFEXITED(status):
            print(point)
            return


def _die_at(point: int) -> None:
    left = point

    def hook(event: str, _: object) -> None:
        nonlocal left
        if event in ("open", "fcntl.flock", "os.rename", "os.remove", "os.truncate", "os.utime", "os.scandir"):
            left -= 1
            if left < 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


if __name__ == "__main__":
    cache_module._POLL = 0.001
    {"busy": busy, "once": once, "half": half, "killed": killed}[sys.argv[1]](*sys.argv[2:])
