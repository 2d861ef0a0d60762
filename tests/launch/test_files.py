"""The launchers' files: they parse, have the fields that their readers need, and name what to fill in."""

import pathlib
import re
import subprocess
from typing import Any

import pytest
import yaml

ROOT = pathlib.Path(__file__).parents[2]
LAUNCH = ROOT / "launch"
SHELL = ("local.sh", "restart.sh", "slurm.sbatch", "tpu_vm.sh")
TO_FILL_IN = ("gke_jobset.yaml", "skypilot.yaml", "slurm.sbatch", "tpu_vm.sh")
# README, "Train".
COMMAND = "python -m jaxtrain.main --config=configs/1b.py"
PLACEHOLDER = re.compile(r"\bMY_[A-Z_]+")
PROCESSES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")


def header(name: str) -> str:
    lines = (LAUNCH / name).read_text().splitlines()
    end = next(index for index, line in enumerate(lines) if not line.startswith("#"))
    return "\n".join(line for line in lines[:end] if not line.startswith("#SBATCH"))


def jobsets() -> dict[str, Any]:
    documents = yaml.safe_load_all((LAUNCH / "gke_jobset.yaml").read_text())
    return {document["metadata"]["labels"]["hardware"]: document for document in documents}


def pod(jobset: Any) -> Any:
    return jobset["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]


def task() -> Any:
    return yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())


def test_every_launcher_is_looked_at() -> None:
    assert {path.name for path in LAUNCH.iterdir() if path.is_file()} == {*SHELL, *TO_FILL_IN, "local.py"}


@pytest.mark.parametrize("name", SHELL)
def test_shell_parses(name: str) -> None:
    checked = subprocess.run(["bash", "-n", str(LAUNCH / name)], capture_output=True, text=True)
    assert (checked.returncode, checked.stderr) == (0, "")


def test_shell_in_yaml_parses() -> None:
    for part in ("setup", "run"):
        checked = subprocess.run(["bash", "-n"], input=task()[part], capture_output=True, text=True)
        assert (checked.returncode, checked.stderr) == (0, "")


@pytest.mark.parametrize("name", TO_FILL_IN)
def test_every_placeholder_is_in_the_header_and_the_docs(name: str) -> None:
    found = set(PLACEHOLDER.findall((LAUNCH / name).read_text()))
    docs = (ROOT / "docs" / "launch.md").read_text()
    (section,) = (text for text in docs.split("\n## ")[1:] if f"`launch/{name}`" in text.split("\n\n")[1])
    assert found
    assert "Fill in" in header(name)
    assert found <= set(PLACEHOLDER.findall(header(name)))
    assert found <= set(PLACEHOLDER.findall(section))


def test_every_header_has_its_call() -> None:
    calls = {
        "slurm.sbatch": "sbatch launch/slurm.sbatch",
        "gke_jobset.yaml": "kubectl apply -f launch/gke_jobset.yaml",
        "tpu_vm.sh": "launch/tpu_vm.sh keep",
        "skypilot.yaml": "sky jobs launch -n jaxtrain launch/skypilot.yaml",
        "restart.sh": "launch/restart.sh COMMAND...",
    }
    docs = (ROOT / "docs" / "launch.md").read_text()
    for name, call in calls.items():
        assert call in header(name)
        assert call in docs


def test_the_command_is_the_readmes() -> None:
    lines = (ROOT / "README.md").read_text().splitlines()
    assert COMMAND in [line.partition("#")[0].strip() for line in lines]
    for name in ("slurm.sbatch", "tpu_vm.sh", "restart.sh"):
        assert COMMAND in (LAUNCH / name).read_text()
    assert f"launch/restart.sh {COMMAND} --workdir=" in task()["run"]
    for jobset in jobsets().values():
        (container,) = pod(jobset)["containers"]
        assert " ".join(container["command"]).startswith(f"{COMMAND} --workdir=gs://")


