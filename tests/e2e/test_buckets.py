"""Sources and a work directory in S3, served by a loopback server (the `buckets` extra)."""

import json
import pathlib
import subprocess
import sys
from collections.abc import Iterator
from typing import Any, Protocol

import pytest

from tests.data.sources.tars import COMPRESS, shard
from tests.e2e.runs import ROOT, documents, environment
from tests.e2e.test_secrets import PLANTED, SEARCHED
from tests.hub import LoopbackHub, jsonl_bytes, parquet_bytes

CONFIG = "tests/e2e/configs/buckets.py"
KEYS = {name: PLANTED[name] for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "HF_TOKEN")}


def data() -> dict[str, bytes]:
    """The files the config reads."""
    found: dict[str, bytes] = {}
    for n in range(4):
        found[f"tars/shard-{n}.tar.bz2"] = COMPRESS["tar.bz2"](shard(documents(n, 60)))
        found[f"web/train-{n}.parquet"] = parquet_bytes(documents(10 + n, 120), row_group_size=12)
        found[f"code/train-{n}.jsonl.gz"] = jsonl_bytes(documents(20 + n, 60), compress=True)
    return found


class Objects:
    """The objects of one bucket, as stored by the server."""

    def __init__(self, client: Any, name: str):
        self.client, self.name = client, name

    def __call__(self, prefix: str = "") -> dict[str, bytes]:
        pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=self.name, Prefix=prefix)
        names = [each["Key"] for page in pages for each in page.get("Contents", [])]
        return {name: self.client.get_object(Bucket=self.name, Key=name)["Body"].read() for name in names}

    def put(self, name: str, data: bytes) -> None:
        self.client.put_object(Bucket=self.name, Key=name, Body=data)

    def delete(self, name: str) -> None:
        self.client.delete_object(Bucket=self.name, Key=name)


class Runs:
    """Runs with these settings in their environment. `output` collects everything they print."""

    def __init__(self, spec: str, env: dict[str, str]):
        self.spec, self.env = spec, env
        self.output = ""

    def __call__(self, workdir: str, *flags: str, code: int = 0) -> str:
        command = [sys.executable, "-m", "jaxtrain.main", f"--config={self.spec}", f"--workdir={workdir}", *flags]
        done = subprocess.run(command, cwd=ROOT, env=self.env, capture_output=True, text=True, timeout=540, check=False)
        output = done.stdout + done.stderr
        assert done.returncode == code, output
        self.output += output
        return output


@pytest.fixture
def bucket(datasets: LoopbackHub, tokenizer: pathlib.Path, tmp_path: pathlib.Path) -> Iterator[tuple[Runs, Objects]]:
    """Runs that read from one bucket of a server, and the bucket they may write to."""
    pytest.importorskip("s3fs")
    boto3 = pytest.importorskip("boto3")
    server = pytest.importorskip("moto.server").ThreadedMotoServer(port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    region = "us-east-1"
    client = boto3.client(
        "s3",
        endpoint_url=f"http://{host}:{port}",
        region_name=region,
        aws_access_key_id="test",
        aws_secret_access_key="test",
    )
    env = environment(datasets.env(), XDG_CACHE_HOME=str(tmp_path / "cache"))
    env |= {**KEYS, "AWS_ENDPOINT_URL": f"http://{host}:{port}", "AWS_DEFAULT_REGION": region}
    for name in ("data", "runs"):
        client.create_bucket(Bucket=name)
    for name, content in data().items():
        Objects(client, "data").put(name, content)
    yield Runs(f"{CONFIG}:s3|{tokenizer}", env), Objects(client, "runs")
    server.stop()


def fingerprints(metrics: bytes) -> dict[int, str]:
    lines = [json.loads(line) for line in metrics.splitlines()]
    return {line["step"]: line["fingerprint"] for line in lines if "fingerprint" in line}


class Bucket(Protocol):
    """A bucket's contents, accessed on the server itself."""

    def __call__(self, prefix: str = "") -> dict[str, bytes]: ...
    def put(self, name: str, data: bytes) -> None: ...
    def delete(self, name: str) -> None: ...


def resumed_as_on_a_disk(runs: Runs, bucket: Bucket, url: str, local: pathlib.Path) -> dict[str, bytes]:
    """Checks that a run in a bucket equals the same run in a folder.

    The first is resumed past a save that a kill left unfinished, and past a checkpoint that lost a file. Returns the
    files it leaves.
    """
    runs(str(local))
    wanted = fingerprints((local / "metrics.jsonl").read_bytes())
    assert max(wanted) == 30
    runs(f"{url}/a run", "--config.steps=15")
    saved = bucket("a run/checkpoints/")
    assert {name.split("/")[2] for name in saved} == {"5", "10", "15"}
    bucket.delete(next(name for name in saved if name.startswith("a run/checkpoints/15/params/") and "/d/" in name))
    bucket.put("a run/checkpoints/20/params/_METADATA", b"{}")
    output = runs(f"{url}/a run")
    assert "Resumed from step 10" in output
    assert "checkpoints/15.corrupt" in output
    found = bucket("a run/")
    assert fingerprints(found["a run/metrics.jsonl"]) == wanted
    assert {name.split("/")[2] for name in found if "/checkpoints/" in name} == {"15.corrupt", "20", "25", "30"}
    assert json.loads(found["a run/config.json"])
    assert b"Finished." in found["a run/log.txt"]
    assert "a run/lock" not in found
    assert "Nothing to do." in runs(f"{url}/a run")
    return found


@pytest.mark.slow
def test_a_run_in_a_bucket_is_the_run_on_a_disk(bucket: tuple[Runs, Objects], tmp_path: pathlib.Path) -> None:
    runs, objects = bucket
    found = resumed_as_on_a_disk(runs, objects, "s3://runs", tmp_path / "local")
    places = {"the output": runs.output.encode(), **found}
    places |= {str(path): path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    secrets = [word for word in SEARCHED if word != "duser"]
    assert not [(word, place) for place, data in places.items() for word in secrets if word.encode() in data]


@pytest.mark.slow
def test_what_cannot_be_reached_is_one_message(bucket: tuple[Runs, Objects], tmp_path: pathlib.Path) -> None:
    runs, _ = bucket
    output = runs(str(tmp_path / "run"), "--config.data.sources.web.data_files=(s3://data/gone/*.parquet,)", code=2)
    assert "error: source 'web': no file matches 's3://data/gone/*.parquet'" in output
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"):
        del runs.env[name]
    runs.env |= {"AWS_EC2_METADATA_DISABLED": "true", "HOME": str(tmp_path)}
    for workdir in (str(tmp_path / "run"), "s3://runs/refused"):
        output = runs(workdir, code=2)
        assert "error: " in output
        assert "Unable to locate credentials" in output
        assert "Traceback" not in output
