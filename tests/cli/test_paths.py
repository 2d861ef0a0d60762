"""Where a command's files go by default."""

import os

import pytest

from jaxtrain.cli import shared


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
