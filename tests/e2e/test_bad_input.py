"""Failures give one clear message with the fix, the right exit code, no traceback for a user error, and lose nothing.

Mistakes reported before anything is compiled run inside the test's process, through the command's own function.
"""

import contextlib
import dataclasses
import os
import pathlib
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

from jaxtrain import main
from jaxtrain.checkpoint.workdir import Workdir
from jaxtrain.tokenizers.training import TrainTokenizer
from tests.e2e.conftest import MakeRun, fill
from tests.e2e.runs import ROOT, STOPPED, TINY, Run, assert_equal, documents
from tests.hub import LoopbackHub
from tests.tiers import nightly_but


@dataclasses.dataclass
class Answer:
    """A command's exit code and output."""

    code: int
    out: str
    err: str

    def is_error(self, code: int, *words: str) -> None:
        """Asserts one message on stderr that contains these words."""
        assert self.code == code, self
        assert self.err.startswith("error: "), self
        assert all(word in self.err for word in words), self
        assert "Traceback" not in self.out + self.err, self


Command = Callable[..., Answer]


@pytest.fixture
def command(
    tokenizer: pathlib.Path, tmp_path: pathlib.Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Iterator[Command]:
    """`python -m jaxtrain.main` with the tiny config in this process, for commands that end before training."""
    monkeypatch.chdir(ROOT)
    names = (
        *("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs"),
        *("jax_persistent_cache_min_entry_size_bytes", "jax_persistent_cache_enable_xla_caches"),
    )
    before = {name: getattr(jax.config, name) for name in names}

    def call(*flags: str, spec: str | None = f"{TINY}:{tokenizer}", workdir: pathlib.Path = tmp_path / "run") -> Answer:
        capfd.readouterr()
        given = [f"--workdir={workdir}"] if spec is None else [f"--config={spec}", f"--workdir={workdir}"]
        code = main.exit_code([*given, *flags])
        printed = capfd.readouterr()
        return Answer(code, str(printed.out), str(printed.err))

    yield call
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--config.optimiser.learning_rate=1"], ["optimizer"]),
        (["--config.seed=x"], ["--config.seed=x", "int"]),
        (["config.seed=5"], ["did you mean --config.seed=5"]),
        (["--dry-run"], ["--dry_run"]),
        (["--config.stages[1].batch_size=10"], ["batch_size=10", "num_lanes=4", "8 or 12"]),
        (["--config.data.num_lanes=3"], ["num_lanes=3", "batch_size=16"]),
        (["--config.total_tokens=none"], ["bounds the run", "total_tokens", "steps", "epochs"]),
        (["--config.stages[2].seq_len=128"], ["seq_len=128", "max_seq_len=64"]),
        (["--config.data.holdout=0"], ["eval.every_steps=10", "data.holdout"]),
        (["--config.stages[0].weights.wep=0.5"], ["wep", "web"]),
        (["--config.checkpoint.keep=0"], ["config.checkpoint", "keep=0"]),
    ],
    ids=lambda value: value[0] if isinstance(value, list) and value[0].startswith(("-", "c")) else "",
)
def test_mistakes_on_the_command_line(
    command: Command, hub: LoopbackHub, tmp_path: pathlib.Path, flags: list[str], words: list[str]
) -> None:
    """Reported before any network access or other slow work."""
    command(*flags).is_error(2, *words)
    assert hub.count() == 0
    assert not (tmp_path / "run").exists()


def test_no_config(command: Command) -> None:
    command(spec=None).is_error(2, "--config=FILE is missing", "configs/quickstart.py")
    command(spec="configs/quikstart.py").is_error(2, "configs/quikstart.py", "configs/quickstart.py")


