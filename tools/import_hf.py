"""`python -m tools.import_hf`: imports a Hugging Face model as a checkpoint that runs can start from."""

import os

from jaxtrain import cli

COMMAND = cli.Command(
    name="python -m tools.import_hf",
    description=(
        "Writes the parameters as a checkpoint and the tokenizer's files next to it, and prints what a config needs "
        "to start from them. (config.init_from also takes a Hugging Face model directly; this makes a copy that needs "
        "no network.)"
    ),
    examples=(
        "python -m tools.import_hf HuggingFaceTB/SmolLM2-135M --output=models/smollm2",
        "python -m tools.import_hf ./my-llama --output=models/mine",
    ),
    flags=(
        cli.Flag(name="model", positional=True, help="a folder, or the id of a model on the Hub"),
        cli.Flag(name="output", help="the folder to write"),
        cli.Flag(
            name="revision",
            type=str | None,
            default=None,
            help="a branch, tag or commit of the Hub; the newest by default",
        ),
    ),
    config="none",
)


def main(flags: cli.Flags) -> None:
    # Importing JAX takes seconds, so validate the command line first.
    from jaxtrain import hf
    from jaxtrain.checkpoint import restore
    from jaxtrain.checkpoint.checkpointer import CheckpointConfig
    from jaxtrain.distributed import sharding
    from jaxtrain.errors import UserError
    from jaxtrain.tokenizers.hf import HuggingFaceTokenizer

    if restore.is_checkpoint(flags.output):
        raise UserError(f"{flags.output} holds a checkpoint already: remove it, or give another --output.")
    config, _ = hf.config(flags.model, flags.revision)
    tokenizer = HuggingFaceTokenizer(name=flags.model, revision=flags.revision).build(flags.output)
    folder = os.path.join(flags.output, "tokenizer")
    tokenizer.save(folder)
    kept = HuggingFaceTokenizer(name=folder)
    mesh = sharding.MeshConfig().build()
    model = config.build(tokenizer.vocab_size, mesh)
    params = hf.load(
        flags.model, model, sharding.tree_shardings(mesh, model.axes), revision=flags.revision, progress=True
    )
    checkpointer = CheckpointConfig().build(os.path.join(flags.output, "checkpoints"))
    try:
        about = {"model": cli.to_json(config), "tokenizer": cli.to_json(kept)}
        checkpointer.save(0, {"params": params}, {"config": about, "tokenizer": tokenizer.identity})
        checkpointer.wait()
    finally:
        checkpointer.close()
    print(f"Wrote {model.num_params:,} parameters to {flags.output}. To start a config from them:")
    print(f"    model={config},\n    tokenizer={kept},\n    init_from={flags.output!r},")


if __name__ == "__main__":
    cli.leave(cli.exit_code(main, COMMAND))
