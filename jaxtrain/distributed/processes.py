"""How the run's processes find each other, and how the failure of one ends them all.

Built on JAX's coordination service, which process 0 hosts. A process that fails writes why into the service's store,
where a thread of every other process waits for it: all end within a second, whatever they wait for, in place of
hanging in a collective operation until some time-out. A process that dies without a word, or stops to run, is noticed
by the service's heartbeats: JAX then aborts the others (SIGABRT), with every thread's stack by faulthandler.
"""

import contextlib
import faulthandler
import json
import logging
import os
import socket
import threading
import time
import traceback
from collections.abc import Iterator, Mapping
from typing import Any

import jax
from jax._src import distributed
from jax._src.clusters import ClusterEnv

from jaxtrain.cli.redaction import redact
from jaxtrain.errors import CorruptError, FollowedError, TransientError, UserError

# Without heartbeats of a process for so long all others end. JAX's default of 100 s costs that of every restart; a
# process sends one every third of it, from a thread of its own that neither Python nor a compilation holds up.
HEARTBEAT_SECONDS = 30
# Seconds that a process has to say its own message and to leave, before it is ended where it stands.
LEAVE_SECONDS = 5.0
# A collective operation also fails since another process did: that one's message is given time to arrive.
_ECHO_SECONDS = 2.0
_LISTEN_MILLISECONDS = 3_600_000
_KEY, _HEARD = "jaxtrain/failed", "jaxtrain/heard/"
# How launchers number processes, by (number of processes, this process): ours first.
_NUMBERED = (
    ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID"),
    ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
    ("SLURM_NTASKS", "SLURM_PROCID"),
)

logger = logging.getLogger("jaxtrain")


def join(deterministic: bool) -> None:
    """Join the run's other processes: by JAX_COORDINATOR_ADDRESS, or as the cluster says.

    Clusters are those that JAX knows: SLURM steps, Open MPI, TPU pods by GKE's variables or by Google Cloud's metadata,
    indexed jobs of Kubernetes. A process that is alone joins nothing: its own signal handlers do what JAX's
    pre-emption service is needed for with several (consensus.StopRequest), and more.

    deterministic: only deterministic operations on GPUs. Results of autotuning are kept in the compilation cache.
    Raises UserError if an environment says that there are several processes and not how they meet.
    """
    if deterministic:
        # XLA reads its flags once, when the first device is looked up.
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_deterministic_ops=true".strip()
    arguments = given(os.environ) or _in_cluster(os.environ)
    if arguments is None:
        return
    faulthandler.enable()
    jax.distributed.initialize(**arguments, heartbeat_timeout_seconds=HEARTBEAT_SECONDS)
    _Alarm.start()


def given(environment: Mapping[str, str]) -> dict[str, Any] | None:
    """What jax.distributed.initialize is told where JAX_COORDINATOR_ADDRESS is set. None: not set, or one process.

    The number of processes and this one's may be a launcher's, as in `mpirun -x JAX_COORDINATOR_ADDRESS=HOST:PORT`.
    """
    address = environment.get("JAX_COORDINATOR_ADDRESS")
    if not address:
        return None
    count_name, index_name = next((pair for pair in _NUMBERED if pair[0] in environment), _NUMBERED[0])
    count, index = (_number(environment, name) for name in (count_name, index_name))
    if not 0 <= index < count:
        raise UserError(f"{index_name}={index} is not one of {count_name}={count} processes: they count from 0.")
    if ":" not in address:
        raise UserError(f"JAX_COORDINATOR_ADDRESS={address} has no port: write HOST:PORT, a free one on process 0's.")
    if count == 1:
        return None
    arguments = {"coordinator_address": address, "num_processes": count, "process_id": index}
    # Detection would still tell the processes of a host which GPU is whose; elsewhere it asks a network for nothing.
    if "SLURM_LOCALID" not in environment and "OMPI_COMM_WORLD_LOCAL_RANK" not in environment:
        arguments["cluster_detection_method"] = "deactivate"
    return arguments


def _number(environment: Mapping[str, str], name: str) -> int:
    text = environment.get(name)
    if text is None or not text.isdecimal():
        found = "is not set" if text is None else f"is '{text}'"
        raise UserError(
            f"JAX_COORDINATOR_ADDRESS is set, but {name} {found}. Each process needs the address of process 0, "
            "JAX_NUM_PROCESSES and JAX_PROCESS_ID (or --coordinator, --num_processes, --process_id); one alone: none."
        )
    return int(text)


