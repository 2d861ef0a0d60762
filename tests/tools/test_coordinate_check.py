"""The coordinate check: flat with width transfer, and not without."""

import math

import pytest

from jaxtrain import cli
from tools.coordinate_check import __main__ as coordinate_check
from tools.coordinate_check import widths


def run(line: str) -> int:
    return cli.exit_code(coordinate_check.main, coordinate_check.COMMAND, line.split())


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["AdamW", "Lion", "Muon"])
def test_flat_with_width_transfer_and_not_without(optimizer, capsys):
    line = f"--optimizer={optimizer} --widths=64,256"
    assert run(line) == 0
    assert "flat." in capsys.readouterr().out
    assert run(f"{line} --width_transfer=none") == 1
    assert "NOT FLAT" in capsys.readouterr().out


def test_what_is_worst():
    moves = {64: [{"logits": 0.0}, {"logits": 2.0}], 128: [{"logits": 0.0}, {"logits": 3.0}]}
    assert widths.worst(moves) == {"logits": 1.5}
    assert widths.table(moves, {"logits": 1.5})[1].split() == ["logits", "2", "2.0000", "3.0000", "1.50"]
    moves[64][0]["logits"] = 1.0
    assert widths.worst(moves) == {"logits": math.inf}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--widths=64", "two or more multiples of 8"),
        ("--steps=0", "--steps=0"),
        ("--optimizer=SGD", "choose AdamW or Muon"),
    ],
)
def test_wrong_flags(line, message, capsys):
    assert run(line) == 2
    assert message in capsys.readouterr().err
