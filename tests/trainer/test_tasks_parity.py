"""Against lm-evaluation-harness: every built-in task on an exported model, choice by choice."""

import dataclasses
import json
import os
import pathlib
import random
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import pytest

from jaxtrain import hf
from jaxtrain.data import benchmarks
from jaxtrain.data.benchmarks import TASKS
from jaxtrain.distributed.sharding import MeshConfig
from jaxtrain.losses.cross_entropy import CrossEntropy
from jaxtrain.model.llama import LlamaConfig
from jaxtrain.optim.adamw import AdamW
from jaxtrain.tokenizers.training import TrainTokenizer
from jaxtrain.trainer import restored
from jaxtrain.trainer.step import StepComponents
from jaxtrain.trainer.tasks import TaskEvaluator, lower_task_step
from tests.hub import LoopbackHub
from tests.trainer import task_data

pytestmark = [pytest.mark.slow, pytest.mark.parity]
pytest.importorskip("lm_eval")

# Shorter than some questions, which are cut from the left.
MODEL = LlamaConfig(
    hidden_size=32,
    intermediate_size=64,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    max_seq_len=64,
    dtype="float32",
    remat="none",
    initializer_std=0.3,
)
# Kind of tokenizer, and whether documents begin with BOS.
EXPORTS = {"bpe": False, "sentencepiece": True}
HARNESS = """
import json, sys, lm_eval
found, tasks = {}, json.loads(sys.argv[3])
for folder in sys.argv[1].split(","):
    arguments = f"pretrained={folder},dtype=float32"
    made = lm_eval.simple_evaluate(
        model="hf", model_args=arguments, tasks=tasks, device="cpu", batch_size=4, log_samples=True,
        bootstrap_iters=100,
    )
    samples = {task: [sample["filtered_resps"] for sample in some] for task, some in made["samples"].items()}
    found[folder] = {"results": made["results"], "samples": samples}
with open(sys.argv[2], "w") as out:
    json.dump(found, out, default=str)
"""


def export(folder: pathlib.Path, kind: Any, add_bos: bool, max_seq_len: int = MODEL.max_seq_len) -> None:
    rng = random.Random(0)
    tokenizer = TrainTokenizer(kind=kind, vocab_size=300, max_samples=200)
    documents = [" ".join(rng.choices(task_data.WORDS, k=30)) for _ in range(200)]
    tokenizer.train(documents, folder / "made", progress=False)
    built = tokenizer.build(str(folder / "made"))
    model = dataclasses.replace(MODEL, max_seq_len=max_seq_len).build(
        built.vocab_size, MeshConfig(fsdp=1).build(jax.devices()[:1])
    )
    params = model.init(jax.random.key(1))
    hf.export(params, model, str(folder), "float32", built, add_bos=add_bos)


def evaluator(found: restored.Restored, tasks: Sequence[str]) -> TaskEvaluator:
    mesh = found.model.mesh
    assert mesh is not None
    optimizer = AdamW().build(found.model.axes, mesh)
    components = StepComponents(found.model, CrossEntropy().build(found.model.vocab_size, mesh), optimizer, mesh, None)

    def compiled() -> Any:
        return lower_task_step(components, *made.shape, 1).compile()

    made = TaskEvaluator(
        tasks, None, None, found.tokenizer, found.add_bos, components, 16, lambda documents: compiled()
    )
    return made


def harness(tmp_path: pathlib.Path, tasks: Sequence[Any]) -> Any:
    """What lm-eval finds for names of tasks, or for its configs, on each model in `tmp_path`."""
    folders, out = ",".join(str(tmp_path / kind) for kind in EXPORTS), tmp_path / "theirs.json"
    command = [sys.executable, "-c", HARNESS, folders, str(out), json.dumps(tasks)]
    env = {**os.environ, "DISABLE_MULTIPROC": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(out.read_text())


def assert_equal(folder: pathlib.Path, tasks: dict[str, str], theirs: Any) -> None:
    """tasks: our name → lm-eval's."""
    found = restored.from_hf(str(folder))
    ours = evaluator(found, tuple(tasks))
    nats, greedy = ours.scores(found.params)
    scores = [tuple(pair) for task in tasks.values() for sample in theirs["samples"][task] for pair in _pairs(sample)]
    np.testing.assert_allclose(-nats, [score for score, _ in scores], rtol=2e-5, atol=2e-5)
    np.testing.assert_array_equal(greedy, [is_greedy for _, is_greedy in scores])
    for task, one in ours.run(found.params)["eval_tasks"].items():
        name = next(theirs for ours, theirs in tasks.items() if benchmarks.title(ours) == task)
        for metric in TASKS[name].metrics:
            assert one[metric] == pytest.approx(theirs["results"][name][f"{metric},none"], rel=1e-4)
            if metric != "perplexity":  # theirs is a bootstrap's
                error = theirs["results"][name][f"{metric}_stderr,none"]
                assert one[f"{metric}_stderr"] == pytest.approx(error, rel=1e-9)


def test_every_task_gives_what_lm_eval_gives(hub: LoopbackHub, tmp_path: pathlib.Path):
    task_data.fill(hub)
    for kind, add_bos in EXPORTS.items():
        export(tmp_path / kind, kind, add_bos)
        assert restored.from_hf(str(tmp_path / kind)).add_bos == add_bos
    theirs = harness(tmp_path, list(TASKS))
    for kind in EXPORTS:
        assert_equal(tmp_path / kind, {task: task for task in TASKS}, theirs[str(tmp_path / kind)])


def test_examples_are_those_of_lm_eval(hub: LoopbackHub, tmp_path: pathlib.Path):
    task_data.fill(hub)
    for kind, add_bos in EXPORTS.items():
        export(tmp_path / kind, kind, add_bos, max_seq_len=256)
    file, configs, ours = tmp_path / "shots.py", [], {}
    lines = ["import dataclasses", "from jaxtrain.data.benchmarks import TASKS"]
    for task in ("arc_easy", "piqa", "boolq", "lambada_openai"):
        examples = task_data.rows(task, count=3, seed=1)[1:]
        shown = {"sampler": "first_n", "samples": examples}
        configs.append({"task": task, "num_fewshot": 2, "fewshot_split": None, "fewshot_config": shown})
        lines.append(f"{task.upper()} = dataclasses.replace(TASKS[{task!r}], examples={tuple(examples)!r})")
        ours[f"{file}:{task.upper()}"] = task
    file.write_text("\n".join(lines))
    theirs = harness(tmp_path, configs)
    for kind in EXPORTS:
        assert_equal(tmp_path / kind, ours, theirs[str(tmp_path / kind)])


def _pairs(responses: Any) -> list[tuple[float, bool]]:
    """(log-likelihood, is greedy) of each choice; lm-eval has the pair itself for a single one."""
    nested = responses if isinstance(responses[0], list) else [responses]
    return [(float(score), str(is_greedy) == "True") for score, is_greedy in nested]
