"""The four examples, each a file outside the package, trained and resumed as CONTRIBUTING.md says."""

import importlib
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from jaxtrain import cli
from tests.e2e.runs import ROOT, Run, documents, environment

EXAMPLES = {
    "csv_source": ("data.sources.csv", "CSVFiles"),
    "gpt2": ("model", "GPT2Config"),
    "label_smoothing": ("loss", "LabelSmoothing"),
    "lion": ("optimizer", "Lion"),
}
# configs/quickstart.py, which the examples change, in four small steps.
SMALL = (
    "--config.stages[0].seq_len=32",
    "--config.stages[0].batch_size=8",
    "--config.total_tokens=1024",
    "--config.checkpoint.every_steps=1",
    "--config.eval.every_steps=none",
    "--config.data.holdout=0",
    "--config.data.shuffle_window=16",
    "--config.tokenizer.vocab_size=400",
    "--config.tokenizer.max_samples=100",
    "--config.sample_prompts=()",
    "--config.log_every=1",
)


def tool(name: str, *flags: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", f"tools.{name}", *flags]
    return subprocess.run(command, cwd=ROOT, env=environment({}), capture_output=True, text=True, timeout=600)


def small(name: str) -> Sequence[str]:
    smaller = {"hidden_size": 32, "num_layers": 2, "num_heads": 2}
    if name != "gpt2":
        smaller |= {"intermediate_size": 32, "num_kv_heads": 2}
    return (*SMALL, *(f"--config.model.{field}={size}" for field, size in smaller.items()))


@pytest.mark.slow
@pytest.mark.parametrize("name", EXAMPLES)
def test_it_trains_resumes_and_is_read_back(name: str, tmp_path: Path) -> None:
    spec = f"examples/{name}.py"
    if name == "csv_source":
        (tmp_path / "data").mkdir()
        rows = "".join(f'"{text}"\n' for text in documents(1, 300))
        (tmp_path / "data" / "a.csv").write_text(f"text\n{rows}")
        spec += f":{tmp_path / 'data'}"
    run = Run(tmp_path / "run", spec, environment({}))
    run(*small(name), "--config.steps=2")
    run(*small(name), "--config.steps=4")
    assert "Resumed from step 2" in run.output
    assert [line["step"] for line in run.steps()] == [1, 2, 3, 4]
    assert run.steps()[-1]["loss"] < run.steps()[0]["loss"]
    recorded: Any = run.data_state()["config"]
    path, cls = EXAMPLES[name]
    for field in path.split("."):
        recorded = recorded[field]
    assert recorded[cli.KIND] == f"examples.{name}:{cls}"
    module = importlib.import_module(f"examples.{name}")
    assert type(cli.from_json(recorded)) is getattr(module, cls)
    if name == "gpt2":
        flags = (f"--workdir={run.workdir}", "--prompt=def", "--max_new_tokens=4")
        refused = tool("generate", *flags)
        assert refused.returncode == 2
        assert "--import=examples.gpt2" in refused.stderr
        generated = tool("generate", *flags, "--import=examples.gpt2")
        assert generated.returncode == 0, generated.stderr
        assert generated.stdout.startswith("def")


def test_the_guides_name_the_examples_and_the_examples_what_the_guides_say() -> None:
    """Every file, class and function that a guide names in code exists, and its example uses it."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    guides = re.split(r"^## ", text, flags=re.MULTILINE)
    built_in = "".join(
        (ROOT / "jaxtrain" / path).read_text() for path in ("losses/chunks.py", "hf/families.py", "errors.py")
    )
    by_title = {guide.splitlines()[0]: guide for guide in guides}
    for title, name in (
        ("Add a source", "csv_source"),
        ("Add an optimizer", "lion"),
        ("Add a loss", "label_smoothing"),
        ("Add a model", "gpt2"),
        ("Add a benchmark", "benchmark"),
    ):
        guide, source = by_title[title], (ROOT / "examples" / f"{name}.py").read_text()
        assert f"`examples/{name}.py`" in guide
        for path in re.findall(r"`([\w/]+\.(?:py|md))`", guide):
            assert (ROOT / path).exists(), path
        contracts = (ROOT / "jaxtrain/interfaces.py").read_text()
        for word in re.findall(r"`(\w+)(?:\(.*?\))?`", guide):
            assert re.search(rf"\b{word}\b", source + contracts + built_in), (title, word)
