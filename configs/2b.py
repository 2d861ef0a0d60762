"""A 2B Llama on FineWeb-Edu, streamed from the Hub."""

from configs._base import pretrain
from jaxtrain.config import Config
from jaxtrain.model.llama import LlamaConfig


def get_config(arg: str = "") -> Config:
    model = LlamaConfig(
        hidden_size=2560,
        intermediate_size=6912,
        num_layers=27,
        num_heads=20,
        num_kv_heads=5,
        max_seq_len=2048,
    )
    return pretrain(model, total_tokens=40_000_000_000, batch_tokens=1_048_576, learning_rate=2.5e-4)
