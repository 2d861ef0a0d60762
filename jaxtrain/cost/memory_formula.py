"""A train step's memory by arithmetic, without compiling: for estimates and for advice on what would fit."""

import math
from collections.abc import Mapping
from typing import Any

import jax

from jaxtrain.cost import roofline
from jaxtrain.cost.hardware import Chip
from jaxtrain.distributed import sharding
from jaxtrain.interfaces import Model
from jaxtrain.optim.base import state_axes

# What the backward pass keeps of a layer besides its input, in bytes that its products write. Without remat, norms,
# rotary positions and SwiGLU keep theirs too, some in fp32 (1B on a v5p and a v5e: 3.3 and 2.9).
OUTPUTS_KEPT = {"full": 0.0, "dots": 1.0, "none": 3.2}


def tree_bytes(axes_tree: Any, shapes_tree: Any, mesh: Mapping[str, int]) -> float:
    """Bytes of a tree of arrays on one chip.

    Args:
        axes_tree: logical axes of each leaf; `sharding.RULES` maps them to the mesh.
        shapes_tree: the leaves' shapes and types.
        mesh: sizes by axis.
    """
    total = 0.0
    axes = jax.tree.leaves(axes_tree, is_leaf=sharding.is_axes)
    for names, leaf in zip(axes, jax.tree.leaves(shapes_tree), strict=True):
        split = [sharding.RULES[name] for name in names if name is not None]
        ways = math.prod(
            mesh[axis] for found in split for axis in ((found,) if isinstance(found, str) else found or ())
        )
        total += math.prod(leaf.shape) * leaf.dtype.itemsize / ways
    return total


def state_bytes(model: Model, optimizer: Any, mesh: Mapping[str, int]) -> float:
    """Bytes of parameters and optimizer state on one chip of a mesh with these sizes."""
    shapes: Any = model.shapes
    moments: Any = jax.eval_shape(optimizer.init, shapes)
    return tree_bytes(model.axes, shapes, mesh) + tree_bytes(state_axes(optimizer, model.axes, shapes), moments, mesh)


def temporary_bytes(
    model: Model, chip: Chip | None, mesh: Mapping[str, int], loss_chunk: int, tokens: float, micro_batches: int
) -> float:
    """Bytes that a step needs on a chip besides its arguments.

    Counts fp32 gradients (twice if they accumulate), the parameters' shard and two gathered layers in the compute
    dtype, the gathered head and its fp32 gradient, a chunk's logits, what the backward pass keeps of each layer, and
    the inside of one layer.

    Args:
        chip: None for CPUs.
        loss_chunk: tokens whose logits exist at once.
        tokens: tokens on a chip in one micro-batch.
    """
    tensor, itemsize, num_layers = mesh["tensor"], roofline.itemsize(model), getattr(model.config, "num_layers", 1)
    gradients = tree_bytes(model.axes, model.shapes, mesh)
    matrices = roofline.matrices(model)
    unused = (model.num_params_non_embedding - model.num_active_params) / mesh["expert"]  # by a token
    layer = (sum(a * b for a, b in matrices) + unused) / num_layers / tensor
    width = roofline.width(model)
    head = width * model.padded_vocab_size / tensor
    logits = min(loss_chunk, tokens) * model.padded_vocab_size / tensor
    outputs = sum(b for _, b in matrices) / num_layers / tensor
    kept = width + OUTPUTS_KEPT[roofline.remat(model)] * outputs
    kept *= tokens * itemsize * num_layers
    # The ends of all products of one layer, and their gradients.
    inside = tokens * itemsize * 2 * sum(a + b for a, b in matrices) / num_layers / tensor
    total = gradients * (2 if micro_batches > 1 else 1) + (gradients / 4 + 2 * layer) * itemsize
    total += head * (itemsize + 4) + logits * (8 + itemsize) + kept + inside
    if math.prod(mesh.values()) == 1 or chip is None:
        return total
    # On several chips the compiled programs of docs/scale.json need more than that.
    if chip.platform == "tpu":
        # Another copy of the head's gradient; with micro-batches one more, and one of the parameters' gradients.
        return total + head * 4 * (2 if micro_batches > 1 else 1) + (gradients if micro_batches > 1 else 0.0)
    if micro_batches == 1:
        return total
    # XLA on GPUs overlaps consecutive iterations of the loop over micro-batches, so the arrays of two exist at once:
    # always with its own attention, and with cuDNN's if there are just two.
    if getattr(model.config, "attention", "xla") == "xla" or (chip.compute_capability or (0, 0)) < (9, 0):
        return total + kept + 2 * inside
    return total + gradients + (kept + inside if micro_batches == 2 else 0.0)
