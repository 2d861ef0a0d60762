"""The sections of an estimate: memory, disk, time and cost."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from jax.sharding import AbstractMesh

from jaxtrain import cli
from jaxtrain.config import Config
from jaxtrain.cost import memory_formula
from jaxtrain.cost.clusters import Cluster
from jaxtrain.cost.memory import limit_of_chip
from jaxtrain.data.sources.webdataset import WebDataset
from jaxtrain.data.stores import token_store
from jaxtrain.distributed import processes, sharding
from jaxtrain.interfaces import Json
from jaxtrain.plan import Plan
from jaxtrain.plan.plan import StagePlan
from jaxtrain.trainer import offline, session, tuning, variants
from jaxtrain.trainer.step import StepComponents, Variant, accumulation

# Dollars per chip-hour, on demand: list prices of Google Cloud for TPUs (us-central), of Lambda and RunPod for GPUs, as
# of 2025. Prices change: override with --price.
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
    """The input of all sections.

    Attributes:
        components: components on a mesh of one device; their shapes are the same on any mesh.
        mesh: sizes by axis on the cluster.
        price: dollars per chip-hour.
    """

    config: Config
    plan: Plan
    cluster: Cluster
    components: StepComponents
    mesh: Mapping[str, int]
    mfu: float
    price: float

    @property
    def stages(self) -> list[StagePlan]:
        return [stage for stage in self.plan.stages if stage.has_steps]


@dataclasses.dataclass(frozen=True)
class Section:
    """Lines to print, and their numbers."""

    lines: list[str]
    numbers: Json


def make_outlook(config: Config, cluster: Cluster, vocab_size: int | None, mfu: float, price: float | None) -> Outlook:
    """Prepares the input of all sections. Raises as `estimate`.

    Args:
        config: the run's config.
        cluster: the cluster to run on.
        vocab_size: number of ids; None to determine it from config and tokenizer.
        mfu: assumed model FLOPs utilization.
        price: dollars per chip-hour; None for the listed price.
    """
    ids, _ = offline.vocabulary(config, vocab_size)
    if config.mesh == sharding.AutoMesh():
        config = session.with_mesh(config, config.plan(), cluster, limit_of_chip(cluster.chip, config.memory_gb))
    one = sharding.MeshConfig(fsdp=1).build(processes.devices()[:1])
    return Outlook(
        config=config,
        plan=config.plan(),
        cluster=cluster,
        components=offline.components(config, ids, one, None),
        mesh=dict(zip(sharding.MESH_AXES, config.mesh.sizes(cluster.num_chips), strict=True)),
        mfu=mfu,
        price=PRICES[cluster.chip.name] if price is None else price,
    )


def estimate(config: Config, cluster: Cluster, vocab_size: int | None, mfu: float, price: float | None) -> Section:
    """Returns all sections together.

    Raises:
        UserError: the mesh does not fit the model, or the vocabulary or teacher is unknown.
    """
    outlook = make_outlook(config, cluster, vocab_size, mfu, price)
    model, sizes = outlook.components.model, " ".join(f"{axis}={size}" for axis, size in outlook.mesh.items())
    lines = [
        f"{model.num_params:,} parameters, a vocabulary of {model.vocab_size:,}, on {cluster}: "
        f"{cluster.num_chips:,} chips, mesh {sizes}",
        outlook.plan.table(),
    ]
    numbers: Json = {"parameters": model.num_params, "hardware": str(cluster), "chips": cluster.num_chips}
    for section in (memory(outlook), disk(outlook), time_and_cost(outlook)):
        lines += ["", *section.lines]
        numbers |= section.numbers
    return Section(lines, numbers)


def memory(outlook: Outlook) -> Section:
    """Estimates memory per chip for each stage: state, teacher, gradients, activations."""
    components, config = outlook.components, outlook.config
    limit = limit_of_chip(outlook.cluster.chip, config.memory_gb)
    held = memory_formula.state_bytes(components.model, components.optimizer, outlook.mesh)
    teacher, distilled = 0.0, components.distilled
    if distilled is not None and distilled.teacher is not None:
        teacher = memory_formula.tree_bytes(distilled.teacher.axes, distilled.abstract, outlook.mesh)
    lines = ["Memory of a chip (an estimate; tools.compile_check asks the compiler):"]
    lines.append(f"  state {held / 1e9:.2f} GB" + (f", teacher {teacher / 1e9:.2f} GB" if teacher else ""))
    worst, chosen = 0.0, list[Variant]()
    mesh: Any = AbstractMesh(tuple(outlook.mesh.values()), tuple(outlook.mesh))
    target = variants.Target(
        config=config, components=components, mesh=outlook.mesh, cluster=outlook.cluster, limit=limit
    )
    choices = tuning.choose(target, outlook.plan, None)
    for stage in outlook.stages:
        fewest = accumulation(mesh, stage.batch_size, stage.seq_len, config.micro_batch_tokens)
        rows = stage.batch_size // sharding.batch_ways(outlook.mesh)
        others = [Variant(micro_batches=count) for count in sharding.divisors(rows) if count >= fewest]
        choice = choices[stage.batch_size, stage.seq_len]
        tried = [variants.by_arithmetic(target, stage, variant) for variant in (*choice.variants[:1], *others)]
        found = next((one for one in tried if one.bytes <= limit), tried[-1])
        worst = max(worst, found.bytes)
        chosen.append(found.variant)
        lines.append(
            f"  stage {stage.index} ({stage.name}): {found.variant}, {found.bytes / 1e9:.2f} GB of the "
            f"{limit / 1e9:.2f} that a step may use: {'fits' if found.bytes <= limit else 'DOES NOT FIT'}"
        )
    numbers: Json = {"state_gb": held / 1e9, "memory_gb": worst / 1e9, "limit_gb": limit / 1e9}
    numbers |= {"fits": worst <= limit, "micro_batches": [variant.micro_batches for variant in chosen]}
    return Section(lines, numbers | {"variants": [dataclasses.asdict(variant) for variant in chosen]})


def disk(outlook: Outlook) -> Section:
    """Estimates disk space for checkpoints, the data's cache or store, and the teacher."""
    config, components, data = outlook.config, outlook.components, outlook.config.data
    one = memory_formula.state_bytes(components.model, components.optimizer, dict.fromkeys(outlook.mesh, 1)) / 1e9
    kept = config.checkpoint.most_at_once(outlook.plan.last_step)
    lines = ["Disk:", f"  checkpoints: {one:.2f} GB each, at most {kept} at once: {one * kept:.2f} GB"]
    numbers: Json = {"checkpoint_gb": one, "checkpoints_gb": one * kept, "disk_cache_gb": 0.0}

    tars = [name for name, source in data.sources.items() if isinstance(source, WebDataset)]
    if data.disk_gb and (tars or data.mode == "download"):
        why = "mode=download" if data.mode == "download" else f"tar shards of {', '.join(tars)}"
        lines.append(f"  disk cache: at most {data.disk_gb:.2f} GB on each host ({why}; data.max_disk_gb)")
        numbers["disk_cache_gb"] = data.disk_gb
    else:
        lines.append(f"  disk cache: none (data.mode={data.mode} reads ranges and keeps nothing)")

    # Tokens in stores if the data never repeats. `overlap` tokens of each row belong to the previous row.
    unique = None
    if outlook.plan.total_tokens is not None:
        unique = sum(((s.last_token or 0) - s.first_token) * s.stride / s.seq_len for s in outlook.stages)
    itemsize = token_store.dtype_of(components.model.vocab_size).itemsize
    numbers["token_store_gb"] = None if unique is None else unique * itemsize / 1e9
    if unique is None:
        lines.append("  token store: as large as the data, since the run ends with its data")
    else:
        note = "needed by" if data.mode in ("pretokenized", "auto") else "not used by"
        fewer = "" if config.epochs is None else "; less if the data has fewer tokens"
        lines.append(
            f"  token store: at most {unique * itemsize / 1e9:.2f} GB, {itemsize} bytes per token ({note} "
            f"data.mode={data.mode}{fewer})"
        )

    teacher, distilled = config.teacher, components.distilled
    if teacher is None:
        return Section(lines, numbers)
    if distilled is not None and distilled.teacher is not None and not teacher.is_checkpoint:
        size = 2 * distilled.teacher.num_params / 1e9  # published weights have 2 bytes per parameter
        lines.append(f"  teacher's weights: about {size:.2f} GB ({teacher.model}) in Hugging Face's cache on each host")
        numbers["teacher_download_gb"] = size
    layout = offline.teacher_layout(config, components.model.vocab_size)
    size = None if unique is None else unique * layout.width / 1e9
    much = "depends on the data" if size is None else f"at most {size:,.1f} GB (1.5 times as much free)"
    note = "teacher.cache" if teacher.cache is not None else "not used: the teacher runs during training"
    lines.append(f"  teacher's cache: {much}, {layout.width} bytes per token with k={layout.k} ({note})")
    return Section(lines, numbers | {"teacher_cache_gb": size, "teacher_cache_bytes_per_token": layout.width})


