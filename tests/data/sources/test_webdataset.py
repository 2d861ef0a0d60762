"""Tar shards: every row from every row, in every compression; damage of every kind; the whole data path on them."""

import json
import os
import random
import tarfile

import pytest

from jaxtrain.data.io import compression, retry
from jaxtrain.data.io import tar as tar_reader
from jaxtrain.data.io.disk_cache import DiskCache
from jaxtrain.data.io.locations import braces
from jaxtrain.data.pipeline import DataConfig, resolve
from jaxtrain.data.sources.webdataset import WebDataset
from jaxtrain.data.transforms import AtLeast, Template
from jaxtrain.errors import CorruptError, UserError
from jaxtrain.plan import Stage
from tests.data import memory_source
from tests.data.io.test_disk_cache import watching
from tests.data.memory_source import MemorySource
from tests.data.runs import Case, batches_of, plan_of
from tests.data.sources.reading import documents, texts
from tests.data.sources.tars import COMPRESS, Member, shard, tar
from tests.data.test_pipeline import same
from tests.hub import LoopbackHub

GIANT = "λόγος 🜁 " * 100_000
ROWS = [
    *documents(23, longest=20),
    "",
    GIANT,
    "one\r\ntwo\n",
    "  ",
    *(f"line {n} é" * (n % 3) for n in range(700)),
    "last",
]


def all_kinds(rows: list[str]) -> list[Member]:
    """The rows as .json, .txt and .jsonl members in turn, among members that are not documents."""
    found: list[Member] = [("readme", b"no suffix"), ("sub.json/", b"")]
    for number, text in enumerate(rows[:27]):
        kind = "json" if number % 2 else "TXT"
        data = json.dumps({"text": text, "number": number}, ensure_ascii=number % 4 == 1).encode()
        found += [
            (f"sub/{number}.{kind}", text.encode() if kind == "TXT" else data),
            (f"sub/{number}.jpg", os.urandom(number * 37)),
            (f"sub/._{number}.json", b"\x00\x05\x16\x07"),
        ]
    lines = [json.dumps({"text": text}).encode() for text in rows[27:]]
    found.append(("a.jsonl", b"\n".join(lines[:300]) + b"\n\n"))
    found.append(("empty.jsonl", b""))
    found.append((f"{'long' * 60}/b.jsonl", b"\r\n \n".join(lines[300:])))
    return found


def write(folder, suffix: str, members: list[Member], name: str = "a") -> str:
    path = folder / f"{name}.{suffix}"
    path.write_bytes(COMPRESS[suffix](tar(members)))
    return str(path)


@pytest.mark.parametrize("suffix", COMPRESS)
def test_every_row_from_every_row(tmp_path, suffix):
    source = WebDataset(urls=(write(tmp_path, suffix, all_kinds(ROWS)),)).resolve()
    assert not source.random_access
    for row in [*range(0, 32, 3), 27, 28, 326, 327, 328, len(ROWS) - 1, len(ROWS)]:
        assert texts(source.open(0, row)) == ROWS[row:], row


@pytest.mark.parametrize("suffix", ["tar.gz", "tar.bz2", "tar.zst"])
def test_several_streams_in_one_file(tmp_path, suffix):
    """As written by parallel compressors (pigz, pbzip2, pzstd)."""
    data = tar(all_kinds(ROWS))
    pieces = [data[start : start + 30_001] for start in range(0, len(data), 30_001)]
    path = tmp_path / "a.bin"  # its bytes show the format
    path.write_bytes(b"".join(map(COMPRESS[suffix], pieces)))
    assert texts(WebDataset(urls=(str(path),)).resolve().open(0, 0)) == ROWS


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_formats_of_tar(tmp_path, format):
    members = [("a/é.txt", b"first"), (f"{'d' * 90}/{'n' * 90}.txt", b"second")]
    (tmp_path / "a.tar").write_bytes(tar(members, format=format))
    assert texts(WebDataset(urls=(f"{tmp_path}/a.tar",)).resolve().open(0, 0)) == ["first", "second"]


def read_until_broken(source) -> tuple[list[str], CorruptError | None]:
    """What is yielded before the error."""
    found: list[str] = []
    try:
        for block in source.open(0, 0):
            found += block["text"]
    except CorruptError as error:
        return found, error
    return found, None


