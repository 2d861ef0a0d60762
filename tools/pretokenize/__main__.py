"""`python -m tools.pretokenize`: tokenizes a config's sources into token stores for training."""

import os
import signal
from typing import Any

from jaxtrain import cli
from jaxtrain.errors import UserError

COMMAND = cli.Command(
    name="python -m tools.pretokenize",
    description=(
        "Tokenizes a config's sources into token stores, one folder per source. The stores keep the documents' "
        "identities: training from them (data.mode=pretokenized or auto) sees exactly the batches that it streams, and "
        "a run may switch at any resume. If the work directory has a checkpoint, the dataset commits it names are "
        "read. Several workers share the files, on any machines that see the folder; whichever finishes last completes "
        "the store. A worker that is stopped or killed continues with the file it was at. The folders are also TFDS "
        "datasets."
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
        cli.WORKER,
        cli.WORKDIR,
        cli.Flag(name="all", type=bool, default=False, help="whole Hub datasets, without max_samples"),
        cli.Flag(name="verify", type=bool, default=False, help="only check finished stores against their checksums"),
    ),
    resumes=True,
)


def main(flags: cli.Flags) -> None:
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    worker = cli.parse_worker(flags.worker)
    workdir = cli.workdir_of(flags)
    if flags.output == "":
        raise UserError("--output= is empty: give a directory, or leave it out")
    config = flags.load_config()
    output = flags.output or config.data.token_store or os.path.join(workdir, "tokens")
    if "://" in output:
        raise UserError(f"--output={output}: give a local path; token stores are written to and read from local paths")
    if not (flags.all or flags.verify):
        _check_bound(config)
    # A run may be using the accelerator; this tool does not need one.
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    # Importing JAX takes seconds, so validate the command line first.
    from jaxtrain.metrics.monitor import console_logging
    from tools.pretokenize import write

    with console_logging():
        if flags.verify:
            write.verify(config, output)
        else:
            write.write(config, workdir, output, *worker)


def _check_bound(config: Any) -> None:
    """Raises UserError for an unbounded Hub dataset: it may have terabytes, so reading all of it must be explicit."""
    from jaxtrain.data.sources.huggingface import BUILDERS, HuggingFace

    for name, source in config.data.sources.items():
        if not isinstance(source, HuggingFace) or source.max_samples is not None:
            continue
        if source.name not in BUILDERS or any("://" in pattern for pattern in source.data_files):
            raise UserError(
                f"max_samples MUST be specified for streaming datasets! Nothing bounds source {name!r} ({source.name}) "
                f"here: all of it would be fetched and tokenized. Set --config.data.sources.{name}.max_samples (1,000 "
                "to 10,000 for a quick test, 10M to 100M for a large run; train with the same number or less), or "
                'give --all. See "How to choose max_samples" in docs/data.md.'
            )


if __name__ == "__main__":
    cli.leave(cli.exit_code(main, COMMAND))
