"""The tool's command line: on stand-in (CPU) devices here, and for a real TPU slice if libtpu is installed."""

import importlib.util
import json
import pathlib
import subprocess
import sys
import types
from typing import Any

import jax
import pytest

from jaxtrain import cli
from jaxtrain.cost import clusters, memory
from jaxtrain.errors import UserError
from jaxtrain.trainer import scheduled
from tools.compile_check import __main__ as compile_check
from tools.estimate import __main__ as estimate

ROOT = pathlib.Path(__file__).resolve().parents[2]
CONFIG = """
from jaxtrain.config import Config
from jaxtrain.data.pipeline import DataConfig
from jaxtrain.data.sources.text_files import TextFiles
from jaxtrain.model.llama import LlamaConfig
from jaxtrain.plan import Stage
from jaxtrain.tokenizers.hf import HuggingFaceTokenizer


def get_config(arg=""):
    model = LlamaConfig(hidden_size=64, intermediate_size=128, num_layers=2, num_heads=4, num_kv_heads=2, remat="dots")
    return Config(
        model=model,
        tokenizer=HuggingFaceTokenizer(name="no/where", vocab_size=512),
        data=DataConfig(sources={"a": TextFiles()}),
        stages=(Stage(name="only", seq_len=32, batch_size=16),),
        steps=3,
    )
"""


