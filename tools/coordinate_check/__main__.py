"""`python -m tools.coordinate_check`: whether updates move activations by the same amount at any width."""

from typing import Literal

from jaxtrain import cli
from jaxtrain.errors import UserError

COMMAND = cli.Command(
    name="python -m tools.coordinate_check",
    description=(
        "Trains a decoder of two layers for a few steps at several widths, on a fixed batch of Python's standard "
        "library, and prints how far activations have moved from where they began: root mean squares of the hidden "
        "states after each layer and of the logits. With width_transfer=mup no width may move them more than "
        "--tolerance times as far as another: Tensor Programs V, arXiv 2203.03466, appendix D.1. (Sizes at the start "
        "say less: norms fix those of hidden states, and those of logits shrink with the width by design.) Exits with "
        "1 if one does. All four heads grow with the width. Takes about a minute of CPU; Muon at 1,024 several."
    ),
    examples=(
        "python -m tools.coordinate_check",
        "python -m tools.coordinate_check --optimizer=Muon --widths=64,128,256",
        "python -m tools.coordinate_check --width_transfer=none",
    ),
    flags=(
        cli.Flag(name="optimizer", default="AdamW", help="class of jaxtrain/optim, by name"),
        cli.Flag(name="learning_rate", type=float | None, default=None, help="3e-3; 3e-4 for Lion and Signum"),
        cli.Flag(name="width_transfer", type=Literal["mup", "none"], default="mup", help="as model.width_transfer"),
        cli.Flag(name="widths", type=tuple[int, ...], default=(64, 128, 256, 512, 1024), help="the first is the base"),
        cli.Flag(name="steps", type=int, default=10, help="updates, with the same batch"),
        cli.Flag(name="tolerance", type=float, default=1.5, help="largest ratio between two widths"),
    ),
    config="none",
)


def main(flags: cli.Flags) -> int:
    if len(flags.widths) < 2 or any(width < 8 or width % 8 for width in flags.widths):
        raise UserError(f"--widths={','.join(map(str, flags.widths))}: give two or more multiples of 8, as 64,128,256")
    if flags.steps < 1:
        raise UserError(f"--steps={flags.steps}: give 1 or more")
    # Importing JAX takes seconds, so validate the command line first.
    from tools.coordinate_check import widths

    optimizer = widths.optimizer(flags.optimizer, flags.learning_rate)
    moves = {}
    for width in flags.widths:
        config = widths.model(width, flags.widths[0], flags.width_transfer)
        moves[width] = widths.moves(config, optimizer, flags.steps)
    worst = widths.worst(moves)
    print("\n".join(widths.table(moves, worst)))
    flat = max(worst.values()) <= flags.tolerance
    print(f"\nThe widths differ by up to {max(worst.values()):.2f}: {'flat' if flat else 'NOT FLAT'}.")
    return 0 if flat else 1


if __name__ == "__main__":
    cli.leave(cli.exit_code(main, COMMAND))
