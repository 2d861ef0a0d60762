"""A corpus available everywhere: Python's standard library, cut into documents, in local parquet files."""

import pathlib
from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from jaxtrain.data.sources.text_files import TextFiles

_MEDIAN_CHARACTERS, _SPREAD = 2200, 0.9  # log-normal with mean 3,300, similar to FineWeb-Edu
_LEAST_CHARACTERS = 100


def documents(megabytes: float) -> Iterator[str]:
    """Yields about `megabytes` million characters. Rereads the library with other cuts as often as necessary."""
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
    """Writes documents to parquet files.

    Args:
        folder: Output folder.
        megabytes: Millions of characters.
        files: Number of files.
        groups: Total number of row groups, a multiple of `files`. If it is also a multiple of the lanes, all lanes get
            equally many units, and none pads rows for long.

    Returns:
        The paths of the files.
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
