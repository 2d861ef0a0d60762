import copy
import dataclasses
from typing import Any, cast

import pytest

from jaxtrain import cli
from jaxtrain.cli import typed
from jaxtrain.data.sources.text_files import TextFiles
from jaxtrain.data.sources.webdataset import WebDataset
from jaxtrain.data.transforms import MinLength
from jaxtrain.errors import UserError
from jaxtrain.optim.adamw import AdamW as AdamWOfTheTrainer
from tests.cli.example import AdamW, Config, Evaluate, MinScore, Muon, Stage, example_config


def change(*flags: str, config: Any = None) -> Any:
    config = cli.override(example_config() if config is None else config, flags)
    cli.check(config)
    return config


@pytest.mark.parametrize(
    ("text", "hint", "value"),
    [
        ("5", int, 5),
        ("-5", int, -5),
        ("1_000_000", int, 1_000_000),
        ("1e6", int, 1_000_000),
        ("1.5e3", int, 1500),
        ("1e23", int, 10**23),  # float(1e23) is 99999999999999991611392
        ("123456789012345678901", int, 123456789012345678901),
        ("5e-4", float, 5e-4),
        ("3", float, 3.0),
        ("1_000.5", float, 1000.5),
        ("true", bool, True),
        ("False", bool, False),
        ("1", bool, True),
        ("0", bool, False),
        ("none", int | None, None),
        ("Null", str | None, None),
        ("None", str, "None"),
        ("7", int | None, 7),
        ("7", str | None, "7"),
        ("0.5", int | float | str, 0.5),
        ("high", str | int | float, "high"),
        ("12", str | int | float, 12),
        ("(1,2)", tuple[int, ...], (1, 2)),
        ("1,2", tuple[int, ...], (1, 2)),
        ("[1, 2,]", tuple[int, ...], (1, 2)),
        ("(1,)", tuple[int, ...], (1,)),
        ("7", tuple[int, ...], (7,)),
        ("()", tuple[int, ...], ()),
        ("", tuple[str, ...], ()),
        ("0.9,1", tuple[float, float], (0.9, 1.0)),
        ("(text,'int score',\"url\")", tuple[str, ...], ("text", "int score", "url")),
        ("data/{a,b}.parquet,c", tuple[str, ...], ("data/{a,b}.parquet", "c")),
        ("((1,2),(3,))", tuple[tuple[int, ...], ...], ((1, 2), (3,))),
        ("(1,2),(3,)", tuple[tuple[int, ...], ...], ((1, 2), (3,))),
        ("a=b", str, "a=b"),
    ],
)
def test_values_are_typed_by_the_annotation(text: str, hint: Any, value: Any):
    parsed = typed.parse(text, hint)
    assert parsed == value
    assert type(parsed) is type(value)


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("0.5", int),
        ("1e400", int),
        ("inf", int),
        ("", int),
        ("0x10", int),
        ("many", float),
        ("nan", float),
        ("inf", float),
        ("yes", bool),
        ("2", bool),
        ("", bool),
        ("x", int | None),
        ("1,x", tuple[int, ...]),
        ("1,,2", tuple[int, ...]),
        ("a,,b", tuple[str, ...]),
        ("(1,2", tuple[int, ...]),
        (")1(", tuple[int, ...]),
        ("(a", tuple[str, ...]),
        ("0.9", tuple[float, float]),
        ("1,2,3", tuple[float, float]),
        ("x", Stage),
    ],
)
def test_values_of_another_type_are_refused(text: str, hint: Any):
    with pytest.raises(ValueError):
        typed.parse(text, hint)


