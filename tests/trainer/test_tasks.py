"""Scores of choices: those of one choice at a time in float64, whatever the rows, the mesh and the micro-batches."""

import dataclasses
import functools
import math
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtrain.data.benchmarks import Question, Task
from jaxtrain.data.sources.huggingface import HuggingFace
from jaxtrain.distributed import sharding
from jaxtrain.distributed.sharding import MeshConfig
from jaxtrain.errors import UserError
from jaxtrain.losses.cross_entropy import CrossEntropy
from jaxtrain.optim.adamw import AdamW
from jaxtrain.trainer import programs, tasks
from jaxtrain.trainer.programs import DoesNotFitError, StagePrograms
from jaxtrain.trainer.step import StepComponents
from jaxtrain.trainer.tasks import TaskEvaluator, encode
from tests.hub import LoopbackHub
from tests.trainer import task_data
from tests.trainer.test_programs import MODEL, Fake, make_components

EOS = 1


class Words:
    """A tokenizer of words with the space before them, as byte-level BPE has it."""

    vocab_size, eos_id, bos_id = 100, EOS, None

    def encode_batch(self, texts: Any) -> tuple[np.ndarray, np.ndarray]:
        pieces = [[2 + sum(word.encode()) % 98 for word in _words(text)] for text in texts]
        return np.concatenate([np.asarray(some, np.int32) for some in pieces]), np.asarray(
            [len(ids) for ids in pieces], np.int64
        )


def _words(text: str) -> list[str]:
    first, *others = text.split(" ")
    return [*([first] if first else []), *(f" {word}" for word in others)]


def ids(text: str) -> list[int]:
    return Words().encode_batch([text])[0].tolist()


WORDS: Any = Words()


def parts(**mesh: int) -> StepComponents:
    """Components whose heads two devices can share."""
    made = MeshConfig(**{"fsdp": 1, **mesh}).build(jax.devices()[: math.prod(mesh.values())])
    model = dataclasses.replace(MODEL, num_kv_heads=2).build(100, made)
    return StepComponents(model, CrossEntropy().build(100, made), AdamW().build(model.axes, made), made, None)


# Its choices are nearly all tokens, so one of them is the likeliest.
EVERY = """
from jaxtrain.data.benchmarks import Task
from jaxtrain.data.sources.huggingface import HuggingFace

EVERY = Task(
    dataset=HuggingFace(name="text", data_files=("{path}",)),
    prompt=lambda question: question["text"],
    choices=lambda question: [chr(number) for number in range(33, 127)],
)
"""


@pytest.fixture
def evaluator(hub: LoopbackHub, tmp_path: pathlib.Path) -> Any:
    """Makes evaluators of two built-in tasks, and of one in which some choices are the likeliest."""
    task_data.fill(hub, ("boolq", "lambada_openai"))
    (tmp_path / "prompts.txt").write_text("a b\n")
    (tmp_path / "every.py").write_text(EVERY.format(path=tmp_path / "prompts.txt"))
    every = ("boolq", f"{tmp_path / 'every.py'}:EVERY", "lambada_openai")

    def make(components: Any, names: tuple[str, ...] = every, rows: int = 4, **more: Any) -> Any:
        @functools.cache
        def compiled() -> Any:
            return tasks.lower_task_step(components, *made.shape, more.get("micro_batches", 1)).compile()

        made = TaskEvaluator(
            names, more.get("limit"), None, WORDS, False, components, rows, lambda documents: compiled()
        )
        return made

    return make


def test_a_choice_is_what_follows_the_prompt() -> None:
    (found,) = encode([Question(["a b"], ["c d"], 0)], WORDS, False, 64)
    assert (found.tokens.tolist(), found.scored) == (ids("a b c d"), 2)
    # Spaces at the prompt's end belong to the choice.
    (found,) = encode([Question(["a b  "], ["c"], 0)], WORDS, False, 64)
    assert (found.tokens.tolist(), found.scored) == (ids("a b   c"), 3)
    # Without a prompt the end of a document comes first.
    (found,) = encode([Question([""], ["c"], 0)], WORDS, False, 64)
    assert (found.tokens.tolist(), found.scored) == ([EOS, *ids(" c")], 1)
    # Cut from the left, with a token that predicts the first.
    (found,) = encode([Question(["a b c d e"], ["f g"], 0)], WORDS, False, 3)
    assert (found.tokens.tolist(), found.scored) == (ids("a b c d e f g")[-4:], 2)
    (found,) = encode([Question(["a"], ["b c d e"], 0)], WORDS, False, 2)
    assert (found.tokens.tolist(), found.scored) == (ids("a b c d e")[-3:], 2)
    with_bos: Any = Words()
    with_bos.bos_id = 99
    (found,) = encode([Question(["a"], ["b"], 0)], with_bos, True, 64)
    assert (found.tokens.tolist(), found.scored) == ([99, *ids("a b")], 1)


