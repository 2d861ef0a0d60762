"""The benchmarks of stages at tiny sizes: what they count, and the arithmetic of their reports."""

import gc
import json
from types import SimpleNamespace
from typing import Any

import jax
import pytest

from jaxtrain.trainer import loop
from tools.bench import __main__ as bench
from tools.bench import curriculum, stages
from tools.bench.stages import _Listener, _of_stage, _Step


@pytest.fixture
def numbers(capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs a benchmark and returns the object on the last line of its output."""

    def numbers(line: str) -> dict[str, Any]:
        with pytest.raises(SystemExit) as stop:
            bench.main(line.split())
        printed = capsys.readouterr()
        assert not stop.value.code, printed.err
        return json.loads(printed.out.splitlines()[-1])

    return numbers


@pytest.mark.slow
def test_stages(numbers: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    frozen, original = [], loop.Loop.run

    def run(self: loop.Loop, state: Any) -> int:
        frozen.append(gc.get_freeze_count())
        return original(self, state)

    monkeypatch.setattr(loop.Loop, "run", run)
    found = numbers(
        "stages --steps=12 --seq_lens=16,64 --hidden_size=32 --num_layers=1 --vocab_size=700 --megabytes=2 "
        "--train_megabytes=0.3 --tokens_per_batch=512 --milliseconds=1"
    )
    assert [(stage["seq_len"], stage["batch_size"]) for stage in found["stages"]] == [(16, 32), (64, 8)]
    assert found["programs_compiled"] >= 2
    # The content of the work directory suffices for a start.
    assert found["programs_compiled_at_second_start"] == 0
    assert found["programs_read_at_second_start"] >= 2
    # While they train, the garbage collector should ignore what startup made.
    assert len(frozen) == 2
    assert min(frozen) > 10_000 > gc.get_freeze_count()
    # The cache does not stay open: the folder is gone, and JAX would warn about each program that it cannot write.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    try:
        assert jax.jit(lambda x: x + 2)(1) == 3
    finally:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)


@pytest.mark.nightly
def test_curriculum(numbers: Any) -> None:
    found = numbers(
        "curriculum --stages=1,6 --hidden_size=64 --num_layers=1 --vocab_size=256 --tokens_per_batch=512 "
        "--data_tokens=4096 --data_batches=1 --data_vocab_size=700 --megabytes=2 --rounds=1"
    )
    first, sixth = found["stages"]
    assert (first["seq_len"], first["rows"], first["data_rows"]) == (8, 64, 512)
    assert (sixth["seq_len"], sixth["rows"], sixth["data_rows"]) == (256, 2, 16)
    for stage in found["stages"]:
        assert stage["bound"] in stage["share_of_step"]
        assert set(stage["share_of_step"]) == {
            *("embedding", "projections", "attention", "mlp", "head and loss", "optimizer", "fingerprint")
        }
        for kind in ("data", "data_without_tokenizer"):
            assert stage[kind]["tokens_per_cpu_second"] > 0


def test_the_table_is_the_curriculum() -> None:
    assert curriculum.SEQ_LENS == (8, 16, 32, 64, 128, 256, 512, 768, 1536, 2048)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("curriculum --stages=0", "there is no stage 0"),
        ("curriculum --size=1b", "--size=1b"),
        ("stages --seq_lens=16", "give two --seq_lens"),
        ("stages --steps=9", "--steps of 10"),
    ],
)
def test_a_wrong_command_line_is_explained(line: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        bench.main(line.split())
    assert stop.value.code == 2
    assert said in capsys.readouterr().err


def test_what_counts_as_a_stall() -> None:
    """A stage with steps of 0.1 s: the median of the first five may be 0.35 s, whatever a single one takes."""
    listener = _Listener()
    listener.stop()

    def steps(*after: float) -> list[_Step]:
        seconds = [*after, *[0.1] * 45]
        ends = [sum(seconds[: n + 1]) for n in range(len(seconds))]
        # The first of them is the last step before the change: it ends once the first one of the stage is in flight.
        numbers = [1, *[2] * (len(seconds) - 1)]
        return [_Step(n, 64, 8, end, one, 0.01, 0.0) for n, end, one in zip(numbers, ends, seconds, strict=True)]

    for after, within in (((0.3, 0.3, 0.3, 9.0, 9.0), True), ((0.1, 0.1, 0.36, 0.36, 0.36), False)):
        found = _of_stage(2, steps(*after), listener)
        assert (found["limit_seconds"], found["within_limit"]) == (0.35, within)
        assert found["median_step_seconds"] == 0.1
    assert found["largest_after_change_seconds"] == 0.36
    assert found["data_wait_share"] == pytest.approx(0.49 / 5.68, rel=1e-3)
    assert found["while_tracing"] is None
    listener.spans["tracing"] = [(0.15, 0.25)]
    assert _of_stage(2, steps(0.1, 0.1, 0.2, 0.1, 0.1), listener)["while_tracing"] == {
        "steps": 2,  # from 0.1 to 0.2, and to 0.4; earlier time belongs to another stage
        "median_seconds": 0.15,
        "largest_seconds": 0.2,
    }


def test_later_stages_read_what_the_first_do_not() -> None:
    flags: Any = SimpleNamespace(**{flag.name: flag.default for flag in stages.COMMAND.flags})
    config = stages._config(flags, [f"http://x/{n}.parquet" for n in range(6)], stages.TrainTokenizer(), steps=10)
    assert [sorted(name for name, weight in (s.weights or {}).items() if weight) for s in config.stages] == [
        *[["math", "web"]] * 2,
        ["code", "math", "web"],
    ]
