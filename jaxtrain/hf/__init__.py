"""Hugging Face checkpoints of the Llama family in and out: safetensors, config.json, tokenizer."""

from jaxtrain.hf.reading import commit, config, dtype, load
from jaxtrain.hf.writing import export
