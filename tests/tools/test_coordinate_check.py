"""The coordinate check: flat with width transfer, and not without."""

import pytest

from jaxtrain import cli
from tools.coordinate_check import __main__ as coordinate_check


def run(line: str) -> int:
    return cli.exit_code(coordinate_check.main, coordinate_check.COMMAND, line.split())


def test_flat_with_width_transfer_and_not_without(capsys):
    line = "--widths=32,128 --steps=3"
    assert run(line) == 0
    output = capsys.readouterr().out
    assert "flat." in output
    assert [text.split()[0] for text in output.splitlines()[1:-2:2]] == ["layer", "logits", "layer"]
    assert run(f"{line} --width_transfer=none") == 1
    assert "NOT FLAT" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["AdamW", "Lion", "Muon"])
def test_over_ten_steps(optimizer):
    line = f"--optimizer={optimizer} --widths=64,128,256"
    assert run(line) == 0
    assert run(f"{line} --width_transfer=none") == 1


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
