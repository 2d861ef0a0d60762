"""Every step of a run as a pure function of its number. Shapes: S sources, B rows per batch."""

import dataclasses
from collections.abc import Mapping, Sequence
from fractions import Fraction
from itertools import accumulate
from typing import Any

import numpy as np

from jaxtrain.errors import UserError
from jaxtrain.interfaces import Json, Schedule
from jaxtrain.plan import mixing
from jaxtrain.plan.stages import Stage

CROSS_ENTROPY_ALONE: tuple[Schedule, Schedule] = (lambda tokens, total: 1.0, lambda tokens, total: 0.0)

_COMPARED = ("first_step", "seq_len", "batch_size", "overlap_tokens", "weights", "last_step")


@dataclasses.dataclass(frozen=True, kw_only=True)
class StagePlan:
    """A resolved stage. It has no steps (last_step = first_step - 1) if the run's `steps` ends before it."""

    index: int  # from 1
    name: str
    seq_len: int
    batch_size: int
    overlap_tokens: int
    weights: Mapping[str, Fraction]  # positive weights only, by name in alphabetical order
    first_step: int
    last_step: int | None  # None: the plan sets no end
    first_token: int  # tokens trained before it
    last_token: int | None  # tokens trained at its end
    first_row: int  # rows of all steps before it
    mix: mixing.Mix

    @property
    def stride(self) -> int:
        """Tokens from the start of a row to the start of the next row of the same lane and source."""
        return self.seq_len - self.overlap_tokens

    @property
    def has_steps(self) -> bool:
        """Whether the run takes any step of this stage."""
        return self.last_step is None or self.last_step >= self.first_step

    def batches_before(self, step: int) -> int:
        """The number of the stage's batches before `step`."""
        end = step if self.last_step is None else min(step, self.last_step + 1)
        return max(end - self.first_step, 0)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class StepPlan:
    """Everything about one step except the sources of its rows."""

    step: int  # from 1
    stage: int  # from 1
    stage_name: str
    seq_len: int
    batch_size: int
    overlap_tokens: int
    stride: int
    tokens_before: int
    tokens_after: int
    rows_before: int  # rows of all earlier steps
    learning_rate: float
    ce_weight: float  # weight of the cross-entropy in the loss
    kd_weight: float  # weight of the divergence from a teacher
    masked_from: int  # tokens of the batch, row by row, that are trained on: all of them except in the last step


