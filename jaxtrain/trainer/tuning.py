"""Chooses how a step is computed: what the backward pass recomputes, micro-batches, and chunks of the loss.

None of it changes data or meaning: losses differ by rounding. What the config leaves open (`model.remat="auto"`,
`model.scan_layers=None`, `loss.chunk_tokens=None`, `micro_batch_tokens=None`) is chosen for each batch shape of a run:

1. Variants are ordered by arithmetic (variants.py).
2. For the shape with the most work, the first few are compiled as far as their schedule, and ordered by its estimate
   (cost/step_time.py) and the compiler's memory. CPUs, and devices that cost/ does not know, have no such search.
3. The choice is kept in `programs.json` of the work directory and in every checkpoint, with hardware, mesh, versions
   and settings. A run that finds its choice there takes it, so that kills and resumes change nothing.
"""

import dataclasses
import functools
import importlib.metadata
import json
import logging
import math
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from etils import epath

from jaxtrain.checkpoint.workdir import write_atomically
from jaxtrain.cost import clusters, memory, step_time
from jaxtrain.distributed import consensus
from jaxtrain.errors import UserError
from jaxtrain.interfaces import Json
from jaxtrain.plan import Plan
from jaxtrain.plan.plan import StagePlan
from jaxtrain.trainer import variants
from jaxtrain.trainer.programs import Choice, Key
from jaxtrain.trainer.step import Variant
from jaxtrain.trainer.variants import Ranked, Target

# Compiled for the shape with the most work; more only while none of them fits.
_COMPILED, _MOST_COMPILED = 3, 6
# Variants that arithmetic finds so much slower than its best are not compiled.
_SLOWER = 1.25
# Estimates closer than that are equal.
_EQUAL = 1.01
# Unrolled layers are worth minutes of compilation if arithmetic finds them so much faster than scanned ones.
_FASTER_UNROLLED = 0.97
# To compile an unrolled layer: 8 s of CPU for an H200 on two cores, and the autotuning of its products.
_SECONDS_PER_LAYER = 15.0
# Of a machine's memory, on CPUs, where nothing else limits a step.
_CPU_SHARE = 0.5

Measure = Callable[[StagePlan, Variant], Ranked | None]  # None: the compiler could not fit it

logger = logging.getLogger("jaxtrain")


# ---- The choice


def pick(ranked: Sequence[Ranked], limit: float, measure: Callable[[Variant], Ranked | None]) -> Choice:
    """Chooses by what the compiler says of the first few.

    Args:
        ranked: Variants by arithmetic, the fastest first.
        limit: Bytes that a step may use on a device.
        measure: Compiles a variant (expensive). None: the compiler could not fit it.

    Returns:
        The compiled variants that fit, the fastest first, with the reasons.

    Raises:
        jax.errors.JaxRuntimeError: None fits, and one does not compile.
    """
    fits: list[Ranked] = []
    left: list[str] = []
    failure: Exception | None = None
    for index, one in enumerate(ranked):
        if index >= _MOST_COMPILED or (fits and (index >= _COMPILED or one.seconds > _SLOWER * ranked[0].seconds)):
            left.append(
                f"{one.variant} (not compiled; by arithmetic {one.seconds / ranked[0].seconds:.2f} of the best)"
            )
            continue
        try:
            found = measure(one.variant)
        except jax.errors.JaxRuntimeError as error:
            failure = error
            left.append(f"{one.variant} (does not compile: {next(iter(str(error).splitlines()), '')})")
            continue
        if found is None or found.bytes > limit:
            needs = "" if found is None else f": {found.bytes / 1e9:.3g} of {limit / 1e9:.3g} GB"
            left.append(f"{one.variant} (does not fit{needs})")
        else:
            fits.append(found)
    # Of about equal ones the first by arithmetic, which has fewer micro-batches.
    fastest = min((found.seconds for found in fits), default=0.0)
    fits.sort(key=lambda found: found.seconds if found.seconds > _EQUAL * fastest else 0.0)
    if not fits and failure is not None:
        raise failure
    if not fits:
        return Choice(variants=(), why=f"Nothing fits by estimate. Tried: {'; '.join(left) or 'nothing'}.")
    left = [f"{found.variant} ({found.seconds:.3g} s)" for found in fits[1:]] + left
    why = f"{fits[0].variant}: {fits[0].seconds:.3g} s a step by estimate, {fits[0].bytes / 1e9:.3g} GB."
    why += f" Left: {'; '.join(left)}." if left else ""
    return Choice(variants=tuple(found.variant for found in fits), why=why)


