"""The benchmarks at tiny sizes: their numbers exist, count what they claim, and compare like with like."""

import json
import os
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from jaxtrain.data import units
from jaxtrain.data.lanes import STATE_FIELDS
from jaxtrain.model.llama import LlamaConfig
from jaxtrain.tokenizers.engine import FastEngine
from jaxtrain.tokenizers.sentencepiece import available_cores
from jaxtrain.tokenizers.training import TrainTokenizer
from tools.bench import __main__ as bench
from tools.bench import checkpoint, corpus, gpu, gpu_parts, jax_step, resume, simulate, stream

TINY_STEP = (
    "step --batch_size=2 --seq_len=32 --hidden_size=32 --intermediate_size=48 --num_layers=2 --num_heads=2 "
    "--num_kv_heads=1 --vocab_size=256 --remat=none --rounds=2"
)


@pytest.fixture
def run(capsys) -> Any:
    """Runs a command line: (exit code, output, errors)."""

    def run(line: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as stop:
            bench.main(line.split())
        return (int(stop.value.code or 0), *capsys.readouterr())

    return run


@pytest.fixture
def numbers(run) -> Any:
    """Runs a benchmark and returns the object on the last line of its output."""

    def numbers(line: str) -> dict[str, Any]:
        code, out, errors = run(line)
        assert code == 0, errors
        found = json.loads(out.splitlines()[-1])
        assert found["benchmark"] == line.split()[0]
        assert {"python", "jax", "torch"} <= found["versions"].keys()
        assert found["machine"]["cores"] >= 1
        return found

    return numbers


def test_every_benchmark_has_help_with_an_example(run):
    code, out, _ = run("--help")
    assert code == 0
    for name in bench.BENCHMARKS:
        assert f"{name}: " in out
        code, help_text, _ = run(f"{name} --help")
        assert code == 0
        assert f"  python -m tools.bench {name}\n" in help_text


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("", "BENCHMARK is missing"),
        ("dta", "no benchmark 'dta'; did you mean data?"),
        ("loss --rounds=0", "--rounds=0: give 1 or more"),
        ("loss --dtype=int8", "--dtype=int8"),
        ("step --baselines=tensorflow", "'tensorflow' is not known; give some of torch_eager, torch_compiled"),
        ("step --vocab_size=1000", "give a multiple of 128"),
        (
            "data --tokenizers=bpe,wordpiece",
            "--tokenizers=bpe,wordpiece: give sentencepiece, bpe, or tokenizers' folders",
        ),
        ("gpu --parts=losses", "there is no part 'losses'; the parts are device, attention"),
    ],
)
def test_a_wrong_command_line_is_explained(run, line, said):
    code, _, errors = run(line)
    assert code == 2
    assert said in errors


def test_data(numbers, monkeypatch):
    # A check of all code points takes 7 CPU seconds.
    monkeypatch.setattr(FastEngine.start, "__defaults__", (range(0x100),))
    cores = available_cores()
    found = numbers("data --megabytes=1 --train_megabytes=0.3 --vocab_size=700 --num_lanes=2 --rounds=1")
    assert found["one_core"] == hasattr(os, "sched_setaffinity")
    assert available_cores() == found["machine"]["cores"] == cores
    texts = list(corpus.documents(1))
    assert sum(map(len, texts)) == pytest.approx(1e6, rel=0.01)
    for kind in ("sentencepiece", "bpe"):
        measured = found[kind]
        assert measured["documents"] == len(texts)
        assert measured["characters_per_token"] == pytest.approx(sum(map(len, texts)) / measured["tokens"], rel=1e-3)
        # The comparison is the benchmark's job: a measurement of a second on a busy machine is noise.
        for name in ("share_tokenizing", "share_reading", "tokens_per_cpu_second", "first_batch_seconds"):
            assert measured[name] > 0
        assert set(measured["ns_per_token"]) == {"whole", "reading", "tokenizing", "rest"}
        assert (measured["times_library"] is not None) == (kind == "bpe")
        assert 0 < measured["share_cut"]["fit"] < measured["share_cut"]["concat"]
        assert measured["resident_mb"] > 50
        modes = measured["modes"]
        assert set(modes) >= {"stream", "download", "pretokenized"}
        assert modes["stream"]["times_stream"] == 1
        assert modes["pretokenized"]["times_stream"] > 0
        assert 2 * measured["tokens"] < modes["store_bytes"] < 3.5 * measured["tokens"]


