"""A train step's time by arithmetic, without compiling: to order the ways of computing it.

The sums follow what `step_time` counts in compiled programs, at the same rates. Where an estimate has to be right, the
compiler decides (trainer/tuning.py).
"""

import collections
import math

from jaxtrain.cost import roofline, step_time
from jaxtrain.cost.clusters import Cluster
from jaxtrain.cost.memory_formula import OUTPUTS_KEPT
from jaxtrain.cost.roofline import Components, Shape
from jaxtrain.interfaces import Model
from jaxtrain.model.experts import SLACK

# Passes over a layer's activations by norms, rotary positions, SwiGLU and layouts, in reads and writes of the ends of
# its products: 0.8 s of a 1B step on a v5e (docs/benchmarks.md).
_PASSES = 0.55
# The share of a step that collectives of parameters hide behind.
_HIDING = 0.8
# On so many chips or fewer, a TPU's program scatters gradients piece by piece beside the products that make them.
_WINDOWED = 8


def kept_bytes(model: Model, tensor: int) -> float:
    """Bytes per token that the backward pass reads again, of all layers."""
    layers = getattr(model.config, "num_layers", 1)
    outputs = sum(b for _, b in roofline.matrices(model)) / tensor
    kept = roofline.width(model) * layers + OUTPUTS_KEPT[roofline.remat(model)] * outputs
    return kept * roofline.itemsize(model)


def seconds(cluster: Cluster, parts: Components, shape: Shape, loss_chunk: int) -> float:
    """Seconds of a step.

    Args:
        cluster: The chips.
        parts: The components of a step.
        shape: The step.
        loss_chunk: Positions whose logits a chip computes at once.
    """
    model, rates, tensor = parts.model, step_time.rates(cluster.chip), shape.mesh["tensor"]
    size, remat, turns = roofline.itemsize(model), roofline.remat(model), shape.micro_batches
    tokens = shape.chip_tokens / turns  # of a micro-batch

    def product(a: int, b: int, written: int) -> float:
        moved = size * (tokens * (a + b) + a * b) + (written - size) * a * b
        return max(2 * tokens * a * b / rates.matmul, moved / rates.matmul_memory) / tensor

    products = 0.0
    matrices = roofline.matrices(model)
    for (a, b), count in collections.Counter(matrices).items():
        passes = (3 if remat == "full" else 2) * product(a, b, size)
        products += count * (passes + product(a, b, 4))  # the last is the gradient by the weights, in fp32

    weights = 6.0 * (model.num_active_params + model.vocab_size * roofline.width(model))
    attention = (model.flops_per_token(shape.seq_len) - weights) * tokens / tensor
    attention = (2 if remat == "full" else 1) * attention / 3 / rates.attention[
        0
    ] + 5 / 6 * attention / rates.attention[1]

    ends = sum(a + b for a, b in matrices) / tensor
    elementwise = _PASSES * ends * size * tokens * (3 if remat == "none" else 4)
    scanned = getattr(model.config, "scan_layers", True) is not False
    # A scan copies what is kept into stacked arrays, and out of them.
    saved = 2 * kept_bytes(model, tensor) * tokens if scanned else 0.0
    local = roofline.device_params(model, shape.mesh)
    # Each micro-batch casts the weights and adds its gradients to the sums.
    sums = local * (6 + (12 if turns > 1 else 0))
    memory = (elementwise + saved + sums) / rates.memory

    chunks = math.ceil(tokens / loss_chunk)
    columns, width = model.padded_vocab_size / tensor, roofline.width(model)
    chunk = min(loss_chunk, tokens)
    moved = chunk * columns * (8 + 3 * size) + width * columns * (2 * size + 8)
    head = chunks * max(6 * chunk * width * columns / rates.matmul, moved / rates.matmul_memory)

    compute = turns * (products + attention + memory + head) + 28 * local / rates.memory
    hidden, exposed = communication(cluster, model, shape, remat)
    return compute + exposed + max(0.0, hidden - _HIDING * compute)


def communication(cluster: Cluster, model: Model, shape: Shape, remat: str) -> tuple[float, float]:
    """Seconds of a step's collectives: those that computation can hide, and the rest."""
    mesh, size, tensor = shape.mesh, roofline.itemsize(model), shape.mesh["tensor"]
    inside = tensor * mesh["context"]
    # Each micro-batch gathers the parameters forward and backward, scatters their gradients, and sums the shards.
    whole, copies = size * model.num_params / tensor, mesh["data"] * mesh["expert"]
    hidden = shape.micro_batches * _over(cluster, 2 * whole, mesh["fsdp"], inside)
    summed = shape.micro_batches * _over(cluster, 2 * whole / mesh["fsdp"], copies, inside * mesh["fsdp"])
    scattered = shape.micro_batches * _over(cluster, whole, mesh["fsdp"], inside)
    exposed = 0.0
    if cluster.chip.platform == "tpu" and copies * mesh["fsdp"] > _WINDOWED:
        # Nothing overlaps the scatter. If it goes over a whole slice, XLA sums the gradients everywhere and cuts them.
        exposed = scattered * (2 if mesh["fsdp"] * inside >= cluster.chips_per_island else 1) + summed
    else:
        hidden += scattered + summed
    tokens, layers = shape.chip_tokens, getattr(model.config, "num_layers", 1)
    # Two all-reduces of the residual stream in each pass over a layer.
    passes = 3 if remat == "full" else 2
    stream = passes * 2 * 2 * layers * tokens * roofline.width(model) * size
    exposed += _over(cluster, stream, tensor, mesh["context"]) if tensor > 1 else 0.0
    if mesh["context"] > 1:
        exposed += _over(cluster, stream / tensor, mesh["context"], 1)
    if mesh["expert"] > 1:
        # A choice's row goes to its expert and back, and in the backward pass there twice and back once.
        rows = 5 * SLACK * tokens * layers * getattr(model, "experts_per_token", 1) * roofline.width(model) * size
        exposed += _over(cluster, rows, mesh["expert"], inside)
    return hidden, exposed


def _over(cluster: Cluster, size: float, ways: int, stride: int) -> float:
    """Seconds to send a chip's share of `size` bytes in a ring over `ways` chips, every `stride`-th of the mesh."""
    if ways == 1:
        return 0.0
    members = max(1, min(ways, cluster.chips_per_island // stride))
    crossed = math.ceil(ways / members)
    links = size * (members - 1) / members / cluster.chip.ring
    return links + size * (crossed - 1) / crossed / members / cluster.chip.network
