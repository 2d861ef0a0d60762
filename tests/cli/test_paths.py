"""Where a command's files go by default."""

import os
import pathlib
import types

import pytest

from jaxtrain.cli import Flags, shared


@pytest.mark.parametrize(
    ("spec", "folder"),
    [
        ("configs/1b.py", "1b"),
        ("configs/pretrain.py:small", "pretrain-small"),
        ("x.py:a/b", "x-a_b"),
        ("80m.py:https://me:secret@example.org/s-{0..9}.tar?token=secret", "80m-https:__example.org_s-{0..9}.tar"),
    ],
)
def test_the_default_work_directory_holds_no_secret(spec: str, folder: str):
    assert shared.default_workdir(spec) == os.path.join("runs", folder)


def test_progress_bars_of_the_hubs_client_stay_off_logs(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path):
    name = "HF_HUB_DISABLE_PROGRESS_BARS"
    for terminal in (True, False):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("HF_DATASETS_DISABLE_PROGRESS_BARS", "0")
        monkeypatch.setenv("HF_HOME", str(tmp_path))
        monkeypatch.setattr(shared.sys, "stderr", types.SimpleNamespace(isatty=lambda shown=terminal: shown))
        assert shared.workdir_of(Flags(workdir=str(tmp_path))) == str(tmp_path)
        assert os.environ.get(name) == (None if terminal else "1")
    assert os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] == "0"  # what the user says counts
