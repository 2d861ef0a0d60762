"""File names: exact, unique, without secrets; and version 0.1's names, if they are unambiguous."""

import dataclasses
import pathlib
import threading
from collections.abc import Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

import pytest
from fsspec.implementations.memory import MemoryFileSystem

from jaxtrain.data.io.locations import cache_key, expand
from jaxtrain.data.io.names import NAMING, addresses, comparable, is_exact, lasting_name, named
from jaxtrain.data.sources import text_files
from jaxtrain.data.sources.huggingface import HuggingFace
from jaxtrain.data.sources.text_files import TextFiles
from jaxtrain.data.sources.webdataset import WebDataset
from jaxtrain.data.stores import record_store, token_store
from jaxtrain.data.stores.token_store import TokenManifest
from jaxtrain.errors import UserError
from jaxtrain.interfaces import Json, Source, SourceConfig
from tests.data.memory_source import WordTokenizer
from tests.data.sources.reading import texts
from tests.data.sources.tars import tar
from tests.hub import LoopbackHub, jsonl_bytes

SIGNED = "X-Amz-Signature=s&X-Amz-Expires=9&token=t&sig=x&Policy=p&Expires=1&Key-Pair-Id=k&X-Goog-Credential=c"
EXACT = [
    "hf_datasets/train.jsonl",
    "data/hf_train_0.parquet",
    "basic training.jsonl",
    "bearer of news.txt",
    "AKIAIOSFODNN7EXAMPLE.txt",
    "my-training-data/a.jsonl",
    "what?key=1&token=2.jsonl",
    "a&sig=1#2.txt",
    "hf://datasets/org/hf_dataset@0123/data/what?token=1.parquet",
    "s3://bucket/hf_shards/a.tar",
    "https://h/hf_train_0.tar",
    "https://h/get?shard=1",
    "https://h/get?shard=1&part=#2",
    "https://h/get?",
]


@pytest.fixture(autouse=True)
def _secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_API_KEY", "my-training-data")


@pytest.mark.parametrize("address", EXACT)
def test_a_name_says_exactly_where_the_file_is(address: str) -> None:
    assert lasting_name(address) == address


@pytest.mark.parametrize(
    ("address", "name"),
    [
        ("https://me:p@ss@h:1/a.tar", "https://h:1/a.tar"),
        (f"https://h/a.tar?{SIGNED}", "https://h/a.tar"),
        (f"https://h/get?{SIGNED}&shard=1&X%2DAmz-Date=9#x", "https://h/get?shard=1#x"),
        ("ftp://me:secret@h/a@b.tar", "ftp://h/a@b.tar"),
    ],
)
def test_only_what_opens_a_url_is_left_out(address: str, name: str) -> None:
    assert lasting_name(address) == name
    assert list(named([address, address])) == [name]


def test_a_cache_key_is_that_of_one_file_and_version() -> None:
    stamp = {"size": 5, "etag": None}
    for one, other in (("a/x.tar", "b/x.tar"), ("https://h/get?shard=1", "https://h/get?shard=2")):
        assert cache_key(one, stamp) != cache_key(other, stamp)
        assert cache_key(one, stamp) != cache_key(one, {**stamp, "size": 6})
        assert cache_key(one, stamp) != cache_key(one, None)
    assert cache_key("https://me:a@h/x?sig=1", stamp) == cache_key("https://h/x?sig=2", stamp)


def test_a_file_whose_name_has_braces(tmp_path: pathlib.Path) -> None:
    (tmp_path / "x{0..1}.jsonl").write_bytes(b"")
    pattern = str(tmp_path / "x{0..1}.jsonl")
    assert list(expand([pattern])) == [pattern]
    (tmp_path / "x{0..1}.jsonl").unlink()
    for number in range(2):
        (tmp_path / f"x{number}.jsonl").write_bytes(b"")
    assert list(expand([pattern])) == [str(tmp_path / f"x{number}.jsonl") for number in range(2)]


def test_folders_in_a_bucket_are_no_files() -> None:
    """A glob of fsspec finds them too, and a folder would be a file without rows."""
    files = MemoryFileSystem()
    for path in ("/names/a.jsonl", "/names/more/b.jsonl"):
        files.pipe_file(path, b"")
    assert list(expand(["memory://names/*"])) == ["memory:///names/a.jsonl"]
    with pytest.raises(UserError, match="no file matches 'memory://names/more'"):
        expand(["memory://names/more"])
    files.rm("/names", recursive=True)