@pytest.mark.parametrize(
    ("flag", "read", "value"),
    [
        ("--config.seed=3", lambda c: c.seed, 3),
        ("--config.total_tokens=1e9", lambda c: c.total_tokens, 10**9),
        ("--config.optimizer.momentum=0.8", lambda c: c.optimizer.momentum, 0.8),
        ("--config.optimizer.fallback.betas=0.8,0.9", lambda c: c.optimizer.fallback.betas, (0.8, 0.9)),
        ("--config.optimizer.fallback.betas[1]=0.99", lambda c: c.optimizer.fallback.betas, (0.9, 0.99)),
        ("--config.data.mode=cache", lambda c: c.data.mode, "cache"),
        ("--config.data.prefetch=none", lambda c: c.data.prefetch, None),
        ("--config.data.sources.web.name=me/mine", lambda c: c.data.sources["web"].name, "me/mine"),
        ("--config.data.sources[my.books].name=x", lambda c: c.data.sources["my.books"].name, "x"),
        (
            "--config.data.sources.web.transforms[0].threshold=4",
            lambda c: c.data.sources["web"].transforms[0].threshold,
            4,
        ),
        ("--config.data.sources.web.transforms=()", lambda c: c.data.sources["web"].transforms, ()),
        ("--config.stages[0].seq_len=64", lambda c: c.stages[0].seq_len, 64),
        ("--config.stages.1.seq_len=64", lambda c: c.stages[1].seq_len, 64),
        ("--config.stages[1].tokens=none", lambda c: c.stages[1].tokens, None),
        ("--config.stages[0].weights.web=0.5", lambda c: c.stages[0].weights, {"web": 0.5}),
        ("--config.stages[1].weights.web=2", lambda c: c.stages[1].weights, {"web": 2.0}),
        ("--config.labels.team=a=b", lambda c: c.labels, {"team": "a=b"}),
        ("--config.columns=(text,score)", lambda c: c.columns, ("text", "score")),
        ("--config.grid=((1,2),(3,))", lambda c: c.grid, ((1, 2), (3,))),
        ("--config.threshold=high", lambda c: c.threshold, "high"),
        ("--config.init_from=", lambda c: c.init_from, ""),
        ("--config.evaluate.every_steps=5", lambda c: c.evaluate, Evaluate(every_steps=5)),
        ("--config.evaluate=none", lambda c: c.evaluate, None),
    ],
)
def test_override(flag: str, read: Any, value: Any):
    config = change(flag)
    assert read(config) == value
    # Nothing else changes: undoing this one difference gives the original back.
    rows = cli.differences(cli.to_json(example_config()), cli.to_json(config))
    leaf = flag.partition("=")[0].removeprefix("--config.").replace("stages.1", "stages[1]")
    # A default evaluation appears as a whole; an override of a tuple of scalars appears at its elements.
    assert all(path.startswith((leaf, "evaluate")) for path, _, _ in rows)
    assert len(rows) >= (value is not None or leaf != "evaluate")


def test_the_given_config_is_not_changed():
    config = example_config()
    before = copy.deepcopy(config)
    change("--config.stages[0].weights.web=0.25", "--config.data.sources.web.name=x", config=config)
    assert config == before


def test_an_object_in_two_places_is_changed_in_one():
    stage = Stage()
    config = change("--config.stages[0].seq_len=64", config=Config(stages=(stage, stage)))
    assert [stage.seq_len for stage in config.stages] == [64, 1024]
    assert Config().stages[0].seq_len == 1024  # class-level defaults are shared by all configs


def test_frozen_dataclasses_and_slots_can_be_overridden():
    @dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
    class Frozen:
        width: int = 1

    assert cli.override(Frozen(), ["--config.width=2"]) == Frozen(width=2)


