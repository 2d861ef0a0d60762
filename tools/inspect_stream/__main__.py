"""`python -m tools.inspect_stream`: shows what a config will train on, and the origin of a step's rows."""

import os

from jaxtrain import cli
from jaxtrain.errors import UserError
from jaxtrain.plan import Plan

COMMAND = cli.Command(
    name="python -m tools.inspect_stream",
    description=(
        "Reads a config's stream as training would. Checks that every source is reachable and shows samples, the "
        "actual mix, the speed, and the data path's time for the whole run: for the first and last stage, or those "
        "you choose. With --at_step it lists source, file, row and token range of every row of that step, from the "
        "nearest checkpoint in the work directory or from the beginning. Does not train, and is safe on a live run."
    ),
    examples=(
        "python -m tools.inspect_stream --config=configs/quickstart.py",
        "python -m tools.inspect_stream --config=configs/1b.py --samples=10000",
        "python -m tools.inspect_stream --config=configs/quickstart.py --at_step=120 --json=step-120.json",
    ),
    flags=(
        cli.Flag(name="stage", type=int | None, default=None, help="only this stage, from 1"),
        cli.Flag(name="all_stages", type=bool, default=False, help="every stage"),
        cli.Flag(name="transitions", type=bool, default=False, help="the steps around each stage change"),
        cli.Flag(name="at_step", type=int | None, default=None, help="trace each row of this step to its documents"),
        cli.Flag(name="samples", type=int, default=1000, help="documents to read in each stage"),
        cli.WORKDIR,
        cli.JSON,
    ),
)


def main(flags: cli.Flags) -> None:
    asked = [name for name in ("stage", "all_stages", "transitions", "at_step") if getattr(flags, name)]
    if len(asked) > 1:
        raise UserError(f"--{' and --'.join(asked)} are mutually exclusive: give one of them")
    if flags.samples < 1:
        raise UserError(f"--samples={flags.samples}: give the number of documents to read, 1 or more")
    workdir = cli.workdir_of(flags)
    config = flags.load_config()
    stages = _stages(flags, config.plan())
    # A run may be using the accelerator; this tool does not need one.
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    # Importing JAX takes seconds, so validate the command line first.
    from jaxtrain.metrics.monitor import console_logging
    from tools.inspect_stream import inspect

    with console_logging():
        if flags.at_step is not None:
            start = inspect.start_before(flags.at_step, workdir)
            answer = inspect.at_step(inspect.connect(config, workdir, start.saved), flags.at_step, start)
        elif flags.transitions:
            answer = inspect.transitions(inspect.connect(config, workdir))
        else:
            answer = inspect.stages(inspect.connect(config, workdir), stages, flags.samples)
    if flags.json is not None:
        cli.write_json(flags.json, answer)
    print("\nStreaming completed successfully!")


def _stages(flags: cli.Flags, plan: Plan) -> list[int]:
    """Returns the stages to read, from 1. Raises UserError for a stage or step that the run does not have."""
    if flags.at_step is not None:
        if flags.at_step < 1:
            raise UserError(f"--at_step={flags.at_step}: steps count from 1")
        plan.at(flags.at_step)
    numbers = [stage.index for stage in plan.stages if stage.has_steps]
    if flags.stage is not None:
        if flags.stage not in numbers:
            raise UserError(
                f"--stage={flags.stage}: the run has no such stage with steps; give {' or '.join(map(str, numbers))}"
            )
        return [flags.stage]
    return numbers if flags.all_stages else sorted({numbers[0], numbers[-1]})


if __name__ == "__main__":
    cli.leave(cli.exit_code(main, COMMAND))