def choose(target: Target, plan: Plan, measure: Measure | None, start_step: int = 0) -> dict[tuple[int, int], Choice]:
    """Chooses for each batch shape of a plan.

    Args:
        target: What the choice is for.
        plan: The run's plan.
        measure: Compiles the step of a stage (expensive); None for arithmetic alone.
        start_step: The last step trained.
    """
    stages = {(stage.batch_size, stage.seq_len): stage for stage in plan.stages if stage.has_steps}
    if target.cluster is None or target.limit is None:
        return {shape: _choose_on_cpu(target, stage) for shape, stage in stages.items()}
    longest = max(stages.values(), key=lambda stage: _work(target, plan, stage))
    found = {}
    for shape, stage in stages.items():
        compiled = measure if stage is longest else None
        ranked = variants.rank(target, stage, doubt=variants.DOUBT if compiled else 1.0)
        if compiled is not None and len(ranked) > 1:
            choice = pick(ranked, target.limit, functools.partial(compiled, stage))
        else:
            why = f"{ranked[0].variant}: the fastest by arithmetic." if ranked else "Nothing fits by arithmetic."
            choice = Choice(variants=tuple(one.variant for one in ranked[:_COMPILED]), why=why)
        found[shape] = _with_later(target, plan, stage, ranked, choice, start_step)
    return found


def _work(target: Target, plan: Plan, stage: StagePlan) -> float:
    tokens = math.inf if stage.last_token is None else stage.last_token - stage.first_token
    return tokens * target.components.flops_per_token(stage.seq_len)


def _choose_on_cpu(target: Target, stage: StagePlan) -> Choice:
    """The first that fits, by arithmetic, into a share of the machine's memory: no remat, and few micro-batches."""
    counts, remats = variants.micro_batch_counts(target, stage), variants.open_values(target, "remat", ("none", "full"))
    tried = [Variant(remat=remat, micro_batches=count) for remat in remats for count in counts]
    if target.limit is None:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        most = _CPU_SHARE * memory / math.prod(target.mesh.values())
        fits = (one for one in tried if variants.by_arithmetic(target, stage, one).bytes <= most)
        chosen = next(fits, tried[-1])
    elif variants.is_open(target, "remat"):
        chosen = tried[0]
    else:
        return Choice(variants=(), why="the fewest micro-batches that fit")
    return Choice(variants=(chosen,), why=f"{chosen} (no search on this hardware)")


def _with_later(
    target: Target, plan: Plan, stage: StagePlan, ranked: list[Ranked], choice: Choice, start_step: int
) -> Choice:
    """Adds unrolled layers, which only GPUs gain from: a scan copies what the backward pass keeps."""
    assert target.cluster is not None
    gains = target.cluster.chip.platform == "gpu" and variants.is_open(target, "scan_layers")
    if not gains or not ranked or not choice.variants:
        return choice
    unrolled = variants.rank(target, stage, unrolled=True)
    if not unrolled or unrolled[0].seconds > _FASTER_UNROLLED * ranked[0].seconds:
        return choice
    best = unrolled[0]
    seconds = _SECONDS_PER_LAYER * getattr(target.config.model, "num_layers", 1)
    from_step = start_step + 1 + math.ceil(seconds / best.seconds)
    if stage.last_step is not None and from_step >= stage.last_step:
        return choice
    why = f"{choice.why} From step {from_step:,}, when it is compiled: {best.variant}, by arithmetic "
    why += f"{best.seconds / ranked[0].seconds:.2f} of the time."
    return Choice(variants=choice.variants, later=best.variant, from_step=from_step, why=why)


def report(plan: Plan, choices: Mapping[tuple[int, int], Choice]) -> None:
    """Logs the choices, a line for each batch shape."""
    for (batch_size, seq_len), choice in choices.items():
        names = [stage.name for stage in plan.stages if (stage.batch_size, stage.seq_len) == (batch_size, seq_len)]
        logger.info("Steps of %s: %s", ", ".join(names), choice.why)


def by_compiler(target: Target, compile: Callable[[Key, Variant], Any]) -> Measure:
    """Measures variants by their compiled programs, for `choose`.

    Args:
        target: What the choice is for.
        compile: (key, variant) → executable, or as much of one as `scheduled.Compiler` makes.
    """
    cluster, components = target.cluster, target.components
    assert cluster is not None
    islands = clusters.islands(cluster, list(components.mesh.devices.flat))

    def measure(stage: StagePlan, variant: Variant) -> Ranked | None:
        try:
            program = compile(Key(stage.batch_size, stage.seq_len), variant)
        except jax.errors.JaxRuntimeError as error:
            if memory.is_exhausted(error):
                return None
            raise
        vocab_size = components.model.padded_vocab_size
        found = step_time.estimate(program.as_text(), cluster.chip, islands, vocab_size)
        return Ranked(variant=variant, seconds=found.seconds, bytes=memory.needed(program) or 0)

    return measure


