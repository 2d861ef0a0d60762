import copy
import dataclasses
import json
from typing import Any

import pytest

from jaxtrain import cli
from tests.cli.example import AdamW, Config, Evaluate, HuggingFace, Stage, example_config


def test_to_json_survives_a_file():
    stored = cli.to_json(example_config())
    assert json.loads(json.dumps(stored, allow_nan=False)) == stored
    assert stored["_kind"] == "tests.cli.example:Config"
    assert stored["optimizer"]["_kind"] == "tests.cli.example:Muon"
    assert stored["data"]["sources"]["web"]["transforms"] == [{"_kind": "tests.cli.example:MinScore", "threshold": 3}]
    assert stored["stages"][1]["tokens"] == 10**9


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("https://user:pa@ss@host/a/b.tar", "https://host/a/b.tar"),
        ("HTTPS://user:pass@host/x", "HTTPS://host/x"),
        ("https://hf_abc@host:80/x", "https://host:80/x"),
        ("s3://KEY:SECRET@bucket/x-{000..010}.tar", "s3://bucket/x-{000..010}.tar"),
        ("https://host/x?X-Amz-Signature=ab&X-Amz-Expires=9&part=1", "https://host/x?part=1"),
        ("https://host/x?part=1&token=ab#top", "https://host/x?part=1#top"),
        ("https://host/x?sig=a%2Fb", "https://host/x"),
        ("https://host/x?api_key=1&key=2&access_token=3&Signature=4&password=5", "https://host/x"),
        ("pipe: curl 'https://host/x?token=ab' https://a:b@h/y", "pipe: curl 'https://host/x https://h/y"),
        # Nothing secret.
        (
            "hf://datasets/org/name@refs/convert/parquet/x.parquet",
            "hf://datasets/org/name@refs/convert/parquet/x.parquet",
        ),
        ("https://host/a@b?tokens=5&keyword=a&empty", "https://host/a@b?tokens=5&keyword=a&empty"),
        ("mail me@there.org?token=1", "mail me@there.org?token=1"),
        ("HuggingFaceFW/fineweb-edu", "HuggingFaceFW/fineweb-edu"),
    ],
)
def test_secrets_in_urls_are_left_out(text: str, kept: str):
    assert cli.to_json(Config(init_from=text, labels={"a": text}, columns=(text,))) == cli.to_json(
        Config(init_from=kept, labels={"a": kept}, columns=(kept,))
    )


def test_secret_fields_are_left_out_and_still_show_that_they_are_set():
    @dataclasses.dataclass(kw_only=True)
    class Secrets:
        token: str | None = "hush"
        api_key: str = "hush"
        client_secret: str = "hush"
        storage: dict[str, str] = dataclasses.field(default_factory=lambda: {"password": "hush", "hf_token": "hush"})
        eos_token: str = "</s>"
        max_tokens: int = 5
        key: str = "text"

    stored = cli.to_json(Secrets())
    assert "hush" not in json.dumps(stored)
    assert (stored["eos_token"], stored["max_tokens"], stored["key"]) == ("</s>", 5, "text")
    assert cli.to_json(Secrets(token=None))["token"] is None
    assert cli.differences(stored, cli.to_json(Secrets(token="other"))) == []
    assert cli.differences(stored, cli.to_json(Secrets(token=None))) == [("token", "(removed)", None)]


def test_equal_configs_have_no_differences():
    assert cli.differences(cli.to_json(example_config()), cli.to_json(example_config())) == []
    assert cli.differences({"a": 1}, {"a": 1.0}) == []
    assert cli.differences({"a": 1}, {"a": True}) == [("a", 1, True)]


def test_differences_name_what_changed_appeared_and_went():
    old, new = example_config(), copy.deepcopy(example_config())
    new.seed = 1
    new.optimizer = AdamW()
    new.stages = (new.stages[0], dataclasses.replace(new.stages[1], seq_len=8), Stage(name="extra"))
    new.data.sources = {"my.books": HuggingFace(name="other")}
    new.evaluate = Evaluate()
    rows = {path: (before, after) for path, before, after in _differences(old, new)}
    assert rows.pop("seed") == (0, 1)
    assert rows.pop("optimizer._kind") == ("tests.cli.example:Muon", "tests.cli.example:AdamW")
    assert rows.pop("optimizer.learning_rate") == (0.02, 3e-4)
    assert rows.pop("optimizer.momentum") == (0.95, cli.ABSENT)
    assert rows.pop("optimizer.betas") == (cli.ABSENT, [0.9, 0.95])
    assert rows.pop("stages[1].seq_len") == (4096, 8)
    assert rows.pop("stages[2]") == (cli.ABSENT, cli.to_json(Stage(name="extra")))
    assert rows.pop("data.sources[my.books].name") == ("books", "other")
    assert rows.pop("data.sources.web")[1] is cli.ABSENT
    assert rows.pop("evaluate") == (None, cli.to_json(Evaluate()))
    assert rows.keys() == {"optimizer.fallback"}


def test_differences_of_a_list_at_the_top():
    assert cli.differences([1, 2], [1]) == [("[1]", 2, cli.ABSENT)]


def test_the_table_is_aligned_and_short():
    rows = [("seed", 0, 1), ("data.mode", "stream", cli.ABSENT), ("stages[0].weights", {"web": 1.0}, ["x" * 100])]
    table = cli.format_differences(rows)
    assert table.splitlines()[:2] == [
        "  seed                          0  ->  1",
        '  data.mode              "stream"  ->  (absent)',
    ]
    assert len({line.index("->") for line in table.splitlines()}) == 1
    assert max(map(len, table.splitlines())) < 120
    assert cli.format_differences([]) == ""


def _differences(old: Config, new: Config) -> list[tuple[str, Any, Any]]:
    return cli.differences(cli.to_json(old), json.loads(json.dumps(cli.to_json(new))))
