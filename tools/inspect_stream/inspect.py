"""The views of `tools.inspect_stream`. Each function prints lines and returns their content as JSON."""

import contextlib
import dataclasses
import itertools
import os
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from tqdm import tqdm

from jaxtrain.checkpoint import restore
from jaxtrain.checkpoint.workdir import Workdir
from jaxtrain.config import Config
from jaxtrain.data import ledger, pipeline
from jaxtrain.data.forgotten import Forgotten
from jaxtrain.data.provenance import Measurement, Origin, StreamInspector
from jaxtrain.data.source_reader import SourceReader
from jaxtrain.data.sources.huggingface import HuggingFace
from jaxtrain.data.threads import Pools
from jaxtrain.data.tokenizing import RowSpec
from jaxtrain.errors import UserError
from jaxtrain.interfaces import Json, Tokenizer
from jaxtrain.plan import Plan, StagePlan, StepPlan
from jaxtrain.trainer import compatibility, open_data

_PREVIEWS = 3
_PREVIEW_CHARACTERS = 160
_LOGGED_STEPS = 100  # minimum steps between two progress lines
_AROUND = 2  # steps on each side of a stage's boundary


@dataclasses.dataclass(frozen=True)
class Inputs:
    """A config's data path, ready for reading."""

    config: Config
    plan: Plan
    readers: list[SourceReader]
    tokenizer: Tokenizer
    rows: RowSpec
    threads: Pools
    workdir: str
    forgotten: Forgotten

    def watch(self, after: int = 0, states: dict[int, np.ndarray] | None = None) -> StreamInspector:
        return StreamInspector(self.readers, self.plan, self.rows, self.threads, after=after, states=states)


def connect(config: Config, workdir: str, saved: Json | None = None) -> Inputs:
    """Opens the data path as a run in this work directory would, in the same modes: token stores, downloads, cache.

    Args:
        config: the run's config.
        workdir: the work directory; a run may be using it.
        saved: a checkpoint's data state, to read the same commits; None to look them up.
    """
    config = compatibility.settled(config, saved)
    plan, data = config.plan(), config.data
    hub = [name for name, source in data.sources.items() if isinstance(source, HuggingFace)]
    print(f"Loading HuggingFace dataset... {', '.join(hub) or '(none: no source is one)'}", flush=True)
    paths = Workdir(workdir)  # without taking its lock
    skipped = open_data.skipped(paths.path, saved)
    cache = data.cache(os.fspath(paths.cache / "data"))
    tokenizer, opened = open_data.open_all(config, paths, saved, cache, fetch=True, is_tool=True)
    forgotten = open_data.forgotten(config, paths.path, saved)
    sources = {name: one.source for name, one in opened.items()}
    readers = data.build(sources, seed=config.seed, skipped=skipped, forgotten=forgotten.documents)
    for reader in readers:
        commit = reader.source.identity.get("revision")
        print(f"  {reader.summary}" + (f", commit {commit}" if commit else ""))
    print("HuggingFace streaming ready", flush=True)
    rows = data.row_spec(tokenizer, config.epochs)
    stored = all(one.mode == "pretokenized" for one in opened.values())
    return Inputs(config, plan, readers, tokenizer, rows, pipeline.pools(data, stored), workdir, forgotten)


def stages(found: Inputs, numbers: Sequence[int], samples: int) -> Json:
    """Shows samples, mix and speed of some stages, numbered from 1, and the data path's time for the whole run."""
    plan, speeds, described = found.plan, {}, []
    for number in numbers:
        stage = plan.stages[number - 1]
        # Read from the beginning of the sources: reaching the position where training will be means reading everything
        # before it. Shapes, mix and speed are still the stage's.
        with found.watch(after=stage.first_step - 1) as stream:
            measured = stream.measure(samples, stage.last_step)
        speeds[number] = measured.tokens_per_second
        described.append(_stage(found, stage, measured))
    seconds = _estimate(plan, speeds)
    if seconds is None:
        print("\nThe run ends when its data ends, so its duration is known only after reading it.")
    else:
        print(
            f"\nTime estimate: the data path alone takes {_duration(seconds)} for the run's {plan.total_tokens:,} "
            "tokens, on one host like this one. Training is slower if the model is."
        )
    return {"stages": described, "total_tokens": plan.total_tokens, "estimate_seconds": seconds}


