"""What several commands share: flags and their meaning, tables, JSON results."""

import json
import os
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

from jaxtrain.cli.command import Flag, Flags
from jaxtrain.cli.redaction import redact
from jaxtrain.errors import UserError

WORKDIR = Flag(
    name="workdir",
    type=str | None,
    default=None,
    help="the run's work directory, for its checkpoints and its tokenizer, which is trained there if the config trains "
    "its own and none exists yet; runs/<config file>[-<arg>] by default",
)
WORKER = Flag(
    name="worker",
    type=str | None,
    default=None,
    help="I/N: this is worker I (from 0) of N workers that share the work; set by launch/local.sh, otherwise 0/1",
)
JSON = Flag(name="json", type=str | None, default=None, help="a file to write the result to, as JSON")
SLICES = Flag(name="slices", type=int, default=1, help="number of TPU slices of that shape")
VOCAB_SIZE = Flag(
    name="vocab_size",
    type=int | None,
    default=None,
    help="size of the vocabulary, if neither the config (tokenizer.vocab_size) nor a local file gives it",
)


def workdir_of(flags: Flags) -> str:
    """The work directory given by `--workdir` or the config's name. Keeps the Hub client's caches in it, but no login.

    Raises:
        UserError: `--workdir=` is empty.
    """
    if flags.workdir == "":
        raise UserError("--workdir= is empty: give a directory, or leave it out for runs/<config file>")
    workdir = flags.workdir or default_workdir(flags.config or "")
    if sys.stderr is None or not sys.stderr.isatty():  # their progress bars would fill the log with their states
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    if "HF_HOME" not in os.environ and "://" not in workdir:  # the Hub's client reads it at its import
        os.environ.setdefault("HF_TOKEN_PATH", os.path.expanduser("~/.cache/huggingface/token"))
        os.environ["HF_HOME"] = os.path.abspath(os.path.join(os.path.expanduser(workdir), "cache", "huggingface"))
    return workdir


def default_workdir(spec: str) -> str:
    """runs/<config file>[-<arg>], with the credentials and the query of a URL in the argument removed."""
    path, _, argument = spec.partition(":")
    name, argument = pathlib.PurePath(path).stem, redact(argument).partition("?")[0]
    return os.path.join("runs", f"{name}-{argument}".replace("/", "_") if argument else name)


def parse_worker(text: str | None) -> tuple[int, int]:
    """Parses `--worker`.

    Args:
        text: The flag's value, or None to use launch/local.sh's environment.

    Returns:
        (index of this worker, from 0; number of workers); (0, 1) if nothing sets them.

    Raises:
        UserError: The value is not I/N with 0 <= I < N.
    """
    if text is None:
        return int(os.environ.get("JAX_PROCESS_ID", "0")), int(os.environ.get("JAX_NUM_PROCESSES", "1"))
    first, slash, second = text.partition("/")
    if not (slash and first.isdecimal() and second.isdecimal() and int(first) < int(second)):
        raise UserError(f"--worker={text}: give I/N with I from 0 to N - 1, for example --worker=0/4")
    return int(first), int(second)


def write_json(path: str, result: Any) -> None:
    """Writes the result to the file given by `--json=FILE`. Raises UserError if it cannot be written."""
    try:
        pathlib.Path(path).write_text(json.dumps(result, indent=1) + "\n")
    except OSError as error:
        raise UserError(f"--json={path} cannot be written: {error}") from error


def size(count: float) -> str:
    """Bytes for people, in units of 1e9 or, below 10^8, of 1e6: "1.20 GB", "3.1 MB"."""
    return f"{count / 1e9:.2f} GB" if count >= 1e8 or not count else f"{count / 1e6:.3g} MB"


def table(rows: Sequence[tuple[str, ...]]) -> str:
    """Rows of cells as aligned columns, indented by two spaces."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )
