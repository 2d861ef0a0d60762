"""Compiles a program for accelerators up to its schedule, in a separate process that needs none.

XLA dumps the scheduled program and its memory before it generates machine code, which takes most of the time: for a 1B
step on TPUs 130 to 200 s of CPU, against 7 to 13 s until then (libtpu 0.0.42.1). No API stops there, so the process is
ended. Nothing is timed on a device, so a GPU's products are not autotuned.
"""

import dataclasses
import os
import pathlib
import pickle
import re
import subprocess
import sys
import tempfile
import time
from typing import Any

import jax

from jaxtrain.config import Config
from jaxtrain.cost import clusters
from jaxtrain.cost.clusters import Cluster
from jaxtrain.distill.teacher import bytes_per_device
from jaxtrain.trainer import state
from jaxtrain.trainer.programs import Key, lower
from jaxtrain.trainer.step import StepComponents, Variant, abstract_batch

_TEXTS = ("*.after_optimizations_after_buffer_assignment.txt", "*gpu_after_optimizations.txt")  # TPU, GPU
_MEMORY = "*after_optimizations-memory-usage-report.txt"
_JOB, _ERROR = "job", "error"
_POLL_SECONDS = 0.5


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Memory:
    """Bytes of a chip, as `executable.memory_analysis()` names them. Donated arrays count as arguments alone."""

    argument_size_in_bytes: int
    temp_size_in_bytes: int
    output_size_in_bytes: int = 0
    alias_size_in_bytes: int = 0


@dataclasses.dataclass(frozen=True)
class Scheduled:
    """What a tool asks of an executable, of a program that was compiled as far as its schedule."""

    text: str
    memory: _Memory

    def as_text(self) -> str:
        return self.text

    def memory_analysis(self) -> _Memory:
        return self.memory


@dataclasses.dataclass(frozen=True)
class Compiler:
    """Compiles programs of a config for a cluster, each once: (key, variant) → `Scheduled`."""

    config: Config
    cluster: Cluster
    vocab_size: int
    components: StepComponents
    compiled: dict[tuple[Key, Variant], Scheduled] = dataclasses.field(default_factory=dict)

    def __call__(self, key: Key, variant: Variant) -> Scheduled:
        """Compiles in a new process.

        Raises:
            jax.errors.JaxRuntimeError: the compiler's error, such as too little memory.
        """
        if (key, variant) not in self.compiled:
            self.compiled[key, variant] = self._compile(key, variant)
        return self.compiled[key, variant]

    def _compile(self, key: Key, variant: Variant) -> Scheduled:
        with tempfile.TemporaryDirectory() as folder:
            try:
                job = pickle.dumps((self.config, self.cluster, self.vocab_size, key, variant))
            except (pickle.PicklingError, AttributeError, TypeError) as error:
                raise jax.errors.JaxRuntimeError(f"another process cannot read the config: {error}") from error
            (pathlib.Path(folder) / _JOB).write_bytes(job)
            # Not multiprocessing, which would run a script without `if __name__ == "__main__"` again.
            environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
            process = subprocess.Popen([sys.executable, "-m", __name__, folder], env=environment)
            try:
                text, report = _wait(process, pathlib.Path(folder))
            finally:
                process.kill()
                process.wait()
        space = re.search(r"Total bytes: (\d+)", report)  # the first memory space is HBM
        held = self._held(key)
        total = int(space[1]) if space else held
        return Scheduled(text, _Memory(argument_size_in_bytes=held, temp_size_in_bytes=max(0, total - held)))

    def _held(self, key: Key) -> int:
        parts = self.components
        made: Any = state.abstract(parts.model, parts.optimizer, parts.mesh)
        batch = abstract_batch(parts.mesh, key.batch_size, key.seq_len, 0 if key.evaluates else parts.record_width)
        teacher = () if key.evaluates or parts.distilled is None else parts.distilled.abstract
        return bytes_per_device((made["params"] if key.evaluates else made, batch, teacher))


def _wait(process: Any, folder: pathlib.Path) -> tuple[str, str]:
    """Waits for the program's text and its memory report."""
    before = -1
    while True:
        alive = process.poll() is None
        texts, reports = [path for text in _TEXTS for path in folder.glob(text)], list(folder.glob(_MEMORY))
        size = texts[0].stat().st_size if texts and reports else -1
        if size > 0 and (size == before or not alive):
            return texts[0].read_text(), reports[0].read_text()
        before = size
        if not alive:
            error = folder / _ERROR
            raise jax.errors.JaxRuntimeError(error.read_text() if error.exists() else "the compiler's process died")
        time.sleep(_POLL_SECONDS)


def _compile(folder: str) -> None:
    from jaxtrain.trainer import offline, session  # which import this module

    clusters.prepare_environment()
    # Too late for the environment, and the run may hold the accelerator.
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_enable_compilation_cache", False)  # a hit would write no schedule
    config, cluster, vocab_size, key, variant = pickle.loads((pathlib.Path(folder) / _JOB).read_bytes())
    session.compiler_effort(cluster.chip.platform)
    mesh = config.mesh.build(clusters.devices(cluster))
    components = offline.components(config, vocab_size, mesh, None)
    options = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True, "xla_dump_hlo_module_re": "jit_(step|sums)"}
    try:
        lower(components, key, variant).compile(compiler_options=options)
    except jax.errors.JaxRuntimeError as error:
        (pathlib.Path(folder) / _ERROR).write_text(str(error))


if __name__ == "__main__":
    _compile(sys.argv[1])
