"""`python -m tools.compile_check`: compiles a config's stages for a TPU slice or a GPU cluster, on any machine."""

from jaxtrain import cli
from jaxtrain.cost import clusters

COMMAND = cli.Command(
    name="python -m tools.compile_check",
    description=(
        "Compiles the train step of every stage for a cluster that you need not have: the same program, with the same "
        "attention, as a run on it would use. Prints the sharding of the parameters, the memory per chip, FLOPs and "
        "the roofline by the model's own formula, and the collectives with their bytes. Exits with 1 and advice if a "
        "stage does not fit, and with 2 for settings that contradict each other. Needs no network and no accelerator; "
        "for TPUs libtpu (pip install -e '.[tpu-check]'), for GPUs JAX's CUDA plugin ('.[gpu]'). Chips: v4, v5e, v5p, "
        "v6e; a100, a100-40gb, h100, h100-pcie, h200, l40s, rtx4090."
    ),
    examples=(
        "python -m tools.compile_check --config=configs/1b.py --topology=v5e:2x4",
        "python -m tools.compile_check --config=configs/8b.py --topology=v5p:8x8x8 --config.mesh.data=2",
        "python -m tools.compile_check --config=configs/4b.py --topology=h200:8x8",
    ),
    flags=(
        cli.Flag(name="topology", help="KIND:SHAPE: a TPU slice's shape in chips, or hosts x GPUs per host"),
        cli.SLICES,
        cli.VOCAB_SIZE,
        cli.JSON,
    ),
)


def main(flags: cli.Flags) -> int:
    cluster = clusters.parse(flags.topology, "topology", flags.slices)
    clusters.prepare_environment()
    config = flags.load_config()
    # Importing JAX takes seconds, so validate the command line first.
    from jaxtrain.metrics.monitor import console_logging
    from tools.compile_check.check import check

    with console_logging():
        answer = check(config, cluster, flags.vocab_size)
    if flags.json is not None:
        cli.write_json(flags.json, answer)
    print(f"\n{flags.config} {'fits' if answer['fits'] else 'DOES NOT FIT'} on {cluster}.")
    return 0 if answer["fits"] else 1


if __name__ == "__main__":
    cli.leave(cli.exit_code(main, COMMAND))