def test_the_data_benchmark_counts_the_tokens_of_its_tokenizer(tmp_path):
    trainer = TrainTokenizer(kind="bpe", vocab_size=400)
    tokenizer = trainer.train(corpus.documents(0.1), tmp_path / "run", progress=False)
    paths = corpus.write(str(tmp_path), 0.2, files=2, groups=16)
    data = stream.config(paths, num_lanes=2, workers=1)
    plan = stream.endless_plan(data, seq_len=64, batch_size=4)
    with stream.batches(data, plan, tokenizer) as batches:
        tokens = 0
        for batch in batches:
            tokens += int((batch.arrays["segment_ids"] > 0).sum())
            if batch.ended:
                break
    texts = list(corpus.documents(0.2))
    assert tokens == sum(len(tokenizer.encode_batch([text])[0]) + 1 for text in texts)


def test_a_prepared_tokenizer_is_a_function_of_the_text():
    tokenizer = stream.Prepared(4.0, 1000)
    ids, lengths = tokenizer.encode_batch(["a" * 40, "b", "c" * 400])
    assert lengths.tolist() == [10, 1, 100]
    assert ids.max() < 1000
    assert not (ids == tokenizer.eos_id).any()
    np.testing.assert_array_equal(tokenizer.encode_batch(["c" * 400])[0], ids[11:])
    assert len(tokenizer.encode_batch(["d" * 8_000_000])[0]) == 2_000_000
    assert len(tokenizer.encode_batch([])[0]) == 0


def test_width(numbers):
    found = numbers("width --widths=16,32 --learning_rates=1e-3,1e-2 --steps=10 --batch_size=2 --seq_len=32")
    losses = found["losses"]
    assert list(losses) == ["16", "32"]
    for width, rates in losses.items():
        assert 0 < rates["0.01"] < rates["0.001"] < np.log(256)
        assert found["best_learning_rate"][width] == 0.01


@pytest.mark.slow
def test_step_without_baselines(numbers):
    cores = available_cores()
    found = numbers(f"{TINY_STEP} --one_core --baselines=()")
    assert available_cores() == cores
    assert found["machine"]["cores"] == (1 if hasattr(os, "sched_setaffinity") else cores)
    assert found["jaxtrain"]["step_cpu_seconds"] > 0
    # Embedding, two layers of q and o (32 x 32), k and v (32 x 16), three of 32 x 48 and two norms, the last norm.
    assert found["parameters"] == 256 * 32 + 2 * (2 * 1024 + 2 * 512 + 3 * 1536 + 64) + 32
    # Of two rounds, with seconds from the fastest and the median.
    fastest, middle = (found["jaxtrain"][name] for name in ("fastest_step_seconds", "step_seconds"))
    rates = (64 / fastest, 64 / (2 * middle - fastest))
    assert found["jaxtrain"]["tokens_per_second"] == pytest.approx(sum(rates) / 2, rel=0.02)
    assert found["torch_eager"] is None
    assert found["torch_compiled_seconds_over_jaxtrain"] is None


@pytest.mark.slow
def test_step_with_a_teacher(numbers):
    found = numbers(f"{TINY_STEP} --distill --teacher_times=3")
    assert found["settings"]["teacher_times"] == 3
    assert found["parameters"]["student"] == 256 * 32 + 2 * (2 * 1024 + 2 * 512 + 3 * 1536 + 64) + 32
    assert found["parameters"]["teacher"] > 9 * found["parameters"]["student"]
    for name in ("distilled", "student", "teacher_forward"):
        assert found[name]["cpu_seconds"] > 0
    assert found["over_both"]["cpu"]["median"] > 0
    small, large = found["loss_memory"]
    assert large["vocab_size"] == 4 * small["vocab_size"] == 196_608
    assert large["heads_mb"] == pytest.approx(196_608 * (32 * 8 + 96 * 4) / 1e6)
    teachers = found["step_memory"]["distilled"]["arguments_mb"] - found["step_memory"]["student"]["arguments_mb"]
    assert teachers == pytest.approx(4 * found["parameters"]["teacher"] / 1e6, rel=0.01)


def test_loss(numbers):
    found = numbers("loss --tokens=512 --vocab_size=3000 --hidden_size=16 --chunk_tokens=32 --rounds=1")
    assert found["plain"]["temporaries_mb"] > 512 * 3000 * 4 / 1e6
    assert found["chunked"]["temporaries_mb"] < found["plain"]["temporaries_mb"] / 4
    assert max(found["difference"].values()) < 1e-5


def test_latency(numbers):
    found = numbers(
        "latency --milliseconds=30 --megabytes=2 --train_megabytes=0.3 --vocab_size=700 --num_lanes=2 --seq_len=256 "
        "--rounds=1"
    )
    assert found["requests"] > 2
    assert found["first_batch_seconds_with_pause"] > 0.03
    assert found["throughput_kept"] == pytest.approx(
        found["tokens_per_second_with_pause"] / found["tokens_per_second"], rel=0.01
    )


