"""Every step of a run as a pure function of its number. Shapes: S sources, B rows per batch."""

import dataclasses
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

import numpy as np

from jaxtrain.errors import UserError
from jaxtrain.interfaces import Json, Schedule
from jaxtrain.plan import mixing

_COMPARED = ("first_step", "seq_len", "batch_size", "overlap_tokens", "packing", "weights", "last_step")


@dataclasses.dataclass(frozen=True, kw_only=True)
class StagePlan:
    """A resolved stage. It has no steps (last_step = first_step - 1) if the run's `steps` ends before it."""

    index: int  # from 1
    name: str
    seq_len: int
    batch_size: int
    overlap_tokens: int
    packing: str  # "concat" or "fit"
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
    fit: bool  # whether documents are packed by best fit
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
            that a resume with more steps continues the same schedule. `total_tokens` if there is no target; an
            estimate, or None, if only the data ends the run.
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
            fit=stage.packing == "fit",
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
            **({"horizon": self.horizon} if self.total_tokens is None and self.horizon is not None else {}),
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
            # Records of version 0.1 have no packing.
            [{"packing": "concat", **stage} for stage in record["stages"] if stage["first_step"] <= step]
            for record in (recorded, self.record())
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
        header = ("stage", "steps", "seq_len", "batch", "tokens", "learning rate", "packing", "overlap", "weights")
        lines = [header, *(self._table_line(stage) for stage in self.stages)]
        widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
        text = [
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
        ]
        if self.last_step is None or self.total_tokens is None:
            about = "" if self.horizon is None else f" Schedules assume about {self.horizon:,} tokens."
            return "\n".join([*text, f"The run ends with its data: no total_tokens, no steps.{about}"])
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
            stage.packing,
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
    return "none" if value is None else value if isinstance(value, str) else f"{value:,}"
