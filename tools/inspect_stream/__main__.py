"""`python -m tools.inspect_stream`: shows what a config will train on, and the origin of a step's rows."""

import os
import pathlib

from jaxtrain import cli
from jaxtrain.errors import UserError
from jaxtrain.plan import Plan

COMMAND = cli.Command(
    name="python -m tools.inspect_stream",
    description=(
        "Reads a config's stream as training would. Checks that every source is reachable and shows samples, the "
        "actual mix, the speed, and the data path's time for the whole run: for the first and last stage, or those "
        "you choose. With --at_step it lists source, file, row and token range of every row of that step, from the "
        "nearest checkpoint in the work directory or from the beginning. With --documents it reads every source and "
        "lists the documents with a text, or with a value in a column, for data.forget. Does not train, and is safe on "
        "a live run."
    ),
    examples=(
        "python -m tools.inspect_stream --config=configs/quickstart.py",
        "python -m tools.inspect_stream --config=configs/1b.py --samples=10000",
        "python -m tools.inspect_stream --config=configs/quickstart.py --at_step=120 --json=step-120.json",
        "python -m tools.inspect_stream --config=configs/1b.py --documents=@urls.txt --by=url --json=forget.json",
    ),
    flags=(
        cli.Flag(name="stage", type=int | None, default=None, help="only this stage, from 1"),
        cli.Flag(name="all_stages", type=bool, default=False, help="every stage"),
        cli.Flag(name="transitions", type=bool, default=False, help="the steps around each stage change"),
        cli.Flag(name="at_step", type=int | None, default=None, help="trace each row of this step to its documents"),
        cli.Flag(
            name="documents",
            type=str | None,
            default=None,
            help="find documents that contain this text, or @FILE with one text a line",
        ),
        cli.Flag(name="by", type=str | None, default=None, help="with --documents: compare this column, not the text"),
        cli.Flag(name="source", type=str | None, default=None, help="with --documents: search this source only"),
        cli.Flag(name="samples", type=int, default=1000, help="documents to read in each stage"),
        cli.WORKDIR,
        cli.JSON,
    ),
)


def main(flags: cli.Flags) -> None:
    asked = [name for name in ("stage", "all_stages", "transitions", "at_step", "documents") if getattr(flags, name)]
    if len(asked) > 1:
        raise UserError(f"--{' and --'.join(asked)} are mutually exclusive: give one of them")
    wanted = _wanted(flags)
    if flags.samples < 1:
        raise UserError(f"--samples={flags.samples}: give the number of documents to read, 1 or more")
    workdir = cli.workdir_of(flags)
    config = flags.load_config()
    stages = _stages(flags, config.plan())
    # A run may be using the accelerator; this tool does not need one.
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    # Importing JAX takes seconds, so validate the command line first.
    from jaxtrain.metrics.monitor import console_logging
    from tools.inspect_stream import find, inspect

    with console_logging():
        if flags.at_step is not None:
            start = inspect.start_before(flags.at_step, workdir)
            answer = inspect.at_step(inspect.connect(config, workdir, start.saved), flags.at_step, start)
        elif wanted:
            answer = find.find(config, workdir, wanted, flags.by, flags.source)
        elif flags.transitions:
            answer = inspect.transitions(inspect.connect(config, workdir))
        else:
            answer = inspect.stages(inspect.connect(config, workdir), stages, flags.samples)
    if flags.json is not None:
        cli.write_json(flags.json, answer)
    print("\nStreaming completed successfully!")


def _wanted(flags: cli.Flags) -> set[str]:
    """The texts or values of --documents; empty without it."""
    if flags.documents is None:
        if flags.by is not None or flags.source is not None:
            raise UserError("--by and --source belong to --documents=...: give what to find")
        return set()
    lines = [flags.documents]
    if flags.documents.startswith("@"):
        path = pathlib.Path(flags.documents[1:]).expanduser()
        try:
            lines = path.read_text("utf-8").splitlines()
        except (OSError, ValueError) as error:
            raise UserError(f"--documents={flags.documents}: {path} cannot be read: {error}") from None
    wanted = {line for line in lines if line.strip()}
    if not wanted:
        raise UserError(f"--documents={flags.documents} is empty: give a text, or @FILE with one a line")
    return wanted


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
