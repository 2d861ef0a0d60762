import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from typing import Literal

import pytest

from jaxtrain import cli
from jaxtrain.errors import UserError

ROOT = Path(__file__).parents[2]

COMMAND = cli.Command(
    name="python -m tools.demo",
    description="Shows what a command looks like.",
    examples=("python -m tools.demo --config=configs/1b.py --steps=5",),
    flags=(
        cli.Flag(name="workdir", type=str | None, help="where files go", default=None),
        cli.Flag(name="steps", type=int, help="how many", default=10),
        cli.Flag(name="kind", type=Literal["data", "step"], help="what to measure", default="data"),
        cli.Flag(name="dry_run", type=bool, help="train nothing", default=False),
    ),
)
REPORT = cli.Command(
    name="python -m tools.report",
    description="Writes a report.",
    examples=("python -m tools.report runs/1b",),
    flags=(
        cli.Flag(name="kind", type=Literal["html", "text"], help="the form", positional=True),
        cli.Flag(name="runs", type=tuple[str, ...], help="work directories", positional=True),
        cli.Flag(name="output", help="the file"),
    ),
    config="none",
)


def test_flags_are_typed():
    flags = cli.parse_flags(
        COMMAND,
        [
            "--config=configs/1b.py:a",
            "--config.seed=1",
            "--workdir",
            "runs/x",
            "--dry_run",
            "--steps=1e3",
            "--kind=step",
        ],
    )
    assert (flags.config, flags.overrides) == ("configs/1b.py:a", ("--config.seed=1",))
    assert (flags.workdir, flags.dry_run, flags.steps, flags.kind) == ("runs/x", True, 1000, "step")
    flags = cli.parse_flags(COMMAND, ["--dry_run=false", "--config", "c.py"])
    assert (flags.config, flags.workdir, flags.dry_run, flags.steps) == ("c.py", None, False, 10)


def test_positional_values():
    flags = cli.parse_flags(REPORT, ["html", "--output=o", "a", "b"])
    assert (flags.kind, flags.runs, flags.output, flags.config) == ("html", ("a", "b"), "o", None)


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        ([], ["--config=FILE is missing", "for example: python -m tools.demo --config=configs/1b.py"]),
        (["--config=a.py", "--wrkdir=x"], ["no flag --wrkdir", "Did you mean --workdir?"]),
        (
            ["--config=a.py", "--zzz"],
            ["no flag --zzz", "It has --workdir, --steps, --kind, --dry_run, --config, --help."],
        ),
        (["--config=a.py", "--work=x"], ["no flag --work"]),  # no abbreviations
        (["--config=a.py", "--steps=0.5"], ["--steps=0.5: steps wants int, for example 1000"]),
        (["--config=a.py", "--kind=x"], ["data or step"]),
        (["--config=a.py", "--steps"], ["--steps has no value"]),
        (["--config", "--steps=1"], ["--config has no value"]),
        (["--config=a.py", "--dry_run=maybe"], ["dry_run wants bool"]),
        (["--config=a.py", "config.seed=5"], ["config.seed=5: not understood", "did you mean --config.seed=5?"]),
        (["--config=a.py", "seed=5"], ["seed=5: not understood", "did you mean --config.seed=5?"]),
        (["--config=a.py", "steps=5"], ["did you mean --steps=5?"]),
        (["--help=foo"], ["--help=foo: --help takes no value; with --config=FILE it lists the config's fields too"]),
        (["--config=a.py", "extra"], ["extra: not understood"]),
        (["--config=a.py", "-config.seed=5"], ["two dashes; did you mean --config.seed=5?"]),
        (["--config=a.py", "--config.seed", "5"], ["--config.seed: an override is written"]),
        (["--config=a.py", "--config=b.py"], ["--config=a.py and --config=b.py contradict", "quote the value"]),
        (["--config=a.py", "--max-samples=9"], ["Here that is --config.data.sources.NAME.max_samples=N."]),
        (["--config=a.py", "--optimizer.lr=9"], ["is set by --config.optimizer.lr=VALUE"]),
        (["--config=a.py", "--workdir", "a", __file__], ["quote a pattern"]),
        (["--config=a.py", "--dry_run", "--dry_run=false"], ["contradict"]),
    ],
)
def test_bad_usage(argv: list[str], parts: list[str]):
    with pytest.raises(UserError) as caught:
        cli.parse_flags(COMMAND, argv)
    for part in parts:
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("argv", "part"),
    [
        (["html", "a"], "--output is missing (the file), for example: python -m tools.report runs/1b"),
        (["--output=o"], "KIND is missing"),
        (["html", "--output=o"], "RUNS is missing"),
        (["pdf", "a", "--output=o"], "kind wants 'html' | 'text', for example html or text"),
        (["html", "a", "--output=o", "--config=x.py"], "no flag --config"),
        (["html", "a", "--output=o", "--config.seed=1"], "no flag --config.seed"),
    ],
)
def test_bad_usage_of_a_command_without_a_config(argv: list[str], part: str):
    with pytest.raises(UserError) as caught:
        cli.parse_flags(REPORT, argv)
    assert part in str(caught.value)


