"""The list of documents that are left out. That they leave no trace in the batches: test_properties.py."""

import json
import pathlib

import numpy as np
import pytest
from etils import epath

from jaxtrain import cli
from jaxtrain.data import forgotten
from jaxtrain.data.forgotten import Forgotten
from jaxtrain.data.pipeline import DataConfig
from jaxtrain.errors import UserError
from jaxtrain.trainer import open_data
from tests.data.memory_source import MemorySource
from tests.e2e.configs import tiny


def listed(*entries: tuple[str, str, int, int], rewinds: int = 0) -> Forgotten:
    found = Forgotten(rewinds=rewinds)
    for entry in entries:
        found.add(*entry)
    return found


def test_the_list_grows_and_keeps_its_steps() -> None:
    found = listed(("web", "a", 3, 91), ("web", "b", 0, 91))
    found.learn(listed(("web", "a", 3, 7), ("web", "a", 2, 8), rewinds=2))
    assert list(found) == [("web", "a", 3, 91), ("web", "a", 2, 8), ("web", "b", 0, 91)]
    assert found.rewinds == 2
    again = forgotten.from_json(json.loads(json.dumps(found.to_json())), 5)
    assert (again.documents, again.rewinds) == (found.documents, 2)


def test_rows_are_looked_up() -> None:
    rows = forgotten.Rows({7: 5, 2: 9})
    never = np.iinfo(np.int64).max
    assert rows.steps(np.array([7, 1, 2, 8, 7])).tolist() == [5, never, 9, never, 5]
    assert rows.steps(np.array([], np.int64)).tolist() == []


@pytest.mark.parametrize("text", ["[]", '{"documents": 3}', '{"documents": {"web": {"a": ["x"]}}}', "{", "\xff"])
def test_something_else_is_refused(tmp_path: pathlib.Path, text: str) -> None:
    (tmp_path / "list.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=r"list\.json is not a list of documents .*data/train-0\.parquet"):
        forgotten.load(epath.Path(tmp_path / "list.json"))


def test_what_a_resume_refuses() -> None:
    old = listed(("web", "a", 1, 5))
    assert forgotten.compare(old, listed(("web", "a", 1, 5), ("web", "a", 2, 21)), 20) == []
    (line,) = forgotten.compare(old, listed(("web", "a", 1, 5), ("web", "a", 2, 20)), 20)
    assert "a row 2 is left out from step 20 on, and was trained on until step 20: give step 21" in line
    assert len(forgotten.compare(old, listed(("web", "a", 1, 4)), 20)) == 1


def test_a_file_that_the_source_lacks_is_refused() -> None:
    data = DataConfig(sources={"web": MemorySource(rows=[["1", "2"]] * 2)}, num_lanes=1)
    with pytest.raises(UserError, match=r"source 'web': a document of file-7 .* did you mean file-"):
        data.build({"web": data.sources["web"].resolve()}, seed=0, forgotten={"web": {"file-7": {0: 1}}})


def test_where_the_list_comes_from(tmp_path: pathlib.Path) -> None:
    """What is new in data.forget is left out from the next step on; a checkpoint knows better than the file."""
    asked, workdir = tmp_path / "asked.json", tmp_path / "run"
    workdir.mkdir()
    config = tiny.get_config("")
    config.data.forget = str(asked)
    with pytest.raises(UserError, match=r"asked\.json cannot be read"):
        open_data.forgotten(config, workdir, None)
    asked.write_text('{"documents": {"web": {"a": [1]}}}')
    assert list(open_data.forgotten(config, workdir, None)) == [("web", "a", 1, 1)]
    assert not list(workdir.iterdir())
    open_data.forgotten(config, workdir, None, is_run=True)
    asked.write_text('{"documents": {"web": {"a": [1, 2]}}}')
    assert list(open_data.forgotten(config, workdir, {"step": 40})) == [("web", "a", 1, 1), ("web", "a", 2, 41)]
    config.data.forget = ""
    saved = {"step": 40, "forgotten": listed(("web", "a", 1, 30), ("wiki", "b", 2, 3)).to_json()}
    expected = [("web", "a", 1, 30), ("wiki", "b", 2, 3)]
    assert list(open_data.forgotten(config, workdir, saved)) == expected
    asked.write_text('{"documents": {"wbe": {"a": [1]}}}')
    config.data.forget = str(asked)
    with pytest.raises(UserError, match=r"there is no source 'wbe'; did you mean web\?"):
        open_data.forgotten(config, workdir, None)
    assert cli.to_json(config)["data"]["forget"] == str(asked)
