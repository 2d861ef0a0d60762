"""Builds a plan from the config's stages and bounds."""

import math
from collections.abc import Sequence
from fractions import Fraction
from itertools import accumulate

from jaxtrain.errors import UserError
from jaxtrain.interfaces import Schedule
from jaxtrain.plan import mixing
from jaxtrain.plan.plan import Plan, StagePlan
from jaxtrain.plan.stages import Stage

CROSS_ENTROPY_ALONE: tuple[Schedule, Schedule] = (lambda tokens, total: 1.0, lambda tokens, total: 0.0)


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
    horizon: int | None = None,
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
        horizon: The total tokens that schedules get if only `epochs` ends the run. Until they are known, those that
            need them give NaN.
        loss_weights: The schedules of the cross-entropy's weight and of the distillation divergence's weight.

    Returns:
        The plan.

    Raises:
        UserError: A stage is invalid, alone or with the others (the message has its number), the run has no bound, or
            `schedule` rejects the run.
    """
    if not stages:
        raise UserError("stages=(): a run needs at least one stage, for example (Stage(seq_len=2048, batch_size=64),)")
    resolved = []
    for number, stage in enumerate(stages, 1):
        try:
            stage.check_alone()
            resolved.append((stage.rows(num_lanes), stage.shares(source_names)))
        except UserError as error:
            raise UserError(f"stage {number} ({stage.name}): {error}") from None
    target = _target(stages, total_tokens, steps, epochs)
    planned = _laid_out(stages, resolved, target, steps)
    if target is None and planned[-1].last_token is None and horizon is None:
        schedule = _without_horizon(schedule)
        loss_weights = (_without_horizon(loss_weights[0]), _without_horizon(loss_weights[1]))
    plan = Plan(
        planned,
        source_names=tuple(source_names),
        seed=seed,
        horizon=target or planned[-1].last_token or horizon,
        learning_rate=learning_rate,
        schedule=schedule,
        loss_weights=loss_weights,
    )
    plan.at(1)  # a schedule that does not fit the run raises now
    return plan


def _without_horizon(schedule: Schedule) -> Schedule:
    """The schedule, or NaN if it needs to know where the run ends."""
    try:
        schedule(0, None)
    except UserError:
        return lambda tokens, total: math.nan
    return schedule


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
                packing=stage.packing,
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
                f"({before.name}) ends with a whole batch of {batch_sizes[index - 1]:,} rows of {before.seq_len:,} "
                f"tokens, which overshoots by {taken:,}; give stage {number} more than {taken:,} tokens, or stage "
                f"{index} smaller batches, or remove one of the two"
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
                f"total_tokens={total_tokens:,}, but the stages' tokens sum to {planned:,}: give "
                f"scale_to={total_tokens} instead, which scales every stage, or set tokens=none in stage {number} "
                f"({last.name}), which then takes the rest; steps ends a run early"
            )
        return planned
    if total_tokens is not None and total_tokens <= planned:
        raise UserError(
            f"stage {number} ({last.name}) cannot be reached: total_tokens={total_tokens:,}, and the stages before it "
            f"take {planned:,}; raise total_tokens or shorten them"
        )
    if total_tokens is None and steps is None and epochs is None:
        raise UserError(
            "nothing bounds the run: set total_tokens (for example 1000000000), steps, tokens of the last stage, or "
            "epochs (how often every source is read: 1 ends it after each source's max_samples)"
        )
    return total_tokens
