"""Suggests remat policies, meshes and clusters that would make a step fit. Estimates only: compile to confirm."""

import math
from collections.abc import Iterator, Sequence

from jaxtrain.cost import roofline
from jaxtrain.cost.clusters import Cluster
from jaxtrain.cost.memory_formula import state_bytes
from jaxtrain.interfaces import Json
from jaxtrain.trainer.step import StepComponents

NO_UNROLLING = "--xla_gpu_enable_while_loop_unrolling=WHILE_LOOP_UNROLLING_NO_UNROLL"
_MAX_MESHES = 3


def lines(components: StepComponents, cluster: Cluster, limit: int, misfits: Sequence[Json]) -> list[str]:
    """Returns lines of advice.

    Args:
        components: the components of a step.
        cluster: the cluster that is too small.
        limit: bytes that a step may use on a chip.
        misfits: the stages that do not fit, with `batch_size` and `seq_len`.
    """
    model, optimizer, mesh = components.model, components.optimizer, components.mesh.shape
    longest = max(stage["seq_len"] for stage in misfits)
    said = ["\nWhat may help (a micro-batch already has one row per chip, so a smaller batch alone does not help):"]
    said += [f"  - --config.{change}" for change in model.memory_advice()]
    now = state_bytes(model, optimizer, mesh)
    for other in _meshes(components, longest, [stage["batch_size"] for stage in misfits]):
        flags = " ".join(f"--config.mesh.{axis}={size}" for axis, size in other.items() if size != mesh[axis])
        said.append(
            f"  - {flags}: state {state_bytes(model, optimizer, other) / 1e9:.2f} GB per chip (now {now / 1e9:.2f}), "
            f"{longest // other['context']:,} tokens of a row (now {longest // mesh['context']:,})"
        )
    chunk = "--config.loss.chunk_tokens=N, lower: fewer logits at once"
    said.append(f"  - shorter rows (seq_len, now {longest:,}) with more of them in a batch; a smaller model; {chunk}")
    if cluster.chip.platform == "gpu" and cluster.num_chips > 1:
        said.append(
            f"  - XLA_FLAGS={NO_UNROLLING}: loops hold the arrays of one iteration instead of two (1B on 8 A100s: 7.6 "
            "GB instead of 14.2); the loss of speed is not measured (a layer's weights are then not gathered ahead)"
        )
    # Sharded parameters, optimizer state and gradients should take at most half of a chip's limit.
    whole = state_bytes(model, optimizer, dict.fromkeys(mesh, 1)) * 4 / 3
    chips = 1 << max(0, math.ceil(math.log2(whole / (limit / 2))))
    said.append(f"  - more chips: the state needs {chips:,} or more of {cluster.chip.name}")
    return said


def _meshes(components: StepComponents, seq_len: int, batch_sizes: Sequence[int]) -> Iterator[dict[str, int]]:
    """Yields a few meshes with the same number of chips that divide model and batches and put less on each chip."""
    config, width, now = components.model.config, roofline.width(components.model), dict(components.mesh.shape)
    chips, shown = components.mesh.size, 0
    heads = math.gcd(getattr(config, "num_heads", 1), getattr(config, "num_kv_heads", 0))
    for tensor in (now["tensor"], *(d for d in (2, 4, 8) if heads % d == 0 and d > now["tensor"])):
        for context in (now["context"], *(d for d in (2, 4, 8) if seq_len % d == 0 and d > now["context"])):
            if chips % (tensor * context * now["expert"]):
                continue
            fsdp = chips // (tensor * context * now["expert"])
            other = {**now, "data": 1, "fsdp": fsdp, "tensor": tensor, "context": context}
            divides = width % fsdp == 0 and all(size % fsdp == 0 for size in batch_sizes)
            if other != now and divides and shown < _MAX_MESHES:
                shown += 1
                yield other
