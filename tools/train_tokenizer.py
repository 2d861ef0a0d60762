"""`python -m tools.train_tokenizer`: trains a tokenizer on the stream that a config trains on."""

import contextlib
import dataclasses
import os
from typing import Literal

from jaxtrain import cli

COMMAND = cli.Command(
    name="python -m tools.train_tokenizer",
    description=(
        "Trains a tokenizer on the documents that the config trains on, in its mix, without held-out documents. "
        "Writes a folder with tokenizer.model and tokenizer.vocab (sentencepiece), or tokenizer.json, vocab.json and "
        "merges.txt (bpe). Settings without a flag are the config's, if its tokenizer is a TrainTokenizer, or that "
        "class's defaults. A finished folder is never overwritten; an unfinished one is."
    ),
    examples=(
        "python -m tools.train_tokenizer --config=configs/quickstart.py --vocab_size=8000 --output=tokenizers/python",
        "python -m tools.train_tokenizer --config=configs/1b.py --kind=bpe --max_samples=1000000 --output=web-bpe",
        "python -m tools.train_tokenizer --config=configs/1b.py --special_tokens='<|user|>,<|assistant|>'",
    ),
    flags=(
        cli.Flag(
            name="output",
            type=str | None,
            default=None,
            help="the folder to write; tokenizer in the work directory by default",
        ),
        cli.WORKDIR,
        cli.Flag(
            name="kind",
            type=Literal["sentencepiece", "bpe"] | None,
            default=None,
            help="bpe (byte-level) writes tokenizer.json, vocab.json and merges.txt; sentencepiece tokenizer.model and "
            "tokenizer.vocab; by default the config's, or sentencepiece",
        ),
        cli.Flag(name="vocab_size", type=int | None, default=None, help="tokens; the config's, or 32000, by default"),
        cli.Flag(name="max_samples", type=int | None, default=None, help="documents to train on; 1000000 by default"),
        cli.Flag(
            name="model_type",
            type=Literal["unigram", "bpe"] | None,
            default=None,
            help="sentencepiece's model type; unigram by default",
        ),
        cli.Flag(
            name="byte_fallback",
            type=bool | None,
            default=None,
            help="sentencepiece: encode unknown characters as bytes; true by default",
        ),
        cli.Flag(
            name="special_tokens",
            type=tuple[str, ...] | None,
            default=None,
            help="reserved tokens with fixed ids, 3, 4, ... (sentencepiece) or 1, 2, ... (bpe); none by default",
        ),
    ),
)
_FIELDS = ("kind", "vocab_size", "max_samples", "model_type", "byte_fallback", "special_tokens")


def main(flags: cli.Flags) -> None:
    workdir = cli.workdir_of(flags)
    output = flags.output or os.path.join(workdir, "tokenizer")
    config = flags.load_config()
    # A run may be using the accelerator; this tool does not need one.
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    # Importing JAX takes seconds, so validate the config first.
    from jaxtrain.checkpoint.workdir import Workdir
    from jaxtrain.data import pipeline
    from jaxtrain.metrics.monitor import console_logging
    from jaxtrain.tokenizers import training

    chosen = config.tokenizer if isinstance(config.tokenizer, training.TrainTokenizer) else training.TrainTokenizer()
    flagged = {name: getattr(flags, name) for name in _FIELDS}
    chosen = dataclasses.replace(chosen, **{name: value for name, value in flagged.items() if value is not None})
    cli.check(chosen)
    training.check_free(output)
    with console_logging(), contextlib.ExitStack() as held:
        if flags.output is None:
            # Otherwise a run that starts there now would train its own.
            held.enter_context(Workdir(workdir))
        readers = config.data.build(pipeline.resolve(config.data), seed=config.seed)
        for reader in readers:
            held.callback(reader.close)
        training.train(chosen, pipeline.texts(config.data, readers, config.plan(), chosen.max_samples), output)
    other = "bpe" if chosen.kind == "sentencepiece" else "sentencepiece"
    files = {"bpe": "tokenizer.json, vocab.json and merges.txt", "sentencepiece": "tokenizer.model and tokenizer.vocab"}
    print(f"Wrote {files[chosen.kind]} ({chosen.kind}); --kind={other} writes {files[other]}.")


if __name__ == "__main__":
    cli.leave(cli.exit_code(main, COMMAND))
