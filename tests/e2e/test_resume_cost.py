"""Resuming in a parquet source costs the same requests and bytes at any depth, counted by the loopback Hub."""

import dataclasses
import pathlib
import time

import numpy as np

from jaxtrain.data.pipeline import DataConfig, StepBatch, host_batches, pools, resolve
from jaxtrain.data.sources.huggingface import HuggingFace
from jaxtrain.interfaces import Json
from jaxtrain.plan import Stage, build_plan
from jaxtrain.tokenizers.sentencepiece import SentencePiece
from tests.e2e.runs import documents
from tests.hub import LoopbackHub, parquet_bytes

CONFIG = DataConfig(
    sources={"web": HuggingFace(name="e2e/deep", fetch_rows=16)}, num_lanes=4, shuffle_window=16, workers=1
)
PLAN = build_plan(
    (Stage(seq_len=64, batch_size=8),),
    source_names=("web",),
    num_lanes=CONFIG.num_lanes,
    seed=0,
    total_tokens=None,
    steps=400,
    epochs=None,
    learning_rate=0.0,
    schedule=lambda tokens, total: 1.0,
)


@dataclasses.dataclass
class Start:
    """A start of the data path: its first batches, the source's identity that it saves, and its requests."""

    batches: list[StepBatch]
    identity: Json
    requests: int
    sent: int


def start(
    hub: LoopbackHub, tokenizer: SentencePiece, after: StepBatch | None, identity: Json | None, count: int
) -> Start:
    """Takes `count` batches after the given one, and waits until read-ahead is done."""
    requests, sent = hub.count(), hub.bytes()
    resolved = resolve(CONFIG, None if identity is None else {"web": {"source": identity}})
    readers = CONFIG.build(resolved, seed=0)
    threads = pools(CONFIG)
    batches = host_batches(
        readers,
        PLAN,
        CONFIG.row_spec(tokenizer.build(""), None),
        range(CONFIG.num_lanes),
        threads,
        after=0 if after is None else after.step,
        states={} if after is None else after.states,
        prefetch=1,
    )
    taken = [next(batches) for _ in range(count)]
    quiet_since, seen = time.monotonic(), hub.bytes()
    while time.monotonic() - quiet_since < 0.5:
        if hub.bytes() != seen:
            quiet_since, seen = time.monotonic(), hub.bytes()
        time.sleep(0.02)
    found = Start(taken, resolved["web"].identity, hub.count() - requests, hub.bytes() - sent)
    batches.close()
    threads.readers.shutdown()
    threads.workers.shutdown()
    return found


def test_the_same_cost_at_any_depth(hub: LoopbackHub, tokenizer: pathlib.Path) -> None:
    rows = 3200
    texts = [text or "a" for text in documents(1, 4 * rows, words=8)]
    files = {f"data/{n}.parquet": parquet_bytes(texts[n * rows : (n + 1) * rows], row_group_size=100) for n in range(4)}
    hub.commit("e2e/deep", files)
    model = SentencePiece(path=str(tokenizer))
    whole = start(hub, model, None, None, count=400)
    assert whole.batches[-1].states[0][0][0] == 0, "the run is to stay within one epoch"

    starts = []
    for step in (2, 100, 250, 398):
        after, expected = whole.batches[step - 1], whole.batches[step]
        found = start(hub, model, after, whole.identity, count=1)
        for field, rows_BT in expected.arrays.items():
            np.testing.assert_array_equal(found.batches[0].arrays[field], rows_BT)
        starts.append(found)
    requests, sent = [found.requests for found in starts], [found.sent for found in starts]
    # They differ by the lanes' positions within row groups, not by depth.
    assert max(requests) <= 1.5 * min(requests), (requests, whole.requests)
    assert max(sent) <= 1.5 * min(sent), (sent, whole.sent)
    # Footers are always read: 256 kB from the end, which is the whole file for files this small.
    footers = sum(min(len(content), 1 << 18) for content in files.values())
    assert max(sent) - footers < (whole.sent - footers) / 3, (sent, footers, whole.sent)
