"""The smallest run with every feature.

Three stages with different shapes and mixes, three sources on the loopback Hub (parquet with whole units per lane,
parquet with shared files, gzipped JSON lines), shuffle, packing, overlap, accumulation, held-out evaluation. The
argument is the path of the tokenizer's model: `--config=tests/e2e/configs/tiny.py:/tmp/x/tokenizer.model`.
"""

from jaxtrain.checkpoint.checkpointer import CheckpointConfig
from jaxtrain.config import Config, EvalConfig
from jaxtrain.data.pipeline import DataConfig
from jaxtrain.data.sources.huggingface import HuggingFace
from jaxtrain.model.llama import LlamaConfig
from jaxtrain.optim.adamw import AdamW
from jaxtrain.plan import Stage
from jaxtrain.plan.schedules import Cosine
from jaxtrain.tokenizers.sentencepiece import SentencePiece


def get_config(arg: str) -> Config:
    return Config(
        model=LlamaConfig(
            hidden_size=32,
            intermediate_size=64,
            num_layers=2,
            num_heads=4,
            num_kv_heads=2,
            max_seq_len=64,
            dtype="float32",
            remat="none",
        ),
        tokenizer=SentencePiece(path=arg),
        data=DataConfig(
            sources={
                "web": HuggingFace(name="e2e/web"),
                "wiki": HuggingFace(name="e2e/wiki", fetch_rows=16),
                "code": HuggingFace(name="e2e/code", column="content"),
            },
            num_lanes=4,
            shuffle_window=8,
            holdout=0.05,
            retry_minutes=1.0,
        ),
        stages=(
            Stage(name="short", seq_len=16, batch_size=16, tokens=16 * 16 * 16, weights={"web": 0.7, "wiki": 0.3}),
            Stage(
                name="mixed",
                seq_len=32,
                batch_size=8,
                tokens=20 * 8 * 32,
                weights={"web": 0.5, "wiki": 0.25, "code": 0.25},
                overlap=0.25,
            ),
            Stage(name="long", seq_len=64, batch_size=8, weights={"web": 0.2, "code": 0.8}),
        ),
        # The last batch counts 100 of its 512 tokens.
        total_tokens=16 * 256 + 20 * 256 + 11 * 512 + 100,
        micro_batch_tokens=128,
        optimizer=AdamW(learning_rate=3e-3, schedule=Cosine(warmup_fraction=0.1)),
        checkpoint=CheckpointConfig(every_steps=5, keep=3),
        eval=EvalConfig(every_steps=10, tokens=2048, seq_len=32, batch_size=8),
        log_every=1,
        seed=7,
    )
