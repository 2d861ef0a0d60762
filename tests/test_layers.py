"""The architecture: imports between folders point down a list of layers, and libraries stay behind their fences."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# A folder or file may import those listed before it. Imports within a folder are free.
ORDER = (
    "errors",
    "interfaces",
    "cli",
    "distributed",
    "plan",
    "tokenizers",
    "losses",
    "data",
    "model",
    "optim",
    "checkpoint",
    "metrics",
    "hf",
    "distill",
    "cost",
    "config",
    "trainer",
    "main",
    "tools/",
)
# Library -> folders or files under the root that may import it.
FENCES = {
    "absl": ("jaxtrain/cli/", "jaxtrain/main.py", "tools/"),
    "array_record": ("jaxtrain/data/",),
    "datasets": ("jaxtrain/data/", "tools/bench/plain.py"),  # the latter benchmarks it for comparison
    "fastokens": ("jaxtrain/tokenizers/engine.py",),
    "ml_collections": ("jaxtrain/cli/", "jaxtrain/main.py", "tools/"),
    "orbax": ("jaxtrain/checkpoint/",),
    "safetensors": ("jaxtrain/hf/",),
    "tensorflow_datasets": ("jaxtrain/data/",),
}
# Code that reports a user error before any slow import, or that depends on the config alone.
WITHOUT_JAX = (
    "jaxtrain/errors.py",
    "jaxtrain/interfaces.py",
    "jaxtrain/cli/",
    "jaxtrain/plan/",
    "jaxtrain/cost/hardware.py",
)

CODE = ("jaxtrain", "tools", "configs")
TEXT = (*CODE, "launch", "tests", "docs", ".ci", ".github", "benchmarks")
# Folders of the author's machine. Allowed in a URL or after a variable.
MACHINE_PATH = re.compile(rf"(?<![\w.~}}*-])/(?:{'|'.join(('work', 'root', 'venvs'))})/".encode())
LAUNCH_IMPORT = re.compile(r"\b(?:from|import)\s+jaxtrain\b")


def problems(root: Path) -> list[str]:
    """All violations in the tree below `root`, one line each."""
    found = [line for path in python_files(root, CODE) for line in code_problems(root, path)]
    found += [
        f"{name_of(root, path)}: launch/ starts commands and imports nothing"
        for path in text_files(root, ("launch",))
        if LAUNCH_IMPORT.search(path.read_text())
    ]
    found += [
        f"{name_of(root, path)}: {match[0].decode()} is a folder of one machine"
        for path in [
            *text_files(root, TEXT),
            *(path for path in root.glob("*") if path.is_file() and path.name != ".git"),
        ]
        if (match := MACHINE_PATH.search(path.read_bytes()))
    ]
    return found


def code_problems(root: Path, path: Path) -> Iterator[str]:
    name, tree = name_of(root, path), ast.parse(path.read_text())
    for line, imported in imports(tree):
        if problem := layer_problem(name, imported) or fence_problem(name, imported):
            yield f"{name}:{line}: {problem}"
    if any(map(is_dataclass, ast.walk(tree))) and "__future__.annotations" in {
        imported for _, imported in imports(tree)
    }:
        yield f"{name}: overrides need the real annotations of dataclasses: no `from __future__ import annotations`"


def layer_problem(name: str, imported: str) -> str | None:
    """The violation, if any, of the file `name` importing the dotted name `imported`."""
    importer, module = layer_of_file(name), layer_of_import(imported)
    if importer is None or module is None or module == importer:
        return None
    for layer in (importer, module):
        if layer not in ORDER:
            return f"{layer} has no place in ORDER of tests/test_layers.py"
    if ORDER.index(module) > ORDER.index(importer):
        return f"{importer} imports {module}, which is above it: imports point down"
    return None


def fence_problem(name: str, imported: str) -> str | None:
    library = imported.split(".")[0]
    if not name.startswith(FENCES.get(library, ("",))):
        return f"{library} belongs to {', '.join(FENCES[library])}"
    if library in ("jax", "jaxlib", "flax", "optax") and name.startswith(WITHOUT_JAX):
        return f"imports {library}, and is used where JAX is not"
    return None


def imports(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of all imports at any depth; `from a import b` gives a.b, because b may be a module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import"
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def layer_of_file(name: str) -> str | None:
    """jaxtrain/data/lanes.py -> data, tools/evaluate.py and configs/1b.py -> tools/.

    None for jaxtrain/__init__.py, the public API, which nothing in the package imports.
    """
    first, *rest = name.removesuffix(".py").split("/")
    if first != "jaxtrain":
        return "tools/"
    return None if rest == ["__init__"] else rest[0]


def layer_of_import(imported: str) -> str | None:
    """Like layer_of_file, for a dotted name; None if it is not part of this project."""
    first, *rest = imported.split(".")
    if first in ("tools", "configs"):
        return "tools/"
    return rest[0] if first == "jaxtrain" and rest else None


def is_dataclass(node: ast.AST) -> bool:
    decorators = node.decorator_list if isinstance(node, ast.ClassDef) else []
    return any(re.match(r"(dataclasses\.)?dataclass\b", ast.unparse(decorator)) for decorator in decorators)


def name_of(root: Path, path: Path) -> str:
    return path.relative_to(root).as_posix()


def python_files(root: Path, folders: tuple[str, ...]) -> list[Path]:
    return sorted(path for folder in folders for path in (root / folder).glob("**/*.py"))


def text_files(root: Path, folders: tuple[str, ...]) -> list[Path]:
    files = [path for folder in folders for path in (root / folder).glob("**/*") if "__pycache__" not in path.parts]
    return sorted(path for path in files if path.is_file())


def test_the_tree_keeps_the_rules():
    assert not problems(ROOT)


def test_every_place_in_the_order_is_used():
    names = {layer_of_file(name_of(ROOT, path)) for path in python_files(ROOT, CODE)}
    assert names - {None} == set(ORDER)


@pytest.mark.parametrize(
    ("file", "text", "said"),
    [
        ("jaxtrain/cli/tree.py", "import jaxtrain.plan", r"tree.py:1: cli imports plan, which is above it"),
        ("jaxtrain/data/lanes.py", "from jaxtrain import config", r"data imports config"),
        (
            "jaxtrain/optim/a.py",
            "def f():\n  if x:\n    from jaxtrain.trainer.step import g",
            r"a.py:3: .* imports trainer",
        ),
        ("jaxtrain/model/llama.py", "from jaxtrain.optim.adamw import x", "model imports optim"),
        ("jaxtrain/data/feed.py", "import jaxtrain.metrics.writers", r"data imports metrics"),
        ("jaxtrain/trainer/loop.py", "import jaxtrain.main", "imports main"),
        ("jaxtrain/new.py", "import jaxtrain.errors", "new has no place"),
        ("jaxtrain/trainer/loop.py", "import jaxtrain.new", "new has no place"),
        ("jaxtrain/trainer/loop.py", "import tools.bench", "trainer imports tools/"),
        ("jaxtrain/trainer/evaluate.py", "from configs import _base", "trainer imports tools/"),
        ("jaxtrain/trainer/loop.py", "import orbax.checkpoint as ocp", "orbax belongs to jaxtrain/checkpoint"),
        ("jaxtrain/model/llama.py", "from datasets import load_dataset", "datasets belongs to jaxtrain/data/"),
        ("tools/pretokenize.py", "import array_record", "array_record belongs to"),
        ("jaxtrain/model/generate.py", "from safetensors.numpy import x", "safetensors belongs to jaxtrain/hf"),
        ("jaxtrain/trainer/loop.py", "from absl import logging", "absl belongs to"),
        ("jaxtrain/plan/build.py", "import jax.numpy as jnp", "imports jax, and is used where JAX is not"),
        ("jaxtrain/plan/schedules.py", "import optax", "imports optax"),
        (
            "jaxtrain/config.py",
            "from __future__ import annotations\n@dataclasses.dataclass(kw_only=True)\nclass A: pass",
            "config.py: overrides need the real annotations",
        ),
        ("launch/run.sh", "python -c 'import jaxtrain'", "launch/run.sh: launch/ starts commands"),
        ("docs/a.md", f"cd /{'work'}/main", "docs/a.md: .work. is a folder of one machine"),
        ("tests/a.py", f"'/{'root'}/x'", "tests/a.py: .root. is a folder"),
        ("README.md", f"(/{'venvs'}/a)", "README.md: .venvs. is"),
    ],
)
def test_a_broken_rule_is_found(tmp_path, file, text, said):
    path = tmp_path / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    (found,) = problems(tmp_path)
    assert re.search(said, found)


def test_what_is_allowed_is_not_found(tmp_path):
    allowed = {
        "jaxtrain/__init__.py": "from jaxtrain.trainer import loop\n",
        "jaxtrain/trainer/loop.py": "import jax\nimport jaxtrain\nimport jaxtrain.config\nfrom jaxtrain import plan\n",
        "jaxtrain/data/sources/web.py": "import datasets\nfrom jaxtrain.data.io import retry\n",
        "jaxtrain/cli/files.py": "from absl import flags\nfrom jaxtrain.errors import UserError\n",
        "jaxtrain/checkpoint/integrity.py": "from __future__ import annotations\nimport orbax.checkpoint\n",
        "jaxtrain/metrics/monitor.py": "from jaxtrain.checkpoint import workdir\n",
        "tools/bench.py": "from tools import report\nfrom jaxtrain.trainer import evaluate\nfrom absl import flags\n",
        "configs/1b.py": "from configs import _base\nfrom jaxtrain import config\n",
        "launch/local.sh": "python -m jaxtrain.main --config=configs/1b.py",
        "docs/a.md": "gs://bucket/work/x, frame/work/, $HOME/work/, ~/root/",
    }
    for file, text in allowed.items():
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text(text)
    assert not problems(tmp_path)
