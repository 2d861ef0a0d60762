"""The source for Hub datasets and for files read with a builder, against naive reads, with the real client."""

import json
import os
import subprocess
import sys
import threading
from typing import Any

import pytest

from jaxtrain.data.io import retry
from jaxtrain.data.sources.huggingface import HuggingFace, HuggingFaceSource
from jaxtrain.errors import CorruptError, TransientError, UserError
from jaxtrain.interfaces import Block
from tests.data.sources.reading import FORMATS, TEXTS, publish, rows_of, texts
from tests.hub import SECRET, LoopbackHub, csv_bytes, jsonl_bytes, parquet_bytes


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    """Neither our backoff nor the client's own retries of listings wait."""
    monkeypatch.setattr(retry, "sleep", lambda seconds: None)
    monkeypatch.setattr("time.sleep", lambda seconds: None)


@pytest.mark.parametrize("suffix", FORMATS)
def test_every_format_from_any_row(hub: LoopbackHub, suffix):
    source = publish(hub, suffix).resolve()
    assert source.files == [f"data/train-0.{suffix}", f"data/train-1.{suffix}"]
    assert source.random_access == (suffix == "parquet")
    rows = rows_of(suffix)
    for file in (0, 1):
        wanted = rows[file * 750 : (file + 1) * 750]
        for row in (0, 1, 189, 190, 511, 512, 513, 749, 750, 800):
            assert texts(source.open(file, row)) == wanted[row:], (file, row)


@pytest.mark.parametrize("suffix", FORMATS)
def test_hundreds_of_faults_change_nothing(hub: LoopbackHub, suffix):
    """Reads through faults on every path, reopening files in between, and yields what the files contain."""
    source = publish(hub, suffix).resolve()
    kinds = ("status:503", "status:429", "reset", "truncate", "wrong_range", "ignore_range")
    rules = [hub.fault("/data/", kind, probability=0.12, seed=i) for i, kind in enumerate(kinds)]
    rules.append(hub.fault("/data/", "reset", probability=0.1, after_bytes=500, seed=98))
    rules.append(hub.fault("/data/", "corrupt", probability=0.03, seed=99))
    wanted = rows_of(suffix)
    passes = 0
    while sum(rule.fired for rule in rules) < 100:
        for file in (0, 1):
            row = passes * 37 % 700
            passes += 1
            config = HuggingFace(name="org/web", fetch_rows=50)
            fresh = HuggingFaceSource(config, source.identity, source.addresses, source._files)
            fresh._parquet.forget(file)
            blocks = retry.retrying(lambda at, f=file, s=fresh: s.open(f, at), row, what="x", deadline=1e6)
            assert texts(blocks) == wanted[file * 750 + row : (file + 1) * 750]


def test_a_file_that_stays_corrupt_is_named(hub: LoopbackHub):
    for suffix in ("parquet", "jsonl.gz"):
        source = publish(hub, suffix, name=f"org/{suffix[0]}").resolve()
        hub.fault("train-1", "corrupt")
        assert len(texts(retry.retrying(lambda at, s=source: s.open(0, at), 0, what="x", deadline=60))) == 750
        with pytest.raises(CorruptError) as caught:
            texts(retry.retrying(lambda at, s=source: s.open(1, at), 700, what="x", deadline=60))
        assert caught.value.file == f"data/train-1.{suffix} of org/{suffix[0]}"
        # Where the first bad block begins: a row group, or the file.
        assert caught.value.row == (570 if suffix == "parquet" else 0)
        hub.faults.clear()


def test_null_and_other_columns(hub: LoopbackHub):
    rows = [None, "", "one", None]
    scores, meta = [3, 1, None, 4], [{"a": 1}, {"a": 2}, {"a": 3}, {"a": 4}]

    class Keep:
        columns: tuple[str, ...] = ("score", "meta", "text")

        def __call__(self, document: dict[str, Any]) -> dict[str, Any]:
            return document

    for data in ({"train.parquet": parquet_bytes(rows, 3, score=scores, meta=meta)},
                 {"train.jsonl": jsonl_bytes(rows, score=scores, meta=meta)}):  # fmt: skip
        sha = hub.commit(f"org/{next(iter(data))[6:]}", data)
        source = HuggingFace(name=f"org/{next(iter(data))[6:]}", revision=sha, transforms=(Keep(),)).resolve()
        whole: Block = {"text": [], "score": [], "meta": []}
        for block in source.open(0, 1):
            for name in whole:
                whole[name] += block[name]
        assert whole == {"text": ["", "one", ""], "score": scores[1:], "meta": meta[1:]}


def test_csv_texts_that_look_like_something_else(hub: LoopbackHub):
    rows = ["1", "2.50", "007"]
    hub.commit("org/web", {"train.csv": csv_bytes(rows, score=range(3))})
    assert texts(HuggingFace(name="org/web").resolve().open(0, 0)) == rows
    # The datasets library, with pandas' defaults, reads the first two as null.
    rows = ["NA", "null", "", "true"]
    hub.commit("org/web", {"train.csv": csv_bytes(rows, score=range(4))})
    assert texts(HuggingFace(name="org/web").resolve().open(0, 0)) == rows


