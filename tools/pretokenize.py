"""`python -m tools.pretokenize`: the tokens of a config's sources, in token stores that training reads instead."""

import os
import signal
from typing import Any

from jaxtrain import cli
from jaxtrain.cli import paths
from jaxtrain.errors import UserError
from tools import workers

COMMAND = cli.Command(
    name="python -m tools.pretokenize",
    description=(
        "Tokenizes the sources of a config into token stores, a folder for each source, which keep the documents' "
        "identities: training from them (data.mode=pretokenized or auto) sees the very batches that it streams, and a "
        "run may change over at any resume. Where the work directory has a checkpoint, its commits of the datasets are "
        "read. Several workers share the files out, on any machines that see the folder; whoever is last finishes the "
        "store. Stopped or killed, a worker goes on with the file that it was at. The folders are TFDS datasets too."
    ),
    examples=(
        "python -m tools.pretokenize --config=configs/quickstart.py",
        "python -m tools.pretokenize --config=configs/1b.py --config.data.sources.fineweb_edu.max_samples=1000000",
        "python -m tools.pretokenize --config=configs/1b.py --all --output=/data/tokens --worker=3/16",
        "python -m tools.pretokenize --config=configs/1b.py --output=/data/tokens --verify",
    ),
    flags=(
        cli.Flag(
            name="output",
            type=str | None,
            default=None,
            help="where the stores go; data.token_store, or tokens in the work directory, by default",
        ),
        workers.WORKER,
        workers.WORKDIR,
        cli.Flag(name="all", type=bool, default=False, help="whole datasets of the Hub, without max_samples"),
        cli.Flag(name="verify", type=bool, default=False, help="only compare finished stores with their checksums"),
    ),
    resumes=True,
)


def main(flags: cli.Flags) -> None:
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    worker = workers.parse(flags.worker)
    if "" in (flags.workdir, flags.output):
        raise UserError("--workdir= and --output= may not be empty: give a directory, or leave them out")
    workdir = flags.workdir or paths.default_workdir(flags.config or "")
    paths.keep_caches_in(workdir)
    config = flags.load_config()
    output = flags.output or config.data.token_store or os.path.join(workdir, "tokens")
    if "://" in output:
        raise UserError(f"--output={output}: token stores are written to local paths, since they are read from those")
    if not (flags.all or flags.verify):
        _check_bound(config)
    # A run may have the machine's accelerator; nothing here needs one.
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    # After the command line is known to be right: these import JAX, which takes seconds.
    from jaxtrain.metrics.monitor import console_logging
    from tools import pretokenizing

    with console_logging():
        if flags.verify:
            pretokenizing.verify(config, output)
        else:
            pretokenizing.write(config, workdir, output, *worker)


def _check_bound(config: Any) -> None:
    """A dataset of the Hub may have terabytes: somebody has to say that all of it is meant."""
    from jaxtrain.data.sources.huggingface import BUILDERS, HuggingFace

    for name, source in config.data.sources.items():
        if not isinstance(source, HuggingFace) or source.max_samples is not None:
            continue
        if source.name not in BUILDERS or any("://" in pattern for pattern in source.data_files):
            raise UserError(
                f"max_samples MUST be specified for streaming datasets! Nothing bounds source {name!r} ({source.name}) "
                f"here: all of it would be fetched and tokenized. Set --config.data.sources.{name}.max_samples (1,000 "
                "to 10,000 for a quick test, 10M to 100M for a large run; it is part of what a run reads, so train "
                'with the same or less), or give --all. See "How to choose max_samples" in docs/data.md.'
            )


if __name__ == "__main__":
    cli.leave(cli.exit_code(main, COMMAND))
