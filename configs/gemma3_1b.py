"""The decoder of Gemma 3 1B (Gemma Team 2025, arXiv:2503.19786) on FineWeb-Edu: one layer in six sees the whole row.

The tokenizer is SmolLM2's, with a fifth of Gemma's vocabulary. Gemma's own repository requires accepting Google's
terms: `--config.tokenizer.name=google/gemma-3-1b-pt --config.tokenizer.vocab_size=none`.
"""

from configs._base import pretrain
from jaxtrain.config import Config
from jaxtrain.model.llama import LlamaConfig


def get_config(arg: str = "") -> Config:
    model = LlamaConfig(
        hidden_size=1152,
        intermediate_size=6912,
        num_layers=26,
        num_heads=4,
        num_kv_heads=1,
        head_dim=256,
        max_seq_len=4096,
        layers="5 local : 1 global",
        sliding_window=512,
        rope_theta=1_000_000.0,
        rope_local_base_freq=10_000.0,
        norm="rms_plus_one",
        norm_eps=1e-6,
        norm_position="both",
        qk_norm=True,
        hidden_act="gelu_pytorch_tanh",
        scale_embeddings=True,
        tie_embeddings=True,
    )
    return pretrain(model, total_tokens=20_000_000_000, batch_tokens=524_288, learning_rate=3e-4)
