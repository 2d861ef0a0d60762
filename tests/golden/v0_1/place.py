"""The folder in which the commands of make.py and tests/e2e/test_v0_1.py run, and what they compare.

Files, stores and models have relative names in it, since names are part of identities. It may be anywhere.
"""

import hashlib
import json
import pathlib
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tests.e2e.runs import PATIENCE, Run, environment
from tests.hub import LoopbackHub

HERE = pathlib.Path(__file__).parent
ROOT = HERE.parents[2]
TOKENIZER = "mixed/tokenizer/tokenizer.model"
# Exact for any program.
EXACT = ("step", "tokens", "stage", "seq_len", "batch_size", "fingerprint", "sources")
NUMBERS = ("loss", "ce_loss", "kd_loss", "learning_rate")
STORE = ("--config.data.mode=pretokenized", "--config.data.token_store=tokens")
SMOKE = f"{HERE / 'smoke.py'}"
_E2E = ROOT / "tests" / "e2e" / "configs"
_LIVE_TEACHER = ("--config.teacher.model=mixed", "--config.teacher.dtype=float32")

# Whole runs, by name: config, flags. `student` learns from the output of `teacher`.
WHOLE_RUNS: dict[str, tuple[str, tuple[str, ...]]] = {
    "tiny": (f"{_E2E / 'tiny.py'}:{TOKENIZER}", ()),
    "e2e_curriculum": (f"{_E2E / 'curriculum.py'}:{TOKENIZER}", ()),
    "epoch": (f"{_E2E / 'epoch.py'}:{TOKENIZER}", ()),
    "distill": (f"{_E2E / 'distill.py'}:{TOKENIZER}", _LIVE_TEACHER),
    "quickstart": (f"{SMOKE}:quickstart", ()),
    "curriculum": (f"{SMOKE}:curriculum", ()),
    "teacher": (f"{SMOKE}:teacher", ("--workdir=runs/distill_smoke-teacher",)),
    "student": (f"{SMOKE}:student", ()),
}


class Place:
    """Holds copies of `files/` and, by name, of `mixed` and `distilled` (work directories), `tokens`, `teacher`."""

    def __init__(self, folder: pathlib.Path, hub: LoopbackHub, *parts: str):
        self.folder = folder
        shutil.copytree(HERE / "files", folder, dirs_exist_ok=True)
        for part in parts:
            if (HERE / part).is_dir():
                shutil.copytree(HERE / part, folder / part)
            else:
                with tarfile.open(HERE / f"{part}.tar.xz") as archive:
                    archive.extractall(folder, filter="data")
        web = {f"data/{path.name}": path.read_bytes() for path in sorted((HERE / "hub").glob("*.parquet"))}
        # Its commit's name is a hash of the files, and part of the source's identity.
        hub.commit("golden/web", web)
        self.env = environment(hub.env())

    def popen(self, module: str, *flags: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", module, *flags],
            cwd=self.folder,
            env=self.env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            text=True,
        )

    def command(self, module: str, *flags: str) -> str:
        """Runs it to its end, with exit code 0, and returns its output."""
        with self.popen(module, *flags) as process:
            try:
                output, _ = process.communicate(timeout=PATIENCE)
            finally:
                process.kill()
        assert process.returncode == 0, f"exit code {process.returncode}:\n{output}"
        return output

    def train(self, spec: str, workdir: str, *flags: str) -> str:
        return self.command("jaxtrain.main", f"--config={spec}", f"--workdir={workdir}", *flags)

    def whole(self, name: str) -> "Run":
        """One of WHOLE_RUNS, from beginning to end."""
        spec, flags = WHOLE_RUNS[name]
        workdir = next((flag.removeprefix("--workdir=") for flag in flags if flag.startswith("--workdir=")), name)
        self.train(spec, workdir, *(flag for flag in flags if not flag.startswith("--workdir=")))
        return self.read(workdir)

    def read(self, workdir: str) -> Run:
        """The results of a run in its work directory."""
        return Run(self.folder / workdir, "", {})


def recorded(run: Run) -> dict[str, Any]:
    """What is kept of a run: one entry for each step, and for each evaluation."""
    return {
        "steps": [{key: line[key] for key in (*EXACT, *NUMBERS) if key in line} for line in run.steps()],
        "evaluations": [{key: line[key] for key in ("step", "eval_loss")} for line in run.evaluations()],
    }


def load(name: str) -> Any:
    return json.loads((HERE / "expected" / f"{name}.json").read_text())


def hashes(arrays: Mapping[str, np.ndarray]) -> dict[str, str]:
    """Hashes of bytes, dtype and shape."""
    return {
        name: hashlib.sha256(f"{array.dtype} {array.shape}".encode() + array.tobytes()).hexdigest()[:32]
        for name, array in sorted(arrays.items())
    }


def ledger_of(line: Mapping[str, Any], like: Mapping[str, Any]) -> dict[str, Any]:
    """A line's ledger with the entries of a recorded one: later versions may add some."""
    return {name: {key: line["sources"][name].get(key) for key in entry} for name, entry in like["sources"].items()}


def dump(path: pathlib.Path, entries: Mapping[str, Sequence[Any]]) -> None:
    """JSON with one line per entry of a list."""
    lists = [f"{json.dumps(key)}: [\n" + ",\n".join(map(json.dumps, items)) + "\n]" for key, items in entries.items()]
    path.write_text("{\n" + ",\n".join(lists) + "\n}\n")