def _stage(found: Inputs, stage: StagePlan, measured: Measurement) -> Json:
    last = "the end" if stage.last_step is None else f"{stage.last_step:,}"
    print(
        f"\nStage {stage.index}/{len(found.plan.stages)} ({stage.name}): steps {stage.first_step:,} to {last}, "
        f"{stage.batch_size:,} rows x {stage.seq_len:,} tokens, "
        + ("of whole documents" if stage.packing == "fit" else f"which overlap by {stage.overlap_tokens:,} tokens")
    )
    if stage.index > 1:
        print("  (read from the beginning of the sources; training will be further along by then)")
    for number, (origin, text) in enumerate(_previews(found.tokenizer, measured), 1):
        span = origin.spans[0]
        print(f"  Sample {number} ({origin.source}, {span.file} row {span.row:,}): {text!r}")
    mix = {}
    for name, totals in measured.sources.items():
        target = float(stage.weights.get(name, 0))
        if totals["tokens"] or target:
            mix[name] = {"target": target, **totals}
            cut = totals["cut_documents"] / max(totals["documents"], 1)
            padding = totals["padding"] / max(totals["padding"] + totals["tokens"], 1)
            print(
                f"  {name}: {totals['share']:.2%} of the tokens (target {target:.2%}), {totals['tokens']:,} tokens of "
                f"{totals['documents']:,} documents, {cut:.1%} of them cut; {padding:.2%} padding"
            )
    length = measured.tokens / max(measured.documents, 1)
    print(
        f"  Speed{' (including startup: there is only one batch)' if measured.steps == 1 else ''}: "
        f"{measured.documents_per_second:,.0f} documents/s, {measured.tokens_per_second:,.0f} tokens/s; first batch "
        f"after {measured.first_batch_seconds:.2f} s; {length:,.0f} tokens per document",
        flush=True,
    )
    return {
        "stage": stage.index,
        "name": stage.name,
        "seq_len": stage.seq_len,
        "batch_size": stage.batch_size,
        "steps_read": measured.steps,
        "documents": measured.documents,
        "tokens_per_document": length,
        "first_batch_seconds": measured.first_batch_seconds,
        "documents_per_second": measured.documents_per_second,
        "tokens_per_second": measured.tokens_per_second,
        "sources": mix,
    }


def _previews(tokenizer: Tokenizer, measured: Measurement) -> Iterator[tuple[Origin, str]]:
    """Yields rows of the first batch with the text of their first document: one row per source, then others."""
    rows = [row for row, origin in enumerate(measured.origins) if origin.spans]
    rows.sort(key=lambda row: measured.origins[row].spans[0].first > 0)  # rows that begin with a document come first
    first = dict.fromkeys(measured.origins[row].source for row in rows)
    leading = [next(row for row in rows if measured.origins[row].source == name) for name in first]
    others = [row for row in rows if row not in leading]
    for row in [*leading, *others][: max(_PREVIEWS, len(leading))]:
        origin = measured.origins[row]
        span = origin.spans[0]
        text = tokenizer.decode(measured.first.arrays["tokens"][row, : span.end - span.first].tolist())
        yield origin, text[:_PREVIEW_CHARACTERS]


def _estimate(plan: Plan, speeds: dict[int, float]) -> float | None:
    """Returns seconds for all tokens of the run, with each stage at its own speed or the lowest measured one."""
    if plan.total_tokens is None:
        return None
    lowest = min(speeds.values())
    return sum(
        (stage.last_token - stage.first_token) / speeds.get(stage.index, lowest)
        for stage in plan.stages
        if stage.last_token is not None and stage.has_steps
    )


def _duration(seconds: float) -> str:
    for unit, size in (("days", 86_400), ("hours", 3600), ("minutes", 60)):
        if seconds >= size:
            return f"{seconds / size:,.1f} {unit}"
    return f"{seconds:.1f} seconds"


def transitions(found: Inputs) -> Json:
    """Shows the steps around the beginning of each stage, as planned and as read."""
    plan, described = found.plan, []
    starts = [stage for stage in plan.stages if stage.has_steps][1:]
    if not starts:
        print("\nThe run has one stage and no transition.")
    for stage in starts:
        before = next(one for one in reversed(plan.stages[: stage.index - 1]) if one.has_steps)
        print(f"\nStage {before.index} ({before.name}) to stage {stage.index} ({stage.name}):")
        print(f"  mix {_mix(before)} before, {_mix(stage)} after")
        first = max(stage.first_step - _AROUND, 1)
        last = stage.first_step + _AROUND - 1
        if plan.last_step is not None:
            last = min(last, plan.last_step)
        steps = []
        with found.watch(after=first - 1) as stream:
            for step in range(first, last + 1):
                if stream.ended:
                    print("  (read from its beginning, the data ends here)")
                    break
                at, (batch, origins) = plan.at(step), stream.next_with_origins()
                steps.append(_transition_step(at, batch.arrays["tokens"].shape, origins))
        described.append({"from": before.index, "to": stage.index, "steps": steps})
    return {"transitions": described}


