"""The same datasets streamed, downloaded first, and from token stores: equal batches, and what remains on the disk."""

import logging
import os
import pathlib
import tempfile

import pytest

from jaxtrain.data import modes, pipeline
from jaxtrain.data.io import retry
from jaxtrain.data.io.disk_cache import DiskCache
from jaxtrain.data.modes import OpenedSource
from jaxtrain.data.pipeline import DataConfig, StepBatch
from jaxtrain.data.sources.huggingface import HuggingFace
from jaxtrain.data.sources.text_files import TextFiles
from jaxtrain.data.stores import record_store
from jaxtrain.data.transforms import AtLeast
from jaxtrain.errors import UserError
from jaxtrain.interfaces import Source
from jaxtrain.plan import Stage
from tests.data.memory_source import WordTokenizer, documents
from tests.data.runs import Case, batches_of, plan_of
from tests.data.stores.test_token_store import assert_same, write
from tests.hub import LoopbackHub, jsonl_bytes, parquet_bytes

TOKENIZER = WordTokenizer()


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    monkeypatch.setattr(retry, "sleep", lambda seconds: None)


@pytest.fixture
def case(hub: LoopbackHub) -> Case:
    """`web` is divided by units, `wiki` and `code` by windows of shared files, `code` without random access."""
    web = {}
    for n in range(4):
        texts = documents(60, n)
        web[f"data/train-{n}.parquet"] = parquet_bytes(texts, row_group_size=6, score=[len(text) % 5 for text in texts])
    hub.commit("org/web", web)
    hub.commit("org/wiki", {"data/train-0.parquet": parquet_bytes(documents(40, 8), row_group_size=20)})
    hub.commit("org/code", {f"data/train-{n}.jsonl.gz": jsonl_bytes(documents(40, n), compress=True) for n in (0, 1)})
    data = DataConfig(
        sources={
            "web": HuggingFace(name="org/web", fetch_rows=16, transforms=(AtLeast(column="score", value=1),)),
            "wiki": HuggingFace(name="org/wiki"),
            "code": HuggingFace(name="org/code", max_samples=70),
        },
        num_lanes=2,
        shuffle_window=8,
        holdout=0.1,
    )
    weights = {"web": 0.5, "wiki": 0.25, "code": 0.25}
    stages = [
        Stage(seq_len=16, batch_size=8, weights=weights, tokens=128 * 7, overlap=0.25),
        Stage(seq_len=16, batch_size=8, weights=weights, packing="fit"),
    ]
    plan = plan_of(data, stages, 3, total_tokens=128 * 14)
    return Case(data, plan, 3, None)


def opened(case: Case, mode: str, folder: pathlib.Path, gigabytes: float = 1.0, **more) -> dict[str, OpenedSource]:
    data = case.data
    data.mode = mode
    cache = DiskCache(folder / "cache" / "data", gigabytes)
    return modes.open_sources(data, TOKENIZER, str(folder / "tokens"), cache=cache, **more)


def sources(found: dict[str, OpenedSource]) -> dict[str, Source]:
    return {name: one.source for name, one in found.items()}


def test_three_modes_one_stream(case, hub: LoopbackHub, tmp_path):
    """Training and held-out documents, and with another mode at every step."""
    stream = sources(opened(case, "stream", tmp_path))
    expected, held_out = case.run(resolved=stream), case.run(resolved=stream, held_out=True)
    assert not (tmp_path / "cache").exists()
    download = sources(opened(case, "download", tmp_path))
    write(tmp_path / "tokens", case.data.sources, workers=2)
    asked = hub.count()
    stored = sources(opened(case, "pretokenized", tmp_path))
    for resolved in (download, stored):
        assert_same(case.run(resolved=resolved), expected)
        assert_same(case.run(resolved=resolved, held_out=True), held_out)
    # `code` is fetched as it is read, because of max_samples; the others were there, and the store makes no requests.
    assert all("org/code" in request.path for request in hub.requests()[asked:])
    after: StepBatch | None = None
    found: list[StepBatch] = []
    for step in range(len(expected)):
        states = after.states if after else {}
        with batches_of(case, after=step, states=states, resolved=(stored, download, stream)[step % 3]) as batches:
            after = next(batches)
        found.append(after)
    assert_same(found, expected)


