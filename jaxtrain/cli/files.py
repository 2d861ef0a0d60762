"""Config files: Python files with a `get_config(arg='')`, loaded by path."""

import contextlib
import difflib
import inspect
import re
import sys
import traceback
import types
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from jaxtrain.cli import tree, typed
from jaxtrain.errors import UserError


def load(spec: str, overrides: Sequence[str] = ()) -> Any:
    """Loads the config of a file, applies `--config.a.b=value` overrides, and checks it.

    Files share code by `from configs._base import ...` from any working directory: the parent of the config file's
    folder is importable.

    Args:
        spec: "configs/1b.py", or "configs/pretrain.py:tiny", which passes "tiny" to `get_config`.
        overrides: Complete arguments.

    Returns:
        The config.

    Raises:
        UserError: The config cannot be loaded or is invalid. The message has the cause and the fix.
    """
    tree.parse_overrides(overrides)  # checks their form before running the file, which may import JAX
    match = re.match(r"(.*?\.py)(?::(.*))?$", spec, re.DOTALL)
    if match is None:
        raise UserError(
            f"--config={spec}: wants a Python file, for example --config=configs/1b.py or configs/1b.py:ARG"
        )
    path = Path(match[1])
    if not path.is_file():
        raise UserError(f"--config={spec}: there is no file {path}{_near_files(path)}")
    config = _call(run_file(path), path, match[2])
    tree.check_types(config)
    config = tree.override(config, overrides)
    tree.check(config)
    return config


def _near_files(path: Path) -> str:
    if not path.parent.is_dir():
        return f" (there is no folder {path.parent} either; the current one is {Path.cwd()})"
    files = sorted(file.name for file in path.parent.glob("*.py") if not file.name.startswith("_"))
    near = [name for name in files if name.startswith(path.stem)]
    near = near or difflib.get_close_matches(path.name, files) or files
    return (
        f"; near it: {', '.join(str(path.parent / file) for file in near)}"
        if near
        else f"; {path.parent} has no configs"
    )


def run_file(path: Path) -> types.ModuleType:
    """Executes a file as the module `<folder>.<stem>`, which worker processes can import to unpickle its classes.

    Not by `importlib`: cached bytecode compares whole seconds, so a file edited within one would be stale.
    """
    folder = path.resolve().parent
    module = types.ModuleType(f"{folder.name}.{path.stem}")
    module.__file__ = str(path.resolve())
    _forget_other_folders(folder)
    sys.modules[module.__name__] = module
    with _importable(folder.parent), _errors_in(path, "cannot be loaded"):
        exec(compile(path.read_bytes(), module.__file__, "exec"), module.__dict__)
    return module


def _forget_other_folders(folder: Path) -> None:
    """Drops the modules of another folder of the same name that this process loaded earlier."""
    if getattr(sys.modules.get(folder.name), "__file__", None) is not None:
        return  # a package with an __init__.py, not a folder of configs
    sys.modules.pop(folder.name, None)
    for name, module in sys.modules.copy().items():  # an atomic copy, since other threads may import
        file = getattr(module, "__file__", None)
        if name.startswith(f"{folder.name}.") and file and folder not in Path(file).parents:
            del sys.modules[name]


@contextlib.contextmanager
def _importable(root: Path) -> Iterator[None]:
    """Puts a folder first on the import path, then last, for imports in functions and worker processes."""
    sys.path.insert(0, str(root))
    try:
        yield
    finally:
        sys.path.remove(str(root))
        if str(root) not in sys.path:
            sys.path.append(str(root))


def _call(module: types.ModuleType, path: Path, argument: str | None) -> Any:
    get_config = getattr(module, "get_config", None)
    if not callable(get_config):
        raise UserError(f"{path} has no function get_config(arg='') that returns the config")
    arguments = () if argument is None else (argument,)
    try:
        inspect.signature(get_config).bind(*arguments)
    except TypeError:
        problem = "needs an argument: {}:ARG" if argument is None else "takes no argument: write {} without ':ARG'"
        raise UserError(f"{path}: get_config {problem.format(path)}") from None
    called = "get_config()" if argument is None else f"get_config({argument!r})"
    with _importable(path.resolve().parent.parent), _errors_in(path, f"{called} failed"):
        config = get_config(*arguments)
    if not typed.is_config(config):
        raise UserError(f"{path}: {called} returned {config!r:.80}; it must return the config, a dataclass instance")
    return config


@contextlib.contextmanager
def _errors_in(path: Path, problem: str) -> Iterator[None]:
    """Turns an exception of the config file into one message with the file's line."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    except SyntaxError as error:
        raise UserError(f"{error.filename}:{error.lineno}: {error.msg}: {(error.text or '').strip()}") from error
    except Exception as error:
        folder = path.resolve().parent
        frames = [
            frame for frame in traceback.extract_tb(error.__traceback__) if folder in Path(frame.filename).parents
        ]
        at = f"{frames[-1].filename}:{frames[-1].lineno}: {frames[-1].line}" if frames else str(path)
        raise UserError(f"{path} {problem}: {type(error).__name__}: {error}\n  {at}") from error
