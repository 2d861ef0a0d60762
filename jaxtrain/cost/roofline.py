"""Lower bound on a train step's time: arithmetic, memory traffic and communication, divided by the chip's peaks.

Uses the model's own formula, not XLA's cost analysis, which counts a scanned layer once. Peaks are never reached: this
bounds the speed and names the limiting resource. It does not predict a run.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import jax

from jaxtrain.cost import hardware
from jaxtrain.cost.hardware import Chip
from jaxtrain.cost.hlo import Collective
from jaxtrain.distributed.sharding import is_axes
from jaxtrain.interfaces import Model
from jaxtrain.losses.chunks import CHUNK_TOKENS
from jaxtrain.optim.base import STACKS, is_matrix


class Components(Protocol):
    """The part of trainer.step.StepComponents that the roofline needs."""

    @property
    def model(self) -> Model: ...
    @property
    def distilled(self) -> Any: ...
    def flops_per_token(self, seq_len: int) -> float: ...


_OPTIMIZER_BYTES = 28  # a parameter: weight, two moments and gradient are read in fp32, all but the last are written


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """A step: its batch, and in how many parts each chip takes its rows. mesh: sizes by axis."""

    batch_size: int
    seq_len: int
    micro_batches: int
    mesh: Mapping[str, int]

    @property
    def tokens(self) -> int:
        return self.batch_size * self.seq_len

    @property
    def chips(self) -> int:
        return math.prod(self.mesh.values())

    @property
    def chip_tokens(self) -> float:
        """Tokens whose activations a chip has, in all micro-batches; chips of `tensor` share them."""
        return self.tokens * self.mesh["tensor"] / self.chips


@dataclasses.dataclass(frozen=True, kw_only=True)
class Traffic:
    """Bytes that a chip sends in a step, over its slice's or host's links, and over the network."""

    links: float = 0.0
    network: float = 0.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Roofline:
    """Seconds of a step for each resource alone. mfu: The highest possible, of the model's own FLOPs."""

    seconds: dict[str, float]
    tokens_per_sec: float
    mfu: float

    @property
    def bound_by(self) -> str:
        return max(self.seconds, key=self.seconds.__getitem__)


def roofline(chip: Chip, parts: Components, shape: Shape, loss_chunk: int, traffic: Traffic) -> Roofline:
    """loss_chunk: positions whose logits a chip computes at once."""
    model_flops = parts.flops_per_token(shape.seq_len) * shape.tokens / shape.chips
    again = recomputed_flops_per_token(parts.model, shape.seq_len) * shape.tokens / shape.chips
    seconds = {
        "arithmetic": (model_flops + again) / chip.flops,
        "memory": memory_bytes(parts, shape, loss_chunk) / chip.bandwidth,
        "links": traffic.links / chip.links,
        "network": traffic.network / chip.network,
    }
    least = max(seconds.values())
    return Roofline(seconds=seconds, tokens_per_sec=shape.tokens / least, mfu=model_flops / chip.flops / least)


def recomputed_flops_per_token(model: Model, seq_len: int) -> float:
    """FLOPs that the backward pass recomputes; the forward pass is a third of the training FLOPs.

    remat "full": all of the layers; "dots": no product (with cuDNN attention again, not counted).
    """
    weights = 6.0 * model.num_active_params
    attention = model.flops_per_token(seq_len) - weights - 6.0 * model.vocab_size * width(model)
    return {"none": 0.0, "dots": 0.0, "full": (weights + attention) / 3}[remat(model)]


