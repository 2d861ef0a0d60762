"""The disk cache: never over its limit, even when processes are killed; and reading through it."""

import contextlib
import os
import pathlib
import random
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from jaxtrain.data.io import disk_cache as cache_module
from jaxtrain.data.io.disk_cache import DiskCache, Sink
from jaxtrain.errors import TransientError, UserError
from tests.data.cache_worker import LIMIT, content, read

ROOT = pathlib.Path(__file__).parents[3]
SIZE = 1000


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(cache_module, "_POLL", 0.001)


@pytest.fixture
def three(tmp_path) -> DiskCache:
    """A cache with space for three files of SIZE bytes."""
    return DiskCache(tmp_path / "cache", 3 * SIZE / 1e9)


def put(cache: DiskCache, key: str) -> bytes:
    with cache.open(key, SIZE, lambda sink: sink.write(key[:1].encode() * SIZE)) as file:
        return file.read()


def is_here(cache: DiskCache, key: str) -> bool:
    """Also makes it the most recently used file."""
    with cache.find(key, SIZE) as file:
        return file is not None


def held(cache: DiskCache) -> list[str]:
    """Names of all files except the lock."""
    return sorted(name for name in os.listdir(cache.directory) if name != "lock")


@contextlib.contextmanager
def watching(folder: str | os.PathLike[str]) -> Iterator[list[int]]:
    """Total sizes seen by a thread that does nothing but look."""
    seen, done = [], threading.Event()

    def look() -> None:
        while not done.is_set():
            sizes: dict[int, int] = {}
            with contextlib.suppress(FileNotFoundError), os.scandir(folder) as entries:
                for entry in entries:
                    with contextlib.suppress(FileNotFoundError):
                        stat = os.stat(entry.path)
                        sizes[stat.st_ino] = stat.st_size  # one that is renamed meanwhile may be listed twice
            seen.append(sum(sizes.values()))

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield seen
    finally:
        done.set()
        thread.join()


def worker(*arguments: object) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "tests.data.cache_worker", *map(str, arguments)]
    return subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def test_the_least_recently_used_file_goes_first(three):
    assert [put(three, key) for key in "abc"] == [b"a" * SIZE, b"b" * SIZE, b"c" * SIZE]
    assert three.used_bytes() == three.limit
    assert put(three, "a") == b"a" * SIZE
    put(three, "d")
    assert [key for key in "dcba" if is_here(three, key)] == ["d", "c", "a"]
    put(three, "e")  # "a" was used last, "d" first
    assert [key for key in "abcde" if is_here(three, key)] == ["a", "c", "e"]
    assert three.used_bytes() == three.limit


def test_a_file_that_is_here_is_not_fetched(three):
    put(three, "a")

    def fetch(sink: Sink) -> None:
        raise AssertionError("it is here")

    with three.open("a", SIZE, fetch) as file:
        assert file.read() == b"a" * SIZE
        assert pathlib.Path(file.name).parent == pathlib.Path(three.directory)
    with DiskCache(three.directory, 1).open("a", SIZE, fetch) as file:  # nor by the next process
        assert file.read() == b"a" * SIZE


def test_what_is_read_is_not_evicted_and_one_waits_for_room(three):
    with contextlib.ExitStack() as pins:
        for key in "ac":
            pins.enter_context(three.open(key, SIZE, fetcher_of(key)))
        with three.open("b", SIZE, fetcher_of("b")) as file:
            waiting = threading.Thread(target=put, args=(three, "d"))
            waiting.start()
            waiting.join(0.05)
            assert waiting.is_alive()
            assert file.read() == b"b" * SIZE
        waiting.join()
        assert [key for key in "abcd" if is_here(three, key)] == ["a", "c", "d"]


def fetcher_of(key: str):
    return lambda sink: sink.write(key.encode() * SIZE) and None


def test_nothing_is_evicted_for_what_then_does_not_fit(three):
    for key in "abc":
        put(three, key)
    with three.open("b", SIZE, fetcher_of("b")), three.open("c", SIZE, fetcher_of("c")):
        waiting = threading.Thread(target=lambda: three.open("big", 2 * SIZE, big).__enter__().close())
        waiting.start()
        waiting.join(0.05)
        assert waiting.is_alive()
        assert is_here(three, "a")
    waiting.join()
    assert not is_here(three, "b")


def big(sink: Sink) -> None:
    sink.write(bytes(2 * SIZE))


def test_a_file_larger_than_the_limit(three):
    with pytest.raises(
        UserError, match=r"shard-7\.tar has [\d.]+ MB, more than the disk cache .*\([\d.]+ MB\)"
    ) as error:
        three.check("https://me:secret@host/shard-7.tar?signature", 1_000_000)
    assert "Set data.max_disk_gb to 0.001 or more" in str(error.value)
    assert "secret" not in str(error.value)
    with (
        pytest.raises(UserError, match="a has 0"),
        three.open("a", 3 * SIZE + 1, lambda sink: pytest.fail("fetched")),
    ):
        pass
    assert not os.path.exists(three.directory)


def broken(sink: Sink) -> None:
    sink.write(b"x" * 10)
    raise TransientError("reset")


@pytest.mark.parametrize(
    ("fetch", "message"),
    [
        (broken, "reset"),
        (lambda sink: sink.write(b"x" * (SIZE - 1)), "a: 999 of 1000 bytes arrived"),
        (lambda sink: [sink.write(b"x" * SIZE), sink.write(b"x")], "more than its 1000 bytes"),
    ],
)
def test_a_fetch_that_fails_leaves_nothing(three, fetch, message):
    with watching(three.directory) as seen:
        for _ in range(20):
            with pytest.raises(TransientError, match=message), three.open("a", SIZE, fetch):
                pass
            assert held(three) == []
    assert max(seen) <= SIZE
    assert put(three, "a") == b"a" * SIZE