@pytest.mark.parametrize("suffix", COMPRESS)
def test_a_cut_anywhere_is_an_error_at_the_first_row_that_is_lost(tmp_path, suffix, monkeypatch):
    monkeypatch.setattr(compression, "_INPUT", 100)  # so that documents come before the cut is noticed
    rows = documents(40, seed=3, longest=40)
    data = tar([(f"{n}.txt", text.encode()) for n, text in enumerate(rows)])
    end = len(data) - len(data) % 512
    while data[end - 512 : end] == bytes(512):
        end -= 512
    data = data[: end + 1024]
    packed = COMPRESS[suffix](data)
    rng = random.Random(0)
    cuts = {0, 1, 3, 4, 10, 511, 512, 513, len(packed) - 1, len(packed) - 4, len(packed) - 9}
    cuts |= {*range(512, end, 4 * 512), end, end + 1, end + 511, end + 512, end + 513} if suffix == "tar" else set()
    cuts |= {rng.randrange(len(packed)) for _ in range(40)}
    path = tmp_path / f"a.{suffix}"
    path.write_bytes(packed)
    assert read_until_broken(WebDataset(urls=(str(path),)).resolve()) == (rows, None)
    most = 0
    for cut in sorted(cuts):
        path.write_bytes(packed[:cut])
        found, error = read_until_broken(WebDataset(urls=(str(path),)).resolve())
        assert error is not None, cut
        assert found == rows[: len(found)]
        assert (error.row, error.file) == (len(found), str(path))
        most = max(most, len(found))
    assert most == len(rows) or suffix == "tar.bz2"  # a block of 900 kB is decoded as one


DAMAGE = {
    "a header": (
        lambda data: data[:1024] + bytes([data[1024] ^ 255]) + data[1025:],
        "bad checksum|not a complete archive",
    ),
    "zeros inside": (lambda data: data[:1024] + bytes(512) + data[1536:], "data after the archive's end"),
    "zeros at the end": (lambda data: data[:1024] + bytes(512), "end marker is truncated"),
    "another archive": (lambda data: data + data, "data after the archive's end"),
    "no archive": (lambda data: b"<html>not found</html>" * 100, "not a complete archive"),
    "nothing": (lambda data: b"", "not a complete archive"),
}


@pytest.mark.parametrize("kind", DAMAGE)
@pytest.mark.parametrize("suffix", ["tar", "tar.zst"])
def test_damage_is_an_error(tmp_path, kind, suffix):
    spoil, message = DAMAGE[kind]
    data = tar([(f"{n}.txt", b"text") for n in range(4)])
    (tmp_path / "a.tar").write_bytes(COMPRESS[suffix](spoil(data)))
    found, error = read_until_broken(WebDataset(urls=(f"{tmp_path}/a.tar",)).resolve())
    assert error is not None
    assert error.row == len(found) == {"no archive": 0, "nothing": 0, "another archive": 4}.get(kind, 1)
    with pytest.raises(CorruptError, match=message):
        raise error


@pytest.mark.parametrize("suffix", ["tar.gz", "tar.bz2", "tar.zst"])
def test_a_wrong_byte_in_compressed_data_is_an_error(tmp_path, suffix):
    packed = bytearray(COMPRESS[suffix](tar([(f"{n}.txt", os.urandom(900)) for n in range(40)])))
    rng = random.Random(1)
    for _ in range(40):
        place = rng.randrange(10, len(packed))
        packed[place] ^= 0x55
        (tmp_path / "a.tar").write_bytes(packed)
        _, error = read_until_broken(WebDataset(urls=(f"{tmp_path}/a.tar",)).resolve())
        assert error is not None, place
        packed[place] ^= 0x55


def test_an_archive_without_members_is_an_empty_shard(tmp_path):
    for suffix in COMPRESS:
        for size in (1024, 10240):
            (tmp_path / "a.tar").write_bytes(COMPRESS[suffix](bytes(size)))
            assert texts(WebDataset(urls=(f"{tmp_path}/a.tar",)).resolve().open(0, 0)) == []


def test_a_shard_without_documents_says_what_it_has(tmp_path):
    path = write(tmp_path, "tar", [(f"{n}.jpg", b"x") for n in range(1500)] + [("a.pyd", b""), ("README", b"")])
    with pytest.raises(
        UserError, match=r"a\.tar has no \.json or \.jsonl or \.txt members\. It has 1,500 x \.jpg, 1 x"
    ):
        WebDataset(urls=(path,)).resolve()
    with pytest.raises(UserError, match=r"no \.jsonl members\. It has 1 x \.json"):
        WebDataset(urls=(write(tmp_path, "tar", [("a.json", b"{}")]),), members=("jsonl",)).resolve()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (
            b'{"content": "x", "id": 1}',
            r"a\.tar, row 1: member '1\.json' has no key 'text'\. It has the keys 'content', 'id'",
        ),
        (b'{"text": 5}', "'text' of member '1.json' holds a number, not text"),
        (b'{"text": {"a": 1}}', "holds an object, not text"),
        (b'{"text": ' + b"9" * 5000 + b"}", "holds a number, not text"),
        (b'["text"]', "no key 'text'. It has a list"),
    ],
)
def test_documents_without_text_are_the_users_to_mend(tmp_path, data, message):
    source = WebDataset(urls=(write(tmp_path, "tar", [("0.json", b'{"text": "x"}')]),)).resolve()
    write(tmp_path, "tar", [("0.json", b'{"text": "x"}'), ("1.json", data)])
    with pytest.raises(UserError, match=message):
        texts(source.open(0, 0))


