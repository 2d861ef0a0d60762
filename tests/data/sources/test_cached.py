"""Reading through the disk cache: the origin's bytes, fetched once, through faults, evictions and wrong bytes."""

import random
import threading

import pytest

from jaxtrain.data.io import cached_files, retry
from jaxtrain.data.io.byte_ranges import HttpBytes, LocalBytes
from jaxtrain.data.io.cached_files import CachedBytes
from jaxtrain.data.io.disk_cache import DiskCache
from jaxtrain.errors import TransientError, UserError
from tests.hub import LoopbackHub

DATA = random.Random(0).randbytes(50_000)


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch):
    monkeypatch.setattr(cached_files, "_REQUEST", 7000)
    monkeypatch.setattr(retry, "sleep", lambda seconds: None)


@pytest.fixture
def cache(tmp_path) -> DiskCache:
    """A cache with space for two and a half files."""
    return DiskCache(tmp_path / "cache", 2.5 * len(DATA) / 1e9)


def on_hub(hub: LoopbackHub, cache: DiskCache, files: int = 1, seconds: float = 60) -> list[CachedBytes]:
    hub.commit("org/web", {f"{n}.bin": DATA for n in range(files)})
    urls = [f"{hub.endpoint}/datasets/org/web/resolve/main/{n}.bin" for n in range(files)]
    return [CachedBytes(HttpBytes(url), url, cache, seconds) for url in urls]


def is_here(cache: DiskCache, file: CachedBytes) -> bool:
    with cache.find(file._key, len(DATA)) as found:
        return found is not None


def test_any_range_comes_from_one_fetch(hub: LoopbackHub, cache: DiskCache):
    (file,) = on_hub(hub, cache)
    assert file.size() == len(DATA)
    assert not is_here(cache, file)
    rng = random.Random(1)
    assert file.fetch(3, 20) == DATA[3:20]
    asked = hub.count("0.bin")
    assert asked == 1 + -(-len(DATA) // 7000)
    for _ in range(50):
        start, count = rng.randint(0, 50_050), rng.randint(0, 9000)
        assert file.fetch(start, start + count) == DATA[start : start + count]
        assert file.tail(count) == DATA[len(DATA) - count :]
    assert file.tail(90_000) == DATA
    assert hub.count("0.bin") == asked
    assert file.stamp() == HttpBytes(file._inner.url).stamp()  # pyright: ignore[reportAttributeAccessIssue]
    (again,) = on_hub(hub, cache)
    assert again.fetch(0, 90_000) == DATA
    assert hub.bytes("0.bin") < len(DATA) + 100


def test_faults_on_the_way_cost_what_they_lost(hub: LoopbackHub, cache: DiskCache):
    (file,) = on_hub(hub, cache, seconds=3600)
    file.size()
    for kind in ("status:503", "reset", "truncate", "wrong_range"):
        hub.fault("0.bin", kind, probability=0.2, count=10, seed=len(kind))
    assert file.fetch(0, len(DATA)) == DATA
    assert hub.count("0.bin") > 12
    assert hub.bytes("0.bin") < 3 * len(DATA)


def test_an_outage_past_its_deadline_is_not_begun_anew_by_the_caller(hub: LoopbackHub, cache: DiskCache, monkeypatch):
    (file,) = on_hub(hub, cache)
    file.size()
    hub.fault("0.bin", "status:503")
    slept: list[float] = []
    monkeypatch.setattr(retry, "sleep", slept.append)
    blocks = retry.retrying(lambda row: iter([{"text": [str(file.fetch(0, 1))]}]), 0, what="web", deadline=60)
    with pytest.raises(TransientError, match="Gave up after"):
        next(blocks)
    assert 59 < sum(slept) < 61
    assert cache.used_bytes() == 0


def test_a_file_that_is_evicted_while_it_is_read(hub: LoopbackHub, cache: DiskCache):
    """Three files in turn in a cache for two: no read costs a whole file, and all cost at most twice as much."""
    files = on_hub(hub, cache, 3)
    step = 500
    for _ in range(4):
        for start in range(0, len(DATA), step):
            for file in files:
                assert file.fetch(start, start + step) == DATA[start : start + step]
    assert 4 * len(DATA) < hub.bytes(".bin") < 2 * 3 * 4 * len(DATA)
    assert cache.used_bytes() == 2 * len(DATA)


def test_an_evicted_file_comes_back_when_that_pays(hub: LoopbackHub, cache: DiskCache):
    file, *others = on_hub(hub, cache, 3)
    file.fetch(0, 1)
    for other in others:
        other.fetch(0, 1)
    assert not is_here(cache, file)
    for start in range(0, len(DATA), 5000):
        file.fetch(start, start + 5000)
        assert not is_here(cache, file)
    file.fetch(0, 1)
    assert is_here(cache, file)


def test_wrong_bytes_are_fetched_again_from_the_origin(hub: LoopbackHub, cache: DiskCache):
    (file,) = on_hub(hub, cache)
    file.size()
    hub.fault("0.bin", "corrupt", count=8)
    assert file.fetch(0, len(DATA)) != DATA
    file.refresh()
    assert cache.used_bytes() == 0
    assert file.fetch(0, len(DATA)) == DATA


def test_threads_fetch_once(hub: LoopbackHub, cache: DiskCache):
    (file,) = on_hub(hub, cache)
    found: list[bytes] = []
    threads = [threading.Thread(target=lambda: found.append(file.fetch(0, len(DATA)))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [DATA] * 8
    assert hub.bytes("0.bin") < 1.2 * len(DATA)


def test_what_cannot_be_read(hub: LoopbackHub, cache: DiskCache, tmp_path):
    (tmp_path / "a.bin").write_bytes(DATA)
    local = CachedBytes(LocalBytes(str(tmp_path / "a.bin")), "a", cache, 60)
    assert local.size() == len(DATA)
    (tmp_path / "a.bin").write_bytes(DATA[:-5])
    with pytest.raises(TransientError, match="of 1000 bytes arrived"):
        local.fetch(0, 1)
    assert cache.used_bytes() == 0
    (tmp_path / "a.bin").unlink()
    with pytest.raises(UserError, match="there is no such file"):
        local.fetch(0, 1)
    (file,) = on_hub(hub, DiskCache(tmp_path / "small", 0.9 * len(DATA) / 1e9))
    with pytest.raises(UserError, match=r"0\.bin has [\d.]+ MB, more than the disk cache"):
        file.fetch(0, 1)
    assert not (tmp_path / "small").exists() or not [p for p in (tmp_path / "small").iterdir() if p.name != "lock"]
