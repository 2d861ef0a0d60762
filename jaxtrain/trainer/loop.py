"""A training run: setup, then a loop that fits on one screen."""

import collections
import contextlib
import dataclasses
import gc
import itertools
import logging
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from jaxtrain.checkpoint.checkpointer import Checkpointer
from jaxtrain.checkpoint.workdir import Workdir
from jaxtrain.config import Config, reaches_multiple
from jaxtrain.cost import memory
from jaxtrain.cost.roofline import peak_flops
from jaxtrain.data import fingerprint, ledger, skipped_files
from jaxtrain.data.pipeline import StepBatch
from jaxtrain.distributed import processes
from jaxtrain.distributed.consensus import InterruptedWaitError, any_process, on_process_0
from jaxtrain.errors import CorruptError, UserError
from jaxtrain.interfaces import Json
from jaxtrain.metrics.monitor import Monitor, Run, console_logging
from jaxtrain.metrics.profiler import Profiler
from jaxtrain.plan import StepPlan
from jaxtrain.trainer import compatibility, open_data, state
from jaxtrain.trainer.dry_run import describe
from jaxtrain.trainer.session import Session, configure_runtime, sample
from jaxtrain.trainer.spikes import told

FINISHED, STOPPED = 0, 75
_REWOUND = -1  # no exit code: the run goes on from a checkpoint
# Steps dispatched ahead: the devices always have work, and few batches wait in their memory.
_STEPS_AHEAD = 2

logger = logging.getLogger("jaxtrain")


def run(
    config: Config,
    workdir_path: str,
    dry_run: bool,
    keep: list[object] | None = None,
    profile: tuple[int, int] | None = None,
) -> int:
    """Trains in a work directory, continuing from its newest checkpoint.

    Args:
        config: the run's config.
        workdir_path: the work directory.
        dry_run: print the plan without training (`--dry_run`).
        keep: receives the session, for programs that exit immediately afterwards (`cli.leave`). Otherwise Grain joins
            its threads at the end, and those may wait for a dead network until the outage deadline.
        profile: the first step to trace, and how many; None for none.

    Returns:
        The exit code.

    Raises:
        UserError: the user must change something.
    """
    processes.join(config.deterministic)
    with console_logging() as console, processes.failures_announced(), Workdir(workdir_path) as workdir:
        configure_runtime(config, workdir)
        profiler = Profiler(workdir, profile)
        checkpointer = config.checkpoint.build(workdir.checkpoints)
        try:
            # Report the failure before closing, which needs all processes.
            with processes.failures_announced():
                code = _run(config, workdir, checkpointer, console, dry_run, keep, profiler)
        except Exception:
            checkpointer.abandon_others()
            raise
        finally:
            checkpointer.close()
    processes.exit_together()
    return code


def _run(
    config: Config,
    workdir: Workdir,
    checkpointer: Checkpointer,
    console: Any,
    dry_run: bool,
    keep: list[object] | None,
    profiler: Profiler,
) -> int:
    """Runs the session. Explains out-of-memory errors, and records a corrupt file if the config says to skip it."""
    step = checkpointer.latest_step()
    if step and not dry_run:  # step 0 is a model imported from Hugging Face
        saved = checkpointer.restore_data(step)
        if compatibility.is_complete(saved, compatibility.settled(config, saved), config.plan(), step):
            logger.info("The run is complete: step %s, %s tokens. Nothing to do.", f"{step:,}", f"{saved['tokens']:,}")
            return FINISHED
    session: Session | None = None
    try:
        while True:
            session = Session(config, workdir, checkpointer, fetch=not dry_run)
            if keep is not None:
                keep[:] = [session]
            if dry_run:
                describe(session, workdir)
                return FINISHED
            code = _train(session, workdir, checkpointer, console, profiler)
            if code != _REWOUND:
                return code
            session.close()
            session = None
            if keep is not None:
                keep.clear()
            gc.collect()  # frees the arrays of the old session
            console.begin_again()
    except jax.errors.JaxRuntimeError as error:
        explained = memory.explained(error)
        if explained is None:
            raise
        raise explained from error
    except CorruptError as error:
        if dry_run or config.data.on_corrupt == "stop" or not error.source:
            if dry_run or (session is None and not step):
                raise UserError(str(error)) from None
            raise
        skipped_files.record(workdir.skips, error)
        recorded = f"Recorded in {workdir.skips}. Run the same command again to continue without it."
        logger.warning("%s", error)
        logger.warning("%s", recorded)
        # Tell the other processes. The launcher restarts all of them, and they read the list.
        processes.announce_failure(f"{error}\n{recorded}", STOPPED)
        checkpointer.abandon_others()
        return STOPPED


