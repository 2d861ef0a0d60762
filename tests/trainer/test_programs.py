"""How a stage gets as many micro-batches as it needs, and what happens if it cannot fit."""

import dataclasses
import logging
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest

from jaxtrain.cost import memory
from jaxtrain.data import fingerprint
from jaxtrain.distributed import sharding
from jaxtrain.distributed.sharding import MeshConfig
from jaxtrain.errors import UserError
from jaxtrain.losses.cross_entropy import CrossEntropy
from jaxtrain.model.llama import Llama, LlamaConfig
from jaxtrain.optim.adamw import AdamW
from jaxtrain.plan import Plan, Stage, build_plan
from jaxtrain.trainer import programs, state
from jaxtrain.trainer.programs import Choice, StagePrograms
from jaxtrain.trainer.step import StepComponents, Variant

MODEL = LlamaConfig(
    hidden_size=16,
    intermediate_size=32,
    num_layers=1,
    num_heads=2,
    num_kv_heads=1,
    max_seq_len=64,
    dtype="float32",
    remat="none",
    scan_layers=False,
)


def make_components(**mesh: int) -> StepComponents:
    made = MeshConfig(**{"fsdp": 1, **mesh}).build(jax.devices()[: int(np.prod(list(mesh.values()) or [1]))])
    model = MODEL.build(100, made)
    optimizer = AdamW(learning_rate=1e-2).build(model.axes, made)
    return StepComponents(model, CrossEntropy().build(100, made), optimizer, made, 1.0)


def make_plan(*stages: tuple[str, int, int]) -> Plan:
    """stages: name, batch size, sequence length; ten steps each."""
    return build_plan(
        [Stage(name=name, batch_size=rows, seq_len=length, tokens=10 * rows * length) for name, rows, length in stages],
        source_names=("a",),
        num_lanes=8,
        seed=0,
        total_tokens=None,
        steps=None,
        epochs=None,
        learning_rate=1.0,
        schedule=lambda tokens, total: 1.0,
    )


@dataclasses.dataclass
class Fake:
    """Replaces lowering, which is slow: 1,000 bytes of state, and 100 for each token on a device at once."""

    compiles: list[tuple[int, int, int]] = dataclasses.field(default_factory=list)

    def __call__(self, components: StepComponents, batch_size: int, seq_len: int, micro_batches: int) -> Any:
        self.compiles.append((batch_size, seq_len, micro_batches))
        rows = batch_size // (components.mesh.shape["data"] * components.mesh.shape["fsdp"] * micro_batches)
        analysis = SimpleNamespace(
            argument_size_in_bytes=1000,
            output_size_in_bytes=1000,
            alias_size_in_bytes=1000,
            temp_size_in_bytes=100 * rows * seq_len,
        )
        return SimpleNamespace(compile=lambda: SimpleNamespace(memory_analysis=lambda: analysis))


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Fake:
    fake = Fake()
    monkeypatch.setattr(programs, "lower_train_step", fake)
    return fake


PLAN = make_plan(("short", 64, 8), ("middle", 32, 16), ("long", 16, 64))


def test_each_stage_gets_the_fewest_micro_batches_that_fit(fake: Fake, caplog: pytest.LogCaptureFixture) -> None:
    stages = StagePrograms(make_components(), PLAN, None, limit=20_000)  # 190 tokens at once
    with caplog.at_level(logging.INFO, "jaxtrain"):
        assert [stages.program(*shape).micro_batches for shape in stages.shapes] == [4, 4, 8]
    assert "Stage 3 (long): 8 micro-batches of 2 x 64 tokens: 1.38e-05 of 2e-05 GB per device" in caplog.text
    compiles = len(fake.compiles)
    stages.get(16, 64)
    assert len(fake.compiles) == compiles


def test_devices_share_the_rows(fake: Fake) -> None:
    stages = StagePrograms(make_components(data=2, fsdp=2), PLAN, None, limit=20_000)
    assert [stages.program(*shape).micro_batches for shape in stages.shapes] == [1, 1, 2]


