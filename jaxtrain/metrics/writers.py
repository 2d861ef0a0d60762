"""Where metrics and messages go: the terminal, log.txt, metrics.jsonl, TensorBoard, W&B or Trackio.

An object store cannot append. For a remote work directory the files are written to a local folder instead and copied
up whole when they have changed, once a minute and at the end: a kill loses at most the last minute of the log there.
"""

import contextlib
import importlib
import json
import logging
import math
import pathlib
import sys
import threading
import time
from collections.abc import Mapping
from typing import Any, Protocol

import tqdm
from etils import epath
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto import event_pb2, summary_pb2

from jaxtrain.checkpoint.workdir import Workdir, write_atomically
from jaxtrain.cli.redaction import redact
from jaxtrain.errors import UserError
from jaxtrain.interfaces import Json

_UPLOAD_SECONDS = 60.0
# Their classes are made at run time, unseen by type checkers.
_EVENT: Any = event_pb2
_SUMMARY: Any = summary_pb2

logger = logging.getLogger("jaxtrain")


class Writer(Protocol):
    """Takes the values of one step: finite numbers, strings, None, and nested mappings of them."""

    def write(self, step: int, values: Json) -> None: ...

    def close(self) -> None: ...


def finite(value: Any) -> Any:
    """The value with what is not a finite number as None, since JSON has no NaN."""
    if isinstance(value, Mapping):
        return {key: finite(entry) for key, entry in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


class JsonLines:
    """metrics.jsonl: one JSON object for each line, cut back at a resume to what belongs to the steps before it."""

    def __init__(self, path: epath.Path, start_step: int):
        """start_step: lines of later steps are dropped, and one that a kill cut short."""
        self.seconds = 0.0  # the time that the run has taken before, also in steps that were lost
        kept = []
        for line in path.read_text().splitlines() if path.exists() else []:
            try:
                values = json.loads(line)
            except ValueError:
                continue
            if not isinstance(values, dict) or "step" not in values:
                continue
            self.seconds = max(self.seconds, values.get("time") or 0.0)
            if values["step"] <= start_step:
                kept.append(line + "\n")
        write_atomically(path, "".join(kept))
        # Open as long as the run, and unbuffered: where the disk is full nothing is left for `close` to write.
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115

    def write(self, step: int, values: Json) -> None:
        # One write call for each line, so that a reader of the file sees whole lines.
        self._file.write((json.dumps({"step": step, **values}, allow_nan=False) + "\n").encode())

    def close(self) -> None:
        self._file.close()


class TensorBoard:
    """The same scalars; nested ones as `sources/web/tokens`."""

    def __init__(self, folder: epath.Path, start_step: int):
        # Not a SummaryWriter: its thread ends silently where the disk is full, and then its queue is never emptied.
        folder.mkdir(parents=True, exist_ok=True)
        self._events = EventsWriter(str(folder / "events"))
        # Hides what an earlier process wrote after the restored step.
        begin = _EVENT.SessionLog(status=_EVENT.SessionLog.START)
        self._events.write_event(_EVENT.Event(wall_time=time.time(), step=start_step + 1, session_log=begin))

    def write(self, step: int, values: Json) -> None:
        found = [_SUMMARY.Summary.Value(tag=name, simple_value=value) for name, value in scalars(values).items()]
        summary = _SUMMARY.Summary(value=found)
        self._events.write_event(_EVENT.Event(wall_time=time.time(), step=step, summary=summary))
        self._events.flush()

    def close(self) -> None:
        with contextlib.suppress(OSError):  # a full disk was told when it was written to
            self._events.close()


class Tracker:
    """Weights & Biases or Trackio: both have `init`, `log` and `finish`."""

    def __init__(self, module: str, project: str, run: str, config: Json):
        try:
            self._module = importlib.import_module(module)
        except ImportError as error:
            raise UserError(f"trackers=({module!r},): the package is not installed; pip install {module}.") from error
        self._module.init(project=project, name=run, config=config, resume="allow")

    def write(self, step: int, values: Json) -> None:
        self._module.log(scalars(values), step=step)

    def close(self) -> None:
        self._module.finish()


def scalars(values: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """The numbers of nested values, by path."""
    flat: dict[str, float] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= scalars(value, f"{prefix}{key}/")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            flat[prefix + key] = value
    return flat


class Console(logging.Handler):
    """Prints the messages of the logger `jaxtrain`; on a terminal above a live progress bar with the time left.

    Only the coordinating process prints all; the others print warnings, with their number.

    Attributes:
        started_at: when it was made (`time.monotonic`), for the program's start.
        before_log_file: what was printed so far, kept until log.txt can be opened; None from then on.
    """

    def __init__(self, process: int):
        super().__init__(logging.INFO if process == 0 else logging.WARNING)
        self.before_log_file: list[logging.LogRecord] | None = []
        self.started_at = time.monotonic()
        self._process = process
        self._bar: tqdm.tqdm | None = None
        self.setFormatter(_Formatter())

    def start_bar(self, tokens: int, total_tokens: int | None) -> None:
        """Shows progress from `tokens` on, if this process prints and its output is a terminal."""
        if self._process == 0 and sys.stdout.isatty():
            self._bar = tqdm.tqdm(
                initial=tokens, total=total_tokens, unit="tok", unit_scale=True, dynamic_ncols=True, file=sys.stdout
            )

    def advance(self, tokens: int, loss: float | None = None) -> None:
        """tokens: trained so far; loss: the last one known."""
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
        if self._bar is None:
            print(text, flush=True)
        else:
            self._bar.write(text, file=sys.stdout)

    def stop_bar(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None


class _Formatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        text = redact(super().format(record))
        return text if record.levelno <= logging.INFO else f"{record.levelname}: {text}"


class _LogFile(logging.FileHandler):
    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - logging's name
        """What the disk has no room for is on the console, and metrics.jsonl ends the run with a message."""

    def close(self) -> None:
        with contextlib.suppress(OSError):
            super().close()


def log_file(path: epath.Path) -> logging.Handler:
    """log.txt: what the console shows, over all restarts."""
    handler = _LogFile(path, mode="a")
    handler.setFormatter(_Formatter())
    return handler


class Mirror:
    """The folder that the writers use: the work directory itself, or for a remote one a local copy of it."""

    def __init__(self, workdir: Workdir):
        self._remote = None if workdir.is_local else workdir.path
        self.folder = workdir.path if workdir.is_local else workdir.cache / "mirror"
        self._uploaded: dict[str, float] = {}
        self._stop = threading.Event()
        if self._remote is None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        for name in (workdir.metrics.name, workdir.log.name):
            remote = self._remote / name
            (self.folder / name).write_text(remote.read_text() if remote.exists() else "")
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
            except Exception as error:  # clients of buckets have errors of their own
                logger.warning("%s could not be copied to %s: %s", path, self._remote, error)
            else:
                self._uploaded[name] = min(changed, started)

    def close(self) -> None:
        if self._remote is not None:
            self._stop.set()
            self._thread.join()
            self._upload()
