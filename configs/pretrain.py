"""Presets by size, on streamed FineWeb-Edu: `configs/pretrain.py:tiny`, `small`, `medium`, `large` (1.8B), `xlarge`."""

from configs._base import pretrain
from jaxtrain.config import Config
from jaxtrain.errors import UserError
from jaxtrain.model.llama import LlamaConfig

# hidden, mlp, layers, heads, kv heads, tokens per run, tokens per batch, learning rate, tokens per micro-batch at most
SIZES = {
    "tiny": (256, 768, 8, 4, 2, 500_000_000, 131_072, 1e-3, 65_536),
    "small": (768, 2048, 12, 12, 4, 3_000_000_000, 262_144, 6e-4, 32_768),
    "medium": (1024, 2816, 24, 16, 8, 7_000_000_000, 524_288, 4e-4, 32_768),
    "large": (2304, 6144, 28, 18, 6, 36_000_000_000, 1_048_576, 2.5e-4, None),
    "xlarge": (3072, 8192, 32, 24, 8, 70_000_000_000, 2_097_152, 2e-4, None),
}


def get_config(arg: str = "small") -> Config:
    if arg not in SIZES:
        raise UserError(
            f"configs/pretrain.py:{arg}: unknown size; give one of {', '.join(SIZES)}; 80m, 1b, 2b, 4b and 8b have "
            "their own files (configs/1b.py)"
        )
    hidden, mlp, layers, heads, kv_heads, tokens, batch, rate, micro_batch = SIZES[arg]
    model = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=mlp,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        max_seq_len=2048,
        tie_embeddings=arg in ("tiny", "small"),
    )
    return pretrain(model, total_tokens=tokens, batch_tokens=batch, learning_rate=rate, micro_batch_tokens=micro_batch)
