"""Several processes (gloo on the loopback interface, launched as users do) train on the same batches as one process."""

import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest

from tests.e2e.conftest import MakeRun
from tests.e2e.runs import LOCAL, ROOT, STOPPED, Run, documents, environment
from tests.hub import LoopbackHub, parquet_bytes
from tests.tiers import nightly_but


def assert_same_batches(run: Run, reference: Run) -> None:
    """Asserts equal fingerprints at all steps."""
    mine, theirs = run.steps(), reference.steps()
    for key in ("step", "fingerprint", "tokens", "sources", "stage"):
        assert [line[key] for line in mine] == [line[key] for line in theirs]
    assert run.data_state()["lanes"] == reference.data_state()["lanes"]


def assert_same_data(run: Run, reference: Run) -> None:
    """Asserts equal fingerprints at all steps, and losses equal within rounding: devices sum in another order."""
    assert_same_batches(run, reference)
    mine, theirs = run.steps(), reference.steps()
    np.testing.assert_allclose([line["loss"] for line in mine], [line["loss"] for line in theirs], rtol=2e-3)


def stop_after(run: Run, step: int, number: signal.Signals) -> int:
    """Stops all processes of a run with one signal to the launcher. Returns the step they saved."""
    run.start()
    assert run.wait_for_step(step), run.output
    run.signal(number)
    assert run.wait() == STOPPED, run.output
    assert run.checkpoints()[-1] == run.last_step()
    return run.last_step()


@pytest.mark.slow
def test_two_processes_then_one(make_run: MakeRun, reference: Run) -> None:
    run = make_run(processes=2, devices=2)
    run.module = "jaxtrain.main"  # without the tests' own code
    stopped = stop_after(run, 18, signal.SIGTERM)
    assert run.output.count(f"Step {stopped}: Loss") == 1  # one process prints
    alone = make_run()
    assert alone.workdir == run.workdir
    alone()
    assert_same_data(alone, reference)


# All processes together have 4 devices, so that each mesh fits any number of processes. In the runs below, 2 and 4
# processes train on each mesh (4 on fsdp with eight devices) and one process on two of them (trainer/test_step.py has
# all of them on one process), through a stage change after step 16 or 36.
MESHES = {
    "data": ("--config.mesh.data=4", "--config.mesh.fsdp=1"),
    "fsdp": ("--config.mesh.fsdp=4",),
    "tensor": ("--config.mesh.fsdp=2", "--config.mesh.tensor=2"),
    "context": ("--config.mesh.data=2", "--config.mesh.fsdp=1", "--config.mesh.context=2"),
}


@pytest.mark.nightly
@pytest.mark.parametrize(("count", "number"), [(1, signal.SIGTERM), (2, signal.SIGINT)])
def test_four_processes_then_fewer(make_run: MakeRun, reference: Run, count: int, number: signal.Signals) -> None:
    """From eight devices to four."""
    run = make_run(processes=4, devices=2)
    stop_after(run, 10, number)
    fewer = make_run(processes=count, devices=4 // count)
    fewer(*MESHES["context"])
    assert_same_data(fewer, reference)


@pytest.mark.slow
def test_windows_in_some_layers_resume_on_another_mesh(make_run: MakeRun, reference: Run) -> None:
    """Killed on one mesh and resumed on another, it trains on the batches of any other model."""
    windows = ("--config.model.num_layers=3", "--config.model.layers=1 local : 1 global")
    windows = (*windows, "--config.model.sliding_window=8")
    run = make_run(processes=2, devices=2)
    run.start(*windows, *MESHES["context"])
    assert run.wait_for_step(17), run.output
    run.kill()
    alone = make_run(devices=4)
    alone(*windows, *MESHES["tensor"])
    assert_same_batches(alone, reference)


@pytest.mark.slow
def test_four_then_one_then_two(make_run: MakeRun, reference: Run) -> None:
    """Each time, SIGTERM goes to a single process, and the mesh changes."""
    for processes, mesh, step in ((4, "context", 17), (1, "tensor", 37)):
        run = make_run(processes=processes, devices=4 // processes)
        run.start(*MESHES[mesh])
        assert run.wait_for_step(step), run.output
        run.signal_one(signal.SIGTERM)
        assert run.wait() == STOPPED, run.output
        assert run.checkpoints()[-1] == run.last_step()
    run = make_run(processes=2, devices=2)(*MESHES["fsdp"])
    assert_same_data(run, reference)


@pytest.mark.nightly
def test_four_processes_to_the_end(make_run: MakeRun, reference: Run) -> None:
    """On eight devices, with pure FSDP."""
    run = make_run(processes=4, devices=2)
    run()
    assert_same_data(run, reference)


@pytest.mark.slow
@pytest.mark.parametrize("processes", nightly_but([2], [2, 4]))
def test_one_is_killed_and_the_run_goes_on_on_another_mesh(make_run: MakeRun, reference: Run, processes: int) -> None:
    """The survivors cannot continue. The launcher ends them and its exit code requests a restart, which resumes."""
    run = make_run(processes=processes, devices=4 // processes)
    run.start(*MESHES["data"])
    assert run.wait_for_step(18), run.output
    run.kill_one()
    assert run.wait() not in (0, 2, STOPPED)
    assert run.checkpoints()
    run(*MESHES["tensor"])
    assert_same_data(run, reference)


@pytest.mark.slow
def test_a_mistake_is_said_once_for_all(make_run: MakeRun) -> None:
    run = make_run(processes=2)
    run("--config.data.sources.web.name=e2e/wep", code=2)
    assert run.output.count("e2e/wep does not exist") == 1, run.output
    assert "Traceback" not in run.output
    shutil.rmtree(run.workdir)


CUT = """
import os
from jax.experimental import multihost_utils
from jaxtrain import cli
from jaxtrain.distributed import processes
from jaxtrain.trainer import open_data
processes.join(deterministic=False)
config = cli.load("tests/e2e/configs/tiny.py:none", ["--config.data.sources.web.name=e2e/many"])
readers = open_data.build(config, open_data.resolve(config, None), {}, {})
counts = [len(reader.partition.units) for reader in readers]
os.write(1, f"units: {counts}\\n".encode())  # one write: the processes share the pipe
multihost_utils.sync_global_devices("end")  # the first to leave would take the others with it
cli.leave(0)
"""


@pytest.mark.slow
def test_one_process_asks_how_many_rows_there_are(datasets: LoopbackHub) -> None:
    """No file is requested more often, however many processes cut the sources."""
    many = {f"data/train-{n:02}.parquet": parquet_bytes(documents(n, 24), row_group_size=12) for n in range(12)}
    datasets.commit("e2e/many", many)
    asked = []
    for processes in (1, 2, 4):
        before = datasets.count("/resolve/")
        command = [*([str(LOCAL), str(processes)] if processes > 1 else []), sys.executable, "-c", CUT]
        env = environment(datasets.env())
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("units: [24, 1, 1]") == processes
        asked.append(datasets.count("/resolve/") - before)
    assert asked[0] > 12
    assert asked == asked[:1] * 3
