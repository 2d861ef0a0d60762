"""One of several processes fails, dies or hangs: all end soon, with the reason, and a restart resumes."""

import pathlib
import time

import pytest

from tests.e2e.conftest import MakeRun
from tests.e2e.runs import ONE_COMPILER, Run
from tests.e2e.test_processes import assert_same_data

pytestmark = pytest.mark.slow


def failing(make_run: MakeRun, tmp_path: pathlib.Path, processes: int, fail: str) -> Run:
    at = tmp_path / "failed_at"
    run = make_run(processes=processes, devices=4 // processes, FAIL=fail, FAILED_AT=str(at))
    run.module = "tests.failing_run"
    return run


def seconds_since_failure(tmp_path: pathlib.Path) -> float:
    """Printed, for docs/benchmarks.md: `pytest -s`."""
    return time.time() - float((tmp_path / "failed_at").read_text())


@pytest.mark.parametrize(("processes", "failed"), [(2, 0)])
def test_an_error_ends_all_with_its_message(
    make_run: MakeRun, reference: Run, tmp_path: pathlib.Path, processes: int, failed: int
) -> None:
    """The others wait for it in a collective."""
    run = failing(make_run, tmp_path, processes, f"{failed}:error:12")
    run(code=1)
    print(f"\n{processes} processes, {failed} raises: all ended after {seconds_since_failure(tmp_path):.1f} s")
    assert run.output.count("Traceback") == 1, run.output
    if failed:
        assert f"Process {failed} on " in run.output
        assert run.output.count("ValueError: a fault") == 2, run.output  # its own traceback, and process 0's line
        assert "ValueError: a fault of this host alone" in (run.workdir / "log.txt").read_text()
    for other in {*range(1, processes)} - {failed}:
        assert f"Process {other} exits because process {failed} on " in run.output
    run.module = ONE_COMPILER
    run()
    assert_same_data(run, reference)


def test_a_mistake_of_one_host_is_not_restarted(make_run: MakeRun, tmp_path: pathlib.Path) -> None:
    run = failing(make_run, tmp_path, 2, "1:mistake:3")
    run(code=2)
    assert "failed: a mistake on this host alone" in run.output
    assert "Traceback" not in run.output


@pytest.mark.parametrize(("how", "failed"), [("stop", 1)])
def test_a_host_that_is_gone_ends_all(
    make_run: MakeRun, reference: Run, tmp_path: pathlib.Path, how: str, failed: int
) -> None:
    """The exit code requests a restart: any code but 0, 2 and 75."""
    run = failing(make_run, tmp_path, 2, f"{failed}:{how}:12")
    code = run.start().wait()
    print(f"\n{how} of process {failed}: all ended after {seconds_since_failure(tmp_path):.1f} s, code {code}")
    assert code not in (0, 2, 75), run.output
    run.module = ONE_COMPILER
    run()
    assert_same_data(run, reference)
