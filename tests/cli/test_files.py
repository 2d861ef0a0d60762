import concurrent.futures
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

import pytest

from jaxtrain import cli
from jaxtrain.errors import UserError

ROOT = Path(__file__).parents[2]
BASE = "from tests.cli.example import *\ndef base(): return example_config()\n"
SIMPLE = """from configs._base import base
def get_config(arg=''):
    config = base()
    config.init_from = arg or None
    return config
"""


@pytest.fixture
def configs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder `configs` with a shared file; the import path is restored afterwards."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    folder = tmp_path / "configs"
    folder.mkdir()
    (folder / "_base.py").write_text(BASE)
    return folder


def write(folder: Path, text: str, name: str = "1b.py") -> str:
    (folder / name).write_text(text)
    return str(folder / name)


def test_load_applies_the_argument_and_the_overrides(configs: Path):
    spec = write(configs, SIMPLE)
    assert cli.load(spec).init_from is None
    assert cli.load(f"{spec}:https://host/{{0..9}}.tar:x").init_from == "https://host/{0..9}.tar:x"
    config = cli.load(f"{spec}:a", ["--config.seed=4", "--config.stages[0].seq_len=64"])
    assert (config.init_from, config.seed, config.stages[0].seq_len) == ("a", 4, 64)


def test_a_relative_path_from_another_folder(configs: Path, monkeypatch: pytest.MonkeyPatch):
    write(configs, SIMPLE)
    monkeypatch.chdir(configs)
    assert cli.load("1b.py:x").init_from == "x"
    monkeypatch.chdir(configs.parent)
    assert cli.load("configs/1b.py:x").init_from == "x"


def test_two_folders_of_the_same_name_do_not_mix(configs: Path, tmp_path: Path):
    other = tmp_path / "elsewhere" / "configs"
    other.mkdir(parents=True)
    (other / "_base.py").write_text(BASE.replace("example_config()", "Config(seed=77)"))
    for text in (
        SIMPLE,
        SIMPLE.replace("from configs._base import base", "from configs import _base; base = _base.base"),
    ):
        here, there = write(configs, text), write(other, text)
        assert [cli.load(spec).seed for spec in (here, there, here, there)] == [0, 77, 0, 77]


def test_an_edited_file_is_read_again(configs: Path):
    spec = write(configs, SIMPLE)
    cli.load(spec)
    write(configs, SIMPLE.replace("base()", "Config(seed=9)").replace("_base import base", "_base import *"))
    assert cli.load(spec).seed == 9
    assert not list(configs.glob("__pycache__/1b*"))


def _threshold(transform: object) -> tuple[str, int]:
    return type(transform).__module__, vars(transform)["threshold"]


def test_classes_of_a_config_file_reach_worker_processes(configs: Path):
    mine = """
import dataclasses
from configs._shared import *
@dataclasses.dataclass(kw_only=True)
class Mine(MinScore):
    threshold: int = 8
def get_config(arg=''):
    config = base()
    config.data.sources['web'].transforms = (Mine(),)
    return config
"""
    # Not the names of the project's own configs, which the workers would find first.
    write(configs, BASE, "_shared.py")
    transform = cli.load(write(configs, mine, "9x.py")).data.sources["web"].transforms[0]
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        assert pool.submit(_threshold, transform).result() == ("configs.9x", 8)


def test_running_outside_the_repository(configs: Path, tmp_path: Path):
    """The repository's folder is importable (installed); the current folder is another one with its own `configs`."""
    elsewhere = tmp_path / "cwd"
    (elsewhere / "configs").mkdir(parents=True)
    (elsewhere / "configs" / "_base.py").write_text("raise RuntimeError('the wrong _base')")
    code = """
import sys
from jaxtrain import cli
print(cli.load(sys.argv[1]).init_from, 'jax' in sys.modules)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, write(configs, SIMPLE) + ":x"],
        cwd=elsewhere,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.stdout, done.stderr) == ("x False\n", "")


@pytest.mark.parametrize(
    ("text", "suffix", "parts"),
    [
        ("x = 1\n", "", ["no function get_config(arg='')"]),
        (
            "def get_config(arg=''):\n    return undefined\n",
            "",
            ["1b.py:2: return undefined", "NameError", "get_config()"],
        ),
        ("import missing_thing\n", "", ["1b.py:1: import missing_thing", "ModuleNotFoundError"]),
        ("def get_config(:\n", "", ["1b.py:1: invalid syntax", "def get_config(:"]),
        ("from configs._base import nothing\n", "", ["ImportError", "1b.py:1"]),
        (
            "S = {'a': 1}\ndef get_config(arg):\n    return S[arg]\n",
            ":b",
            ["get_config('b') failed: KeyError: 'b'", "1b.py:3"],
        ),
        ("def get_config(arg):\n    return arg\n", "", ["needs an argument", "1b.py:ARG"]),
        ("def get_config():\n    return 1\n", ":x", ["takes no argument"]),
        ("def get_config():\n    return {'seed': 1}\n", "", ["returned {'seed': 1}", "a dataclass instance"]),
        (
            "from jaxtrain.errors import *\ndef get_config(arg):\n    raise UserError(f'no {arg}: tiny, big')\n",
            ":huge",
            ["1b.py: no huge: tiny, big"],
        ),
        (
            "from configs._base import *\ndef get_config():\n    return Config(seed='1')\n",
            "",
            ["config.seed='1': wants int"],
        ),
        (
            "from configs._base import *\ndef get_config():\n    c = Config()\n    c.sed = 1\n    return c\n",
            "",
            ["no field 'sed'; did you mean seed"],
        ),
    ],
)
def test_faults_of_the_file_name_file_and_line(configs: Path, text: str, suffix: str, parts: list[str]):
    with pytest.raises(UserError) as caught:
        cli.load(write(configs, text) + suffix, ["--config.seed=1"])
    for part in parts:
        assert part in str(caught.value)


def test_an_error_in_a_shared_file_names_that_file(configs: Path):
    (configs / "_base.py").write_text("def base():\n    return 1 / 0\n")
    with pytest.raises(UserError, match=r"_base\.py:2: return 1 / 0"):
        cli.load(write(configs, SIMPLE))


def test_a_missing_file_names_the_near_ones(configs: Path):
    write(configs, SIMPLE, "quickstart.py")
    write(configs, SIMPLE, "80m.py")
    with pytest.raises(UserError, match=r"there is no file .*quikstart\.py; near it: \S*configs/quickstart\.py$"):
        cli.load(str(configs / "quikstart.py"))
    with pytest.raises(UserError, match=r"near it: \S*80m\.py, \S*quickstart\.py$"):
        cli.load(str(configs / "zzzzz.py"))
    with pytest.raises(UserError, match=r"there is no folder"):
        cli.load(str(configs / "deeper" / "1b.py"))
    with pytest.raises(UserError, match=r"wants a Python file, for example"):
        cli.load("1b")


def test_a_badly_formed_override_is_refused_before_the_file_runs(configs: Path):
    with pytest.raises(UserError, match=r"--config\.FIELD=VALUE"):
        cli.load(write(configs, "raise RuntimeError"), ["--config.seed"])
