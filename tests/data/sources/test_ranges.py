"""Ranges of bytes over HTTP, from disks and buckets: exactly the requested bytes, or an error."""

import pathlib
import random

import fsspec
import pytest

from jaxtrain.data.io import byte_ranges, retry
from jaxtrain.data.io.byte_ranges import BucketBytes, Bytes, HttpBytes, LocalBytes, RangeBuffer, RangeFile
from jaxtrain.data.io.locations import expand, locate, stamps
from jaxtrain.errors import TransientError, UserError
from tests.hub import SECRET, TOKEN, LoopbackHub

DATA = random.Random(0).randbytes(10_000)


@pytest.fixture(params=["http", "http redirected", "local", "bucket"])
def source(request, hub: LoopbackHub, tmp_path) -> Bytes:
    if request.param == "local":
        (tmp_path / "a.bin").write_bytes(DATA)
        return LocalBytes(str(tmp_path / "a.bin"))
    if request.param == "bucket":
        fsspec.filesystem("memory").pipe_file("/bucket/a.bin", DATA)
        return BucketBytes("memory://bucket/a.bin")
    hub.redirect = "redirected" in request.param
    return on_hub(hub)


def on_hub(hub: LoopbackHub, data: bytes = DATA) -> HttpBytes:
    hub.commit("org/web", {"a.bin": data})
    return HttpBytes(f"{hub.endpoint}/datasets/org/web/resolve/main/a.bin")


def test_any_range(source: Bytes):
    assert source.fetch(3, 20) == DATA[3:20]
    assert source.tail(7) == DATA[-7:]
    assert source.tail(20_000) == DATA
    rng = random.Random(1)
    for _ in range(30):
        start, count = rng.randint(0, 10_050), rng.randint(0, 500)
        assert source.fetch(start, start + count) == DATA[start : start + count]
    source.refresh()
    assert source.fetch(20_000, 20_001) == b""
    assert source.size() == len(DATA)
    assert source.fetch(9_990, 30_000) == DATA[9_990:]


def test_a_file_object(source: Bytes):
    file = RangeFile(RangeBuffer(source, lambda position: position + 700, keep=2))
    rng = random.Random(2)
    position = 0
    for _ in range(200):
        if rng.random() < 0.3:
            position = file.seek(rng.randint(0, len(DATA)))
        count = rng.randint(0, 1500)
        assert file.read(count) == DATA[position : position + count]
        position = file.tell()
    file.seek(-100, 2)
    assert file.read() == DATA[-100:]
    file.seek(50)
    file.seek(5, 1)
    buffer = bytearray(10)
    assert file.readinto(buffer) == 10
    assert buffer == DATA[55:65]


def test_an_empty_file(hub: LoopbackHub, tmp_path):
    (tmp_path / "a.bin").write_bytes(b"")
    for source in (on_hub(hub, b""), LocalBytes(str(tmp_path / "a.bin"))):
        assert source.tail(10) == source.fetch(0, 10) == b""
        assert source.size() == 0
        assert RangeFile(RangeBuffer(source, lambda position: position + 9, keep=1)).read() == b""


def test_a_read_is_one_request_also_when_redirected(hub: LoopbackHub):
    hub.redirect = True
    source = on_hub(hub)
    for i in range(10):
        source.fetch(i * 100, i * 100 + 100)
    assert (hub.count("/resolve/"), hub.count("/cdn/")) == (1, 10)
    hub.expire_signatures()
    assert source.fetch(0, 100) == DATA[:100]
    assert source.fetch(100, 200) == DATA[100:200]
    assert (hub.count("/resolve/"), hub.count("/cdn/")) == (2, 13)  # one was refused