def _transition_step(at: StepPlan, shape: tuple[int, ...], origins: Sequence[Origin]) -> Json:
    rows: dict[str, int] = {}
    for origin in origins:
        rows[origin.source] = rows.get(origin.source, 0) + 1
    shown = ", ".join(f"{name} {count:,}" for name, count in sorted(rows.items()))
    print(
        f"  step {at.step:,} (stage {at.stage}): {at.tokens_before:,} to {at.tokens_after:,} tokens, {shape[0]:,} rows "
        f"x {shape[1]:,} tokens, stride {at.stride:,}, learning rate {at.learning_rate:.3g}; rows: {shown}",
        flush=True,
    )
    return {
        "step": at.step,
        "stage": at.stage,
        "tokens_before": at.tokens_before,
        "tokens_after": at.tokens_after,
        "shape": list(shape),
        "stride": at.stride,
        "learning_rate": at.learning_rate,
        "rows": rows,
    }


def _mix(stage: StagePlan) -> str:
    return ", ".join(f"{name} {float(weight):.4g}" for name, weight in stage.weights.items())


@dataclasses.dataclass(frozen=True)
class Start:
    """Where a replay starts. `saved` is the data state of a checkpoint of the same run, if there is one."""

    step: int
    saved: Json | None


def start_before(step: int, workdir: str) -> Start:
    """Finds the nearest checkpoint before a step, else the beginning of the run with a later checkpoint's commits."""
    steps = restore.steps(workdir)
    if not steps:
        return Start(0, None)
    nearest = max((found for found in steps if found < step), default=None)
    saved = restore.load_data(workdir, min(steps) if nearest is None else nearest)
    if nearest is not None and saved["data_ended"]:
        raise UserError(f"step {step:,} is past the end of the run: its data ended with step {nearest:,}")
    return Start(nearest or 0, saved)


def at_step(found: Inputs, step: int, start: Start) -> Json:
    """Shows source, file, row and token range of every row of a step."""
    plan, at = found.plan, found.plan.at(step)
    states: dict[int, np.ndarray] = {}
    if start.saved is not None:
        now = compatibility.identities(found.config, found.readers, found.tokenizer, plan, found.forgotten)
        compatibility.check(start.saved, now, plan, min(start.saved["step"], step))
        if start.step:
            states = ledger.from_json(start.saved["lanes"], plan.source_names, found.config.data.num_lanes)
    where = f"the checkpoint of step {start.step:,} in {found.workdir}" if start.step else "the beginning of the run"
    print(f"Reading from {where}: {step - 1 - start.step:,} steps before step {step:,}.", flush=True)
    with found.watch(after=start.step, states=states) as stream:
        with _progress(step - 1 - start.step) as on_step:
            stream.go_to(step, on_step)
        _, origins = stream.next_with_origins()
    print(
        f"\nStep {step:,}: stage {at.stage}/{len(plan.stages)} ({at.stage_name}), {at.batch_size:,} rows x "
        f"{at.seq_len:,} tokens, {at.tokens_before:,} to {at.tokens_after:,} trained tokens"
    )
    print("[a, b) are tokens of the document, including its end-of-document token.")
    rows = [_row(number, origin, at) for number, origin in enumerate(origins)]
    fields = ("step", "stage", "stage_name", "seq_len", "batch_size", "stride", "fit", "tokens_before", "tokens_after")
    described = {name: getattr(at, name) for name in fields}
    return {**described, "from_checkpoint": start.step or None, "rows": rows}


@contextlib.contextmanager
def _progress(steps: int) -> Iterator[Callable[[], None]]:
    """Yields a function to call after each step. Shows a bar on a terminal, otherwise a line per tenth."""
    done = itertools.count(1)
    # None shows the bar only on a terminal.
    with tqdm(total=steps, desc="Replay", unit=" steps", disable=None) as bar:

        def on_step() -> None:
            bar.update()
            number = next(done)
            if bar.disable and number % max(steps // 10, _LOGGED_STEPS) == 0:
                print(f"  {number:,} of {steps:,} steps", flush=True)

        yield on_step


def _row(number: int, origin: Origin, at: StepPlan) -> Json:
    spans = "; ".join(f"{span.file} row {span.row:,} [{span.first:,}, {span.end:,})" for span in origin.spans)
    notes = ""
    if origin.tokens < at.seq_len:
        notes += f" (then {at.seq_len - origin.tokens:,} of padding{'' if at.fit else ': the data has ended'})"
    if origin.counted < at.seq_len:
        counts = f"only its first {origin.counted:,} tokens count" if origin.counted else "masked"
        notes += f" ({counts}: the run ends here)"
    print(f"row {number} (lane {origin.lane}, {origin.source}): {spans or 'nothing'}{notes}")
    return {
        "row": number,
        "lane": origin.lane,
        "source": origin.source,
        "counted": origin.counted,
        "documents": [dataclasses.asdict(span) for span in origin.spans],
    }
