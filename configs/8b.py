"""Llama 3 8B (Grattafiori et al. 2024, arXiv:2407.21783, table 3) on FineWeb-Edu: rows of 8,192 tokens, batches of 4M.

The tokenizer is Llama 3's own; its repository requires accepting Meta's terms. `--config.tokenizer.name=` sets another
(with its `--config.tokenizer.vocab_size=`).
"""

import dataclasses

from configs._base import pretrain
from jaxtrain.config import Config
from jaxtrain.model.llama import LlamaConfig
from jaxtrain.tokenizers.hf import HuggingFaceTokenizer


def get_config(arg: str = "") -> Config:
    model = LlamaConfig(
        hidden_size=4096,
        intermediate_size=14_336,
        num_layers=32,
        num_heads=32,
        num_kv_heads=8,
        max_seq_len=8192,
        rope_theta=500_000.0,
    )
    config = pretrain(model, total_tokens=160_000_000_000, batch_tokens=4_194_304, learning_rate=3e-4)
    return dataclasses.replace(
        config, tokenizer=HuggingFaceTokenizer(name="meta-llama/Llama-3.1-8B", vocab_size=128_256)
    )
