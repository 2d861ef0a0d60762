"""How the processes of a run find each other, and how the failure of one ends them all.

Built on JAX's coordination service, which process 0 hosts. A process that fails writes the reason into the service's
store, where a thread of every other process waits for it: all end within a second, whatever they are doing, instead of
hanging in a collective operation until a timeout. A process that dies silently or stalls is noticed by the service's
heartbeats: JAX then aborts the others (SIGABRT), and faulthandler prints every thread's stack.
"""

import contextlib
import faulthandler
import functools
import json
import logging
import os
import re
import socket
import subprocess
import sys
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

# Without a process's heartbeat for this long all others end. JAX's default of 100 s would be lost at every restart. A
# heartbeat is sent every third of it, from a thread that neither Python nor a compilation blocks.
HEARTBEAT_SECONDS = 30
# A process has this long to print its own message and exit before it is killed.
LEAVE_SECONDS = 5.0
# A collective operation also fails because another process did: that one's message gets time to arrive.
_ECHO_SECONDS = 2.0
_LISTEN_MILLISECONDS = 3_600_000
# XLA takes this share of a GPU's memory at the start, unless the environment says otherwise (its own default is 0.75).
# The rest is for CUDA's context, cuBLAS, cuDNN and NCCL: 11 GB of an H200, 2 GB of an RTX 4090.
GPU_SHARE = 0.92
SHARE_VARIABLES = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")  # at most one may be set
_KEY, _HEARD = "jaxtrain/failed", "jaxtrain/heard/"
# How launchers number processes, by (number of processes, this process): ours first.
_NUMBERED = (
    ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID"),
    ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
    ("SLURM_NTASKS", "SLURM_PROCID"),
)

logger = logging.getLogger("jaxtrain")


def join(deterministic: bool) -> None:
    """Joins the run's other processes, through JAX_COORDINATOR_ADDRESS or a cluster.

    JAX detects these clusters: SLURM steps, Open MPI, TPU pods (GKE's variables or Google Cloud's metadata),
    indexed Kubernetes jobs. A single process joins nothing: its own signal handlers (consensus.StopRequest) do more
    than JAX's preemption service.

    Args:
        deterministic: Use only deterministic operations on GPUs. The compilation cache keeps the results of autotuning.

    Raises:
        UserError: The environment has several processes but no address for them, or names a missing platform or an
            XLA flag that XLA cannot read.
    """
    _check_xla_flags(os.environ.get("XLA_FLAGS", ""))
    if deterministic:
        # XLA reads its flags once, when the first device is looked up.
        # Not xla_gpu_deterministic_ops, which also turns autotuning off.
        flags = os.environ.get("XLA_FLAGS", "")
        os.environ["XLA_FLAGS"] = f"{flags} --xla_gpu_exclude_nondeterministic_ops=true".strip()
    if not any(map(os.environ.get, SHARE_VARIABLES)):
        os.environ[SHARE_VARIABLES[0]] = str(GPU_SHARE)
    arguments = explicit_arguments(os.environ) or _in_cluster(os.environ)
    if arguments is not None:
        faulthandler.enable()
        jax.distributed.initialize(**arguments, heartbeat_timeout_seconds=HEARTBEAT_SECONDS)
        _Alarm.start()
    devices()


@functools.cache
def _check_xla_flags(flags: str) -> None:
    """Refuses flags that XLA cannot read, for which it would end the process with a list of all its flags.

    XLA offers neither a list of its flags nor a way to parse them without that end, so another process does it.
    """
    if not flags.strip():
        return
    parse = [sys.executable, "-c", "from jaxlib import _jax; _jax.CompileOptions()"]
    answer = subprocess.run(
        parse, env={**os.environ, "XLA_FLAGS": flags}, capture_output=True, text=True, errors="replace"
    )
    if "Could not open file" in answer.stderr:
        raise UserError(f"XLA_FLAGS={flags}: flags start with --xla_; anything else names a file. There is none.")
    if unknown := re.search(r"Unknown flags? in XLA_FLAGS: (--)?([^\s=]+)(=?)", answer.stderr):
        form = "" if unknown[3] else ", or has no value: flags have the form --NAME=VALUE"
        raise UserError(
            f"XLA_FLAGS={flags}: this version of XLA has no flag --{unknown[2]}{form}; remove or correct it."
        )
    if "Flag parsing failed" in answer.stderr:
        if len(flags.split()) > 1:
            for flag in flags.split():  # to name it
                _check_xla_flags(flag)
        raise UserError(f"XLA_FLAGS={flags}: XLA cannot read the value; remove or correct it.")


