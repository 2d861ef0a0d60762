"""How processes find each other; how one's failure ends the others (whole runs: tests/e2e/test_failures.py)."""

import os
import subprocess
import sys
import time

import pytest
from jax._src.clusters import ClusterEnv

from jaxtrain.cost import hardware, memory
from jaxtrain.distributed import processes
from jaxtrain.distributed.processes import _check_xla_flags, _in_cluster, explicit_arguments
from jaxtrain.errors import UserError
from tests.e2e.runs import LOCAL, ROOT, environment
from tests.tiers import nightly_but

ADDRESS = {"JAX_COORDINATOR_ADDRESS": "host:1234"}
OURS = {"JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "3"}
OPEN_MPI = {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1"}
SLURM = {"SLURM_NTASKS": "8", "SLURM_PROCID": "0"}


@pytest.mark.parametrize(
    ("environment", "numbers"),
    [(OURS, (4, 3)), (OPEN_MPI, (2, 1)), (SLURM, (8, 0)), ({**SLURM, **OURS}, (4, 3)), ({**SLURM, **OPEN_MPI}, (2, 1))],
)
def test_an_address_is_given(environment: dict[str, str], numbers: tuple[int, int]) -> None:
    found = explicit_arguments({**ADDRESS, **environment})
    assert found == {
        "coordinator_address": "host:1234",
        "num_processes": numbers[0],
        "process_id": numbers[1],
        "cluster_detection_method": "deactivate",
    }
    # The cluster still determines which of a host's GPUs are this process's.
    local = {"SLURM_LOCALID": "0"} if "SLURM_NTASKS" in environment else {"OMPI_COMM_WORLD_LOCAL_RANK": "0"}
    assert "cluster_detection_method" not in (explicit_arguments({**ADDRESS, **environment, **local}) or {})


def test_none_is_given() -> None:
    assert explicit_arguments({}) is None
    assert explicit_arguments({**OURS, "JAX_COORDINATOR_ADDRESS": ""}) is None
    assert explicit_arguments({**ADDRESS, "JAX_NUM_PROCESSES": "1", "JAX_PROCESS_ID": "0"}) is None


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        (ADDRESS, "JAX_NUM_PROCESSES is not set"),
        ({**ADDRESS, "JAX_NUM_PROCESSES": "2"}, "JAX_PROCESS_ID is not set"),
        ({**ADDRESS, "JAX_NUM_PROCESSES": "two", "JAX_PROCESS_ID": "0"}, "JAX_NUM_PROCESSES is 'two'"),
        ({**ADDRESS, "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "2"}, "JAX_PROCESS_ID=2 is not one of .*=2 proc"),
        ({**OURS, "JAX_COORDINATOR_ADDRESS": "host"}, "host has no port"),
    ],
)
def test_what_is_given_is_not_enough(environment: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        explicit_arguments(environment)


def test_a_process_id_alone() -> None:
    with pytest.raises(UserError, match="JAX_PROCESS_ID=1 is set without JAX_NUM_PROCESSES"):
        _in_cluster({"JAX_PROCESS_ID": "1"})
    assert _in_cluster({}) is None


def test_xla_flags() -> None:
    _check_xla_flags("")
    _check_xla_flags("--xla_force_host_platform_device_count=8 --xla_gpu_deterministic_ops=true --xla_dump_to='a b'")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--xla_dump_to=x --xla_gpu_deterministic_op=true", "no flag --xla_gpu_deterministic_op;"),
        ("--xla_dump_to=x --xla_gpu_deterministic_ops=perhaps", r"=perhaps: XLA cannot read the value"),
        ("--xla_gpu_autotune_level=high", "XLA_FLAGS=--xla_gpu_autotune_level=high: XLA cannot read the value"),
        ("--xla_dump_to", "no flag --xla_dump_to, or has no value: flags have the form --NAME=VALUE"),
        ("xla_dump_to=x", r"anything else names a file\. There is none"),
    ],
)
def test_xla_flags_that_xla_cannot_read(flags: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        _check_xla_flags(flags)


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ({}, {"XLA_CLIENT_MEM_FRACTION": "0.92"}),
        ({"XLA_CLIENT_MEM_FRACTION": ".5"}, {"XLA_CLIENT_MEM_FRACTION": ".5"}),
        ({"XLA_PYTHON_CLIENT_MEM_FRACTION": ".5"}, {"XLA_PYTHON_CLIENT_MEM_FRACTION": ".5"}),
    ],
)
def test_xlas_share_of_a_gpu(given: dict[str, str], found: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """JAX refuses both variables together."""
    for name in processes.SHARE_VARIABLES:
        monkeypatch.setenv(name, given.get(name, ""))
    processes.join(deterministic=False)
    assert {name: os.environ[name] for name in processes.SHARE_VARIABLES if os.environ[name]} == found
    limit = memory.limit_of_chip(hardware.BY_NAME["h200"], None)
    assert limit == pytest.approx(0.92 * float(next(iter(found.values()))) * hardware.BY_NAME["h200"].memory)


@pytest.mark.parametrize("platform", ["foo", "cuda"])
def test_a_platform_that_is_not_there(platform: str) -> None:
    script = """
from jaxtrain.distributed import processes, sharding
from jaxtrain.errors import UserError
for look in (sharding.MeshConfig().build, lambda: processes.join(deterministic=False)):
    try:
        look()
    except UserError as error:
        print(error)
"""
    command = [sys.executable, "-c", script]
    variables = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": platform}
    found = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, env=variables)
    lines = found.stdout.splitlines()
    assert len(lines) == 2, found.stderr
    assert all(line.startswith(f"JAX_PLATFORMS={platform}") and "set JAX_PLATFORMS=cpu" in line for line in lines)


