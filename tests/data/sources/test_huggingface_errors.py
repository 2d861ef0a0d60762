"""Error messages of the source for the Hub: what is wrong, where, and what to do."""

import io
import pathlib
import pickle
import tarfile
from typing import Any

import pytest

from jaxtrain.data.io import retry
from jaxtrain.data.sources.huggingface import HuggingFace
from jaxtrain.errors import TransientError, UserError
from tests.data.sources.reading import TEXTS, publish, texts
from tests.hub import TOKEN, LoopbackHub, jsonl_bytes, parquet_bytes


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    """Neither our backoff nor the client's own retries of listings wait."""
    monkeypatch.setattr(retry, "sleep", lambda seconds: None)
    monkeypatch.setattr("time.sleep", lambda seconds: None)


def test_unknown_dataset(hub: LoopbackHub):
    hub.commit("HuggingFaceFW/fineweb-edu", {"train.parquet": parquet_bytes(["x"])})
    with pytest.raises(UserError, match=r"does not exist on the Hub.*Similar names: HuggingFaceFW/fineweb-edu\."):
        HuggingFace(name="HuggingFaceFV/fineweb").resolve()
    with pytest.raises(UserError, match=r"org/none does not exist on the Hub.*HF_TOKEN[^:]*$"):
        HuggingFace(name="org/none").resolve()
    publish(hub, "parquet")
    with pytest.raises(UserError, match=r"no revision 'dev'. It has main\."):
        HuggingFace(name="org/web", revision="dev").resolve()


@pytest.mark.parametrize("access", ["gated", "refused"])
def test_gated_dataset(hub: LoopbackHub, monkeypatch, access):
    config = publish(hub, "parquet")
    source = config.resolve()
    hub.access("org/web", access)
    for use in (config.resolve, lambda: next(source.open(1, 0))):
        with pytest.raises(UserError, match=r"gated\. Accept its terms.*HF_TOKEN"):
            use()
    with pytest.raises(UserError, match=r"https://huggingface.co/datasets/org/web"):
        config.resolve()
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    if access == "gated":
        assert texts(config.resolve().open(0, 0)) == TEXTS[:750]
    else:
        with pytest.raises(UserError, match="gated"):
            config.resolve()
    monkeypatch.setenv("HF_TOKEN", "hf_notavalidtoken")
    with pytest.raises(UserError) as caught:
        config.resolve()
    assert "notavalid" not in str(caught.value)


def test_missing_columns(hub: LoopbackHub):
    hub.commit("org/web", {"train.parquet": parquet_bytes(["x"], score=[1])})
    with pytest.raises(UserError, match=r"train.parquet of org/web has no column 'content'\. It has 'text', 'score'"):
        HuggingFace(name="org/web", column="content").resolve()
    with pytest.raises(UserError, match="'score' holds int64, not text"):
        HuggingFace(name="org/web", column="score").resolve()
    hub.commit("org/lines", {"train.jsonl": jsonl_bytes(["x"])})
    with pytest.raises(UserError, match=r"train.jsonl of org/lines has no column 'content'"):
        HuggingFace(name="org/lines", column="content").resolve()


def test_code_is_refused(hub: LoopbackHub, monkeypatch, tmp_path):
    """It is not run, regardless of the environment."""
    monkeypatch.setenv("HF_DATASETS_TRUST_REMOTE_CODE", "1")
    script = f"import pathlib\npathlib.Path({str(tmp_path / 'ran')!r}).touch()\nraise SystemExit"
    hub.commit("org/web", {"web.py": script.encode(), "train.jsonl": jsonl_bytes(["x"])})
    with pytest.raises(UserError, match=r"scripts are no longer supported.*refs/convert/parquet"):
        HuggingFace(name="org/web").resolve()
    assert not (tmp_path / "ran").exists()


class _Trap:
    """Leaves a mark when unpickled."""

    def __init__(self, path: str):
        self.path = path

    def __reduce__(self) -> Any:
        return pathlib.Path.touch, (pathlib.Path(self.path),)


def test_no_pickle_is_read(hub: LoopbackHub, tmp_path):
    """Also not from the members of tar shards, which other tools unpickle by suffix."""
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w") as tar:
        for name, data in (
            ("0.txt", b"some text"),
            *((f"0.{s}", _pickled(tmp_path)) for s in ("pickle", "pkl", "pyd")),
        ):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    hub.commit("org/shards", {"train.tar": sink.getvalue()})
    source = HuggingFace(name="org/shards", column="txt").resolve()
    assert texts(source.open(0, 0)) == ["some text"]
    assert not (tmp_path / "ran").exists()


def _pickled(folder: pathlib.Path) -> bytes:
    return pickle.dumps(_Trap(str(folder / "ran")))


def test_nothing_to_read(hub: LoopbackHub):
    hub.commit("org/web", {"README.md": b"# nothing\n"})
    with pytest.raises(UserError, match="org/web"):
        HuggingFace(name="org/web").resolve()


@pytest.mark.parametrize("path", ["/api/datasets/org/web$", "/tree/", "README.md", "train-0"])
@pytest.mark.parametrize("kind", ["status:503", "reset"])
def test_an_outage_at_the_start_is_transient(hub: LoopbackHub, path, kind):
    config = publish(hub, "parquet")
    rule = hub.fault(path, kind)
    with pytest.raises(TransientError):
        config.resolve()
    hub.faults.remove(rule)
    hub.fault(path, kind, count=3)
    assert len(retry.attempt(config.resolve, what="dataset org/web", deadline=60).files) == 2


def test_an_outage_of_listings_is_no_missing_file(hub: LoopbackHub):
    """For a path without a pattern, the client's file system reports a 503 as a missing file."""
    publish(hub, "parquet")
    hub.fault("/tree/", "status:503")
    with pytest.raises(TransientError, match="503"):
        HuggingFace(name="org/web", data_files=("data/train-0.parquet",)).resolve()


def test_offline(hub: LoopbackHub, monkeypatch):
    from huggingface_hub import constants

    publish(hub, "parquet")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="HF_HUB_OFFLINE"):
        HuggingFace(name="org/web").resolve()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": "parquet"}, "needs data_files"),
        ({"name": "fineweb"}, "neither a Hub dataset"),
        ({"name": "./data"}, "neither a Hub dataset"),
        ({"name": "json", "data_files": ("a.jsonl",), "revision": "x"}, "revision belongs to a Hub dataset"),
        ({"name": "org/web", "split": "train[:10%]"}, "max_samples"),
        ({"name": "org/web", "fetch_rows": 0}, "fetch_rows=0"),
        ({"name": "org/web", "max_samples": 0}, "max_samples=0"),
        ({"name": "org/web", "column": ""}, "may not be empty"),
    ],
)
def test_check(fields, message):
    HuggingFace(name="org/web").check()
    with pytest.raises(UserError, match=message):
        HuggingFace(**fields).check()
