"""A process that streams ends when told to, with the requested code: it never hangs and never aborts."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from jaxtrain.data.pipeline import resolve
from tests import exiting_run
from tests.data.memory_source import documents
from tests.hub import LoopbackHub, csv_bytes, jsonl_bytes, parquet_bytes
from tests.tiers import nightly_but

# Ways to end, with the exit code of each.
WAYS = {"return": 0, "close": 0, "exception": 1, "mistake": 2, "SIGTERM": 75, "SIGINT": 75, "_exit": 0}
_SECONDS = 25.0  # for one process on a busy machine: reading is under half a second of it


def end_in(hub: LoopbackHub, ways: list[str], folder: pathlib.Path) -> None:
    texts = [documents(400, seed, 12) for seed in range(20)]
    hub.commit("org/web", {f"train-{n}.parquet": parquet_bytes(texts[n], row_group_size=25) for n in range(9)})
    hub.commit("org/code", {f"train-{n}.jsonl.gz": jsonl_bytes(texts[9 + n], compress=True) for n in range(2)})
    hub.commit("org/table", {"train.csv": csv_bytes([text or "7" for text in texts[19]])})
    identities = {name: {"source": source.identity} for name, source in resolve(exiting_run.config()).items()}
    (folder / "identities.json").write_text(json.dumps(identities))
    # So that reads are in flight at any moment.
    hub.fault("/train", "slow", seconds=0.2, probability=0.3)
    hub.fault("/train", "latency:0.1")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.exiting_run", str(folder / "identities.json"), *ways],
        cwd=pathlib.Path(__file__).parents[2],
        env={**os.environ, **hub.env(), "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    ended = [json.loads(line) for line in done.stdout.splitlines()]
    assert [one["way"] for one in ended] == ways
    for one in ended:
        assert one["status"] is not None, f"{one} hangs\n{done.stderr}"
        assert os.waitstatus_to_exitcode(one["status"]) == WAYS[one["way"]], f"{one}\n{done.stderr}"
        assert one["seconds"] < _SECONDS, one


def test_some_ends(hub: LoopbackHub, tmp_path: pathlib.Path) -> None:
    end_in(hub, ["return", "exception", "SIGTERM"], tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(1800)  # a hanging process is killed after a minute, and there may be many
@pytest.mark.parametrize("times", nightly_but([2], [2, 8]))
def test_every_end_many_times(hub: LoopbackHub, tmp_path: pathlib.Path, times: int) -> None:
    end_in(hub, times * list(WAYS), tmp_path)
