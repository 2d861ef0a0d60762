"""A 4B Llama on FineWeb-Edu, streamed from the Hub, with rows of 4,096 tokens."""

from configs._base import pretrain
from jaxtrain.config import Config
from jaxtrain.model.llama import LlamaConfig


def get_config(arg: str = "") -> Config:
    model = LlamaConfig(
        hidden_size=3072,
        intermediate_size=8192,
        num_layers=36,
        num_heads=24,
        num_kv_heads=8,
        max_seq_len=4096,
        rope_theta=500_000.0,
    )
    return pretrain(model, total_tokens=80_000_000_000, batch_tokens=2_097_152, learning_rate=2e-4)