def test_what_is_set_is_what_is_read() -> None:
    reads = (ROOT / "jaxtrain" / "distributed/processes.py").read_text()
    for name in PROCESSES:
        assert f'"{name}"' in reads
        assert f"export {name}=" in (LAUNCH / "tpu_vm.sh").read_text().replace(" JAX_NUM", " export JAX_NUM")
        assert f"{name}=" in task()["run"]
    assert set(PROCESSES) <= {entry["name"] for entry in pod(jobsets()["gpu"])["containers"][0]["env"]}
    assert '"SLURM_NTASKS"' in reads


@pytest.mark.parametrize("hardware", ["tpu", "gpu"])
def test_jobset_has_its_schemas_fields(hardware: str) -> None:
    jobset = jobsets()[hardware]
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    assert jobset["metadata"]["name"] == f"jaxtrain-{hardware}"
    policy = jobset["spec"]["failurePolicy"]
    assert policy["maxRestarts"] > 0
    (rule,) = policy["rules"]
    # Job's reason for a failure by podFailurePolicy; all other failures restart.
    assert (rule["action"], rule["onJobFailureReasons"]) == ("FailJobSet", ["PodFailurePolicy"])
    assert re.fullmatch("[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?", rule["name"])
    (replicated,) = jobset["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    assert replicated["replicas"] >= 1
    assert job["parallelism"] == job["completions"]
    assert (job["completionMode"], job["backoffLimit"]) == ("Indexed", 0)
    (container,) = pod(jobset)["containers"]
    (on_pod,) = job["podFailurePolicy"]["rules"]
    codes = on_pod["onExitCodes"]
    assert on_pod["action"] == "FailJob"
    assert (codes["containerName"], codes["operator"], codes["values"]) == (container["name"], "In", [2])
    # Required by podFailurePolicy.
    assert pod(jobset)["restartPolicy"] == "Never"
    assert set(container) >= {"name", "image", "command", "env", "resources"}


def test_jobset_for_gpus_counts_its_processes() -> None:
    jobset = jobsets()["gpu"]
    (replicated,) = jobset["spec"]["replicatedJobs"]
    values = {entry["name"]: entry.get("value") for entry in pod(jobset)["containers"][0]["env"]}
    assert values["JAX_NUM_PROCESSES"] == str(replicated["template"]["spec"]["completions"])
    # Process numbers are the pods' in a Job, so there is one Job.
    assert replicated["replicas"] == 1
    assert jobset["spec"]["coordinator"] == {"replicatedJob": replicated["name"], "jobIndex": 0, "podIndex": 0}


def test_skypilot_has_its_schemas_fields() -> None:
    found = task()
    known = {"name", "workdir", "num_nodes", "resources", "envs", "secrets", "setup", "run"}
    assert set(found) == known
    resources = found["resources"]
    assert set(resources) == {"accelerators", "disk_size", "any_of", "job_recovery"}
    spot = {entry["infra"]: entry["use_spot"] for entry in resources["any_of"]}
    assert spot == {"aws": True, "gcp": True, "runpod": True, "lambda": False, "do": False}
    assert resources["job_recovery"] == {"strategy": "EAGER_NEXT_REGION"}
    assert found["envs"]["WORKDIR"].startswith("s3://")
    # None: SkyPilot refuses to start without a value.
    assert set(found["secrets"].values()) == {None}


def test_sbatch_directives() -> None:
    lines = (LAUNCH / "slurm.sbatch").read_text().splitlines()
    given: dict[str, str] = {}
    for line in lines:
        if line.startswith("#SBATCH "):
            name, _, value = line.removeprefix("#SBATCH --").partition("=")
            given[name] = value
    assert "requeue" in given
    assert given["signal"] == "B:TERM@600"
    assert given["ntasks-per-node"] == given["gpus-per-node"]
    assert given["open-mode"] == "append"
    first = next(index for index, line in enumerate(lines) if line and not line.startswith("#"))
    # sbatch reads no directives after the first command.
    assert not [line for line in lines[first:] if line.startswith("#SBATCH")]
