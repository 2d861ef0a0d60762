"""Outputs for metrics and messages: the terminal, log.txt, metrics.jsonl, TensorBoard, W&B and Trackio.

Object stores cannot append. For a remote work directory the files are written to a local folder, and changed files are
uploaded whole every minute and at the end. A kill loses at most the last minute of the remote log.
"""

import contextlib
import importlib
import json
import logging
import math
import pathlib
import re
import secrets
import sys
import threading
import time
from collections.abc import Mapping
from typing import Any, Protocol

import tqdm
from etils import epath

from jaxtrain.checkpoint.workdir import Workdir, write_atomically
from jaxtrain.cli.redaction import redact
from jaxtrain.errors import UserError
from jaxtrain.interfaces import Json
from jaxtrain.metrics.events import EventFile

_UPLOAD_SECONDS = 60.0

# TensorBoard groups charts by what comes before a slash. The group of all others, a model's own too, is "train".
_GROUPS = {
    "speed": ("tokens_per_sec", "mfu", "data_wait", "goodput", "time", "memory_gb", "disk_cache_gb"),
    "data": ("tokens", "stage", "seq_len", "batch_size"),
}

logger = logging.getLogger("jaxtrain")


class Writer(Protocol):
    """Writes the values of one step: finite numbers, strings, None, and nested mappings of these."""

    def write(self, step: int, values: Json) -> None: ...

    def close(self) -> None: ...


