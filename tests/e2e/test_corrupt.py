"""Corrupt files in whole runs: named and fatal by default, or skipped for good by a persistent list."""

import json
import pathlib
import shutil

import pytest

from tests.data.test_skipped_files import spoiled
from tests.e2e.conftest import MakeRun
from tests.e2e.runs import STOPPED, Run, assert_equal, documents
from tests.hub import LoopbackHub, jsonl_bytes, parquet_bytes

WEB, CODE = "data/train-0.parquet", "train-1.jsonl.gz"
SKIP = "--config.data.on_corrupt=skip"
NAMES = ("--config.data.sources.web.name=bad/web", "--config.data.sources.code.name=bad/code")


@pytest.fixture(scope="module", autouse=True)
def corrupt_datasets(datasets: LoopbackHub) -> None:
    """The tiny config's `web` with a corrupt page, and its `code` with one file that is corrupt in the middle."""
    web = parquet_bytes(documents(0, 120), row_group_size=12)
    datasets.commit("bad/web", {WEB: spoiled(web, 0.35)})
    code = [documents(20 + n, 300) for n in range(2)]
    files = {f"train-{n}.jsonl.gz": jsonl_bytes(code[n], compress=True, content=code[n]) for n in range(2)}
    files[CODE] = spoiled(files[CODE], 0.5)
    datasets.commit("bad/code", files)


def skips_of(run: Run) -> dict[str, dict[str, int]]:
    path = run.workdir / "skips.json"
    return json.loads(path.read_text()) if path.exists() else {}


def run_until_done(run: Run, *flags: str) -> list[int]:
    """Repeats the command as long as its exit code requests a restart. Returns the exit codes."""
    codes = []
    while not codes or (codes[-1] != 0 and len(codes) < 6):
        codes.append(run.start(*flags).wait())
    return codes


def test_a_corrupt_file_stops_the_run(make_run: MakeRun) -> None:
    run = make_run()(*NAMES, code=1)
    error = run.output[run.output.index("error: ") :]
    assert "source 'web', file data/train-0.parquet" in error or "source 'code', file train-1.jsonl.gz" in error
    assert "(twice, at row " in error
    assert "data.on_corrupt=skip" in error
    assert "Traceback" not in run.output
    assert not skips_of(run)


@pytest.mark.slow
def test_a_corrupt_file_at_the_very_start(make_run: MakeRun, tmp_path: pathlib.Path) -> None:
    """Nothing was trained: the user's to change, and no launcher is to try again. The row is named, as it is."""
    rows = [{"content": text} for text in documents(3, 300)]
    data = "".join(json.dumps(row) + "\n" for row in rows).encode()
    (tmp_path / "code.jsonl").write_bytes(data.replace(b":", b"", 1))
    flags = ["--config.data.sources.web.name=json", "--config.data.sources.web.column=content"]
    run = make_run()(*flags, f"--config.data.sources.web.data_files=('{tmp_path}/code.jsonl',)", code=2)
    assert f"file {tmp_path}/code.jsonl: {tmp_path}/code.jsonl, row 0: is not JSON" in run.output
    assert "Traceback" not in run.output


@pytest.mark.slow
def test_skipped_for_good(make_run: MakeRun) -> None:
    """Finding, recording and skipping corrupt rows gives the same as a run that had the list from the start.

    The latter also if it is killed.
    """
    run = make_run("finder")
    codes = run_until_done(run, *NAMES, SKIP)
    assert codes == [STOPPED] * (len(codes) - 1) + [0], run.output
    found = skips_of(run)
    assert found.keys() == {"web", "code"}
    assert found["code"] == {CODE: 0}
    assert found["web"].keys() == {WEB}
    assert found["web"][WEB] % 12 == 0
    assert 0 < found["web"][WEB] < 120
    assert {name: run.data_state()["sources"][name]["skips"] for name in found} == found

    knows = make_run("knows")
    shutil.copy(run.workdir / "skips.json", knows.workdir)
    knows(*NAMES)
    killed = make_run("killed")
    shutil.copy(run.workdir / "skips.json", killed.workdir)
    killed.start(*NAMES)
    assert killed.wait_for_step(17), killed.output
    killed.kill()
    # The checkpoint records the list too.
    (killed.workdir / "skips.json").unlink()
    killed(*NAMES)
    assert_equal(killed, knows)
    assert skips_of(killed) == {}
    assert killed.data_state()["sources"] == knows.data_state()["sources"]


@pytest.mark.nightly
def test_two_processes_skip_together(make_run: MakeRun) -> None:
    """The process that finds the file exits with 75, the other is ended, and all restart with the list."""
    run = make_run("two", processes=2)
    codes = run_until_done(run, *NAMES, SKIP)
    assert codes[-1] == 0, (codes, run.output)
    assert all(code not in (0, 2) for code in codes[:-1]), codes
    knows = make_run("knows")
    shutil.copy(run.workdir / "skips.json", knows.workdir)
    knows(*NAMES)
    # Not the whole run: steps before the list grew may have trained on rows from the ends of those files.
    assert run.data_state()["sources"] == knows.data_state()["sources"]
    assert run.last_step() == knows.last_step()
