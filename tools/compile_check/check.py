"""Implements `tools.compile_check`: compiles stages for a cluster that is not attached."""

import collections
import dataclasses
import logging
import math
from collections.abc import Callable

import jax
import numpy as np

from jaxtrain import cli
from jaxtrain.config import Config
from jaxtrain.cost import clusters, hlo, memory, roofline, step_time
from jaxtrain.cost.clusters import Cluster
from jaxtrain.distill.teacher import bytes_per_device
from jaxtrain.distributed import processes, sharding
from jaxtrain.interfaces import AttentionModel, Json
from jaxtrain.trainer import offline, scheduled, session, state, tuning, variants
from jaxtrain.trainer.programs import DoesNotFitError, Program, StagePrograms
from jaxtrain.trainer.step import StepComponents
from tools.compile_check import advice

_WASTES = 8  # source lines shown

logger = logging.getLogger("jaxtrain")


def check(config: Config, cluster: Cluster, given_vocab_size: int | None) -> Json:
    """Compiles every stage, the evaluation and its benchmarks, and prints the results.

    Returns:
        The results; "fits" is whether everything fits.

    Raises:
        UserError: settings conflict, for example a mesh that does not divide the model.
    """
    session.compiler_effort(cluster.chip.platform)
    plan = config.plan()
    vocab_size, source = offline.vocabulary(config, given_vocab_size)
    limit = memory.limit_of_chip(cluster.chip, config.memory_gb)
    if config.mesh == sharding.AutoMesh():
        config = session.with_mesh(config, plan, cluster, limit)
    mesh = config.mesh.build(clusters.devices(cluster))
    components = offline.components(config, vocab_size, mesh, limit)
    evaluation = config.eval.plan(plan, config.data.num_lanes).stages[0] if config.eval.is_on else None
    extra = session.bytes_besides_params(components)
    _describe(components, cluster, limit, vocab_size, source)
    # Machine code takes minutes, and nothing here needs it.
    compile = measure = None
    target = variants.Target(config=config, components=components, mesh=mesh.shape, cluster=cluster, limit=limit)
    if mesh.devices.flat[0].platform != "cpu":
        compile = scheduled.Compiler(config, cluster, vocab_size, components)
        measure = tuning.by_compiler(target, compile)
    choices = tuning.choose(target, plan, measure)
    tuning.report(plan, choices)
    stages = StagePrograms(components, plan, config.micro_batch_tokens, limit, evaluation, extra, compile, choices)
    answer: Json = {
        "cluster": str(cluster),
        "chips": cluster.num_chips,
        "mesh": dict(mesh.shape),
        "parameters": components.model.num_params,
        "vocab_size": vocab_size,
        "limit_bytes": limit,
        "state_bytes": bytes_per_device(state.abstract(components.model, components.optimizer, mesh)),
        "stages": [],
    }
    for batch_size, seq_len in stages.shapes:
        names = [s.name for s in plan.stages if s.has_steps and (s.batch_size, s.seq_len) == (batch_size, seq_len)]
        shown = {"names": names, "batch_size": batch_size, "seq_len": seq_len}
        answer["stages"].append(shown | _stage(config, cluster, components, stages, shown))
    answer["fits"] = all(stage["fits"] for stage in answer["stages"])
    if not answer["fits"]:
        for line in advice.lines(
            components, cluster, limit, [stage for stage in answer["stages"] if not stage["fits"]]
        ):
            logger.info(line)
    elif evaluation is not None:
        checked = [("evaluation", "Evaluation", evaluation.seq_len, stages.evaluation)]
        if config.eval.tasks:
            # Rows are as long as the longest question, at most the context.
            context = config.model.max_seq_len
            stages.add_tasks(evaluation.batch_size, context)
            checked.append(("tasks", "Benchmarks, if a question fills the context", context, stages.tasks))
        for key, title, seq_len, compiled in checked:
            logger.info(f"\n{title}: {evaluation.batch_size:,} rows of {seq_len:,} tokens")
            answer[key] = _held_out(compiled, extra)
            answer["fits"] &= answer[key]["fits"]
    return answer


def _held_out(compiled: Callable[[], Program], extra: int) -> Json:
    """A program of the evaluation: whether it fits. extra: bytes that training keeps besides the parameters."""
    try:
        program = compiled()
    except DoesNotFitError as error:
        logger.info(f"  DOES NOT FIT. {error}")
        return {"fits": False, "error": str(error)}
    needed = memory.needed(program.executable)
    return {"fits": True, "micro_batches": program.micro_batches, "needed_bytes": needed and needed + extra}