def test_overrides_add_up_in_order():
    config = change("--config.stages[0].weights.web=0.5", "--config.stages.0.seq_len=8", "--config.seed=1")
    assert (config.stages[0].weights, config.stages[0].seq_len, config.seed) == ({"web": 0.5}, 8, 1)


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        # A typo: the nearest names, and all names.
        (
            ["--config.optimizer.momentun=1"],
            ["no field 'momentun'", "--config.optimizer.momentum?", "A Muon has: learning_rate, momentum, fallback."],
        ),
        (["--config.optimizr.momentum=1"], ["config has no field 'optimizr'", "--config.optimizer?"]),
        # A field of another class: the current value decides.
        (["--config.optimizer.betas=0.8,0.9"], ["config.optimizer has no field 'betas'"]),
        # Right name, wrong place.
        (["--config.momentun=0.9"], ["config has no field 'momentun'", "--config.optimizer.momentum?"]),
        (["--config.momentum=0.9"], ["config has no field 'momentum'", "--config.optimizer.momentum?"]),
        (["--config.zzz=1"], ["no field 'zzz'", "A Config has: seed, total_tokens"]),
        (["--config.stages[2].seq_len=1"], ["config.stages has 2 elements", "no [2]"]),
        (["--config.stages.first.seq_len=1"], ["config.stages has 2 elements", "no [first]"]),
        (["--config.data.sources.wbe.name=x"], ["no entry 'wbe'", "--config.data.sources.web?", "my.books"]),
        (["--config.seed.x=1"], ["config.seed is an int and has no fields", "--config.seed=VALUE"]),
        (["--config.init_from.x=1"], ["config.init_from is none", "config file"]),
        # Wrong values.
        (["--config.seed=0.5"], ["wants int", "--config.seed=1000"]),
        (["--config.seed=none"], ["wants int"]),
        (["--config.total_tokens=many"], ["wants int | None", "--config.total_tokens=1000 or none"]),
        (["--config.optimizer.learning_rate=fast"], ["wants float", "=3e-4"]),
        (["--config.data.shuffle=yes"], ["wants bool", "=true"]),
        (["--config.data.mode=streaming"], ["wants 'stream' | 'cache', for", "=stream or cache"]),
        (["--config.optimizer.fallback.betas=0.9"], ["wants tuple[float, float]", "(3e-4,3e-4)"]),
        (["--config.stages[0].weights.web=x"], ["wants float"]),
        (["--config.stages[0].weights.web.x=1"], ["has no fields"]),
        # Groups cannot be written as text.
        (
            ["--config.optimizer=adam"],
            ["a Muon cannot be written as text", "--config.optimizer.learning_rate=3e-4", "AdamW or"],
        ),
        (["--config.optimizer=Stage"], ["a Muon cannot be written as text"]),
        (
            ["--config.data.sources.code=Files"],
            ["wants SourceConfig; or choose HuggingFace or WebDataset or TextFiles"],
        ),
        (["--config.data.sources.code=hugging_face"], ["a HuggingFace needs --config.data.sources.code.name=text too"]),
        (["--config.stages[2]=Muon"], ["wants Stage"]),
        (["--config.stages=4"], ["a tuple cannot be written as text", "--config.stages[0].name=text"]),
        (["--config.data.sources=x"], ["a dict cannot be written as text", "--config.data.sources.web.name=text"]),
        (
            ["--config.data.sources[my.books].transforms=x"],
            ["wants tuple[Callable[[dict], dict | None], ...]; set it in"],
        ),
        # Forms.
        (["--config.seed"], ["--config.FIELD=VALUE"]),
        (["--config.=1"], ["--config.FIELD=VALUE"]),
        (["--config..seed=1"], ["--config.FIELD=VALUE"]),
        (["--config.stages[0.seq_len=1"], ["--config.FIELD=VALUE"]),
        (["config.seed=1"], ["--config.FIELD=VALUE"]),
        # Contradictions.
        (["--config.columns[0]=a", "--config.columns=b"], ["--config.columns=b replaces what --config.columns[0]=a"]),
        # What the shell makes of --config.init_from=s-{0..1}.tar without quotes.
        (["--config.init_from=s-0.tar", "--config.init_from=s-1.tar"], ["quote the value"]),
    ],
)
def test_errors_name_the_flag_the_cause_and_the_fix(flags: list[str], parts: list[str]):
    with pytest.raises(UserError) as caught:
        change(*flags)
    message = str(caught.value)
    assert message.startswith(flags[0].partition("=")[0]) or flags[-1] in message
    for part in parts:
        assert part in message


def test_the_last_override_of_a_field_counts():
    flags = ("--config.seed=1", "--config.stages[0].seq_len=1", "--config.seed=2", "--config.stages.0.seq_len=2")
    config = change(*flags, "--config.columns=a,b", "--config.columns[0]=c")
    assert (config.seed, config.stages[0].seq_len, config.columns) == (2, 2, ("c", "b"))


def test_classes_are_chosen_by_name():
    flags = ["--config.optimizer.learning_rate=0.5", "--config.optimizer=adamw", "--config.optimizer.epsilon=1e-6"]
    with pytest.raises(UserError, match=r"replaces what --config\.optimizer\.learning_rate=0\.5 changes"):
        change(*flags)
    config = change(*flags[1:], config=Config(optimizer=Muon(learning_rate=0.5)))
    # What the config had set stays, what was Muon's default does not.
    assert config.optimizer == AdamWOfTheTrainer(learning_rate=0.5, epsilon=1e-6)
    config = change(*flags[1:])
    assert config.optimizer == AdamWOfTheTrainer(epsilon=1e-6)


def test_entries_and_elements_are_added_by_the_name_of_their_class():
    config = change(
        "--config.data.sources.code=TextFiles",
        "--config.data.sources.code.document=line",
        "--config.data.sources.more=WebDataset",
        "--config.data.sources.more.urls=a.tar,b.tar",
        "--config.data.sources.web.transforms[1]=MinLength",
        "--config.data.sources.web.transforms[1].characters=7",
        "--config.stages[0].weights.code=0.25",
        "--config.columns[1]=score",
    )
    assert config.data.sources["code"] == TextFiles(document="line")
    assert config.data.sources["more"] == WebDataset(urls=("a.tar", "b.tar"))
    assert config.data.sources["web"].transforms == (MinScore(), MinLength(characters=7))
    assert config.columns == ("text", "score")


def test_a_class_from_outside_the_package_is_named_with_its_module():
    named = "--config.optimizer=tests.cli.example:AdamW"
    assert change(named).optimizer == AdamW()


def test_a_group_without_defaults_cannot_be_switched_on():
    @dataclasses.dataclass(kw_only=True)
    class Teacher:
        model: str
        temperature: float = 1.0

    @dataclasses.dataclass(kw_only=True)
    class Root:
        teacher: Teacher | None = None

    with pytest.raises(UserError, match=r"config\.teacher is none.*config file"):
        cli.override(Root(), ["--config.teacher.temperature=2"])