def devices() -> list[Any]:
    """All devices of the run.

    Raises:
        UserError: The environment names a missing platform or an XLA flag that XLA cannot read.
    """
    _check_xla_flags(os.environ.get("XLA_FLAGS", ""))
    platforms = os.environ.get("JAX_PLATFORMS", "")
    try:
        return jax.devices()
    except (RuntimeError, AssertionError) as error:
        # If no platform is named, or if it exists and fails (a driver, a device in use), a restart may help.
        if platforms and re.search(r"not in the list of known|no supported devices|Failed to open|^$", str(error)):
            reason = f": {error}" if str(error) else f", and no {platforms} device or plugin is installed here"
            raise UserError(
                f"JAX_PLATFORMS={platforms}{reason}. Install jax[cuda13] or jax[tpu], or set JAX_PLATFORMS=cpu."
            ) from error
        raise


def explicit_arguments(environment: Mapping[str, str]) -> dict[str, Any] | None:
    """Arguments of jax.distributed.initialize from JAX_COORDINATOR_ADDRESS. None: not set, or one process.

    The count and index may also be a launcher's, as in `mpirun -x JAX_COORDINATOR_ADDRESS=HOST:PORT`.
    """
    address = environment.get("JAX_COORDINATOR_ADDRESS")
    if not address:
        return None
    count_name, index_name = next((pair for pair in _NUMBERED if pair[0] in environment), _NUMBERED[0])
    count, index = (_number(environment, name) for name in (count_name, index_name))
    if not 0 <= index < count:
        raise UserError(f"{index_name}={index} is not one of {count_name}={count} processes: numbers start at 0.")
    if ":" not in address:
        raise UserError(f"JAX_COORDINATOR_ADDRESS={address} has no port: write HOST:PORT, a free port of that host.")
    if count == 1:
        return None
    arguments = {"coordinator_address": address, "num_processes": count, "process_id": index}
    # Detection still assigns a host's GPUs to its processes; elsewhere it would query a network for nothing.
    if "SLURM_LOCALID" not in environment and "OMPI_COMM_WORLD_LOCAL_RANK" not in environment:
        arguments["cluster_detection_method"] = "deactivate"
    return arguments


def _number(environment: Mapping[str, str], name: str) -> int:
    text = environment.get(name)
    if text is None or not text.isdecimal():
        found = "is not set" if text is None else f"is '{text}'"
        raise UserError(
            f"JAX_COORDINATOR_ADDRESS is set, but {name} {found}. Each process needs the address of process 0, "
            "JAX_NUM_PROCESSES and JAX_PROCESS_ID (or --coordinator, --num_processes, --process_id); or none of "
            "them for a single process."
        )
    return int(text)


def _in_cluster(environment: Mapping[str, str]) -> dict[str, Any] | None:
    """The cluster that started this process with others; None if it is alone."""
    for cluster in ClusterEnv._cluster_types:
        # JAX treats every Kubernetes pod as part of a job, and fails in other pods.
        is_pod = cluster.__name__ == "K8sCluster" and "JOB_COMPLETION_INDEX" not in environment
        if cluster.opt_in_only_method or is_pod or not cluster.is_env_present():
            continue
        return {"cluster_detection_method": cluster.name} if cluster.get_process_count() > 1 else None
    # Open MPI 5 no longer sets the address of its first process.
    fixes = {
        "JAX_NUM_PROCESSES": "--coordinator=HOST:PORT",
        "OMPI_COMM_WORLD_SIZE": "mpirun -x JAX_COORDINATOR_ADDRESS=HOST:PORT",
    }
    for name, fix in fixes.items():
        if environment.get(name, "1") != "1":
            raise UserError(
                f"{name}={environment[name]}, but the first process's address is not set: give {fix}, its host with a "
                "free port there."
            )
    if "JAX_PROCESS_ID" in environment and "JAX_NUM_PROCESSES" not in environment:
        raise UserError(
            f"JAX_PROCESS_ID={environment['JAX_PROCESS_ID']} is set without JAX_NUM_PROCESSES and "
            "JAX_COORDINATOR_ADDRESS: set all three (or --process_id, --num_processes, --coordinator), or none if this "
            "is the only process."
        )
    return None