def finite(value: Any) -> Any:
    """Replaces non-finite numbers in a nested value with None: JSON has no NaN."""
    if isinstance(value, Mapping):
        return {key: finite(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class JsonLines:
    """metrics.jsonl: one JSON object per line, truncated on resume to the steps up to the checkpoint.

    Attributes:
        seconds: Time the run has taken so far, including lost steps.
        last_step: The last step of the lines found, including lost steps.
    """

    def __init__(self, path: epath.Path, start_step: int):
        """Removes lines of later steps, and lines left unreadable by a kill or a damaged disk."""
        self.seconds, self.last_step = 0.0, 0
        kept, dropped = [], 0
        lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
        for line in lines:
            try:
                values = json.loads(line)
                step, seconds = int(values["step"]), float(values.get("time") or 0.0)
            except (ValueError, OverflowError, TypeError, LookupError, AttributeError):
                dropped += 1
                continue
            self.seconds, self.last_step = max(self.seconds, seconds), max(self.last_step, step)
            if step <= start_step:
                kept.append(line.removesuffix(b"\n") + b"\n")
        if dropped:
            logger.warning("%d unreadable line(s) of %s were dropped.", dropped, path)
        write_atomically(path, b"".join(kept))
        # Open for the whole run, and unbuffered, so that on a full disk `close` has nothing left to write.
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115

    def write(self, step: int, values: Json) -> None:
        # One call per line, so that readers of the file see whole lines.
        self._file.write((json.dumps({"step": step, **values}, allow_nan=False) + "\n").encode())

    def close(self) -> None:
        self._file.close()


class TensorBoard:
    """TensorBoard event files: scalars in groups (`train/loss`, `sources/web/tokens`), and samples as texts."""

    def __init__(self, folder: epath.Path, start_step: int):
        folder.mkdir(parents=True, exist_ok=True)
        self._events = EventFile(pathlib.Path(folder), start_step + 1)

    def write(self, step: int, values: Json) -> None:
        # Markdown would join lines and hide what looks like markup.
        texts = {
            f"samples/{number}": "\n".join(f"    {line}" for line in f"{prompt}{text}".splitlines())
            for number, (prompt, text) in enumerate(values.get("samples", {}).items())
        }
        self._events.write(step, {_tag(name): float(value) for name, value in scalars(values).items()}, texts)

    def close(self) -> None:
        self._events.close()


def _tag(name: str) -> str:
    """The name of a scalar in TensorBoard."""
    if "/" in name:
        return name
    group = next((group for group, names in _GROUPS.items() if name in names), "train")
    return name.replace("eval_", "eval/") if name.startswith("eval_") else f"{group}/{name}"


class Tracker:
    """Weights & Biases or Trackio, which both have `init`, `log` and `finish`. Their exceptions never end the run."""

    def __init__(self, module: str, project: str, workdir: Workdir, config: Json, last_step: int = 0):
        """Continues the work directory's run in the tracker, if there is one.

        Args:
            module: "wandb" or "trackio".
            project: Its project.
            workdir: The run's work directory.
            config: The run's config.
            last_step: The last step that the run logged. Steps before it are trained again after a kill, bit for bit,
                and not logged again: curves would go back.

        Raises:
            UserError: The package is not installed.
        """
        try:
            self._module = importlib.import_module(module)
        except ImportError as error:
            raise UserError(f"trackers=({module!r},): the package is not installed; pip install {module}.") from error
        self._name, self._project, self._last_step, self._failed = module, project, last_step, False
        # Trackio continues a run by name, W&B by an id that is kept in the work directory.
        run = {}
        if module == "wandb":
            kept = workdir.wandb_id.read_bytes().decode("ascii", "replace").strip() if workdir.wandb_id.exists() else ""
            run = {"id": kept if re.fullmatch(r"[\w-]+", kept, re.ASCII) else secrets.token_hex(4)}
            write_atomically(workdir.wandb_id, run["id"] + "\n")
        public = {key: value for key, value in config.items() if not key.startswith("_")}  # Trackio refuses the others
        self._call("init", project=project, name=workdir.path.name, config=public, resume="allow", **run)
        if module == "wandb":
            # The server may lack lines of a killed process that the run had logged. 0: offline, or a new run.
            self._last_step = getattr(getattr(self._module, "run", None), "starting_step", 0) or last_step

    def write(self, step: int, values: Json) -> None:
        if step < self._last_step:
            return
        named = scalars(values)
        if self._name == "trackio" and "time" in named:
            named["run_time"] = named.pop("time")  # Trackio has a time of its own
        self._call("log", named, step=step)

    def attach(self, path: epath.Path) -> None:
        """Adds a local file to the run (W&B), or to its project under the file's path (Trackio)."""
        if self._name == "wandb":
            self._call("save", str(path), base_path=str(path.parent), policy="now")
        else:
            self._call("save", str(path), project=self._project)

    def close(self) -> None:
        self._call("finish")

    def _call(self, function: str, *args: Any, **kwargs: Any) -> None:
        try:
            getattr(self._module, function)(*args, **kwargs)
        except Exception as error:
            if not self._failed:
                problem = f"{type(error).__name__}: {error}"
                logger.warning("%s.%s failed, the run continues: %s. Reported once.", self._name, function, problem)
            self._failed = True


def scalars(values: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """Flattens nested values to numbers by path."""
    flat: dict[str, float] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= scalars(value, f"{prefix}{key}/")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            flat[prefix + key] = value
    return flat


class Console(logging.Handler):
    """Prints the messages of the logger `jaxtrain`; on a terminal above a progress bar with the remaining time.

    Process 0 prints all messages; the others print warnings, with their process index.

    Attributes:
        started_at: Time of creation (`time.monotonic`), used as the program's start.
        before_log_file: Messages printed before log.txt is open; None afterwards.
    """

    def __init__(self, process: int):
        super().__init__(logging.INFO if process == 0 else logging.WARNING)
        self.before_log_file: list[logging.LogRecord] | None = []
        self.started_at = time.monotonic()
        self._process = process
        self._bar: tqdm.tqdm | None = None
        self.setFormatter(_Formatter())

    def begin_again(self) -> None:
        """Call it before another monitor is built: messages until then reach its log.txt, and time starts anew."""
        self.before_log_file, self.started_at = [], time.monotonic()

    def start_bar(self, tokens: int, total_tokens: int | None) -> None:
        """Shows a progress bar starting at `tokens`, if this process prints and its output is a terminal."""
        if self._process == 0 and sys.stdout is not None and sys.stdout.isatty():
            self._bar = tqdm.tqdm(
                initial=tokens, total=total_tokens, unit="tok", unit_scale=True, dynamic_ncols=True, file=sys.stdout
            )

    def advance(self, tokens: int, loss: float | None = None) -> None:
        """Moves the bar to the tokens trained so far and shows the latest loss."""
        if self._bar is not None:
            if loss is not None:
                self._bar.set_postfix_str(f"Loss={loss:.4f}", refresh=False)
            self._bar.update(tokens - self._bar.n)

    def emit(self, record: logging.LogRecord) -> None:
        if self.before_log_file is not None:
            self.before_log_file.append(record)
        text = self.format(record)
        if self._process:
            text = f"[process {self._process}] {text}"
        # Output must never end a run. Our commands' stdout never raises (cli/output.py); other programs' may.
        with contextlib.suppress(OSError, ValueError):
            if self._bar is None:
                print(text, flush=True)
            else:
                self._bar.write(text, file=sys.stdout)

    def stop_bar(self) -> None:
        """Removes the progress bar, if there is one."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None


class _Formatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        text = redact(super().format(record))
        return text if record.levelno <= logging.INFO else f"{record.levelname}: {text}"


class _LogFile(logging.FileHandler):
    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - logging's name
        """Ignores a full disk: the console has the line, and writing metrics.jsonl ends the run with a message."""

    def close(self) -> None:
        with contextlib.suppress(OSError):
            super().close()


def log_file(path: epath.Path) -> logging.Handler:
    """Returns a handler for log.txt, which has the console's messages across restarts."""
    # Whatever the locale; a path may hold bytes that no encoding has.
    handler = _LogFile(path, mode="a", encoding="utf-8", errors="backslashreplace")
    handler.setFormatter(_Formatter())
    return handler


class Mirror:
    """The folder that the writers use: the work directory, or a local copy of a remote one."""

    def __init__(self, workdir: Workdir):
        self._remote = None if workdir.is_local else workdir.path
        self.folder = workdir.path if workdir.is_local else workdir.cache / "mirror"
        self._uploaded: dict[str, float] = {}
        self._stop = threading.Event()
        if self._remote is None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        for name in (workdir.metrics.name, workdir.log.name, workdir.spikes.name):
            remote = self._remote / name
            (self.folder / name).write_bytes(remote.read_bytes() if remote.exists() else b"")
        self._thread = threading.Thread(target=self._run, name="upload of logs", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._stop.wait(_UPLOAD_SECONDS):
            self._upload()

    def _upload(self) -> None:
        assert self._remote is not None
        for path in pathlib.Path(self.folder).rglob("*"):
            name = str(path.relative_to(self.folder))
            changed = path.stat().st_mtime
            if path.is_dir() or self._uploaded.get(name, 0.0) >= changed:
                continue
            started = time.time()
            try:
                (self._remote / name).parent.mkdir(parents=True, exist_ok=True)
                (self._remote / name).write_bytes(path.read_bytes())
            except Exception as error:  # bucket clients raise their own errors
                logger.warning("%s could not be copied to %s: %s", path, self._remote, error)
            else:
                self._uploaded[name] = min(changed, started)

    def close(self) -> None:
        """Uploads the last changes of a remote work directory."""
        if self._remote is not None:
            self._stop.set()
            self._thread.join()
            self._upload()