def test_json_rows_with_columns_that_come_late(hub: LoopbackHub):
    """They do not matter, whether or not the dataset's card lists them."""
    lines = [{"text": "x" * 1000} for _ in range(2000)] + [{"text": "y", "late": 1}]
    data = "".join(json.dumps(line) + "\n" for line in lines).encode()
    hub.commit("org/web", {"train.jsonl": data})
    assert len(texts(HuggingFace(name="org/web").resolve().open(0, 0))) == 2001
    card = b"""---
dataset_info:
  features:
  - name: text
    dtype: string
  - name: late
    dtype: int64
---
"""
    hub.commit("org/web", {"README.md": card})
    source = HuggingFace(name="org/web").resolve()
    assert len(texts(source.open(0, 0))) == 2001
    again = HuggingFace(name="org/web").resolve(json.loads(json.dumps(source.identity)))
    assert len(texts(again.open(0, 0))) == 2001


def test_configs_splits_and_settings_of_the_card(hub: LoopbackHub):
    card = b"""---
configs:
- config_name: en
  data_files:
  - split: train
    path: en/*.csv
  - split: test
    path: en-test.csv
  sep: ";"
- config_name: fr
  data_files: fr/*.csv
---
"""
    files = {
        "en/1.csv": b"id;text\n1;one, two\n",
        "en/0.csv": b"id;text\n0;zero\n",
        "en-test.csv": b"id;text\n2;test\n",
    }
    hub.commit("org/web", {"README.md": card, "fr/0.csv": b"id,text\n0,un\n", **files})
    source = HuggingFace(name="org/web", config_name="en").resolve()
    assert source.files == ["en/0.csv", "en/1.csv"]
    assert [texts(source.open(i, 0)) for i in (0, 1)] == [["zero"], ["one, two"]]
    assert source.identity["builder_kwargs"]["sep"] == ";"
    again = HuggingFace(name="org/web", config_name="en").resolve(json.loads(json.dumps(source.identity)))
    assert texts(again.open(1, 0)) == ["one, two"]
    test = HuggingFace(name="org/web", config_name="en", split="test").resolve()
    assert texts(test.open(0, 0)) == ["test"]
    some = HuggingFace(name="org/web", data_files=("fr/0.csv",)).resolve()
    assert some.files == ["fr/0.csv"]
    wrong: list[tuple[dict[str, Any], str]] = [
        ({}, r"Please pick one among the available configs: \['en', 'fr'\]"),
        ({"config_name": "de"}, r"not found. Available: \['en', 'fr'\]"),
        ({"config_name": "en", "split": "dev"}, "no split 'dev'. It has 'train', 'test'"),
        ({"data_files": ("none/*.csv",)}, "none/"),
    ]
    for options, message in wrong:
        with pytest.raises(UserError, match=message):
            HuggingFace(name="org/web", **options).resolve()


def test_the_commit_is_kept(hub: LoopbackHub):
    config = publish(hub, "parquet")
    source = config.resolve()
    identity = json.loads(json.dumps(source.identity))
    first = identity["revision"]
    second = hub.commit("org/web", {"data/train-0.parquet": parquet_bytes(["new"]), "data/train-2.parquet": b""})
    hub.log.clear()
    again = config.resolve(identity)
    assert again.identity == identity
    assert texts(again.open(0, 0)) == TEXTS[:750]
    assert hub.count("/tree/") == hub.count("/main") == 0
    assert config.resolve().identity["revision"] == second
    assert HuggingFace(name="org/web", revision=first).resolve().identity == identity
    hub.forget("org/web", first)
    with pytest.raises(UserError, match=f"revision {first} is gone from the Hub; main is now {second}"):
        config.resolve(identity)
    with pytest.raises(UserError, match=r"source name: the checkpoint has 'org/web', the config has 'org/other'"):
        HuggingFace(name="org/other").resolve(identity)


def test_resolving_and_opening_cost_few_requests(hub: LoopbackHub):
    config = publish(hub, "parquet")
    identity = config.resolve().identity
    assert hub.count() <= 12, [request.path for request in hub.log]
    hub.log.clear()
    source = config.resolve(identity)
    next(source.open(1, 300))
    # The commit is there; the footer; the group.
    assert [request.path.split("/")[-1] for request in hub.log] == [identity["revision"], *["train-1.parquet"] * 2]


@pytest.mark.parametrize("suffix", ["jsonl.gz", "txt", "csv"])
def test_a_streamed_file_is_fetched_once(hub: LoopbackHub, suffix):
    source = publish(hub, suffix).resolve()
    hub.log.clear()
    texts(source.open(0, 0))
    assert hub.count() <= 2, [request.range for request in hub.log]


