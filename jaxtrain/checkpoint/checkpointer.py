"""Checkpoints of one run: train state and data state of one step in one atomic folder.

`checkpoints/<step>/` holds one item for each key of the state (`params`, `opt`, `meta`), the JSON item `data`, and a
list of its files with checksums, written just before the commit (integrity.py). Orbax writes in the background. A start
verifies the newest checkpoint; a damaged one is moved aside (`<step>.corrupt`) and the run resumes from the newest
intact one. Data state and weights always belong to one step, so the continuation is still exact.
"""

import contextlib
import dataclasses
import errno
import json
import logging
import math
import os
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint import checkpoint_managers as policies
from orbax.checkpoint._src.multihost import multihost
from orbax.checkpoint._src.path.atomicity import COMMIT_SUCCESS_FILE

from jaxtrain.checkpoint import integrity, restore, storage
from jaxtrain.distributed.consensus import StopRequest, Timer, any_process, broadcast, broadcast_json
from jaxtrain.errors import UserError
from jaxtrain.interfaces import Json

_SAVE_TIMEOUT_SECONDS = 3600

logger = logging.getLogger("jaxtrain")


@dataclasses.dataclass(kw_only=True)
class CheckpointConfig:
    """When to save and what to keep.

    A checkpoint is also saved at the end, and at SIGTERM or SIGINT.

    Attributes:
        every_steps: Save every N steps.
        every_minutes: Also save once the last save is this many minutes old, by process 0's clock; None: never.
        keep: Number of the newest checkpoints to keep, at least 1.
        keep_every: Keep the checkpoint of every N-th step forever; None: none.
        keep_best: Number of checkpoints with the lowest evaluation loss to keep, among those of evaluated steps.
    """

    every_steps: int = 1000
    every_minutes: float | None = None
    keep: int = 2
    keep_every: int | None = None
    keep_best: int = 0

    def check(self) -> None:
        if self.every_steps < 1:
            raise UserError(f"every_steps={self.every_steps}: the steps between two checkpoints must be 1 or more.")
        if self.every_minutes is not None and not self.every_minutes > 0:
            raise UserError(f"every_minutes={self.every_minutes}: must be above 0, or None to save by steps only.")
        if self.keep < 1:
            raise UserError(f"keep={self.keep}: must be 1 or more, because a resume needs the newest checkpoint.")
        if self.keep_every is not None and self.keep_every < 1:
            raise UserError(f"keep_every={self.keep_every}: must be 1 or more steps, or None to keep none forever.")
        if self.keep_best < 0:
            raise UserError(f"keep_best={self.keep_best}: must be 0 or more.")

    def most_at_once(self, last_step: int | None) -> int:
        """The most checkpoints that exist at once, including the one being written. last_step: The run's last step."""
        forever = 0 if self.keep_every is None or last_step is None else last_step // self.keep_every
        return self.keep + self.keep_best + 1 + forever

    def build(self, directory: epath.PathLike) -> "Checkpointer":
        """The checkpointer of a work directory's `checkpoints`, created if it is missing."""
        return Checkpointer(self, directory)


