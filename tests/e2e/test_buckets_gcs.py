"""Sources and a work directory in Google Cloud Storage, served by an emulator (the `buckets` extra)."""

import pathlib

import pytest

from tests import gcs
from tests.e2e.runs import environment
from tests.e2e.test_buckets import CONFIG, Runs, data, resumed_as_on_a_disk


@pytest.mark.nightly
def test_a_run_in_a_bucket_is_the_run_on_a_disk(
    compiled: None, tokenizer: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    with gcs.serve("data", "runs") as (there, runs):
        for name, content in data().items():
            there.put(name, content)
        env = environment(runs.env(), XDG_CACHE_HOME=str(tmp_path / "cache"))
        resumed_as_on_a_disk(Runs(f"{CONFIG}:gs|{tokenizer}", env), runs, "gs://runs", tmp_path / "local")
