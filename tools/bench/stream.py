"""Runs the data path on parquet files, with a tokenizer that costs almost nothing."""

import contextlib
import zlib
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from jaxtrain.data import pipeline
from jaxtrain.data.pipeline import DataConfig, StepBatch
from jaxtrain.data.sources.huggingface import HuggingFace
from jaxtrain.interfaces import Json, Source, Tokenizer
from jaxtrain.plan import Plan, Stage, build_plan


class Prepared:
    """A tokenizer with almost no work: it slices ids from a table, one per `characters` characters.

    The ids depend only on the text, so equal streams have equal tokens.
    """

    def __init__(self, characters: float, vocab_size: int):
        self.vocab_size = vocab_size
        self.eos_id = 0
        self.bos_id: int | None = None
        self.token_bytes = np.zeros(vocab_size, np.int32)
        self.identity: Json = {"kind": "prepared"}
        self._characters = characters
        self._table = np.random.default_rng(0).integers(1, vocab_size, 1 << 20).astype(np.int32)

    def encode_batch(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        lengths = [max(round(len(text) / self._characters), 1) for text in texts]
        while max(lengths, default=0) >= len(self._table) // 2:
            self._table = np.concatenate([self._table, self._table])
        # The beginning of the text selects a position in the first half of the table.
        places = (zlib.crc32(text[:64].encode()) % (len(self._table) // 2) for text in texts)
        cuts = [self._table[place : place + length] for place, length in zip(places, lengths, strict=True)]
        return np.concatenate([np.empty(0, np.int32), *cuts]), np.array(lengths, np.int64)

    def decode(self, ids: Sequence[int]) -> str:
        return " ".join(map(str, ids))


def config(addresses: Sequence[str], *, num_lanes: int, workers: int) -> DataConfig:
    """Returns a data config with one source of parquet files, given by paths or URLs."""
    source = HuggingFace(name="parquet", data_files=tuple(addresses))
    data = DataConfig(sources={"corpus": source}, num_lanes=num_lanes, workers=workers)
    source.check()
    data.check()
    return data


def endless_plan(data: DataConfig, *, seq_len: int, batch_size: int, packing: str = "concat") -> Plan:
    """Returns a plan with one stage, until the data ends."""
    return build_plan(
        (Stage(seq_len=seq_len, batch_size=batch_size, packing=packing),),
        source_names=tuple(data.sources),
        num_lanes=data.num_lanes,
        seed=0,
        total_tokens=None,
        steps=None,
        epochs=1,
        learning_rate=1.0,
        schedule=lambda tokens, total: 1.0,
    )


@contextlib.contextmanager
def batches(
    data: DataConfig,
    plan: Plan,
    tokenizer: Tokenizer,
    *,
    after: int = 0,
    states: Mapping[int, np.ndarray] | None = None,
    resolved: Mapping[str, Source] | None = None,
) -> Iterator[Iterator[StepBatch]]:
    """Reads one epoch as a run on one host does. The threads end with the context.

    Args:
        data: The data config.
        plan: The plan of the epoch.
        tokenizer: The tokenizer.
        after: Step to resume after.
        states: The lanes' positions after that step.
        resolved: The sources; None streams them.
    """
    readers = data.build(pipeline.resolve(data) if resolved is None else resolved, seed=0)
    threads = pipeline.pools(data)
    found = pipeline.host_batches(
        readers,
        plan,
        data.row_spec(tokenizer, epochs=1),
        range(data.num_lanes),
        threads,
        after=after,
        states=states or {},
        prefetch=data.threads()[1],
    )
    with contextlib.ExitStack() as stack:
        stack.callback(threads.workers.shutdown)
        stack.callback(threads.readers.shutdown)
        stack.callback(getattr(found, "close", lambda: None))
        yield found
