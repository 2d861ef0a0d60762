"""`python -m tools.report`: an HTML page about one run, or several side by side."""

import os
import typing

from etils import epath

from jaxtrain import cli
from jaxtrain.errors import UserError

if typing.TYPE_CHECKING:
    from tools.report.reading import RunLog

COMMAND = cli.Command(
    name="python -m tools.report",
    description=(
        "Writes report.html into the work directory: loss and held-out loss, learning rate, gradient norm, "
        "throughput, memory, benchmarks and mix against tokens, with the stages shaded; what each stage took from "
        "each source; where the time went. Curves can be zoomed and smoothed. The page is one file that needs no "
        "network. Several work directories share one report in the first of them, with the differences between their "
        "configs. Safe on a live run."
    ),
    examples=(
        "python -m tools.report runs/quickstart",
        "python -m tools.report runs/baseline runs/muon --output=compared.html",
        "python -m tools.report gs://bucket/runs/1b --output=1b.html",
    ),
    flags=(
        cli.Flag(name="workdir", type=tuple[str, ...], help="work directories of runs, local or URLs", positional=True),
        cli.Flag(
            name="output",
            type=str | None,
            default=None,
            help="the file to write; report.html in the first work directory by default",
        ),
        cli.Flag(
            name="attach",
            type=bool,
            default=False,
            help="also add the page to each run in its trackers (monitor.trackers), next to config.json",
        ),
    ),
    config="none",
)


def main(flags: cli.Flags) -> None:
    if flags.output == "":
        raise UserError("--output= is empty: give a file, or leave it out for report.html in the work directory")
    # Importing JAX takes seconds, so validate the command line first.
    from jaxtrain.checkpoint.workdir import write_atomically
    from tools.report import reading
    from tools.report.page import page

    runs = [reading.read(path) for path in dict.fromkeys(flags.workdir)]
    reading.tell_apart(runs)
    output = epath.Path(flags.output or epath.Path(flags.workdir[0]) / "report.html").expanduser()
    if output.is_dir():
        raise UserError(f"--output={output} is a directory: give a file, for example {output / 'report.html'}")
    try:
        write_atomically(output, page(runs))
    except OSError as error:
        raise UserError(f"{output} cannot be written: {error}. Give another file with --output=FILE.") from error
    for run in runs:
        print(f"{run.name}: step {run.last['step']:,}, {run.last['tokens']:,} tokens, {len(run.stages)} stage(s)")
    print(f"Wrote {os.fspath(output)}")
    for run in runs if flags.attach else ():
        _attach(run, output)


def _attach(run: "RunLog", output: epath.Path) -> None:
    from jaxtrain.checkpoint.workdir import Workdir
    from jaxtrain.metrics.writers import Tracker

    monitor = (run.config or {}).get("monitor", {})
    if not monitor.get("trackers"):
        raise UserError(f"--attach: {run.name} has no trackers (monitor.trackers in its config.json)")
    for name in monitor["trackers"]:
        tracker = Tracker(name, monitor["project"], Workdir(run.path), run.config or {})
        tracker.attach(output)
        tracker.close()
        print(f"Attached to {run.name} in {name}")


if __name__ == "__main__":
    cli.run(main, COMMAND)
