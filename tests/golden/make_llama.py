"""Writes tests/golden/<family>/: tiny random checkpoints of transformers with the logits that it computes for them.

`python -m tests.golden.make_llama [NAME ...]` (needs the `parity` extra). The tests then run without torch.
"""

import sys
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
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
    "phi3": {"rope_type": "default", "partial_rotary_factor": 0.75},
    "gpt_neox": {"rope_type": "default", "partial_rotary_factor": 0.25},
}
FULL, SLIDING = "full_attention", "sliding_attention"
# Of the architectures with rotary settings by kind of layer.
ROPE_BY_KIND = {
    "gemma3": {
        FULL: {"rope_type": "linear", "factor": 4.0, "rope_theta": 500.0},
        SLIDING: {"rope_type": "default", "rope_theta": 50.0},
    },
    "olmo3": {
        FULL: {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "rope_theta": 500.0},
        SLIDING: {"rope_type": "default", "rope_theta": 500.0},
    },
}
GEMMA = {
    "num_hidden_layers": 3,
    "head_dim": 4,
    "sliding_window": 4,
    "query_pre_attn_scalar": 9,
    "final_logit_softcapping": 4.0,
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
    "qwen2_some": (
        transformers.Qwen2Config,
        {"num_hidden_layers": 3, "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
        "default",
    ),
    "llama_yarn": (transformers.LlamaConfig, {"head_dim": 12}, "yarn"),
    "gemma2": (transformers.Gemma2Config, GEMMA | {"attn_logit_softcapping": 2.0}, "default"),
    "gemma3": (transformers.Gemma3TextConfig, GEMMA | {"layer_types": [SLIDING, SLIDING, FULL]}, "gemma3"),
    "olmo2": (transformers.Olmo2Config, {}, "default"),
    "olmo3": (
        transformers.Olmo3Config,
        {"num_hidden_layers": 3, "sliding_window": 4, "layer_types": [SLIDING, FULL, SLIDING]},
        "olmo3",
    ),
    "phi3": (
        transformers.Phi3Config,
        {"num_attention_heads": 2, "num_key_value_heads": 1, "sliding_window": 5},
        "phi3",
    ),
    "gpt_neox": (transformers.GPTNeoXConfig, {"num_attention_heads": 2}, "gpt_neox"),
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
    "olmoe": (transformers.OlmoeConfig, {"num_experts": 4, "num_experts_per_tok": 2}, "default"),
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
            "rope_parameters": ROPE_BY_KIND.get(rope) or ROPE[rope] | {"rope_theta": 500.0},
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
    for name in sys.argv[1:] or CASES:
        model = random_model(name, seed=0)
        tokens = np.random.default_rng(0).integers(0, 40, (2, 12))
        model.save_pretrained(HERE / name)
        np.savez(HERE / name / "expected.npz", tokens=tokens.astype(np.int32), logits=logits(model, tokens))
        print(name)