# Files read with a builder


@pytest.mark.parametrize("suffix", FORMATS)
def test_local_files(tmp_path, suffix):
    rows = rows_of(suffix)
    for i in (1, 0):
        (tmp_path / f"part-{i}.{suffix}").write_bytes(FORMATS[suffix](rows[i * 750 : (i + 1) * 750]))
    builder = {"parquet": "parquet", "csv": "csv", "txt": "text"}.get(suffix, "json")
    config = HuggingFace(name=builder, data_files=(f"{tmp_path}/*.{suffix}",))
    source = config.resolve()
    assert source.files == [f"{tmp_path}/part-{i}.{suffix}" for i in (0, 1)]
    assert [texts(source.open(file, 700)) for file in (0, 1)] == [rows[700:750], rows[1450:]]
    identity = json.loads(json.dumps(source.identity))
    assert config.resolve(identity).identity == identity
    (tmp_path / f"part-1.{suffix}").write_bytes(FORMATS[suffix](rows))
    with pytest.raises(UserError, match=r"1 of 2 files have changed since the checkpoint: .*part-1"):
        config.resolve(identity)
    (tmp_path / f"part-1.{suffix}").unlink()
    with pytest.raises(UserError, match="there is no such file"):
        config.resolve(identity)


def test_urls_with_signatures_keep_them_to_themselves(hub: LoopbackHub):
    hub.redirect = True
    sha = hub.commit("org/web", {"a.parquet": parquet_bytes(TEXTS, 500), "b.jsonl": jsonl_bytes(TEXTS)})
    from huggingface_hub import get_session

    resolve = f"{hub.endpoint}/datasets/org/web/resolve/{sha}"
    for builder, file in (("parquet", "a.parquet"), ("json", "b.jsonl")):
        url = str(get_session().get(f"{resolve}/{file}").url)
        assert SECRET in url
        config = HuggingFace(name=builder, data_files=(url,))
        source = config.resolve()
        assert texts(source.open(0, 0)) == TEXTS
        assert SECRET not in json.dumps(source.identity)
        assert texts(config.resolve(source.identity).open(0, 3)) == TEXTS[3:]
        hub.expire_signatures()
        with pytest.raises(UserError) as caught:
            config.resolve(source.identity)
        assert SECRET not in str(caught.value)


def test_files_of_the_hub_by_a_builder(hub: LoopbackHub):
    sha = hub.commit("org/web", {"a.parquet": parquet_bytes(TEXTS, 500)})
    config = HuggingFace(name="parquet", data_files=("hf://datasets/org/web/*.parquet",))
    source = config.resolve()
    assert source.files == [f"hf://datasets/org/web@{sha}/a.parquet"]
    hub.commit("org/web", {"a.parquet": parquet_bytes(["new"])})
    assert texts(config.resolve(source.identity).open(0, 1400)) == TEXTS[1400:]


# Threads and processes


@pytest.mark.parametrize("suffix", ["parquet", "jsonl.gz"])
def test_threads(hub: LoopbackHub, suffix):
    source = publish(hub, suffix).resolve()
    failed: list[object] = []

    def work(number: int) -> None:
        try:
            for row in range(number, 750, 250):
                wanted = TEXTS[750 * (number % 2) :][:750]
                if texts(source.open(number % 2, row)) != wanted[row:]:
                    failed.append((number, row))
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []


@pytest.mark.parametrize("suffix", ["parquet", "jsonl.gz"])
def test_readers_do_not_disturb_the_exit(hub: LoopbackHub, suffix):
    """Half-read files and threads in the middle of a read, at an interpreter exit that takes a while.

    The datasets library's own parquet reader hangs or aborts here, and so did ours without exit_guard.py, 7 times of 8.
    """
    publish(hub, suffix, files=1)
    hub.fault("train-0", "latency:0.03")
    code = """
import sys, threading, time
from jaxtrain.data.sources.huggingface import HuggingFace

class Slow:
    def __del__(self):
        time.sleep(0.2)

def work():
    while True:
        for _ in source.open(0, 0):
            pass

source = HuggingFace(name="org/web", fetch_rows=20).resolve()
readers = [source.open(0, row) for row in range(4)]
for reader in readers:
    next(reader)
for _ in range(16):
    threading.Thread(target=work, daemon=True).start()
slow = Slow()
time.sleep(0.1)
sys.exit(75)
"""
    env = {**os.environ, **hub.env()}
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 75, done.stderr


def test_a_transient_error_inside_pyarrow_and_datasets_keeps_its_kind(hub: LoopbackHub):
    for suffix in FORMATS:
        source = publish(hub, suffix, name=f"org/{suffix.replace('.', '-')}").resolve()
        hub.fault("/data/", "status:503", count=1, retry_after=9)
        with pytest.raises(TransientError, match="503") as caught:
            next(source.open(1, 0))
        assert caught.value.retry_after == 9
