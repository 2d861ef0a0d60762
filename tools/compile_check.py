"""`python -m tools.compile_check`: a config's stages compiled for a TPU slice or a GPU cluster, on any machine."""

from jaxtrain import cli
from jaxtrain.cost import clusters
from tools import files

COMMAND = cli.Command(
    name="python -m tools.compile_check",
    description=(
        "Compiles the train step of every stage for a cluster that need not be there, as a run on it would: the same "
        "program, with the attention that the chips would use. Prints the sharding of the parameters, the memory that "
        "a step takes of a chip, FLOPs and the roofline by the model's own formula, and the collectives with their "
        "bytes. Exit code 1, with advice, where a stage does not fit; 2 for what cannot go together. Needs no network "
        "and no accelerator; for TPUs libtpu (pip install -e '.[tpu-check]'), for GPUs JAX's CUDA plugin ('.[gpu]'). "
        "Chips: v4, v5e, v5p, v6e; a100, a100-40gb, h100, h100-pcie, h200, l40s, rtx4090."
    ),
    examples=(
        "python -m tools.compile_check --config=configs/1b.py --topology=v5e:2x4",
        "python -m tools.compile_check --config=configs/8b.py --topology=v5p:8x8x8 --config.mesh.data=2",
        "python -m tools.compile_check --config=configs/4b.py --topology=h200:8x8",
    ),
    flags=(
        cli.Flag(name="topology", help="KIND:SHAPE: a TPU slice's shape in chips, or hosts x GPUs of each"),
        cli.Flag(name="slices", type=int, default=1, help="so many TPU slices of that shape"),
        cli.Flag(
            name="vocab_size",
            type=int | None,
            default=None,
            help="the tokenizer's ids, where neither the config (tokenizer.vocab_size) nor a file here says them",
        ),
        cli.Flag(name="json", type=str | None, default=None, help="a file to write the answer to"),
    ),
)


def main(flags: cli.Flags) -> int:
    cluster = clusters.parse(flags.topology, "topology", flags.slices)
    clusters.prepare_environment()
    config = flags.load_config()
    # After the command line is known to be right: these import JAX, which takes seconds.
    from jaxtrain.metrics.monitor import console_logging
    from tools import checking

    with console_logging():
        answer = checking.check(config, cluster, flags.vocab_size)
    if flags.json is not None:
        files.write_json(flags.json, answer)
    print(f"\n{flags.config} {'fits' if answer['fits'] else 'DOES NOT FIT'} on {cluster}.")
    return 0 if answer["fits"] else 1


if __name__ == "__main__":
    cli.leave(cli.exit_code(main, COMMAND))
