"""launch/local.sh, with processes that are not training runs."""

import pathlib
import signal
import subprocess
import sys
import time

LOCAL = pathlib.Path(__file__).parents[2] / "launch" / "local.sh"
INDEX = "import os, sys, time; i = int(os.environ['JAX_PROCESS_ID']); "


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(LOCAL), *arguments], capture_output=True, text=True, timeout=60)


def test_every_process_has_its_number() -> None:
    names = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
    # One write per line, so that lines of several processes do not mix.
    program = f"import os, sys; sys.stdout.write(' '.join(os.environ[name] for name in {names}) + chr(10))"
    found = run("3", sys.executable, "-c", program)
    addresses, counts, numbers = zip(*(line.split() for line in found.stdout.splitlines()), strict=True)
    assert found.returncode == 0
    assert len(set(addresses)) == 1
    assert set(counts) == {"3"}
    assert set(numbers) == {"0", "1", "2"}


def test_the_first_failure_gives_the_code() -> None:
    found = run("3", sys.executable, "-c", INDEX + "time.sleep(i); sys.exit([0, 75, 3][i])")
    assert found.returncode == 75


# In front of a command: the tests themselves may run under nohup, whose children ignore SIGHUP.
HEED_HANGUPS = [
    sys.executable,
    "-c",
    "import os, signal, sys; signal.signal(signal.SIGHUP, signal.SIG_DFL); os.execvp(sys.argv[1], sys.argv[1:])",
]


def test_signals_are_passed_on() -> None:
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        program = (
            "import signal, sys, time\n"
            f"signal.signal({number.value}, lambda *_: sys.exit(75))\n"
            "sys.stdout.write('ready\\n'), sys.stdout.flush()\n"
            "time.sleep(30)"
        )
        command = [*HEED_HANGUPS, str(LOCAL), "2", sys.executable, "-c", program]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as launcher:
            assert launcher.stdout is not None
            assert [launcher.stdout.readline() for _ in range(2)] == ["ready\n", "ready\n"]
            launcher.send_signal(number)
            started = time.monotonic()
            assert launcher.wait(30) == 75
            assert time.monotonic() - started < 10


def test_a_process_ended_by_a_signal() -> None:
    found = run("1", sys.executable, "-c", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    assert found.returncode == 128 + signal.SIGKILL


def test_usage() -> None:
    for arguments in ([], ["2"], ["x", "true"], ["0", "true"]):
        found = run(*arguments)
        assert found.returncode == 2
        assert "launch/local.sh N COMMAND" in found.stderr
    assert run("--help").returncode == 0
