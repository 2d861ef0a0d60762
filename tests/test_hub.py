"""The loopback Hub and the real client libraries, which must see what the real Hub would show them."""

import json
import os
import pathlib
import subprocess
import sys
import time
from typing import Any

import pytest

from tests.hub import SECRET, TOKEN, LoopbackHub, csv_bytes, jsonl_bytes, parquet_bytes, text_bytes

TEXTS = [f"document {i} été" for i in range(50)]


def test_commits_move_the_branch_and_stay_readable(hub: LoopbackHub, tmp_path):
    from huggingface_hub import HfApi, hf_hub_download

    first = hub.commit("org/web", {"a.txt": b"one", "b/c.txt": b"deep"})
    second = hub.commit("org/web", {"a.txt": b"two"}, branch="main")
    hub.commit("org/web", {"a.txt": b"other"}, branch="draft")
    api = HfApi()
    assert api.dataset_info("org/web").sha == second != first
    assert api.dataset_info("org/web", revision=first).sha == first
    assert {ref.name for ref in api.list_repo_refs("org/web", repo_type="dataset").branches} == {"main", "draft"}
    assert sorted(api.list_repo_files("org/web", repo_type="dataset")) == ["a.txt", "b/c.txt"]
    for revision, text in ((first, "one"), (second, "two"), ("draft", "other")):
        path = hf_hub_download("org/web", "a.txt", repo_type="dataset", revision=revision, cache_dir=tmp_path)
        assert pathlib.Path(path).read_text() == text


@pytest.mark.parametrize("redirect", [False, True])
def test_models_serve_tokenizer_files(hub: LoopbackHub, tmp_path, redirect):
    from huggingface_hub import snapshot_download

    hub.redirect = redirect
    hub.commit("org/model", {"config.json": b"{}", "tokenizer.json": b'{"a": 1}'}, repo_type="model")
    folder = snapshot_download("org/model", cache_dir=tmp_path)
    assert json.loads(pathlib.Path(folder, "tokenizer.json").read_text()) == {"a": 1}
    assert (hub.count("/cdn/") > 0) == redirect


def test_datasets_library_reads_every_format(hub: LoopbackHub):
    import datasets

    files = {
        "parquet": parquet_bytes(TEXTS, 7),
        "jsonl": jsonl_bytes(TEXTS),
        "jsonl.gz": jsonl_bytes(TEXTS, compress=True),
        "csv": csv_bytes(TEXTS),
        "txt": text_bytes(TEXTS),
    }
    for suffix, data in files.items():
        name = f"org/{suffix.replace('.', '-')}"
        sha = hub.commit(name, {f"data/train-0.{suffix}": data})
        stream = datasets.load_dataset(name, revision=sha, split="train", streaming=True)
        assert [row["text"] for row in stream] == TEXTS, suffix


def test_listing_has_pages(hub: LoopbackHub):
    from huggingface_hub import HfApi

    hub.page_size = 10
    hub.commit("org/many", {f"data/{i:03d}.txt": b"x" for i in range(35)})
    files = [f.path for f in HfApi().list_repo_tree("org/many", repo_type="dataset", recursive=True)]
    assert [path for path in files if path.endswith(".txt")] == [f"data/{i:03d}.txt" for i in range(35)]
    assert hub.count("/tree/") == 4


def test_refusals_are_those_of_the_real_hub(hub: LoopbackHub):
    from huggingface_hub import HfApi, hf_hub_url
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HfHubHTTPError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )
    from huggingface_hub.utils import get_session, hf_raise_for_status

    sha = hub.commit("org/gated", {"a.txt": b"x"})
    hub.commit("org/private", {"a.txt": b"x"})
    hub.access("org/gated", "gated")
    hub.access("org/private", "private")

    def get(name: str, file: str, revision: str = "main", token: str | None = None) -> None:
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        url = hf_hub_url(name, file, repo_type="dataset", revision=revision)
        hf_raise_for_status(get_session().get(url, headers=headers))

    assert HfApi().dataset_info("org/gated").gated == "auto"
    for name, file, revision, token, error in (
        ("org/gated", "a.txt", "main", None, GatedRepoError),
        ("org/private", "a.txt", "main", None, RepositoryNotFoundError),
        ("org/none", "a.txt", "main", None, RepositoryNotFoundError),
        ("org/none", "a.txt", "main", TOKEN, RepositoryNotFoundError),
        ("org/gated", "b.txt", "main", TOKEN, EntryNotFoundError),
        ("org/gated", "a.txt", "nope", TOKEN, RevisionNotFoundError),
        ("org/gated", "a.txt", "main", "hf_wrong", HfHubHTTPError),
    ):
        with pytest.raises(error):
            get(name, file, revision, token)
    get("org/gated", "a.txt", sha, TOKEN)
    get("org/private", "a.txt", "main", TOKEN)
    hub.access("org/gated", "refused")
    with pytest.raises(GatedRepoError):
        get("org/gated", "a.txt", "main", TOKEN)


