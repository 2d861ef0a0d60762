"""What it costs to find the held-out rows of an evaluation, in requests and bytes of a Hub."""

import random

import pytest

from jaxtrain.data.pipeline import DataConfig
from jaxtrain.data.sources.huggingface import HuggingFace
from jaxtrain.plan import Stage
from tests.data.runs import Case, plan_of
from tests.hub import LoopbackHub
from tests.hub_store import parquet_bytes

FILES, ROWS, WORDS, LANES = 12, 1000, 600, 4
TOKENS, HOLDOUT = 32_768, 0.02


@pytest.mark.slow
def test_a_stream_is_read_as_far_as_the_held_out_tokens_are(hub: LoopbackHub) -> None:
    rng = random.Random(0)
    words = [f"{number:05d}" for number in range(1000)]
    rows = [[" ".join(rng.choices(words, k=WORDS)) for _ in range(ROWS)] for _ in range(FILES)]
    files = {f"data/train-{n:02d}.parquet": parquet_bytes(texts, row_group_size=250) for n, texts in enumerate(rows)}
    hub.commit("org/held", files)
    data = DataConfig(sources={"web": HuggingFace(name="org/held")}, num_lanes=LANES, holdout=HOLDOUT)
    case = Case(data, plan_of(data, [Stage(seq_len=64, batch_size=8)], 0, total_tokens=TOKENS), 0, 1)
    case.run(held_out=True)
    needed = TOKENS / HOLDOUT / (WORDS + 1) / (FILES * ROWS)  # the share of the documents that holds them
    read, requests = hub.bytes(r"\.parquet") / sum(map(len, files.values())), hub.count(r"\.parquet")
    # Besides the rows with these tokens, each lane reads ahead about 2.5 windows. (0.77 of the data, 0.23 has them.)
    assert 0.8 * needed < read < needed + LANES * 4 * 512 / (FILES * ROWS)
    # Footers of all files, and about one request for each row group. (39)
    assert requests < 4 * FILES + 1.5 * read * FILES * ROWS / 250