def test_the_network_is_not_needed_for_a_store(case, hub: LoopbackHub, tmp_path):
    write(tmp_path / "tokens", case.data.sources)
    hub.fault("", "status:503")
    opened(case, "pretokenized", tmp_path)
    assert {one.mode for one in opened(case, "auto", tmp_path).values()} == {"pretokenized"}


def test_a_download_fetches_each_file_once(case, hub: LoopbackHub, tmp_path):
    del case.data.sources["code"]
    weights = {"web": 0.5, "wiki": 0.5}
    case.plan = plan_of(case.data, [Stage(seq_len=16, batch_size=8, weights=weights)], 3, total_tokens=128 * 6)
    resolved = sources(opened(case, "download", tmp_path))
    bodies = hub.bytes("/data/")
    total = sum(os.path.getsize(path) for path in (tmp_path / "cache" / "data").iterdir())
    case.run(resolved=resolved)
    assert hub.bytes("/data/") == bodies < total + 50_000
    # Again, as in another process.
    case.run(resolved=sources(opened(case, "download", tmp_path)))
    assert hub.bytes("/data/") < bodies + 50_000


def test_a_download_of_some_documents_fetches_their_files_alone(case, hub: LoopbackHub, tmp_path, caplog):
    case.data.sources["web"].max_samples = 130  # of 4 files of 60
    expected = case.run(resolved=sources(opened(case, "stream", tmp_path)))
    with caplog.at_level(logging.INFO, "jaxtrain"):
        resolved = sources(opened(case, "download", tmp_path))
    held = sorted(os.listdir(tmp_path / "cache" / "data"))
    assert len(held) == 3 + 1 + 1  # of web, of wiki, and the cache's lock
    assert "Source code: only reading shows which files max_samples needs" in caplog.text
    assert_same(case.run(resolved=resolved), expected)
    assert len(os.listdir(tmp_path / "cache" / "data")) == 5 + 2  # code's
    # They are not all files: another run does not mistake them for a complete source.
    case.data.sources["web"].max_samples = None
    assert len(list((tmp_path / "cache").glob("data-*.json"))) == 1


def test_a_limit_below_the_dataset_changes_nothing(case, tmp_path, caplog):
    expected = case.run(resolved=sources(opened(case, "stream", tmp_path)))
    files = pipeline.resolve(case.data)["web"]
    largest = max(file.size() for file in files._files)  # type: ignore[attr-defined]
    with caplog.at_level(logging.WARNING, "jaxtrain"):
        resolved = sources(opened(case, "download", tmp_path, gigabytes=2.5 * largest / 1e9))
    assert "the rest is fetched every time it is read" in caplog.text
    assert_same(case.run(resolved=resolved), expected)
    held = sum(os.path.getsize(path) for path in (tmp_path / "cache" / "data").iterdir())
    assert held <= 2.5 * largest
    with pytest.raises(UserError, match=r"more than the disk cache .* may hold"):
        case.run(resolved=sources(opened(case, "download", tmp_path / "other", gigabytes=0.9 * largest / 1e9)))
    with pytest.raises(UserError, match=r"data.mode=download keeps files on disk, and data.max_disk_gb=0"):
        modes.open_sources(case.data, TOKENIZER, str(tmp_path), cache=None)


def test_outages_while_downloading_are_waited_out(case, hub: LoopbackHub, tmp_path):
    expected = case.run(resolved=sources(opened(case, "stream", tmp_path)))
    hub.fault("/data/", "status:503", probability=0.3, seed=1)
    hub.fault("/data/", "reset", probability=0.3, seed=2, after_bytes=500)
    assert_same(case.run(resolved=sources(opened(case, "download", tmp_path))), expected)