def test_help(capsys: pytest.CaptureFixture[str]):
    for argv in (["--help"], ["-h"], ["--workdir=x", "-h"]):
        with pytest.raises(SystemExit) as caught:
            cli.parse_flags(COMMAND, argv)
        assert caught.value.code == 0
        shown = capsys.readouterr().out
        for part in (
            "usage: python -m tools.demo --config=FILE[:ARG] [flags]",
            "Shows what a command looks like.",
            "  python -m tools.demo --config=configs/1b.py --steps=5",
            "how many (default: 10)",
            "--kind=data|step",
            "--workdir=WORKDIR  ",
            "--steps=N  ",
            "--dry_run ",
        ):
            assert part in shown
        assert "None" not in shown
    with pytest.raises(SystemExit):
        cli.parse_flags(REPORT, ["--help"])
    assert "usage: python -m tools.report KIND RUNS... --output=OUTPUT [flags]" in capsys.readouterr().out


def test_help_with_a_config_lists_its_fields(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "c.py").write_text("from tests.cli.example import *\ndef get_config():\n    return example_config()\n")
    secrets = ["--config.data.sources.web.token=hush", "--config.init_from=https://me:hush@host/x"]
    with pytest.raises(SystemExit):
        cli.parse_flags(COMMAND, [f"--config={tmp_path / 'c.py'}", "--config.seed=6", *secrets, "--help"])
    shown = capsys.readouterr().out
    assert "hush" not in shown
    lines = [" ".join(line.split()) for line in shown.splitlines()]
    for line in (
        "--config.seed int 6",
        "--config.total_tokens int | None null",
        '--config.init_from str | None "https://host/x"',
        '--config.data.sources.web.token str | None "(removed)"',
        "--config.optimizer.fallback.betas tuple[float, float] [0.9, 0.95]",
        "--config.data.sources.web.transforms[0].threshold int 3",
        "--config.data.sources[my.books].transforms tuple[Callable[[dict], dict | None], ...] []",
        "--config.stages[0].weights.web float 1",
        "--config.stages[1].weights dict[str, float] {}",
    ):
        assert line in lines


def run(argv: list[str], body: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    script = f"""
import sys
from jaxtrain import cli
from jaxtrain.errors import UserError
command = cli.Command(name="demo", description="d", examples=("demo",), config="optional")
def main(flags):
    {body}
cli.run(main, command, sys.argv[1:])
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    arguments = [sys.executable, "-c", script, *argv]
    return subprocess.run(arguments, cwd=cwd, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("argv", "body", "code", "error"),
    [
        ([], "return None", 0, ""),
        ([], "return 75", 75, ""),
        ([], "from absl import flags; return 0 if flags.FLAGS.is_parsed() else 3", 0, ""),  # for Grain's workers
        ([], "sys.exit(75)", 75, ""),
        (["--help"], "return 1", 0, ""),
        (["--nothing"], "return 0", 2, "error: --nothing: demo has no flag --nothing."),
        (["--config=none.py"], "flags.load_config()", 2, "error: --config=none.py: there is no file none.py"),
        ([], "raise UserError('fix it')", 2, "error: fix it\n"),
        ([], "e = UserError('fix it'); e.add_note('in a'); raise e", 2, "error: fix it\nin a\n"),
        ([], "raise ValueError('a fault')", 1, "ValueError: a fault\n"),
        ([], "open('/dev/null/x')", 2, "error: Not a directory: '/dev/null/x'. Check the path, its permissions"),
        ([], "raise OSError(28, 'No space left on device')", 2, "error: No space left on device. Check the path"),
        ([], "open('/dev/not there')", 1, "FileNotFoundError: "),  # may be a fault of ours
    ],
)
def test_exit_codes(tmp_path: Path, argv: list[str], body: str, code: int, error: str):
    done = run(argv, body, tmp_path)
    assert done.returncode == code
    assert error in done.stderr
    assert ("Traceback" in done.stderr) == (code == 1)


def test_nothing_slow_is_imported(tmp_path: Path):
    done = run([], "print(sorted({'jax', 'flax', 'datasets', 'tensorflow', 'numpy'} & set(sys.modules)))", tmp_path)
    assert done.stdout.strip() in ("[]", "['numpy']")  # interfaces.py names NumPy's arrays


def test_an_empty_hf_home_is_none(monkeypatch: pytest.MonkeyPatch):
    """The Hub's client would keep its files in the current directory."""
    monkeypatch.setenv("HF_HOME", "")
    assert cli.exit_code(lambda flags: int("HF_HOME" in os.environ), COMMAND, ["--config=a.py"]) == 0


@pytest.mark.parametrize(("resumes", "code"), [(True, 75), (False, 130)])
def test_ctrl_c_is_one_line(resumes: bool, code: int, capsys: pytest.CaptureFixture[str]):
    def stopped(flags: cli.Flags) -> None:
        raise KeyboardInterrupt

    command = dataclasses.replace(COMMAND, resumes=resumes)
    assert cli.exit_code(stopped, command, ["--config=a.py"]) == code
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("Stopped")
    assert ("to resume" in line) == resumes
