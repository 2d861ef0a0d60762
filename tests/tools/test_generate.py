"""tools.generate on an imported model: it prints and writes what the library's generate returns."""

import json

import pytest

from jaxtrain.model.generate import continuation, generate
from jaxtrain.trainer.restored import restore
from tests.tools.test_hf_tools import folder, run
from tools import generate as tool
from tools import import_hf

assert folder  # a fixture


@pytest.fixture
def workdir(folder, tmp_path):
    assert run(import_hf, str(folder), f"--output={tmp_path / 'imported'}") == 0
    return str(tmp_path / "imported")


@pytest.mark.slow
def test_texts_are_those_of_generate(workdir, tmp_path, capsys):
    prompts = tmp_path / "prompts.txt"  # without w1: its id is the model's BOS, which no text encodes to
    prompts.write_text("w2 w3 w4\n\nw7\n")
    written = tmp_path / "texts.jsonl"
    settings = {"max_new_tokens": 5, "temperature": 1.0, "top_k": 20, "top_p": 0.9, "seed": 3}
    flags = [f"--{name}={value}" for name, value in settings.items()]
    assert run(tool, f"--workdir={workdir}", f"--prompts={prompts}", "--samples=2", f"--json={written}", *flags) == 0
    found = restore(workdir)
    eos = found.tokenizer.eos_id
    ids = [ids for ids in ([2, 3, 4], [eos], [7]) for _ in range(2)]
    wanted = generate(found.model, found.params, ids, eos_id=eos, **settings)
    rows = [json.loads(line) for line in written.read_text().splitlines()]
    assert [row["prompt"] for row in rows] == ["w2 w3 w4", "w2 w3 w4", "", "", "w7", "w7"]
    texts = [continuation(found.tokenizer, *each) for each in zip(ids, wanted, strict=True)]
    assert [row["text"] for row in rows] == texts
    assert [row["tokens"] for row in rows] == list(map(len, wanted))
    assert [row["ended"] for row in rows] == [len(text) < 5 for text in wanted]
    out = capsys.readouterr().out
    for number, row in enumerate(rows, 1):
        assert f"--- {number}\n{row['prompt']}{row['text']}\n" in out
    assert len(set(texts)) > 1

    capsys.readouterr()
    assert run(tool, f"--workdir={workdir}", "--prompt=w2 w3 w4", "--temperature=0", "--max_new_tokens=4") == 0
    (greedy,) = generate(found.model, found.params, [[2, 3, 4]], max_new_tokens=4, temperature=0, eos_id=eos)
    assert capsys.readouterr().out == f"w2 w3 w4{continuation(found.tokenizer, [2, 3, 4], greedy)}\n"


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ([], "give --prompt=TEXT, or --prompts=FILE"),
        (["--prompt=a", "--prompts=b"], "and not both"),
        (["--prompts=/nowhere/at/all"], "/nowhere/at/all"),
        (["--prompt=w1", "--samples=0"], "--samples=0"),
        (["--prompt=w1", "--temperature=-1"], "temperature=-1"),
        (["--prompt=w1", "--max_new_tokens=64"], "context of 64 (max_seq_len): lower max_new_tokens to 63 or less"),
    ],
)
def test_refusals(flags, said, workdir, capsys):
    assert run(tool, f"--workdir={workdir}", *flags) == 2
    assert said in capsys.readouterr().err


class Bytes:
    """A tokenizer whose ids are bytes."""

    def decode(self, ids):
        return bytes(ids).decode(errors="replace")


def test_half_a_character_is_not_printed(capsys):
    shown = tool._Shown(Bytes(), ["é"], [list("é".encode())], 9)
    printed = []
    for token in "aé😀".encode():
        shown.on_token(0, token)
        printed.append(capsys.readouterr().out)
    assert "".join(printed) == "éaé😀"
    assert "\ufffd" not in "".join(printed)
    shown.end(["aé😀!"])
    assert capsys.readouterr().out == "!\n"