def test_help(command: Command, tokenizer: pathlib.Path) -> None:
    answer = command("--help")
    assert answer.code == 0
    assert "--dry_run" in answer.out
    assert "--config.stages[1].seq_len" in answer.out


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--config.data.sources.web.name=e2e/wep"], ["source 'web'", "e2e/wep", "does not exist"]),
        (["--config.data.sources.code.column=text_"], ["source 'code'", "text_", "content"]),
        (["--config.data.sources.wiki.split=test"], ["source 'wiki'", "'test'", "'train'"]),
        (["--config.data.sources.wiki.revision=v2"], ["source 'wiki'", "'v2'"]),
        (["--config.mesh.fsdp=3"], ["mesh", "3", "8"]),
        (["--config.tokenizer.path=/nowhere/x.model"], ["/nowhere/x.model", "no such file"]),
        (
            ["--config.stages[1].batch_size=4"],
            ["batch of 4 rows", "mesh.data * mesh.fsdp = 8", "1, 2, 4"],
        ),
        (["--config.init_from=/nowhere/run"], ["/nowhere/run"]),
    ],
    ids=lambda value: value[0] if isinstance(value, list) and value[0].startswith("-") else "",
)
def test_what_is_not_there(command: Command, hub: LoopbackHub, flags: list[str], words: list[str]) -> None:
    fill(hub)
    command(*flags).is_error(2, *words)


def test_gated(command: Command, hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(hub)
    for access in ("gated", "refused"):
        hub.access("e2e/web", access)
        command().is_error(2, "source 'web'", "gated", "HF_TOKEN", "https://huggingface.co/datasets/e2e/web")
    hub.access("e2e/web", "private")
    command().is_error(2, "e2e/web", "private", "HF_TOKEN")


def test_workdir(command: Command, tmp_path: pathlib.Path, hub: LoopbackHub) -> None:
    (tmp_path / "file").touch()
    command(workdir=tmp_path / "file").is_error(2, "is a file", "directory")
    command(workdir=pathlib.Path("/dev/null/x")).is_error(2, "/dev/null/x", "cannot be written")
    with Workdir(tmp_path / "busy"):
        command(workdir=tmp_path / "busy").is_error(2, "in use by another run", str(os.getpid()), "--workdir")


def copied(stopped: Run, tmp_path: pathlib.Path) -> pathlib.Path:
    return pathlib.Path(shutil.copytree(stopped.workdir, tmp_path / "copy"))


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--config.stages[0].seq_len=8"], ["stage 1 (short)", "seq_len was 16, is now 8"]),
        (["--config.stages[1].weights.web=0.25", "--config.stages[1].weights.code=0.5"], ["stage 2", "weights"]),
        (["--config.stages[0].tokens=2560"], ["last_step was 16, is now 10", "stages[0].tokens (stage 1, short)"]),
        (["--config.seed=8"], ["seed"]),
        (["--config.data.shuffle=false"], ["data.shuffle"]),
        (["--config.data.num_lanes=2"], ["num_lanes"]),
        (["--config.model.num_layers=3"], ["model.num_layers"]),
        (["--config.data.sources.code.max_samples=100"], ["'code'", "max_samples"]),
        (["--config.steps=5"], ["the plan now ends at step 5"]),
    ],
    ids=lambda value: value[0] if isinstance(value, list) and value[0].startswith("-") else "",
)
def test_refused_resumes(
    command: Command, hub: LoopbackHub, stopped: Run, tmp_path: pathlib.Path, flags: list[str], words: list[str]
) -> None:
    """Changes of the data or of the parameters' meaning are refused, and the checkpoint is untouched."""
    fill(hub)
    workdir = copied(stopped, tmp_path)
    metrics = (workdir / "metrics.jsonl").read_bytes()
    command(*flags, workdir=workdir).is_error(2, f"step {stopped.last_step()}", "--workdir", *words)
    assert (workdir / "metrics.jsonl").read_bytes() == metrics


def test_another_tokenizer(command: Command, hub: LoopbackHub, stopped: Run, tmp_path: pathlib.Path) -> None:
    fill(hub)
    config = TrainTokenizer(kind="sentencepiece", vocab_size=384, max_samples=100)
    config.train(documents(99, 100), tmp_path, progress=False)
    path = tmp_path / "tokenizer" / "tokenizer.model"
    answer = command(f"--config.tokenizer.path={path}", workdir=copied(stopped, tmp_path))
    answer.is_error(2, "tokenizer", f"step {stopped.last_step()}")


def test_no_network(make_run: MakeRun) -> None:
    """A port without a listener."""
    run = make_run(HF_ENDPOINT="http://127.0.0.1:9")("--config.data.retry_minutes=0.03", code=1)
    assert "Is there a network? Gave up" in run.output
    assert "Gave up after" in run.output
    assert "Traceback" not in run.output


