"""`python -m tools.export_hf`: exports a checkpoint as a model that transformers loads."""

from typing import Literal

from jaxtrain import cli

COMMAND = cli.Command(
    name="python -m tools.export_hf",
    description=(
        "Writes safetensors, config.json, generation_config.json and the tokenizer's files, for AutoModelForCausalLM "
        "and AutoTokenizer. A folder with config.json is complete. After an interruption, repeat the same command."
    ),
    examples=(
        "python -m tools.export_hf --workdir=runs/quickstart --output=exported",
        "python -m tools.export_hf --workdir=runs/1b --step=20000 --dtype=float32 --output=exported",
    ),
    flags=(
        cli.Flag(name="workdir", help="the run's work directory"),
        cli.Flag(name="output", help="the folder to write"),
        cli.Flag(name="step", type=int | None, default=None, help="which checkpoint; the newest by default"),
        cli.Flag(
            name="dtype",
            type=Literal["bfloat16", "float32"],
            default="bfloat16",
            help="dtype of the output",
        ),
        cli.IMPORT,
    ),
    config="none",
)


def main(flags: cli.Flags) -> None:
    # Importing JAX takes seconds, so validate the command line first.
    from jaxtrain import hf
    from jaxtrain.trainer.restored import restore

    found = restore(flags.workdir, flags.step)
    hf.export(
        found.params, found.model, flags.output, flags.dtype, found.tokenizer, add_bos=found.add_bos, progress=True
    )
    print(f"Wrote step {found.step} ({found.model.num_params:,} parameters, {flags.dtype}) to {flags.output}")


if __name__ == "__main__":
    cli.leave(cli.exit_code(main, COMMAND))
