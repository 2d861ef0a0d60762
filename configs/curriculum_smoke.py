"""The curriculum of `270m_curriculum.py` in minutes on two cores, without a network.

Half a million tokens in the same ten stages, with the same lengths, shares and overlap, and a model of 0.66M
parameters. Python's own standard library stands in for the three sources: its modules for the web, the tables in
`encodings` for mathematics, its packages for code. Every installation of Python has them, even a minimal one.
"""

import pathlib
import sysconfig

from configs import _curriculum
from jaxtrain.checkpoint.checkpointer import CheckpointConfig
from jaxtrain.config import Config, EvalConfig
from jaxtrain.data.pipeline import DataConfig
from jaxtrain.data.sources.text_files import TextFiles
from jaxtrain.model.llama import LlamaConfig
from jaxtrain.optim.adamw import AdamW
from jaxtrain.tokenizers.training import TrainTokenizer

# Multiples of 8 lanes; 512 to 16,384 tokens per step, so that every stage has at least eight steps.
_BATCH_SIZES = (64, 64, 32, 16, 16, 8, 8, 8, 8, 8)
_PACKAGES = ("asyncio", "collections", "concurrent/futures", "email", "html", "http", "importlib", "json", "logging",
             "multiprocessing", "re", "unittest", "urllib", "xml/*")  # fmt: skip


def _files(*patterns: str) -> TextFiles:
    root = pathlib.Path(sysconfig.get_paths()["stdlib"]).as_posix()
    return TextFiles(patterns=tuple(f"{root}/{pattern}" for pattern in patterns))


def get_config(arg: str = "") -> Config:
    return Config(
        model=LlamaConfig(
            hidden_size=128,
            intermediate_size=384,
            num_layers=2,
            num_heads=4,
            num_kv_heads=2,
            max_seq_len=2048,
            tie_embeddings=True,
            dtype="float32",
            remat="none",
        ),
        tokenizer=TrainTokenizer(kind="bpe", vocab_size=2048, max_samples=200),
        data=DataConfig(
            sources={
                "web": _files("*.py"),
                "math": _files("encodings/*.py"),
                "code": _files(*(f"{package}/*.py" for package in _PACKAGES)),
            },
            num_lanes=8,
            holdout=0.05,
        ),
        stages=_curriculum.stages(_BATCH_SIZES, tokens_per_million=500),
        total_tokens=500_000,
        micro_batch_tokens=4096,
        optimizer=AdamW(learning_rate=3e-3, schedule=_curriculum.schedule()),
        checkpoint=CheckpointConfig(every_steps=25),
        eval=EvalConfig(every_tokens=100_000, tokens=16_384),
        log_every=5,
        sample_prompts=("def ", "import "),
    )