class _Cluster:
    """A cluster that JAX might detect."""

    opt_in_only_method = False

    def __init__(self, name: str, count: int):
        self.name = name
        self.__name__ = {"k8s": "K8sCluster"}.get(name, "")
        self.count = count

    def is_env_present(self) -> bool:
        return self.count > 0

    def get_process_count(self) -> int:
        return self.count


@pytest.mark.parametrize(
    ("name", "count", "environment", "method"),
    [
        ("gcetpu", 4, {}, "gcetpu"),  # a TPU pod slice, detected by its metadata: nothing in the environment
        ("gcetpu", 1, {}, None),
        ("slurm", 2, {}, "slurm"),
        ("slurm", 0, {}, None),
        ("k8s", 2, {}, None),
        ("k8s", 2, {"JOB_COMPLETION_INDEX": "1"}, "k8s"),
    ],
)
def test_a_cluster_is_detected(
    name: str, count: int, environment: dict[str, str], method: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ClusterEnv, "_cluster_types", [_Cluster("other", 0), _Cluster(name, count)])
    found = _in_cluster(environment)
    assert (found or {}).get("cluster_detection_method") == method


def test_jax_knows_the_clusters() -> None:
    """JAX's private list: the names that launch/ and docs/launch.md rely on."""
    known = {"OmpiCluster", "SlurmCluster", "GceTpuCluster", "GkeTpuCluster", "K8sCluster"}
    assert known <= {cluster.__name__ for cluster in ClusterEnv._cluster_types}


@pytest.mark.parametrize("environment", [OPEN_MPI, OURS])
def test_several_processes_that_cannot_meet(environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ClusterEnv, "_cluster_types", [])
    with pytest.raises(UserError, match=r"the first process's address is not set.*HOST:PORT"):
        _in_cluster(environment)


def run(processes: int, failing: str) -> tuple[int, str]:
    """The exit code, and the output of all processes."""
    command = [str(LOCAL), str(processes), sys.executable, "-m", "tests.failing_process", failing]
    output, error = subprocess.PIPE, subprocess.STDOUT
    done = subprocess.run(command, cwd=ROOT, env=environment({}), stdout=output, stderr=error, text=True, timeout=300)
    if "failed " in done.stdout:
        seconds = time.time() - float(done.stdout.split("failed ")[1].split()[0])
        print(f"\n{processes} processes, {failing}: all ended after {seconds:.2f} s with {done.returncode}")
    return done.returncode, done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(("how", "kind", "code"), [("error", "ValueError: a fault", 1), ("mistake", "a mistake", 2)])
@pytest.mark.parametrize(("processes", "failed"), nightly_but([(2, 1), (4, 0)], [(2, 0), (2, 1), (4, 0), (4, 2)]))
def test_a_failure_ends_all_with_its_message(processes: int, failed: int, how: str, kind: str, code: int) -> None:
    got, output = run(processes, f"{failed}:{how}")
    assert got == code, output
    assert output.count("Traceback") == (how == "error"), output
    # From the process itself, and from process 0, whose log is the run's.
    assert output.count(f"{kind} ") == (2 if failed else 1), output
    assert output.count(f"Process {failed} on ") == bool(failed), output
    for other in {*range(1, processes)} - {failed}:
        assert f"Process {other} exits because process {failed} on " in output
    assert "left together" not in output


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "processes", "failed"),
    nightly_but(
        [("kill", 2, 0), ("stop", 4, 2)],
        [(how, *which) for how in ("kill", "stop") for which in ((2, 0), (2, 1), (4, 2))],
    ),
)
def test_a_process_that_is_gone_ends_all(how: str, processes: int, failed: int) -> None:
    code, output = run(processes, f"{failed}:{how}")
    assert code not in (0, 2, 75), output
    assert "left together" not in output


@pytest.mark.slow
def test_all_leave_together() -> None:
    code, output = run(4, "0:nothing")
    assert code == 0, output
    assert output.count("left together") == 4
