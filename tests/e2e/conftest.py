"""Fixtures of the end-to-end tests: a Hub with three datasets, a tokenizer, and an uninterrupted reference run."""

import os
import pathlib
import shutil
import signal
from collections.abc import Callable, Iterator

import filelock
import pytest

from jaxtrain.tokenizers.training import TrainTokenizer
from tests.e2e import runs
from tests.e2e.runs import COMPILED, STOPPED, TINY, Run, documents, environment
from tests.hub import LoopbackHub, jsonl_bytes, parquet_bytes

MakeRun = Callable[..., Run]
Once = Callable[..., Run]

WIKI = documents(10, 32, words=5)


def fill(hub: LoopbackHub) -> None:
    """Commits the datasets of configs/tiny.py: lanes take units of `web` and share the files of `wiki` and `code`.

    `wiki` is small, so the run reads it more than once.
    """
    web = {f"data/train-{n}.parquet": parquet_bytes(documents(n, 120), row_group_size=12) for n in range(4)}
    hub.commit("e2e/web", web)
    hub.commit("e2e/wiki", {"data/train-0.parquet": parquet_bytes(WIKI, row_group_size=16)})
    code = documents(20, 300)
    hub.commit("e2e/code", {"train.jsonl.gz": jsonl_bytes(code, compress=True, content=code)})


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A folder shared by all pytest-xdist workers."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


@pytest.fixture(scope="session", autouse=True)
def compiled(shared: pathlib.Path) -> Iterator[None]:
    """Compiles each program once per session."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(runs.OF_ALL_RUNS, COMPILED, str(shared / "compiled"))
        yield


@pytest.fixture(scope="session")
def datasets(compiled: None) -> Iterator[LoopbackHub]:
    """A separate Hub, because each test that uses the one in tests/hub_fixtures.py empties it."""
    with LoopbackHub() as hub:
        fill(hub)
        yield hub


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    config = TrainTokenizer(kind="sentencepiece", vocab_size=384, max_samples=200)
    config.train(documents(0, 200), folder, progress=False)
    return folder / "tokenizer" / "tokenizer.model"


@pytest.fixture(scope="session")
def once(shared: pathlib.Path, datasets: LoopbackHub, tokenizer: pathlib.Path) -> Once:
    """Makes runs that a session needs once: the first worker that asks trains, the others wait for its work directory.

    Each worker has its own Hub. All have the same content, so their commits have the same names.
    """

    def once(name: str, train: Callable[[Run], object], config: str = TINY) -> Run:
        folder = shared / name
        run = Run(folder / "a run", f"{config}:{tokenizer}", environment(datasets.env()))
        with filelock.FileLock(shared / f"{name}.lock"):
            if not (folder / "done").exists():
                folder.mkdir(exist_ok=True)
                train(run)
                (folder / "done").touch()
        run.output = run.output_file.read_text()
        return run

    return once


@pytest.fixture(scope="session")
def reference(once: Once) -> Run:
    """configs/tiny.py from start to end, on one device, uninterrupted."""
    return once("reference", lambda run: run())


@pytest.fixture(scope="session")
def stopped(once: Once) -> Run:
    """The same, stopped by SIGTERM in its second stage. Copy it to resume it."""

    def train(run: Run) -> None:
        run.start()
        assert run.wait_for_step(21), run.output
        run.signal(signal.SIGTERM)
        assert run.wait() == STOPPED, run.output

    return once("stopped", train)


@pytest.fixture
def make_run(datasets: LoopbackHub, tokenizer: pathlib.Path, tmp_path: pathlib.Path) -> Iterator[MakeRun]:
    """Makes runs, with `copy` in a copy of another run's work directory."""
    made: list[Run] = []

    def make(
        name: str = "run", processes: int = 1, devices: int = 1, config: str = TINY, copy: Run | None = None, **env: str
    ) -> Run:
        settings = environment(datasets.env(), devices, **env)
        run = Run(tmp_path / name, f"{config}:{tokenizer}", settings, processes=processes)
        made.append(run)
        if copy is None:
            run.workdir.mkdir(exist_ok=True)
        else:
            shutil.copytree(copy.workdir, run.workdir)
        return run

    yield make
    for run in made:
        if run.process is not None:
            run.kill()
