"""The executables of a run's stages: compiled ahead of time from shapes alone, the next one while this one trains.

In how many micro-batches a device takes its rows is found here, from the compiler's account of memory.
"""

import dataclasses
import logging
import math
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax

from jaxtrain.cost import memory
from jaxtrain.distributed import consensus, sharding
from jaxtrain.errors import UserError
from jaxtrain.plan import Plan
from jaxtrain.trainer.state import abstract
from jaxtrain.trainer.step import StepComponents, accumulation, lower_train_step

_Key = tuple[int, int]  # batch size, sequence length

logger = logging.getLogger("jaxtrain")


class DoesNotFitError(UserError):
    """A stage needs more memory than a device has, however small its micro-batches."""


@dataclasses.dataclass(frozen=True)
class Program:
    """An executable (state, batch, learning_rate, rows_before) → (state, metrics), and its micro-batches."""

    executable: Any
    micro_batches: int
    batch_size: int
    seq_len: int

    def describe(self, limit: int | None) -> str:
        rows, count = self.batch_size // self.micro_batches, self.micro_batches
        text = f"{count} micro-batch{'es' * (count > 1)} of {rows:,} x {self.seq_len:,} tokens"
        needed, arrays = memory.needed(self.executable), memory.held(self.executable)
        if needed is None or arrays is None:
            return text
        most = "" if limit is None else f" of {limit / 1e9:.3g}"
        return (
            f"{text}: {needed / 1e9:.3g}{most} GB a device (state and batch {arrays / 1e9:.3g}, temporary "
            f"{(needed - arrays) / 1e9:.3g})"
        )


