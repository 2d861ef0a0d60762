"""`bench checkpoint`: how long an asynchronous save blocks training, and its total time, by size of state."""

import tempfile
import time
from typing import Any

import jax
import numpy as np
from etils import epath

from jaxtrain.checkpoint import integrity
from jaxtrain.checkpoint.checkpointer import CheckpointConfig
from jaxtrain.cli import Command, Flag, Flags
from jaxtrain.distributed.sharding import MeshConfig, replicated
from jaxtrain.interfaces import Json
from tools.bench.common import at_least_one, median, progress, result, rounds_flag

COMMAND = Command(
    name="python -m tools.bench checkpoint",
    description="Saves and restores train states of several sizes: the seconds a save blocks and runs in the "
    "background, and the seconds to verify and restore (files may still be in the page cache).",
    examples=(
        "python -m tools.bench checkpoint",
        "python -m tools.bench checkpoint --megabytes=64,1024 --folder=/mnt/disk",
    ),
    flags=(
        Flag(name="megabytes", type=tuple[int, ...], default=(16, 128, 512), help="sizes of the states"),
        Flag(name="folder", type=str | None, default=None, help="where to write; a temporary folder by default"),
        rounds_flag(3),
    ),
    config="none",
)
_LAYERS = 8
_OTHERS = {"data": {"lanes": list(range(64 * 10))}}  # about the size of the data state of 64 lanes


def measure(flags: Flags) -> Json:
    at_least_one(rounds=flags.rounds, megabytes=min(flags.megabytes, default=0))
    sizes = [measure_size(megabytes, flags.rounds, flags.folder) for megabytes in flags.megabytes]
    return result("checkpoint", {"sizes": sizes}, device=True)


def measure_size(megabytes: int, rounds: int, folder: str | None) -> Json:
    """Measures one size of state. Returns medians over the rounds."""
    state = _state(megabytes)
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), state)
    seconds: dict[str, list[float]] = {"blocking": [], "background": [], "verify": [], "restore": []}
    with tempfile.TemporaryDirectory(dir=folder) as directory:
        checkpointer = CheckpointConfig(keep=1).build(f"{directory}/checkpoints")
        restored = None
        # The first save also starts Orbax's threads.
        for step in range(rounds + 1):
            begun = time.perf_counter()
            checkpointer.save(step, state, _OTHERS)
            blocked = time.perf_counter()
            checkpointer.wait()
            written = time.perf_counter()
            assert integrity.problem(epath.Path(directory) / "checkpoints" / str(step)) is None
            verified = time.perf_counter()
            restored = checkpointer.restore(step, shapes)
            jax.block_until_ready(restored)
            read = time.perf_counter()
            if step:
                spent = (blocked - begun, written - blocked, verified - written, read - verified)
                for name, each in zip(seconds, spent, strict=True):
                    seconds[name].append(each)
        checkpointer.close()
    same = jax.tree.map(lambda a, b: bool((np.asarray(a) == np.asarray(b)).all()), state, restored)
    found = {f"{name}_seconds": median(values) for name, values in seconds.items()}
    progress(f"{megabytes} MB: {found}")
    return {"megabytes": megabytes, **found, "restored_bit_for_bit": all(jax.tree.leaves(same))}


def _state(megabytes: int) -> dict[str, Any]:
    """Returns parameters and two moments, each in `_LAYERS` fp32 arrays, of `megabytes` in total."""
    whole = replicated(MeshConfig().build(jax.devices()[:1]))
    numbers = max(megabytes * 1_000_000 // (4 * 3 * _LAYERS), 1)
    rng = np.random.default_rng(0)

    def tree() -> dict[str, jax.Array]:
        return {f"layer_{i}": jax.device_put(rng.standard_normal(numbers, np.float32), whole) for i in range(_LAYERS)}

    step = jax.device_put(np.int32(0), whole)
    return {"params": tree(), "opt": {"mu": tree(), "nu": tree()}, "meta": {"step": step}}
