"""What `tools.estimate` adds up: one function for each part of the answer, each (Outlook) → Part."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax.sharding import AbstractMesh

from jaxtrain.config import Config
from jaxtrain.cost import roofline
from jaxtrain.cost.clusters import Cluster
from jaxtrain.data.sources.webdataset import WebDataset
from jaxtrain.data.stores import token_store
from jaxtrain.distributed import sharding
from jaxtrain.interfaces import Json, Model
from jaxtrain.plan import Plan
from jaxtrain.plan.plan import StagePlan
from jaxtrain.trainer import session
from jaxtrain.trainer.step import StepComponents, accumulation
from tools import advice, checking, offline

# Dollars of a chip for an hour, on demand: Google Cloud's list for TPUs (us-central), Lambda's and RunPod's for GPUs,
# as of 2025. They move: --price.
PRICES = {
    "v4": 3.22,
    "v5e": 1.20,
    "v5p": 4.20,
    "v6e": 2.70,
    "a100-40gb": 1.29,
    "a100": 1.79,
    "h100-pcie": 2.49,
    "h100": 2.99,
    "h200": 3.59,
    "l40s": 0.86,
    "rtx4090": 0.69,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outlook:
    """What the parts of an estimate have in common. mesh: sizes by axis on the cluster. price: of a chip-hour."""

    config: Config
    plan: Plan
    cluster: Cluster
    parts: StepComponents
    mesh: Mapping[str, int]
    mfu: float
    price: float


@dataclasses.dataclass(frozen=True)
class Part:
    """Lines to print, and the numbers in them."""

    lines: list[str]
    numbers: Json


def outlook(config: Config, cluster: Cluster, vocab_size: int | None, mfu: float, price: float | None) -> Outlook:
    """vocab_size, price: what was given, else what is known. Raises UserError as `estimate`."""
    plan = config.plan()
    ids, _ = offline.vocabulary(config, vocab_size)
    mesh: dict[str, int] = dict(zip(sharding.MESH_AXES, config.mesh.sizes(cluster.num_chips), strict=True))
    # The parts' shapes are the same on one device; what the cluster's mesh makes of them is arithmetic.
    one = sharding.MeshConfig(fsdp=1).build(jax.devices()[:1])
    frozen = offline.outlined_teacher(config, ids, one)
    return Outlook(
        config=config,
        plan=plan,
        cluster=cluster,
        parts=session.make_parts(config, ids, plan, one, frozen, None, offline.outlined_layout(config, ids)),
        mesh=mesh,
        mfu=mfu,
        price=PRICES[cluster.chip.name] if price is None else price,
    )


def estimate(config: Config, cluster: Cluster, vocab_size: int | None, mfu: float, price: float | None) -> Part:
    """All parts together. Raises UserError for a mesh that does not fit, or an unknown vocabulary or teacher."""
    made = outlook(config, cluster, vocab_size, mfu, price)
    model, sizes = made.parts.model, " ".join(f"{axis}={size}" for axis, size in made.mesh.items())
    lines = [
        f"{model.num_params:,} parameters, a vocabulary of {model.vocab_size:,}, on {cluster}: "
        f"{cluster.num_chips:,} chips, mesh {sizes}",
        made.plan.table(),
    ]
    numbers: Json = {"parameters": model.num_params, "hardware": str(cluster), "chips": cluster.num_chips}
    for part in PARTS:
        found = part(made)
        lines += ["", *found.lines]
        numbers |= found.numbers
    return Part(lines, numbers)


def memory(given: Outlook) -> Part:
    """Of a chip, for the stage that needs the most: state, gradients, activations, by arithmetic."""
    limit = checking.step_limit(given.config, given.cluster)
    held = advice.state_bytes(given.parts, given.mesh)
    teacher = 0.0
    distilled = given.parts.distilled
    if distilled is not None and distilled.teacher is not None:
        teacher = advice.tree_bytes(distilled.teacher.axes, distilled.abstract, given.mesh)
    lines = ["Memory of a chip (an estimate; tools.compile_check asks the compiler):"]
    lines.append(f"  state {held / 1e9:.2f} GB" + (f", teacher {teacher / 1e9:.2f} GB" if teacher else ""))
    worst, counts = 0.0, []
    for stage in _stages(given.plan):
        count, needed = _micro_batches(given, stage, limit - held - teacher)
        needed += held + teacher
        worst = max(worst, needed)
        counts.append(count)
        verdict = "fits" if needed <= limit else "DOES NOT FIT"
        lines.append(
            f"  stage {stage.index} ({stage.name}): {count} micro-batch{'es' * (count > 1)}, {needed / 1e9:.2f} GB of "
            f"the {limit / 1e9:.2f} that a step may take: {verdict}"
        )
    numbers: Json = {"state_gb": held / 1e9, "memory_gb": worst / 1e9, "limit_gb": limit / 1e9}
    numbers |= {"fits": worst <= limit, "micro_batches": counts}
    return Part(lines, numbers)


def _stages(plan: Plan) -> list[StagePlan]:
    return [stage for stage in plan.stages if stage.has_steps]


def _micro_batches(given: Outlook, stage: StagePlan, room: float) -> tuple[int, float]:
    """The fewest micro-batches whose step takes at most `room` besides the state (else the most), and its bytes."""
    mesh: Any = AbstractMesh(tuple(given.mesh.values()), tuple(given.mesh))
    fewest = accumulation(mesh, stage.batch_size, stage.seq_len, given.config.micro_batch_tokens)
    rows = stage.batch_size // (given.mesh["data"] * given.mesh["fsdp"])
    counts = [count for count in sharding.divisors(rows) if count >= fewest]
    needed = 0.0
    for count in counts:
        needed = temporary_bytes(given, rows // count * stage.seq_len / given.mesh["context"], count)
        if needed <= room:
            return count, needed
    return counts[-1], needed


def temporary_bytes(given: Outlook, tokens: float, micro_batches: int) -> float:
    """What a step holds besides its arguments, with so many tokens on a chip at once: gradients (twice where they
    accumulate) in fp32, the parameters' shard and two gathered layers in the compute dtype, the head gathered and its
    gradient in fp32, a chunk's logits, what the backward pass keeps of each layer, and one layer's own."""
    model, mesh, config = given.parts.model, given.mesh, given.config
    itemsize, tensor, num_layers = roofline.itemsize(model), mesh["tensor"], _num_layers(model)
    local = advice.tree_bytes(model.axes, model.shapes, mesh) / 4
    layer = sum(a * b for a, b in roofline.matrices(model)) / num_layers / tensor
    head = roofline.width(model) * model.padded_vocab_size / tensor
    chunk = min(advice.chunk_tokens(config), tokens) * model.padded_vocab_size / tensor
    total = local * 4 * (2 if micro_batches > 1 else 1) + local * itemsize + 2 * layer * itemsize
    total += head * (itemsize + 4) + chunk * (8 + itemsize)
    kept, one = num_layers * _kept(model, tensor), _of_one_layer(model, tensor)
    total += tokens * itemsize * (kept + one)
    if given.cluster.num_chips == 1:
        return total
    activations = {"kept": tokens * itemsize * kept, "one": tokens * itemsize * one}
    return total + _of_the_compiler(given, micro_batches, gradients=local * 4, head=head * 4, **activations)


def _of_the_compiler(
    given: Outlook, micro_batches: int, *, gradients: float, head: float, kept: float, one: float
) -> float:
    """Bytes that the compiled programs of docs/scale.json hold besides, on several chips. gradients, head, kept, one:
    bytes of temporary_bytes, of the first two in fp32.

    For TPUs another copy of a gradient of the head's size, and where micro-batches add up one more and another copy of
    the parameters' gradients. XLA on GPUs lets the loop over micro-batches run into its next turn, so that what two of
    them keep is there at once: with its own attention always, with cuDNN's where there are just two."""
    chip = given.cluster.chip
    if chip.platform == "tpu":
        return 2 * head + gradients if micro_batches > 1 else head
    if micro_batches == 1:
        return 0.0
    if getattr(given.parts.model.config, "attention", "xla") == "xla" or (chip.compute_capability or (0, 0)) < (9, 0):
        return kept + 2 * one
    return gradients + (kept + one if micro_batches == 2 else 0.0)