def test_nothing_but_skipped_updates(make_run: MakeRun) -> None:
    """A learning rate that makes every number infinite: the run stops by itself and logs non-finite numbers as null."""
    run = make_run()
    run("--config.optimizer.learning_rate=1e30", "--config.max_skipped_steps=3", code=1)
    assert "error: 3 updates in a row had non-finite gradients" in run.output
    assert "Traceback" not in run.output
    lines = run.steps()
    assert [line["skipped_in_a_row"] for line in lines[-3:]] == [1, 2, 3]
    assert all(line[name] is None for line in lines[-3:] for name in ("loss", "perplexity", "grad_norm"))


def test_later_stages_may_change(make_run: MakeRun, stopped: Run, reference: Run) -> None:
    run = make_run(copy=stopped)
    run("--config.stages[2].seq_len=32", "--config.steps=38", "--config.optimizer.learning_rate=1e-3")
    assert "Changed since the checkpoint:   stages[2].seq_len (stage 3, long)" in run.output
    lines, before = run.steps(), reference.steps()
    assert (lines[-1]["step"], lines[-1]["seq_len"]) == (38, 32)
    assert [line["fingerprint"] for line in lines[:36]] == [line["fingerprint"] for line in before[:36]]


@pytest.mark.parametrize("damage", nightly_but(["cut"], ["cut", "lost"]))
def test_a_damaged_checkpoint(make_run: MakeRun, stopped: Run, reference: Run, damage: str) -> None:
    """The newest checkpoint is moved aside, and the run resumes from an older one to the same result."""
    run = make_run(copy=stopped)
    newest, older = run.checkpoints()[-1], run.checkpoints()[-2]
    folder = run.workdir / "checkpoints" / str(newest)
    file = max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    if damage == "cut":
        os.truncate(file, file.stat().st_size // 2)
    else:
        file.unlink()
    run()
    assert f"Checkpoint {newest} is damaged: {folder}" in run.output
    assert f"Resumed from step {older} " in run.output
    assert_equal(run, reference)


@pytest.mark.slow
def test_a_full_disk(make_run: MakeRun, reference: Run, tmp_path: pathlib.Path) -> None:
    """The run stops at the checkpoint that does not fit, and resumes once there is room."""
    run = make_run()
    folder = run.workdir / "checkpoints"
    folder.mkdir(parents=True)
    with small_disk(folder, "1m") as grow:
        run(code=2)
        assert "disk is full" in run.output
        assert "Traceback" not in run.output
        grow("64m")
        run()
        assert_equal(run, reference)


@contextlib.contextmanager
def small_disk(folder: pathlib.Path, size: str) -> Iterator[Callable[[str], None]]:
    """Mounts a small file system and yields a function that enlarges it."""
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs the right to mount a file system")
    try:
        yield lambda size: subprocess.run(["mount", "-o", f"remount,size={size}", str(folder)], check=True) and None
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.slow
def test_faults_on_the_way_change_nothing(make_run: MakeRun, datasets: LoopbackHub, reference: Run) -> None:
    """A fifth of all requests fail, in every way; then the Hub is down for some seconds."""
    with datasets.lock:
        datasets.faults.clear()
    try:
        for seed, kind in enumerate(("status:503", "reset", "truncate", "status:429")):
            datasets.fault("resolve", kind, probability=0.05, seed=seed)
        run = make_run().start()
        if run.wait_for_step(15):
            away = datasets.fault("", "reset")
            time.sleep(3)
            datasets.faults.remove(away)
        assert run.wait() == 0, run.output
        assert_equal(run, reference)
    finally:
        datasets.faults.clear()


@pytest.mark.parametrize("number", nightly_but([signal.SIGTERM], [signal.SIGTERM, signal.SIGINT]))
def test_stopped_in_an_outage(make_run: MakeRun, datasets: LoopbackHub, reference: Run, number: signal.Signals) -> None:
    """While the Hub is down no batch arrives; a signal still saves the trained state and ends the process."""
    run = make_run()
    run.start("--config.checkpoint.every_steps=1000")
    try:
        assert run.wait_for_step(3), run.output
        datasets.fault("", "status:503")
        assert run.wait_until(lambda: run.stands_still(2.0)), run.output
        run.signal(number)
        # The exit does not wait for the readers, which would go on retrying.
        assert run.wait(40) == STOPPED, run.output
    finally:
        datasets.faults.clear()
    assert run.checkpoints() == [run.last_step()]
    run()
    assert_equal(run, reference)