def test_the_token_goes_to_the_hub_alone(hub: LoopbackHub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    hub.redirect = True
    source = on_hub(hub)
    hub.access("org/web", "private")
    for i in range(3):
        source.fetch(i, i + 1)
    assert {request.token for request in hub.requests("/resolve/")} == {TOKEN}
    assert {request.token for request in hub.requests("/cdn/")} == {None}
    other = HttpBytes(source.url.replace("127.0.0.1", "localhost"))
    hub.access("org/web", "public")
    other.fetch(0, 1)
    assert hub.log[-2].token is None


@pytest.mark.parametrize("redirect", [False, True])
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("status:503", {}),
        ("status:500", {}),
        ("status:408", {}),
        ("reset", {}),
        ("reset", {"after_bytes": 10}),
        ("truncate", {}),
        ("truncate", {"after_bytes": 0}),
        ("wrong_range", {}),
        ("ignore_range", {}),
        ("status:304", {}),
        ("slow", {"seconds": 0.5}),
    ],
)
def test_one_fault_is_one_transient_error(hub: LoopbackHub, monkeypatch, kind, options, redirect):
    monkeypatch.setattr(byte_ranges, "_TIMEOUT", 0.2)
    hub.redirect = redirect
    source = on_hub(hub)
    source.fetch(0, 10)
    hub.fault("/cdn/" if redirect else "a.bin", kind, count=1, **options)
    before = hub.count()
    with pytest.raises(TransientError) as caught:
        source.fetch(100, 5000)
    assert hub.count() == before + 1
    assert SECRET not in str(caught.value)
    assert "a.bin" in str(caught.value)
    assert source.fetch(100, 5000) == DATA[100:5000]


def test_rate_limits_say_how_long(hub: LoopbackHub):
    source = on_hub(hub)
    hub.fault("a.bin", "status:429", count=1, retry_after=30)
    with pytest.raises(TransientError, match="429") as caught:
        source.fetch(0, 1)
    assert caught.value.retry_after == 30


def test_a_dripping_server_is_given_up(hub: LoopbackHub, monkeypatch):
    """Bytes that arrive before the timeout, but too slowly for the whole."""
    monkeypatch.setattr(byte_ranges, "_TIMEOUT", 0.3)
    source = on_hub(hub)
    source.fetch(0, 1)
    monkeypatch.setattr(byte_ranges.time, "monotonic", iter(range(0, 1000, 7)).__next__)
    with pytest.raises(TransientError, match="sent 5000 bytes in"):
        source.fetch(0, 5000)


def test_no_server(hub: LoopbackHub):
    source = HttpBytes("http://127.0.0.1:9/a.bin")
    with pytest.raises(TransientError, match=r"no connection.*Is there a network\?"):
        source.fetch(0, 1)
    with pytest.raises(TransientError, match="cannot be looked up"):
        HttpBytes("http://no-such-host.invalid/a.bin").fetch(0, 1)


@pytest.mark.parametrize(
    ("access", "path", "message"),
    [
        ("gated", "a.bin", "is gated"),
        ("private", "a.bin", "does not exist on the Hub, or it is private"),
        ("public", "b.bin", "no such file"),
    ],
)
def test_refusals(hub: LoopbackHub, access, path, message):
    on_hub(hub)
    hub.access("org/web", access)
    with pytest.raises(UserError, match=message):
        HttpBytes(f"{hub.endpoint}/datasets/org/web/resolve/main/{path}").fetch(0, 1)


def test_a_file_that_changes_while_it_is_read(hub: LoopbackHub):
    source = on_hub(hub)
    source.fetch(0, 10)
    hub.commit("org/web", {"a.bin": DATA + b"more"})
    with pytest.raises(UserError, match="changed while it was read: it had 10000 bytes, now 10004"):
        source.fetch(0, 10)


@pytest.mark.parametrize(("count", "is_refused"), [(1, False), (2, False), (None, True)])
def test_a_server_without_ranges_is_refused_after_three_looks(hub: LoopbackHub, count, is_refused, monkeypatch):
    monkeypatch.setattr(retry, "sleep", lambda seconds: None)
    source = on_hub(hub)
    hub.fault("a.bin", "ignore_range", count=count)
    if is_refused:
        with pytest.raises(UserError, match="answers Range requests"):
            source.stamp()
    else:
        assert source.stamp()["size"] == len(DATA)


def test_a_redirect_loop_is_a_transient_error(hub: LoopbackHub):
    source = on_hub(hub)
    hub.fault("a.bin", "loop")
    with pytest.raises(TransientError, match="TooManyRedirects"):
        source.fetch(0, 10)


