"""Estimates against the arrays of a real run, and against sums written out here."""

import json
import pathlib
import statistics

import jax
import pytest

from jaxtrain import cli
from jaxtrain.cli import files
from jaxtrain.cost import clusters, memory_formula
from jaxtrain.distill.teacher import bytes_per_device
from jaxtrain.distributed.sharding import MeshConfig
from jaxtrain.trainer import session, state
from tools import scale_tables
from tools.compile_check import advice
from tools.estimate import __main__ as estimate
from tools.estimate import estimate as sections

ROOT = pathlib.Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def same_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clusters, "prepare_environment", lambda: None)


def numbers(tmp_path: pathlib.Path, *flags: str) -> dict:
    path = tmp_path / "numbers.json"
    assert cli.exit_code(estimate.main, estimate.COMMAND, [*flags, f"--json={path}"]) == 0
    return json.loads(path.read_text())


@pytest.mark.parametrize("mesh", [{"fsdp": 8}, {"data": 2, "fsdp": 2, "tensor": 2}, {"fsdp": 4, "context": 2}])
def test_state_is_what_the_mesh_gives_a_device(mesh: dict[str, int]) -> None:
    config = files.load(str(ROOT / "configs/pretrain.py:tiny"), ())
    made = MeshConfig(**{"data": 1, "fsdp": 1, **mesh}).build()
    components = session.make_components(config, 1000, config.plan(), made, None, None)
    arrays = bytes_per_device(state.abstract(components.model, components.optimizer, made))
    counters = 4 + 8 + 4 + 4  # step, fingerprint, two counts of skipped steps
    assert memory_formula.state_bytes(components.model, components.optimizer, made.shape) == arrays - counters


@pytest.mark.parametrize(("topology", "unrolls"), [("a100:1x8", True), ("a100:1x1", False), ("v5e:2x4", False)])
def test_advice_about_loops_is_for_several_gpus(topology: str, unrolls: bool) -> None:
    config = files.load(str(ROOT / "configs/pretrain.py:tiny"), ())
    cluster = clusters.parse(topology, "topology", 1)
    components = session.make_components(config, 1000, config.plan(), MeshConfig().build(), None, None)
    said = "\n".join(advice.lines(components, cluster, 10**9, [{"seq_len": 512, "batch_size": 16}]))
    assert "more chips" in said
    assert (advice.NO_UNROLLING in said) == unrolls


