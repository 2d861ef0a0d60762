"""What would make a step fit: other remat policies, meshes, clusters. By arithmetic: each is a suggestion to check."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

import jax

from jaxtrain.config import Config
from jaxtrain.cost import roofline
from jaxtrain.cost.clusters import Cluster
from jaxtrain.distributed import sharding
from jaxtrain.interfaces import Json
from jaxtrain.losses.chunks import CHUNK_TOKENS
from jaxtrain.optim.base import state_axes
from jaxtrain.trainer.step import StepComponents

NO_UNROLLING = "--xla_gpu_enable_while_loop_unrolling=WHILE_LOOP_UNROLLING_NO_UNROLL"
_MOST_SHOWN = 3


def lines(parts: StepComponents, cluster: Cluster, limit: int, misfits: list[Json]) -> list[str]:
    """misfits: the stages that do not fit, with batch_size and seq_len."""
    mesh = parts.mesh.shape
    said = ["\nWhat may help (micro-batches are one row a chip already, so a smaller batch alone does not):"]
    said += [f"  - --config.{line}" for line in parts.model.memory_advice()]
    longest = max(stage["seq_len"] for stage in misfits)
    now = state_bytes(parts, mesh)
    for other in _meshes(parts, longest, [stage["batch_size"] for stage in misfits]):
        flags = " ".join(f"--config.mesh.{axis}={size}" for axis, size in other.items() if size != mesh[axis])
        after, tokens = state_bytes(parts, other), longest // other["context"]
        said.append(
            f"  - {flags}: state {after / 1e9:.2f} GB a chip (now {now / 1e9:.2f}), {tokens:,} tokens of a row "
            f"(now {longest // mesh['context']:,})"
        )
    chunk = "--config.loss.chunk_tokens=N, lower: fewer logits at once"
    said.append(f"  - shorter rows (seq_len, now {longest:,}) with more of them in a batch; a smaller model; {chunk}")
    if cluster.chip.platform == "gpu" and cluster.num_chips > 1:
        said.append(
            f"  - XLA_FLAGS={NO_UNROLLING}: of loops one turn's arrays are held and not two turns' (1B on 8 A100s: 7.6 "
            "GB for 14.2); what it costs in speed, since a layer's weights are then not gathered ahead, is not known"
        )
    said.append(f"  - more chips: the state takes {_chips_for(parts, mesh, limit):,} or more of {cluster.chip.name}")
    return said


def _meshes(parts: StepComponents, seq_len: int, batch_sizes: list[int]) -> Iterator[dict[str, int]]:
    """Meshes of as many chips that the model and the batches can be shared by, with less on each chip."""
    config, now = parts.model.config, dict(parts.mesh.shape)
    chips, shown = parts.mesh.size, 0
    heads = math.gcd(getattr(config, "num_heads", 1), getattr(config, "num_kv_heads", 0))
    for tensor in (now["tensor"], *(d for d in (2, 4, 8) if heads % d == 0 and d > now["tensor"])):
        for context in (now["context"], *(d for d in (2, 4, 8) if seq_len % d == 0 and d > now["context"])):
            if chips % (tensor * context):
                continue
            other = {"data": 1, "fsdp": chips // (tensor * context), "tensor": tensor, "context": context}
            shared = all(size % other["fsdp"] == 0 for size in batch_sizes)
            divides = roofline.width(parts.model) % other["fsdp"] == 0
            if other != now and shared and divides and shown < _MOST_SHOWN:
                shown += 1
                yield other


def _chips_for(parts: StepComponents, mesh: Mapping[str, int], limit: int) -> int:
    """Chips with which parameters, optimizer and gradients, all sharded, take at most half of what a step may."""
    whole = state_bytes(parts, dict.fromkeys(mesh, 1)) * 4 / 3
    return 1 << max(0, math.ceil(math.log2(whole / (limit / 2))))


def chunk_tokens(config: Config) -> int:
    """Positions whose logits exist at once on a device."""
    return getattr(config.loss, "chunk_tokens", CHUNK_TOKENS)


def state_bytes(parts: StepComponents, mesh: Mapping[str, int]) -> float:
    """Bytes of parameters and optimizer state on a chip of this mesh."""
    shapes: Any = parts.model.shapes
    opt: Any = jax.eval_shape(parts.optimizer.init, shapes)
    axes = state_axes(parts.optimizer, parts.model.axes, shapes)
    return tree_bytes(parts.model.axes, shapes, mesh) + tree_bytes(axes, opt, mesh)


def tree_bytes(axes_tree: Any, shapes_tree: Any, mesh: Mapping[str, int]) -> float:
    """axes_tree: logical axes of each leaf of shapes_tree; sharding.RULES says how the mesh splits them."""
    axes = jax.tree.leaves(axes_tree, is_leaf=sharding.is_axes)
    total = 0.0
    for names, leaf in zip(axes, jax.tree.leaves(shapes_tree), strict=True):
        ways = math.prod(mesh[axis] for name in names for axis in _mesh_axes(name))
        total += math.prod(leaf.shape) * leaf.dtype.itemsize / ways
    return total


def _mesh_axes(name: str | None) -> tuple[str, ...]:
    found = None if name is None else sharding.RULES[name]
    return (found,) if isinstance(found, str) else found or ()
