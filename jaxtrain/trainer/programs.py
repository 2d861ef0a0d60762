"""The run's executables: one per stage shape, one for evaluation and one for tasks, compiled ahead of time.

While a stage trains, the next one compiles (on GPUs all do before the first step). Of the variants that tuning.py
prefers, the first that fits is taken, by the memory that the compiler reports; if none does, or none is given, the
fewest micro-batches that fit.
"""

import contextlib
import dataclasses
import logging
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np

from jaxtrain.cost import memory
from jaxtrain.distributed import consensus, sharding
from jaxtrain.errors import UserError
from jaxtrain.plan import Plan
from jaxtrain.plan.plan import StagePlan
from jaxtrain.trainer.evaluate import lower_eval_step
from jaxtrain.trainer.step import StepComponents, Variant, accumulation, lower_train_step
from jaxtrain.trainer.tasks import lower_task_step

logger = logging.getLogger("jaxtrain")


class DoesNotFitError(UserError):
    """A stage needs more memory than a device has, even with the smallest micro-batches."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Choice:
    """How the step of a batch shape is to be computed: a function of the config and the hardware, kept by tuning.py.

    Attributes:
        variants: In the order of preference; the first that fits is taken.
        later: The variant that is taken from `from_step` on, because it takes minutes to compile.
        from_step: The first step of `later`, fixed before the run's first step, so that kills and resumes change
            nothing.
        why: The reasons, in a line.
    """

    variants: tuple[Variant, ...]
    later: Variant | None = None
    from_step: int | None = None
    why: str = ""


@dataclasses.dataclass(frozen=True)
class Program:
    """An executable and its micro-batches.

    Attributes:
        executable: (state, batch, learning_rate, rows_before[, teaching]) → (state, metrics), or for evaluation
            (params, batch, token_bytes) → sums, or for tasks (params, batch) → scores.
        variant: how it computes the step.
        rank: its place in the order of preference, from 0.
        extra: bytes in use on a device that are not its arguments.
    """

    executable: Any
    variant: Variant
    batch_size: int
    seq_len: int
    rank: int = 0
    extra: int = 0

    @property
    def micro_batches(self) -> int:
        return self.variant.micro_batches

    def describe(self, limit: int | None) -> str:
        """Describes micro-batches and memory in one line. `limit` is in bytes."""
        rows, count = self.batch_size // self.micro_batches, self.micro_batches
        text = f"{count} micro-batch{'es' * (count > 1)} of {rows:,} x {self.seq_len:,} tokens"
        needed, held = memory.needed(self.executable), memory.held(self.executable)
        how = f"; {self.variant.how}" if self.variant.how else ""
        if needed is None or held is None:
            return text + how
        most = "" if limit is None else f" of {limit / 1e9:.3g}"
        return (
            f"{text}: {(needed + self.extra) / 1e9:.3g}{most} GB per device (state and batch "
            f"{(held + self.extra) / 1e9:.3g}, temporary {(needed - held) / 1e9:.3g}){how}"
        )


@dataclasses.dataclass(frozen=True)
class Key:
    """A program of a run: of a train step's shape, or of the evaluation.

    Attributes:
        evaluates: for an evaluation: held-out loss, or tasks.
        asks: for tasks.
        later: the program that replaces that of the first steps.
        crowded: for batches with more documents than the model's attention kernel takes.
    """

    batch_size: int
    seq_len: int
    evaluates: bool = False
    asks: bool = False
    later: bool = False
    crowded: bool = False


def lower(components: StepComponents, key: Key, variant: Variant) -> Any:
    """Traces a program; `.compile()` returns the executable."""
    lower_one = lower_task_step if key.asks else lower_eval_step if key.evaluates else lower_train_step
    components = components.arranged(variant)
    components = components.unbounded() if key.crowded else components
    return lower_one(components, key.batch_size, key.seq_len, variant.micro_batches)


class StagePrograms:
    """Executables by shape; stages of one shape share one.

    They compile in a thread. Call `get`, `program`, `evaluation`, `tasks` and `settle` from the main thread, on all
    processes at the same step: processes agree on the number of micro-batches.

    Args:
        components: the components of a step.
        plan: the plan whose stages are compiled; None to compile only the evaluation.
        micro_batch_tokens: maximum tokens per device in a micro-batch; None for no maximum.
        limit: bytes that a step may use on a device; micro-batches shrink until it fits. None for no limit.
        evaluation: the evaluation's stage; None without evaluation.
        extra: bytes that training keeps on a device during an evaluation, besides the parameters.
        compile: (key, variant) → executable; by default `lower` and XLA.
        choices: how to compute the step, by (batch size, sequence length); without one, as the config says, in the
            fewest micro-batches that fit.

    Raises:
        UserError: the mesh does not divide a stage's batch.
    """

    def __init__(
        self,
        components: StepComponents,
        plan: Plan | None,
        micro_batch_tokens: int | None,
        limit: int | None = None,
        evaluation: StagePlan | None = None,
        extra: int = 0,
        compile: Callable[[Key, Variant], Any] | None = None,
        choices: Mapping[tuple[int, int], Choice] | None = None,
    ):
        self.limit = limit
        self._components = components
        self._extra = extra
        self._compile = compile or (lambda key, variant: lower(components, key, variant).compile())
        self._choices = choices or {}
        self._stages = [] if plan is None else [stage for stage in plan.stages if stage.has_steps]
        self._evaluation = evaluation and Key(evaluation.batch_size, evaluation.seq_len, evaluates=True)
        self._tasks: Key | None = None
        self._micro_batch_tokens = micro_batch_tokens
        self._fewest: dict[Key, int] = {}
        for stage in self._stages:
            self._add(Key(stage.batch_size, stage.seq_len))
        if self._evaluation:
            self._add(self._evaluation)
        self._compiling: dict[Key, Future[Program]] = {}
        self._programs: dict[Key, Program] = {}
        self._compiler = ThreadPoolExecutor(1, "jaxtrain-compile")
        self._lock = threading.Lock()

    def _add(self, key: Key) -> None:
        tokens = self._micro_batch_tokens
        self._fewest[key] = accumulation(self._components.mesh, key.batch_size, key.seq_len, tokens)

    def add_tasks(self, batch_size: int, seq_len: int) -> None:
        """Adds the program of the tasks. Call it before `settle`. Raises UserError if the mesh does not divide it."""
        self._tasks = Key(batch_size, seq_len, evaluates=True, asks=True)
        self._add(self._tasks)
        if self.limit is not None:
            self._submit(self._tasks)

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """The distinct (batch size, sequence length) of all stages that have steps."""
        return [(key.batch_size, key.seq_len) for key in self._fewest if not key.evaluates]

    def begin(self, stage: int, step: int = 1) -> None:
        """Starts compiling what a run needs before its first `step`, in the `stage`-th stage. Does not wait."""
        self._start(stage, step)
        for key in self._before_first_step(stage, step):
            self._submit(key)

    def start(self, stage: int, step: int = 1) -> None:
        """Starts compiling what follows `step` of the `stage`-th stage: the next stage, then this stage's later
        program. Does not wait."""
        self._start(stage + 1, step)
        for found in self._stages:
            if found.index == stage and self._choice(found.batch_size, found.seq_len).later is not None:
                self._submit(Key(found.batch_size, found.seq_len, later=True))

    def _start(self, stage: int, step: int) -> None:
        for found in self._stages:
            if found.index >= stage:
                self._submit(self._key(found.batch_size, found.seq_len, max(step, found.first_step)))
                return

    def _choice(self, batch_size: int, seq_len: int) -> Choice:
        return self._choices.get((batch_size, seq_len), Choice(variants=()))

    def _key(self, batch_size: int, seq_len: int, step: int) -> Key:
        from_step = self._choice(batch_size, seq_len).from_step
        return Key(batch_size, seq_len, later=from_step is not None and step >= from_step)

    def settle(self, stage: int, step: int = 1) -> None:
        """Checks before the first `step` that the `stage`-th and all later stages, and evaluations, fit in memory.

        Raises:
            DoesNotFitError: a stage or the evaluation cannot fit.
        """
        for key in self._before_first_step(stage, step):
            self._program(key)
        if self._tasks is not None and self.limit is not None:
            self.tasks()

    def ready(self, batch_size: int, seq_len: int, step: int = 1) -> bool:
        """Whether the executable of a step has been compiled."""
        future = self._compiling.get(self._key(batch_size, seq_len, step))
        return future is not None and future.done()

    def get(self, batch_size: int, seq_len: int, documents: np.ndarray | None = None, step: int = 1) -> Any:
        """Returns a step's executable for a batch, waiting for it if necessary. Raises as `program`.

        Args:
            batch_size: rows of the batch.
            seq_len: tokens per row.
            documents: the batch's `StepBatch.documents`; None for a batch that no kernel's bound excludes.
            step: the step.
        """
        return self._program(self._for(self._key(batch_size, seq_len, step), documents)).executable

    def program(self, batch_size: int, seq_len: int, step: int = 1) -> Program:
        """Returns the program of a step for a shape, waiting for it if necessary.

        Raises:
            DoesNotFitError: it cannot fit.
        """
        return self._program(self._key(batch_size, seq_len, step))

    def last_program(self, batch_size: int, seq_len: int) -> Program:
        """Returns the program that steps of a shape end up with. Raises as `program`."""
        return self.program(batch_size, seq_len, self._choice(batch_size, seq_len).from_step or 1)

    def evaluation(self, documents: np.ndarray | None = None) -> Program:
        """Returns the evaluation step for a batch, waiting for it if necessary. `documents` is as in `get`.

        Raises:
            DoesNotFitError: it cannot fit.
        """
        assert self._evaluation is not None
        return self._program(self._for(self._evaluation, documents))

    def tasks(self, documents: np.ndarray | None = None) -> Program:
        """Returns the program of the tasks for a batch, as `evaluation`."""
        assert self._tasks is not None
        return self._program(self._for(self._tasks, documents))

    def _for(self, key: Key, documents: np.ndarray | None) -> Key:
        """Returns the program for a batch: all processes take the crowded one if any has too many documents.

        A device's rows in a micro-batch are some of its process's, in any order: at worst those with most documents.
        """
        if documents is None:
            return key
        micro_batch = key.batch_size // self._program(key).micro_batches
        bounds = self._components.most_documents(micro_batch, key.seq_len)
        too_many = any(documents[:rows].sum() > most for rows, most in bounds)
        return dataclasses.replace(key, crowded=True) if bounds and consensus.any_process(too_many) else key

    def _before_first_step(self, stage: int, step: int) -> list[Key]:
        """The programs that are compiled before the first `step`, in the `stage`-th stage.

        On GPUs all: autotuning takes XLA's lock on the device exclusively, for which steps wait (GetGpuMutex in
        gpu_executable.cc), measures kernels that should be alone on it, and needs memory that training has taken.

        Elsewhere those that may not fit. Micro-batches can be as small as one row per device, so only the length of
        rows decides: the longest rows are tried. Without a limit, nothing has to be.
        """
        stages = [s for s in self._stages if s.index >= stage]
        if self._components.mesh.devices.flat[0].platform == "gpu":
            found = (self._key(s.batch_size, s.seq_len, max(step, s.first_step)) for s in stages)
            keys = list(dict.fromkeys(found))
        else:
            longest = max(stages, key=lambda s: (s.seq_len, s.batch_size))
            keys = [] if self.limit is None else [Key(longest.batch_size, longest.seq_len)]
        return [*keys, *((self._evaluation,) if self._evaluation and keys else ())]

    def _program(self, key: Key) -> Program:
        """Returns the program that fits on all processes."""
        if key in self._programs:
            return self._programs[key]
        preferred, counts = self._preferred(key), self._counts(key)
        last = len(preferred) + counts[-1]
        failure, program, mine = None, None, last + 1
        try:
            program = self._submit(key).result()
            mine = program.rank
        except UserError as error:
            failure = error
        rank = consensus.largest(mine)
        if rank > last:
            raise failure or UserError(
                f"{self._name(key)} does not fit into a device of another process: see its message"
            )
        assert program is not None
        if rank != mine:
            fewer = Variant(micro_batches=rank - len(preferred))
            variant = preferred[rank] if rank < len(preferred) else fewer
            program = self._compiler.submit(self._compiled, key, variant, rank).result()
        logger.info("%s: %s", self._name(key), program.describe(self.limit))
        self._programs[key] = program
        return program

    def _submit(self, key: Key) -> Future[Program]:
        with self._lock:
            if key not in self._compiling:
                self._compiling[key] = self._compiler.submit(self._fitting, key)
            return self._compiling[key]

    def _fitting(self, key: Key) -> Program:
        """Returns the first program in the order of preference that fits on this process's devices."""
        extra, preferred = self._extra if key.evaluates else 0, self._preferred(key)
        for rank, variant in enumerate(preferred):
            with contextlib.suppress(memory.NothingFitsError):
                _, executable = memory.fit([0], lambda _, v=variant: self._compile(key, v), self.limit, extra)
                return Program(executable, variant, key.batch_size, key.seq_len, rank, extra)
        try:
            count, executable = memory.fit(
                self._counts(key), lambda count: self._compile(key, Variant(micro_batches=count)), self.limit, extra
            )
        except memory.NothingFitsError as error:
            raise DoesNotFitError(self._misfit(key, error.needs)) from None
        variant, rank = Variant(micro_batches=count), len(preferred) + count
        return Program(executable, variant, key.batch_size, key.seq_len, rank, extra)

    def _compiled(self, key: Key, variant: Variant, rank: int) -> Program:
        extra = self._extra if key.evaluates else 0
        return Program(self._compile(key, variant), variant, key.batch_size, key.seq_len, rank, extra)

    def _preferred(self, key: Key) -> tuple[Variant, ...]:
        """The variants to try before the fewest micro-batches that fit."""
        if key.evaluates:
            return ()
        choice = self._choice(key.batch_size, key.seq_len)
        return (choice.later, *choice.variants) if key.later and choice.later is not None else choice.variants

    def _counts(self, key: Key) -> list[int]:
        """Numbers of micro-batches that divide a device's rows, ascending from what micro_batch_tokens implies."""
        mesh = self._components.mesh
        rows = key.batch_size // sharding.batch_ways(mesh.shape)
        fewest = self._fewest[dataclasses.replace(key, crowded=False, later=False)]
        return [count for count in sharding.divisors(rows) if count >= fewest]

    def _name(self, key: Key) -> str:
        where = ", a batch with too many documents for the attention kernel" * key.crowded
        if key.evaluates:
            return f"{'The program of eval.tasks' if key.asks else 'Evaluation'}{where}"
        named = [
            f"{s.index} ({s.name})" for s in self._stages if (s.batch_size, s.seq_len) == (key.batch_size, key.seq_len)
        ]
        return f"Stage{'s' * (len(named) > 1)} {', '.join(named)}{where}"

    def _misfit(self, key: Key, needs: str) -> str:
        assert self.limit is not None
        mesh = self._components.mesh
        fixes = ["a smaller model"]
        if not key.asks:
            fixes.append(f"shorter rows ({'eval.seq_len' if key.evaluates else 'seq_len'})")
        if not key.evaluates:
            fixes = [*self._components.model.memory_advice(), *fixes]
        fixes.append(f"more devices that share the state (mesh.fsdp, now {mesh.shape['fsdp']})")
        if mesh.devices.flat[0].platform == "gpu":
            fixes.append("a larger share for XLA (XLA_CLIENT_MEM_FRACTION=0.95; 0.92 unless set)")
        return (
            f"{self._name(key)} does not fit: even with one row of {key.seq_len:,} tokens at a time a device needs "
            f"{needs}, and may use {self.limit / 1e9:.3g} GB (memory_gb, or what the device reports less a reserve). "
            f"What helps: {', '.join(fixes)}."
        )