def test_check_calls_children_first_and_names_the_path():
    with pytest.raises(UserError) as caught:
        change("--config.optimizer.fallback.learning_rate=0")
    assert str(caught.value) == "config.optimizer.fallback.learning_rate=0.0 has to be above 0"
    with pytest.raises(UserError) as caught:
        change("--config.stages[1].weights.wbe=1", "--config.optimizer.fallback.learning_rate=1")
    assert str(caught.value) == "config: stage long weighs ['wbe'], which is no source"


def test_check_visits_tuples_and_dicts_in_depth_first_order():
    calls = []

    @dataclasses.dataclass(kw_only=True)
    class Node:
        name: str
        below: tuple["Node", ...] | dict[str, "Node"] = ()

        def check(self) -> None:
            calls.append(self.name)

    # Local classes cannot be found by name, so the annotation is given as the class itself.
    Node.__annotations__["below"] = tuple[Node, ...] | dict[str, Node]
    inner = Node(name="b", below={"x": Node(name="a")})
    cli.check(Node(name="d", below=(inner, Node(name="c"))))
    assert calls == ["a", "b", "c", "d"]


def test_a_fault_inside_a_check_keeps_its_type_and_gains_the_path():
    @dataclasses.dataclass(kw_only=True)
    class Faulty:
        def check(self) -> None:
            raise KeyError("oops")

    @dataclasses.dataclass(kw_only=True)
    class Root:
        part: Faulty

    with pytest.raises(KeyError) as caught:
        cli.check(Root(part=Faulty()))
    assert "config.part (Faulty)" in caught.value.__notes__[0]


def wrong(**fields: Any) -> Config:
    return dataclasses.replace(example_config(), **fields)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (wrong(seed="64"), "config.seed='64': wants int; this is a str"),
        (wrong(seed=1.5), "config.seed=1.5: wants int; this is a float"),
        (wrong(seed=True), "config.seed=True: wants int; this is a bool"),
        (
            wrong(total_tokens=1e9),
            "config.total_tokens=1000000000.0: wants int | None; this is a float: write 1_000_000_000",
        ),
        (wrong(optimizer=Muon(momentum=True)), "config.optimizer.momentum=True: wants float; this is a bool"),
        (wrong(optimizer=Muon(momentum=float("nan"))), "numbers have to be finite"),
        (wrong(optimizer=Muon), "wants OptimizerConfig; this is a type: write Muon(), an instance"),
        (wrong(optimizer=Stage()), "wants OptimizerConfig; this is a Stage without build, learning_rate"),
        (wrong(optimizer=None), "config.optimizer=None: wants OptimizerConfig; this is None"),
        (wrong(stages=[Stage()]), "this is a list: write a tuple, (a, b), or (a,) for one element"),
        (wrong(stages=Stage()), "wants tuple[Stage, ...]; this is a Stage"),
        (wrong(stages=(Stage(), Muon())), "config.stages[1]=Muon(learning_rate=0.02"),
        (wrong(stages=(Stage(weights=cast(Any, {"web": "1"})),)), "config.stages[0].weights.web='1': wants float"),
        (
            wrong(stages=(Stage(weights=cast(Any, {1: 1.0})),)),
            "config.stages[0].weights: the keys of a dict are strings; 1 is an int",
        ),
        (wrong(columns="text"), "config.columns='text': wants tuple[str, ...]; this is a str"),
        (wrong(columns=("text", 1)), "config.columns[1]=1: wants str; this is an int"),
        (wrong(evaluate=Evaluate(every_steps=cast(Any, "5"))), "config.evaluate.every_steps='5': wants int"),
        (wrong(grid=((1, 2.0),)), "config.grid[0][1]=2.0: wants int; this is a float: write 2"),
    ],
)
def test_values_of_config_files_are_checked_against_the_annotations(config: Config, message: str):
    with pytest.raises(UserError) as caught:
        cli.check(config)
    assert message in str(caught.value)


def test_functions_are_refused_where_a_callable_config_is_wanted():
    config: Any = example_config()
    config.data.sources["web"].transforms = (lambda document: document,)
    with pytest.raises(UserError, match=r"sources\.web\.transforms\[0\].*write a dataclass with __call__"):
        cli.check(config)
    config.data.sources["web"].transforms = (MinScore(),)
    cli.check(config)


def test_an_attribute_that_is_no_field_is_refused():
    config: Any = example_config()
    config.data.num_lane = 3
    with pytest.raises(
        UserError, match=r"config\.data\.num_lane: a Data has no field 'num_lane'; did you mean num_lanes"
    ):
        cli.check(config)


def test_an_int_fits_a_float():
    cli.check(wrong(optimizer=Muon(learning_rate=1)))
