"""Benchmarks: questions as texts, read once and kept, tasks from files. Prompts are lm-eval's: test_tasks_parity.py."""

import dataclasses
import json
import pathlib

import pytest
from etils import epath

from jaxtrain.data import benchmarks
from jaxtrain.data.benchmarks import TASKS, Question, Task
from jaxtrain.data.sources.huggingface import HuggingFace
from jaxtrain.errors import UserError
from tests.hub import LoopbackHub
from tests.trainer import task_data


def ask(name: str, **row: object) -> Question:
    (found,) = benchmarks.questions(TASKS[name], [row], name)
    return found


def test_questions_become_texts() -> None:
    assert ask(
        "hellaswag",
        activity_label="Roof shingle removal",
        ctx_a="A man [step] sits.",
        ctx_b="he",
        endings=["is [title] up.", "a  b [x]c"],
        label="1",
    ) == Question(["Roof shingle removal: A man  sits. He".replace("  ", " ")] * 2, ["is. up.", "a b c"], 1)
    choices = {"text": ["x", "y", "z"], "label": ["A", "B", "C"]}
    question = ask("arc_easy", question="Why?", choices=choices, answerKey="C")
    assert question == Question(["Question: Why?\nAnswer:"] * 3, ["x", "y", "z"], 2)
    assert ask("openbookqa", question_stem="Sun", choices=choices, answerKey=" B").answer == 1
    question = ask("winogrande", sentence="Ann hit _ , so", option1="Bo", option2="Al", answer="2")
    assert question == Question(["Ann hit Bo", "Ann hit Al"], [", so", ", so"], 1)
    assert ask("lambada_openai", text="one two three") == Question(["one two"], ["three"], 0)
    assert ask("boolq", passage="P.", question="is it", label=1) == Question(
        ["P.\nQuestion: is it?\nAnswer:"] * 2, ["no", "yes"], 1
    )


@pytest.mark.parametrize("name", TASKS)
def test_a_task_reads_its_dataset(hub: LoopbackHub, name: str) -> None:
    task_data.fill(hub, (name,))
    task = TASKS[name]
    found = benchmarks.read(task, name, None)
    wanted = [{key: row[key] for key in (task.dataset.column, *task.columns)} for row in task_data.rows(name)]
    assert found == wanted
    assert len(benchmarks.questions(task, found, name)) == 12


def test_questions_are_kept_with_their_commit(
    hub: LoopbackHub, tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    task_data.fill(hub, ("piqa",))
    kept = epath.Path(tmp_path / "tasks" / "piqa.json")
    with caplog.at_level("INFO", "jaxtrain"):
        found = benchmarks.read(TASKS["piqa"], "piqa", kept)
    sha = hub.repos["dataset", "baber/piqa"].branches["main"]
    assert f"Task piqa: 12 questions of baber/piqa@{sha}" in caplog.text
    assert json.loads(kept.read_text())["source"]["revision"] == sha
    hub.clear()
    assert benchmarks.read(TASKS["piqa"], "piqa", kept) == found
    assert not hub.log
    other = Task(
        dataset=HuggingFace(name="baber/piqa", split="test", column="goal"),
        prompt=lambda q: q["goal"],
        choices=lambda q: ["a"],
    )
    with pytest.raises(UserError, match="baber/piqa"):  # another definition is looked up
        benchmarks.read(other, "piqa", kept)
    task_data.fill(hub, ("piqa",))
    whole = kept.read_text()
    for damaged in ("", whole[:40], "[]", "null", "{}"):
        kept.write_text(damaged)
        assert benchmarks.read(TASKS["piqa"], "piqa", kept) == found
        assert kept.read_text() == whole


def test_a_task_of_ones_own(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "capitals.jsonl"
    path.write_text('{"country": "Italy", "options": ["Paris", "Rome"], "right": 1}\n')
    text = pathlib.Path("examples/benchmark.py").read_text().replace("capitals.jsonl", str(path))
    (tmp_path / "mine.py").write_text(text)
    name = f"{tmp_path / 'mine.py'}:CAPITALS"
    task, kept = benchmarks.find(name), epath.Path(tmp_path / "kept.json")
    assert benchmarks.title(name) == "CAPITALS"
    documents = benchmarks.read(task, "CAPITALS", kept)
    assert benchmarks.questions(task, documents, "CAPITALS") == [
        Question(["The capital of Italy is"] * 2, ["Paris", "Rome"], 1)
    ]
    assert not kept.exists()  # a local file may change
    shown = "The capital of France is Paris\n\nThe capital of Italy is Rome\n\nThe capital of Italy is"
    (two,) = benchmarks.questions(benchmarks.find(f"{name}_2"), documents, "CAPITALS_2")
    assert two == Question([shown] * 2, ["Paris", "Rome"], 1)
    with pytest.raises(UserError, match="task mine: example 0 fails: KeyError"):
        benchmarks.questions(dataclasses.replace(task, examples=({"country": "Peru"},)), documents, "mine")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("hellaswg", "there is no task 'hellaswg'. Did you mean 'hellaswag'"),
        ("nowhere.py:A", "there is no file nowhere.py"),
        ("examples/benchmark.py:NONE", "has no variable NONE that holds a Task"),
    ],
)
def test_a_task_that_does_not_exist_is_named(name: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        benchmarks.find(name)


def test_a_question_that_does_not_fit_the_task_is_named() -> None:
    with pytest.raises(UserError, match="task boolq: question 0 fails: KeyError: 'passage'"):
        ask("boolq", question="is it", label=1)
    with pytest.raises(UserError, match=r"question 0 has 2 prompt\(s\) and 2 choice\(s\), and the answer 7"):
        ask("boolq", passage="P.", question="is it", label=7)
