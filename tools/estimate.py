"""`python -m tools.estimate`: memory, disk, time and cost of a plan, without running or compiling it."""

from jaxtrain import cli
from jaxtrain.cost import clusters
from jaxtrain.errors import UserError
from tools import files

COMMAND = cli.Command(
    name="python -m tools.estimate",
    description=(
        "What a config's run will take: memory of a chip, disk for checkpoints and data, and by stage the time, the "
        "chip-hours and their price. Arithmetic from the plan and the model's own formula, in seconds, without a "
        "network; tools.compile_check knows the memory exactly. The time is tokens x FLOPs of a token / (MFU x peak): "
        "--mfu is an assumption. Published: 50% (MaxText, Llama 2 7B on 8 H100), 32% (nanotron, 1B on 8 H100)."
    ),
    examples=(
        "python -m tools.estimate --config=configs/1b.py",
        "python -m tools.estimate --config=configs/4b.py --hardware=v5p:4x4x4 --mfu=0.5",
        "python -m tools.estimate --config=configs/270m_curriculum.py --hardware=rtx4090:1 --price=0.4",
    ),
    flags=(
        cli.Flag(name="hardware", default="h100:8", help="KIND:SHAPE, as for tools.compile_check"),
        cli.Flag(name="slices", type=int, default=1, help="so many TPU slices of that shape"),
        cli.Flag(name="mfu", type=float, default=0.4, help="share of the chips' peak that the model's FLOPs reach"),
        cli.Flag(
            name="price",
            type=float | None,
            default=None,
            help="dollars of one chip for an hour; by default a public list price, on demand, which is shown",
        ),
        cli.Flag(
            name="vocab_size",
            type=int | None,
            default=None,
            help="the tokenizer's ids, where neither the config (tokenizer.vocab_size) nor a file here says them",
        ),
        cli.Flag(name="json", type=str | None, default=None, help="a file to write the numbers to"),
    ),
)


def main(flags: cli.Flags) -> None:
    cluster = clusters.parse(flags.hardware, "hardware", flags.slices)
    if not 0 < flags.mfu <= 1:
        raise UserError(f"--mfu={flags.mfu:g}: a share above 0, at most 1; 0.3 to 0.5 is usual")
    if flags.price is not None and flags.price < 0:
        raise UserError(f"--price={flags.price:g}: dollars of one chip for an hour, 0 or more")
    clusters.prepare_environment()
    config = flags.load_config()
    # After the command line is known to be right: these import JAX, which takes seconds.
    from tools import estimating

    found = estimating.estimate(config, cluster, flags.vocab_size, flags.mfu, flags.price)
    print("\n".join(found.lines))
    if flags.json is not None:
        files.write_json(flags.json, found.numbers)


if __name__ == "__main__":
    cli.leave(cli.exit_code(main, COMMAND))