def test_ranges_and_counts(hub: LoopbackHub):
    from huggingface_hub import get_session

    sha = hub.commit("org/web", {"a.bin": bytes(range(100))})
    url = f"{hub.endpoint}/datasets/org/web/resolve/main/a.bin"
    for wanted, status, body, content_range in (
        ("bytes=10-19", 206, bytes(range(10, 20)), "bytes 10-19/100"),
        ("bytes=90-200", 206, bytes(range(90, 100)), "bytes 90-99/100"),
        ("bytes=95-", 206, bytes(range(95, 100)), "bytes 95-99/100"),
        ("bytes=-5", 206, bytes(range(95, 100)), "bytes 95-99/100"),
        ("bytes=-500", 206, bytes(range(100)), "bytes 0-99/100"),
        ("bytes=100-", 416, b"", "bytes */100"),
    ):
        answer = get_session().get(url, headers={"Range": wanted})
        assert (answer.status_code, answer.content) == (status, body)
        assert answer.headers["Content-Range"] == content_range
        assert answer.headers["X-Repo-Commit"] == sha
    assert hub.count("a.bin", "GET") == 6
    assert hub.bytes("a.bin") == 10 + 10 + 5 + 5 + 100


def test_faults_by_rule(hub: LoopbackHub):
    from huggingface_hub import get_session

    data = bytes(1000)
    hub.commit("org/web", {"a.bin": data})
    url = f"{hub.endpoint}/datasets/org/web/resolve/main/a.bin"

    def outcome() -> object:
        try:
            answer = get_session().get(url, headers={"Range": "bytes=0-499"}, timeout=0.5)
        except Exception as error:
            return type(error).__name__
        return answer.status_code, answer.content == data[:500], answer.headers.get("Content-Range")

    whole = (206, True, "bytes 0-499/1000")
    cases: list[tuple[str, dict[str, Any], Any]] = [
        ("status:503", {}, (503, False, None)),
        ("reset", {}, ("ReadError", "RemoteProtocolError")),
        ("reset", {"after_bytes": 100}, ("ReadError", "RemoteProtocolError")),
        ("truncate", {}, ("RemoteProtocolError",)),
        ("slow", {"seconds": 1.0}, ("ReadTimeout",)),
        ("wrong_range", {}, (206, True, "bytes 1-500/1000")),
        ("ignore_range", {}, (200, False, None)),
        ("corrupt", {}, (206, False, "bytes 0-499/1000")),
        ("latency:0.1", {}, whole),
    ]
    for kind, options, expected in cases:
        hub.fault("a.bin", kind, count=1, after=1, **options)
        assert outcome() == whole  # the first request passes
        begun = time.monotonic()
        found = outcome()
        assert found == expected or found in expected, (kind, found)
        if kind == "latency:0.1":
            assert time.monotonic() - begun > 0.1
        assert outcome() == whole
    hub.fault("a.bin", "status:429", count=1, retry_after=7)
    assert get_session().get(url).headers["Retry-After"] == "7"
    rule = hub.fault("a.bin", "status:500", probability=0.3, seed=1)
    statuses = [get_session().get(url).status_code for _ in range(60)]
    assert 8 <= statuses.count(500) == rule.fired <= 30


def test_signed_addresses_expire(hub: LoopbackHub):
    from huggingface_hub import get_session

    hub.redirect = True
    hub.commit("org/web", {"a.bin": b"x"})
    url = f"{hub.endpoint}/datasets/org/web/resolve/main/a.bin"
    signed = str(get_session().get(url).url)
    assert SECRET in signed
    assert get_session().get(signed).content == b"x"
    hub.expire_signatures()
    assert get_session().get(signed).status_code == 403
    assert get_session().get(url).content == b"x"


def test_a_process_of_its_own_reads_it_and_so_does_the_command_line(hub: LoopbackHub, tmp_path):
    folder = tmp_path / "datasets" / "org" / "web" / "data"
    folder.mkdir(parents=True)
    (folder / "train-0.jsonl").write_bytes(jsonl_bytes(TEXTS))
    command = [sys.executable, "-m", "tests.hub", "--root", str(tmp_path)]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    try:
        env = dict(pair.split("=", 1) for pair in server.stdout.readline().split())
        code = "from huggingface_hub import HfApi; print(HfApi().list_repo_files('org/web', repo_type='dataset'))"
        shown = subprocess.run(
            [sys.executable, "-c", code], env={**os.environ, **env}, capture_output=True, text=True, check=True
        )
        assert shown.stdout.strip() == "['data/train-0.jsonl']"
    finally:
        server.terminate()
        server.wait()
        server.stdout.close()
