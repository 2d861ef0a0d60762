"""Checkpoints: train state and data state of one step in one atomic folder, written in the background by Orbax.

`checkpoints/<step>/` holds one item for each key of the state (`params`, `opt`, `meta`), the JSON item `data`, and a
list of its files written just before it is committed (`integrity.py`), by which process 0 tells at a start whether it
is whole. A damaged newest one is moved aside (`<step>.corrupt`) and the run goes on from the newest whole one; data
state and weights are always of one step, so what follows is still exact.
"""

import contextlib
import dataclasses
import json
import logging
import math
import os
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint import checkpoint_managers as policies
from orbax.checkpoint._src.path.atomicity import COMMIT_SUCCESS_FILE

from jaxtrain import cli
from jaxtrain.checkpoint import integrity, object_stores
from jaxtrain.checkpoint.save_errors import BackgroundError, storage_refused
from jaxtrain.distributed.consensus import StopRequest, Timer, broadcast
from jaxtrain.errors import UserError
from jaxtrain.interfaces import Json, versioned

_DATA = "data"
_SAVE_TIMEOUT_SECONDS = 3600

logger = logging.getLogger("jaxtrain")


@dataclasses.dataclass(kw_only=True)
class CheckpointConfig:
    """When to save and what to keep.

    A checkpoint is also saved at the end, and at SIGTERM or SIGINT.

    Attributes:
        every_steps: save after each multiple of so many steps.
        every_minutes: save also when the last save is so many minutes old, by process 0's clock; None: never.
        keep: how many of the newest to keep, at least 1.
        keep_every: keep each multiple of so many steps for ever; None: none.
        keep_best: how many of the best to keep by evaluation loss, of those saved at a step that was evaluated.
    """

    every_steps: int = 1000
    every_minutes: float | None = None
    keep: int = 2
    keep_every: int | None = None
    keep_best: int = 0

    def check(self) -> None:
        if self.every_steps < 1:
            raise UserError(f"every_steps={self.every_steps}: steps between two checkpoints, must be 1 or more.")
        if self.every_minutes is not None and not self.every_minutes > 0:
            raise UserError(f"every_minutes={self.every_minutes}: must be above 0, or None to save by steps only.")
        if self.keep < 1:
            raise UserError(f"keep={self.keep}: the newest checkpoint is what a resume needs; must be 1 or more.")
        if self.keep_every is not None and self.keep_every < 1:
            raise UserError(f"keep_every={self.keep_every}: must be 1 or more steps, or None to keep none for ever.")
        if self.keep_best < 0:
            raise UserError(f"keep_best={self.keep_best}: must be 0 or more.")

    def most_at_once(self, last_step: int | None) -> int:
        """Checkpoints that are there at the same time, one that is being written included; last_step: of the run."""
        for_ever = 0 if self.keep_every is None or last_step is None else last_step // self.keep_every
        return self.keep + self.keep_best + 1 + for_ever

    def build(self, directory: epath.PathLike) -> "Checkpointer":
        """directory: the work directory's `checkpoints`; made if it is missing."""
        return Checkpointer(self, directory)