def test_1b(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = numbers(tmp_path, f"--config={ROOT}/configs/1b.py", "--hardware=v5e:2x4", "--mfu=0.5", "--price=2")
    weights = 20 * (2 * 2048 * 2048 + 2 * 2048 * 1024 + 3 * 2048 * 5632 + 2 * 2048) + 2048
    head = 49_152 * 2048
    assert found["parameters"] == weights + 2 * head
    flops = 6 * (weights + head) + 12 * 20 * 16 * 128 * 1024  # causal: half of 2,048 keys
    seconds = 20_000_000_000 * flops / (0.5 * 8 * 197e12)
    assert found["hours"] == pytest.approx(seconds / 3600)
    assert found["dollars"] == pytest.approx(2 * 8 * seconds / 3600)
    assert found["checkpoints_gb"] == pytest.approx(3 * 12 * (weights + 2 * head) / 1e9, rel=1e-6)
    assert found["token_store_gb"] == pytest.approx(40.0)
    # The compiler for TPUs reports 11.7 GB; with remat=full 9.8 GB (libtpu 0.0.42), and 6.9 (0.0.52).
    assert found["fits"]
    assert found["memory_gb"] == pytest.approx(14.1, rel=0.05)
    full = ("--config.model.remat=full", "--config.micro_batch_tokens=16384")
    full = numbers(tmp_path, f"--config={ROOT}/configs/1b.py", *full, "--hardware=v5e:2x4")
    assert full["memory_gb"] == pytest.approx(9.8, rel=0.05)
    printed = capsys.readouterr().out
    assert "1/1 main" in printed
    assert "2.00 dollars per chip-hour" in printed


def test_stages_and_what_does_not_fit(tmp_path: pathlib.Path) -> None:
    found = numbers(tmp_path, f"--config={ROOT}/configs/270m_curriculum.py", "--hardware=rtx4090:1")
    assert len(found["stages"]) == 10
    assert sum(stage["tokens"] for stage in found["stages"]) == 1_000_000_000
    assert sum(stage["hours"] for stage in found["stages"]) == pytest.approx(found["hours"])
    assert found["token_store_gb"] == pytest.approx(1.0)  # half of each row repeats the row before
    assert found["dollars"] == pytest.approx(found["hours"] * sections.PRICES["rtx4090"])
    found = numbers(tmp_path, f"--config={ROOT}/configs/8b.py", "--hardware=h100:1")
    assert not found["fits"]
    assert found["state_gb"] > 96


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--hardware=h100:3",), "is not divisible by mesh.data * mesh.fsdp = 3"),
        (("--mfu=0",), "--mfu=0"),
        (("--mfu=1.5",), "--mfu=1.5"),
        (("--price=-1",), "--price=-1"),
        (("--hardware=h1000:8",), "did you mean"),
        (("--json=/no/such/folder/x",), "cannot be written"),
    ],
)
def test_mistakes(flags: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    argv = [f"--config={ROOT}/configs/pretrain.py:tiny", *flags]
    assert cli.exit_code(estimate.main, estimate.COMMAND, argv) == 2
    assert said in capsys.readouterr().err


def test_prices_of_all() -> None:
    assert sections.PRICES.keys() == clusters.hardware.BY_NAME.keys()
    assert jax.default_backend() == "cpu"


def test_the_tables_of_the_docs(tmp_path: pathlib.Path) -> None:
    """A compiled row shows the compiler's numbers, an estimated one is marked; the text above the tables stays."""
    stage = {"fits": True, "micro_batches": 8, "needed_bytes": 9.81e9, "sent_links_bytes": 62e9}
    stage |= {
        "sent_network_bytes": 0.0,
        "roofline_tokens_per_sec": 178_574.0,
        "roofline_mfu": 0.767,
        "bound_by": "links",
    }
    chosen = {"mesh": {"data": 2, "fsdp": 4}, "variant": {"remat": "dots", "micro_batches": 16}, "needed_bytes": 11.7e9}
    chosen |= {"tokens_per_sec_per_chip": 21_459.7, "mfu": 0.7375}
    answer = {"mesh": {"data": 1, "fsdp": 8}, "limit_bytes": 15.8e9, "chips": 8, "stages": [stage]}
    answer["by_default"] = chosen
    (tmp_path / "results.json").write_text(json.dumps({"1b v5e:2x4": answer}))
    page = tmp_path / "page.md"
    page.write_text(f"# Mine\n\n{scale_tables.MARK}\nold\n")
    flags = [f"--results={tmp_path}/results.json", f"--output={page}"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        patch.setattr(scale_tables, "SHAPES", {"v5e": (("2x4", 1), ("16x16", 2))})
        assert cli.exit_code(scale_tables.main, scale_tables.COMMAND, flags) == 0
        assert cli.exit_code(scale_tables.main, scale_tables.COMMAND, [*flags, "--compile=v7"]) == 2
    text = page.read_text()
    assert text.startswith("# Mine\n\n<!--")
    assert "old" not in text
    compiled = "| 1B | v5e:2x4 | fsdp=8 | 8 | 9.8 of 15.8 | yes | 62.0 + 0.0 | 178,574 (22,322) | 77% | links "
    compiled += "| data=2 fsdp=4, dots, 16, 11.7 | 21,460, 73.8% |"
    assert compiled in text
    assert "| 1B | 2 x v5e:16x16 | data=2 fsdp=256 | ~1 | ~" in text
    assert "| 8B (Llama 3's shape) | v5e:2x4 | fsdp=8 | ~64 | ~" in text
    assert text.count("~no") == 2  # 4B and 8B on eight chips


@pytest.mark.parametrize("chip", scale_tables.SHAPES)
def test_memory_is_near_what_compilers_say(chip: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of all rows of docs/scale.json, and no estimate accepts a row that does not fit."""
    monkeypatch.setenv("XLA_CLIENT_MEM_FRACTION", "0.75")  # of the GPUs' rows
    compiled = json.loads((ROOT / "docs/scale.json").read_text())
    ratios = []
    for name, shape, slices in scale_tables.rows(chip):
        answer = compiled[scale_tables.key_of(name, chip, shape, slices)]
        (stage,) = answer["stages"]
        config = files.load(str(ROOT / f"configs/{name}.py"), scale_tables.overrides(name, slices))
        cluster = clusters.parse(f"{chip}:{shape}", "compile", slices)
        found = sections.memory(sections.make_outlook(config, cluster, None, 1.0, 0.0)).numbers
        assert stage["fits"] or not found["fits"], (name, shape)
        if stage["fits"] and found["fits"]:
            assert found["micro_batches"] == [stage["micro_batches"]]
            ratios.append(stage["needed_bytes"] / 1e9 / found["memory_gb"])
    assert len(ratios) >= 8
    assert 0.55 < min(ratios) <= max(ratios) < 1.35
    assert 0.8 < statistics.median(ratios) < 1.1


def test_a_teachers_cache(tmp_path: pathlib.Path) -> None:
    """64 ids of 2 bytes, 64 float16 values, and one float32 tail: 260 bytes for each of 10 billion tokens."""
    found = numbers(tmp_path, f"--config={ROOT}/configs/distill.py:cached", "--hardware=h100:8")
    assert found["teacher_cache_bytes_per_token"] == 260
    assert found["teacher_cache_gb"] == pytest.approx(2600)
    assert "teacher_download_gb" not in found