def _kept(model: Model, tensor: int) -> float:
    """Numbers of a token that a layer keeps for the backward pass: its input, and what remat does not compute again."""
    outputs = sum(b for _, b in roofline.matrices(model)) / _num_layers(model) / tensor
    return roofline.width(model) + {"full": 0.0, "dots": outputs, "none": 2 * outputs}[roofline.remat(model)]


def _of_one_layer(model: Model, tensor: int) -> float:
    """Numbers of a token while one layer's gradient is computed: ends of all products, and their gradients."""
    return 2 * sum(a + b for a, b in roofline.matrices(model)) / _num_layers(model) / tensor


def _num_layers(model: Model) -> int:
    return getattr(model.config, "num_layers", 1)


def disk(given: Outlook) -> Part:
    """Of the work directory: checkpoints, and what the data's mode keeps."""
    config, plan = given.config, given.plan
    size = advice.state_bytes(given.parts, dict.fromkeys(given.mesh, 1))
    kept = config.checkpoint.most_at_once(plan.last_step)
    numbers: Json = {"checkpoint_gb": size / 1e9, "checkpoints_gb": size * kept / 1e9}
    lines = ["Disk:", f"  checkpoints: {size / 1e9:.2f} GB each, at most {kept} at once: {size * kept / 1e9:.2f} GB"]
    for part in (data_cache, stored_tokens, teacher_download, teacher_cache):
        found = part(given)
        lines += found.lines
        numbers |= found.numbers
    return Part(lines, numbers)