class Checkpointer:
    """Saves, finds and restores the checkpoints of one run. Every process makes one and calls the same methods.

    Construction cleans up after a killed save, verifies the newest checkpoint, and moves damaged ones aside. From the
    first call of `reached_preemption` to `close` it handles SIGINT, SIGTERM and SIGHUP.

    Raises:
        UserError: There are checkpoints, and none is intact.
    """

    def __init__(self, config: CheckpointConfig, directory: epath.PathLike):
        self._config = config
        self._directory = epath.Path(directory)
        if not integrity.is_remote(self._directory):
            self._directory.mkdir(parents=True, exist_ok=True)
        self._orbax_directory = storage.for_orbax(self._directory)
        self._set_aside_damaged()
        self._writing: int | None = None
        self._items: list[str] = []
        self._failed = False
        self._background = _BackgroundError()
        self._manager = self._open_manager()
        self._timer = Timer(config.every_minutes)
        self._stop = StopRequest()

    def _open_manager(self) -> "_Manager":
        config = self._config
        keep: list[Any] = [policies.LatestN(config.keep)]
        if config.keep_every is not None:
            keep.append(policies.EveryNSteps(config.keep_every))
        if config.keep_best:
            keep.append(policies.BestN(get_metric_fn=_eval_loss, reverse=True, n=config.keep_best))
        return _Manager(
            self._orbax_directory,
            options=ocp.CheckpointManagerOptions(
                cleanup_tmp_directories=True,
                save_root_metadata=False,
                temporary_path_class=storage.temporary_path_class(self._directory),
                preservation_policy=policies.AnyPreservationPolicy(keep),
                # Orbax stores metrics only if it has a function that ranks them.
                best_fn=_eval_loss if config.keep_best else None,
                best_mode="min",
                async_options=ocp.AsyncOptions(
                    timeout_secs=_SAVE_TIMEOUT_SECONDS,
                    # In the background, its failure would leave the other threads of the save waiting for minutes.
                    create_directories_asynchronously=False,
                    barrier_sync_fn=self._barrier,
                    post_finalization_callback=self._before_commit,
                ),
            ),
        )

    # When to save.

    def reached_preemption(self, step: int) -> bool:
        """Whether a signal asks to save and stop now. Call it once after each step, on every process."""
        reached = self._stop.reached()
        if reached:
            logger.warning("Stopping at step %d because of a signal.", step)
        return reached

    def interruptible(self) -> contextlib.AbstractContextManager[None]:
        """Inside, a signal to stop raises `consensus.InterruptedWaitError` at once, if this is the only process."""
        return self._stop.interruptible()

    def should_save(self, step: int) -> bool:
        """Whether a save is due by steps or minutes. Call it once after each step, on every process.

        Raises:
            UserError: The storage refused an earlier save. Other errors of that save are raised too.
        """
        with self._explained():
            self._background.check()
        return step % self._config.every_steps == 0 or self._timer.is_due()

    # Saving.

    def save(self, step: int, state: Mapping[str, Any], data: Json, metrics: Mapping[str, float] | None = None) -> None:
        """Saves in the background. Returns once the arrays are copied to the host, so they may be donated.

        Does nothing if the step is saved already.

        Args:
            step: The step just taken.
            state: Pytrees of arrays by item name.
            data: JSON (ints of any size); copied now.
            metrics: `eval_loss` if this step was evaluated.

        Raises:
            UserError: The disk is full or refuses the write (also for the previous save).
        """
        if step in self._manager.all_steps():
            return
        items: dict[str, Any] = {name: ocp.args.StandardSave(tree) for name, tree in state.items()}
        # A round trip: the caller changes the data while Orbax writes, and anything but JSON fails here.
        items[restore.DATA] = ocp.args.JsonSave(json.loads(json.dumps(data)))
        with self._explained():
            self._settle()
            self._writing, self._items = step, list(state)
            if jax.process_index() == 0 and not integrity.is_remote(self._directory) and not self._directory.is_dir():
                # Orbax would recreate it, in a work directory without the run's lock and metrics.
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(self._directory))
            self._manager.save(step, args=ocp.args.Composite(**items), metrics=dict(metrics or {}), force=True)
        self._timer.restart()

    def wait(self) -> None:
        """Waits until the last save is committed. Raises what `save` raises."""
        with self._explained():
            self._settle()

    def _settle(self) -> None:
        while self._manager.is_saving_in_progress():
            self._background.check()
            time.sleep(0.01)
        self._background.check()
        self._manager.wait_until_finished()

    def abandon_others(self) -> None:
        """Call when this process has failed and the others end: `close` then does not wait for a save with them."""
        self._failed = self._failed or jax.process_count() > 1

    def close(self) -> None:
        """Waits for the last save, then releases signals and threads. Raises what `save` raises."""
        try:
            # After a failure the other processes may never reach the barriers of `close`.
            if not self._failed:
                self.wait()
                self._manager.close()
        finally:
            self._background.close()
            self._stop.close()

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            if self._failed:
                raise
            self._failed = True
            self._remove_unfinished()
            last = max((s for s in restore.steps_in(self._directory) if s != self._writing), default=None)
            kept = "no earlier one exists" if last is None else f"checkpoint {last} is intact, nothing else is lost"
            reason = storage.refusal(error)
            if reason is None:
                error.add_note(f"Checkpoint {self._writing} was not written to {self._directory}: {kept}.")
                raise
            raise UserError(
                f"Checkpoint {self._writing} could not be written to {self._directory}: {reason}; {kept}.\n"
                "Fix that and run the same command again to continue from there, or use another --workdir or a "
                "smaller checkpoint.keep.\n"
                f"{error}"
            ) from error

    def _remove_unfinished(self) -> None:
        """Frees the space of the failed save. The next start would, but a full disk affects others now."""
        if jax.process_index() != 0 or self._writing is None:
            return
        for _ in range(10):
            folders = [p for p in _folders_of(self._directory, self._writing) if p.name != str(self._writing)]
            for path in folders:
                with contextlib.suppress(OSError):
                    path.rmtree()
            if not folders:
                break
            # Pending writes may still add files.
            time.sleep(0.1)

    def _barrier(self, *, key: str, timeout_ms: int) -> None:
        """Orbax's barrier. Before the barrier after which all have written, each process lists its own files."""
        if "async_write_complete" in key:
            integrity.write_share(self._unfinished(), jax.process_index())
        multihost.get_barrier_sync_fn()(key=key, timeout_ms=timeout_ms)

    def _before_commit(self) -> None:
        """Runs on process 0, on Orbax's thread, before the folder gets its final name."""
        folder = self._unfinished()
        for item in self._items:
            # Orbax only warns if it finds no arrays to merge, and would commit a checkpoint that cannot be restored.
            if not (folder / item / "manifest.ocdbt").exists():
                raise RuntimeError(f"Orbax wrote no arrays to {folder / item}")
        # Orbax writes the time of the commit into that file later.
        integrity.write(folder, jax.process_count(), skip="_CHECKPOINT_METADATA")

    def _unfinished(self) -> epath.Path:
        assert self._writing is not None
        (folder,) = _folders_of(self._directory, self._writing)
        return folder

    # Restoring.

    def latest_step(self) -> int | None:
        """The newest intact checkpoint, or None."""
        return self._manager.latest_step()

    def restore_data(self, step: int) -> Json:
        """The JSON data of a checkpoint. Cheap: reads one small file."""
        return restore.load_data(self._directory / str(step))

    def restore(self, step: int, abstract: Mapping[str, Any]) -> dict[str, Any]:
        """Restores the state onto any mesh and number of processes.

        Args:
            step: `latest_step()`, which is verified.
            abstract: For each item a pytree of `jax.ShapeDtypeStruct` with shardings, of the structure saved.

        Raises:
            UserError: The saved arrays have other names or shapes.
        """
        return restore.read(self._directory / str(step), abstract)

    def _set_aside_damaged(self) -> None:
        """Verifies the newest checkpoints until one is intact, and moves the damaged ones aside.

        The processes share the reading, and decide together: one that finds nothing wrong in its share must not resume
        from a checkpoint that another one refuses.
        """
        process = jax.process_index()
        damaged: dict[int, str | None] = {}
        whole = None
        for step in broadcast_json(self._committed_steps() if process == 0 else None):
            begun = time.monotonic()
            problem = integrity.problem(self._directory / str(step), process, jax.process_count())
            if not any_process(problem is not None):
                whole = step
                logger.info("Verified the files of checkpoint %d in %.1f s.", step, time.monotonic() - begun)
                break
            damaged[step] = problem
            if problem is not None:
                logger.warning("Checkpoint %d is damaged: %s.", step, problem)
        if damaged and whole is None:
            raise UserError(
                f"No checkpoint in {self._directory} is intact ({len(damaged)} damaged).\n"
                "Restore the folder from a backup, or start again in an empty --workdir.\n"
                + "\n".join(problem for problem in damaged.values() if problem is not None)
            )
        for step in damaged if process == 0 else ():
            moved = integrity.set_aside(self._directory / str(step))
            logger.warning("Checkpoint %d is damaged and was moved to %s; using checkpoint %d.", step, moved, whole)
        broadcast([0])  # no process lists the folder before the moves are done

    def _committed_steps(self) -> list[int]:
        """Newest first. In a bucket, an unfinished checkpoint of a killed run has its final name; it is removed."""
        committed = []
        for step in sorted(restore.steps_in(self._directory), reverse=True):
            folder = self._directory / str(step)
            if integrity.is_remote(folder) and not (folder / COMMIT_SUCCESS_FILE).exists():
                folder.rmtree()
            else:
                committed.append(step)
        return committed