def test_what_is_here_is_not_downloaded(tmp_path):
    (tmp_path / "a.txt").write_text("1 2 3\n" * 20)
    local = {
        "lines": TextFiles(patterns=(str(tmp_path / "a.txt"),), document="line"),
        "files": HuggingFace(name="text", data_files=(str(tmp_path / "a.txt"),)),
    }
    for mode in ("download", "auto"):
        data = DataConfig(sources=dict(local), mode=mode)
        found = modes.open_sources(data, TOKENIZER, str(tmp_path), cache=DiskCache(tmp_path / "cache", 1.0))
        assert {one.mode for one in found.values()} == {"stream"}
    assert not (tmp_path / "cache").exists()


def chosen(case: Case, folder: pathlib.Path, **more) -> dict[str, str]:
    return {name: one.mode for name, one in opened(case, "auto", folder, fetch=False, **more).items()}


def test_auto_takes_what_is_there_and_else_goes_by_size(case, hub: LoopbackHub, tmp_path, monkeypatch):
    by_size = {"web": "download", "wiki": "download", "code": "stream"}  # `code` is bounded by max_samples
    assert chosen(case, tmp_path) == by_size
    monkeypatch.setattr(modes, "SMALL_BYTES", 5000)
    assert chosen(case, tmp_path) == {**by_size, "web": "stream"}
    assert chosen(case, tmp_path, gigabytes=1e-6) == dict.fromkeys(by_size, "stream")
    monkeypatch.setattr(modes, "SMALL_BYTES", 0)
    opened(case, "download", tmp_path)
    assert chosen(case, tmp_path) == by_size
    write(tmp_path / "tokens", {"web": case.data.sources["web"]})
    assert chosen(case, tmp_path) == {**by_size, "web": "pretokenized"}
    # If the size is unknown, nothing is downloaded.
    monkeypatch.setattr(modes.HuggingFaceSource, "hub_bytes", lambda source: None)
    assert chosen(case, tmp_path / "empty") == dict.fromkeys(by_size, "stream")


@pytest.mark.parametrize(
    ("name", "full", "config_name", "mode"),
    [
        ("finewebedu", "HuggingFaceFW/fineweb-edu", "sample-10BT", "stream"),
        ("openwebtext", "Skylion007/openwebtext", None, "stream"),
        ("pg19", "emozilla/pg19", None, "stream"),
        ("wikitext-103", "Salesforce/wikitext", "wikitext-103-raw-v1", "download"),
    ],
)
def test_short_names(hub: LoopbackHub, tmp_path, name, full, config_name, mode):
    card = "".join(f"- config_name: {config_name}\n  data_files: data/*\n" for _ in range(config_name is not None))
    readme = {"README.md": f"---\nconfigs:\n{card}---\n".encode()} if card else {}
    hub.commit(full, {"data/train-0.parquet": parquet_bytes(documents(20, 1)), **readme})
    source = HuggingFace(name=name)
    source.check()
    data = DataConfig(sources={"a": source}, mode="auto")
    (one,) = modes.open_sources(
        data, TOKENIZER, str(tmp_path), cache=DiskCache(tmp_path / "cache", 1.0), fetch=False
    ).values()
    assert (one.mode, one.source.identity["name"], one.source.identity["config"]) == (mode, full, config_name)
    # The same dataset by its full name, which a resume and a token store treat as the same.
    again = HuggingFace(name=full, config_name=config_name).resolve(one.source.identity)
    assert again.identity == one.source.identity
    assert record_store.settings_of(source) == record_store.settings_of(source.full_name())


def test_streaming_leaves_no_data_behind(case, hub: LoopbackHub, tmp_path, monkeypatch):
    """No file with the data in the Hub's folder, the temporary one, or the run's."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    marks = [max(documents(60, n), key=len).encode() for n in range(4)] + [b"PAR1", b"\x1f\x8b"]
    homes = [tmp_path, pathlib.Path(os.environ["HF_HOME"])]

    def files() -> set[pathlib.Path]:
        return {path for home in homes for path in home.rglob("*") if path.is_file()}

    before = files()
    case.run(resolved=sources(opened(case, "stream", tmp_path)))
    left = files() - before
    assert not [path for path in left if any(mark in path.read_bytes() for mark in marks)]
    assert sum(path.stat().st_size for path in left) < 10_000
    # This test would find files that are kept.
    opened(case, "download", tmp_path)
    assert [path for path in files() if b"PAR1" in path.read_bytes()]
