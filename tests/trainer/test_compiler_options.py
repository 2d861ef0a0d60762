"""XLA's options by platform, and those of the config."""

import logging

import pytest

from jaxtrain.distributed.sharding import MeshConfig
from jaxtrain.errors import UserError
from jaxtrain.trainer import compiler_options
from jaxtrain.trainer.compiler_options import Option

WINDOWS = "xla_tpu_enable_windowed_einsum_for_all_gather"


@pytest.mark.parametrize(
    ("kind", "platform", "fused"),
    [("TPU v5 lite", "tpu", False), ("TPU v5", "tpu", True), ("TPU v6 lite", "tpu", True)],
)
def test_the_table_by_chip(kind, platform, fused):
    options = compiler_options.of(kind, platform)
    assert options[WINDOWS] is False
    assert ("xla_tpu_enable_async_collective_fusion_fuse_all_gather" in options) is fused


def test_other_platforms_get_no_options_of_tpus():
    assert compiler_options.of("cpu", "cpu") == {}


def test_the_config_adds_options():
    given = {"xla_cpu_enable_fast_math": False}
    assert compiler_options.resolve(MeshConfig().build(), given) == given


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("xla_tpu_enable_windowed_einsum_for_all_gathers", True, f"No such compile option.*Did you mean {WINDOWS}"),
        ("xla_cpu_enable_fast_math", "perhaps", "not a valid bool"),
    ],
)
def test_unknown_options_are_refused_by_name(name, value, said):
    with pytest.raises(UserError, match=f"compiler_options.{name}={value}: .*{said}"):
        compiler_options.resolve(MeshConfig().build(), {name: value})


def test_options_that_this_compiler_does_not_know_are_left_out(monkeypatch, caplog):
    known, gone = "xla_cpu_enable_fast_math", "xla_no_more"
    table = tuple(Option("cpu", name, False, "", "") for name in (known, gone))
    monkeypatch.setattr(compiler_options, "TABLE", table)
    with caplog.at_level(logging.WARNING, "jaxtrain"):
        assert compiler_options.resolve(MeshConfig().build(), {}) == {known: False}
    assert f"{gone} is not used" in caplog.text
