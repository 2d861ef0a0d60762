"""Shared by the configs in this folder."""

from jaxtrain.checkpoint.checkpointer import CheckpointConfig
from jaxtrain.config import Config, EvalConfig
from jaxtrain.data.pipeline import DataConfig
from jaxtrain.data.sources.huggingface import HuggingFace
from jaxtrain.distributed.sharding import AutoMesh
from jaxtrain.model.llama import LlamaConfig
from jaxtrain.optim.adamw import AdamW
from jaxtrain.plan import Stage
from jaxtrain.plan.schedules import Cosine
from jaxtrain.tokenizers.hf import HuggingFaceTokenizer


def fineweb_edu(tokens: int) -> HuggingFace:
    """The smallest FineWeb-Edu sample with at least `tokens` tokens: 10, 100 or 350 billion, or all 1.3 trillion."""
    samples = {9_500_000_000: "sample-10BT", 95_000_000_000: "sample-100BT", 340_000_000_000: "sample-350BT"}
    config_name = next((name for most, name in samples.items() if tokens <= most), "default")
    return HuggingFace(name="HuggingFaceFW/fineweb-edu", config_name=config_name, split="train", column="text")


def pretrain(
    model: LlamaConfig,
    *,
    total_tokens: int,
    batch_tokens: int,
    learning_rate: float,
    micro_batch_tokens: int | None = None,
) -> Config:
    """Pretrains a Llama on FineWeb-Edu with a published tokenizer: cosine decay to a tenth, 1% held out."""
    return Config(
        model=model,
        tokenizer=HuggingFaceTokenizer(name="HuggingFaceTB/SmolLM2-135M", vocab_size=49_152),
        data=DataConfig(sources={"fineweb_edu": fineweb_edu(total_tokens)}, num_lanes=64, holdout=0.01),
        stages=(Stage(name="main", seq_len=model.max_seq_len, tokens_per_batch=batch_tokens),),
        total_tokens=total_tokens,
        micro_batch_tokens=micro_batch_tokens,
        mesh=AutoMesh(),
        optimizer=AdamW(learning_rate=learning_rate, schedule=Cosine(warmup_fraction=0.01, final_fraction=0.1)),
        checkpoint=CheckpointConfig(every_steps=500, keep=2),
        eval=EvalConfig(every_steps=1000, tokens=1_048_576),
        sample_prompts=("The capital of France is", "Photosynthesis is"),
    )
