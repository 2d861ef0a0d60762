"""Benchmarks of multiple choice: where their questions are, and how each becomes texts to score.

Prompts, choices and splits are those of lm-evaluation-harness 0.4 (its tasks/*.yaml), without examples (zero-shot)
unless a task has some. A task is a value, so one of your own needs no registration: see examples/benchmark.py.
"""

import contextlib
import dataclasses
import difflib
import json
import logging
import pathlib
import re
from collections.abc import Callable, Sequence
from typing import Any, Literal

from etils import epath

from jaxtrain import cli
from jaxtrain.data.io import retry
from jaxtrain.data.pipeline import PATIENCE_AT_START
from jaxtrain.data.sources.huggingface import HuggingFace
from jaxtrain.errors import UserError
from jaxtrain.interfaces import Json

Metric = Literal["acc", "acc_norm", "perplexity"]

logger = logging.getLogger("jaxtrain")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """A benchmark. Its three functions get a question as a dict of `dataset.column` and `columns`.

    Attributes:
        dataset: The questions: a dataset on the Hub, or files. `column` is any column with text.
        columns: Further columns.
        prompt: The text before the choices, or a list with a text for each choice.
        choices: The texts to choose from. A space joins them to the prompt. A single one is the text that the model
            should write.
        answer: The index of the right choice.
        metrics: "acc" is the share of questions whose right choice has the highest log-likelihood; with a single
            choice, whose every token is the likeliest. "acc_norm" divides log-likelihoods by the choices' characters.
            "perplexity" is that of right choices, by choice and not by token.
        examples: Questions shown with their answers before each question, as lm-eval shows the first `num_fewshot` of
            `fewshot_config.samples`. Each is a dict of the columns.
    """

    dataset: HuggingFace
    columns: tuple[str, ...] = ()
    prompt: Callable[[Json], str | list[str]]
    choices: Callable[[Json], list[str]]
    answer: Callable[[Json], int] = lambda question: 0
    metrics: tuple[Metric, ...] = ("acc", "acc_norm")
    examples: tuple[Json, ...] = ()


@dataclasses.dataclass(frozen=True)
class Question:
    """A question as texts. `prompts` and `choices` belong together; `answer` is the index of the right choice."""

    prompts: Sequence[str]
    choices: Sequence[str]
    answer: int


@dataclasses.dataclass(frozen=True)
class _Columns:
    """A transform that changes nothing and asks for columns."""

    columns: tuple[str, ...]

    def __call__(self, document: Json) -> Json:
        return document


def _hellaswag(text: str) -> str:
    """Removes the marks of WikiHow's headings."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


def _arc(config_name: str) -> Task:
    return Task(
        dataset=HuggingFace(name="allenai/ai2_arc", config_name=config_name, split="test", column="question"),
        columns=("choices", "answerKey"),
        prompt=lambda q: f"Question: {q['question']}\nAnswer:",
        choices=lambda q: q["choices"]["text"],
        answer=lambda q: q["choices"]["label"].index(q["answerKey"]),
    )


def _winogrande(question: Json) -> tuple[str, str]:
    before, _, after = question["sentence"].partition("_")
    return before, after.strip()


def _lambada(name: str, config_name: str | None) -> Task:
    return Task(
        dataset=HuggingFace(name=name, config_name=config_name, split="test"),
        prompt=lambda q: " ".join(q["text"].split(" ")[:-1]),
        choices=lambda q: [q["text"].split(" ")[-1]],
        metrics=("acc", "perplexity"),
    )


TASKS = {
    "hellaswag": Task(
        dataset=HuggingFace(name="Rowan/hellaswag", split="validation", column="ctx_a"),
        columns=("ctx_b", "activity_label", "endings", "label"),
        prompt=lambda q: _hellaswag(f"{q['activity_label']}: {q['ctx_a']} {q['ctx_b'].capitalize()}"),
        choices=lambda q: [_hellaswag(ending) for ending in q["endings"]],
        answer=lambda q: int(q["label"]),
    ),
    "arc_easy": _arc("ARC-Easy"),
    "arc_challenge": _arc("ARC-Challenge"),
    "piqa": Task(
        dataset=HuggingFace(name="baber/piqa", split="validation", column="goal"),
        columns=("sol1", "sol2", "label"),
        prompt=lambda q: f"Question: {q['goal']}\nAnswer:",
        choices=lambda q: [q["sol1"], q["sol2"]],
        answer=lambda q: q["label"],
    ),
    "winogrande": Task(
        dataset=HuggingFace(
            name="allenai/winogrande", config_name="winogrande_xl", split="validation", column="sentence"
        ),
        columns=("option1", "option2", "answer"),
        # The choice is in the prompt, and the same rest of the sentence follows.
        prompt=lambda q: [_winogrande(q)[0] + q[option] for option in ("option1", "option2")],
        choices=lambda q: [_winogrande(q)[1]] * 2,
        answer=lambda q: int(q["answer"]) - 1,
        metrics=("acc",),
    ),
    "openbookqa": Task(
        dataset=HuggingFace(name="allenai/openbookqa", config_name="main", split="test", column="question_stem"),
        columns=("choices", "answerKey"),
        prompt=lambda q: q["question_stem"],
        choices=lambda q: q["choices"]["text"],
        answer=lambda q: q["choices"]["label"].index(q["answerKey"].lstrip()),
    ),
    "boolq": Task(
        dataset=HuggingFace(name="aps/super_glue", config_name="boolq", split="validation", column="passage"),
        columns=("question", "label"),
        prompt=lambda q: f"{q['passage']}\nQuestion: {q['question']}?\nAnswer:",
        choices=lambda q: ["no", "yes"],
        answer=lambda q: q["label"],
        metrics=("acc",),
    ),
    "sciq": Task(
        dataset=HuggingFace(name="allenai/sciq", split="test", column="question"),
        columns=("support", "distractor1", "distractor2", "distractor3", "correct_answer"),
        prompt=lambda q: f"{q['support'].lstrip()}\nQuestion: {q['question']}\nAnswer:",
        choices=lambda q: [q["distractor1"], q["distractor2"], q["distractor3"], q["correct_answer"]],
        answer=lambda q: 3,
    ),
    "lambada_openai": _lambada("EleutherAI/lambada_openai", "default"),
    "lambada_standard": _lambada("cimec/lambada", None),
}


def find(name: str) -> Task:
    """Returns a task by name: one of TASKS, or `file.py:NAME` for the variable NAME of a Python file.

    Raises:
        UserError: There is none.
    """
    if name in TASKS:
        return TASKS[name]
    path, _, variable = name.rpartition(":")
    if not path.endswith(".py"):
        near = difflib.get_close_matches(name, TASKS, n=1)
        hint = f"Did you mean {near[0]!r}? " if near else ""
        raise UserError(f"there is no task {name!r}. {hint}Give FILE.py:NAME, or one of {', '.join(TASKS)}")
    if not pathlib.Path(path).is_file():
        raise UserError(f"task {name!r}: there is no file {path}")
    found = getattr(cli.run_file(pathlib.Path(path)), variable, None)
    if not isinstance(found, Task):
        raise UserError(f"task {name!r}: {path} has no variable {variable} that holds a Task")
    return found


def title(name: str) -> str:
    """The task's name in results: without the file."""
    return name.rpartition(":")[2]