class Checkpointer:
    """Saves, finds and restores the checkpoints of one run. Every process makes one and calls the same methods.

    Construction cleans up after a killed save, and moves broken newest checkpoints aside. From the first call of
    `reached_preemption` to `close` it takes SIGINT and SIGTERM. Raises UserError if there are checkpoints and none is
    whole.
    """

    def __init__(self, config: CheckpointConfig, directory: epath.PathLike):
        self._config = config
        self._directory = epath.Path(directory)
        object_stores.prepare(self._directory)
        self._set_aside_broken()
        self._writing: int | None = None
        self._failed = False
        self._background = BackgroundError()
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
            self._directory,
            options=ocp.CheckpointManagerOptions(
                cleanup_tmp_directories=True,
                save_root_metadata=False,
                temporary_path_class=object_stores.temporary_path_class(self._directory),
                preservation_policy=policies.AnyPreservationPolicy(keep),
                # Orbax stores metrics only if it is told what is best.
                best_fn=_eval_loss if config.keep_best else None,
                best_mode="min",
                async_options=ocp.AsyncOptions(
                    timeout_secs=_SAVE_TIMEOUT_SECONDS, post_finalization_callback=self._write_file_list
                ),
            ),
        )

    # When to save.

    def reached_preemption(self, step: int) -> bool:
        """Whether SIGTERM or SIGINT asks to save and stop now: call it once after each step, on every process."""
        reached = self._stop.reached()
        if reached:
            logger.warning("Stopping at step %d as asked by a signal.", step)
        return reached

    def interruptible(self) -> contextlib.AbstractContextManager[None]:
        """Inside, SIGTERM or SIGINT raises `consensus.InterruptedWaitError` at once, if this is the only process."""
        return self._stop.interruptible()

    def should_save(self, step: int) -> bool:
        """Whether a save is due by steps or minutes: call it once after each step, on every process.

        Raises what an earlier save met in the background.
        """
        with self._explained():
            self._background.check()
        return step % self._config.every_steps == 0 or self._timer.is_due()

    # Saving.

    def save(self, step: int, state: Mapping[str, Any], data: Json, metrics: Mapping[str, float] | None = None) -> None:
        """Saves in the background; returns when the arrays are copied to the host, so they may be donated.

        state: pytrees of arrays by item name. data: JSON (ints of any size), taken as it is now.
        metrics: `eval_loss` if this step was evaluated. Does nothing if the step is saved already.
        Raises UserError where the disk is full or refuses (also on behalf of the save before).
        """
        if step in self._manager.all_steps():
            return
        items: dict[str, Any] = {name: ocp.args.StandardSave(tree) for name, tree in state.items()}
        # Round trip: the caller's data goes on changing while Orbax writes, and what is not JSON fails here.
        items[_DATA] = ocp.args.JsonSave(json.loads(json.dumps(data)))
        with self._explained():
            self._settle()
            self._writing = step
            self._manager.save(step, args=ocp.args.Composite(**items), metrics=dict(metrics or {}), force=True)
        self._timer.restart()

    def wait(self) -> None:
        """Waits until the last save is committed; raises as `save`."""
        with self._explained():
            self._settle()

    def _settle(self) -> None:
        while self._manager.is_saving_in_progress():
            self._background.check()
            time.sleep(0.01)
        self._background.check()
        self._manager.wait_until_finished()

    def give_up_others(self) -> None:
        """This process has failed, and the others end at once: `close` then waits for no save with them."""
        self._failed = self._failed or jax.process_count() > 1

    def close(self) -> None:
        """Waits for the last save, then gives up signals and threads; raises as `save`."""
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
            last = max((s for s in _steps(self._directory) if s != self._writing), default=None)
            kept = "no earlier one exists" if last is None else f"checkpoint {last} is whole, nothing else is lost"
            reason = storage_refused(error)
            if reason is None:
                error.add_note(f"Checkpoint {self._writing} was not written to {self._directory}: {kept}.")
                raise
            raise UserError(
                f"Checkpoint {self._writing} could not be written to {self._directory}: {reason}; {kept}.\n"
                "Put that right and run the same command again: it goes on from there (or use another --workdir, or a "
                f"smaller checkpoint.keep).\n{error}"
            ) from error

    def _remove_unfinished(self) -> None:
        """Gives back the space of the failed save; the next start would do it, but a full disk hurts others now."""
        if jax.process_index() != 0 or self._writing is None:
            return
        for _ in range(10):
            folders = [p for p in _folders_of(self._directory, self._writing) if p.name != str(self._writing)]
            for path in folders:
                with contextlib.suppress(OSError):
                    path.rmtree()
            if not folders:
                break
            # The writes that had begun may still add files.
            time.sleep(0.1)

    def _write_file_list(self) -> None:
        """Runs on Orbax's thread when all processes have written and before the folder gets its final name."""
        if jax.process_index() != 0:
            return
        assert self._writing is not None
        (folder,) = _folders_of(self._directory, self._writing)
        # Orbax writes the time of the commit into that file later.
        integrity.write(folder, skip="_CHECKPOINT_METADATA")

    # Restoring.

    def latest_step(self) -> int | None:
        """The newest whole checkpoint, or None."""
        return self._manager.latest_step()

    def restore_data(self, step: int) -> Json:
        """The JSON data of a checkpoint. Cheap: reads one small file."""
        return load_data(self._directory / str(step))

    def restore(self, step: int, abstract: Mapping[str, Any]) -> dict[str, Any]:
        """Restores the state onto any mesh and number of processes.

        abstract: for each item a pytree of `jax.ShapeDtypeStruct` with shardings, of the structure that was saved.
        Raises UserError if the saved arrays have other names or shapes.
        """
        return _read(self._directory / str(step), abstract)

    def _set_aside_broken(self) -> None:
        """Moves the newest folders aside that process 0 finds broken, until one is whole."""
        broken: dict[int, str] = {}
        whole = -1
        if jax.process_index() == 0:
            for step in sorted(_steps(self._directory), reverse=True):
                folder = self._directory / str(step)
                if integrity.is_remote(folder) and not (folder / COMMIT_SUCCESS_FILE).exists():
                    folder.rmtree()  # a killed save: there it has its final name from the beginning
                    continue
                problem = integrity.problem(folder)
                if problem is None:
                    whole = step
                    break
                broken[step] = problem
        whole, num_broken = (int(x) for x in broadcast([whole, len(broken)]))
        if num_broken and whole < 0:
            raise UserError(
                f"No checkpoint in {self._directory} is whole ({num_broken} damaged; see the log of process 0).\n"
                "Restore that folder from a copy, or start again in an empty --workdir.\n" + "\n".join(broken.values())
            )
        for step, problem in broken.items():
            folder = self._directory / str(step)
            moved = integrity.set_aside(folder)
            logger.warning(
                "Checkpoint %s is damaged and was moved to %s; an older one is used. %s", folder, moved, problem
            )
        broadcast([0])  # Nobody lists the folder before the moves are done.


