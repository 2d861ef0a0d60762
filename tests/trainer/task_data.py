"""Made-up questions in the schemas of the built-in tasks' datasets, on the loopback Hub."""

import io
import json
import random
from collections.abc import Iterable
from typing import Any

import datasets
import pyarrow.parquet as pq

from jaxtrain.data.benchmarks import TASKS
from tests.hub import LoopbackHub

TEXT = "the a cat dog sat runs on mat blue river. stone, because it was old and small then they left"
WORDS = TEXT.split()


def rows(task: str, count: int = 12, seed: int = 0) -> list[dict[str, Any]]:
    """Questions of a task, with what each schema has of traps: brackets, double spaces, empty texts, numbers."""
    rng = random.Random(f"{task} {seed}")

    def text(most: int = 9) -> str:
        return " ".join(rng.choices(WORDS, k=rng.randint(1, most)))

    def choices(labels: str, texts: list[str]) -> dict[str, list[str]]:
        return {"text": texts, "label": list(labels)}

    def one(number: int) -> dict[str, Any]:
        match task:
            case "hellaswag":
                return {
                    "ind": number,
                    "activity_label": "Cutting  grass" if number % 2 else "[header] Roofs",
                    "ctx_a": f" {text()} [title] {text()} [step]",
                    "ctx_b": "" if number % 3 else text().upper(),
                    "endings": [f"{text()} [substeps] {text()}." for _ in range(4)],
                    "label": str(rng.randrange(4)),
                }
            case "arc_easy" | "arc_challenge" | "openbookqa":
                labels = "1234" if number % 4 == 1 else "ABCDE"[: rng.randint(3, 5)]
                question = "question_stem" if task == "openbookqa" else "question"
                key = rng.choice(labels)
                answer = f" {key}" if task == "openbookqa" and number % 3 == 0 else key
                texts = [text(5) for _ in labels]
                return {"id": f"Q{number}", question: text(20), "choices": choices(labels, texts), "answerKey": answer}
            case "piqa":
                return {"goal": text(), "sol1": text(), "sol2": text(15), "label": rng.randrange(2)}
            case "winogrande":
                sentence = f"_ sat, {text()}." if number % 4 == 0 else f"{text()} so _ {text()}."
                options = {"option1": text(2), "option2": text(2)}
                return {"sentence": sentence, **options, "answer": rng.choice("12")}
            case "boolq":
                return {"question": text(), "passage": text(40), "idx": number, "label": rng.randrange(2)}
            case "sciq":
                wrong = {f"distractor{n}": text(3) for n in (1, 2, 3)}
                support = "" if number % 3 == 0 else f" {text(30)}"
                return {"question": text(), **wrong, "correct_answer": text(3), "support": support}
            case _:
                return {"text": f"{text(20)} {rng.choice(WORDS)}" if number else "alone", "domain": None}

    return [one(number) for number in range(count)]


def fill(hub: LoopbackHub, names: Iterable[str] = TASKS, count: int = 12) -> None:
    """Commits the datasets of built-in tasks, with other questions in the splits that no task asks."""
    made: dict[str, dict[str, bytes]] = {}
    configs: dict[str, str] = {}
    for name in names:
        about = TASKS[name].dataset
        folder = about.config_name or "default"
        card = configs.get(about.name, "") + f"- config_name: {folder}\n  data_files:\n"
        for seed, split in enumerate({about.split: None, "train": None, "validation": None}):
            suffix = "jsonl" if name == "lambada_openai" else "parquet"
            path = f"{folder}/{split}.{suffix}"
            made.setdefault(about.name, {})[path] = _file(name, rows(name, count, seed), suffix)
            card += f"  - split: {split}\n    path: {path}\n"
        configs[about.name] = card
    for name, files in made.items():
        hub.commit(name, {**files, "README.md": f"---\nconfigs:\n{configs[name]}---\n".encode()})


def _file(name: str, found: list[dict[str, Any]], suffix: str) -> bytes:
    if suffix == "jsonl":
        return "".join(json.dumps(row) + "\n" for row in found).encode()
    made = datasets.Dataset.from_list(found)
    if name == "boolq":
        features = made.features.copy()
        features["label"] = datasets.ClassLabel(names=["False", "True"])
        made = datasets.Dataset.from_list(found, features=features)
    sink = io.BytesIO()
    pq.write_table(made.data.table, sink, row_group_size=5, compression="zstd", write_page_checksum=True)
    return sink.getvalue()
