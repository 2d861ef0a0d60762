"""Tokens and credentials do not leak: everything a run writes or prints is searched for planted ones."""

import hashlib
import pathlib
from collections.abc import Callable, Iterator

import pytest

from tests.data.test_skipped_files import spoiled
from tests.e2e.runs import STOPPED, Run, documents, environment
from tests.hub import SECRET, LoopbackHub, parquet_bytes

CONFIG = "tests/e2e/configs/addressed.py"
PLANTED = {
    "HF_TOKEN": "hf_PLANTEDtokenPLANTED",
    "AWS_ACCESS_KEY_ID": "AKIAPLANTEDKEYID0000",
    "AWS_SECRET_ACCESS_KEY": "wJalr/PLANTED+secret+key/0123456789",
    "AWS_SESSION_TOKEN": "PLANTEDsessionPLANTED",
    "HTTP_PROXY": "http://proxyuser:PLANTEDproxyPLANTED@127.0.0.1:9",
    "HTTPS_PROXY": "http://proxyuser:PLANTEDproxyPLANTED@127.0.0.1:9",
}
SEARCHED = ("PLANTED", "proxyuser", "duser", SECRET)


def address(hub: LoopbackHub, data: bytes, name: str) -> str:
    """A signed address of a file, with credentials in it, as stores and colleagues share them."""
    hub.commit(f"secret/{name}", {"train.parquet": data})
    server = hub.endpoint.replace("http://", "http://duser:dPLANTEDpass@")
    tag = hashlib.sha256(data).hexdigest()
    return f"{server}/cdn/{tag}?X-Signature={SECRET}-0&token=PLANTEDquery&X-Amz-Credential=PLANTED"


def search(run: Run, output: str) -> None:
    """Raises if a planted secret is in the output or in any file of the work directory."""
    places = {"the output": output.encode()}
    places |= {str(path): path.read_bytes() for path in run.workdir.rglob("*") if path.is_file()}
    assert len(places) > 3
    found = [(word, place) for place, data in places.items() for word in SEARCHED if word.encode() in data]
    assert not found


@pytest.fixture
def start(datasets: LoopbackHub, tokenizer: pathlib.Path, tmp_path: pathlib.Path) -> Iterator[Callable[[bytes], Run]]:
    """A run on a file, surrounded by secrets."""
    runs = []

    def make(data: bytes) -> Run:
        env = {**environment(datasets.env()), **PLANTED, "ADDRESS": address(datasets, data, "file")}
        runs.append(Run(tmp_path / "run", f"{CONFIG}:{tokenizer}", env))
        return runs[-1]

    yield make
    datasets.faults.clear()
    for run in runs:
        run.kill()


@pytest.mark.slow
def test_planted_secrets_are_nowhere(start: Callable[[bytes], Run], datasets: LoopbackHub) -> None:
    run = start(parquet_bytes(documents(1, 480), row_group_size=12))
    output = ""

    def end(code: int, *flags: str) -> None:
        nonlocal output
        output += run(*flags, code=code).output

    for status, code in ((401, 2), (403, 2), (404, 2), (429, 1), (500, 1)):
        fault = datasets.fault("/cdn/", f"status:{status}")
        end(code)
        datasets.faults.remove(fault)
    away = datasets.fault("/cdn/", "reset")
    end(1)
    datasets.faults.remove(away)
    end(2, "--config.data.sources.web.fetch_rows=https://duser:PLANTED@example.org/?token=PLANTED")
    # Brief outages and a lasting one; then the run completes.
    for kind in ("status:503", "reset", "truncate"):
        datasets.fault("/cdn/", kind, probability=0.1)
    lasting = datasets.fault("/cdn/", "status:500", after=8)
    run.start().wait()
    output += run.output
    datasets.faults.remove(lasting)
    end(0)
    assert run.checkpoints()
    assert "answered 500" in output
    search(run, output)


@pytest.mark.slow
def test_a_corrupt_file_gives_nothing_away(start: Callable[[bytes], Run]) -> None:
    run = start(spoiled(parquet_bytes(documents(2, 480), row_group_size=12), 0.02))
    output = run(code=2).output  # before the first step it is the user's to repair
    output += run("--config.data.on_corrupt=skip", code=STOPPED).output
    assert (run.workdir / "skips.json").exists()
    search(run, output)
