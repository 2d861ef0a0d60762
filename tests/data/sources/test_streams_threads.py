"""Several files opened at once: the library's set-up is not safe for that by itself, so it runs once at a time."""

import json
import pathlib
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import datasets
import pytest

from jaxtrain.data.sources import streams
from jaxtrain.data.sources.huggingface import HuggingFace


def test_many_threads_open_files_at_once(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch):
    for number in range(4):
        lines = [json.dumps({"text": f"{number} {row}"}) for row in range(20)]
        (tmp_path / f"{number}.jsonl").write_text("\n".join(lines))
    source = HuggingFace(name="json", data_files=(str(tmp_path / "*.jsonl"),)).resolve()
    inside, load = threading.Lock(), datasets.load_dataset

    def alone(*arguments: Any, **options: Any) -> Any:
        assert inside.acquire(blocking=False), "another thread is setting up a reader"
        try:
            time.sleep(0.01)
            return load(*arguments, **options)
        finally:
            inside.release()

    monkeypatch.setattr(datasets, "load_dataset", alone)

    def texts(file: int) -> list[str]:
        return [text for block in source.open(file % 4, 0) for text in block["text"]]

    with ThreadPoolExecutor(8) as pool:
        read = list(pool.map(texts, range(16)))
    assert read == [[f"{file % 4} {row}" for row in range(20)] for file in range(16)]


def test_a_reader_that_is_collected_while_another_is_added():
    """The collector runs in any thread, at any place: also where a file is being added."""
    files = streams._Files()
    pieces: Any = object()
    first, second = files.add(pieces, "a.jsonl"), files.add(pieces, "b.jsonl.gz")

    def collected() -> None:
        with files.lock:
            files.remove(first)

    thread = threading.Thread(target=collected, daemon=True)
    thread.start()
    thread.join(20)
    assert not thread.is_alive()
    assert list(files.pieces) == [second] == ["1/file.jsonl.gz"]
    assert files.add(pieces, "c.csv") == "0/file.csv"