# ---- Kept choices


def resolve(
    target: Target, plan: Plan, path: epath.Path, saved: Sequence[Json], start_step: int, measure: Measure | None
) -> tuple[dict[tuple[int, int], Choice], list[Json]]:
    """The choices of a run: those kept before, or new ones, which are kept from then on. All processes must call it.

    Args:
        target: What the choice is for.
        plan: The run's plan.
        path: The work directory's file of choices.
        saved: The choices in the checkpoint that the run resumes from.
        start_step: That checkpoint's step.
        measure: As in `choose`. Only process 0 calls it.

    Returns:
        The choices by (batch size, sequence length), and all that are kept, for checkpoints.
    """

    def decide() -> list[Json]:
        written = _read(path)
        kept = written + [entry for entry in saved if entry not in written]
        key = key_of(target)
        known = {(entry["batch_size"], entry["seq_len"]) for entry in kept if entry["key"] == key}
        if not known.issuperset((stage.batch_size, stage.seq_len) for stage in plan.stages if stage.has_steps):
            for (batch_size, seq_len), choice in _choose_somehow(target, plan, measure, start_step).items():
                entry = {"key": key, "batch_size": batch_size, "seq_len": seq_len, **dataclasses.asdict(choice)}
                if (batch_size, seq_len) not in known:
                    kept.append(json.loads(json.dumps(entry)))
        if kept != written:
            try:
                write_atomically(path, json.dumps(kept, indent=1) + "\n")
            except OSError as error:
                raise UserError(
                    f"{path} cannot be written: {error}. Give a --workdir that you can write to."
                ) from error
        return kept

    kept = consensus.broadcast_json(consensus.on_process_0(decide, "process 0 could not choose how to compute a step"))
    key = consensus.broadcast_json(key_of(target))
    mine = {(e["batch_size"], e["seq_len"]): _from_json(e) for e in reversed(kept) if e["key"] == key}
    return mine, kept


def _choose_somehow(
    target: Target, plan: Plan, measure: Measure | None, start_step: int
) -> dict[tuple[int, int], Choice]:
    """`choose`, by arithmetic alone if compiling fails."""
    try:
        return choose(target, plan, measure, start_step)
    except (jax.errors.JaxRuntimeError, UserError, OSError) as error:
        if measure is None:
            raise
        logger.warning("Programs are chosen by arithmetic alone, because compiling some failed: %s", error)
        return choose(target, plan, None, start_step)


def key_of(target: Target) -> Json:
    """What a choice depends on, besides the shape of the batch."""
    config: Any = target.config
    device = target.components.mesh.devices.flat[0]
    settings = {name: getattr(config.model, name, None) for name in ("remat", "scan_layers", "attention")}
    settings |= {"chunk_tokens": getattr(config.loss, "chunk_tokens", None), "memory_gb": config.memory_gb}
    settings |= {"micro_batch_tokens": config.micro_batch_tokens, "compiler_options": config.compiler_options}
    versions = {
        "jax": jax.__version__,
        "jaxlib": importlib.metadata.version("jaxlib"),
        "platform": device.client.platform_version,
    }
    return {
        "hardware": device.device_kind,
        # Choices from before there was an `expert` axis stay valid.
        "mesh": {axis: size for axis, size in target.mesh.items() if axis != "expert" or size > 1},
        "versions": versions,
        "parameters": target.components.model.num_params,
        "settings": settings,
    }


def _from_json(entry: Json) -> Choice:
    later = entry["later"]
    return Choice(
        variants=tuple(Variant(**variant) for variant in entry["variants"]),
        later=None if later is None else Variant(**later),
        from_step=entry["from_step"],
        why=entry["why"],
    )


def _read(path: epath.Path) -> list[Json]:
    if not path.exists():
        return []
    try:
        found = json.loads(path.read_text())
        for entry in found:
            _from_json(entry)
            if not {"key", "batch_size", "seq_len"} <= entry.keys():
                raise ValueError("an entry without its key")
        return list(found)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(
            f"{path} is damaged ({type(error).__name__}: {error}): remove it; the newest checkpoint has its content."
        ) from None