def _train(session: Session, workdir: Workdir, checkpointer: Checkpointer, console: Any, profiler: Profiler) -> int:
    config, plan, start = session.config, session.plan, session.start_step
    described = Run(
        start_step=start,
        start_tokens=session.start_tokens,
        total_tokens=plan.total_tokens,
        num_stages=len(plan.stages),
        flops_per_token=session.components.flops_per_token,
        peak_flops=peak_flops(),
        log_every=config.log_every,
        config=session.identities["config"],
    )
    with config.monitor.build(workdir, described, console) as monitor:
        if session.is_complete:
            logger.info(f"The run is complete: step {start:,}, {session.start_tokens:,} tokens. Nothing to do.")
            return FINISHED
        workdir.write_config(session.identities["config"])
        monitor.attach(workdir.config)
        train_state = session.train_state(monitor)
        loop = Loop(session, checkpointer, monitor, workdir, profiler)
        with frozen_gc(), profiler:
            code = loop.run(train_state)
        if code == _REWOUND:
            return code
        step = checkpointer.latest_step()
        saved = "No step has been taken yet." if step is None else f"Step {step:,} is saved in {workdir.checkpoints}."
        logger.info(f"{saved} Run the same command again to continue." if code == STOPPED else f"Finished. {saved}")
        return code


@contextlib.contextmanager
def frozen_gc() -> Iterator[None]:
    """Excludes objects alive at entry from Python's garbage collection.

    Startup leaves about 230,000 objects that live as long as the process: JAX, libraries, compiled programs. Every full
    collection would visit all of them (0.25 s), in whichever thread triggers it. See `gc.freeze`.
    """
    gc.collect()  # otherwise current garbage would stay, with its arrays
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@dataclasses.dataclass(frozen=True)
class _Step:
    """The last step. `evaluated` has its held-out loss on the mix, if measured."""

    at: StepPlan
    batch: StepBatch
    data_ended: bool
    evaluated: dict[str, float] | None


