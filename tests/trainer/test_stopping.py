"""Signals and kills, sent to whole processes."""

import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtrain.checkpoint.checkpointer import CheckpointConfig

REPOSITORY = Path(__file__).parents[2]


class Run:
    """Processes of the stand-in for a run, with the lines that each has printed."""

    def __init__(self, folder, mode, num_processes=1):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
        self.processes, self.lines, self.readers = [], [], []
        for index in range(num_processes):
            program = [sys.executable, "-m", "tests.stoppable_run"]
            process = subprocess.Popen(
                [*program, *map(str, (num_processes, index, port, folder, mode))],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                cwd=REPOSITORY,
                env=environment,
            )
            self.processes.append(process)
            self.lines.append([])
            self.readers.append(threading.Thread(target=self.lines[-1].extend, args=(process.stdout,)))
            self.readers[-1].start()

    def numbers(self, word, index=0):
        return [int(line.split()[1]) for line in list(self.lines[index]) if re.fullmatch(rf"{word} \d+\n", line)]

    def wait_until(self, condition, seconds=60):
        deadline = time.monotonic() + seconds
        while not condition():
            assert all(p.poll() is None for p in self.processes), self.lines
            assert time.monotonic() < deadline, self.lines
            time.sleep(0.02)

    def ends(self):
        """Exit codes, after all output has arrived."""
        codes = [p.wait(60) for p in self.processes]
        for reader in self.readers:
            reader.join()
        return codes

    def __enter__(self):
        return self

    def __exit__(self, *error):
        for process in self.processes:
            process.kill()
        self.ends()
        for process in self.processes:
            process.stdout.close()


def stop(folder, num_processes, signals):
    """Runs, sends signals ({process: signal}) after a few steps; returns (restored, stopped) steps."""
    with Run(folder, "stop", num_processes) as run:
        run.wait_until(lambda: len(run.numbers("step")) > 5)
        for index, number in signals.items():
            run.processes[index].send_signal(number)
        assert run.ends() == [75] * num_processes, run.lines
        (step,) = run.numbers("saved")
        assert all(run.numbers("saved", index) == [step] for index in range(num_processes))
        return sum(run.numbers("restored")), step


def test_signals_stop_one_process(tmp_path):
    first, second = (stop(tmp_path, 1, {0: number}) for number in (signal.SIGTERM, signal.SIGINT))
    assert second[0] == first[1]
    assert second[1] > second[0]


@pytest.mark.slow
def test_signals_stop_two_processes_at_one_step(tmp_path):
    # SIGTERM reaches one; Ctrl-C reaches both, and from a resumed step; a checkpoint of two processes serves one.
    first = stop(tmp_path, 2, {1: signal.SIGTERM})
    shutil.copytree(tmp_path / str(first[1]), tmp_path / str(first[1] + 1000))
    (tmp_path / str(first[1] + 1000) / "data/metadata").unlink()
    second = stop(tmp_path, 2, {0: signal.SIGINT, 1: signal.SIGINT})
    third = stop(tmp_path, 1, {0: signal.SIGTERM})
    assert (second[0], third[0]) == (first[1], second[1])


def test_a_second_interrupt_ends_at_once(tmp_path):
    with Run(tmp_path, "stuck") as run:
        run.wait_until(lambda: len(run.numbers("step")) > 2)
        (process,) = run.processes
        process.send_signal(signal.SIGINT)
        time.sleep(0.3)
        process.send_signal(signal.SIGINT)  # a forwarded signal does not count as a second one
        time.sleep(1.2)
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == -signal.SIGINT


def test_signals_are_taken_from_the_first_step_on_and_given_back(tmp_path):
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    checkpointer = CheckpointConfig().build(tmp_path)
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
    assert not checkpointer.reached_preemption(1)
    signal.raise_signal(signal.SIGTERM)
    assert checkpointer.reached_preemption(2)
    checkpointer.close()
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


@pytest.mark.parametrize("ignored", [False, True])
def test_a_closed_terminal_stops_a_run_that_nohup_did_not_start(tmp_path, ignored):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN if ignored else signal.SIG_DFL)
    checkpointer = CheckpointConfig().build(tmp_path)
    try:
        assert not checkpointer.reached_preemption(1)
        signal.raise_signal(signal.SIGHUP)
        assert checkpointer.reached_preemption(2) != ignored
    finally:
        checkpointer.close()
        assert signal.signal(signal.SIGHUP, before) == (signal.SIG_IGN if ignored else signal.SIG_DFL)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_before_the_first_step_ends_with_75_wherever_it_falls(tmp_path, number):
    # Inside a callback of the garbage collector, exceptions are printed and ignored, including SystemExit.
    config = f"import gc, os\ngc.callbacks.append(lambda *_: os.kill(os.getpid(), {int(number)}))\ngc.collect()\n"
    (tmp_path / "config.py").write_text(config)
    command = [sys.executable, "-m", "jaxtrain.main", f"--config={tmp_path / 'config.py'}"]
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests themselves may run under nohup
    try:
        ended = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=60, check=False)
    finally:
        signal.signal(signal.SIGHUP, before)
    assert ended.returncode == 75
    assert ended.stderr.strip() == "Stopped: no step is under way, so there is nothing to save."


def test_kill_during_saves(tmp_path):
    for attempt in range(3):
        with Run(tmp_path, "save") as run:
            run.wait_until(lambda run=run: len(run.numbers("saved")) > 1)
            time.sleep(random.Random(attempt).uniform(0, 0.2))
            run.processes[0].kill()
            run.ends()
            last = run.numbers("saved")[-1]
        checkpointer = CheckpointConfig().build(tmp_path)
        step = checkpointer.latest_step()
        assert step in (last, last + 1)
        shape = {"params": {"w": jax.ShapeDtypeStruct((1 << 20,), jnp.float32)}}
        assert set(np.unique(checkpointer.restore(step, shape)["params"]["w"])) == {float(step)}
        assert checkpointer.restore_data(step) == {"step": step}
        deadline = time.monotonic() + 20  # Orbax cleans up in the background
        while not all(p.name.isdecimal() for p in tmp_path.iterdir()):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        checkpointer.close()
        assert json.loads((tmp_path / str(step) / "files.json").read_text())