def test_folders_on_the_hub_are_no_files(hub: LoopbackHub) -> None:
    hub.commit("org/web", {"data/a.jsonl": b"", "data/more/b.jsonl": b""})
    assert [name.rsplit("/", 1)[1] for name in expand(["hf://datasets/org/web/data/*"])] == ["a.jsonl"]
    with pytest.raises(UserError, match="no file matches"):
        expand(["hf://datasets/org/web/data/more"])


def test_two_files_of_one_name_are_refused() -> None:
    with pytest.raises(UserError, match="two addresses of https://h/get differ only in credentials"):
        named(["https://h/get?key=a", "https://h/get?key=b"])


@pytest.mark.parametrize("shard", [1, 2])
def test_a_recorded_name_is_found_again(shard: int) -> None:
    known = [f"https://me:secret@h/get?shard={n}&token=new" for n in range(3)]
    assert addresses({"naming": 2, "files": [f"https://h/get?shard={shard}"]}, known) == [known[shard]]
    assert addresses({"naming": 2, "files": ["a", "https://other/b"]}, known, "hf://x/") == [
        "hf://x/a",
        "https://other/b",
    ]
    with pytest.raises(UserError, match="the same name"):
        addresses({"files": ["https://h/get"]}, known)


def rows(name: str) -> list[str]:
    return [f"{name}: document {n}" for n in range(5)]


def write(folder: pathlib.Path, names: Sequence[str], kind: str) -> list[str]:
    for name in names:
        path = folder / name
        path.parent.mkdir(exist_ok=True, parents=True)
        content = {
            "jsonl": jsonl_bytes(rows(name)),
            "tar": tar([(f"{n}.txt", text.encode()) for n, text in enumerate(rows(name))]),
            "txt": "\n".join(rows(name)).encode(),
        }
        path.write_bytes(content[kind])
    return [text for name in names for text in rows(name)]


def read(source: Source) -> list[str]:
    return [text for file in range(len(source.files)) for text in texts(source.open(file, 0))]


# The name looks like a token, or contains the value of a secret variable.
NAMES = ["hf_train_0", "hf_train_1", "basic a", "basic b", "my-training-data/0", "what?token=a", "what?token=b"]
LOCAL: dict[str, SourceConfig] = {
    "jsonl": HuggingFace(name="json", data_files=("*.jsonl", "*/*.jsonl")),
    "tar": WebDataset(urls=("hf_train_{0,1}.tar", "basic {a,b}.tar", "my-training-data/*.tar", "what?token={a,b}.tar")),
    "txt": TextFiles(patterns=("*.txt", "*/*.txt"), document="line"),
}