class Loop:
    """Runs the plan's steps from `session.start_step` + 1 on. `state` is the train state after the last one."""

    def __init__(
        self,
        session: Session,
        checkpointer: Checkpointer,
        monitor: Monitor,
        workdir: Workdir,
        profiler: Profiler,
    ):
        self.state: state.State = {}
        self._watch, self._workdir, self._profiler = session.watch(), workdir, profiler
        self._session, self._checkpointer, self._monitor = session, checkpointer, monitor
        # A step not logged yet: its metrics are fetched after the next step is dispatched.
        self._unlogged: tuple[StepPlan, StepBatch, dict[str, jax.Array]] | None = None
        self._in_flight: collections.deque[dict[str, jax.Array]] = collections.deque()

    def run(self, train_state: state.State) -> int:
        """Trains until the plan, the data, a signal or a rewind ends it. Returns FINISHED, STOPPED or _REWOUND."""
        session, plan, monitor = self._session, self._session.plan, self._monitor
        last: _Step | None = None
        self.state = train_state
        monitor.begin()
        for step in itertools.count(session.start_step + 1):
            at = plan.at(step)
            self._profiler.at(step, lambda: jax.block_until_ready(self.state))
            try:
                with monitor.span("data"), self._checkpointer.interruptible():
                    batch = next(session.feed)
            except InterruptedWaitError:  # a signal while waiting for the next batch
                return self._finish(STOPPED, None if self._rewinds(0) else last)
            except CorruptError as error:
                if step > 1 or session.config.data.on_corrupt == "skip":
                    raise
                raise UserError(str(error)) from None  # nothing is trained yet: a restart would fail the same way
            # The feed reads ahead, but each batch belongs to its step and carries the lanes' positions after it.
            assert batch.step == step
            metrics = self._update(at, batch)
            monitor.stepped(at)
            self._log()  # the previous step; the devices are busy with this one
            data_ended = session.config.epochs is not None and not any_process(not batch.ended)
            ended = step == plan.last_step or data_ended
            if monitor.due(at) or ended or step == plan.stages[at.stage - 1].last_step:
                self._unlogged = at, batch, metrics
            # The following decisions are identical on every process, so all evaluate, save and stop at the same step.
            stopped = self._checkpointer.reached_preemption(step)
            saves = ended or stopped or self._checkpointer.should_save(step)
            # No checkpoint has a spike that the run returns from.
            if self._rewinds(0 if saves else _STEPS_AHEAD):
                return self._finish(STOPPED, None) if stopped else _REWOUND
            last = _Step(at, batch, data_ended, self._evaluate(at, ended))
            if ended or stopped:
                return self._finish(FINISHED if ended else STOPPED, last)
            if saves:
                self._save(last)
            every = session.config.sample_every_tokens
            if every is not None and reaches_multiple(at, every):
                self._sample(step)
        raise AssertionError

    def _finish(self, code: int, last: _Step | None) -> int:
        if last is not None:
            self._save(last)
        with self._monitor.span("checkpoint"):
            self._checkpointer.wait()
        if last is not None and code == FINISHED:
            self._sample(last.at.step)
        return code

    def _update(self, at: StepPlan, batch: StepBatch) -> dict[str, jax.Array]:
        """Dispatches one update and starts compiling what follows."""
        programs = self._session.programs
        if not programs.ready(at.batch_size, at.seq_len, at.step):
            with self._monitor.span("compile"):
                programs.get(at.batch_size, at.seq_len, step=at.step)
        executable = programs.get(at.batch_size, at.seq_len, batch.documents, at.step)
        rate, rows = np.float32(at.learning_rate), fingerprint.split(at.rows_before)
        history = self._watch.inputs(at)
        teaching = self._session.teaching(at)
        with jax.profiler.StepTraceAnnotation("train", step_num=at.step):
            self.state, metrics, *found = executable(self.state, batch.arrays, rate, rows, *teaching, **history)
        self._watch.add(at, batch, metrics, *found)
        programs.start(at.stage, at.step)  # after dispatching: tracing holds the GIL
        self._in_flight.append(metrics)
        if len(self._in_flight) > _STEPS_AHEAD:
            jax.block_until_ready(self._in_flight.popleft())
        return metrics

    def _rewinds(self, ahead: int) -> bool:
        """Reports spikes, except in the last `ahead` steps. Returns whether the run has to return to a checkpoint.

        If so, the documents to leave out are in the work directory's list.
        """
        config, listed = self._session.config, self._session.forgotten
        for step, spike in self._watch.spikes(ahead):
            rewinds = config.on_spike == "rewind" and listed.rewinds < config.max_rewinds
            done = {"log": "the run goes on", "skip_update": "its update is skipped"}.get(config.on_spike, "")
            if rewinds:
                self._checkpointer.wait()
                newest = self._checkpointer.latest_step() or 0
                gone = spike["documents"][: spike["standing_out"] or None]
                for document in gone:
                    listed.add(document["source"], document["file"], document["row"], newest + 1)
                listed.rewinds += 1
                done = (
                    f"returning to step {newest} without {len(gone)} of them ({listed.rewinds} of {config.max_rewinds})"
                )
            elif config.on_spike == "rewind":
                done = f"the run has returned {listed.rewinds} times already and goes on (max_rewinds)"
            if jax.process_index() == 0:
                logger.warning("%s", told(step, spike, done))
            self._monitor.log_spike(step, {**spike, "done": done})
            if rewinds:
                on_process_0(lambda: open_data.save_forgotten(self._workdir.path, listed), "process 0 failed")
                return True
        return False

    def _log(self) -> None:
        """Logs the pending step, if there is one."""
        if self._unlogged is None:
            return
        (at, batch, arrays), self._unlogged = self._unlogged, None
        session, values = self._session, jax.device_get(arrays)
        totals = ledger.by_source(session.gather(batch), session.plan.source_names)
        session.stage_ends.note(at.step, totals)
        metrics: Json = {name: float(value) for name, value in values.items() if name != "fingerprint"}
        metrics |= {name: int(values[name]) for name in ("skipped", "skipped_in_a_row")}
        metrics["fingerprint"] = fingerprint.text(np.asarray(values["fingerprint"]))
        metrics["sources"] = totals
        metrics["stage_sources"] = session.stage_ends.in_stage(at.step, totals)
        metrics["disk_cache_gb"] = None if session.cache is None else session.cache.used_bytes() / 1e9
        self._monitor.log_step(at, metrics)
        in_a_row = metrics["skipped_in_a_row"]
        if in_a_row >= session.config.max_skipped_steps:
            raise FloatingPointError(
                f"{in_a_row} updates in a row had non-finite gradients or were spikes, the last at step {at.step}: see "
                "the losses before it in metrics.jsonl. Lower the learning rate or resume from an earlier checkpoint."
            )

    def _evaluate(self, at: StepPlan, ended: bool) -> dict[str, float] | None:
        evaluators = self._session.evaluators
        if not evaluators or not (ended or self._session.config.eval.due(at)):
            return None
        self._log()
        values: Json = {}
        with self._monitor.span("evaluation"):
            for evaluator in evaluators:
                values |= evaluator.run(self.state["params"])
        self._monitor.log_eval(at.step, values)
        return {name: value for name, value in values.items() if not isinstance(value, dict)}

    def _sample(self, step: int) -> None:
        """Logs samples, after the checkpoint of the step if there is one: a failure here loses nothing."""
        if self._session.config.sample_prompts:
            self._log()
            with self._monitor.span("samples"):
                texts = sample(self._session, self.state["params"])
            self._monitor.log_samples(step, texts)

    def _save(self, last: _Step) -> None:
        """Saves a checkpoint of step N: the state after N updates, and the lanes' positions after N batches.

        All lines up to N are written first, so metrics.jsonl is never behind a checkpoint.
        """
        session, step = self._session, last.at.step
        self._log()
        with self._monitor.span("checkpoint"):
            data = {
                **session.identities,
                "step": step,
                "tokens": last.at.tokens_after,
                "data_ended": last.data_ended,
                "lanes": ledger.to_json(session.gather(last.batch), session.plan.source_names),
                # Up to date, because the last step of a stage is always logged.
                "stage_ends": session.stage_ends.to_json(),
                "spikes": self._watch.to_json(),
            }
            self._checkpointer.save(step, self.state, data, last.evaluated)