def test_micro_batch_tokens_is_kept(fake: Fake) -> None:
    stages = StagePrograms(make_components(), PLAN, 64, limit=20_000)
    assert [stages.program(*shape).micro_batches for shape in stages.shapes] == [8, 8, 16]
    stages = StagePrograms(make_components(), PLAN, 64, limit=None)
    assert [stages.program(*shape).micro_batches for shape in stages.shapes] == [8, 8, 16]


def test_the_first_variant_that_fits_is_taken(fake: Fake) -> None:
    preferred = tuple(Variant(micro_batches=count) for count in (1, 2, 8))
    stages = StagePrograms(make_components(), PLAN, 64, 20_000, choices={(64, 8): Choice(variants=preferred)})
    assert stages.program(64, 8).variant == preferred[2]
    assert fake.compiles == [(64, 8, 1), (64, 8, 2), (64, 8, 8)]
    # None of them fits: the fewest that do, as without a choice.
    stages = StagePrograms(make_components(), PLAN, None, 20_000, choices={(64, 8): Choice(variants=preferred[:1])})
    assert stages.program(64, 8).micro_batches == 4


def test_a_later_program_is_taken_from_its_step_on(fake: Fake) -> None:
    choice = Choice(variants=(Variant(micro_batches=16),), later=Variant(micro_batches=8), from_step=5)
    stages = StagePrograms(make_components(), PLAN, None, 20_000, choices={(64, 8): choice})
    stages.begin(1)
    assert stages.program(64, 8).micro_batches == stages.program(64, 8, 4).micro_batches == 16
    stages.start(1)  # in the background: the next stage, then the later program
    assert stages.program(64, 8, 5).micro_batches == stages.last_program(64, 8).micro_batches == 8
    assert [shape for shape in fake.compiles if shape[0] == 64] == [(64, 8, 16), (64, 8, 8)]
    assert stages.ready(64, 8, 5)
    assert fake.compiles.index((32, 16, 1)) < fake.compiles.index((64, 8, 8))
    # A resume behind that step needs the later program alone.
    fake.compiles.clear()
    stages = StagePrograms(make_components(), PLAN, None, None, choices={(64, 8): choice})
    stages.begin(1, 7)
    assert stages.program(64, 8, 7).micro_batches == 8
    assert fake.compiles == [(64, 8, 8)]


def test_what_will_not_fit_is_named_before_the_first_step(fake: Fake) -> None:
    stages = StagePrograms(make_components(), PLAN, None, limit=7_000)  # 60 tokens: a row of 64 is too long
    stages.begin(1)
    with pytest.raises(
        UserError,
        match=r"Stage 3 \(long\) does not fit: even with one row of 64 tokens .* needs 7.4e-06 GB, .* 7e-06 GB",
    ) as caught:
        stages.settle(1)
    for fix in ("model.remat=full (now none)", "smaller model", "seq_len", "mesh.fsdp, now 1"):
        assert fix in str(caught.value)
    assert stages.program(64, 8).micro_batches == 16
    # If a resumed run is past the long stage, its size does not matter.
    StagePrograms(make_components(), make_plan(("long", 16, 64), ("short", 64, 8)), None, limit=7_000).settle(2)


def test_nothing_is_compiled_ahead_without_a_limit(fake: Fake) -> None:
    stages = StagePrograms(make_components(), PLAN, None, limit=None)
    stages.settle(1)
    assert fake.compiles == []


