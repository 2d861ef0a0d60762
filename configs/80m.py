"""12 layers, hidden 1024, grouped queries, Muon, 10,000 steps of 64 rows of 2,048 tokens, streamed from FineWeb.

With an argument it reads other files: tar shards, as in `'--config=configs/80m.py:s3://bucket/{00000..01000}.tar.bz2'`
(quoted, because the shell expands braces), through a disk cache of at most 35 GB (`--config.data.max_disk_gb=20` for
less); or JSON lines, parquet, CSV and text, by their names: `'--config=configs/80m.py:data/part-{000..005}.jsonl.gz'`.

"80M" is the name this shape had originally. It has 141 million parameters without embeddings, and the run prints the
true count. One device processes the 64 rows 8 at a time.
"""

import re

from jaxtrain.checkpoint.checkpointer import CheckpointConfig
from jaxtrain.config import Config, EvalConfig
from jaxtrain.data.pipeline import DataConfig
from jaxtrain.data.sources.huggingface import HuggingFace
from jaxtrain.data.sources.webdataset import WebDataset
from jaxtrain.model.llama import LlamaConfig
from jaxtrain.optim.muon import Muon
from jaxtrain.plan import Stage
from jaxtrain.plan.schedules import Cosine
from jaxtrain.tokenizers.hf import HuggingFaceTokenizer

_BUILDERS = {"json": "json", "jsonl": "json", "ndjson": "json", "parquet": "parquet", "csv": "csv", "txt": "text"}


def _files(pattern: str) -> HuggingFace | WebDataset:
    """The source for files of this pattern, by the suffix before that of a compression."""
    suffix = re.sub(r"\.(gz|bz2|xz|zst|zstd|lz4)$", "", pattern).rpartition(".")[-1].lower()
    if suffix in _BUILDERS:
        return HuggingFace(name=_BUILDERS[suffix], data_files=(pattern,))
    return WebDataset(urls=(pattern,))


def get_config(arg: str = "") -> Config:
    fineweb = HuggingFace(name="HuggingFaceFW/fineweb", config_name="sample-10BT")
    return Config(
        model=LlamaConfig(
            hidden_size=1024,
            intermediate_size=2816,
            num_layers=12,
            num_heads=16,
            num_kv_heads=8,
            max_seq_len=2048,
        ),
        tokenizer=HuggingFaceTokenizer(name="HuggingFaceTB/SmolLM2-135M", vocab_size=49_152),
        data=DataConfig(
            sources={"shards": _files(arg)} if arg else {"fineweb": fineweb},
            num_lanes=32,
            max_disk_gb=35.0,
            holdout=0.01,
        ),
        stages=(Stage(seq_len=2048, batch_size=64),),
        steps=10_000,
        micro_batch_tokens=8 * 2048,
        optimizer=Muon(learning_rate=1e-3, schedule=Cosine(warmup_fraction=0.02, final_fraction=0.1)),
        checkpoint=CheckpointConfig(every_steps=500, keep=2),
        eval=EvalConfig(every_steps=500, tokens=524_288),
        sample_prompts=("The capital of France is",),
    )
