"""Output never ends a command: tested in a real interpreter, with every kind of failing output."""

import os
import pathlib
import pty
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]
SCRIPT = """
import sys, warnings
from jaxtrain import cli

def main(flags):
    for _ in range(2000):
        print("strasse: stra\u00dfe, \u4e2d\u6587", flush=True)
        print("x" * 100, file=sys.stderr)
    warnings.warn("ended")
    with open(flags.done, "w") as file, open(flags.done + "1", "w"), open(flags.done + "2", "w"):
        print("while files are open", flush=True)
        print("while files are open", file=sys.stderr, flush=True)
        file.write("done")

flag = cli.Flag(name="done", help="a file")
cli.run(main, cli.Command(name="x", description="x", examples=("x",), flags=(flag,), config="none"))
"""


def closed_pipe() -> int:
    reader, writer = os.pipe()
    os.close(reader)
    return writer


def closed_terminal() -> int:
    ours, theirs = pty.openpty()
    os.close(ours)
    return theirs


@pytest.mark.parametrize("make", [closed_pipe, closed_terminal, lambda: os.open("/dev/full", os.O_WRONLY)])
def test_nobody_reads(tmp_path, make):
    output = make()
    command = [sys.executable, "-c", SCRIPT, f"--done={tmp_path}/done"]
    code = subprocess.run(command, stdout=output, stderr=output, cwd=ROOT, check=False).returncode
    os.close(output)
    assert (code, (tmp_path / "done").read_text()) == (0, "done")


def test_closed_descriptors(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    command = ["sh", "-c", f"exec {sys.executable} {script} --done={tmp_path}/done <&- >&- 2>&-"]
    code = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=False).returncode
    assert (code, (tmp_path / "done").read_text()) == (0, "done")
    # No file took a closed descriptor, and with it the messages.
    assert (tmp_path / "done1").read_text() == (tmp_path / "done2").read_text() == ""


@pytest.mark.parametrize(("encoding", "shown"), [("ascii", b"stra\\xdfe"), ("latin-1", b"stra\xdfe, \\u4e2d")])
def test_an_encoding_without_the_character(tmp_path, encoding, shown):
    command = [sys.executable, "-c", SCRIPT, f"--done={tmp_path}/done"]
    variables = {**os.environ, "PYTHONIOENCODING": encoding}
    found = subprocess.run(command, capture_output=True, cwd=ROOT, env=variables, check=True)
    assert found.stdout.count(shown) == 2000
    assert (tmp_path / "done").exists()