def _describe(components: StepComponents, cluster: Cluster, limit: int, vocab_size: int, source: str) -> None:
    model, mesh, chip = components.model, components.mesh, cluster.chip
    sizes = " ".join(f"{axis}={size}" for axis, size in mesh.shape.items())
    logger.info(f"{cluster}: {cluster.num_chips:,} chips, mesh {sizes}")
    logger.info(f"Model: {model.num_params:,} parameters, a vocabulary of {vocab_size:,} ({source})")
    why = "less a reserve"
    if chip.platform == "gpu":
        share = f"{processes.SHARE_VARIABLES[0]}, {processes.GPU_SHARE} unless set"
        why = f"less what XLA does not take ({share}) and a reserve"
    logger.info(f"Memory: a chip has {chip.memory / 1e9:.1f} GB, a step may use {limit / 1e9:.1f} of it ({why})")
    made = state.abstract(model, components.optimizer, mesh)
    rows = [("parameter", "shape", "logical axes", "sharding", "a chip's part", "GB per chip")]
    axes = jax.tree.leaves(model.axes, is_leaf=sharding.is_axes)
    for (path, leaf), names in zip(jax.tree_util.tree_flatten_with_path(made["params"])[0], axes, strict=True):
        part = leaf.sharding.shard_shape(leaf.shape)
        rows.append(
            (
                jax.tree_util.keystr(path, simple=True, separator="/"),
                "x".join(map(str, leaf.shape)),
                " ".join(str(name or "-") for name in names),
                " ".join("+".join(split) if isinstance(split, tuple) else split or "-" for split in leaf.sharding.spec),
                "x".join(map(str, part)),
                f"{math.prod(part) * leaf.dtype.itemsize / 1e9:.4f}",
            )
        )
    logger.info("\nSharding of the parameters (fp32):")
    logger.info(cli.table(rows))
    params, opt = bytes_per_device(made["params"]), bytes_per_device(made["opt"])
    logger.info(f"  parameters {params / 1e9:.3f} GB per chip, optimizer state {opt / 1e9:.3f}")
    if components.distilled is not None:
        logger.info(f"  teacher {bytes_per_device(components.distilled.abstract) / 1e9:.3f} GB per chip")


def _stage(config: Config, cluster: Cluster, components: StepComponents, stages: StagePrograms, shown: Json) -> Json:
    batch_size, seq_len = shown["batch_size"], shown["seq_len"]
    logger.info(f"\nStage {', '.join(shown['names'])}: {batch_size:,} rows of {seq_len:,} tokens per step")
    found: Json = {"attention": None, "attention_reason": None}
    if isinstance(components.model, AttentionModel):
        choice = components.model.attention_choice(batch_size, seq_len)
        blocks = "; queries in blocks of 128, no [T, T] tensor" if choice.name == "xla" else ""
        logger.info(f"  Attention: {choice.name} ({choice.reason}{blocks})")
        found = {"attention": choice.name, "attention_reason": choice.reason}
    try:
        _check_arrays(components, stages.limit)
        program = stages.last_program(batch_size, seq_len)
    except DoesNotFitError as error:
        logger.info(f"  DOES NOT FIT. {error}")
        return found | {"fits": False, "error": str(error)}
    components = components.arranged(program.variant)
    text = program.executable.as_text()
    kernels = sorted(
        name for name in hlo.custom_calls(text) if "tpu_custom_call" in name or "fmha" in name or "triton" in name
    )
    logger.info(f"  Kernels in the program: {', '.join(kernels) or 'none besides XLA'}")
    moved = hlo.collectives(text, components.mesh.size)
    islands = clusters.islands(cluster, list(components.mesh.devices.flat))
    traffic = roofline.traffic(moved, islands)
    found |= _speed(config, cluster, components, program, traffic)
    found["estimate"] = _estimate(cluster, components, program, text, islands)
    found["collectives"] = _collectives(moved, islands, components.mesh.devices.shape)
    needed, held = memory.needed(program.executable), memory.held(program.executable)
    return found | {
        "fits": True,
        "kernels": kernels,
        "remat": roofline.remat(components.model),
        "variant": dataclasses.asdict(program.variant),
        "micro_batches": program.micro_batches,
        "needed_bytes": needed,
        "held_bytes": held,
        "sent_links_bytes": traffic.links,
        "sent_network_bytes": traffic.network,
    }


def _check_arrays(components: StepComponents, limit: int | None) -> None:
    """Raises DoesNotFitError if the arrays alone do not fit. (Gradients are fp32, like the parameters.)"""
    made = state.abstract(components.model, components.optimizer, components.mesh)
    held, gradients = bytes_per_device(made), bytes_per_device(made["params"])
    if limit is not None and held + gradients > limit:
        raise DoesNotFitError(
            f"State and gradients alone take {(held + gradients) / 1e9:.1f} GB of a chip's {limit / 1e9:.1f}; nothing "
            "was compiled."
        )


