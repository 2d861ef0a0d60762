"""The layers: imports point down, libraries stay behind their fences, files and functions stay short.

A new module gets a rank below, or is named as a part of one that has. Where two modules of one rank need each other,
first ask whether one of them belongs lower; if not, name the pair with its reason.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# A module may import those of lower ranks. A package counts as one module, and imports freely within itself.
RANKS = {
    "__init__": 0,
    "garbage": 0,
    "hardware": 0,
    "interfaces": 0,
    "keys": 0,
    "mixing": 0,
    "places": 0,
    "recipe": 0,
    "redaction": 0,
    "fingerprint": 1,
    "losses": 1,
    "plan": 1,
    "sharding": 1,
    "tokenizers": 1,
    "agreement": 2,
    "checkpoint": 2,
    "data": 2,
    "model": 2,
    "monitor": 2,
    "optim": 2,
    "workdir": 2,
    "hf": 3,
    "state": 3,
    "generate": 4,
    "step": 4,
    "teacher": 4,
    "evaluate": 5,
    "config": 6,
    "configs/": 7,
    "tools/": 7,
    "train": 7,
    "main": 8,
}
# Files split off for length: they count as the module that they are a part of.
PARTS = {
    "checkpoint_s3": "checkpoint",
    "compiled": "step",
    "scoring": "generate",
    "dryrun": "train",
    "file_list": "checkpoint",
    "inputs": "config",
    "memory": "step",
    "processes": "train",
    "resume": "config",
    "save_errors": "checkpoint",
    "setup": "train",
    "watchdog": "monitor",
    "writers": "monitor",
}
SAME_RANK = {
    ("mixing", "interfaces"): "interfaces is the vocabulary of all",
    ("mixing", "keys"): "keys is the only source of randomness",
    ("recipe", "interfaces"): "interfaces is the vocabulary of all",
    ("places", "redaction"): "a folder's name must hold no secret of a URL",
    ("recipe", "redaction"): "what a command prints of an error must hold no secret",
    ("losses", "sharding"): "the head is gathered once before the scan over chunks, which needs the mesh's axes",
    ("checkpoint", "agreement"): "processes agree on the step to save; monitor and train need the agreement too",
    ("tools/", "train"): "a benchmark measures whole runs",
    ("monitor", "workdir"): "one place knows the work directory's layout, local or remote",
}
# Library → where it may be imported, as folders or files under the root.
FENCES = {
    "absl": ("jaxtrain/recipe", "jaxtrain/main.py", "tools/"),
    "array_record": ("jaxtrain/data/",),
    "datasets": ("jaxtrain/data/", "tools/benches/plain.py"),  # the latter measures it for comparison
    "ml_collections": ("jaxtrain/recipe", "jaxtrain/main.py", "tools/"),
    "orbax": ("jaxtrain/checkpoint",),
    "safetensors": ("jaxtrain/hf",),
    "tensorflow_datasets": ("jaxtrain/data/",),
}
# What tells a user's mistake before any slow import, and what follows from the config alone.
WITHOUT_JAX = (
    "jaxtrain/hardware.py",
    "jaxtrain/interfaces.py",
    "jaxtrain/keys.py",
    "jaxtrain/mixing.py",
    "jaxtrain/optim/schedules.py",
    "jaxtrain/places.py",
    "jaxtrain/plan/",
    "jaxtrain/recipe/",
    "jaxtrain/redaction.py",
)
MAX_FILE, MAX_FUNCTION = 400, 60  # lines
# Files, or file:function, that splitting would hurt, with the reason.
LONG: dict[str, str] = {}

CODE = ("jaxtrain", "tools", "configs")
TEXT = (*CODE, "launch", "tests", "docs", ".ci", ".github", "benchmarks")
# Folders of the machine that a file was written on. Not in a URL or after a variable.
MACHINE_PATH = re.compile(rf"(?<![\w.~}}*-])/(?:{'|'.join(('work', 'root', 'venvs'))})/".encode())
LAUNCH_IMPORT = re.compile(r"\b(?:from|import)\s+jaxtrain\b")


def problems(root: Path) -> list[str]:
    """Everything that breaks a rule in the tree below `root`, one line each."""
    found = [line for path in python_files(root, CODE) for line in code_problems(root, path)]
    found += [
        f"{name_of(root, path)}: launch/ starts commands and imports nothing"
        for path in text_files(root, ("launch",))
        if LAUNCH_IMPORT.search(path.read_text())
    ]
    found += [
        f"{name_of(root, path)}: {match[0].decode()} is a folder of one machine"
        for path in [*text_files(root, TEXT), *filter(Path.is_file, root.glob("*"))]
        if (match := MACHINE_PATH.search(path.read_bytes()))
    ]
    return found


def code_problems(root: Path, path: Path) -> Iterator[str]:
    name, text = name_of(root, path), path.read_text()
    tree = ast.parse(text)
    for line, imported in imports(tree):
        if problem := layer_problem(name, imported) or fence_problem(name, imported):
            yield f"{name}:{line}: {problem}"
    if any(map(is_dataclass, ast.walk(tree))) and "__future__.annotations" in {
        imported for _, imported in imports(tree)
    }:
        yield f"{name}: overrides need the real annotations of dataclasses: no `from __future__ import annotations`"
    if text.count("\n") > MAX_FILE and name not in LONG and not name.startswith("configs/"):
        yield f"{name}: {text.count(chr(10))} lines, more than {MAX_FILE}"
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or 0) - node.lineno + 1
            if length > MAX_FUNCTION and f"{name}:{node.name}" not in LONG:
                yield f"{name}:{node.lineno}: {node.name} has {length} lines, more than {MAX_FUNCTION}"


def layer_problem(name: str, imported: str) -> str | None:
    """name: the importing file; imported: dotted name."""
    importer, module = module_of(name), imported_module(imported)
    if importer not in RANKS:
        return f"{importer} has no rank in tests/test_layers.py"
    if module is None or module == importer:
        return None
    if module not in RANKS:
        return f"{module} has no rank in tests/test_layers.py"
    ranks = f"{importer} (rank {RANKS[importer]}) imports {module} (rank {RANKS[module]})"
    if RANKS[module] > RANKS[importer]:
        return f"{ranks}: imports point down"
    if RANKS[module] == RANKS[importer] and (importer, module) not in SAME_RANK:
        return f"{ranks}: not one of the named pairs of one rank"
    return None


def fence_problem(name: str, imported: str) -> str | None:
    library = imported.split(".")[0]
    if not name.startswith(FENCES.get(library, ("",))):
        return f"{library} belongs to {', '.join(FENCES[library])}"
    if library in ("jax", "jaxlib", "flax", "optax") and name.startswith(WITHOUT_JAX):
        return f"imports {library}, and is used where JAX is not"
    return None


def imports(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of all imports, at any depth; `from a import b` is a.b, since b may be a module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import"
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def module_of(name: str) -> str:
    """jaxtrain/data/lanes.py → data, jaxtrain/writers.py → monitor, tools/bench.py → tools/."""
    first, *rest = name.removesuffix(".py").split("/")
    return PARTS.get(rest[0], rest[0]) if first == "jaxtrain" else f"{first}/"


def imported_module(imported: str) -> str | None:
    """As module_of, for a dotted name; None for what is not of this project."""
    first, *rest = imported.split(".")
    if first in ("tools", "configs"):
        return f"{first}/"
    return PARTS.get(rest[0], rest[0]) if first == "jaxtrain" and rest else None


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


def test_no_exception_is_left_over():
    used = set()
    for path in python_files(ROOT, CODE):
        importer = module_of(name_of(ROOT, path))
        used |= {(importer, imported_module(imported)) for _, imported in imports(ast.parse(path.read_text()))}
    assert set(SAME_RANK) <= used
    for entry in LONG:
        assert (ROOT / entry.split(":")[0]).exists()


@pytest.mark.parametrize(
    ("file", "text", "said"),
    [
        ("jaxtrain/keys.py", "import jaxtrain.plan", r"keys.py:1: keys \(rank 0\) imports plan \(rank 1\): imports p"),
        ("jaxtrain/data/lanes.py", "from jaxtrain import config", r"data \(rank 2\) imports config"),
        ("jaxtrain/optim/a.py", "def f():\n  if x:\n    from jaxtrain.step import g", r"optim/a.py:3: .* imports step"),
        ("jaxtrain/optim/adamw.py", "from jaxtrain.model.llama import x", "not one of the named pairs"),
        ("jaxtrain/data/feed.py", "import jaxtrain.writers", r"data \(rank 2\) imports monitor \(rank 2\)"),
        ("jaxtrain/train.py", "import jaxtrain.main", "imports main"),
        ("jaxtrain/new.py", "import math", "new has no rank"),
        ("jaxtrain/train.py", "import jaxtrain.new", "new has no rank"),
        ("jaxtrain/train.py", "import tools.bench", r"train \(rank 7\) imports tools/ \(rank 7\): not one"),
        ("jaxtrain/evaluate.py", "from configs import _base", "imports configs/"),
        ("tools/bench.py", "import jaxtrain.main", "imports main"),
        ("configs/1b.py", "from jaxtrain.train import x", "configs/ .* imports train"),
        ("jaxtrain/train.py", "import orbax.checkpoint as ocp", "orbax belongs to jaxtrain/checkpoint"),
        ("jaxtrain/model/llama.py", "from datasets import load_dataset", "datasets belongs to jaxtrain/data/"),
        ("tools/pretokenize.py", "import array_record", "array_record belongs to"),
        ("jaxtrain/generate.py", "from safetensors.numpy import x", "safetensors belongs to jaxtrain/hf"),
        ("jaxtrain/train.py", "from absl import logging", "absl belongs to"),
        ("jaxtrain/plan/build.py", "import jax.numpy as jnp", "imports jax, and is used where JAX is not"),
        ("jaxtrain/optim/schedules.py", "import optax", "imports optax"),
        ("jaxtrain/train.py", "x = 1\n" * 401, "train.py: 401 lines, more than 400"),
        ("tools/bench.py", "def f():\n" + "  x = 1\n" * 60, "bench.py:1: f has 61 lines, more than 60"),
        ("jaxtrain/state.py", "class A:\n  async def f():\n" + "    x = 1\n" * 60, "state.py:2: f has 61 lines"),
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
        "jaxtrain/train.py": "import jax\nimport jaxtrain\nimport jaxtrain.config\nfrom jaxtrain import keys, plan\n",
        "jaxtrain/data/sources/web.py": "import datasets\nfrom jaxtrain.data import faults\n",
        "jaxtrain/recipe/files.py": "from absl import flags\nfrom jaxtrain.interfaces import UserError\n",
        "jaxtrain/checkpoint.py": "from __future__ import annotations\nimport orbax.checkpoint\n",
        "jaxtrain/monitor.py": "from jaxtrain import workdir, writers\n",
        "tools/bench.py": "from tools import report\nfrom jaxtrain import evaluate\nfrom absl import flags\n",
        "configs/1b.py": "from configs import _base\nfrom jaxtrain import config\n" + "x = 1\n" * 500,
        "launch/local.sh": "python -m jaxtrain.main --config=configs/1b.py",
        "docs/a.md": "gs://bucket/work/x, frame/work/, $HOME/work/, ~/root/",
        "jaxtrain/state.py": "def f():\n" + "  x = 1\n" * 59,
    }
    for file, text in allowed.items():
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text(text)
    assert not problems(tmp_path)
