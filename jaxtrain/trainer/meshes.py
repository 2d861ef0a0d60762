"""Chooses the mesh of `mesh=auto`, by arithmetic."""

from collections.abc import Iterator
from typing import Any

import jax
from jax.sharding import AbstractMesh

from jaxtrain.config import Config
from jaxtrain.cost.clusters import Cluster
from jaxtrain.distributed import sharding
from jaxtrain.errors import UserError
from jaxtrain.plan import Plan
from jaxtrain.trainer import variants
from jaxtrain.trainer.step import StepComponents
from jaxtrain.trainer.variants import Target

# While a tokenizer's size is not known.
_SOME_VOCABULARY = 32_768
_MOST_TENSOR = 16


def choose(config: Config, plan: Plan, cluster: Cluster, limit: int) -> tuple[sharding.MeshConfig, str]:
    """Chooses among the meshes that divide the model and the batches, by arithmetic.

    Args:
        config: The run's config.
        plan: The run's plan.
        cluster: The chips.
        limit: Bytes that a step may use on a chip.

    Returns:
        The fastest mesh on which every stage fits, and the reasons, in a line. If none does, all of it is `fsdp`.
        `tensor` and `context` are used only if nothing fits or divides without them.
    """
    one = sharding.MeshConfig(fsdp=1).build(jax.devices()[:1])
    vocab_size = getattr(config.tokenizer, "vocab_size", None) or _SOME_VOCABULARY
    model = config.model.build(vocab_size, one)
    optimizer = config.optimizer.build(model.axes, one)
    loss = config.loss.build(vocab_size, one)
    components = StepComponents(model, loss, optimizer, one, config.clip_norm, losses=lambda _: (loss, None))
    heads = getattr(config.model, "num_heads", 1)
    found: list[tuple[float, dict[str, int]]] = []
    for sizes in _meshes(cluster.num_chips):
        splits = sizes["tensor"] * sizes["context"]
        if splits > 1 and found and found[0][1]["tensor"] * found[0][1]["context"] == 1:
            break
        if sizes["context"] > 1 and heads % splits:
            continue  # each of its devices would compute the whole attention
        target = Target(config=config, components=components, mesh=sizes, cluster=cluster, limit=limit)
        mesh: Any = AbstractMesh(tuple(sizes.values()), tuple(sizes))
        try:
            sharding.check_divides(mesh, model.axes, model.shapes)
            ranked = [variants.rank(target, stage, doubt=variants.DOUBT) for stage in plan.stages if stage.has_steps]
        except UserError:
            continue
        if all(any(one.bytes <= limit for one in stage) for stage in ranked):
            found.append((sum(stage[0].seconds for stage in ranked), sizes))
    if not found:
        return sharding.MeshConfig(), "no mesh fits by arithmetic"
    found.sort(key=lambda item: item[0])
    texts = [" ".join(f"{axis}={size}" for axis, size in sizes.items() if size > 1) or "1" for _, sizes in found]
    others = [f"{text} {seconds / found[0][0]:.2f}" for text, (seconds, _) in zip(texts, found, strict=True)][1:4]
    why = f"{texts[0]}, the fastest of {len(found)} that fit by arithmetic"
    return sharding.MeshConfig(**found[0][1]), why + (f" (relative times: {', '.join(others)})" if others else "")


def _meshes(chips: int) -> Iterator[dict[str, int]]:
    """Yields every mesh of so many chips, those of `data` and `fsdp` alone first, and `fsdp` alone before those."""
    for context in sharding.divisors(chips):
        for tensor in sharding.divisors(chips // context):
            for data in sharding.divisors(chips // context // tensor) if tensor <= _MOST_TENSOR else ():
                fsdp = chips // context // tensor // data
                yield {"data": data, "fsdp": fsdp, "expert": 1, "tensor": tensor, "context": context}
