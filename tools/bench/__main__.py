"""`python -m tools.bench BENCHMARK [flags]`: reproducible measurements; the last line is a JSON object."""

import difflib
import importlib
import json
import sys
from collections.abc import Sequence

from jaxtrain import cli
from jaxtrain.errors import UserError

BENCHMARKS = {
    "data": "the data path on one core: tokens/s, and the share that is neither reading nor tokenizing",
    "latency": "how much of a slow network the data path hides by reading ahead",
    "step": "a train step, against the same model in torch where that is installed",
    "stages": "what a stage change costs in a run: steps and waits around it, and programs compiled at a restart",
    "curriculum": "tokens/s of the step and of its data by stage of the ten-stage curriculum, and what bounds each",
    "loss": "memory and time of the chunked cross-entropy, against the plain one",
    "width": "the best learning rate by width, with and without width transfer",
    "resume": "the cost of resuming at a depth of a parquet stream: requests, bytes, seconds",
    "checkpoint": "how long a save blocks and runs in the background, and how long a restore takes, by size",
    "simulate": "how evenly 16,384 lanes and 100,000 files spread over 1 to 4,096 hosts, without any I/O",
    "gpu": "everything that needs a GPU, within minutes",
}
COMMAND = cli.Command(
    name="python -m tools.bench",
    description="Benchmarks: " + "; ".join(f"{name}: {about}" for name, about in BENCHMARKS.items()) + ".",
    examples=("python -m tools.bench data", "python -m tools.bench step --rounds=9", "python -m tools.bench gpu"),
    flags=(cli.Flag(name="benchmark", help="one of the above; each has its own --help", positional=True),),
    config="none",
)


def main(argv: Sequence[str]) -> None:
    """Runs one benchmark and exits with 0, or with 2 for an invalid command line."""
    if not argv or argv[0].startswith("-"):
        cli.run(lambda _: None, COMMAND, argv)
    if argv[0] not in BENCHMARKS:
        cli.run(_unknown, COMMAND, argv[:1])
    # Imported here: JAX takes seconds, and the data benchmarks do not need it.
    module = importlib.import_module(f"tools.bench.{argv[0]}")

    def measure(flags: cli.Flags) -> None:
        print(json.dumps(module.measure(flags), allow_nan=False), flush=True)

    cli.run(measure, module.COMMAND, argv[1:])


def _unknown(flags: cli.Flags) -> None:
    near = difflib.get_close_matches(flags.benchmark, BENCHMARKS) or list(BENCHMARKS)
    raise UserError(f"there is no benchmark {flags.benchmark!r}; did you mean {' or '.join(near)}?")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except SystemExit as stop:
        cli.leave(int(stop.code or 0))
