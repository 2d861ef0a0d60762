"""A stand-in for a training run, for the tests in test_stopping.py that stop and kill whole processes.

`python -m tests.stoppable_run PROCESSES INDEX PORT FOLDER MODE` prints `step N` before and `saved N` after each save.
MODE `stop` counts up until a signal stops it, `stuck` ignores the first signal, and `save` saves all the time.
"""

import sys
import time

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jaxtrain.checkpoint.checkpointer import CheckpointConfig


def state_at(step: int, mesh: jax.sharding.Mesh) -> dict:
    def full(shape: tuple[int, ...], *spec: str) -> jax.Array:
        value = np.full(shape, step, np.float32)
        return jax.make_array_from_callback(shape, NamedSharding(mesh, PartitionSpec(*spec)), lambda i: value[i])

    return {"params": {"w": full((1 << 20,), "data")}, "meta": {"step": full(())}}


def main(processes: int, index: int, port: int, folder: str, mode: str) -> int:
    if processes > 1:
        jax.distributed.initialize(f"127.0.0.1:{port}", processes, index, heartbeat_timeout_seconds=10)
    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    checkpointer = CheckpointConfig(every_steps=10**9).build(folder)
    step = checkpointer.latest_step() or 0
    if step:
        abstract = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state_at(step, mesh)
        )
        state = checkpointer.restore(step, abstract)
        restored = {float(x) for shard in state["params"]["w"].addressable_shards for x in np.unique(shard.data)}
        assert restored == {float(step)}, (restored, step)
        assert checkpointer.restore_data(step) == {"step": step}
        print(f"restored {step}", flush=True)
    while True:
        step += 1
        time.sleep(0.02)
        print(f"step {step}", flush=True)
        stop = checkpointer.reached_preemption(step) and mode != "stuck"
        if stop or mode == "save":
            checkpointer.save(step, state_at(step, mesh), {"step": step})
            checkpointer.wait()
            print(f"saved {step}", flush=True)
        if stop:
            checkpointer.close()
            return 75


if __name__ == "__main__":
    processes, index, port, folder, mode = sys.argv[1:]
    sys.exit(main(int(processes), int(index), int(port), folder, mode))