def test_stamps_tell_a_changed_file(hub: LoopbackHub, tmp_path):
    path = tmp_path / "a.bin"
    memory = fsspec.filesystem("memory")

    def all_stamps(data: bytes) -> list:
        path.write_bytes(data)
        memory.pipe_file("/bucket/a.bin", data)
        source = on_hub(hub, data)
        return [source.stamp(), LocalBytes(str(path)).stamp(), BucketBytes("memory://bucket/a.bin").stamp()]

    first = all_stamps(DATA)
    assert all_stamps(DATA) == first
    changed = all_stamps(DATA[:-1] + b"?")
    longer = all_stamps(DATA + b"?")
    assert [a != b for a, b in zip(first, changed, strict=True)] == [True, True, False]  # memory:// has no etag
    assert all(a != b for a, b in zip(first, longer, strict=True))


# Patterns


def test_two_addresses_of_one_name_are_refused():
    """One of them would be lost silently: names contain no signature."""
    assert list(expand(["https://a.example/x?id=1&token=1"] * 2)) == ["https://a.example/x?id=1"]
    with pytest.raises(UserError, match=r"two addresses of https://a\.example/x differ"):
        expand(["https://a.example/x?token=1", "https://a.example/x?token=2"])


def test_expand(hub: LoopbackHub, tmp_path, monkeypatch):
    for name in ("b.txt", "a.txt", "c/d.txt", "e.bin"):
        pathlib.Path(tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    monkeypatch.chdir(tmp_path)
    assert list(expand(["*.txt"])) == ["a.txt", "b.txt"]
    assert list(expand(["**/*.txt", "e.bin"])) == ["a.txt", "b.txt", "c/d.txt", "e.bin"]
    assert list(expand([str(tmp_path / "*.bin")])) == [f"{tmp_path}/e.bin"]
    sha = hub.commit("org/web", {"data/x-1.txt": b"1", "data/x-0.txt": b"0", "y.txt": b""})
    names = [f"hf://datasets/org/web@{sha}/data/x-{i}.txt" for i in (0, 1)]
    assert list(expand(["hf://datasets/org/web/data/x-*.txt"])) == names
    assert list(expand(["hf://datasets/org/web@main/data/*"])) == names
    assert [locate(address).fetch(0, 9) for address in expand(names).values()] == [b"0", b"1"]
    memory = fsspec.filesystem("memory")
    memory.pipe_file("/shop/1.txt", b"1")
    memory.pipe_file("/shop/0.txt", b"0")
    assert list(expand(["memory://shop/*.txt"])) == ["memory:///shop/0.txt", "memory:///shop/1.txt"]
    url = f"https://user:{SECRET}@example.org/a.txt?signature={SECRET}"
    assert expand([url]) == {"https://example.org/a.txt": url}
    found = [locate(address) for address in expand(["a.txt", "memory://shop/0.txt", names[0]]).values()]
    assert list(stamps(["a", "b", "c"], found)) == ["a", "b"]  # a file at a commit cannot change


@pytest.mark.parametrize(
    "pattern", ["none/*.txt", "memory://none/*.txt", "hf://datasets/org/web/none*.txt", "hf://nonsense"]
)
def test_patterns_without_files(hub: LoopbackHub, pattern):
    hub.commit("org/web", {"y.txt": b""})
    with pytest.raises(UserError, match=r"no file matches|not of the form"):
        expand([pattern])


def test_patterns_on_the_hub_have_its_errors(hub: LoopbackHub, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # the client's own retries of listings
    with pytest.raises(UserError, match="does not exist on the Hub"):
        expand(["hf://datasets/org/none/*.txt"])
    hub.commit("org/web", {"y.txt": b""})
    hub.fault("/tree/", "status:503")
    with pytest.raises(TransientError, match="503"):
        expand(["hf://datasets/org/web/*.txt"])


def test_a_file_system_that_is_not_installed_says_what_to_install():
    fsspec.register_implementation("absent", "no_such_module.FileSystem", clobber=True, errtxt="no s3fs")
    for use in (BucketBytes, locate, lambda url: expand([url])):
        with pytest.raises(UserError, match=r"no s3fs.*jaxtrain\[s3\]"):
            use("absent://bucket/a.parquet")
    with pytest.raises(UserError, match="nonsense"):
        expand(["nonsense://a.parquet"])
