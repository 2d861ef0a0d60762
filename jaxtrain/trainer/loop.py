"""Set-up of a run, then a loop that fits a screen."""

import collections
import dataclasses
import logging
from typing import Any

import jax
import numpy as np

from jaxtrain.checkpoint.checkpoints import Checkpointer
from jaxtrain.checkpoint.workdir import Workdir
from jaxtrain.config import Config
from jaxtrain.cost import memory
from jaxtrain.cost.roofline import peak_flops
from jaxtrain.data import fingerprint, ledger, skipped_files
from jaxtrain.data.pipeline import StepBatch
from jaxtrain.distributed import processes
from jaxtrain.distributed.consensus import InterruptedWaitError, any_process
from jaxtrain.errors import CorruptError
from jaxtrain.interfaces import Json
from jaxtrain.metrics.monitor import Monitor, Run, console_logging
from jaxtrain.plan import StepPlan
from jaxtrain.trainer import dryrun, gc_freeze, state
from jaxtrain.trainer.session import Session, configure_runtime, open_session, sample

FINISHED, STOPPED = 0, 75
# The devices always have work, and no more than so many batches wait on them.
_STEPS_AHEAD = 2

logger = logging.getLogger("jaxtrain")


def run(config: Config, workdir_path: str, dry_run: bool, keep: list[object] | None = None) -> int:
    """Train, or go on training, in a work directory. Returns the exit code.

    keep: gets what reads the data. Where nothing holds that any more, Grain waits for its threads, which may wait for a
    dead network until the deadline of an outage: for programs that end at once (recipe.leave).

    Raises UserError for what the user must change.
    """
    processes.join(config.deterministic)
    with console_logging() as console, processes.failures_told(), Workdir(workdir_path) as workdir:
        configure_runtime(config, workdir)
        checkpointer = config.checkpoint.build(workdir.checkpoints)
        try:
            # Before closing, which the others would have to take part in.
            with processes.failures_told():
                code = _explained(config, workdir, checkpointer, console, dry_run, keep)
        except Exception:
            checkpointer.give_up_others()
            raise
        finally:
            checkpointer.close()
    processes.leave_together()
    return code


def _explained(
    config: Config,
    workdir: Workdir,
    checkpointer: Checkpointer,
    console: Any,
    dry_run: bool,
    keep: list[object] | None,
) -> int:
    """The run; of what ends it, the devices' memory is explained, and a corrupt file is recorded if that is wanted."""
    try:
        session = open_session(config, workdir, checkpointer, fetch=not dry_run)
        if keep is not None:
            keep.append(session)
        if dry_run:
            dryrun.describe(session, workdir)
            return FINISHED
        return _train(session, workdir, checkpointer, console)
    except jax.errors.JaxRuntimeError as error:
        explained = memory.explained(error)
        if explained is None:
            raise
        raise explained from error
    except CorruptError as error:
        if dry_run or config.data.on_corrupt == "stop" or not error.source:
            raise
        skipped_files.record(workdir.skips, error)
        recorded = f"Recorded in {workdir.skips}. Give the same command again to go on without it."
        logger.warning("%s", error)
        logger.warning("%s", recorded)
        # The others cannot know. The launcher starts all again, and all read the list.
        processes.tell(f"{error}\n{recorded}", STOPPED)
        checkpointer.give_up_others()
        return STOPPED


def _train(session: Session, workdir: Workdir, checkpointer: Checkpointer, console: Any) -> int:
    config, plan, start = session.config, session.plan, session.start_step
    described = Run(
        start_step=start,
        start_tokens=session.start_tokens,
        total_tokens=plan.total_tokens,
        num_stages=len(plan.stages),
        flops_per_token=session.parts.flops_per_token,
        peak_flops=peak_flops(),
        log_every=config.log_every,
        config=session.identities["config"],
    )
    with config.monitor.build(workdir, described, console) as monitor:
        if session.is_complete:
            monitor.message(f"The run is complete: step {start:,}, {session.start_tokens:,} tokens. Nothing to do.")
            return FINISHED
        workdir.write_config(session.identities["config"])
        train_state = session.train_state(monitor)
        loop = Loop(session, checkpointer, monitor)
        with gc_freeze.only_new():
            code = loop.run(train_state)
        step = checkpointer.latest_step()
        saved = "No step was taken yet." if step is None else f"Step {step:,} is saved in {workdir.checkpoints}."
        monitor.message(f"{saved} Give the same command again to go on." if code == STOPPED else f"Finished. {saved}")
        if code == FINISHED and config.sample_prompts:
            sample(session, loop.state["params"], monitor)
        return code


@dataclasses.dataclass(frozen=True)
class _Taken:
    """The step taken last."""

    at: StepPlan
    batch: StepBatch
    evaluated: dict[str, float] | None


@dataclasses.dataclass
class _Pending:
    """A step's line that waits for its numbers: fetched only after the next step is under way."""

    at: StepPlan
    metrics: dict[str, jax.Array]
    batch: StepBatch


