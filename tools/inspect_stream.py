"""`python -m tools.inspect_stream`: what a config trains on, before it trains, and where a step's rows came from."""

import os
from typing import Any

from jaxtrain import cli
from jaxtrain.cli import paths
from jaxtrain.errors import UserError
from tools import files

COMMAND = cli.Command(
    name="python -m tools.inspect_stream",
    description=(
        "Reads a config's stream as training would and shows whether all is in reach, samples, the realised mix, the "
        "speed, and how long the data path takes for the run: of the first and the last stage, or of those that you "
        "choose. With --at_step it names source, file, row and token range of every row of that step, from the nearest "
        "checkpoint in the work directory or from the beginning. Trains nothing, and may look at a run under way."
    ),
    examples=(
        "python -m tools.inspect_stream --config=configs/quickstart.py",
        "python -m tools.inspect_stream --config=configs/1b.py --samples=10000",
        "python -m tools.inspect_stream --config=configs/quickstart.py --at_step=120 --json=step-120.json",
    ),
    flags=(
        cli.Flag(name="stage", type=int | None, default=None, help="only this stage, from 1"),
        cli.Flag(name="all_stages", type=bool, default=False, help="every stage"),
        cli.Flag(name="transitions", type=bool, default=False, help="the steps around each change of stage"),
        cli.Flag(name="at_step", type=int | None, default=None, help="where each row of this step comes from"),
        cli.Flag(name="samples", type=int, default=1000, help="documents to read of each stage"),
        cli.Flag(
            name="workdir",
            type=str | None,
            default=None,
            help="the run's work directory, for its checkpoints and its tokenizer, which is trained there if it is the "
            "config's own and not yet made; runs/<config file>[-<arg>] by default",
        ),
        cli.Flag(name="json", type=str | None, default=None, help="a file to write the answer to"),
    ),
)


def main(flags: cli.Flags) -> None:
    _check(flags)
    workdir = flags.workdir or paths.default_workdir(flags.config or "")
    paths.keep_caches_in(workdir)
    config = flags.load_config()
    stages = _stages(flags, config)
    # A run may have the machine's accelerator; nothing here needs one.
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    # After the command line is known to be right: these import JAX, which takes seconds.
    from jaxtrain.metrics.monitor import console_logging
    from tools import inspection

    with console_logging():
        if flags.at_step is not None:
            start = inspection.start_before(flags.at_step, workdir)
            found = inspection.connect(config, workdir, start.saved)
            answer = inspection.at_step(found, flags.at_step, start)
        else:
            found = inspection.connect(config, workdir)
            answer = (
                inspection.transitions(found) if flags.transitions else inspection.stages(found, stages, flags.samples)
            )
    if flags.json is not None:
        files.write_json(flags.json, answer)
    print("\nStreaming completed successfully!")


def _check(flags: cli.Flags) -> None:
    asked = [
        name for name in ("stage", "all_stages", "transitions", "at_step") if getattr(flags, name) not in (None, False)
    ]
    if len(asked) > 1:
        raise UserError(f"--{' and --'.join(asked)} ask for different things: give one of them")
    if flags.samples < 1:
        raise UserError(f"--samples={flags.samples}: give the number of documents to read, 1 or more")
    if flags.workdir == "":
        raise UserError("--workdir= is empty: give a directory, or leave it out for runs/<config file>")


def _stages(flags: cli.Flags, config: Any) -> list[int]:
    """The stages to read. Raises UserError for a stage or a step that the run does not have."""
    plan = config.plan()
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