class _Manager(ocp.CheckpointManager):
    def reached_preemption(self, step: int) -> bool:
        # Only StopRequest may ask: the service counts each query as a step of the loop.
        return False


def _eval_loss(metrics: Mapping[str, float] | None) -> float:
    """Infinite if the step was not evaluated, and for NaN."""
    return metrics["eval_loss"] if metrics and math.isfinite(metrics.get("eval_loss", math.nan)) else math.inf


def _folders_of(directory: epath.Path, step: int) -> list[epath.Path]:
    """The folder of a step and its unfinished form (the same on object stores)."""
    unfinished = f"{step}.orbax-checkpoint-tmp"
    # A bucket has no empty folders.
    found = directory.iterdir() if directory.is_dir() else ()
    return [p for p in found if p.name == str(step) or p.name.startswith(unfinished)]


class _BackgroundError(logging.Filter):
    """Catches what Orbax's threads log when a save fails, instead of printing it.

    Orbax logs the error at once. It raises it in `wait_until_finished`, after a barrier. If only one process
    failed, it passes that barrier only when the others time out, an hour later.
    """

    def __init__(self):
        super().__init__()
        self.error: BaseException | None = None
        self._hook = sys.unraisablehook
        sys.unraisablehook = self._drop_late_writes
        for name in ("absl", "asyncio"):
            logging.getLogger(name).addFilter(self)

    def filter(self, record: logging.LogRecord) -> bool:
        if record.name == "asyncio":
            # Later writes fail too: "Task exception was never retrieved".
            return self.error is None
        if not record.exc_info or "orbax" not in record.pathname:
            return True
        self.error = self.error or record.exc_info[1]
        return False

    def _drop_late_writes(self, unraisable: Any) -> None:
        # From TensorStore, for each array that was still being written when the first one failed.
        if str(unraisable.exc_value) != "Event loop is closed":
            self._hook(unraisable)

    def check(self) -> None:
        if self.error is not None:
            raise self.error

    def close(self) -> None:
        logging.getLogger("absl").removeFilter(self)
        # After a failure, pending writes may still fail later.
        if self.error is None:
            logging.getLogger("asyncio").removeFilter(self)
            sys.unraisablehook = self._hook