def questions(task: Task, documents: Sequence[Json], name: str) -> list[Question]:
    """Applies the task's functions. Raises UserError if one fails."""
    shown = [_question(task, document, f"task {name}: example {n}") for n, document in enumerate(task.examples)]
    before = "".join(f"{one.prompts[one.answer]} {one.choices[one.answer]}\n\n" for one in shown)
    found = [_question(task, document, f"task {name}: question {n}") for n, document in enumerate(documents)]
    return [dataclasses.replace(one, prompts=[before + prompt for prompt in one.prompts]) for one in found]


def _question(task: Task, document: Json, what: str) -> Question:
    try:
        prompts, choices, answer = task.prompt(document), list(task.choices(document)), task.answer(document)
    except Exception as error:
        raise UserError(f"{what} fails: {type(error).__name__}: {error}") from error
    prompts = [prompts] * len(choices) if isinstance(prompts, str) else prompts
    if len(prompts) != len(choices) or not 0 <= answer < len(choices):
        raise UserError(f"{what} has {len(prompts)} prompt(s) and {len(choices)} choice(s), and the answer {answer}")
    return Question(prompts, choices, answer)


def read(task: Task, name: str, kept: epath.Path | None) -> list[Json]:
    """Reads a task's questions, from the Hub once and then from the file `kept`, which records the commit.

    Raises:
        UserError: The dataset does not exist, is not accessible, or lacks a column.
        TransientError: The Hub cannot be reached.
    """
    asked = {**dataclasses.asdict(task.dataset), "columns": list(task.columns)}
    asked = json.loads(json.dumps(asked))  # tuples become lists, as in the file
    if kept is not None and kept.exists():
        # A damaged file is written again.
        with contextlib.suppress(ValueError, TypeError, LookupError):
            found = json.loads(kept.read_text())
            if found["asked"] == asked:
                return list(found["documents"])
    config = dataclasses.replace(task.dataset, transforms=(_Columns(task.columns),))

    def fetch() -> tuple[Json, list[Json]]:
        source, column = config.resolve(), config.column
        documents: list[Json] = []
        for file in range(len(source.files)):
            for block in source.open(file, 0):
                columns = [block[name] for name in task.columns]
                rows = zip(block["text"], *columns, strict=True)
                documents += [dict(zip((column, *task.columns), row, strict=True)) for row in rows]
        return source.identity, documents[: config.max_samples]

    identity, documents = retry.attempt(fetch, what=f"task {name}", deadline=PATIENCE_AT_START)
    revision = identity["revision"]
    logger.info(
        "Task %s: %s questions of %s%s", name, f"{len(documents):,}", config.name, f"@{revision}" if revision else ""
    )
    if kept is not None and revision is not None:  # files elsewhere may change
        kept.parent.mkdir(parents=True, exist_ok=True)
        content: dict[str, Any] = {"asked": asked, "source": identity, "documents": documents}
        temporary = kept.parent / f"{kept.name}.tmp"
        temporary.write_text(json.dumps(content))
        temporary.replace(kept)
    return documents