def data_cache(given: Outlook) -> Part:
    """Of each host: files that are downloaded, or tar shards that are read whole."""
    data = given.config.data
    tars = [name for name, source in data.sources.items() if isinstance(source, WebDataset)]
    if data.disk_gb and (tars or data.mode == "download"):
        why = "mode=download" if data.mode == "download" else f"tar shards of {', '.join(tars)}"
        return Part(
            [f"  disk cache: at most {data.disk_gb:.2f} GB on each host ({why}; data.max_disk_gb)"],
            {"disk_cache_gb": data.disk_gb},
        )
    return Part([f"  disk cache: none (data.mode={data.mode} reads ranges and keeps nothing)"], {"disk_cache_gb": 0.0})


def stored_tokens(given: Outlook) -> Part:
    """Of a token store (tools.pretokenize), were every token of the run a new one."""
    data, plan = given.config.data, given.plan
    if plan.total_tokens is None:
        return Part(["  token store: as large as the data, which alone ends the run"], {"token_store_gb": None})
    itemsize = token_store.dtype_of(given.parts.model.vocab_size).itemsize
    size = _unique(plan) * itemsize / 1e9
    uses = data.mode in ("pretokenized", "auto")
    note = f"needed by data.mode={data.mode}" if uses else f"not used by data.mode={data.mode}"
    epochs = "" if given.config.epochs is None else "; less where the data has fewer"
    return Part(
        [f"  token store: at most {size:.2f} GB, {itemsize} bytes a token ({note}{epochs})"], {"token_store_gb": size}
    )


def teacher_download(given: Outlook) -> Part:
    """In Hugging Face's cache on each host, for a teacher of the Hub: published weights have 2 bytes a parameter."""
    teacher, distilled = given.config.teacher, given.parts.distilled
    if teacher is None or distilled is None or distilled.teacher is None or teacher.is_checkpoint:
        return Part([], {})
    size = 2 * distilled.teacher.num_params / 1e9
    return Part([f"  teacher's weights: about {size:.2f} GB ({teacher.model})"], {"teacher_download_gb": size})


def teacher_cache(given: Outlook) -> Part:
    """Of tools.cache_teacher, were every token of the run a new one."""
    teacher, plan = given.config.teacher, given.plan
    if teacher is None:
        return Part([], {})
    layout = offline.layout_of(given.config, given.parts.model.vocab_size)
    size = None if plan.total_tokens is None else _unique(plan) * layout.width / 1e9
    much = "as large as the data makes it" if size is None else f"at most {size:,.1f} GB (1.5 times as much free)"
    note = "teacher.cache" if teacher.cache is not None else "not used: the teacher runs as the student trains"
    return Part(
        [f"  teacher's cache: {much}, {layout.width} bytes a token with k={layout.k} ({note})"],
        {"teacher_cache_gb": size, "teacher_cache_bytes_per_token": layout.width},
    )


def _unique(plan: Plan) -> float:
    """Tokens of the run, each once: of a row, `overlap` tokens are the row's before it."""
    return sum(((stage.last_token or 0) - stage.first_token) * stage.stride / stage.seq_len for stage in _stages(plan))


def time_and_cost(given: Outlook) -> Part:
    """By stage, at the assumed MFU."""
    peak = given.cluster.chip.flops * given.cluster.num_chips
    rows: list[tuple[str, ...]] = [("stage", "tokens", "TFLOP a token", "tokens/s", "hours", "chip-hours", "dollars")]
    hours, stages = 0.0, []
    for stage in _stages(given.plan):
        flops = given.parts.flops_per_token(stage.seq_len)
        speed = given.mfu * peak / flops
        if stage.last_token is None:
            rows.append((stage.name, "until the data ends", f"{flops / 1e12:.4f}", f"{speed:,.0f}", "?", "?", "?"))
            continue
        tokens = stage.last_token - stage.first_token
        took = tokens / speed / 3600
        hours += took
        stages.append({"name": stage.name, "tokens": tokens, "tokens_per_sec": speed, "hours": took})
        rows.append(_row(given, stage.name, f"{tokens:,}", f"{flops / 1e12:.4f}", f"{speed:,.0f}", took))
    rows.append(_row(given, "all", f"{given.plan.total_tokens or 0:,}", "", "", hours))
    lines = [
        f"Time and cost at an MFU of {given.mfu:.0%} (--mfu) and {given.price:.2f} dollars a chip-hour (--price):",
        checking.table(rows),
    ]
    chip_hours = hours * given.cluster.num_chips
    numbers = {"hours": hours, "chip_hours": chip_hours, "dollars": chip_hours * given.price, "stages": stages}
    return Part(lines, numbers)


def _row(given: Outlook, name: str, tokens: str, flops: str, speed: str, hours: float) -> tuple[str, ...]:
    chips = given.cluster.num_chips
    return (
        name,
        tokens,
        flops,
        speed,
        f"{hours:,.2f}",
        f"{hours * chips:,.1f}",
        f"{hours * chips * given.price:,.2f}",
    )


PARTS: tuple[Callable[[Outlook], Part], ...] = (memory, disk, time_and_cost)
