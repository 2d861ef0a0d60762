"""Planted documents spoil single steps: they are found, named, and cut out, the same through kills and on any hosts."""

import json
import pathlib
import random
import shutil
import signal
import subprocess
import sys
from typing import Any

import pytest

from tests.e2e.conftest import MakeRun
from tests.e2e.killed_at import STATES
from tests.e2e.runs import ROOT, STOPPED, Run, assert_equal, documents
from tests.hub import LoopbackHub, parquet_bytes
from tests.tiers import nightly_but

SPIKES = "tests/e2e/configs/spikes.py"
REWIND = "--config.on_spike=rewind"
# Of scripts that no other document has: each is new to the model.
POISON = {(1, 43): "\u96f6\u97f3\u9f52", (0, 285): "\u10d0\u10e6\u10f0"}  # (file, row), read about steps 28 and 45
ROWS = 400


@pytest.fixture(scope="module", autouse=True)
def poisoned(datasets: LoopbackHub) -> None:
    files = {}
    for file in range(2):
        texts = [12 * POISON.get((file, row), "") or text for row, text in enumerate(documents(file, ROWS, words=12))]
        files[f"data/train-{file}.parquet"] = parquet_bytes(texts, row_group_size=50)
    datasets.commit("spikes/web", files)


def spikes_of(run: Run) -> list[dict[str, Any]]:
    path = run.workdir / "spikes.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def named(spike: dict[str, Any]) -> set[tuple[int, int]]:
    """(file, row) of the documents that stand out."""
    return {
        (int(document["file"][len("data/train-")]), document["row"])
        for document in spike["documents"][: spike["standing_out"]]
    }


def tokens_of(spike: dict[str, Any]) -> dict[tuple[str, int], int]:
    """(file, row) → tokens of all documents of the step."""
    return {(document["file"], document["row"]): document["tokens"] for document in spike["documents"]}


def list_of(run: Run) -> dict[str, Any]:
    return json.loads((run.workdir / "forgotten.json").read_text())


def rows_of(run: Run) -> set[tuple[int, int]]:
    """(file, row) of the documents in a run's list."""
    files = list_of(run)["documents"]["web"]
    return {(int(name[len("data/train-")]), int(row)) for name, rows in files.items() for row in rows}


def knowing(make_run: MakeRun, other: Run, name: str = "knows", **options: Any) -> Run:
    """A run that starts with another's list."""
    run = make_run(name, config=SPIKES, **options)
    shutil.copy(other.workdir / "forgotten.json", run.workdir)
    return run


@pytest.fixture(scope="module")
def rewound(once: Any) -> Run:
    return once("rewound", lambda run: run(REWIND), config=SPIKES)


@pytest.mark.slow
def test_planted_documents_are_named_and_their_updates_skipped(make_run: MakeRun) -> None:
    run = make_run("log", config=SPIKES)()
    found = spikes_of(run)
    assert [named(spike) for spike in found] == [{(1, 43)}, {(0, 285)}]
    losses = {line["step"]: line["loss"] for line in run.steps()}
    for spike in found:
        total = sum(document["loss"] * document["tokens"] for document in spike["documents"])
        tokens = sum(document["tokens"] for document in spike["documents"])
        assert total / tokens == pytest.approx(losses[spike["step"]], rel=1e-5)
        assert f"Step {spike['step']}: spike, Loss={spike['loss']:.4f}" in run.output
    skips = make_run("skip", config=SPIKES)("--config.on_spike=skip_update")
    # The rest of a document that a skipped update did not learn from is a spike again.
    assert set().union(*(named(spike) for spike in spikes_of(skips))) == POISON.keys()
    assert skips.steps()[-1]["skipped"] == len(spikes_of(skips))
    assert run.steps()[-1]["skipped"] == 0
    # Without a threshold the host compares, on two processes and over a kill: the same updates, the same documents.
    host = make_run("host", processes=2, config=SPIKES).start("--config.spike_threshold=none")
    assert host.wait_for_step(36), host.output
    host.kill()
    host("--config.spike_threshold=none")
    assert host.steps()[-1]["fingerprint"] == run.steps()[-1]["fingerprint"]
    seen = {spike["step"]: tokens_of(spike) for spike in spikes_of(host)}
    for spike in found:
        # The step counts tokens with a loss. The last one of a document has none.
        differ = {seen[spike["step"]][address] - tokens for address, tokens in tokens_of(spike).items()}
        assert differ <= {0, 1}
        rest = seen[spike["step"]].keys() - tokens_of(spike).keys()
        assert {seen[spike["step"]][address] for address in rest} <= {1}
    # A resume compares with the same steps.
    killed = make_run("killed", config=SPIKES).start()
    assert killed.wait_for_step(36), killed.output
    killed.kill()
    assert_equal(killed(), run)
    assert {spike["step"] for spike in spikes_of(killed)} == {spike["step"] for spike in found}