@pytest.mark.parametrize("kind", LOCAL)
def test_local_files_are_all_read_and_resumed(
    kind: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    names = [f"{name}.{kind}" for name in NAMES]
    expected = write(tmp_path, names, kind)
    source = LOCAL[kind].resolve()
    assert sorted(source.files) == sorted(names)
    assert source.identity["naming"] == NAMING
    assert sorted(read(source)) == sorted(expected)
    again = LOCAL[kind].resolve(source.identity)
    assert (again.files, read(again)) == (source.files, read(source))


@pytest.mark.parametrize("kind", LOCAL)
def test_brackets_in_a_path(kind: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A path that is there is a path, though as a pattern it matches another one, or none."""
    monkeypatch.chdir(tmp_path)
    expected = write(tmp_path, [f"a[x]/b[12].{kind}"], kind)
    (place,) = (name for name in ("data_files", "urls", "patterns") if hasattr(LOCAL[kind], name))
    source = dataclasses.replace(LOCAL[kind], **{place: (f"a[x]/b[12].{kind}",)}).resolve()  # pyright: ignore[reportArgumentType, reportCallIssue] - a protocol
    assert read(source) == expected


def test_files_of_the_hub_are_told_apart(hub: LoopbackHub) -> None:
    paths = ["data/hf_train_0.jsonl", "data/hf_train_1.jsonl", "data/basic a.jsonl", "my-training-data/2.jsonl"]
    hub.commit("org/hf_dataset", {path: jsonl_bytes(rows(path)) for path in paths})
    config = HuggingFace(name="org/hf_dataset", data_files=("**/*.jsonl",))
    source = config.resolve()
    assert sorted(source.files) == sorted(paths)
    assert (
        read(config.resolve(source.identity)) == read(source) == [text for path in source.files for text in rows(path)]
    )
    keys: list[str] = []
    source.through(lambda file, key: keys.append(key) or file)
    assert len(set(keys)) == len(paths)


class _ByQuery(BaseHTTPRequestHandler):
    """Serves a different archive for each `?shard=`, in ranges."""

    def do_GET(self) -> None:
        shard = parse_qs(urlsplit(self.path).query)["shard"][0]
        body = tar([(f"{n}.txt", text.encode()) for n, text in enumerate(rows(shard))])
        first, last = map(int, self.headers["Range"].removeprefix("bytes=").split("-"))
        last = min(last, len(body) - 1)
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {first}-{last}/{len(body)}")
        self.send_header("Content-Length", str(last + 1 - first))
        self.end_headers()
        self.wfile.write(body[first : last + 1])

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def by_query() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _ByQuery)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    yield f"http://me:secret@127.0.0.1:{server.server_port}/get?shard={{0..3}}&token=x"
    server.shutdown()
    server.server_close()


def test_shards_that_differ_only_in_their_query(by_query: str) -> None:
    source = WebDataset(urls=(by_query,)).resolve()
    public = by_query.replace("me:secret@", "").replace("&token=x", "")
    assert list(source.files) == [public.replace("{0..3}", str(n)) for n in range(4)]
    assert source.identity["urls"] == [public]
    expected = [text for n in range(4) for text in rows(str(n))]
    assert read(source) == expected
    fresh = by_query.replace("secret", "changed").replace("token=x", "token=y")
    assert read(WebDataset(urls=(fresh,)).resolve(source.identity)) == expected


def first_version(source: Source) -> Json:
    """The identity that version 0.1 would have recorded."""
    identity = {key: value for key, value in source.identity.items() if key not in ("naming", "reader")}
    root = f"hf://datasets/{identity.get('name')}@{identity.get('revision')}/"
    prefix = root if identity.get("revision") else ""

    def old(name: str) -> str:
        return lasting_name(prefix + name, 1).removeprefix(prefix)

    identity["files"] = (
        list(dict.fromkeys(map(old, source.files))) if "urls" in identity else list(map(old, source.files))
    )
    if "urls" in identity:
        identity["urls"] = list(map(old, identity["urls"]))
    if "stamps" in identity:
        identity["stamps"] = {old(name): stamp for name, stamp in identity["stamps"].items()}
    return identity


OLD = {
    "plain": (["a", "b"], True),
    "one redacted": (["hf_train_0", "b"], True),
    "a variable's value": (["my-training-data"], True),
    "two of one name": (["hf_train_0", "hf_train_1"], False),
}


@pytest.mark.parametrize("case", OLD)
@pytest.mark.parametrize("kind", ["jsonl", "tar"])
def test_runs_of_version_0_1_go_on_or_are_refused(
    kind: str, case: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    names, goes_on = OLD[case]
    expected = write(tmp_path, [f"{name}.{kind}" for name in names], kind)
    paths = tuple(f"{name}.{kind}" for name in names)
    config = HuggingFace(name="json", data_files=paths) if kind == "jsonl" else WebDataset(urls=paths)
    identity = first_version(config.resolve())
    if not goes_on:
        with pytest.raises(UserError, match=r"the same name.*new run"):
            config.resolve(identity)
        return
    source = config.resolve(identity)
    assert source.files == identity["files"]
    assert source.identity["naming"] == 1
    assert read(source) == expected
    assert comparable(source.identity)["naming"] == (2 if case == "plain" else 1)
    assert is_exact(identity) == (case == "plain")


@pytest.mark.parametrize(("name", "goes_on"), [("org/web", True), ("org/hf_dataset", True), ("org/two", False)])
def test_runs_of_version_0_1_on_the_hub(hub: LoopbackHub, name: str, goes_on: bool) -> None:
    paths = ["data/train-hf_file_0.jsonl", "data/train-1.jsonl"] + ["data/train-hf_file_2.jsonl"] * (name == "org/two")
    hub.commit(name, {path: jsonl_bytes(rows(path)) for path in [*paths, "data/test-hf_file_3.jsonl"]})
    config = HuggingFace(name=name, data_files=("data/train*.jsonl",))
    now = config.resolve()
    identity = first_version(now)
    if goes_on:
        source = config.resolve(identity)
        assert source.files == identity["files"] != list(now.files)
        assert read(source) == read(now)
    else:
        with pytest.raises(UserError, match="the same name"):
            config.resolve(identity)


def test_shards_of_version_0_1_that_had_one_name(by_query: str) -> None:
    """Its WebDataset read only one of them."""
    identity = first_version(WebDataset(urls=(by_query,)).resolve())
    assert len(identity["files"]) == 1
    with pytest.raises(UserError, match="the same name"):
        WebDataset(urls=(by_query,)).resolve(identity)
    one = WebDataset(urls=(by_query.replace("{0..3}", "2"),))
    assert read(one.resolve(first_version(one.resolve()))) == rows("2")


def test_text_files_of_version_0_1(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path, ["hf_train_0.txt"], "txt")
    config = TextFiles(patterns=("*.txt",))
    identity = {**first_version(config.resolve()), "digest": text_files._digest({"hf_...": "hf_train_0.txt"})}
    assert config.resolve(identity).files == ["hf_..."]
    write(tmp_path, ["hf_train_1.txt"], "txt")
    with pytest.raises(UserError, match="the same name"):
        config.resolve(identity)


TOKENIZER = WordTokenizer()


def store_of(config: SourceConfig, source: Json, settings: Json) -> TokenManifest:
    made = TokenManifest(
        source=source,
        settings=settings,
        names=source["files"],
        random_access=False,
        max_samples=None,
        transforms=[],
        tokenizer=TOKENIZER.identity,
        vocab_size=TOKENIZER.vocab_size,
    )
    return TokenManifest.from_json(made.to_json(), "there")


def settings_of_0_1(config: SourceConfig) -> Json:
    said = {name: lasting_name(repr(value), 1) for name, value in vars(config).items()}
    return {"_kind": "hugging_face", **{name: said[name] for name in record_store.settings_of(config) if name in said}}


SIGNATURE = "?X-Amz-Signature=x"
STORES = {
    "plain": ("data/train.jsonl", "data/train.jsonl", "data/other.jsonl", True),
    "signed": (f"https://h/a.jsonl{SIGNATURE}", "https://h/a.jsonl?token=y", "https://h/b.jsonl", True),
    "like a token": ("data/hf_train_0.jsonl", "data/hf_train_0.jsonl", "data/hf_train_1.jsonl", False),
    "by query": ("https://h/get?shard=0", "https://h/get?shard=0&token=y", "https://h/get?shard=1", False),
}


@pytest.mark.parametrize("case", STORES)
@pytest.mark.parametrize("naming", [1, 2])
def test_a_store_passes_for_its_own_files_alone(case: str, naming: int) -> None:
    """By settings, which a new run compares, and by identity, which a resumed run compares."""
    path, same, other, is_exact_in_0_1 = STORES[case]
    made, again, wrong = (HuggingFace(name="json", data_files=(one,)) for one in (path, same, other))

    def identity(path: str, naming: int) -> Json:
        return {"files": [lasting_name(path, naming)], **({"naming": 2} if naming == 2 else {})}

    settings = record_store.settings_of(made) if naming == 2 else settings_of_0_1(made)
    store = store_of(made, identity(path, naming), settings)

    def passes(config: HuggingFace, resumed: Json | None) -> bool:
        try:
            token_store.check(store, "there", config, TOKENIZER, resumed)
        except UserError:
            return False
        return True

    goes_on = naming == 2 or is_exact_in_0_1
    assert passes(again, None) == goes_on
    assert passes(again, identity(same, 2)) == goes_on
    assert not passes(wrong, None)
    assert not passes(wrong, identity(other, 2))
    if naming == 1:
        assert passes(again, identity(same, 1)) == goes_on


def test_a_store_of_shards_that_version_0_1_did_not_tell_apart_is_refused() -> None:
    config = WebDataset(urls=("https://h/get?shard={0..3}",))
    identity = {"kind": "webdataset", "urls": ["https://h/get"], "files": ["https://h/get"]}
    store = store_of(config, identity, {"_kind": "webdataset", "urls": "('https://h/get',)"})
    for resumed in (None, identity):
        with pytest.raises(UserError, match="urls: the store has"):
            token_store.check(store, "there", config, TOKENIZER, resumed)
