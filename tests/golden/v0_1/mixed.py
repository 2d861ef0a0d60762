"""Every kind of source and transform of version 0.1 in two stages, with AdamW. Paths are relative: see README.md."""

from jaxtrain.checkpoint.checkpointer import CheckpointConfig
from jaxtrain.config import Config, EvalConfig
from jaxtrain.data.pipeline import DataConfig
from jaxtrain.data.sources.huggingface import HuggingFace
from jaxtrain.data.sources.text_files import TextFiles
from jaxtrain.data.sources.webdataset import WebDataset
from jaxtrain.data.transforms import AtLeast, MinLength, Template
from jaxtrain.model.llama import LlamaConfig
from jaxtrain.optim.adamw import AdamW
from jaxtrain.plan import Stage
from jaxtrain.plan.schedules import Cosine
from jaxtrain.tokenizers.training import TrainTokenizer


def get_config(arg: str = "") -> Config:
    return Config(
        model=LlamaConfig(
            hidden_size=32,
            intermediate_size=64,
            num_layers=2,
            num_heads=4,
            num_kv_heads=2,
            max_seq_len=64,
            tie_embeddings=True,
            dtype="float32",
            remat="none",
        ),
        # The work directory ships with the trained tokenizer: nothing depends on sentencepiece's version.
        tokenizer=TrainTokenizer(kind="sentencepiece", vocab_size=384, max_samples=300),
        data=DataConfig(
            sources={
                "web": HuggingFace(
                    name="golden/web",
                    fetch_rows=16,
                    transforms=(
                        AtLeast(column="int_score", value=2),
                        Template(template="{title}\n{text}"),
                        MinLength(characters=20),
                    ),
                ),
                "prose": TextFiles(patterns=("prose/*.txt",), transforms=(MinLength(characters=10),)),
                "lines": HuggingFace(name="json", data_files=("lines-*.jsonl.gz",), column="content"),
                "tars": WebDataset(urls=("shards/s-{0..3}.tar.gz",)),
            },
            num_lanes=4,
            shuffle_window=8,
            holdout=0.1,
            retry_minutes=1.0,
        ),
        stages=(
            Stage(name="short", seq_len=16, batch_size=16, tokens=14 * 256, weights={"web": 0.6, "prose": 0.4}),
            Stage(
                name="long",
                seq_len=48,
                batch_size=8,
                weights={"web": 0.3, "prose": 0.2, "lines": 0.3, "tars": 0.2},
                overlap=0.25,
            ),
        ),
        # The last batch counts 100 of its 384 tokens.
        total_tokens=14 * 256 + 17 * 384 + 100,
        micro_batch_tokens=192,
        optimizer=AdamW(learning_rate=3e-3, schedule=Cosine(warmup_fraction=0.1)),
        checkpoint=CheckpointConfig(every_steps=4, keep=1),
        eval=EvalConfig(every_steps=6, tokens=1024, seq_len=32, batch_size=8),
        log_every=1,
        seed=11,
    )
