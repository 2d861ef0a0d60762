"""Text available everywhere: Python's standard library, cut into documents, in local parquet files."""

import pathlib
from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from jaxtrain.data.sources.text_files import TextFiles

_MEDIAN_CHARACTERS, _SPREAD = 2200, 0.9  # log-normal, 3,300 on average: about FineWeb-Edu's documents
_LEAST_CHARACTERS = 100


def documents(megabytes: float) -> Iterator[str]:
    """About `megabytes` million characters. The library is reread and cut at other places as often as needed."""
    rng = np.random.default_rng(0)
    source = TextFiles().resolve()
    left = megabytes * 1e6
    while True:
        for file in range(len(source.files)):
            text = "".join(document for block in source.open(file, 0) for document in block["text"])
            start = 0
            while start < len(text):
                length = max(int(_MEDIAN_CHARACTERS * np.exp(_SPREAD * rng.standard_normal())), _LEAST_CHARACTERS)
                document = text[start : start + length]
                yield document
                start += length
                left -= len(document)
                if left <= 0:
                    return


def write(folder: str, megabytes: float, *, files: int, groups: int) -> list[str]:
    """Writes the documents to `files` parquet files, with `groups` / `files` row groups in each; returns their paths.

    groups: a multiple of `files`. If it is one of the lanes, too, all get as many units, and none pads rows for long.
    """
    texts = list(documents(megabytes))
    paths = []
    for number in range(files):
        path = pathlib.Path(folder) / f"train-{number:05d}.parquet"
        own = texts[number::files]
        table = pa.table({"text": pa.array(own, pa.string())})
        pq.write_table(table, path, row_group_size=max(-(-len(own) * files // groups), 1), compression="zstd")
        paths.append(str(path))
    return paths