def time_and_cost(outlook: Outlook) -> Section:
    """Estimates hours and dollars of each stage, at the assumed MFU."""
    chips = outlook.cluster.num_chips
    peak = outlook.cluster.chip.flops * chips

    def money(hours: float) -> tuple[str, str, str]:
        return f"{hours:,.2f}", f"{hours * chips:,.1f}", f"{hours * chips * outlook.price:,.2f}"

    rows: list[tuple[str, ...]] = [("stage", "tokens", "TFLOP per token", "tokens/s", "hours", "chip-hours", "dollars")]
    hours, stages = 0.0, []
    for stage in outlook.stages:
        flops = outlook.components.flops_per_token(stage.seq_len)
        speed = outlook.mfu * peak / flops
        shown = (f"{flops / 1e12:.4f}", f"{speed:,.0f}")
        if stage.last_token is None:
            rows.append((stage.name, "until the data ends", *shown, "?", "?", "?"))
            continue
        tokens = stage.last_token - stage.first_token
        took = tokens / speed / 3600
        hours += took
        stages.append({"name": stage.name, "tokens": tokens, "tokens_per_sec": speed, "hours": took})
        rows.append((stage.name, f"{tokens:,}", *shown, *money(took)))
    rows.append(("all", f"{outlook.plan.total_tokens or 0:,}", "", "", *money(hours)))
    lines = [
        f"Time and cost at MFU {outlook.mfu:.0%} (--mfu) and {outlook.price:.2f} dollars per chip-hour (--price):",
        cli.table(rows),
    ]
    dollars = hours * chips * outlook.price
    return Section(lines, {"hours": hours, "chip_hours": hours * chips, "dollars": dollars, "stages": stages})