def matrices(model: Model) -> list[tuple[int, int]]:
    """(inputs, outputs) of each matrix product with weights in the layers, all layers together.

    Of a layer's experts, as many as a token uses.
    """
    found = []
    axes = jax.tree.leaves(model.axes, is_leaf=is_axes)
    for names, leaf in zip(axes, jax.tree.leaves(model.shapes), strict=True):
        if is_matrix(names):
            stacks = [axis for axis in names if axis in STACKS]
            sizes = leaf.shape[len(stacks) :]
            inputs = sizes[0] if names[len(stacks)] == "embed" else math.prod(sizes[:-1])
            count = leaf.shape[0] if "layers" in stacks else 1
            count *= getattr(model, "experts_per_token", 1) if "experts" in stacks else 1
            found += count * [(inputs, math.prod(sizes) // inputs)]
    return found


def device_params(model: Model, mesh: Mapping[str, int]) -> float:
    """Parameters on a device, if all but norms are split."""
    unused = model.num_params_non_embedding - model.num_active_params  # by a token: nearly all experts
    return (model.num_params - unused * (1 - 1 / mesh["expert"])) / (mesh["fsdp"] * mesh["tensor"])


def loss_chunk(loss: Any) -> int:
    """Positions whose logits exist at once on a device, by the config of the loss."""
    return getattr(loss, "chunk_tokens", None) or CHUNK_TOKENS


def width(model: Model) -> int:
    """Width of the hidden states."""
    return jax.eval_shape(model.head, model.shapes).shape[0]


def remat(model: Model) -> str:
    """What the backward pass recomputes: "none", "dots" or "full"."""
    found = getattr(model.config, "remat", "none")
    return "full" if found == "auto" else found


def itemsize(model: Model) -> int:
    """Bytes of an activation."""
    return 2 if getattr(model.config, "dtype", "float32") == "bfloat16" else 4


def memory_bytes(parts: Components, shape: Shape, loss_chunk: int) -> float:
    """Bytes that a chip's memory moves in a step, if each matrix product reads its inputs and writes its output once.

    Attention itself, norms and the embedding's look-up are left out: a flash kernel, fusions and a gather of rows.
    """
    model, tensor, size = parts.model, shape.mesh["tensor"], itemsize(parts.model)
    forwards = 2 if remat(model) == "full" else 1
    unused = (model.num_params_non_embedding - model.num_active_params) / shape.mesh["expert"]
    layer_weights = (sum(a * b for a, b in matrices(model)) + unused) / tensor
    ends = sum(a + b for a, b in matrices(model)) / tensor
    # Forward and the gradient by the input read the weights; the gradient by the weights writes fp32.
    weights = layer_weights * (size * (forwards + 1) + 4)
    # All three products of a matrix have its inputs and outputs at their ends.
    activations = shape.chip_tokens * ends * size * (forwards + 2)
    local = device_params(model, shape.mesh)
    accumulated = 8 * local * shape.micro_batches if shape.micro_batches > 1 else 0.0
    total = shape.micro_batches * weights + activations + accumulated + _OPTIMIZER_BYTES * local
    total += _head_bytes(model, shape, loss_chunk)
    teacher = None if parts.distilled is None else parts.distilled.teacher
    if teacher is not None:
        total += sum(
            2 * (a * b * shape.micro_batches + (a + b) * shape.chip_tokens) / tensor for a, b in matrices(teacher)
        )
    return total


def _head_bytes(model: Model, shape: Shape, loss_chunk: int) -> float:
    """fp32 logits written and read, their gradient written and read twice; per chunk the head, and its fp32 gradient
    read and written (losses/chunks.py)."""
    tensor, vocab, size = shape.mesh["tensor"], model.padded_vocab_size, itemsize(model)
    chunks = math.ceil(shape.chip_tokens / shape.micro_batches / loss_chunk) * shape.micro_batches
    logits = shape.chip_tokens * vocab * (8 + 3 * size) / tensor
    return logits + chunks * width(model) * vocab * (2 * size + 8) / tensor


def traffic(collectives: Sequence[Collective], islands: Sequence[int]) -> Traffic:
    """islands: of each device in the order of the mesh, which slice or host it is in.

    Least bytes by the ring algorithms: a gather or scatter over n devices sends (n - 1) / n of the array, a reduction
    twice that. Between h islands it is (h - 1) / h of it, spread over the members that an island has.
    """
    links = network = 0.0
    for one in collectives:
        for_links, for_network = sent(one, islands)
        links += for_links * one.times
        network += for_network * one.times
    return Traffic(links=links, network=network)


def sent(one: Collective, islands: Sequence[int]) -> tuple[float, float]:
    """Bytes over a chip's links and over its share of the network, each time."""
    if one.kind == "send":
        return 0.0, float(one.size)
    if one.kind == "collective-permute":
        crosses = any(islands[a] != islands[b] for a, b in _known(one.groups, islands))
        return (0.0, float(one.size)) if crosses else (float(one.size), 0.0)
    ways = one.ways
    passes = 2 if one.kind == "all-reduce" else 1
    crossed = len({islands[device] for device in one.groups[0] if device < len(islands)})
    members = ways / crossed
    links = passes * one.size * (ways - 1) / ways if members > 1 else 0.0
    return links, passes * one.size * (crossed - 1) / crossed / members


def _known(groups: Sequence[tuple[int, ...]], islands: Sequence[int]) -> Iterator[tuple[int, int]]:
    for a, b in groups:
        if max(a, b) < len(islands):
            yield a, b


def peak_flops() -> float | None:
    """Published bf16 FLOP/s of all devices of the run together; None if a device is not in the table."""
    chip = hardware.of_kind(jax.devices()[0].device_kind)
    return None if chip is None else chip.flops * jax.device_count()
