"""launch/restart.sh, with small shell programs as the command."""

import os
import pathlib
import signal
import subprocess

import pytest

from tests.launch.test_local import HEED_HANGUPS

RESTART = pathlib.Path(__file__).parents[2] / "launch" / "restart.sh"


def environment(**settings: str) -> dict[str, str]:
    return {**os.environ, "RESTART_PAUSE": "0", **settings}


def ends_with(codes: list[int], tmp_path: pathlib.Path, **settings: str) -> tuple[int, int]:
    """The exit code and the number of runs, if the command's n-th run ends with the n-th code."""
    runs = tmp_path / "runs"
    chosen = "; ".join(f"[ $n -ne {number} ] || exit {code}" for number, code in enumerate(codes, 1))
    program = f"echo >> {runs}; n=$(wc -l < {runs}); {chosen}; exit 99"
    command = [str(RESTART), "sh", "-c", program]
    found = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment(**settings))
    return found.returncode, len(runs.read_text().splitlines())


@pytest.mark.parametrize("code", [0, 2, 126, 127])
def test_codes_that_end(code: int, tmp_path: pathlib.Path) -> None:
    assert ends_with([code], tmp_path) == (code, 1)


def test_codes_that_restart(tmp_path: pathlib.Path) -> None:
    assert ends_with([75, 1, 75, 137, 0], tmp_path) == (0, 5)


def test_a_failure_after_restarts_ends(tmp_path: pathlib.Path) -> None:
    assert ends_with([1, 75, 2], tmp_path) == (2, 3)


def test_failures_in_a_row(tmp_path: pathlib.Path) -> None:
    assert ends_with([1] * 5, tmp_path, RESTART_LIMIT="3") == (1, 3)


def test_a_stop_is_not_a_failure(tmp_path: pathlib.Path) -> None:
    assert ends_with([75, 75, 75, 75, 0], tmp_path, RESTART_LIMIT="2") == (0, 5)


def test_long_runs_are_not_failures_in_a_row(tmp_path: pathlib.Path) -> None:
    assert ends_with([1, 1, 1, 1, 0], tmp_path, RESTART_LIMIT="2", RESTART_PROGRESS="0") == (0, 5)


def test_chosen_final_codes_and_the_result(tmp_path: pathlib.Path) -> None:
    result = tmp_path / "code"
    settings = {"RESTART_FINAL": "0 2 75", "RESTART_RESULT": str(result)}
    assert ends_with([1, 75], tmp_path, **settings) == (75, 2)
    assert result.read_text() == "75\n"


def test_pauses_grow(tmp_path: pathlib.Path) -> None:
    (tmp_path / "sleep").write_text("#!/bin/sh\n")
    (tmp_path / "sleep").chmod(0o755)
    settings = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "RESTART_PAUSE": "50"}
    program = f"echo >> {tmp_path}/runs; [ $(wc -l < {tmp_path}/runs) -lt 6 ] || exit 75; exit 1"
    command = [str(RESTART), "sh", "-c", program]
    found = subprocess.run(
        command, capture_output=True, text=True, timeout=60, env=environment(**settings, RESTART_FINAL="75")
    )
    pauses = [line.split()[-2] for line in found.stderr.splitlines()]
    assert found.returncode == 75
    assert pauses == ["50", "100", "200", "300", "300"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_signals_are_passed_on_and_end_it(number: signal.Signals, tmp_path: pathlib.Path) -> None:
    name = number.name.removeprefix("SIG")
    program = f"echo >> {tmp_path}/runs; trap 'echo saved; exit 75' {name}; echo ready; while :; do sleep 0.05; done"
    command = [*HEED_HANGUPS, str(RESTART), "sh", "-c", program]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment()) as loop:
        assert loop.stdout is not None
        assert loop.stdout.readline() == "ready\n"
        loop.send_signal(number)
        assert loop.stdout.readline() == "saved\n"
        assert loop.wait(30) == 75
    assert (tmp_path / "runs").read_text() == "\n"


def test_a_signal_in_a_pause() -> None:
    command = [str(RESTART), "sh", "-c", "exit 1"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment(RESTART_PAUSE="60")) as loop:
        assert loop.stderr is not None
        assert "again in 60 s" in loop.stderr.readline()
        loop.send_signal(signal.SIGTERM)
        assert loop.wait(30) == 75


def test_arguments_are_passed_as_they_are(tmp_path: pathlib.Path) -> None:
    found = subprocess.run([str(RESTART), "printf", "<%s>", "a b", "$c", ""], capture_output=True, text=True)
    assert found.stdout == "<a b><$c><>"


def test_usage() -> None:
    found = subprocess.run([str(RESTART)], capture_output=True, text=True)
    assert found.returncode == 2
    assert "launch/restart.sh COMMAND" in found.stderr