class _Manager(ocp.CheckpointManager):
    def reached_preemption(self, step: int) -> bool:
        # Only StopRequest may ask: the service takes each question for a call of the step's loop.
        return False


def _eval_loss(metrics: Mapping[str, float] | None) -> float:
    """Infinite where the step was not evaluated, and for NaN."""
    return metrics["eval_loss"] if metrics and math.isfinite(metrics.get("eval_loss", math.nan)) else math.inf


# Reading checkpoints of any run.


def step_folder(path: epath.PathLike, step: int | None = None) -> epath.Path:
    """The folder of one checkpoint. path: a work directory, its `checkpoints`, or a step's folder.

    step: None is the newest. Raises UserError if there is none.
    """
    root = _absolute(path)
    if (root / _DATA).exists():
        return root
    if (root / "checkpoints").exists():
        root = root / "checkpoints"
    found = _steps(root)
    if not found:
        raise UserError(f"{path} holds no checkpoint: give a work directory, its checkpoints folder, or one of those.")
    if step is not None and step not in found:
        raise UserError(f"{path} holds no checkpoint of step {step}; it has {', '.join(map(str, sorted(found)))}.")
    return root / str(max(found) if step is None else step)


def steps(workdir: epath.PathLike) -> list[int]:
    """The steps of a work directory's checkpoints, in order; none if there are none."""
    return sorted(_steps(epath.Path(workdir) / "checkpoints"))


def is_checkpoint(path: epath.PathLike) -> bool:
    """Whether it is a work directory with a checkpoint, a folder of checkpoints, or one of them."""
    root = _absolute(path)
    return (root / _DATA).exists() or bool(_steps(root / "checkpoints")) or bool(_steps(root))


def load_data(path: epath.PathLike, step: int | None = None) -> Json:
    """The JSON data of a checkpoint (see `step_folder`), of this version or an earlier one, in today's names.

    Raises:
        UserError: It cannot be read.
    """
    folder = step_folder(path, step)
    try:
        data = cli.upgrade(json.loads((folder / _DATA / "metadata").read_text()))
    except (FileNotFoundError, ValueError) as error:
        raise UserError(f"Checkpoint {folder} is damaged: its data state cannot be read ({error}).") from error
    for source in data.get("sources", {}).values():
        source["source"] = versioned(source["source"])
    return data


def restore_params(path: epath.PathLike, abstract: Any, step: int | None = None) -> Any:
    """The parameters alone, cast to the types and laid out as in `abstract`, a pytree of `jax.ShapeDtypeStruct`.

    path, step: see `step_folder`. Raises UserError if the saved parameters have other names or shapes.
    """
    return _read(step_folder(path, step), {"params": abstract})["params"]


def _read(folder: epath.Path, abstract: Mapping[str, Any]) -> dict[str, Any]:
    """Some items of the checkpoint at `folder`."""
    object_stores.prepare(folder)
    handlers: dict[str, Any] = {name: ocp.StandardCheckpointHandler() for name in abstract}
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler(**handlers)) as reader:
        try:
            for name, tree in abstract.items():
                _check_shapes(folder / name, handlers[name].metadata(folder / name).tree, tree)
            items = {name: ocp.args.StandardRestore(tree) for name, tree in abstract.items()}
            return dict(reader.restore(folder, args=ocp.args.Composite(**items)).items())
        except UserError:
            raise
        except Exception as error:
            problem = integrity.problem(folder)
            if problem is None:
                error.add_note(f"{folder} could not be read. If it stays so, move it away: an older one will be used.")
                raise
            raise UserError(f"Checkpoint {folder} is damaged: {problem}. Use an older one.") from error


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): tuple(leaf.shape) for path, leaf in leaves}


def _check_shapes(item: epath.Path, saved_tree: Any, wanted_tree: Any) -> None:
    saved, wanted = _shapes(saved_tree), _shapes(wanted_tree)
    different = [
        f"{name}: saved {saved.get(name, 'nothing')}, wanted {wanted.get(name, 'nothing')}"
        for name in sorted(saved.keys() | wanted.keys())
        if saved.get(name) != wanted.get(name)
    ]
    if different:
        raise UserError(
            f"{item} has not the arrays that the config describes ({len(different)} differ):\n  "
            + "\n  ".join(different[:10])
            + "\nUse the model and optimizer that it was saved with, or another --workdir."
        )


# Folders and files.


def _absolute(path: epath.PathLike) -> epath.Path:
    """Orbax refuses to read from a relative path."""
    return epath.Path(path if "://" in os.fspath(path) else os.path.abspath(os.path.expanduser(path)))


def _steps(directory: epath.Path) -> list[int]:
    return [int(p.name) for p in directory.iterdir() if p.name.isdecimal()] if directory.exists() else []


def _folders_of(directory: epath.Path, step: int) -> list[epath.Path]:
    """The folder of a step and its unfinished form (one and the same on object stores)."""
    unfinished = f"{step}.orbax-checkpoint-tmp"
    # A bucket has no empty folders.
    found = directory.iterdir() if directory.exists() else ()
    return [p for p in found if p.name == str(step) or p.name.startswith(unfinished)]