def test_gpus_compile_all_stages_before_the_first_step(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    """Autotuning would make steps wait."""
    chips = np.array([SimpleNamespace(platform="gpu")])
    mesh: Any = SimpleNamespace(devices=chips, shape={"data": 1, "fsdp": 1, "expert": 1, "tensor": 1, "context": 1})
    components = dataclasses.replace(make_components(), mesh=mesh)
    stages = StagePrograms(components, PLAN, None, limit=None)
    stages.settle(2)
    assert fake.compiles == [(32, 16, 1), (16, 64, 1)]


def test_processes_agree_on_the_most_that_any_needs(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    stages = StagePrograms(make_components(), PLAN, None, limit=20_000)
    monkeypatch.setattr(programs.consensus, "largest", lambda value: max(value, 8))  # another process needs 8
    assert stages.program(64, 8).micro_batches == 8
    assert fake.compiles[-1] == (64, 8, 8)
    monkeypatch.setattr(programs.consensus, "largest", lambda value: 17)  # and it cannot fit even one row
    with pytest.raises(UserError, match="device of another process"):
        stages.program(16, 64)


def test_a_compiler_that_gives_up_counts_as_too_large(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    def lower(components: StepComponents, batch_size: int, seq_len: int, micro_batches: int) -> Any:
        if micro_batches < 8:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm.")
        return fake(components, batch_size, seq_len, micro_batches)

    monkeypatch.setattr(programs, "lower_train_step", lower)
    assert StagePrograms(make_components(), PLAN, None, limit=20_000).program(64, 8).micro_batches == 8


@pytest.mark.parametrize("elsewhere", [False, True])
def test_a_batch_with_too_many_documents_takes_another_program(
    elsewhere: bool, fake: Fake, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel takes two documents per row; two devices have 8 rows each in two micro-batches."""
    asked = []
    monkeypatch.setattr(Llama, "most_documents", lambda self, rows, seq_len: (rows // 2, rows) if self.bound else None)
    monkeypatch.setattr(Llama, "bound", property(lambda self: self.config.attention == "auto"), raising=False)
    monkeypatch.setattr(programs.consensus, "any_process", lambda value: asked.append(value) or value or elsewhere)
    lowered = []
    monkeypatch.setattr(
        programs,
        "lower_train_step",
        lambda parts, *shape: lowered.append(parts.model.config.attention) or fake(parts, *shape),
    )
    stages = StagePrograms(make_components(fsdp=2), make_plan(("only", 16, 64)), 256)
    usual = stages.get(16, 64)
    rows = np.array([3, 3, 1, 1, 1, 1, 1, 1])  # of this process, most documents first: 8 in the worst micro-batch
    assert (stages.get(16, 64, rows) is usual) != elsewhere
    assert asked == [False]
    crowded = stages.get(16, 64, rows + (rows == 3))
    assert crowded is not usual
    assert asked == [False, True]
    assert lowered == ["auto", "xla"]
    # Nothing is asked of other processes if there is no bound.
    monkeypatch.setattr(Llama, "most_documents", lambda self, rows, seq_len: None)
    assert stages.get(16, 64, 100 * rows) is usual
    assert len(asked) == 2


@pytest.mark.slow
def test_it_changes_rounding_only() -> None:
    """The real program: with less memory the same step, in several micro-batches."""
    components, plan, rng = make_components(), make_plan(("only", 8, 16)), np.random.default_rng(0)
    ids = rng.integers(0, 100, (2, 8, 16)).astype(np.int32)
    batch = {
        "tokens": ids[0],
        "targets": ids[1],
        "segment_ids": np.ones((8, 16), np.int32),
        "positions": np.broadcast_to(np.arange(16, dtype=np.int32), (8, 16)),
        "loss_mask": rng.random((8, 16)) < 0.7,
    }
    whole = StagePrograms(components, plan, None, limit=None).program(8, 16)
    assert whole.micro_batches == 1
    most = memory.needed(whole.executable)
    assert most is not None
    parted = StagePrograms(components, plan, None, limit=most - 1).program(8, 16)
    assert parted.micro_batches > 1
    assert (memory.needed(parted.executable) or 0) < most
    found = []
    for program in (whole, parted):
        arrays = jax.device_put(batch, sharding.batch_sharding(components.mesh))
        start = state.create(components.model, components.optimizer, components.mesh, seed=0)
        found.append(jax.device_get(program.executable(start, arrays, np.float32(1e-2), fingerprint.split(0))))
    (mine, measured), (theirs, expected) = found
    np.testing.assert_allclose(measured["loss"], expected["loss"], rtol=1e-6)
    np.testing.assert_allclose(measured["grad_norm"], expected["grad_norm"], rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), mine["opt"], theirs["opt"])
    np.testing.assert_array_equal(mine["meta"]["fingerprint"], theirs["meta"]["fingerprint"])
