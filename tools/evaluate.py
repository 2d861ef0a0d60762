"""`python -m tools.evaluate`: measures a checkpoint's loss on held-out documents."""

import dataclasses
import tempfile
from typing import Any

from jaxtrain import cli
from jaxtrain.errors import UserError
from jaxtrain.interfaces import Json
from jaxtrain.plan import Plan

_ROWS = 64  # of a batch of questions, at most; memory decides how many are taken at once

COMMAND = cli.Command(
    name="python -m tools.evaluate",
    description=(
        "Computes loss, perplexity and bits per byte on the documents that data.holdout keeps out of training: the "
        "run's own evaluation set, or another one set by --config.eval. The config comes from the checkpoint; give "
        "--config=FILE if it needs credentials, which are not recorded. With --tasks, benchmarks of multiple choice "
        "instead, also of a model in Hugging Face's format. Does not train, and is safe on a live run."
    ),
    examples=(
        "python -m tools.evaluate --workdir=runs/1b",
        "python -m tools.evaluate --workdir=runs/1b --config.eval.tokens=10000000 --config.eval.seq_len=4096",
        "python -m tools.evaluate --workdir=runs/270m_curriculum --by_source --json=held-out.json",
        "python -m tools.evaluate --workdir=runs/1b --tasks=hellaswag,arc_easy,piqa",
        "python -m tools.evaluate --workdir=exported --tasks=lambada_openai --task_limit=500",
    ),
    flags=(
        cli.Flag(name="workdir", help="the run's work directory; with --tasks also a Hugging Face folder or id"),
        cli.Flag(name="step", type=int | None, default=None, help="which checkpoint; the newest by default"),
        cli.Flag(name="by_source", type=bool, default=False, help="also evaluate each source separately"),
        cli.Flag(
            name="tasks",
            type=tuple[str, ...],
            default=(),
            help="benchmarks, by comma: hellaswag, arc_easy, arc_challenge, piqa, winogrande, openbookqa, boolq, sciq, "
            "lambada_openai, lambada_standard, or FILE.py:NAME",
        ),
        cli.Flag(
            name="task_limit", type=int | None, default=None, help="the first N questions of each task; all by default"
        ),
        cli.JSON,
        cli.IMPORT,
    ),
    config="optional",
)


def main(flags: cli.Flags) -> None:
    # Importing JAX takes seconds, so validate the command line first.
    from jaxtrain.checkpoint import restore
    from jaxtrain.trainer import restored

    if flags.tasks:
        numbers = _ask(flags)
        if flags.json is not None:
            cli.write_json(flags.json, numbers)
        return
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
    plans = {"": config.eval.plan(config.plan(), config.data.num_lanes)}
    if flags.by_source:
        evaluation = dataclasses.replace(config.eval, source_tokens=config.eval.source_tokens or None)
        plans = evaluation.plans(config.plan(), config.data.num_lanes)
    numbers = {"step": found.step, "loss": _measure(config, saved, found, plans, flags.workdir)}
    if flags.json is not None:
        cli.write_json(flags.json, numbers)


def _ask(flags: cli.Flags) -> Json:
    """Asks the tasks' questions, and prints the results. Returns them by task."""
    from jaxtrain.checkpoint import restore
    from jaxtrain.checkpoint.workdir import Workdir
    from jaxtrain.cost import memory
    from jaxtrain.data import benchmarks
    from jaxtrain.losses.cross_entropy import CrossEntropy
    from jaxtrain.optim.adamw import AdamW
    from jaxtrain.trainer import restored
    from jaxtrain.trainer.programs import StagePrograms
    from jaxtrain.trainer.step import StepComponents
    from jaxtrain.trainer.tasks import TaskEvaluator

    for name in flags.tasks:
        benchmarks.find(name)
    is_run = restore.is_checkpoint(flags.workdir)
    found = restored.restore(flags.workdir, flags.step) if is_run else restored.from_hf(flags.workdir)
    mesh, model = found.model.mesh, found.model
    assert mesh is not None
    optimizer = AdamW().build(model.axes, mesh)  # it only completes the components
    components = StepComponents(model, CrossEntropy().build(model.vocab_size, mesh), optimizer, mesh, None)
    programs = StagePrograms(components, None, None, memory.limit(mesh, None))
    evaluator = TaskEvaluator(
        flags.tasks,
        flags.task_limit,
        Workdir(flags.workdir).tasks if is_run else None,
        found.tokenizer,
        found.add_bos,
        components,
        _ROWS,
        lambda documents: programs.tasks(documents).executable,
    )
    programs.add_tasks(*evaluator.shape)
    numbers = evaluator.run(found.params)["eval_tasks"]
    where = f"Step {found.step:,}" if is_run else flags.workdir
    for name, one in numbers.items():
        shown = [f"{key} {one[key]:.4f} ± {one[key + '_stderr']:.4f}" for key in one if f"{key}_stderr" in one]
        print(f"{where}, {name}: {', '.join(shown)} ({one['questions']:,} questions)", flush=True)
    return {"step": found.step, "tasks": numbers}


def _measure(config: Any, saved: Json, found: Any, plans: dict[str, Plan], workdir: str) -> Json:
    """Measures the mix ("all") and each source, and prints their numbers. Returns them by name."""
    from jaxtrain.cost import memory
    from jaxtrain.data import pipeline
    from jaxtrain.metrics.monitor import perplexity
    from jaxtrain.trainer import open_data
    from jaxtrain.trainer.evaluate import Evaluator
    from jaxtrain.trainer.programs import StagePrograms
    from jaxtrain.trainer.step import StepComponents

    mesh, vocab_size = found.model.mesh, found.tokenizer.vocab_size
    optimizer = config.optimizer.build(found.model.axes, mesh)
    components = StepComponents(found.model, config.loss.build(vocab_size, mesh), optimizer, mesh, config.clip_norm)
    limit = memory.limit(mesh, config.memory_gb)
    programs = StagePrograms(components, None, config.micro_batch_tokens, limit, evaluation=plans[""].stages[0])
    with tempfile.TemporaryDirectory(prefix="jaxtrain-evaluate-") as scratch:
        evaluator = Evaluator(
            plans,
            config.data,
            open_data.resolve(config, saved),
            found.tokenizer,
            mesh,
            pipeline.pools(config.data),
            config.seed,
            open_data.skipped(workdir, saved),
            scratch,
            lambda documents: programs.evaluation(documents).executable,
        )
        values = evaluator.run(found.params)
    by_source = values.pop("eval_by_source", {})
    numbers = {"all": values}
    numbers |= {name: {f"eval_{key}": value for key, value in one.items()} for name, one in by_source.items()}
    for name, one in numbers.items():
        if one["eval_loss"] is None:
            print(f"Step {found.step:,}, {name}: no document is held out")
            continue
        one["eval_perplexity"] = perplexity(one["eval_loss"])
        print(
            f"Step {found.step:,}, {name}: loss {one['eval_loss']:.4f}, perplexity {one['eval_perplexity']:.2f}, "
            f"{one['eval_bits_per_byte']:.4f} bits per byte ({one['eval_tokens']:,.0f} held-out tokens)",
            flush=True,
        )
    return numbers


if __name__ == "__main__":
    cli.leave(cli.exit_code(main, COMMAND))
