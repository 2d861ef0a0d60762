"""12 layers, hidden 1024, grouped queries, Muon, 10,000 steps of 64 rows of 2,048 tokens, streamed from FineWeb.

With an argument it reads tar shards: `'--config=configs/80m.py:s3://bucket/shard-{00000..01000}.tar.bz2'` (quoted,
because the shell expands braces), through a disk cache of at most 35 GB (`--config.data.max_disk_gb=20` for less).

"80M" is the name this shape had originally. It has 141 million parameters without embeddings, and the run prints the
true count. One device processes the 64 rows 8 at a time.
"""

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
            sources={"shards": WebDataset(urls=(arg,))} if arg else {"fineweb": fineweb},
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