@pytest.mark.parametrize(
    ("mesh", "micro_batches"),
    [
        ({}, 1),
        pytest.param({"data": 2, "tensor": 2, "context": 2}, 1, marks=pytest.mark.slow),
        pytest.param({"fsdp": 2}, 2, marks=pytest.mark.slow),
        pytest.param({"fsdp": 4, "tensor": 2}, 1, marks=pytest.mark.slow),
        pytest.param({"fsdp": 8}, 1, marks=pytest.mark.slow),
    ],
)
def test_scores_are_those_of_each_choice_alone(evaluator: Any, mesh: Any, micro_batches: int) -> None:
    made = evaluator(parts(**mesh), micro_batches=micro_batches)
    nats, greedy = made.scores(init(parts(**mesh)))
    model, params = parts().model, init(parts())

    @jax.jit
    def logits(params: Any, tokens: Any) -> Any:
        where = jnp.arange(64, dtype=jnp.int32)[None]
        return model.hidden(params, tokens, jnp.ones_like(tokens), where).x @ model.head(params)

    for number, request in enumerate(made._requests):
        tokens = request.tokens
        padded = np.zeros((1, 64), np.int32)
        padded[0, : len(tokens) - 1] = tokens[:-1]
        found = np.asarray(logits(params, padded), np.float64)[0, : len(tokens) - 1, : model.vocab_size]
        log_z = np.log(np.exp(found).sum(axis=1))
        scored = slice(len(tokens) - 1 - request.scored, None)
        places = np.arange(len(tokens) - 1)
        expected = (log_z - found[places, tokens[1:]])[scored]
        assert nats[number] == pytest.approx(expected.sum(), rel=1e-5)
        assert greedy[number] == (found.argmax(axis=1) == tokens[1:])[scored].all()
    assert 0 < greedy.sum() < len(greedy)


def init(components: Any) -> Any:
    """Parameters that make some tokens much likelier than others."""
    rng, shapes = np.random.default_rng(3), components.model.shapes
    layout = sharding.tree_shardings(components.mesh, components.model.axes)
    return jax.device_put(jax.tree.map(lambda leaf: rng.normal(0, 0.6, leaf.shape).astype(np.float32), shapes), layout)


def test_results_have_standard_errors() -> None:
    task = Task(
        dataset=HuggingFace(name="a/b"),
        prompt=lambda q: "",
        choices=lambda q: ["ab", "c"],
        metrics=("acc", "acc_norm", "perplexity"),
    )
    questions = [Question(["", ""], ["abcd", "e"], answer) for answer in (0, 0, 1)]
    found = tasks._results(task, questions, np.array([2.0, 1.0, 1.0, 2.0, 3.0, 1.5]), np.zeros(6, bool))
    # Right: the second and the third; by character the first and the second.
    assert found["acc"] == found["acc_norm"] == pytest.approx(2 / 3)
    assert found["acc_stderr"] == pytest.approx(np.std([0, 1, 1], ddof=1) / 3**0.5)
    assert found["perplexity"] == pytest.approx(np.exp(1.5))
    assert found["perplexity_stderr"] == pytest.approx(np.exp(1.5) * 0.5 / 3**0.5)
    assert found["questions"] == 3


def test_a_limit_takes_the_first_questions(evaluator: Any) -> None:
    made = evaluator(parts(), names=("boolq", "lambada_openai"), limit=3)
    assert len(made._requests) == 3 * 2 + 3


def test_the_program_keeps_to_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """16 rows of 64 tokens need 103,400 bytes at once, 26,600 in four micro-batches."""
    fake = Fake()
    monkeypatch.setattr(programs, "lower_train_step", fake)
    monkeypatch.setattr(programs, "lower_task_step", fake)
    made = StagePrograms(make_components(), None, None, limit=30_000, extra=10_000)
    made.add_tasks(16, 64)
    assert made.tasks().micro_batches == 8
    refused = StagePrograms(make_components(), None, None, limit=20_000, extra=13_000)
    refused.add_tasks(16, 64)
    with pytest.raises(DoesNotFitError, match=r"eval\.tasks does not fit"):
        refused.tasks()


def test_a_task_without_questions_is_refused(evaluator: Any) -> None:
    with pytest.raises(UserError, match="task boolq: aps/super_glue has no question"):
        evaluator(make_components(), names=("boolq",), limit=0)


def test_two_tasks_of_one_name_are_refused(evaluator: Any) -> None:
    with pytest.raises(UserError, match="two tasks have the name 'boolq'"):
        evaluator(make_components(), names=("boolq", "boolq"))