def test_resume(numbers):
    found = numbers(
        "resume --megabytes=3 --num_lanes=2 --seq_len=128 --depths=0,0.5,0.8 --rounds=1 --checkpoint_megabytes=1"
    )
    begin, middle, late = found["resumes"]
    assert begin["after_step"] == 0
    assert middle["tokens_before"] == pytest.approx(found["epoch_steps"] * 256 / 2, abs=256)
    for resumed in (begin, middle, late):
        assert resumed["same_batch"]
        assert resumed["requests"] > 0
        assert resumed["bytes"] > 0
    # Any depth costs about the same: requests depend on the lanes' positions within their windows.
    assert late["requests"] <= 2 * begin["requests"]
    assert found["checkpoint"]["restored_bit_for_bit"]


def test_resume_depths():
    assert resume.depths_in(10, (0.0, 0.5, 0.55, 0.99)) == [0, 5, 9]
    with pytest.raises(ValueError, match="0 or more, below 1"):
        resume.depths_in(10, (1.0,))


def test_checkpoint(tmp_path):
    found = checkpoint.measure_size(2, 1, str(tmp_path))
    assert found["restored_bit_for_bit"]
    assert all(found[f"{name}_seconds"] > 0 for name in ("blocking", "background", "restore"))
    assert not list(tmp_path.iterdir())


def part(name: str) -> dict[str, Any]:
    found = gpu_parts.run(name, True)
    assert found is not None
    return found


def test_the_attention_part():
    found = part("attention")
    assert found
    for key, measured in found.items():
        # bf16 rounds to 2^-9 of a number; NaN would be null.
        assert max(measured["errors"].values()) < 0.02, key


def test_the_loss_part():
    for dtype, compared in part("loss").items():
        assert max(compared["difference"].values()) < (0.02 if dtype == "bfloat16" else 1e-5)


@pytest.mark.slow
def test_the_device_and_step_parts(monkeypatch):
    assert part("device")["platform"] == "cpu"
    monkeypatch.setattr(gpu_parts, "peak_flops", lambda: 8e12)  # of the tests' 8 devices together
    step = part("step")
    for batch in ("causal", "packed"):
        assert step[batch]["model_tflops"] == pytest.approx(step[batch]["mfu"], abs=1e-4)
    size = gpu_parts.tiny().step
    assert step["parameters"] == size.model.build(size.vocab_size, None).num_params
    assert step["first_loss"] == pytest.approx(np.log(256), abs=0.2)


def test_the_attention_part_finds_a_wrong_kernel(monkeypatch):
    sizes = gpu_parts.tiny()
    wrong = gpu_parts._Case(sizes, 4, 2, 512)
    monkeypatch.setattr(wrong, "_implementation", lambda name: _without_documents)
    monkeypatch.setattr(gpu_parts, "_seconds", lambda run, sizes: [1.0])
    assert min(wrong.numbers("xla")["errors"].values()) > 0.1


def _without_documents(q: Any, k: Any, v: Any, segment_ids: Any) -> Any:
    return gpu_parts._reference(q, k, v, 0 * segment_ids)


def test_the_gpu_sizes_are_those_of_the_1b_model():
    sizes = gpu_parts.full()
    assert sizes.step.model.build(sizes.step.vocab_size, None).num_params == pytest.approx(1.1e9, rel=0.15)
    assert sizes.step.tokens == 16_384
    assert (sizes.heads[0], sizes.head_dim) == (
        (sizes.step.model.num_heads, sizes.step.model.num_kv_heads),
        sizes.step.model.resolved_head_dim,
    )


def test_a_failing_part_does_not_stop_the_others(numbers, monkeypatch):
    ends = {"device": (0, '{"platform": "cpu"}\n'), "attention": (-6, ""), "loss": (0, 'log\n{"a": 1}\n')}

    def child(command: list[str], **options: Any) -> SimpleNamespace:
        (name,) = [part.removeprefix("--only=") for part in command if part.startswith("--only=")]
        if name == "step":
            raise gpu.subprocess.TimeoutExpired(command, options["timeout"])
        assert (options["env"] or {}).get("JAX_PLATFORMS") == ("cpu" if name == "torch" else None)
        code, out = ends.get(name, (0, "null\n"))
        return SimpleNamespace(returncode=code, stdout=out)

    monkeypatch.setattr(gpu.subprocess, "run", child)
    found = numbers("gpu --tiny")
    assert found["attention"] == {"error": "its process ended with exit code -6; see stderr"}
    assert found["loss"] == {"a": 1}
    assert found["step"] == {"error": "not finished after 180 s"}
    assert found["torch"] is None
    assert found["step_dots"] is None