@pytest.fixture
def run(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The command on 8 simulated CPU devices in place of the slice's chips."""
    path = tmp_path / "tiny.py"
    path.write_text(CONFIG)
    monkeypatch.setattr(clusters, "prepare_environment", lambda: None)
    monkeypatch.setattr(clusters, "devices", lambda cluster: jax.devices())

    def command(*flags: str) -> tuple[int, dict[str, Any]]:
        answer = tmp_path / "answer.json"
        argv = [f"--config={path}", "--topology=v5e:2x4", f"--json={answer}", *flags]
        code = cli.exit_code(compile_check.main, compile_check.COMMAND, argv)
        return code, json.loads(answer.read_text()) if answer.exists() else {}

    return command


def test_a_config_that_fits(run: Any, capsys: pytest.CaptureFixture[str]) -> None:
    code, answer = run("--config.mesh.tensor=2")
    printed = capsys.readouterr().out
    assert code == 0
    assert answer["fits"]
    (stage,) = answer["stages"]
    assert stage["needed_bytes"] > stage["held_bytes"] > answer["state_bytes"] > 12 * answer["parameters"] / 8
    assert {one["axes"] for one in stage["collectives"]} >= {"fsdp", "tensor"}
    # Each chip gathers at least the layers that it computes with: half of them, less its own quarter, in bf16.
    layers = answer["parameters"] - 2 * 512 * 64
    assert stage["sent_links_bytes"] > 2 * layers / 2 * 3 / 4
    assert stage["sent_network_bytes"] == 0
    assert "layers/mlp/down/kernel 2x128x64 layers mlp embed - tensor fsdp 2x64x16 0.0000" in " ".join(printed.split())
    for said in ("Attention: xla", "no [T, T] tensor"):
        assert said in printed
    for said in ("fits on v5e:2x4", "Roofline", "TFLOP per chip", "a vocabulary of 512 (config.tokenizer.vocab_size)"):
        assert said in printed


def test_it_shows_the_choice_that_estimate_shows(
    run: Any, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ("--config.model.remat=auto", "--config.mesh=auto")
    _, answer = run(*flags)
    path = tmp_path / "numbers.json"
    argv = [f"--config={tmp_path / 'tiny.py'}", "--hardware=v5e:2x4", f"--json={path}", *flags]
    assert cli.exit_code(estimate.main, estimate.COMMAND, argv) == 0
    (variant,) = json.loads(path.read_text())["variants"]
    assert answer["stages"][0]["variant"] == variant
    assert variant["remat"] is not None
    printed = capsys.readouterr().out
    assert printed.count("mesh=auto: ") == 1
    assert "Steps of only: remat=" in printed


def test_evaluation_is_part_of_it(run: Any, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ("--config.eval.every_steps=2", "--config.eval.tokens=2048", "--config.data.holdout=0.01")
    code, answer = run(*flags, "--config.eval.tasks=hellaswag")
    assert code == 0
    assert answer["evaluation"]["fits"]
    # AdamW's moments, two thirds of the state, stay on the chips meanwhile.
    assert answer["evaluation"]["needed_bytes"] > answer["state_bytes"]
    printed = capsys.readouterr().out
    assert "Evaluation: 1 micro-batch of 16 x 32 tokens" in printed
    assert answer["tasks"]["needed_bytes"] > answer["state_bytes"]
    assert "The program of eval.tasks: 1 micro-batch of 16 x " in printed


def test_a_config_that_does_not_fit(run: Any, capsys: pytest.CaptureFixture[str]) -> None:
    code, answer = run("--config.memory_gb=0.0002")
    printed = capsys.readouterr().out
    assert code == 1
    assert not answer["fits"]
    for said in ("DOES NOT FIT", "nothing was compiled", "--config.model.remat=full (now dots)", "shorter rows"):
        assert said in printed
    for said in ("--config.mesh.fsdp=4 --config.mesh.context=2", "smaller batch", "more chips"):
        assert said in printed


@pytest.mark.slow
def test_a_step_that_does_not_fit(run: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """State and gradients would fit, but not the other memory that the compiler needs."""
    code, answer = run("--config.memory_gb=0.0003")
    assert code == 1
    assert "with one row of 32 tokens at a time a device needs" in answer["stages"][0]["error"]
    assert "What may help" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--config.mesh.tensor=3",), "the number of devices, 8"),
        (("--config.mesh.tensor=4",), "num_kv_heads=2 is not divisible"),
        (("--config.tokenizer.vocab_size=none", "--config.tokenizer.name=./nowhere.json"), "give --vocab_size=N"),
        (("--vocab_size=0",), "--vocab_size=0"),
    ],
)
def test_mistakes(run: Any, capsys: pytest.CaptureFixture[str], flags: tuple[str, ...], said: str) -> None:
    assert run(*flags)[0] == 2
    assert said in capsys.readouterr().err


def test_a_program_for_tpus_is_taken_from_the_dump(tmp_path: pathlib.Path) -> None:
    """The compiler's process writes text and memory, or its error."""
    ended = types.SimpleNamespace(poll=lambda: 1)
    with pytest.raises(jax.errors.JaxRuntimeError, match="died"):
        scheduled._wait(ended, tmp_path)
    (tmp_path / "error").write_text("RESOURCE_EXHAUSTED: Used 24.9G of 15.7G hbm.")
    with pytest.raises(jax.errors.JaxRuntimeError) as caught:
        scheduled._wait(ended, tmp_path)
    assert memory.is_exhausted(caught.value)
    (tmp_path / "module_0.jit_step.cl_9.after_optimizations_after_buffer_assignment.txt").write_text("HloModule")
    (tmp_path / "module_0.jit_step.cl_9.after_optimizations-memory-usage-report.txt").write_text("Total bytes: 9 (9B)")
    assert scheduled._wait(ended, tmp_path) == ("HloModule", "Total bytes: 9 (9B)")


def test_compilers_that_are_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for topology, extra in (("v5e:2x4", "tpu-check"), ("h100:8", "gpu")):
        with pytest.raises(UserError, match=rf"pip install -e '.\[{extra}\]'"):
            clusters.devices(clusters.parse(topology, "topology"))


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu: pip install -e '.[tpu-check]'")
def test_1b_on_a_tpu_slice(tmp_path: pathlib.Path) -> None:
    """As users call it: the real step, with the flash kernel, within 16 GB per chip."""
    flags = ["--config=configs/1b.py", "--topology=v5e:2x4", f"--json={tmp_path / 'answer.json'}"]
    done = subprocess.run(
        [sys.executable, "-m", "tools.compile_check", *flags],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    print(done.stdout)
    assert done.returncode == 0, done.stderr
    answer = json.loads((tmp_path / "answer.json").read_text())
    (stage,) = answer["stages"]
    assert (stage["attention"], stage["kernels"]) == ("splash", ["tpu_custom_call"])
    assert (
        12 * answer["parameters"] / 8 < stage["held_bytes"] < stage["needed_bytes"] < answer["limit_bytes"] < 16 << 30
    )
    # Layers are gathered for the forward pass and for the gradients with respect to the input, in bf16.
    layers = answer["parameters"] - 2 * answer["vocab_size"] * 2048
    assert 2 * 2 * layers < stage["sent_links_bytes"] / stage["micro_batches"] < 2 * 8 * answer["parameters"]
    assert all(one["axes"] == "fsdp" for one in stage["collectives"])
    # What makes the step fast (docs/benchmarks.md: 74%): gathers are no windows, which would be collective-permutes;
    # rotary positions are no copies in fp32; attention is not computed again.
    estimate, parts = stage["estimate"], stage["estimate"]["parts"]
    assert estimate["exact"]
    assert 0.7 < estimate["mfu"] < 0.8
    sent = {one["kind"]: one["links_bytes"] for one in stage["collectives"]}
    assert sent["collective-permute"] < sent["all-gather"]
    assert parts.get("rotary positions", 0) < 0.01 * estimate["seconds"]
    assert parts["attention, forward"] < 0.5 * parts["attention, backward"]
