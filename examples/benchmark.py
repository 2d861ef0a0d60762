"""A benchmark of your own: `--config.eval.tasks=examples/benchmark.py:CAPITALS`, next to the built-in ones.

Here the questions are JSON lines, {"country": "Italy", "options": ["Paris", "Rome"], "right": 1}. A dataset on the Hub
works the same way: HuggingFace(name="org/name", split="test", column="country"). CAPITALS_2 shows two examples with
their answers first (two-shot).
"""

import dataclasses

from jaxtrain.data.benchmarks import Task
from jaxtrain.data.sources.huggingface import HuggingFace

CAPITALS = Task(
    dataset=HuggingFace(name="json", data_files=("capitals.jsonl",), column="country"),
    columns=("options", "right"),
    prompt=lambda question: f"The capital of {question['country']} is",
    choices=lambda question: question["options"],
    answer=lambda question: question["right"],
)

CAPITALS_2 = dataclasses.replace(
    CAPITALS,
    examples=(
        {"country": "France", "options": ["Paris", "Rome"], "right": 0},
        {"country": "Italy", "options": ["Paris", "Rome"], "right": 1},
    ),
)
