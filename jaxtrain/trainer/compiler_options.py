"""XLA's options for the programs of a run, by platform and chip.

Options of `TABLE` were chosen by the estimate of compiled programs (docs/benchmarks.md), or from a source that measured
them, since no chip was at hand. `config.compiler_options` adds to them and overrides them.
"""

import dataclasses
import difflib
import logging
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxtrain.errors import UserError

logger = logging.getLogger("jaxtrain")

Value = int | float | bool | str


@dataclasses.dataclass(frozen=True)
class Option:
    """An option of XLA.

    Attributes:
        reason: What it does for a step, and where that is known from.
        versions: The compiler that it was tried with.
        applies: Whether a chip of the platform gets it, by JAX's device kind.
    """

    platform: str
    name: str
    value: Value
    reason: str
    versions: str
    applies: Callable[[str], bool] = lambda kind: True


_LIBTPU = "libtpu 0.0.42.1"
_FUSED = (
    "Together: an all-gather is spread over the matrix products beside it, which hide it. v5e does so by default; on "
    "v5p and v6e the gathers of layers would wait (1B on 8 chips: 155 and 309 ms of a step). From MaxText's Trillium "
    "recipes (benchmarks/xla_flags_library.py, CF_FOR_ALL_GATHER)."
)


def _is_large(kind: str) -> bool:
    return kind in ("TPU v5", "TPU v5p") or "v6" in kind


TABLE = (
    Option(
        "tpu",
        "xla_tpu_enable_windowed_einsum_for_all_gather",
        False,
        "In windows, each chunk of a product with gathered weights reads and writes its output again, SwiGLU does not "
        "fuse, and sums are rounded to bf16 in a pattern that depends on mesh.fsdp. MaxText's recipe of 8B without "
        "collective matmuls for Trillium does the same.",
        _LIBTPU,
    ),
    *(
        Option("tpu", name, True, _FUSED, _LIBTPU, applies=_is_large)
        for name in (
            "xla_tpu_enable_async_collective_fusion",
            "xla_tpu_enable_async_collective_fusion_fuse_all_gather",
            "xla_tpu_enable_async_collective_fusion_multiple_steps",
            "xla_tpu_overlap_compute_collective_tc",
            "xla_enable_async_all_gather",
        )
    ),
)


def of(kind: str, platform: str) -> dict[str, Value]:
    """The table's options for a device.

    Args:
        kind: JAX's device kind, such as "TPU v5 lite".
        platform: "cpu", "gpu" or "tpu".
    """
    return {option.name: option.value for option in TABLE if option.platform == platform and option.applies(kind)}


def resolve(mesh: jax.sharding.Mesh, given: Mapping[str, Value]) -> dict[str, Value]:
    """The options of a run: the table's, then the config's.

    The table's options that this version of the compiler does not know are left out, with a warning.

    Args:
        mesh: The device mesh.
        given: `config.compiler_options`.

    Raises:
        UserError: The compiler does not know an option of the config, or its value.
    """
    here = (device for device in mesh.devices.flat if device.process_index == jax.process_index())
    device = next(here, mesh.devices.flat[0])
    table = of(device.device_kind, device.platform)
    for name in [*table] if _problem(device, table) else ():
        if (problem := _problem(device, {name: table[name]})) is not None:
            logger.warning("Compiler option %s is not used: %s", name, problem)
            del table[name]
    for name, value in given.items():
        if (problem := _problem(device, {name: value})) is not None:
            near = difflib.get_close_matches(name, [option.name for option in TABLE])
            advice = f" Did you mean {near[0]}?" if near else ""
            raise UserError(
                f"compiler_options.{name}={value}: XLA's compiler for {device.platform} refuses it: {problem}.{advice}"
            )
    return table | dict(given)


def _problem(device: Any, options: Mapping[str, Value]) -> str | None:
    """Compiles a trivial program with the options. Returns the compiler's complaint, or None."""
    if not options:
        return None
    scalar = jax.ShapeDtypeStruct((), jnp.float32, sharding=jax.sharding.SingleDeviceSharding(device))
    try:
        jax.jit(lambda x: x + 1, compiler_options=dict(options)).lower(scalar).compile()
    except (jax.errors.JaxRuntimeError, ValueError, RuntimeError) as error:
        return str(error).strip().splitlines()[0]
    return None