def exit_together() -> None:
    """Waits until all have reached the end: process 0 hosts the service, which the others need."""
    if jax.distributed.is_initialized():
        jax.distributed.shutdown()


@contextlib.contextmanager
def failures_announced() -> Iterator[None]:
    """An exception inside also ends the other processes, which print its message."""
    try:
        yield
    except Exception as error:
        # This process prints the traceback.
        known = isinstance(error, UserError | TransientError | CorruptError | FloatingPointError)
        lines = [str(error)] if known else traceback.format_exception_only(error)
        message = "\n".join([*lines, *(getattr(error, "__notes__", ()) if known else ())]).strip()
        is_echo = isinstance(error, FollowedError | jax.errors.JaxRuntimeError)
        announce_failure(message, 2 if isinstance(error, UserError) else 1, is_echo)
        raise


def _client() -> Any:
    """The client of JAX's coordination service, None for a single process. The public API has no store."""
    return distributed.global_state.client


def announce_failure(message: str, code: int, is_echo: bool = False) -> None:
    """Ends all other processes with `code`, and this one after LEAVE_SECONDS if it has not exited.

    Returns once the others have received it. The first process to call this counts; a second one ends like the others.

    Args:
        message: Why, for the others to print.
        code: The exit code.
        is_echo: Whether the failure may only be a consequence of another process's failure.
    """
    client = _client()
    if client is None or _Alarm.announced:
        return
    _Alarm.announced = True
    if is_echo:
        time.sleep(_ECHO_SECONDS)
    failure = {"process": jax.process_index(), "host": socket.gethostname(), "code": code, "message": redact(message)}
    try:
        client.key_value_set(_KEY, json.dumps(failure))
    except jax.errors.JaxRuntimeError:
        time.sleep(LEAVE_SECONDS)  # another was first, and the alarm ends this process
        return
    _wait_until_heard(failure["process"])


def _wait_until_heard(failed: int) -> None:
    """Keeps process 0, which hosts the store, until the others have read it."""
    if jax.process_index() != 0:
        return
    wanted = jax.process_count() - (1 if failed == 0 else 2)
    deadline = time.monotonic() + LEAVE_SECONDS
    client = _client()
    while len(client.key_value_dir_get(_HEARD)) < wanted and time.monotonic() < deadline:
        time.sleep(0.05)


class _Alarm:
    """A thread that waits for the failure of another process. announced: Whether this process has announced its own."""

    announced = False

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
            return  # the service has ended, after the run or with process 0, in which case JAX ends this process
        _Alarm._end(json.loads(text))

    @staticmethod
    def _end(failure: dict[str, Any]) -> None:
        """Ends this process at once: the main thread may be waiting for another process."""
        index, failed = jax.process_index(), failure["process"]
        if index == failed:
            time.sleep(LEAVE_SECONDS)
            os._exit(failure["code"])
        where = f"process {failed} on {failure['host']}"
        if index == 0:
            logger.error("%s failed: %s", where.capitalize(), failure["message"])
            _wait_until_heard(failed)
        else:
            with contextlib.suppress(jax.errors.JaxRuntimeError):
                _client().key_value_set(f"{_HEARD}{index}", "")
            logger.error("Process %d exits because %s failed: see its message, or process 0's.", index, where)
        os._exit(failure["code"])
