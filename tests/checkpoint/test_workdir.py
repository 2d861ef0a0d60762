import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from jaxtrain.checkpoint import workdir as module
from jaxtrain.checkpoint.workdir import Workdir, write_atomically
from jaxtrain.errors import UserError

HOLD = """
import sys, time
from jaxtrain.checkpoint.workdir import Workdir
with Workdir(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""


def test_paths_and_config(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with Workdir("runs/a") as workdir:
        assert os.fspath(workdir.path) == str(tmp_path / "runs/a")
        workdir.write_config({"seed": 1})
        assert json.loads(workdir.config.read_text()) == {"seed": 1}
        assert sorted(p.name for p in workdir.path.iterdir()) == ["cache", "config.json", "lock"]


def test_remote_paths_stay_urls(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    first, second = Workdir("gs://bucket/a"), Workdir("s3://bucket/a")
    assert os.fspath(first.checkpoints) == "gs://bucket/a/checkpoints"
    assert not first.is_local
    assert first.cache.parent == tmp_path / "jaxtrain"
    assert first.cache != second.cache


@pytest.mark.parametrize("path", ["ftp://host/a", "http://host/a", "file:///a", "s3://", "gs:///a"])
def test_other_protocols_are_refused(path):
    with pytest.raises(UserError, match=f"--workdir={path}: give a local directory, or a gs:// or s3:// URL"):
        Workdir(path)


def test_a_file_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="is a file"), Workdir(tmp_path / "file"):
        pass


def test_one_run_at_a_time(tmp_path):
    with Workdir(tmp_path):
        with pytest.raises(UserError, match=rf"in use by another run .*\"pid\": {os.getpid()}"), Workdir(tmp_path):
            pass
        # The refused run has not taken the lock.
        with pytest.raises(UserError), Workdir(tmp_path):
            pass
    with Workdir(tmp_path):
        pass


def test_a_killed_run_leaves_no_lock(tmp_path):
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=root) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        with pytest.raises(UserError, match=f'"pid": {process.pid}'), Workdir(tmp_path):
            pass
        process.send_signal(signal.SIGKILL)
    with Workdir(tmp_path):
        pass


def test_write_atomically_replaces(tmp_path):
    path = module.epath.Path(tmp_path / "x")
    for text in ("long text", "short"):
        write_atomically(path, text)
        assert path.read_text() == text
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


# Leases, where there is no flock.


@pytest.fixture
def lease(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_HEARTBEAT_SECONDS", 0.05)
    monkeypatch.setattr(module, "_WATCH_SECONDS", 0.6)
    path = module.epath.Path(tmp_path / "lock")
    return lambda: module._Lease(path)


def test_a_live_lease_is_refused_and_a_closed_one_is_not(lease, tmp_path):
    with lease():
        with pytest.raises(UserError, match=f'"pid": {os.getpid()}'), lease():
            pass
        assert (tmp_path / "lock").exists()
    assert not (tmp_path / "lock").exists()
    with lease():
        pass


def test_a_dead_lease_is_taken_over(lease, tmp_path):
    (tmp_path / "lock").write_text('{"host": "gone", "token": "x", "beat": 3}')
    with lease():
        assert "gone" not in (tmp_path / "lock").read_text()


LOSE = """
import sys, time
from etils import epath
from jaxtrain.checkpoint import workdir
workdir._HEARTBEAT_SECONDS, workdir._WATCH_SECONDS = 0.05, 0.3
path = epath.Path(sys.argv[1])
with workdir._Lease(path):
    path.write_text("another")
    time.sleep(60)
"""


def test_a_lost_lease_ends_the_process(tmp_path):
    command = [sys.executable, "-c", LOSE, str(tmp_path / "lock")]
    assert subprocess.run(command, check=False, cwd=Path(__file__).parents[2], timeout=30).returncode == 1
    assert (tmp_path / "lock").read_text() == "another"


# Several processes.


def test_a_directory_that_one_process_cannot_see_is_refused(tmp_path, monkeypatch):
    # Process 0 of two, with the responses that the other would give.
    monkeypatch.setattr(module.jax, "process_count", lambda: 2)
    monkeypatch.setattr(module.multihost_utils, "broadcast_one_to_all", lambda x: x)
    monkeypatch.setattr(module.multihost_utils, "sync_global_devices", lambda name: None)
    monkeypatch.setattr(module.multihost_utils, "process_allgather", lambda x: np.stack([x, x]))
    with Workdir(tmp_path / "shared"):
        pass
    monkeypatch.setattr(module.multihost_utils, "process_allgather", lambda x: np.stack([x, np.zeros_like(x)]))
    with pytest.raises(UserError, match="not shared by all processes: 1 cannot see"), Workdir(tmp_path / "own"):
        pass
    assert [p.name for p in (tmp_path / "own").iterdir()] == ["lock"]
