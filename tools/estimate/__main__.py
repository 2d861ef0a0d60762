"""`python -m tools.estimate`: estimates memory, disk, time and cost of a run, without compiling or running it."""

from jaxtrain import cli
from jaxtrain.cost import clusters
from jaxtrain.errors import UserError

COMMAND = cli.Command(
    name="python -m tools.estimate",
    description=(
        "Estimates the cost of a config's run: memory per chip, disk for checkpoints and data, and for each stage "
        "time, chip-hours and price. It computes them from the plan and the model's own formula, takes seconds and "
        "needs no network. tools.compile_check gives the exact memory. Time is tokens x FLOPs per token / (MFU x "
        "peak): --mfu is an assumption. Published: 50% (MaxText, Llama 2 7B on 8 H100), 32% (nanotron, 1B on 8 H100)."
    ),
    examples=(
        "python -m tools.estimate --config=configs/1b.py",
        "python -m tools.estimate --config=configs/4b.py --hardware=v5p:4x4x4 --mfu=0.5",
        "python -m tools.estimate --config=configs/270m_curriculum.py --hardware=rtx4090:1 --price=0.4",
    ),
    flags=(
        cli.Flag(name="hardware", default="h100:8", help="KIND:SHAPE, as for tools.compile_check"),
        cli.SLICES,
        cli.Flag(name="mfu", type=float, default=0.4, help="share of the chips' peak that the model's FLOPs reach"),
        cli.Flag(
            name="price",
            type=float | None,
            default=None,
            help="dollars per chip-hour; by default a public on-demand list price, which is shown",
        ),
        cli.VOCAB_SIZE,
        cli.JSON,
    ),
)


def main(flags: cli.Flags) -> None:
    cluster = clusters.parse(flags.hardware, "hardware", flags.slices)
    if not 0 < flags.mfu <= 1:
        raise UserError(f"--mfu={flags.mfu:g}: give a share above 0, at most 1; 0.3 to 0.5 is usual")
    if flags.price is not None and flags.price < 0:
        raise UserError(f"--price={flags.price:g}: give 0 or more, in dollars per chip-hour")
    clusters.prepare_environment()
    config = flags.load_config()
    # Importing JAX takes seconds, so validate the command line first.
    from tools.estimate.estimate import estimate

    found = estimate(config, cluster, flags.vocab_size, flags.mfu, flags.price)
    print("\n".join(found.lines))
    if flags.json is not None:
        cli.write_json(flags.json, found.numbers)


if __name__ == "__main__":
    cli.leave(cli.exit_code(main, COMMAND))
