"""A small Qwen3-MoE on FineWeb-Edu: 1B of 6.5B parameters are active, in 20 layers of 64 experts of which a token uses
8 (Yang et al. 2025, arXiv:2505.09388).

`--config.mesh.expert=8` puts 8 experts of each layer on each of 8 groups of devices.
"""

from configs._base import pretrain
from jaxtrain.config import Config
from jaxtrain.model.experts import Experts
from jaxtrain.model.llama import LlamaConfig


def get_config(arg: str = "") -> Config:
    model = LlamaConfig(
        hidden_size=2048,
        intermediate_size=6144,
        num_layers=20,
        num_heads=16,
        num_kv_heads=4,
        head_dim=128,
        max_seq_len=4096,
        rope_theta=1_000_000.0,
        norm_eps=1e-6,
        qk_norm=True,
        experts=Experts(num_experts=64, experts_per_token=8, intermediate_size=768, balance_loss=0.001),
    )
    return pretrain(model, total_tokens=100_000_000_000, batch_tokens=4_194_304, learning_rate=3e-4)
