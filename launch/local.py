"""usage: launch/local.sh N COMMAND...

Runs N processes of one command on this machine, as one JAX run. On a machine with GPUs, each process gets one GPU.
Forwards SIGTERM, SIGINT and SIGHUP. Exits with the code of the first process that failed, or 0 if none did.

example: launch/local.sh 2 python -m jaxtrain.main --config=configs/quickstart.py
"""

import os
import signal
import socket
import subprocess
import sys
import time

# After one process fails, the others cannot continue. They have this many seconds to report why and exit.
GRACE_SECONDS = 20.0


def gpus() -> list[str]:
    """The GPUs this launcher may use; empty if there are none."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [name for name in visible.split(",") if name]
    try:
        listing = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True).stdout
    except FileNotFoundError:
        return []
    return [str(index) for index, line in enumerate(listing.splitlines()) if line.startswith("GPU")]


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def start(command: list[str], count: int, devices: list[str], processes: list[subprocess.Popen[bytes]]) -> None:
    shared = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{free_port()}", "JAX_NUM_PROCESSES": str(count)}
    for index in range(count):
        own = {"JAX_PROCESS_ID": str(index)}
        if devices:
            own["CUDA_VISIBLE_DEVICES"] = devices[index]
        # In its own session, so that a terminal's Ctrl-C reaches it only once, through this launcher.
        processes.append(subprocess.Popen(command, env={**os.environ, **shared, **own}, start_new_session=True))


def wait(processes: list[subprocess.Popen[bytes]]) -> int:
    """Waits until all processes have exited.

    Returns:
        The exit code of the first that failed: 128 + the signal's number if a signal killed it. 0 if none failed.
    """
    code, deadline = 0, None
    while running := [process for process in processes if process.poll() is None]:
        failed = next((process.returncode for process in processes if process.returncode), 0)
        if failed and deadline is None:
            code, deadline = failed, time.monotonic() + GRACE_SECONDS
        if deadline is not None and time.monotonic() > deadline:
            for process in running:
                process.kill()
        time.sleep(0.05)
    code = code or next((process.returncode for process in processes if process.returncode), 0)
    return 128 - code if code < 0 else code


def main() -> int:
    if len(sys.argv) < 3 or not sys.argv[1].isdecimal() or int(sys.argv[1]) < 1:
        print(__doc__, file=sys.stderr)
        return 0 if sys.argv[1:2] in (["-h"], ["--help"]) else 2
    count, command, devices = int(sys.argv[1]), sys.argv[2:], gpus()
    if devices and len(devices) < count:
        print(
            f"launch/local.sh: {count} processes, but only {len(devices)} GPU(s): start at most that many",
            file=sys.stderr,
        )
        return 2
    processes: list[subprocess.Popen[bytes]] = []

    def forward(number: int, frame: object) -> None:
        for process in processes:
            process.send_signal(number)

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # nohup ignores SIGHUP
            signal.signal(number, forward)
    start(command, count, devices, processes)
    return wait(processes)


if __name__ == "__main__":
    sys.exit(main())
