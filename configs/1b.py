"""A 1B Llama on FineWeb-Edu, streamed from the Hub: 20 tokens per parameter (Hoffmann et al. 2022)."""

from configs._base import pretrain
from jaxtrain.config import Config
from jaxtrain.model.llama import LlamaConfig


def get_config(arg: str = "") -> Config:
    model = LlamaConfig(
        hidden_size=2048,
        intermediate_size=5632,
        num_layers=20,
        num_heads=16,
        num_kv_heads=8,
        max_seq_len=2048,
    )
    return pretrain(model, total_tokens=20_000_000_000, batch_tokens=1_048_576, learning_rate=3e-4)
