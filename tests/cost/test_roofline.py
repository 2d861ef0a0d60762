"""The roofline's terms against counts that add up every product and every array individually."""

import types

import numpy as np
import pytest

from jaxtrain.cost import hardware, roofline
from jaxtrain.cost.hlo import Collective
from jaxtrain.distributed.sharding import MeshConfig
from jaxtrain.losses.cross_entropy import CrossEntropy
from jaxtrain.model.llama import LlamaConfig
from jaxtrain.optim.adamw import AdamW
from jaxtrain.trainer.step import StepComponents

CHIP = hardware.BY_NAME["v5e"]
L, D, F, H, K, h, V, T = 3, 32, 48, 4, 2, 8, 256, 64


def make_components(remat: str = "full") -> StepComponents:
    mesh = MeshConfig(data=2, fsdp=2, tensor=2).build()
    model = LlamaConfig(
        hidden_size=D, intermediate_size=F, num_layers=L, num_heads=H, num_kv_heads=K, head_dim=h, remat=remat
    ).build(V, mesh)
    return StepComponents(
        model, CrossEntropy().build(V, mesh), AdamW(learning_rate=1.0).build(model.axes, mesh), mesh, 1.0
    )


def make_shape(micro_batches: int) -> roofline.Shape:
    return roofline.Shape(
        batch_size=16,
        seq_len=T,
        micro_batches=micro_batches,
        mesh={"data": 2, "fsdp": 2, "expert": 1, "tensor": 2, "context": 1},
    )


WEIGHTS = [(D, H * h), (D, K * h), (D, K * h), (H * h, D), (D, F), (D, F), (F, D)]


@pytest.mark.parametrize("remat", ["none", "dots", "full"])
def test_arithmetic(remat: str) -> None:
    """Forward once, backward twice, then what remat recomputes. Multiply and add are two; causality leaves half."""
    forward_weights = L * sum(2 * a * b for a, b in WEIGHTS)
    norms = L * 2 * D + D  # counted as weights by the usual 6N
    forward_attention = L * H * sum(2 * 2 * h * keys for keys in np.arange(T) + 0.5) / T  # q k^T and p v
    forward_head = 2 * D * V
    training = 3 * (forward_weights + forward_attention + forward_head + 2 * norms)
    again = {"none": 0, "dots": 0, "full": forward_weights + 2 * norms + forward_attention}[remat]
    components = make_components(remat)
    assert components.flops_per_token(T) == pytest.approx(training)
    assert roofline.recomputed_flops_per_token(components.model, T) == pytest.approx(again)
    found = roofline.roofline(CHIP, components, make_shape(1), 10**6, roofline.Traffic())
    assert found.seconds["arithmetic"] == pytest.approx((training + again) * 16 * T / 8 / CHIP.flops)


@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize("remat", ["none", "full"])
def test_memory(remat: str, micro_batches: int) -> None:
    """One chip of data 2, fsdp 2, tensor 2: a quarter of the rows, half of each matrix, in micro-batches."""
    tokens, read_or_written = 16 * T // 4 // micro_batches, 0.0
    for _ in range(micro_batches):
        for a, b in WEIGHTS * L:
            forward = 2 * (tokens * (a + b) / 2 + a * b / 2)  # bf16: input, output, weights
            by_input = forward
            by_weights = 2 * tokens * (a + b) / 2 + 4 * a * b / 2
            read_or_written += forward * (2 if remat == "full" else 1) + by_input + by_weights
        logits, head = tokens * V / 2, D * V / 2
        read_or_written += 2 * 4 * logits + 3 * 2 * logits  # fp32 logits out and in; bf16 gradient out, in twice
        read_or_written += 2 * (2 * head + 4 * head)  # one chunk: the head in twice, its fp32 gradient in and out
    shard = (L * sum(a * b for a, b in WEIGHTS) + 2 * V * D + (2 * L + 1) * D) / 4
    read_or_written += (4 + 3) * 4 * shard  # weights, moments and gradients in; weights and moments out
    read_or_written += 2 * 4 * shard * micro_batches if micro_batches > 1 else 0
    assert roofline.memory_bytes(make_components(remat), make_shape(micro_batches), 10**6) == pytest.approx(
        read_or_written
    )


ISLANDS = [0, 0, 0, 0, 1, 1, 1, 1]


@pytest.mark.parametrize(
    ("kind", "groups", "islands", "links", "network"),
    [
        ("all-gather", (tuple(range(8)),), [0] * 8, 700, 0),
        ("reduce-scatter", (tuple(range(8)),), [0] * 8, 700, 0),
        ("all-reduce", (tuple(range(8)),), [0] * 8, 1400, 0),
        # Half of the array has to come from the other island, spread over this one's four chips.
        ("all-gather", (tuple(range(8)),), ISLANDS, 700, 100),
        # Each chip with a partner on the other side: nothing over the links.
        ("all-reduce", ((0, 4), (1, 5), (2, 6), (3, 7)), ISLANDS, 0, 800),
        ("all-to-all", ((0, 1), (2, 3)), ISLANDS, 400, 0),
        ("collective-permute", ((0, 1), (1, 0)), ISLANDS, 800, 0),
        ("collective-permute", ((3, 4),), ISLANDS, 0, 800),
        ("send", (), [0] * 4, 0, 800),
    ],
)
def test_bytes_that_a_chip_sends(
    kind: str, groups: tuple[tuple[int, ...], ...], islands: list[int], links: float, network: float
) -> None:
    one = Collective(kind, 800, groups, 3, True)
    assert roofline.sent(one, islands) == (links, network)
    assert roofline.traffic([one, one], islands) == roofline.Traffic(links=6 * links, network=6 * network)


def test_what_binds() -> None:
    components, shape = make_components(), make_shape(1)
    found = roofline.roofline(
        CHIP, components, shape, 1024, roofline.Traffic(links=CHIP.links, network=3 * CHIP.network)
    )
    assert found.bound_by == "network"
    assert found.seconds["links"] == 1.0
    assert found.tokens_per_sec == pytest.approx(16 * T / 3)
    assert found.mfu == pytest.approx(found.tokens_per_sec * components.flops_per_token(T) / (8 * CHIP.flops))


@pytest.mark.parametrize(
    ("kind", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989.0),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA H200", 989.0),
        ("NVIDIA A100-SXM4-40GB", 312.0),
        ("TPU v4", 275.0),
        ("TPU v5 lite", 197.0),
        ("TPU v5p", 459.0),
        ("TPU v5", 459.0),
        ("TPU v6 lite", 918.0),
        ("cpu", None),
    ],
)
def test_peaks(monkeypatch, kind, tflops):
    monkeypatch.setattr(roofline.jax, "devices", lambda: [types.SimpleNamespace(device_kind=kind)])
    monkeypatch.setattr(roofline.jax, "device_count", lambda: 4)
    assert roofline.peak_flops() == (tflops and tflops * 4e12)