class Loop:
    """Steps of the plan from `session.start_step` + 1 on.

    Invariants: a checkpoint of step N holds the state after N updates and the lanes after the batches trained on up to
    N, whatever was read ahead; every line of a step is written before a checkpoint of that step.
    """

    def __init__(self, session: Session, checkpointer: Checkpointer, monitor: Monitor):
        self._session = session
        self._checkpointer = checkpointer
        self._monitor = monitor
        self._pending: _Pending | None = None
        self._taken: _Taken | None = None
        self._in_flight: collections.deque[dict[str, jax.Array]] = collections.deque()
        self.state: state.State = {}

    def run(self, train_state: state.State) -> int:
        session, plan, monitor = self._session, self._session.plan, self._monitor
        self.state = train_state
        step, code, ended = session.start_step, FINISHED, False
        monitor.begin()
        while not ended:
            step += 1
            at = plan.at(step)
            try:
                with monitor.span("data"), self._checkpointer.interruptible():
                    batch = next(session.feed)
            except InterruptedWaitError:
                return self._stop_waiting()
            assert batch.step == step
            metrics = self._step(at, batch)
            monitor.stepped(at)
            self._flush()
            data_ended = self._data_ended(batch)
            ended = step == plan.last_step or data_ended
            if monitor.due(at) or ended or step == plan.stages[at.stage - 1].last_step:
                self._pending = _Pending(at, metrics, batch)
            preempted = self._checkpointer.reached_preemption(step)
            evaluated = self._evaluate_if_due(at, ended)
            self._taken = _Taken(at, batch, evaluated)
            if self._checkpointer.should_save(step) or preempted or ended:
                self._flush()
                self._save(at, batch, evaluated, data_ended)
            if preempted and not ended:
                code, ended = STOPPED, True
        self._finish()
        return code

    def _finish(self) -> None:
        self._flush()
        with self._monitor.span("checkpoint"):
            self._checkpointer.wait()

    def _stop_waiting(self) -> int:
        """A signal came while the next batch was not to be had: what was trained so far is saved."""
        self._flush()
        if self._taken is not None:
            self._save(self._taken.at, self._taken.batch, self._taken.evaluated, data_ended=False)
        self._finish()
        return STOPPED

    def _step(self, at: StepPlan, batch: StepBatch) -> dict[str, jax.Array]:
        """One update, given to the devices; and the next stage begins to compile with the first step of this one."""
        stages = self._session.stages
        if not stages.ready(at.batch_size, at.seq_len):
            with self._monitor.span("compile"):
                stages.get(at.batch_size, at.seq_len)
        executable = stages.get(at.batch_size, at.seq_len)
        rate, rows = np.float32(at.learning_rate), fingerprint.split(at.rows_before)
        self.state, metrics = executable(self.state, batch.arrays, rate, rows, *self._session.teaching(at))
        stages.start(at.stage + 1)  # once the devices have work: tracing is Python's, and would hold this thread up
        self._in_flight.append(metrics)
        if len(self._in_flight) > _STEPS_AHEAD:
            jax.block_until_ready(self._in_flight.popleft())
        return metrics

    def _data_ended(self, batch: StepBatch) -> bool:
        """Whether no lane of any host has a token left; only possible where `epochs` bounds the data."""
        return self._session.config.epochs is not None and not any_process(not batch.ended)

    def _flush(self) -> None:
        """Write the line that waits. Fetching its numbers waits for its step, not for the one under way."""
        if self._pending is None:
            return
        pending, self._pending = self._pending, None
        numbers = {name: value for name, value in jax.device_get(pending.metrics).items() if name != "fingerprint"}
        metrics: Json = {name: float(value) for name, value in numbers.items()}
        metrics |= {name: int(numbers[name]) for name in ("skipped", "skipped_in_a_row")}
        metrics["fingerprint"] = fingerprint.text(np.asarray(jax.device_get(pending.metrics["fingerprint"])))
        given = ledger.by_source(self._session.gather(pending.batch), self._session.plan.source_names)
        self._session.stage_ends.note(pending.at.step, given)
        metrics["sources"] = given
        metrics["stage_sources"] = self._session.stage_ends.in_stage(pending.at.step, given)
        cache = self._session.cache
        metrics["disk_cache_gb"] = None if cache is None else cache.used_bytes() / 1e9
        self._monitor.log_step(pending.at, metrics)
        in_a_row = metrics["skipped_in_a_row"]
        if in_a_row >= self._session.config.max_skipped_steps:
            raise FloatingPointError(
                f"{in_a_row} updates in a row had non-finite gradients, the last at step {pending.at.step}: see the "
                "losses before it in metrics.jsonl. Lower the learning rate or resume from an earlier checkpoint."
            )

    def _evaluate_if_due(self, at: StepPlan, ended: bool) -> dict[str, float] | None:
        evaluator = self._session.evaluator
        if evaluator is None or not (ended or self._session.config.eval.due(at)):
            return None
        self._flush()
        with self._monitor.span("evaluation"):
            values = evaluator.run(self.state["params"])
        self._monitor.log_eval(at.step, values)
        return values

    def _save(self, at: StepPlan, batch: StepBatch, evaluated: dict[str, float] | None, data_ended: bool) -> None:
        with self._monitor.span("checkpoint"):
            data = {
                **self._session.identities,
                "step": at.step,
                "tokens": at.tokens_after,
                "data_ended": data_ended,
                "lanes": ledger.to_json(self._session.gather(batch), self._session.plan.source_names),
                # Complete: a stage's last step is logged, and every line is written before a checkpoint.
                "stage_ends": self._session.stage_ends.to_json(),
            }
            self._checkpointer.save(at.step, self.state, data, evaluated)
