"""Against lm-evaluation-harness: every built-in task on an exported model, choice by choice."""

import json
import os
import pathlib
import random
import subprocess
import sys
from typing import Any

import jax
import numpy as np
import pytest

from jaxtrain import hf
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
found = {}
for folder in sys.argv[1].split(","):
    arguments = f"pretrained={folder},dtype=float32"
    made = lm_eval.simple_evaluate(
        model="hf", model_args=arguments, tasks=sys.argv[3:], device="cpu", batch_size=4, log_samples=True,
        bootstrap_iters=100,
    )
    samples = {task: [sample["filtered_resps"] for sample in some] for task, some in made["samples"].items()}
    found[folder] = {"results": made["results"], "samples": samples}
with open(sys.argv[2], "w") as out:
    json.dump(found, out, default=str)
"""


def export(folder: pathlib.Path, kind: Any, add_bos: bool) -> None:
    rng = random.Random(0)
    tokenizer = TrainTokenizer(kind=kind, vocab_size=300, max_samples=200)
    documents = [" ".join(rng.choices(task_data.WORDS, k=30)) for _ in range(200)]
    tokenizer.train(documents, folder / "made", progress=False)
    built = tokenizer.build(str(folder / "made"))
    model = MODEL.build(built.vocab_size, MeshConfig(fsdp=1).build(jax.devices()[:1]))
    params = model.init(jax.random.key(1))
    hf.export(params, model, str(folder), "float32", built, add_bos=add_bos)


def evaluator(found: restored.Restored) -> TaskEvaluator:
    mesh = found.model.mesh
    assert mesh is not None
    optimizer = AdamW().build(found.model.axes, mesh)
    components = StepComponents(found.model, CrossEntropy().build(found.model.vocab_size, mesh), optimizer, mesh, None)

    def compiled() -> Any:
        return lower_task_step(components, *made.shape, 1).compile()

    made = TaskEvaluator(
        tuple(TASKS), None, None, found.tokenizer, found.add_bos, components, 16, lambda documents: compiled()
    )
    return made


def test_every_task_gives_what_lm_eval_gives(hub: LoopbackHub, tmp_path: pathlib.Path):
    task_data.fill(hub)
    for kind, add_bos in EXPORTS.items():
        export(tmp_path / kind, kind, add_bos)
    folders, out = ",".join(str(tmp_path / kind) for kind in EXPORTS), tmp_path / "theirs.json"
    command = [sys.executable, "-c", HARNESS, folders, str(out), *TASKS]
    env = {**os.environ, "DISABLE_MULTIPROC": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr
    for kind, add_bos in EXPORTS.items():
        theirs = json.loads(out.read_text())[str(tmp_path / kind)]
        found = restored.from_hf(str(tmp_path / kind))
        assert found.add_bos == add_bos
        ours = evaluator(found)
        nats, greedy = ours.scores(found.params)
        scores = [tuple(pair) for task in TASKS for sample in theirs["samples"][task] for pair in _pairs(sample)]
        np.testing.assert_allclose(-nats, [score for score, _ in scores], rtol=2e-5, atol=2e-5)
        np.testing.assert_array_equal(greedy, [is_greedy for _, is_greedy in scores])
        for task, one in ours.run(found.params)["eval_tasks"].items():
            for metric in TASKS[task].metrics:
                assert one[metric] == pytest.approx(theirs["results"][task][f"{metric},none"], rel=1e-4)
                if metric != "perplexity":  # theirs is a bootstrap's
                    error = theirs["results"][task][f"{metric}_stderr,none"]
                    assert one[f"{metric}_stderr"] == pytest.approx(error, rel=1e-9)


def _pairs(responses: Any) -> list[tuple[float, bool]]:
    """(log-likelihood, is greedy) of each choice; lm-eval has the pair itself for a single one."""
    nested = responses if isinstance(responses[0], list) else [responses]
    return [(float(score), str(is_greedy) == "True") for score, is_greedy in nested]
