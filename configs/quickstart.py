"""A first run, in minutes on a laptop's CPU and without a network: a tiny Llama on Python's own standard library.

It first trains a tokenizer on the same stream and keeps it in the work directory.
"""

from jaxtrain.checkpoint.checkpointer import CheckpointConfig
from jaxtrain.config import Config, EvalConfig
from jaxtrain.data.pipeline import DataConfig
from jaxtrain.data.sources.text_files import TextFiles
from jaxtrain.model.llama import LlamaConfig
from jaxtrain.optim.muon import Muon
from jaxtrain.plan import Stage
from jaxtrain.plan.schedules import Cosine
from jaxtrain.tokenizers.training import TrainTokenizer


def get_config(arg: str = "") -> Config:
    return Config(
        model=LlamaConfig(
            hidden_size=192,
            intermediate_size=512,
            num_layers=4,
            num_heads=6,
            num_kv_heads=2,
            max_seq_len=256,
            tie_embeddings=True,
            dtype="float32",
            remat="none",
        ),
        tokenizer=TrainTokenizer(kind="sentencepiece", vocab_size=4096, max_samples=400, sample_mb=1.0),
        data=DataConfig(sources={"python": TextFiles()}, num_lanes=8, holdout=0.03),
        stages=(Stage(seq_len=256, batch_size=16),),
        steps=120,
        # 120 steps of Muon reach the loss of over 200 of AdamW, which keeps the run under four minutes on two cores.
        optimizer=Muon(learning_rate=3e-3, schedule=Cosine(warmup_fraction=0.05)),
        checkpoint=CheckpointConfig(every_steps=40),
        eval=EvalConfig(every_steps=40, tokens=32_768),
        log_every=10,
        sample_prompts=("def ", "import "),
    )
