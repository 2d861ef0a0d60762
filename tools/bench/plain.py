"""The usual pipeline for the same rows: `datasets` streams, two batched maps (tokenize, group) and a DataLoader.

It follows the libraries' guides (run_clm of transformers, the streaming guide of datasets). It has no lanes, no
resumable state and no document masks, and it shuffles with a buffer.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxtrain.interfaces import Tokenizer
from jaxtrain.plan import StagePlan
from tools.bench.common import Spent, Stopwatch

_DOCUMENTS = 1000  # per call of a map: the default of `datasets`
_BUFFER = 4096  # documents: 8 lanes' windows of 512


def is_installed() -> bool:
    """Whether torch is installed (extra `parity`)."""
    try:
        import torch  # noqa: F401  # pyright: ignore[reportMissingImports]
    except ImportError:
        return False
    return True


def epoch(paths: Sequence[str], tokenizer: Tokenizer, stage: StagePlan) -> tuple[Spent, int]:
    """Reads parquet files once, in rows and batches of the stage's size.

    Returns:
        The time spent, and the number of tokens in whole rows (the rest is dropped).
    """
    import datasets
    from torch.utils.data import DataLoader  # pyright: ignore[reportMissingImports]

    def tokenize(batch: dict[str, list[str]]) -> dict[str, list[np.ndarray]]:
        ids, lengths = tokenizer.encode_batch(batch["text"])
        return {"ids": np.split(ids, np.cumsum(lengths)[:-1])}

    def pack(batch: dict[str, list[Any]]) -> dict[str, np.ndarray]:
        end = np.array([tokenizer.eos_id])
        ids = np.concatenate([part for document in batch["ids"] for part in (document, end)])
        rows = len(ids) // stage.seq_len
        tokens = ids[: rows * stage.seq_len].reshape(rows, stage.seq_len)
        return {"input_ids": tokens, "labels": tokens}

    watch = Stopwatch()
    stream = datasets.load_dataset("parquet", data_files=list(paths), split="train", streaming=True, columns=["text"])
    assert isinstance(stream, datasets.IterableDataset)
    stream = stream.shuffle(seed=0, buffer_size=_BUFFER)
    stream = stream.map(tokenize, batched=True, batch_size=_DOCUMENTS, remove_columns=["text"])
    stream = stream.map(pack, batched=True, batch_size=_DOCUMENTS, remove_columns=["ids"]).with_format("torch")
    rows = sum(len(batch["input_ids"]) for batch in DataLoader(stream, batch_size=stage.batch_size))  # type: ignore[arg-type]
    return watch.spent(), rows * stage.seq_len
