"""What the end-to-end tests share: a Hub with three datasets, a tokenizer, and an uninterrupted run to compare with."""

import os
import pathlib
import shutil
import signal
from collections.abc import Callable, Iterator

import pytest

from jaxtrain.tokenizers.training import TrainTokenizer
from tests.e2e import runs
from tests.e2e.runs import COMPILED, STOPPED, TINY, Run, documents, environment
from tests.hub import LoopbackHub, jsonl_bytes, parquet_bytes

MakeRun = Callable[..., Run]

WIKI = documents(10, 32, words=5)


def fill(hub: LoopbackHub) -> None:
    """The datasets of configs/tiny.py: `web` is dealt to the lanes, `wiki` and `code` are striped over them.

    `wiki` is small: the run reads it more than once."""
    web = {f"data/train-{n}.parquet": parquet_bytes(documents(n, 120), row_group_size=12) for n in range(4)}
    hub.commit("e2e/web", web)
    hub.commit("e2e/wiki", {"data/train-0.parquet": parquet_bytes(WIKI, row_group_size=16)})
    code = documents(20, 300)
    hub.commit("e2e/code", {"train.jsonl.gz": jsonl_bytes(code, compress=True, content=code)})


@pytest.fixture(scope="session", autouse=True)
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Programs are compiled once a session: the folder is that of all workers of pytest-xdist."""
    base = tmp_path_factory.getbasetemp()
    with pytest.MonkeyPatch.context() as patch:
        shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
        patch.setitem(runs.OF_ALL_RUNS, COMPILED, str(shared / "compiled"))
        yield


@pytest.fixture(scope="session")
def datasets(compiled: None) -> Iterator[LoopbackHub]:
    """A Hub of its own: that of tests/hub_fixtures.py is emptied by each test that uses it."""
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
def reference(datasets: LoopbackHub, tokenizer: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """configs/tiny.py from beginning to end, on one device, without any interruption."""
    workdir = tmp_path_factory.mktemp("reference") / "a run"
    return Run(workdir, f"{TINY}:{tokenizer}", environment(datasets.env()))()


@pytest.fixture(scope="session")
def stopped(datasets: LoopbackHub, tokenizer: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The same, stopped by SIGTERM in its second stage. To be copied by those who go on with it."""
    workdir = tmp_path_factory.mktemp("stopped") / "run"
    run = Run(workdir, f"{TINY}:{tokenizer}", environment(datasets.env()))
    run.start()
    assert run.wait_for_step(21), run.output
    run.signal(signal.SIGTERM)
    assert run.wait() == STOPPED, run.output
    return run


@pytest.fixture
def make_run(datasets: LoopbackHub, tokenizer: pathlib.Path, tmp_path: pathlib.Path) -> Iterator[MakeRun]:
    """Makes runs; `copy`: in a copy of another run's work directory."""
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
