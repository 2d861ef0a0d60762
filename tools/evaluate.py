"""`python -m tools.evaluate`: measures a checkpoint's loss on held-out documents."""

import dataclasses
import tempfile
from typing import Any

from jaxtrain import cli
from jaxtrain.errors import UserError
from jaxtrain.interfaces import Json

COMMAND = cli.Command(
    name="python -m tools.evaluate",
    description=(
        "Computes loss, perplexity and bits per byte on the documents that data.holdout keeps out of training: the "
        "run's own evaluation set, or another one set by --config.eval. The config comes from the checkpoint; give "
        "--config=FILE if it needs credentials, which are not recorded. Does not train, and is safe on a live run."
    ),
    examples=(
        "python -m tools.evaluate --workdir=runs/1b",
        "python -m tools.evaluate --workdir=runs/1b --config.eval.tokens=10000000 --config.eval.seq_len=4096",
        "python -m tools.evaluate --workdir=runs/270m_curriculum --by_source --json=held-out.json",
    ),
    flags=(
        cli.Flag(name="workdir", help="the run's work directory"),
        cli.Flag(name="step", type=int | None, default=None, help="which checkpoint; the newest by default"),
        cli.Flag(name="by_source", type=bool, default=False, help="also evaluate each source separately"),
        cli.JSON,
        cli.IMPORT,
    ),
    config="optional",
)


def main(flags: cli.Flags) -> None:
    # Importing JAX takes seconds, so validate the command line first.
    from jaxtrain.checkpoint import restore
    from jaxtrain.trainer import restored

    saved = restore.load_data(flags.workdir, flags.step)
    if flags.config is None:
        config = cli.override(cli.from_json(saved["config"]), flags.overrides)
        cli.check(config)
    else:
        config = flags.load_config()
    held_out = saved["config"]["data"]["holdout"]
    if config.data.holdout != held_out or not held_out:
        raise UserError(
            f"data.holdout={config.data.holdout}, and the run kept {held_out} of its documents out of training: only "
            "those are unseen text. " + ("Set it back." if held_out else "Train with data.holdout=0.01.")
        )
    found = restored.restore(flags.workdir, flags.step)
    mixes = {"all": config.eval}
    if flags.by_source:
        mixes |= {name: dataclasses.replace(config.eval, weights={name: 1.0}) for name in sorted(config.data.sources)}
    numbers = {"step": found.step, "loss": _measure(config, saved, found, mixes, flags.workdir)}
    if flags.json is not None:
        cli.write_json(flags.json, numbers)


def _measure(config: Any, saved: Json, found: Any, mixes: dict[str, Any], workdir: str) -> Json:
    """Measures each mix and prints its numbers. Returns them by name."""
    from jaxtrain.cost import memory
    from jaxtrain.data import pipeline
    from jaxtrain.metrics.monitor import perplexity
    from jaxtrain.trainer import open_data
    from jaxtrain.trainer.evaluate import Evaluator
    from jaxtrain.trainer.programs import StagePrograms
    from jaxtrain.trainer.step import StepComponents

    plan, mesh, vocab_size = config.plan(), found.model.mesh, found.tokenizer.vocab_size
    optimizer = config.optimizer.build(found.model.axes, mesh)
    components = StepComponents(found.model, config.loss.build(vocab_size, mesh), optimizer, mesh, config.clip_norm)
    limit = memory.limit(mesh, config.memory_gb)
    sources = open_data.resolve(config, saved)
    threads, numbers = pipeline.pools(config.data), {}
    with tempfile.TemporaryDirectory(prefix="jaxtrain-evaluate-") as scratch:
        for name, mix in mixes.items():
            mixed = mix.plan(plan, config.data.num_lanes)
            programs = StagePrograms(components, None, config.micro_batch_tokens, limit, evaluation=mixed.stages[0])
            evaluator = Evaluator(
                mixed,
                config.data,
                sources,
                found.tokenizer,
                mesh,
                threads,
                config.seed,
                open_data.skipped(workdir, saved),
                scratch,
                lambda programs=programs: programs.evaluation().executable,
            )
            values = evaluator.run(found.params)
            numbers[name] = {**values, "eval_perplexity": perplexity(values["eval_loss"])}
            print(
                f"Step {found.step:,}, {name}: loss {values['eval_loss']:.4f}, perplexity "
                f"{numbers[name]['eval_perplexity']:.2f}, {values['eval_bits_per_byte']:.4f} bits per byte "
                f"({values['eval_tokens']:,.0f} held-out tokens)",
                flush=True,
            )
    return numbers


if __name__ == "__main__":
    cli.leave(cli.exit_code(main, COMMAND))