@pytest.mark.parametrize("data", [b'{"text": "x"', b"", b"[" * 100_000, b"\x00\x01"])
def test_what_is_no_json_is_corrupt(tmp_path, data):
    path = write(tmp_path, "tar", [("0.json", b'{"text": "x"}'), ("1.json", data), ("2.json", b'{"text": "y"}')])
    found, error = read_until_broken(WebDataset(urls=(path,)).resolve())
    assert found == ["x"]
    assert error is not None
    assert error.row == 1
    assert "member '1.json' is not JSON" in str(error)
    assert texts(WebDataset(urls=(path,)).resolve().open(0, 2)) == ["y"]  # the rows before are not parsed


def test_text_that_is_none(tmp_path):
    """Null and invalid UTF-8 keep their row; a lone surrogate is replaced."""
    lines = [b'{"text": null}', b'{"text": "\xff"}', rb'{"text": "a \ud83d b \ud83d\ude00"}', b'{"text": "\xc3\xa9"}']
    path = write(tmp_path, "tar", [("0.txt", b"\xff\xfe bad"), ("1.jsonl", b"\n".join(lines)), ("2.txt", b"")])
    source = WebDataset(urls=(path,)).resolve()
    assert texts(source.open(0, 0)) == ["", "", "", "a � b 😀", "é", ""]


def test_other_keys_for_transforms(tmp_path):
    lines = [
        json.dumps({"content": f"text {n}", "score": n, "title": "\ud83d"} if n else {"content": "x"}) for n in range(4)
    ]
    path = write(tmp_path, "tar", [("a.jsonl", "\n".join(lines).encode()), ("b.txt", b"plain")])
    transforms = (AtLeast(column="score", value=2), Template(template="{title}: {content}"))
    config = WebDataset(urls=(path,), column="content", transforms=transforms)
    config.check()
    block = next(config.resolve().open(0, 1))
    assert block == {
        "text": ["text 1", "text 2", "text 3", "plain"],
        "score": [1, 2, 3, None],
        "title": ["�"] * 3 + [None],
        "content": ["text 1", "text 2", "text 3", None],
    }


def test_names_of_members_are_never_used_as_paths(tmp_path):
    folder = tmp_path / "here"
    folder.mkdir()
    members = [
        ("../../evil.txt", b"a"),
        ("/etc/evil.json", b'{"text": "b"}'),
        ("x/../../y.jsonl", b'{"text": "c"}'),
        ("a.pkl", b"cos\nsystem\n(S'false'\ntR."),
    ]
    path = write(folder, "tar", members)
    with tarfile.open(path, "a") as archive:
        for kind, name in ((tarfile.SYMTYPE, "s.txt"), (tarfile.LNKTYPE, "l.json"), (tarfile.FIFOTYPE, "f.txt")):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            archive.addfile(info)
    cache = DiskCache(tmp_path / "cache", 1)
    source = resolve(DataConfig(sources={"web": WebDataset(urls=(path,))}), cache=cache)["web"]
    assert texts(source.open(0, 0)) == ["a", "b", "c"]
    assert sorted(os.listdir(tmp_path)) == ["cache", "here"]
    assert os.listdir(folder) == ["a.tar"]
    assert len(os.listdir(tmp_path / "cache")) == 2


# Patterns and identity


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("a.tar", ["a.tar"]),
        ("s3://b/x-{00008..00011}.tar", [f"s3://b/x-{n:05d}.tar" for n in range(8, 12)]),
        ("{0..10}", list(map(str, range(11)))),
        ("{en,de}/{1..2}.tar", ["en/1.tar", "en/2.tar", "de/1.tar", "de/2.tar"]),
        ("{098..101}", ["098", "099", "100", "101"]),
    ],
)
def test_braces(pattern, names):
    assert braces(pattern) == names


