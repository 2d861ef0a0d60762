"""A run on tar shards, with a disk limit of a few shards: killed and resumed, it ends like an uninterrupted run."""

import contextlib
import os
import pathlib
import re
from collections.abc import Iterator

import pytest

from jaxtrain import cli
from jaxtrain.errors import UserError
from jaxtrain.trainer import dry_run
from tests.data.io.test_disk_cache import watching
from tests.data.sources.tars import COMPRESS, shard
from tests.e2e.runs import Run, assert_equal, documents, environment

CONFIG = "tests/e2e/configs/shards.py"


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, int]:
    """(pattern, size of the largest in bytes) of 9 shards: more shards than lanes, so each lane reads its own."""
    folder = tmp_path_factory.mktemp("shards")
    for number in range(9):
        (folder / f"s-{number:02d}.tar.bz2").write_bytes(COMPRESS["tar.bz2"](shard(documents(number, 12))))
    return f"{folder}/s-{{00..08}}.tar.bz2", max(path.stat().st_size for path in folder.iterdir())


@contextlib.contextmanager
def running(run: Run) -> Iterator[Run]:
    try:
        yield run
    finally:
        if run.process is not None:
            run.kill()


@pytest.mark.slow
def test_a_run_within_a_disk_limit(shards: tuple[str, int], tokenizer: pathlib.Path, tmp_path: pathlib.Path) -> None:
    pattern, largest = shards
    limit = 2.5 * largest / 1e9
    whole = Run(tmp_path / "whole", f"{CONFIG}:{tokenizer}|{pattern}|1", environment({}))()
    assert f"Disk cache: at most 1.00 GB in {whole.workdir}/cache/data" in whole.output
    assert len(os.listdir(whole.workdir / "cache" / "data")) > 5
    run = Run(tmp_path / "run", f"{CONFIG}:{tokenizer}|{pattern}|{limit!r}", environment({}))
    cache = run.workdir / "cache" / "data"
    with running(run), watching(cache) as seen:
        for step in (3, 12):
            run.start()
            assert run.wait_for_step(step), run.output
            run.kill()
        run()
    assert largest <= max(seen) <= limit * 1e9
    used = [line["disk_cache_gb"] for line in run.steps()]
    assert 0 < min(used) <= max(used) <= limit
    assert_equal(run, whole)


@pytest.mark.slow
def test_what_cannot_fit_is_refused(shards: tuple[str, int], tokenizer: pathlib.Path, tmp_path: pathlib.Path) -> None:
    pattern, largest = shards
    small = Run(tmp_path / "small", f"{CONFIG}:{tokenizer}|{pattern}|{largest / 2e9!r}", environment({}))(code=2)
    assert "more than the disk cache in" in small.output
    assert "Traceback" not in small.output
    dry = Run(tmp_path / "dry", f"{CONFIG}:{tokenizer}|{pattern}|1000000", environment({}))("--dry_run")
    assert re.search(r"disk cache: at most [\d.]+ MB, [\d.]+ MB used", dry.output)  # the size of all shards
    with pytest.raises(UserError, match=r"GB free, both need 1000000000\.00 GB: lower data\.max_disk_gb, or give"):
        dry_run._check_free(str(tmp_path), 10**18, "both need", "data.max_disk_gb")


def test_80m_takes_shards() -> None:
    streamed, shards = cli.load("configs/80m.py"), cli.load("configs/80m.py:s3://b/s-{0..9}.tar.bz2")
    assert [type(source).__name__ for source in streamed.data.sources.values()] == ["HuggingFace"]
    assert shards.data.sources["shards"].urls == ("s3://b/s-{0..9}.tar.bz2",)
    cache = shards.data.cache("x")
    assert cache.limit == 35e9
    smaller = cli.load("configs/80m.py:a.tar", ["--config.data.max_disk_gb=20"])
    assert smaller.data.cache("x").limit == 20e9
