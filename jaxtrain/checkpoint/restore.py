"""Reading checkpoints, of this run or any other."""

import json
import os
from collections.abc import Mapping
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from jaxtrain import cli
from jaxtrain.checkpoint import integrity, storage
from jaxtrain.distributed.consensus import any_process
from jaxtrain.errors import UserError
from jaxtrain.interfaces import Json, versioned

DATA = "data"


def is_checkpoint(path: epath.PathLike) -> bool:
    """Whether the path is a work directory with a checkpoint, a folder of checkpoints, or a checkpoint."""
    root = absolute(path)
    return (root / DATA).exists() or bool(steps_in(root / "checkpoints")) or bool(steps_in(root))


def steps(workdir: epath.PathLike) -> list[int]:
    """The steps of a work directory's checkpoints, in order."""
    return sorted(steps_in(epath.Path(workdir) / "checkpoints"))


def step_folder(path: epath.PathLike, step: int | None = None) -> epath.Path:
    """The folder of one checkpoint.

    Args:
        path: A work directory, its `checkpoints`, or a step's folder.
        step: None is the newest.

    Raises:
        UserError: There is no checkpoint.
    """
    root = absolute(path)
    if (root / DATA).exists():
        return root
    if (root / "checkpoints").exists():
        root = root / "checkpoints"
    found = steps_in(root)
    if not found:
        raise UserError(f"{path} holds no checkpoint: give a work directory, its checkpoints folder, or one of those.")
    if step is not None and step not in found:
        raise UserError(f"{path} holds no checkpoint of step {step}; it has {', '.join(map(str, sorted(found)))}.")
    return root / str(max(found) if step is None else step)


def load_data(path: epath.PathLike, step: int | None = None) -> Json:
    """The JSON data of a checkpoint of this version or an earlier one, in current names.

    Args:
        path: See `step_folder`.
        step: See `step_folder`.

    Raises:
        UserError: There is no checkpoint, or its data cannot be read.
    """
    folder = step_folder(path, step)
    try:
        data = cli.upgrade(json.loads((folder / DATA / "metadata").read_text()))
    except (FileNotFoundError, ValueError) as error:
        raise UserError(f"Checkpoint {folder} is damaged: its data state cannot be read ({error}).") from error
    for source in data.get("sources", {}).values():
        source["source"] = versioned(source["source"])
    return data


def restore_params(path: epath.PathLike, abstract: Any, step: int | None = None) -> Any:
    """The parameters of a checkpoint. All processes of a run call it and share the reading of checksums.

    Args:
        path: See `step_folder`.
        abstract: A pytree of `jax.ShapeDtypeStruct` with shardings; arrays are cast to its types.
        step: See `step_folder`.

    Raises:
        UserError: The checkpoint is damaged, or its parameters have other names or shapes.
    """
    folder = step_folder(path, step)
    storage.for_orbax(folder)
    if integrity.is_listed(folder):
        problem = integrity.problem(folder, jax.process_index(), jax.process_count())
        if any_process(problem is not None):
            raise UserError(
                f"Checkpoint {folder} is damaged: {problem or 'see the message of another process'}. Use another step."
            )
    return read(folder, {"params": abstract})["params"]


def read(folder: epath.Path, abstract: Mapping[str, Any]) -> dict[str, Any]:
    """Some items of a checkpoint, without verifying its files.

    Args:
        folder: The step's.
        abstract: For each item a pytree of `jax.ShapeDtypeStruct` with shardings.

    Raises:
        UserError: A saved array has another name or shape.
    """
    handlers: dict[str, Any] = {name: ocp.StandardCheckpointHandler() for name in abstract}
    place = storage.for_orbax(folder)
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler(**handlers)) as reader:
        try:
            for name, tree in abstract.items():
                _check_shapes(folder / name, handlers[name].metadata(place / name).tree, tree)
            items = {name: ocp.args.StandardRestore(tree) for name, tree in abstract.items()}
            return dict(reader.restore(place, args=ocp.args.Composite(**items)).items())
        except UserError:
            raise
        except Exception as error:
            error.add_note(f"{folder} could not be read. If this persists, move it away: an older one will be used.")
            raise


def _check_shapes(item: epath.Path, saved_tree: Any, wanted_tree: Any) -> None:
    def shapes(tree: Any) -> dict[str, tuple[int, ...]]:
        leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
        return {jax.tree_util.keystr(path, simple=True, separator="/"): tuple(leaf.shape) for path, leaf in leaves}

    saved, wanted = shapes(saved_tree), shapes(wanted_tree)
    different = [
        f"{name}: saved {saved.get(name, 'nothing')}, expected {wanted.get(name, 'nothing')}"
        for name in sorted(saved.keys() | wanted.keys())
        if saved.get(name) != wanted.get(name)
    ]
    if different:
        raise UserError(
            f"The arrays in {item} do not match the config ({len(different)} differ):\n  "
            + "\n  ".join(different[:10])
            + "\nUse the model and optimizer of the run that saved it, or another --workdir."
        )


def steps_in(directory: epath.Path) -> list[int]:
    """The steps of a folder of checkpoints, in any order."""
    return [int(p.name) for p in directory.iterdir() if p.name.isdecimal()] if directory.is_dir() else []


def absolute(path: epath.PathLike) -> epath.Path:
    """The path in the form that Orbax accepts: absolute, or a URL."""
    return epath.Path(path if "://" in os.fspath(path) else os.path.abspath(os.path.expanduser(path)))