@pytest.mark.slow
def test_a_spike_cut_out_is_a_run_that_started_without_its_documents(make_run: MakeRun, rewound: Run) -> None:
    assert rewound.output.count("Resumed from step") == 2
    listed = list_of(rewound)
    assert listed["rewinds"] == 2
    assert rows_of(rewound) == POISON.keys()
    knows = knowing(make_run, rewound)(REWIND)
    assert "spike, Loss" not in knows.output
    assert_equal(rewound, knows)
    assert (rewound.workdir / "log.txt").read_text().count("left out (forgotten.json)") == 2
    times = [line["time"] for line in rewound.steps()]
    assert times == sorted(times)


@pytest.mark.slow
@pytest.mark.parametrize("state", nightly_but(STATES[1:2], STATES))
def test_killed_within_a_rewind(make_run: MakeRun, rewound: Run, state: str) -> None:
    run = make_run(config=SPIKES, KILLED_AT=state)
    run.module = "tests.e2e.killed_at"
    run(REWIND, code=-signal.SIGKILL)
    assert (run.workdir / "forgotten.json").exists() == (state != STATES[0])
    run.module = "jaxtrain.main"
    assert_equal(run(REWIND), rewound)
    assert list_of(run) == list_of(rewound)


@pytest.mark.slow
def test_two_processes_return_together(make_run: MakeRun, rewound: Run) -> None:
    run = make_run("two", processes=2, config=SPIKES)(REWIND)
    assert list_of(run) == list_of(rewound)
    assert run.steps()[-1]["fingerprint"] == rewound.steps()[-1]["fingerprint"]
    assert "[process 1] WARNING: Step" not in run.output


@pytest.mark.nightly
def test_a_signal_and_the_most_rewinds(make_run: MakeRun, rewound: Run) -> None:
    """A run that is told to stop at a spike stops before it; one that has returned often enough goes on."""
    once = make_run("one", config=SPIKES)(REWIND, "--config.max_rewinds=1")
    assert list_of(once)["rewinds"] == 1
    assert "the run has returned 1 times already and goes on (max_rewinds)" in once.output
    assert [named(spike) for spike in spikes_of(once)] == [named(spike) for spike in spikes_of(rewound)]
    stopped = make_run("stopped", config=SPIKES).start(REWIND)
    assert stopped.wait_for_step(27), stopped.output
    stopped.signal(signal.SIGTERM)
    assert stopped.wait() == STOPPED
    stopped(REWIND)
    # It may have saved between the checkpoint that the other returned to and the spike.
    assert rows_of(stopped) == rows_of(rewound)


@pytest.mark.nightly
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("mode", "count", "others", "length"),
    [("stream", 500, 23, 10), ("download", 60, 39, 20), ("pretokenized", 60, 39, 20)],
)
def test_many_planted_documents(
    datasets: LoopbackHub,
    make_run: MakeRun,
    tokenizer: pathlib.Path,
    mode: str,
    count: int,
    others: int,
    length: int,
) -> None:
    """How many documents of random characters are named, on two processes that are killed twice.

    Each has `others` documents beside it, of `length` words.
    """
    rng = random.Random(0)
    files, bad = {}, set()
    # Other documents are parts of one text, which is soon learned; random characters never are.
    words = documents(50, 1, words=30)[0].split()[:40] * 3
    rows = count // 4 * (others + 1)
    for file in range(4):
        texts = [" ".join(words[at : at + length]) for at in (rng.randrange(40) for _ in range(rows))]
        for row in rng.sample(range(rows), count // 4):
            texts[row] = "".join(chr(rng.randrange(0x21, 0x7F)) for _ in range(3 * length))
            bad.add((file, row))
        files[f"data/train-{file}.parquet"] = parquet_bytes(texts, row_group_size=50)
    datasets.commit(f"spikes/{count}", files)
    run = make_run(mode, processes=2, config=SPIKES)
    flags = [f"--config.data.sources.web.name=spikes/{count}", f"--config.data.mode={mode}", "--config.epochs=1"]
    flags += ["--config.total_tokens=none", "--config.stages[0].batch_size=4", "--config.checkpoint.every_steps=200"]
    flags += ["--config.spike_window=64", "--config.spike_threshold=5", "--config.log_every=20"]
    if mode == "pretokenized":
        command = ["-m", "tools.pretokenize", f"--config={SPIKES}:{tokenizer}", f"--workdir={run.workdir}", "--all"]
        subprocess.run([sys.executable, *command, *flags[:1]], cwd=ROOT, env=run.env, check=True)
    for step in (count, 2 * count):
        run.start(*flags)
        assert run.wait_for_step(step), run.output
        run.kill()
    run.start(*flags)
    assert run.wait(1200) == 0, run.output
    found = set().union(*(named(spike) for spike in spikes_of(run)))
    print(f"{mode}: {len(found & bad)} of {len(bad)} named, {len(found - bad)} others")
    # Those in the first half window, and few tokens among many, make no spike.
    assert len(found & bad) > 0.8 * len(bad)
    assert len(found - bad) < 0.02 * len(bad) + 10
