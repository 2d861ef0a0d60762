"""The WebDataset layout of the Hub: rows by key, columns by suffix; a truncated archive is an error."""

import io
import json
import tarfile

import pytest

from jaxtrain.data.sources.huggingface import HuggingFace
from jaxtrain.errors import CorruptError, UserError
from jaxtrain.interfaces import Block
from tests.hub import LoopbackHub


def tar(members: dict[str, bytes]) -> bytes:
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w") as archive:
        for name, data in members.items():
            about = tarfile.TarInfo(name)
            about.size = len(data)
            archive.addfile(about, io.BytesIO(data))
    return sink.getvalue()


class Keep:
    columns: tuple[str, ...] = ("json", "cls")

    def __call__(self, document: dict) -> dict:
        return document


ROWS = {f"a/{n:04}": {"txt": f"text {n} é".encode(), "json": json.dumps({"n": n}).encode()} for n in range(700)}
MEMBERS = {f"{key}.{column}": data for key, row in ROWS.items() for column, data in row.items()}


def rows(source, row: int = 0) -> Block:
    found: Block = {"text": [], "json": [], "cls": []}
    for block in source.open(0, row):
        for name in found:
            found[name] += block[name]
    return found


def test_rows_and_columns(hub: LoopbackHub):
    hub.commit("org/web", {"train-0.tar": tar({**MEMBERS, "._hidden": b"x", "a/0700.json": b"{}", "README": b"x"})})
    source = HuggingFace(name="org/web", column="txt", transforms=(Keep(),)).resolve()
    assert source.identity["builder"] == "webdataset"
    for row in (0, 1, 511, 512, 699, 700, 701):
        found = rows(source, row)
        assert found["text"] == [*(f"text {n} é" for n in range(700)), ""][row:]
        assert found["json"] == [*({"n": n} for n in range(700)), {}][row:]
        assert set(found["cls"]) <= {None}


def test_what_is_wrong_is_said(hub: LoopbackHub):
    hub.commit("org/web", {"train-0.tar": tar(MEMBERS)})
    with pytest.raises(UserError, match=r"has no column 'text'. Its first row has 'txt', 'json'"):
        HuggingFace(name="org/web").resolve()
    with pytest.raises(
        UserError, match=r"holds an object, not text\. For texts inside .json members use the source WebDataset, whose"
    ):
        HuggingFace(name="org/web", column="json").resolve()


@pytest.mark.parametrize("keep", [0.5, 0.9])
def test_a_cut_archive_is_corrupt_at_its_first_missing_row(hub: LoopbackHub, keep):
    data = tar(MEMBERS)
    hub.commit("org/web", {"train-0.tar": data[: int(len(data) * keep)]})
    source = HuggingFace(name="org/web", column="txt").resolve()
    with pytest.raises(CorruptError) as caught:
        list(source.open(0, 0))
    assert 0.4 * 700 < caught.value.row < 700
