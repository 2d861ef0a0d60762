"""`python -m tools.cache_teacher`: caches a teacher's predictions for all tokens of a config's documents."""

import os
import signal
from typing import Any

from jaxtrain import cli
from jaxtrain.errors import UserError

COMMAND = cli.Command(
    name="python -m tools.cache_teacher",
    description=(
        "Runs the config's teacher once over each document of its sources and stores the log-probabilities of the k "
        "most likely tokens and the mass of all others: 4 bytes per token and k if the vocabulary has at most 65,536 "
        "tokens, otherwise 5 (k=64: 260 or 324 GB for a billion tokens). They are stored by document, so training "
        "from them (teacher.cache, distillation.divergence=TopK(k=...)) can use any sequence length, packing, mix, "
        "lanes and hosts. Several workers share the documents, each with its own devices; whichever finishes last "
        "completes the cache. A worker that is stopped or killed continues with the documents it was at. A teacher "
        "with another tokenizer than the run reads each document by its own; its predictions are stored by their place "
        "in the text, and serve runs with any tokenizer, at each place where both end a token."
    ),
    examples=(
        "python -m tools.cache_teacher --config=configs/distill.py --max_samples=1000000",
        "launch/local.sh 8 python -m tools.cache_teacher --config=configs/distill.py --max_samples=10000000 "
        "--output=/data/teacher",
        "python -m tools.cache_teacher --config=configs/distill.py --max_samples=1000000 --worker=3/16 "
        "--output=/data/teacher --temperatures=1,2",
        "python -m tools.cache_teacher --config=configs/distill.py --output=/data/teacher --verify",
    ),
    flags=(
        cli.Flag(
            name="output",
            type=str | None,
            default=None,
            help="where the cache goes; teacher.cache, or teacher in the work directory, by default",
        ),
        cli.Flag(
            name="max_samples",
            type=int | None,
            default=None,
            help="cache the first N documents of each source, in place of its max_samples; train with the same "
            "number or less",
        ),
        cli.Flag(name="k", type=int, default=64, help="tokens kept of each distribution"),
        cli.Flag(
            name="temperatures",
            type=str | None,
            default=None,
            help="comma-separated temperatures that training may use; distillation.temperature by default",
        ),
        cli.Flag(
            name="context",
            type=int | None,
            default=None,
            help="the teacher's context in tokens; by default the config's longest rows, limited by the teacher's "
            "own maximum",
        ),
        cli.Flag(
            name="stride",
            type=int | None,
            default=None,
            help="tokens between the windows of a document longer than the context; half the context by default",
        ),
        cli.Flag(
            name="batch_tokens",
            type=int,
            default=16_384,
            help="maximum tokens per device and batch; fewer if memory (or memory_gb) is too small",
        ),
        cli.Flag(
            name="own_tokenizer",
            type=bool,
            default=False,
            help="store by place in the text, for runs with any tokenizer, even if the run's is the teacher's; done "
            "anyway if they differ",
        ),
        cli.WORKER,
        cli.WORKDIR,
        cli.Flag(name="verify", type=bool, default=False, help="only check a finished cache against its checksums"),
    ),
    resumes=True,
)


def main(flags: cli.Flags) -> None:
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    worker = cli.parse_worker(flags.worker)
    workdir = cli.workdir_of(flags)
    if flags.output == "":
        raise UserError("--output= is empty: give a directory, or leave it out")
    for name in ("max_samples", "k", "context", "stride", "batch_tokens"):
        value = getattr(flags, name)
        if value is not None and value < 1:
            raise UserError(f"--{name}={value}: give 1 or more")
    temperatures = _temperatures(flags.temperatures)
    config = flags.load_config()
    if config.teacher is None or not config.teacher.model:
        raise UserError(
            f"--config={flags.config} has no teacher: set --config.teacher.model to a Hugging Face model (a folder, or "
            "an id on the Hub) or a work directory."
        )
    output = flags.output or config.teacher.cache or os.path.join(workdir, "teacher")
    if "://" in output:
        raise UserError(f"--output={output}: give a local path; a cache is written to a local path and read from there")
    # Importing JAX takes seconds, so validate the command line first.
    from jaxtrain.metrics.monitor import console_logging
    from tools.cache_teacher import write

    with console_logging():
        if flags.verify:
            write.verify(config, output)
            return
        if flags.max_samples is not None:
            for source in config.data.sources.values():
                source.max_samples = flags.max_samples
        _check_bound(config)
        settings = write.Settings(
            k=flags.k,
            temperatures=temperatures or (config.distillation.temperature,),
            context=flags.context,
            stride=flags.stride,
            batch_tokens=flags.batch_tokens,
            own_tokenizer=flags.own_tokenizer,
        )
        write.write(config, workdir, output, settings, *worker)


def _temperatures(text: str | None) -> tuple[float, ...]:
    try:
        found = tuple(float(part) for part in text.split(",")) if text is not None else ()
    except ValueError:
        found = (0.0,)
    if any(not 0.01 <= heat <= 1000 for heat in found) or len(set(found)) < len(found):
        raise UserError(f"--temperatures={text}: give distinct numbers from 0.01 to 1000, such as 1,2")
    return found


def _check_bound(config: Any) -> None:
    """Raises UserError for an unbounded source: it may have terabytes, and its cache hundreds of times as many."""
    from jaxtrain.data.sources.text_files import TextFiles

    for name, source in config.data.sources.items():
        if source.max_samples is None and not isinstance(source, TextFiles):
            raise UserError(
                f"--max_samples is needed: nothing bounds source {name!r}, and a teacher's cache is hundreds of times "
                "as large as its text. How to choose: a document of web text has about 1,000 tokens, so with k=64 "
                "100,000 documents take about 26 GB (32 GB with a vocabulary above 65,536), and 10 million take 2.6 "
                "TB; training may read them several times. If that does not fit, remove teacher.cache: the teacher "
                "then runs during training, and nothing is stored."
            )


if __name__ == "__main__":
    cli.leave(cli.exit_code(main, COMMAND))