class StagePrograms:
    """Executables of the train step by shape. Construction checks that every stage's batch can be shared by the mesh.

    Stages of one shape share an executable. They compile in threads; `get` and `settle` are for the main thread, on all
    processes at the same step.

    micro_batch_tokens: the most tokens that a device takes at once. limit: the most bytes that a step may take on a
    device; micro-batches get smaller until it fits. None: what micro_batch_tokens gives.
    """

    def __init__(self, parts: StepComponents, plan: Plan, micro_batch_tokens: int | None, limit: int | None = None):
        self._parts = parts
        self._stages = [stage for stage in plan.stages if stage.has_steps]
        self.limit = limit
        self._fewest = {
            (stage.batch_size, stage.seq_len): accumulation(
                parts.mesh, stage.batch_size, stage.seq_len, micro_batch_tokens
            )
            for stage in self._stages
        }
        self._compiling: dict[_Key, Future[Program]] = {}
        self._programs: dict[_Key, Program] = {}
        self._compiler = ThreadPoolExecutor(1, "jaxtrain-compile")
        self._lock = threading.Lock()

    @property
    def shapes(self) -> list[_Key]:
        """(batch size, sequence length) of all stages that have steps, each once."""
        return list(self._fewest)

    def begin(self, stage: int) -> None:
        """Begin to compile what the run needs before its first step, of the `stage`-th stage, without waiting."""
        self.start(stage)
        if self.limit is not None:
            self._begin(self._longest(stage))

    def start(self, stage: int) -> None:
        """Begin to compile the `stage`-th stage (1-based), without waiting. Does nothing past the last."""
        for found in self._stages:
            if found.index >= stage:
                self._begin((found.batch_size, found.seq_len))
                return

    def settle(self, stage: int) -> None:
        """Before the first step, of the `stage`-th stage: UserError if that stage or a later one cannot fit.

        Micro-batches may get as small as a row a device, so what cannot fit depends on the length of the rows: the
        longest are tried. Nothing is compiled for it where there is no limit.
        """
        if self.limit is not None:
            self.program(*self._longest(stage))

    def _longest(self, stage: int) -> _Key:
        seq_len, batch_size = max((s.seq_len, s.batch_size) for s in self._stages if s.index >= stage)
        return batch_size, seq_len

    def ready(self, batch_size: int, seq_len: int) -> bool:
        """Whether the executable is there already."""
        future = self._compiling.get((batch_size, seq_len))
        return future is not None and future.done()

    def get(self, batch_size: int, seq_len: int) -> Any:
        """The executable (state, batch, learning_rate, rows_before) → (state, metrics); waits for it."""
        return self.program(batch_size, seq_len).executable

    def program(self, batch_size: int, seq_len: int) -> Program:
        """As `get`. Raises UserError if it does not fit into the memory of a device."""
        key = (batch_size, seq_len)
        if key not in self._programs:
            self._programs[key] = self._agreed(key)
            logger.info("%s: %s", self._names(key), self._programs[key].describe(self.limit))
        return self._programs[key]

    def _agreed(self, key: _Key) -> Program:
        """The program that all processes take: the one that fits everywhere."""
        failure, program, count = None, None, self._candidates(key)[-1] + 1
        try:
            program = self._begin(key).result()
            count = program.micro_batches
        except UserError as error:
            failure = error
        most = consensus.largest(count)
        if most > self._candidates(key)[-1]:
            raise failure or UserError(
                f"{self._names(key)} does not fit into another process's device: see its message"
            )
        assert program is not None
        return program if most == count else self._compiler.submit(self._compile, key, most).result()

    def _begin(self, key: _Key) -> Future[Program]:
        with self._lock:
            if key not in self._compiling:
                self._compiling[key] = self._compiler.submit(self._fitting, key)
            return self._compiling[key]

    def _compile(self, key: _Key, micro_batches: int) -> Program:
        return Program(lower_train_step(self._parts, *key, micro_batches).compile(), micro_batches, *key)

    def _candidates(self, key: _Key) -> list[int]:
        """Numbers of micro-batches, ascending, that divide a device's rows, from what micro_batch_tokens gives."""
        mesh = self._parts.mesh
        rows = key[0] // (mesh.shape["data"] * mesh.shape["fsdp"])
        return [count for count in sharding.divisors(rows) if count >= self._fewest[key]]

    def _fitting(self, key: _Key) -> Program:
        """The program with the fewest micro-batches that fits. Raises UserError if none does."""
        counts = self._candidates(key)
        if self.limit is None:
            return self._compile(key, counts[0])
        tried: dict[int, Program] = {}
        said = ""

        def measure(count: int) -> int | None:
            nonlocal said
            try:
                tried[count] = self._compile(key, count)
            except jax.errors.JaxRuntimeError as error:
                if memory.is_exhausted(error):
                    said = memory.used(error)
                    return None
                raise
            # A compiler that does not say how much it needs has no limit either.
            return memory.needed(tried[count].executable) or 0

        count = memory.fewest(counts, measure, self.limit, lambda: self._at_least(tried))
        if count is None:
            raise DoesNotFitError(self._misfit(key, tried.get(counts[-1]), said))
        return tried[count]

    def _at_least(self, tried: dict[int, Program]) -> int:
        """Bytes that do not depend on micro-batches, estimated: the arrays, the gradients and the sum of them."""
        params = abstract(self._parts.model, self._parts.optimizer, self._parts.mesh)["params"]
        sizes = (
            math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(params)
        )
        return (memory.held(next(iter(tried.values())).executable) or 0) + 2 * sum(sizes)

    def _names(self, key: _Key) -> str:
        named = [f"{stage.index} ({stage.name})" for stage in self._stages if (stage.batch_size, stage.seq_len) == key]
        return f"Stage{'s' * (len(named) > 1)} {', '.join(named)}"

    def _misfit(self, key: _Key, smallest: Program | None, said: str) -> str:
        """said: what the compiler wrote of the memory, where it gave up."""
        assert self.limit is not None
        mesh = self._parts.mesh
        needs = f"more than the compiler could place{said}"
        if smallest is not None:
            needs = f"{(memory.needed(smallest.executable) or 0) / 1e9:.3g} GB"
        fixes = [*self._parts.model.memory_advice(), "a smaller model", "shorter rows (seq_len)"]
        fixes.append(f"more devices that share the state (mesh.fsdp, now {mesh.shape['fsdp']})")
        if mesh.devices.flat[0].platform == "gpu":
            fixes.append("a larger share for XLA (XLA_PYTHON_CLIENT_MEM_FRACTION=0.95; 0.75 unless set)")
        return (
            f"{self._names(key)} does not fit: with one row of {key[1]:,} tokens at a time a device needs {needs}, and "
            f"there are {self.limit / 1e9:.3g} GB (memory_gb, or what the device says less a reserve). What helps: "
            f"{', '.join(fixes)}."
        )
