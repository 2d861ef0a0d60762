"""Whole runs as a user starts them: processes of `python -m jaxtrain.main` and their work directories."""

import contextlib
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

ROOT = pathlib.Path(__file__).parents[2]
LOCAL = ROOT / "launch" / "local.sh"
COMPILED = "JAX_COMPILATION_CACHE_DIR"
OF_ALL_RUNS: dict[str, str] = {}  # conftest.py sets the folder for compiled programs, shared by all runs of a session
ONE_COMPILER = "tests.e2e.one_compiler"
TINY = "tests/e2e/configs/tiny.py"
STOPPED = 75
PATIENCE = 540.0  # seconds a run may take on a busy machine

# Keys in which two equal runs may differ.
_TIMES = ("tokens_per_sec", "mfu", "data_wait", "time", "goodput", "seconds", "memory_gb", "disk_cache_gb")


def environment(hub: dict[str, str], devices: int = 1, **more: str) -> dict[str, str]:
    """The environment of a run's processes: `devices` simulated devices each, and none of the test's JAX settings."""
    # Without bytecode files, every process would spend 5 s compiling the modules it imports.
    dropped = ("JAX_", "XLA_", "HF_", "PYTHONDONTWRITEBYTECODE")
    kept = {name: text for name, text in os.environ.items() if not name.startswith(dropped)}
    flags = f"--xla_force_host_platform_device_count={devices}"
    return {**kept, **OF_ALL_RUNS, **hub, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "PYTHONPATH": str(ROOT), **more}


class Run:
    """A work directory and, one at a time, a process (or a launcher of several) that trains in it."""

    def __init__(self, workdir: pathlib.Path, spec: str, env: dict[str, str], processes: int = 1):
        self.workdir = workdir
        self.spec = spec
        self.env = env
        self.processes = processes
        self.module = "jaxtrain.main" if processes == 1 else ONE_COMPILER
        self.process: subprocess.Popen[str] | None = None
        self.output = ""  # stdout and stderr of the process that ended last
        self.output_file = workdir.with_name(workdir.name + ".out")

    def start(self, *flags: str) -> "Run":
        command = [sys.executable, "-m", self.module, f"--config={self.spec}", f"--workdir={self.workdir}", *flags]
        if self.processes > 1:
            command = [str(LOCAL), str(self.processes), *command]
        with open(self.output_file, "w") as out:
            self.process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=self.env,
                stdout=out,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                text=True,
                start_new_session=True,
            )
        return self

    def wait(self, seconds: float = PATIENCE) -> int:
        """Waits for the run, ends any process left over, and returns the exit code."""
        assert self.process is not None
        try:
            return self.process.wait(seconds)
        finally:
            self.kill()

    def __call__(self, *flags: str, code: int | None = 0) -> "Run":
        """Runs to the end and checks the exit code (None accepts any)."""
        found = self.start(*flags).wait()
        assert code in (None, found), f"exit code {found}, not {code}:\n{self.output}"
        return self

    def signal(self, number: int) -> None:
        assert self.process is not None
        self.process.send_signal(number)

    def takes_sigterm(self) -> bool:
        """Whether the process has installed its SIGTERM handler."""
        assert self.process is not None
        status = pathlib.Path(f"/proc/{self.process.pid}/status").read_text()
        caught = next(line for line in status.splitlines() if line.startswith("SigCgt"))
        return bool(int(caught.split()[1], 16) >> (signal.SIGTERM - 1) & 1)

    def kill(self) -> None:
        """Sends SIGKILL to all processes of the run at once."""
        assert self.process is not None
        if self.process.poll() is None:
            for pid in [*_children(self.process.pid), self.process.pid]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        self.process.wait()
        self.output = self.output_file.read_text()

    def kill_one(self) -> None:
        """Sends SIGKILL to the last of several processes."""
        self.signal_one(signal.SIGKILL)

    def signal_one(self, number: int) -> None:
        """Sends a signal to the last of several processes, or to the only one."""
        assert self.process is not None
        os.kill(_children(self.process.pid)[-1] if self.processes > 1 else self.process.pid, number)

    def wait_until(self, condition: Callable[[], object], seconds: float = PATIENCE) -> bool:
        """Waits for the condition or the end of the process. Returns whether the process is still running."""
        assert self.process is not None
        deadline = time.monotonic() + seconds
        while self.process.poll() is None:
            if condition():
                return True
            assert time.monotonic() < deadline, self.output_file.read_text()
            time.sleep(0.01)
        return False

    def wait_for_step(self, step: int) -> bool:
        return self.wait_until(lambda: self.last_step() >= step)

    def stands_still(self, seconds: float) -> bool:
        """Whether metrics.jsonl has not grown for `seconds`, by its modification time."""
        return time.time() - (self.workdir / "metrics.jsonl").stat().st_mtime > seconds

    def last_step(self) -> int:
        """The last step in metrics.jsonl now; 0 if there is none."""
        lines = self._lines()
        return lines[-1]["step"] if lines else 0

    def _lines(self) -> list[dict[str, Any]]:
        path = self.workdir / "metrics.jsonl"
        text = path.read_text() if path.exists() else ""
        return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]

    def steps(self) -> list[dict[str, Any]]:
        """The steps' lines of metrics.jsonl, with all their keys."""
        return [line for line in self._lines() if "loss" in line]

    def evaluations(self) -> list[dict[str, Any]]:
        return [line for line in self._lines() if "eval_loss" in line]

    def checkpoints(self) -> list[int]:
        folder = self.workdir / "checkpoints"
        return sorted(int(path.name) for path in folder.iterdir() if path.name.isdecimal()) if folder.exists() else []

    def state(self, step: int | None = None) -> dict[str, np.ndarray]:
        """Every array of a checkpoint (by default the newest), by path."""
        folder = self.workdir / "checkpoints" / str(self.checkpoints()[-1] if step is None else step)
        arrays: dict[str, np.ndarray] = {}
        for item in ("params", "opt", "meta"):
            with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as reader:
                leaves, _ = jax.tree_util.tree_flatten_with_path(reader.restore(folder / item))
            arrays |= {item + jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}
        return arrays

    def data_state(self, step: int | None = None) -> dict[str, Any]:
        folder = self.workdir / "checkpoints" / str(self.checkpoints()[-1] if step is None else step)
        return json.loads((folder / "data" / "metadata").read_text())