def _speed(
    config: Config, cluster: Cluster, components: StepComponents, program: Program, traffic: roofline.Traffic
) -> Json:
    shape = roofline.Shape(
        batch_size=program.batch_size,
        seq_len=program.seq_len,
        micro_batches=program.micro_batches,
        mesh=dict(components.mesh.shape),
    )
    flops = components.flops_per_token(shape.seq_len)
    again = roofline.recomputed_flops_per_token(components.model, shape.seq_len)
    chunk = program.variant.chunk_tokens or roofline.loss_chunk(config.loss)
    best = roofline.roofline(cluster.chip, components, shape, chunk, traffic)
    per_chip = shape.tokens / shape.chips / 1e12
    logger.info(
        f"  FLOPs: {flops * per_chip:,.2f} TFLOP per chip and step by the model's formula, plus "
        f"{again * per_chip:,.2f} recomputed (remat={roofline.remat(components.model)})"
    )
    times = ", ".join(f"{name} {1e3 * seconds:,.1f}" for name, seconds in best.seconds.items())
    logger.info(
        f"  Roofline, an upper bound: {best.tokens_per_sec:,.0f} tokens/s ({best.tokens_per_sec / shape.chips:,.0f} "
        f"per chip, MFU {best.mfu:.0%}), bound by {best.bound_by}; ms per step: {times}"
    )
    return {
        "flops_per_token": flops,
        "recomputed_flops_per_token": again,
        "roofline_tokens_per_sec": best.tokens_per_sec,
        "roofline_mfu": best.mfu,
        "roofline_seconds": best.seconds,
        "bound_by": best.bound_by,
    }


def _estimate(cluster: Cluster, components: StepComponents, program: Program, text: str, islands: list[int]) -> Json:
    """Prints and returns the step's estimated time, by part and by source line."""
    chip, chips, tokens = cluster.chip, components.mesh.size, program.batch_size * program.seq_len
    found = step_time.estimate(text, chip, islands, components.model.padded_vocab_size)
    speed = tokens / found.seconds / chips
    mfu = components.flops_per_token(program.seq_len) * speed / chip.flops
    least = 1 - step_time.ERROR
    logger.info(
        f"  Estimate from the compiled program: a step takes {found.seconds:.3f} s, {speed:,.0f} tokens/s per chip, "
        f"MFU {mfu:.1%} (a run may reach {least * mfu:.0%} to {mfu:.0%}: not measured on a chip)"
    )
    if not found.exact:
        logger.info("    Some loops have an unknown trip count and are counted once: the step takes longer.")
    rows = [("part", "ms", "share")]
    for part, seconds in found.parts().items():
        if seconds >= 0.002 * found.seconds:
            rows.append((part, f"{1e3 * seconds:,.1f}", f"{seconds / found.seconds:.1%}"))
    logger.info("  " + cli.table(rows).replace("\n", "\n  "))
    hidden = sum(one.seconds - one.exposed for one in found.communication)
    logger.info(f"  Collectives that kernels hide: {1e3 * hidden:,.1f} ms. The most besides products and attention:")
    rows = [("ms", "GB", "source line")]
    for source, seconds, moved in found.wastes()[:_WASTES]:
        rows.append((f"{1e3 * seconds:,.1f}", f"{moved / 1e9:,.1f}", source or "unknown"))
    logger.info("  " + cli.table(rows).replace("\n", "\n  "))
    return {
        "seconds": found.seconds,
        "mfu": mfu,
        "tokens_per_sec_per_chip": speed,
        "parts": found.parts(),
        "hidden_seconds": hidden,
        "exact": found.exact,
    }


def _collectives(moved: list[hlo.Collective], islands: list[int], mesh_shape: tuple[int, ...]) -> list[Json]:
    """Prints and returns collectives by kind and mesh axes: count per step, and bytes that each chip sends."""
    sums: dict[tuple[str, str], list[float]] = collections.defaultdict(lambda: [0, 0.0, 0.0])
    for one in moved:
        links, network = roofline.sent(one, islands)
        entry = sums[one.kind, axes_of(one, mesh_shape)]
        for index, value in enumerate((1, links, network)):
            entry[index] += value * one.times
    found = [
        {"kind": kind, "axes": axes, "times": int(times), "links_bytes": links, "network_bytes": network}
        for (kind, axes), (times, links, network) in sorted(sums.items(), key=lambda item: -sum(item[1][1:]))
    ]
    logger.info("  Collectives of a step, sent by each chip:" if found else "  No collectives.")
    rows = [("collective", "over", "times", "GB by links", "GB by network")]
    for one in found:
        sizes = (f"{one['links_bytes'] / 1e9:,.4f}", f"{one['network_bytes'] / 1e9:,.4f}")
        rows.append((one["kind"], one["axes"], f"{one['times']:,}", *sizes))
    if found:
        logger.info("  " + cli.table(rows).replace("\n", "\n  "))
    unknown = sum(not one.exact for one in moved)
    if unknown:
        logger.info(f"  {unknown} of them are in loops with an unknown trip count: counted once.")
    return found


def axes_of(one: hlo.Collective, mesh_shape: tuple[int, ...]) -> str:
    """Returns the mesh axes along which a collective's devices differ, such as "fsdp" or "data+fsdp"."""
    if not one.groups:
        return "slices"
    groups = one.groups if one.kind == "collective-permute" else one.groups[:1]
    known = np.asarray([group for group in groups if max(group) < math.prod(mesh_shape)])
    if not known.size:
        return "slices"
    differs = [bool(np.ptp(axis, axis=1).any()) for axis in np.unravel_index(known, mesh_shape)]
    return "+".join(name for name, yes in zip(sharding.MESH_AXES, differs, strict=True) if yes) or "itself"
