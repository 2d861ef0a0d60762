"""launch/slurm.sbatch and launch/tpu_vm.sh, with stand-ins for the clusters' commands on the PATH."""

import os
import pathlib
import signal
import subprocess

import pytest

ROOT = pathlib.Path(__file__).parents[2]
SBATCH = ROOT / "launch" / "slurm.sbatch"
TPU_VM = ROOT / "launch" / "tpu_vm.sh"


def stand_in(folder: pathlib.Path, name: str, body: str) -> None:
    """A command that records its arguments, and then runs `body`."""
    file = folder / name
    file.write_text(f'#!/usr/bin/env bash\nprintf "%s\\n" "{name} $*" >> {folder}/calls\n{body}\n')
    file.chmod(0o755)


def calls(folder: pathlib.Path) -> list[str]:
    return (folder / "calls").read_text().splitlines()


def environment(folder: pathlib.Path, **settings: str) -> dict[str, str]:
    clean = {name: value for name, value in os.environ.items() if name != "HF_TOKEN"}
    return {**clean, "PATH": f"{folder}:{os.environ['PATH']}", "RESTART_PAUSE": "0", **settings}


def slurm(folder: pathlib.Path, srun: str, state: str) -> dict[str, str]:
    stand_in(folder, "srun", srun)
    stand_in(folder, "squeue", f"echo {state}")
    stand_in(folder, "scontrol", "")
    return environment(folder, SLURM_JOB_ID="123", SLURM_CPUS_PER_TASK="12")


@pytest.mark.parametrize(
    ("codes", "state", "queued"),
    [
        ((0,), "RUNNING", False),
        ((2,), "RUNNING", False),
        ((75,), "RUNNING", True),
        ((75,), "COMPLETING", False),  # cancelled by its user
        ((1, 1, 0), "RUNNING", False),
        ((1, 75), "RUNNING", True),
        ((1, 2), "RUNNING", False),
    ],
)
def test_sbatch_by_exit_code(codes: tuple[int, ...], state: str, queued: bool, tmp_path: pathlib.Path) -> None:
    chosen = f"codes=({' '.join(map(str, codes))}); exit ${{codes[$(grep -c ^srun {tmp_path}/calls) - 1]}}"
    env = slurm(tmp_path, chosen, state)
    found = subprocess.run(["bash", str(SBATCH)], cwd=ROOT, env=env, capture_output=True, text=True, timeout=60)
    seen = calls(tmp_path)
    assert found.returncode == codes[-1]
    assert len([call for call in seen if call.startswith("srun ")]) == len(codes)
    assert seen[0].endswith(" python -m jaxtrain.main --config=configs/1b.py")
    assert ("scontrol requeue 123" in seen) == queued


def test_sbatch_passes_sigterm_on_and_queues_again(tmp_path: pathlib.Path) -> None:
    env = slurm(tmp_path, "trap 'exit 75' TERM; echo ready; while :; do sleep 0.05; done", "RUNNING")
    command = ["bash", str(SBATCH), "another", "command"]
    with subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True) as job:
        assert job.stdout is not None
        assert job.stdout.readline() == "ready\n"
        job.send_signal(signal.SIGTERM)
        assert job.wait(30) == 75
    first, *others = calls(tmp_path)
    assert first.endswith(" another command")
    assert others[-1] == "scontrol requeue 123"
    assert not [call for call in others if call.startswith("srun ")]


# Acts as a TPU VM of two hosts. state, code: Reported for itself and for the run. busy: Whether the run is active.
GCLOUD = """
case "$*" in
    *"value(state)"*) cat {folder}/state 2> /dev/null ;;
    *" list "*) ;;
    *networkEndpoints*) printf '10.0.0.2\\n10.0.0.3\\n' ;;
    *" create "*) echo READY > {folder}/state ;;
    *"kill -0 "*"2> /dev/null") test -e {folder}/busy ;;
    *"cat jaxtrain.code"*) cat {folder}/code ;;
    *" ssh "*) for last; do :; done; echo "${{last#--command=}}" | bash -n ;;
esac
"""


def tpu(folder: pathlib.Path, *arguments: str, **settings: str) -> subprocess.CompletedProcess[str]:
    stand_in(folder, "gcloud", GCLOUD.format(folder=folder))
    chosen = {"NAME": "pod", "ZONE": "us-central2-b", "WORKDIR": "gs://bucket/runs/1b", "WATCH_SECONDS": "0"}
    # A small checkout, to copy little.
    (folder / "checkout").mkdir()
    return subprocess.run(
        [str(TPU_VM), *arguments],
        cwd=folder / "checkout",
        env=environment(folder, **{**chosen, **settings}),
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_tpu_vm_start(tmp_path: pathlib.Path) -> None:
    found = tpu(tmp_path, "start", HF_TOKEN="a b")
    assert (found.returncode, found.stderr) == (0, "")
    text = (tmp_path / "calls").read_text()
    assert "scp" in text
    assert text.count("--worker=all") == 4
    assert "JAX_COORDINATOR_ADDRESS=10.0.0.2:8476 JAX_NUM_PROCESSES=2\n" in text
    assert "export JAX_PROCESS_ID=$(curl" in text
    assert "export HF_TOKEN=a\\ b\n" in text
    expected = "python -m jaxtrain.main --config=configs/1b.py --workdir=gs://bucket/runs/1b >> ../jaxtrain.log"
    assert f"nohup launch/restart.sh {expected}" in text


def test_tpu_vm_starts_another_command(tmp_path: pathlib.Path) -> None:
    found = tpu(tmp_path, "start", "echo", "a b")
    assert (found.returncode, found.stderr) == (0, "")
    assert "nohup launch/restart.sh echo a\\ b >> ../jaxtrain.log" in (tmp_path / "calls").read_text()


def actions(folder: pathlib.Path) -> list[str]:
    return [call.split()[4] for call in calls(folder) if call.startswith("gcloud compute tpus tpu-vm ")]


START = ["ssh", "describe", "scp", "ssh", "ssh"]


def test_tpu_vm_is_made_again_after_a_preemption(tmp_path: pathlib.Path) -> None:
    (tmp_path / "state").write_text("PREEMPTED\n")
    (tmp_path / "code").write_text("2\n")
    found = tpu(tmp_path, "keep")
    assert found.returncode == 2
    assert actions(tmp_path) == ["describe", "delete", "create", "describe", *START, "describe", "ssh"]


def test_tpu_vm_is_made_where_there_is_none(tmp_path: pathlib.Path) -> None:
    (tmp_path / "code").write_text("0\n")
    found = tpu(tmp_path, "keep")
    assert found.returncode == 0
    assert actions(tmp_path) == ["describe", "list", "create", "describe", *START, "describe", "ssh"]


def test_tpu_vm_that_runs_is_left_running(tmp_path: pathlib.Path) -> None:
    (tmp_path / "state").write_text("READY\n")
    (tmp_path / "busy").touch()
    (tmp_path / "code").write_text("0\n")
    found = tpu(tmp_path, "keep")
    assert found.returncode == 0
    assert actions(tmp_path) == ["describe", "ssh", "describe", "ssh"]


def test_tpu_vm_has_to_be_filled_in(tmp_path: pathlib.Path) -> None:
    found = tpu(tmp_path, "create", NAME="MY_TPU")
    assert found.returncode == 2
    assert "NAME=MY_TPU" in found.stderr
    assert not (tmp_path / "calls").exists()


def test_tpu_vm_usage(tmp_path: pathlib.Path) -> None:
    found = tpu(tmp_path)
    assert found.returncode == 2
    assert "launch/tpu_vm.sh keep" in found.stderr