class Plan:
    """The plan of a whole run, built by `build_plan`.

    Attributes:
        stages: The resolved stages, in order.
        source_names: The names of all sources.
        last_step: The run's last step, or None if only the data ends the run.
        total_tokens: The tokens trained by the end of the run, or None if only the data ends it.
        horizon: The token count that schedules use: the run's token target even if `steps` ends the run earlier, so
            that a resume with more steps continues the same schedule. `total_tokens` if there is no target.
    """

    def __init__(
        self,
        stages: tuple[StagePlan, ...],
        *,
        source_names: tuple[str, ...],
        seed: int,
        horizon: int | None,
        learning_rate: float,
        schedule: Schedule,
        loss_weights: tuple[Schedule, Schedule],
    ):
        self.stages = stages
        self.source_names = source_names
        self.last_step = stages[-1].last_step
        self.total_tokens = stages[-1].last_token
        self.horizon = horizon
        self._seed = seed
        self._peak = learning_rate
        self._schedule = schedule
        self._loss_weights = loss_weights
        # Where the last step's batch is cut.
        self._masked_from = 0 if self.last_step is None else self.at(self.last_step).masked_from

    def at(self, step: int) -> StepPlan:
        """The plan of a step from 1 to last_step, in O(stages) time. Raises UserError past the end."""
        stage = self._stage(step)
        batch_tokens = stage.batch_size * stage.seq_len
        batches = step - stage.first_step
        before = stage.first_token + batches * batch_tokens
        after = before + batch_tokens if self.total_tokens is None else min(before + batch_tokens, self.total_tokens)
        # Midpoint, rounded up: see plan/schedules.py.
        middle = (before + after + 1) // 2
        ce_weight, kd_weight = (weight(middle, self.horizon) for weight in self._loss_weights)
        return StepPlan(
            step=step,
            stage=stage.index,
            stage_name=stage.name,
            seq_len=stage.seq_len,
            batch_size=stage.batch_size,
            overlap_tokens=stage.overlap_tokens,
            stride=stage.stride,
            tokens_before=before,
            tokens_after=after,
            rows_before=stage.first_row + batches * stage.batch_size,
            learning_rate=self._peak * self._schedule(middle, self.horizon),
            ce_weight=ce_weight,
            kd_weight=kd_weight,
            masked_from=after - before,
        )

    def stage_of(self, step: int) -> int:
        """The stage of a step, from 1. Raises UserError past the end."""
        return self._stage(step).index

    def sources_of(self, step: int) -> np.ndarray:
        """The index into source_names of every row of a step: int16 [B], read-only. See plan/mixing.py for the rule.

        In a masked last batch, the rows before and after the cut are divided among sources and permuted separately.
        """
        stage = self._stage(step)
        batches = step - stage.first_step
        if step == self.last_step and self._masked_from < stage.batch_size * stage.seq_len:
            parts = [part for part in stage.mix.cut(batches, self._masked_from // stage.seq_len) if part.any()]
        else:
            parts = [stage.mix.counts_after(batches + 1) - stage.mix.counts_after(batches)]
        rows = [mixing.arrange(self._indices(stage), part.tolist(), self._seed, step) for part in parts]
        sources = np.concatenate(rows)
        sources.flags.writeable = False
        return sources

    def source_tokens_before(self, step: int) -> np.ndarray:
        """Trained tokens of each source in all earlier steps, int64 [S]. `step` may be last_step + 1.

        They sum to the run's tokens before the step: rows × seq_len, minus the tokens that the last batch masks.
        """
        until = step if self.last_step is None else min(step, self.last_step)
        assert step >= 1, f"steps count from 1, this is {step}"
        assert step <= until + 1, f"step {step} is past the end of the run, step {self.last_step}"
        tokens = np.zeros(len(self.source_names), np.int64)
        for stage in self.stages:
            tokens[self._indices(stage)] += stage.mix.counts_after(stage.batches_before(until)) * stage.seq_len
        if step > until:  # the last batch may be masked, and is then divided differently
            last = self.at(until)
            row_starts_B = np.arange(last.batch_size, dtype=np.int64) * last.seq_len
            np.add.at(tokens, self.sources_of(until), np.clip(last.masked_from - row_starts_B, 0, last.seq_len))
        return tokens

    def record(self) -> Json:
        """The part of this plan that `differences` needs, for checkpoints."""
        return {
            "seed": self._seed,
            "total_tokens": self.total_tokens,
            "stages": [
                {
                    "index": stage.index,
                    "name": stage.name,
                    **{field: getattr(stage, field) for field in _COMPARED},
                    "weights": {name: str(weight) for name, weight in stage.weights.items()},
                }
                for stage in self.stages
                if stage.has_steps
            ],
        }

    def differences(self, recorded: Json, step: int) -> list[str]:
        """Compares this plan's steps 1 to `step` with those of an earlier plan.

        Later steps may differ, and so may learning rates, names, and the order of sources. The comparison stops after
        the first stage that differs.

        Args:
            recorded: The `record()` of the earlier plan.
            step: The last step to compare.

        Returns:
            One line per difference; empty if both plans train on the same shapes, sources and tokens up to `step`.
        """
        if self.last_step is not None and self.last_step < step:
            return [f"step {step:,} is trained, but the plan now ends at step {self.last_step:,}"]
        old_stages, new_stages = (
            [stage for stage in record["stages"] if stage["first_step"] <= step] for record in (recorded, self.record())
        )
        for old, new in zip(old_stages, new_stages, strict=False):  # both reach `step` or differ earlier
            lines = [
                f"stage {old['index']} ({old['name']}): {field} was {_shown(old[field])}, is now {_shown(new[field])}"
                for field in _COMPARED
                if _until(old[field], field, step) != _until(new[field], field, step)
            ]
            if lines:
                return lines
        if self._seed != recorded["seed"] and any(len(stage["weights"]) > 1 for stage in old_stages):
            return [f"seed was {recorded['seed']}, is now {self._seed}: it decides the source of every row"]
        now = self.at(step)
        full = now.tokens_before + now.batch_size * now.seq_len
        # Only a plan's last batch can be masked. The earlier plan masked this one if this was its last step.
        was = full if recorded["total_tokens"] is None else min(recorded["total_tokens"], full)
        if was != now.tokens_after:
            return [
                f"step {step:,} ended at {was:,} trained tokens, and now ends at {now.tokens_after:,}: a run's last "
                "batch is masked down to its target. Start from these parameters with init_from instead"
            ]
        return []

    def table(self) -> str:
        """The plan as text, one line per stage, as `--dry_run` prints it."""
        header = ("stage", "steps", "seq_len", "batch", "tokens", "learning rate", "overlap", "weights")
        lines = [header, *(self._table_line(stage) for stage in self.stages)]
        widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
        text = [
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
        ]
        if self.last_step is None or self.total_tokens is None:
            return "\n".join([*text, "The run ends with its data: no total_tokens, no steps."])
        last = self.at(self.last_step)
        end = f"{self.last_step:,} steps, {self.total_tokens:,} tokens"
        full = last.batch_size * last.seq_len
        if last.masked_from < full:
            end += f"; {last.masked_from:,} of the last batch's {full:,} tokens count"
        if self.horizon != self.total_tokens:
            end += f"; the learning rate's schedule is that of {self.horizon:,} tokens"
        return "\n".join([*text, end + "."])

    def _table_line(self, stage: StagePlan) -> tuple[str, ...]:
        tokens = f"{stage.first_token:,} to {'the end' if stage.last_token is None else f'{stage.last_token:,}'}"
        rate = f"{self.at(stage.first_step).learning_rate:.3g}" if stage.has_steps else "-"
        if stage.last_step is None:
            steps = f"{stage.first_step:,} on"
        elif not stage.has_steps:
            steps = "none"
        else:
            steps = f"{stage.first_step:,} to {stage.last_step:,}"
            rate += f" to {self.at(stage.last_step).learning_rate:.3g}"
        return (
            f"{stage.index}/{len(self.stages)} {stage.name}",
            steps,
            f"{stage.seq_len:,}",
            f"{stage.batch_size:,}",
            tokens,
            rate,
            f"{stage.overlap_tokens:,}",
            ", ".join(f"{name} {float(weight):.4g}" for name, weight in stage.weights.items()),
        )

    def _stage(self, step: int) -> StagePlan:
        assert step >= 1, f"steps count from 1, this is {step}"
        for stage in self.stages:
            if stage.last_step is None or step <= stage.last_step:
                return stage
        raise UserError(f"step {step:,} is past the end of the run, step {self.last_step:,}")

    def _indices(self, stage: StagePlan) -> list[int]:
        return [self.source_names.index(name) for name in stage.weights]


def _until(value: Any, field: str, step: int) -> Any:
    """A recorded stage's field as known at `step`: the end of a stage is open until the run reaches it."""
    if field == "last_step":
        return step if value is None else min(value, step)
    return value


def _shown(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {float(Fraction(weight)):.6g}" for name, weight in value.items())
    return "none" if value is None else f"{value:,}"


def build_plan(
    stages: Sequence[Stage],
    *,
    source_names: Sequence[str],
    num_lanes: int,
    seed: int,
    total_tokens: int | None,
    steps: int | None,
    epochs: float | None,
    learning_rate: float,
    schedule: Schedule,
    loss_weights: tuple[Schedule, Schedule] = CROSS_ENTROPY_ALONE,
) -> Plan:
    """Builds the plan of a run.

    A stage ends at the step that reaches its cumulative bound, and its overshoot shortens the next stage. A stage left
    with no tokens is an error. The run ends at exactly its token target (`total_tokens`, or the sum of the stages),
    with its last batch masked, or after `steps`, whichever comes first. With neither, it continues until the data ends,
    provided `epochs` bounds it.

    Args:
        stages: The stages, in order.
        source_names: The names of all sources. `Plan.sources_of` returns indices into them.
        num_lanes: The number of lanes. It must divide every batch size.
        seed: The seed of the permutation of rows within a batch.
        total_tokens: The run's length in tokens, or None.
        steps: The most steps to take, or None.
        epochs: How many times each source is read, or None for no limit. It bounds a run without a token target or
            steps.
        learning_rate: The peak learning rate.
        schedule: (tokens, total tokens) → factor of the peak learning rate.
        loss_weights: The schedules of the cross-entropy's weight and of the distillation divergence's weight.

    Returns:
        The plan.

    Raises:
        UserError: A stage is invalid, alone or with the others (the message has its number), the run has no bound, or
            `schedule` rejects the run.
    """
    if not stages:
        raise UserError("stages=(): a run needs one stage at least, for example (Stage(seq_len=2048, batch_size=64),)")
    resolved = []
    for number, stage in enumerate(stages, 1):
        try:
            stage.check_alone()
            resolved.append((stage.rows(num_lanes), stage.shares(source_names)))
        except UserError as error:
            raise UserError(f"stage {number} ({stage.name}): {error}") from None
    target = _target(stages, total_tokens, steps, epochs)
    planned = _laid_out(stages, resolved, target, steps)
    plan = Plan(
        planned,
        source_names=tuple(source_names),
        seed=seed,
        horizon=planned[-1].last_token if target is None else target,
        learning_rate=learning_rate,
        schedule=schedule,
        loss_weights=loss_weights,
    )
    plan.at(1)  # a schedule that does not fit the run raises now
    return plan


def _laid_out(
    stages: Sequence[Stage], resolved: Sequence[tuple[int, dict[str, Fraction]]], target: int | None, steps: int | None
) -> tuple[StagePlan, ...]:
    """Lays the stages out in order. resolved: (batch size, weights) of each stage; target: the run's token target."""
    bounds = [*accumulate(stage.tokens for stage in stages if stage.tokens is not None), target][: len(stages)]
    _check_reached(stages, [batch_size for batch_size, _ in resolved], bounds)
    planned: list[StagePlan] = []
    step, token, row = 1, 0, 0
    for number, (stage, bound, (batch_size, weights)) in enumerate(zip(stages, bounds, resolved, strict=True), 1):
        batch_tokens = batch_size * stage.seq_len
        # Rounded up; 0 if `steps` ends the run before this stage.
        batches = None if bound is None else max(-((token - bound) // batch_tokens), 0)
        if steps is not None:
            batches = steps + 1 - step if batches is None else min(batches, steps + 1 - step)
        reached = None if batches is None else token + batches * batch_tokens
        if reached is not None and target is not None:
            reached = min(reached, target)
        planned.append(
            StagePlan(
                index=number,
                name=stage.name,
                seq_len=stage.seq_len,
                batch_size=batch_size,
                overlap_tokens=stage.overlap_tokens(),
                weights=weights,
                first_step=step,
                last_step=None if batches is None else step + batches - 1,
                first_token=token,
                last_token=reached,
                first_row=row,
                mix=mixing.Mix(tuple(weights.values()), batch_size),
            )
        )
        if batches is not None and reached is not None:
            step, token, row = step + batches, reached, row + batches * batch_size
    return tuple(planned)


def _check_reached(stages: Sequence[Stage], batch_sizes: Sequence[int], bounds: Sequence[int | None]) -> None:
    """Raises UserError for a stage without a step because the last batch of the previous stage covers it.

    An earlier end of the run through `steps` does not matter: a run with more steps continues the same plan.
    """
    token = start = 0
    for index, (stage, batch_size, end) in enumerate(zip(stages, batch_sizes, bounds, strict=True)):
        if end is None:
            return
        if token >= end:
            before, number, taken = stages[index - 1], index + 1, token - start
            raise UserError(
                f"stage {number} ({stage.name}): its {end - start:,} tokens are never reached: stage {index} "
                f"({before.name}) ends with a whole batch, of {batch_sizes[index - 1]:,} rows of {before.seq_len:,} "
                f"tokens, which takes {taken:,} of what follows; give stage {number} more than {taken:,} tokens, or "
                f"stage {index} smaller batches, or leave one of the two out"
            )
        batch_tokens = batch_size * stage.seq_len
        token, start = token - (token - end) // batch_tokens * batch_tokens, end


def _target(stages: Sequence[Stage], total_tokens: int | None, steps: int | None, epochs: float | None) -> int | None:
    """The run's token target, or None if it has none. Raises UserError if nothing bounds the run."""
    for name, value in (("total_tokens", total_tokens), ("steps", steps)):
        if value is not None and value < 1:
            raise UserError(f"{name}={value}: give 1 or more, or none")
    lengths = [stage.tokens for stage in stages]
    if None in lengths[:-1]:
        number = lengths.index(None) + 1
        raise UserError(
            f"stage {number} ({stages[number - 1].name}): tokens=none, but only the last stage may take the rest of "
            "the run; give its length in tokens"
        )
    planned = sum(length for length in lengths if length is not None)
    number, last = len(stages), stages[-1]
    if last.tokens is not None:
        if total_tokens not in (None, planned):
            raise UserError(
                f"total_tokens={total_tokens:,}, but the stages' tokens sum to {planned:,}: set total_tokens=none, or "
                f"tokens=none in stage {number} ({last.name}), which then takes the rest; steps ends a run early"
            )
        return planned
    if total_tokens is not None and total_tokens <= planned:
        raise UserError(
            f"stage {number} ({last.name}) cannot be reached: total_tokens={total_tokens:,}, and the stages before it "
            f"take {planned:,}; raise total_tokens or shorten them"
        )
    if total_tokens is None and steps is None and epochs is None:
        raise UserError(
            "nothing says where the run ends: set total_tokens (for example 1000000000), steps, tokens of the last "
            "stage, or epochs (how often every source is read: 1 ends it after each source's max_samples)"
        )
    return total_tokens
