"""The commands in the docs: each parses, its config loads, and those without network or cluster are run."""

import importlib
import os
import pathlib
import re
import shlex
import subprocess
import sys

import pytest

from jaxtrain import cli

ROOT = pathlib.Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
# Tutorials that run as written, except for these overrides.
SMALL = ("--config.steps=2", "--config.eval.every_steps=none", "--config.tokenizer.max_samples=100")
LOCAL = ("quickstart", "mine", "gpt2")


def blocks(page: pathlib.Path) -> list[tuple[str, str]]:
    """(language, text) of each fenced block."""
    return re.findall(r"^ *```(\w*)\n(.*?)^ *```", page.read_text(), re.MULTILINE | re.DOTALL)


def commands(page: pathlib.Path) -> list[list[str]]:
    """The arguments of each `python -m MODULE ...` on the page, from MODULE on."""
    found = []
    for language, text in blocks(page):
        if language in ("python", "json", "mermaid"):
            continue
        for line in text.replace("\\\n", " ").splitlines():
            match = re.search(r"python -m ((?:jaxtrain\.main|tools\.\w+).*)", line)
            if match:
                words = shlex.split(match[1], comments=True)
                ends = [words.index(word) for word in (">", "&&", "&") if word in words]
                found.append(words[: min(ends, default=None)])
    return found


def examples(page: pathlib.Path, folder: pathlib.Path) -> None:
    """Writes the page's Python blocks that are configs, with the names that the page gives them."""
    for language, text in blocks(page):
        if language == "python" and "def get_config" in text:
            (folder / "mine.py").write_text(text)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_command_is_understood(
    page: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    examples(page, tmp_path)
    for module, *arguments in commands(page):
        if module == "tools.bench":
            continue  # has its own commands: tests/tools
        package = ROOT / module.replace(".", "/")
        command = importlib.import_module(f"{module}.__main__" if package.is_dir() else module).COMMAND
        if "--help" in arguments:
            arguments.remove("--help")
        arguments = [word.replace("=mine.py", f"={tmp_path}/mine.py") for word in arguments if word != "..."]
        flags = cli.parse_flags(command, arguments)
        file = (flags.config or "").partition(":")[0] if command.config != "none" else ""
        if file and (ROOT / file).exists():
            monkeypatch.chdir(ROOT)
            flags.load_config()


@pytest.mark.nightly
@pytest.mark.parametrize("page", ["stream_fineweb", "your_data", "your_model", "pretokenize"])
def test_a_tutorial_runs_as_it_is_written(page: str, tmp_path: pathlib.Path) -> None:
    path = ROOT / "docs" / "tutorials" / f"{page}.md"
    examples(path, tmp_path)
    for name in ("configs", "examples", "docs", "tools", "README.md"):
        (tmp_path / name).symlink_to(ROOT / name)
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    ran = 0
    for module, *arguments in commands(path):
        config = next((word for word in arguments if word.startswith("--config=")), "")
        if config and not any(name in config for name in LOCAL):
            continue
        if "--at_step=120" in arguments:
            arguments[arguments.index("--at_step=120")] = "--at_step=2"
        if config and "--help" not in arguments:
            arguments += [word for word in SMALL if "gpt2" not in config or "tokenizer" not in word]
        done = subprocess.run(
            [sys.executable, "-m", module, *arguments],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=900,
            check=False,
        )
        assert done.returncode == 0, f"{module} {arguments}\n{done.stdout}\n{done.stderr}"
        ran += 1
    assert ran


def test_troubleshooting_quotes_messages_that_exist() -> None:
    sources = [path.read_text() for folder in ("jaxtrain", "tools") for path in (ROOT / folder).rglob("*.py")]
    literals = [re.sub(r'"\s*\n\s*f?"|\{[^{}]*\}', "", text) for text in sources]
    before_slow = (ROOT / "docs" / "troubleshooting.md").read_text().partition("## Slow")[0]
    cells = re.findall(r"^\| (.*?) \|", before_slow, re.MULTILINE)
    quoted = [phrase for cell in cells for phrase in re.findall(r"`([^`]+)`", cell)]
    assert len(quoted) > 20
    missing = [phrase for phrase in quoted if not any(phrase in text for text in literals)]
    assert not missing


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120