def test_no_gpu_part_gets_more_than_the_time_left(numbers, monkeypatch):
    now, given = [0.0], []

    def child(command: list[str], **options: Any) -> SimpleNamespace:
        given.append(options["timeout"])
        now[0] += options["timeout"]
        return SimpleNamespace(returncode=0, stdout='{"platform": "gpu"}\n')

    monkeypatch.setattr(gpu.subprocess, "run", child)
    monkeypatch.setattr(gpu.time, "monotonic", lambda: now[0])
    numbers("gpu")
    assert sum(given) == 480
    assert all(a <= b for a, b in zip(given, gpu.PARTS.values(), strict=False))


def test_a_part_that_raises_reports_it(run, monkeypatch):
    def out_of_memory(sizes: Any) -> None:
        raise RuntimeError("RESOURCE_EXHAUSTED: 3 GB\nand more")

    monkeypatch.setitem(gpu_parts._PARTS, "step", out_of_memory)
    code, out, _ = run("gpu --tiny --only=step")
    assert code == 0
    assert json.loads(out) == {"error": "RuntimeError: RESOURCE_EXHAUSTED: 3 GB"}


def test_a_gpu_is_asked_for(run):
    code, out, errors = run("gpu")
    assert (code, out) == (2, "")  # after a lookup in a real process
    assert "JAX finds no GPU here" in errors


@pytest.mark.parity
@pytest.mark.parametrize("tied", [True, False])
def test_torch_takes_the_same_step(tied):
    pytest.importorskip("torch")
    import jax

    from tools.bench import torch_step

    model = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        tie_embeddings=tied,
        dtype="float32",
        initializer_std=0.1,
    )
    size = jax_step.Size(model, 256, 2, 32)
    ours = jax_step.JaxStep(size)
    theirs = torch_step.TorchStep(size, device="cpu", compile=False)
    theirs.load(jax.device_get(ours.state["params"]))
    for _ in range(4):
        assert ours.run() == pytest.approx(theirs.run(), rel=2e-6)
    embedding = theirs.model.embedding.weight.detach().numpy()
    # Decay would have moved it by 3e-6 on average; single elements with tiny gradients differ more.
    assert np.abs(np.asarray(ours.state["params"]["embedding"]) - embedding).mean() < 1e-7
    # Adam hardly sees a constant factor, such as clipping to another norm, but its moments do.
    moments = [np.square(np.asarray(leaf)).sum() for leaf in jax.tree.leaves(ours.state["opt"].nu)]
    theirs_moments = [state["exp_avg_sq"].square().sum() for state in theirs._optimizer.state.values()]
    assert float(sum(moments)) == pytest.approx(float(sum(theirs_moments)), rel=1e-4)


def test_simulate(numbers):
    found = numbers(
        "simulate --files=700 --num_lanes=24 --rows=900 --group_rows=100 --hosts=1,5,24,48 --devices=2 --batch_size=48"
    )
    assert [found[kind]["shared"] for kind in ("parquet", "files", "shared")] == [False, False, True]
    assert found["parquet"]["footers_read"] == 0  # more than 16 files per lane
    assert found["files"]["units"] == 700
    assert found["shared"]["files"] == 7
    for kind in ("parquet", "files"):
        assert all(1 <= spread < 1.6 for spread in found[kind]["rows_max_by_mean_of_lanes"])
        assert found[kind]["lanes_without_rows"] == 0
    lanes = {each["hosts"]: each["lanes_of_a_host"] for each in found["hosts"]}
    assert lanes == {1: [24, 24], 5: [5, 6], 24: [1, 1], 48: [1, 1]}
    assert [each["lanes_read_by_lanes"] for each in found["hosts"]] == [1, 1.167, 1, 2]
    assert found["mix"]["rows_from_share"] < 1
    assert found["state"]["raw_mb"] == pytest.approx(24 * 3 * 8 * len(STATE_FIELDS) / 1e6, rel=1e-3)
    assert 50 < found["state"]["json_bytes_a_lane_and_source"] < 13 * len(STATE_FIELDS)


def test_the_simulation_notices_units_that_are_read_twice_or_never(monkeypatch):
    sizes = simulate.sizes_of(200, 50)
    assert abs(sizes.mean() / 50 - 1) < 0.3
    simulate.distribute(sizes, False, 8, 10)
    monkeypatch.setattr(units, "share", lambda order, lane, num_lanes: order[lane : lane + 20])
    with pytest.raises(AssertionError, match="units are not read exactly once"):
        simulate.distribute(sizes, False, 8, 10)
    monkeypatch.setattr(simulate, "lanes_of_rows", lambda start, stop, rows: range(start // rows + 1, stop // rows))
    with pytest.raises(AssertionError, match="read by nobody"):
        simulate.hosts(5, 2, 24, 1)