@pytest.mark.parametrize(
    "pattern", ["{a}", "a{", "a}", "{{1..2}}", "{}", "{2..1}", "{0..999999999}", "{0..1999}{0..1999}", "{1...3}"]
)
def test_other_braces_are_refused(pattern):
    with pytest.raises(UserError, match=r"braces are unbalanced or nested|neither a range|ends before|check its range"):
        WebDataset(urls=(f"https://me:secret@host/{pattern}.tar",)).check()


def test_settings_are_checked():
    WebDataset(urls=("a.tar",)).check()
    for fields, message in (
        ({"urls": ()}, "urls and column"),
        ({"column": ""}, "urls and column"),
        ({"members": ("jpg",)}, "members=.'jpg',. must be some of 'json', 'jsonl', 'txt'"),
        ({"max_samples": 0}, "max_samples=0"),
        ({"members": ("txt",), "transforms": (AtLeast(column="score", value=1),)}, "txt members have only text"),
    ):
        with pytest.raises(UserError, match=message):
            WebDataset(**{"urls": ("a.tar",), **fields}).check()


def test_identity(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for n in range(4):
        write(tmp_path, "tar", [("a.txt", b"x" * n)], f"shard-{n}")
    config = WebDataset(urls=("shard-{0..1}.tar", "shard-[23].tar"))
    source = config.resolve()
    assert source.files == [f"shard-{n}.tar" for n in range(4)]
    assert source.file_bytes == [10240] * 4
    identity = json.loads(json.dumps(source.identity))
    assert config.resolve(identity).identity == identity
    write(tmp_path, "tar", [("a.txt", b"new")], "shard-3")
    with pytest.raises(UserError, match=r"1 of 4 files have changed since the checkpoint: shard-3\.tar"):
        config.resolve(identity)
    for other in (
        WebDataset(urls=("shard-*.tar",)),
        WebDataset(urls=config.urls, column="x"),
        WebDataset(urls=config.urls, members=("txt",)),
    ):
        with pytest.raises(UserError, match="the checkpoint has"):
            other.resolve(identity)
    with pytest.raises(UserError, match=r"shard-\d\.tar: there is no such file"):
        WebDataset(urls=("shard-{3..9}.tar",)).resolve()
    with pytest.raises(UserError, match=r"no file matches 'zz\*\.tar'"):
        WebDataset(urls=("zz*.tar",)).resolve()


# Over the network, through the cache


def publish(hub: LoopbackHub, shards: list[bytes], suffix: str = "tar.bz2") -> WebDataset:
    hub.commit("org/tars", {f"s-{n:02d}.{suffix}": COMPRESS[suffix](data) for n, data in enumerate(shards)})
    url = f"{hub.endpoint}/datasets/org/tars/resolve/main/s-{{00..{len(shards) - 1:02d}}}.{suffix}?sig=planted-secret"
    return WebDataset(urls=(url,))


def read(source, deadline: float = 60) -> list[str]:
    """All rows of all shards, read as the data path reads them."""

    def blocks(file: int):
        return retry.retrying(lambda row: source.open(file, row), 0, what=source.files[file], deadline=deadline)

    return [text for file in range(len(source.files)) for text in texts(blocks(file))]


def test_faults_of_the_network_change_nothing(hub: LoopbackHub, tmp_path, monkeypatch):
    monkeypatch.setattr(retry, "sleep", lambda seconds: None)
    monkeypatch.setattr("jaxtrain.data.io.cached_files._REQUEST", 5000)
    monkeypatch.setattr(tar_reader, "_REQUEST", 3000)
    rows = documents(200, longest=40)
    data = DataConfig(sources={"web": publish(hub, [shard(rows[:100]), shard([]), shard(rows[100:])])})
    cache = DiskCache(tmp_path, 1)
    sources = {}
    for kind, used in (("cached", cache), ("direct", None)):
        hub.faults.clear()
        sources[kind] = resolve(data, cache=used)["web"]
        for fault in ("status:503", "status:429", "reset", "truncate", "wrong_range", "corrupt"):
            hub.fault("tar.bz2", fault, count=1 if fault == "corrupt" else 8, after=2, probability=0.2, seed=1)
        assert read(sources[kind], 3600) == rows
    before = hub.count("tar.bz2")
    hub.faults.clear()
    assert read(sources["cached"]) == rows
    assert hub.count("tar.bz2") == before
    assert "planted-secret" not in json.dumps(sources["cached"].identity)
    again = resolve(data, {"web": {"source": sources["cached"].identity}}, DiskCache(tmp_path, 1))["web"]
    assert read(again) == rows
    assert hub.count("tar.bz2") == before + 3  # one lookup each, and no byte of them


def test_a_shard_that_is_broken_at_its_origin_is_named(hub: LoopbackHub, tmp_path):
    rows = documents(50)
    data = DataConfig(sources={"web": publish(hub, [shard(rows), shard(rows)[:20_000]], "tar")})
    source = resolve(data, cache=DiskCache(tmp_path, 1))["web"]
    with pytest.raises(CorruptError, match=r"s-01\.tar.*\(twice, at row \d+\)"):
        read(source)


def test_a_shard_larger_than_the_limit_is_refused_at_the_start(hub: LoopbackHub, tmp_path):
    data = DataConfig(sources={"web": publish(hub, [shard([]), shard(documents(300))], "tar")})
    with pytest.raises(UserError, match=r"^source 'web': .*s-01\.tar has 0\.\d+ MB, more than the disk cache"):
        resolve(data, cache=DiskCache(tmp_path, 20_000 / 1e9))
    data.max_disk_gb = 0
    cache = data.cache(str(tmp_path))
    assert cache is None
    assert len(read(resolve(data, cache=cache)["web"])) == 300
    data.max_disk_gb = -1
    with pytest.raises(UserError, match="max_disk_gb=-1"):
        data.check()


# The whole data path


class Shards(MemorySource):
    """A source in memory with the names of shards."""

    names: tuple[str, ...] = ()

    @property
    def files(self) -> list[str]:
        return list(self.names)


SHAPES = {
    "fewer files than lanes": [70, 40],
    "one file": [150],
    "more files than lanes": [12, 0, 9, 30, 7, 0, 14, 15, 11, 25, 16],
    "empty shards": [0, 90, 60],
}


@pytest.mark.parametrize("max_samples", [None, 61])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_data_path_from_every_step(tmp_path, shape, max_samples, monkeypatch):
    """The same batches as from memory, resumed from every step, for two epochs, with a cache that never exceeds its
    limit of a few shards, and for 1, 2 and 4 hosts.
    """
    monkeypatch.setattr("jaxtrain.data.io.disk_cache._POLL", 0.001)
    monkeypatch.setattr("jaxtrain.data.shared_file_reader._IN_MEMORY_BYTES", 100)
    rows = [memory_source.documents(count, seed, 9) for seed, count in enumerate(SHAPES[shape])]
    names = []
    for number, (some, suffix) in enumerate(zip(rows, list(COMPRESS) * 3, strict=False)):
        names.append(str(tmp_path / f"{number}.{suffix}"))
        (tmp_path / f"{number}.{suffix}").write_bytes(COMPRESS[suffix](shard(some)))
    largest = max(os.path.getsize(name) for name in names)
    cache = DiskCache(tmp_path / "cache", 2.5 * largest / 1e9)
    memory = Shards(rows=rows, random_access=False, max_samples=max_samples)
    memory.names = tuple(names)

    def case(source) -> Case:
        data = DataConfig(sources={"web": source}, num_lanes=4, shuffle_window=4, holdout=0.1)
        return Case(data, plan_of(data, [Stage(seq_len=16, batch_size=8)], 0, steps=8), 0, 2)

    tars = case(WebDataset(urls=tuple(names), max_samples=max_samples))
    through = resolve(tars.data, cache=cache)
    wanted = case(memory).run()
    assert wanted[0].arrays["loss_mask"].any()
    with watching(cache.directory) as seen:
        for at in [None, *wanted[: -1 if max_samples else 3]]:
            after, states = (0, {}) if at is None else (at.step, at.states)
            for a, b in zip(wanted[after:], tars.run(after=after, states=states, resolved=through), strict=True):
                same(a, b)
        for hosts in () if max_samples else (2, 4):
            for host in range(hosts):
                lanes = list(range(host * 4 // hosts, (host + 1) * 4 // hosts))
                with batches_of(tars, states={}, lanes=lanes, resolved=through) as batches:
                    for a, b in zip(wanted, batches, strict=True):
                        assert all((a.states[lane] == b.states[lane]).all() for lane in lanes)
    assert largest <= max(seen) <= cache.limit


def test_blocks_are_bounded(tmp_path):
    path = write(
        tmp_path, "tar.zst", [("a.jsonl", b"\n".join(json.dumps({"text": "x" * 10**6}).encode() for _ in range(50)))]
    )
    sizes = [len(block["text"]) for block in WebDataset(urls=(path,)).resolve().open(0, 0)]
    assert sum(sizes) == 50
    assert max(sizes) <= 5