def _children(pid: int) -> list[int]:
    return [int(child) for child in pathlib.Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def comparable(lines: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Lines of metrics.jsonl without the keys that depend on the clock."""
    return [{key: value for key, value in line.items() if key not in _TIMES} for line in lines]


def assert_equal(run: Run, reference: Run) -> None:
    """Asserts the same steps, each once, with the same numbers, final state and data cursors. All bit for bit.

    JSON numbers are exact: Python writes the shortest decimal that reads back as the same float.
    """
    assert comparable(run.steps()) == comparable(reference.steps())
    assert comparable(run.evaluations()) == comparable(reference.evaluations())
    assert run.checkpoints()[-1] == reference.checkpoints()[-1]
    mine, theirs = run.state(), reference.state()
    assert mine.keys() == theirs.keys()
    different = [name for name in mine if mine[name].tobytes() != theirs[name].tobytes()]
    assert not different
    assert run.data_state()["lanes"] == reference.data_state()["lanes"]


def documents(seed: int, count: int, words: int = 30) -> list[str]:
    """Random texts of about `words` words, some of them empty, one very long."""
    rng = random.Random(seed)
    vocabulary = ["".join(rng.choices("etaoinshrdlu", k=rng.randint(1, 7))) for _ in range(200)]
    lengths = [0 if rng.random() < 0.03 else rng.randint(1, 2 * words) for _ in range(count)]
    lengths[count // 2] = 20 * words
    return [" ".join(rng.choices(vocabulary, k=length)) for length in lengths]
