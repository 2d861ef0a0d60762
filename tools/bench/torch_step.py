"""The same model and step in torch, as a torch user would write them today: SDPA, fused AdamW, torch.compile.

Imported only if torch is installed. Layers, initial values, losses and updates equal jaxtrain's within rounding
(tests/tools/test_bench.py).
"""

import contextlib
import math
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch  # pyright: ignore[reportMissingImports] - of the `parity` extra
import torch.nn.functional as F  # pyright: ignore[reportMissingImports] - likewise

from jaxtrain.model.llama import LlamaConfig
from tools.bench.common import median
from tools.bench.jax_step import CLIP_NORM, LEARNING_RATE, Size, batch

Tensor = Any  # torch.Tensor


class Norm(torch.nn.Module):
    def __init__(self, width: int, epsilon: float):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(width))
        self.epsilon = epsilon

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.scale.shape, self.scale, self.epsilon)


class Layer(torch.nn.Module):
    def __init__(self, config: LlamaConfig):
        super().__init__()
        width, inner, head = config.hidden_size, config.intermediate_size, config.resolved_head_dim
        self.head, self.grouped = head, config.num_heads != config.num_kv_heads
        self.attention_norm, self.mlp_norm = Norm(width, config.norm_eps), Norm(width, config.norm_eps)
        self.q = _linear(width, config.num_heads * head, config.initializer_std)
        self.k = _linear(width, config.num_kv_heads * head, config.initializer_std)
        self.v = _linear(width, config.num_kv_heads * head, config.initializer_std)
        self.o = _linear(config.num_heads * head, width, config.output_std)
        self.gate = _linear(width, inner, config.initializer_std)
        self.up = _linear(width, inner, config.initializer_std)
        self.down = _linear(inner, width, config.output_std)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        B, T, _ = x.shape
        y = self.attention_norm(x)
        q, k, v = (p(y).view(B, T, -1, self.head).transpose(1, 2) for p in (self.q, self.k, self.v))
        q, k = _rotate(q, cos, sin), _rotate(k, cos, sin)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.grouped)
        x = x + self.o(y.transpose(1, 2).reshape(B, T, -1))
        y = self.mlp_norm(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class TorchLlama(torch.nn.Module):
    """Maps tokens [B, T] to the mean cross-entropy with targets [B, T]. Every row is one document."""

    def __init__(self, config: LlamaConfig, vocab_size: int, seq_len: int):
        super().__init__()
        self.embedding = torch.nn.Embedding(vocab_size, config.hidden_size)
        torch.nn.init.normal_(self.embedding.weight, std=config.initializer_std)
        self.layers = torch.nn.ModuleList(Layer(config) for _ in range(config.num_layers))
        self.norm = Norm(config.hidden_size, config.norm_eps)
        tied = config.tie_embeddings
        self.output = None if tied else _linear(config.hidden_size, vocab_size, config.initializer_std)
        h = config.resolved_head_dim
        frequencies = config.rope_theta ** -(np.arange(0, h, 2) / h)
        angles = torch.tensor(np.outer(np.arange(seq_len), frequencies), dtype=torch.float32)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x, self.cos, self.sin)
        head = self.embedding.weight if self.output is None else self.output.weight
        logits = F.linear(self.norm(x), head)
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


def _linear(inputs: int, outputs: int, std: float) -> torch.nn.Linear:
    linear = torch.nn.Linear(inputs, outputs, bias=False)
    torch.nn.init.normal_(linear.weight, std=std)
    return linear


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)


def available(device: str) -> bool:
    return device != "cuda" or torch.cuda.is_available()


class TorchStep:
    """As JaxStep: forward, backward, clipping and AdamW on one batch. Uses autocast if the model is bfloat16."""

    def __init__(self, size: Size, *, device: str, compile: bool):
        self._device = device
        torch.manual_seed(0)
        if device == "cuda":
            torch.set_float32_matmul_precision("high")  # matmuls that autocast leaves in fp32 may use TF32, as in JAX
        self.model = TorchLlama(size.model, size.vocab_size, size.seq_len).to(device)
        self._forward = torch.compile(self.model) if compile else self.model
        self._autocast = torch.bfloat16 if size.model.dtype == "bfloat16" else None
        # As in jaxtrain's AdamW, norms and embedding have no weight decay.
        plain = [p for name, p in self.model.named_parameters() if p.ndim < 2 or name.startswith("embedding")]
        decayed = [p for name, p in self.model.named_parameters() if p.ndim == 2 and not name.startswith("embedding")]
        groups = [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}]
        self._optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=(0.9, 0.95), eps=1e-8, fused=True)
        arrays = batch(size)
        self._batch = [torch.tensor(arrays[name], dtype=torch.long, device=device) for name in ("tokens", "targets")]

    def run(self, steps: int = 1) -> float:
        """Trains `steps` steps and returns the last loss."""
        loss: Tensor = None
        for _ in range(steps):
            cast = contextlib.nullcontext()
            if self._autocast is not None:
                cast = torch.autocast(self._device, dtype=self._autocast)
            with cast:
                loss = self._forward(*self._batch)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), CLIP_NORM)
            self._optimizer.step()
            self._optimizer.zero_grad(set_to_none=True)
        if self._device == "cuda":
            torch.cuda.synchronize()
        value = float(loss.detach())
        if not math.isfinite(value):
            raise ArithmeticError(f"the loss is {value}")
        return value

    def peak_memory_mb(self) -> float | None:
        return torch.cuda.max_memory_allocated() / 1e6 if self._device == "cuda" else None

    def load(self, params: Mapping[str, Any]) -> None:
        """Copies jaxtrain's parameters (NumPy arrays), whose layers are stacked and whose matrices are transposed."""
        with torch.no_grad():
            self.model.embedding.weight.copy_(torch.tensor(params["embedding"]))
            self.model.norm.scale.copy_(torch.tensor(params["norm"]["scale"]))
            if self.model.output is not None:
                self.model.output.weight.copy_(torch.tensor(params["head"].T))
            layers = params["layers"]
            for i, layer in enumerate(self.model.layers):
                for name in ("attention_norm", "mlp_norm"):
                    getattr(layer, name).scale.copy_(torch.tensor(layers[name]["scale"][i]))
                for name in ("q", "k", "v", "o"):
                    getattr(layer, name).weight.copy_(torch.tensor(layers["attention"][name]["kernel"][i].T))
                for name in ("gate", "up", "down"):
                    getattr(layer, name).weight.copy_(torch.tensor(layers["mlp"][name]["kernel"][i].T))


def attention_seconds(
    device: str, *, shape: tuple[int, int, int], heads: int, kv_heads: int, rounds: int, calls: int
) -> dict[str, float]:
    """Measures causal attention alone in bf16, forward and backward. `shape` is (B, T, h)."""
    B, T, h = shape
    q, k, v = (
        torch.randn(B, count, T, h, device=device, dtype=torch.bfloat16, requires_grad=True)
        for count in (heads, kv_heads, kv_heads)
    )
    dx = torch.randn_like(q)

    def once() -> None:
        x = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=heads != kv_heads)
        torch.autograd.grad(x, (q, k, v), dx)

    def wait() -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    once()
    seconds = []
    for _ in range(rounds):
        wait()
        begun = time.perf_counter()
        for _ in range(calls):
            once()
        wait()
        seconds.append((time.perf_counter() - begun) / calls)
    return {"forward_backward_seconds": median(seconds)}