def _in_cluster(environment: Mapping[str, str]) -> dict[str, Any] | None:
    """The cluster that started this process with others; None where it is alone."""
    for cluster in ClusterEnv._cluster_types:
        # JAX takes every pod of Kubernetes for a part of a job, and fails in those that are not.
        is_pod = cluster.__name__ == "K8sCluster" and "JOB_COMPLETION_INDEX" not in environment
        if cluster.opt_in_only_method or is_pod or not cluster.is_env_present():
            continue
        return {"cluster_detection_method": cluster.name} if cluster.get_process_count() > 1 else None
    # Open MPI 5 no longer says where its first process is.
    fixes = {
        "JAX_NUM_PROCESSES": "--coordinator=HOST:PORT",
        "OMPI_COMM_WORLD_SIZE": "mpirun -x JAX_COORDINATOR_ADDRESS=HOST:PORT",
    }
    for name, fix in fixes.items():
        if environment.get(name, "1") != "1":
            raise UserError(
                f"{name}={environment[name]}, and nothing says where the first process is: give {fix}, its host with "
                "a port that is free there."
            )
    return None


def leave_together() -> None:
    """Waits until all have come to the end: process 0 hosts the service, and the others cannot be without it."""
    if jax.distributed.is_initialized():
        jax.distributed.shutdown()


@contextlib.contextmanager
def failures_told() -> Iterator[None]:
    """An exception inside ends the other processes too, with its message."""
    try:
        yield
    except Exception as error:
        # Its place in the program is in the traceback that this process prints.
        known = isinstance(error, UserError | TransientError | CorruptError | FloatingPointError)
        lines = [str(error)] if known else traceback.format_exception_only(error)
        message = "\n".join([*lines, *(getattr(error, "__notes__", ()) if known else ())]).strip()
        is_echo = isinstance(error, FollowedError | jax.errors.JaxRuntimeError)
        tell(message, 2 if isinstance(error, UserError) else 1, is_echo)
        raise


def _client() -> Any:
    """Of JAX's coordination service; None where a process is alone. The public API has no store."""
    return distributed.global_state.client


def tell(message: str, code: int, is_echo: bool = False) -> None:
    """Ends all other processes with `code`, and this one in LEAVE_SECONDS if it does not leave by itself.

    Returns when the others have heard it. The first process to tell counts; a second one is ended as the others are.
    is_echo: it may be another process's failure that this one saw.
    """
    client = _client()
    if client is None or _Alarm.told:
        return
    _Alarm.told = True
    if is_echo:
        time.sleep(_ECHO_SECONDS)
    told = {"process": jax.process_index(), "host": socket.gethostname(), "code": code, "message": redact(message)}
    try:
        client.key_value_set(_KEY, json.dumps(told))
    except jax.errors.JaxRuntimeError:
        time.sleep(LEAVE_SECONDS)  # another was first, and the alarm ends this process meanwhile
        return
    _wait_until_heard(told["process"])


def _wait_until_heard(failed: int) -> None:
    """On process 0, without which nobody hears anything."""
    if jax.process_index() != 0:
        return
    wanted = jax.process_count() - (1 if failed == 0 else 2)
    deadline = time.monotonic() + LEAVE_SECONDS
    client = _client()
    while len(client.key_value_dir_get(_HEARD)) < wanted and time.monotonic() < deadline:
        time.sleep(0.05)


class _Alarm:
    """The thread that waits for the failure of another process. told: whether this process has failed itself."""

    told = False

    @staticmethod
    def start() -> None:
        threading.Thread(target=_Alarm._listen, name="alarm", daemon=True).start()

    @staticmethod
    def _listen() -> None:
        try:
            text = _client().blocking_key_value_get(_KEY, _LISTEN_MILLISECONDS)
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" in str(error):
                _Alarm._listen()
            return  # the service has ended, after the run or with process 0: then JAX ends this process
        _Alarm._end(json.loads(text))

    @staticmethod
    def _end(told: dict[str, Any]) -> None:
        """Ends this process where it stands: the main thread may wait for what can no longer come."""
        index, failed = jax.process_index(), told["process"]
        if index == failed:
            time.sleep(LEAVE_SECONDS)
            os._exit(told["code"])
        where = f"process {failed} on {told['host']}"
        if index == 0:
            logger.error("%s failed: %s", where.capitalize(), told["message"])
            _wait_until_heard(failed)
        else:
            with contextlib.suppress(jax.errors.JaxRuntimeError):
                _client().key_value_set(f"{_HEARD}{index}", "")
            logger.error("Process %d ends, since %s failed: see its message, or process 0's.", index, where)
        os._exit(told["code"])