def test_a_full_disk(three):
    def fetch(sink: Any) -> None:
        with open("/dev/full", "wb", buffering=0) as sink.file:
            sink.write(b"x")

    with pytest.raises(UserError, match=r"the disk of .*cache is full \(No space left on device\).*free [\d.]+ MB"):
        three.open("a", SIZE, fetch).__enter__()
    assert held(three) == []


def test_a_limit_that_was_lowered(three):
    for key in "abc":
        put(three, key)
    DiskCache(three.directory, 2 * SIZE / 1e9).trim()
    assert [key for key in "abc" if is_here(three, key)] == ["b", "c"]
    lower = DiskCache(three.directory, SIZE / 1e9)
    put(lower, "d")
    assert [key for key in "abcd" if is_here(three, key)] == ["d"]


def test_a_dropped_file_is_fetched_again_and_counts_while_it_is_read(three):
    put(three, "a")
    three.drop("a")
    three.drop("never here")
    assert three.used_bytes() == 0
    with three.open("a", SIZE, fetcher_of("a")) as file:
        three.drop("a")
        assert not is_here(three, "a")
        assert file.read() == b"a" * SIZE
        with three.open("a", SIZE, lambda sink: sink.write(b"z" * SIZE)) as anew:
            assert anew.read() == b"z" * SIZE
        assert three.used_bytes() == 2 * SIZE
    three.trim()
    assert three.used_bytes() == SIZE
    assert put(three, "a") == b"z" * SIZE


def test_a_file_of_another_size_is_not_taken(three):
    put(three, "a")
    assert not is_here(three, "b")
    with three.find("a", SIZE - 1) as file:
        assert file is None
    assert held(three) == []


def test_names_are_hashes(three, tmp_path):
    for key in ("../../etc/passwd", "/x", "", "a" * 5000, "\ud800", "lock"):
        with three.open(key, 1, lambda sink: sink.write(b"x")) as file:
            assert file.read() == b"x"
    assert sorted(os.listdir(tmp_path)) == ["cache"]
    assert {len(name) for name in held(three)} == {40}
    assert len(held(three)) == 6


def test_an_empty_file(three):
    for _ in range(2):
        with three.open("a", 0, lambda sink: None) as file:
            assert file.read() == b""


def test_many_threads(tmp_path):
    cache, wrong = DiskCache(tmp_path / "cache", LIMIT / 1e9), []

    def use(seed: int) -> None:
        rng = random.Random(seed)
        for _ in range(60):
            key = f"file {rng.randrange(12)}"
            if not read(cache, key):
                wrong.append(key)

    with watching(cache.directory) as seen:
        threads = [threading.Thread(target=use, args=(seed,)) for seed in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong
    assert LIMIT / 2 < max(seen) <= LIMIT


def test_several_processes_that_are_killed(tmp_path):
    folder, rng = tmp_path / "cache", random.Random(0)
    with watching(folder) as seen:
        workers = [worker("busy", folder, seed, 10**6) for seed in range(3)]
        for seed in range(3, 9):
            # Killed as soon as something new appears.
            count = len(seen)
            while not folder.exists() or len(seen) < count + 100:
                assert workers[0].poll() is None
            victim = workers.pop(rng.randrange(len(workers)))
            victim.kill()
            victim.communicate()
            workers.append(worker("busy", folder, seed, 300))
        for process in workers[:-3]:
            process.kill()
        for process in workers:
            process.communicate()
        assert [process.returncode for process in workers[-3:]] == [0, 0, 0]
    assert LIMIT / 2 < max(seen) <= LIMIT
    cache = DiskCache(folder, LIMIT / 1e9)
    cache.trim()
    assert not [name for name in held(cache) if "." in name]


def test_processes_that_want_the_same_file_fetch_it_once(tmp_path):
    log = tmp_path / "log"
    workers = [worker("once", tmp_path / "cache", log) for _ in range(3)]
    for process in workers:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in workers:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    assert [process.wait() for process in workers] == [0, 0, 0]
    for process in workers:
        process.communicate()
    assert sorted(log.read_text().splitlines()) == ["file 0", "file 1", "file 2"]


def test_a_process_killed_in_the_middle_of_a_fetch(tmp_path):
    cache, key = DiskCache(tmp_path, LIMIT / 1e9), "file 1"
    process = worker("half", tmp_path, key)
    assert process.stdout is not None
    assert process.stdout.readline() == "half\n"
    full = len(content(key)) + len(content("pinned"))
    assert cache.used_bytes() == full  # all space is reserved before it is written
    room = LIMIT - full
    with cache.open("x", room, lambda sink: sink.write(bytes(room))):
        pass
    waiting = threading.Thread(target=put, args=(cache, "d"))
    with cache.open("x", room, lambda sink: None):
        waiting.start()
        waiting.join(0.05)
        assert waiting.is_alive()  # pins of living processes hold
        process.kill()
        process.communicate()
        waiting.join()
    assert read(cache, key)
    assert cache.used_bytes() <= LIMIT


def test_killed_at_every_system_call(tmp_path):
    process = worker("killed", tmp_path / "cache")
    out, _ = process.communicate()
    assert process.returncode == 0
    assert int(out) > 100
