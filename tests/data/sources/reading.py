"""Documents for tests of sources, datasets on the loopback Hub that contain them, and reading them back."""

import random
from collections.abc import Iterable

from jaxtrain.data.sources.huggingface import HuggingFace
from jaxtrain.interfaces import Block
from tests.hub import LoopbackHub, csv_bytes, jsonl_bytes, parquet_bytes, text_bytes


def documents(count: int, seed: int = 0, longest: int = 60) -> list[str]:
    """Texts of 0 to `longest` words: empty ones, several scripts, line ends, quotes, and 4-byte characters."""
    rng = random.Random(seed)
    words = ["the", "être", "水", "λόγος", "\n", '"quoted"', "a,b", "🜁🜂", "\t", "x" * 20, "\\", "{}", "\r\n", "'"]
    return [" ".join(rng.choices(words, k=rng.randint(0, longest))) for _ in range(count)]


def texts(blocks: Iterable[Block]) -> list[str]:
    """All texts of `blocks`. Checks that no block is empty and that its columns have the same length."""
    found = []
    for block in blocks:
        assert {len(column) for column in block.values()} == {len(block["text"])} != {0}
        found += block["text"]
    return found


TEXTS = documents(1500, longest=12)
LINES = [f"line {i} λόγος" * (i % 3) for i in range(1500)]  # texts that fit on a line; every third is empty
FORMATS = {
    "parquet": lambda rows: parquet_bytes(rows, 190),
    "jsonl": jsonl_bytes,
    "jsonl.gz": lambda rows: jsonl_bytes(rows, compress=True),
    "csv": lambda rows: csv_bytes(rows, id=range(len(rows))),  # pandas skips blank lines, so avoid them
    "txt": text_bytes,
}


def rows_of(suffix: str) -> list[str]:
    return LINES if suffix == "txt" else TEXTS


def publish(hub: LoopbackHub, suffix: str, files: int = 2, name: str = "org/web") -> HuggingFace:
    """A dataset with `files` files, each holding its part of the rows."""
    rows = rows_of(suffix)
    size = len(rows) // files
    parts = {f"data/train-{i}.{suffix}": FORMATS[suffix](rows[i * size : (i + 1) * size]) for i in range(files)}
    hub.commit(name, {"README.md": b"# web\n", **parts})
    return HuggingFace(name=name)
