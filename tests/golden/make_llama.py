"""Writes tests/golden/<family>/: tiny random checkpoints of transformers with the logits that it computes for them.

`python -m tests.golden.make_llama` (needs the `parity` extra). The tests then run without torch.
"""

from pathlib import Path

import numpy as np
import torch  # pyright: ignore[reportMissingImports] - of the `parity` extra
import transformers  # pyright: ignore[reportMissingImports] - of the `parity` extra

HERE = Path(__file__).parent
ROPE = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 2.5},
    # With heads of 12 one frequency is kept, one on the ramp, the others divided.
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
}
CASES = {
    "llama2": (transformers.LlamaConfig, {}, "default"),
    "llama3": (transformers.LlamaConfig, {"tie_word_embeddings": True, "rms_norm_eps": 1e-5, "head_dim": 12}, "llama3"),
    "llama_biases": (transformers.LlamaConfig, {"attention_bias": True, "mlp_bias": True, "head_dim": 6}, "linear"),
    "mistral": (transformers.MistralConfig, {"sliding_window": 5}, "default"),
    "qwen2": (transformers.Qwen2Config, {"tie_word_embeddings": True}, "default"),
    "qwen2_window": (
        transformers.Qwen2Config,
        {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 0},
        "default",
    ),
    "qwen3": (transformers.Qwen3Config, {"head_dim": 8}, "default"),
    "mixtral": (transformers.MixtralConfig, {"num_local_experts": 4}, "default"),
    "qwen3_moe": (
        transformers.Qwen3MoeConfig,
        {
            "head_dim": 8,
            "moe_intermediate_size": 12,
            "num_experts": 6,
            "num_experts_per_tok": 3,
            "norm_topk_prob": True,
        },
        "default",
    ),
    "qwen3_moe_sparse": (
        transformers.Qwen3MoeConfig,
        {
            "head_dim": 8,
            "moe_intermediate_size": 12,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "num_hidden_layers": 4,
            "mlp_only_layers": [0],
            "use_sliding_window": True,
            "sliding_window": 5,
        },
        "default",
    ),
    "smollm3": (transformers.SmolLM3Config, {"num_hidden_layers": 4, "tie_word_embeddings": True}, "default"),
}


def random_model(name: str, seed: int, **sizes: int) -> transformers.PreTrainedModel:
    """The case's model in fp32, with every parameter random: those that start at 0 or 1 would hide mistakes."""
    kind, options, rope = CASES[name]
    torch.manual_seed(seed)
    config = kind(
        **{
            "vocab_size": 40,
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 64,
            "pad_token_id": None,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "rope_parameters": ROPE[rope] | {"rope_theta": 500.0},
        }
        | options
        | sizes
    )
    config._attn_implementation = "eager"
    model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            centre = 1.0 if "norm" in parameter_name else 0.0
            parameter.copy_(centre + 0.25 * torch.randn_like(parameter))
    return model


def logits(model: transformers.PreTrainedModel, tokens_BT: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor(tokens_BT, dtype=torch.long)).logits.numpy()


if __name__ == "__main__":
    for name in CASES:
        model = random_model(name, seed=0)
        tokens = np.random.default_rng(0).integers(0, 40, (2, 12))
        model.save_pretrained(HERE / name)
        np.savez(HERE / name / "expected.npz", tokens=tokens.astype(np.int32), logits=logits(model, tokens))
        print(name)
