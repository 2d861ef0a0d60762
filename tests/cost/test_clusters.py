"""Names of clusters: which are accepted, and which are refused with a list of the available ones."""

import pathlib
import re
import subprocess
import sys
import types

import pytest

from jaxtrain.cost import clusters, hardware
from jaxtrain.errors import UserError

ROOT = pathlib.Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("text", "slices", "chips", "island"),
    [
        ("v5e:2x4", 1, 8, 8),
        ("V5E:16x16", 2, 512, 256),
        ("v5p:8x8x8", 1, 512, 512),
        ("v4:4x4x12", 1, 192, 192),
        ("h200:8x8", 1, 64, 8),
        ("h100:8", 1, 8, 8),
        ("rtx4090:3x1", 1, 3, 1),
    ],
)
def test_names(text: str, slices: int, chips: int, island: int) -> None:
    cluster = clusters.parse(text, "topology", slices)
    assert (cluster.num_chips, cluster.chips_per_island) == (chips, island)
    assert cluster.islands * island == chips
    assert cluster.chip is hardware.BY_NAME[text.split(":")[0].lower()]


@pytest.mark.parametrize(
    ("text", "slices", "said"),
    [
        ("v5x:2x4", 1, "no chip 'v5x' .* v5p or v5e"),
        ("h20:8", 1, "did you mean h200"),
        ("v5e:2x3", 1, r"no slice v5e:2x3; the nearest in size is v5e:2x4. There are 1x1, 2x2, 2x4,"),
        ("v5e:16x32", 1, "--topology=v5e:16x16 --slices=2"),
        ("v5e:2x2x2", 1, "the nearest in size is v5e:2x4"),
        ("v5p:4x4x6", 1, "any three ascending multiples of 4"),
        ("v5p:16x16x64", 1, "up to 6,144 chips"),
        ("v5p:8", 1, "the nearest in size is v5p:2x2x2"),
        ("v5e", 1, "for example v5e:2x4"),
        ("v5e:", 1, "the shape is missing"),
        ("v5e:2x", 1, "not of the form"),
        ("v5e:0x4", 1, "no slice v5e:0x4"),
        ("h100:2x17", 1, "1 to 16 GPUs per host"),
        ("h100:0x8", 1, "hosts x GPUs"),
        ("h100:1x2x8", 1, "hosts x GPUs"),
        ("h100:8", 2, "--slices=2"),
        ("v5e:2x4", 0, "--slices=0"),
    ],
)
def test_what_is_refused(text: str, slices: int, said: str) -> None:
    with pytest.raises(UserError, match=said) as caught:
        clusters.parse(text, "topology", slices)
    assert "--topology=" in str(caught.value) or "--slices=" in str(caught.value)


def test_every_gpu_of_the_table_has_a_target() -> None:
    """The table also has the name that JAX will use for it."""
    for chip in hardware.CHIPS:
        if chip.platform != "gpu":
            continue
        text = clusters.target_config(chip)
        kind = re.search(r'device_description_str: "(.*)"', text)
        assert kind is not None
        assert hardware.of_kind(kind[1]) is chip
        assert f"device_memory_size: {chip.memory}" in text


@pytest.mark.slow
def test_every_slice_of_the_table_can_be_compiled_for() -> None:
    """In separate processes, since the compiler's settings are read before JAX is imported; two may run at a time."""
    pytest.importorskip("libtpu")
    script = (
        "from jaxtrain.cost import clusters\n"
        "clusters.prepare_environment()\n"
        "for kind, shapes in clusters._SHAPES.items():\n"
        "    for shape in shapes:\n"
        "        cluster = clusters.parse(f'{kind}:{shape}', 'topology')\n"
        "        assert len(clusters.devices(cluster)) == cluster.num_chips, cluster\n"
    )
    both = [subprocess.Popen([sys.executable, "-c", script], cwd=ROOT) for _ in range(2)]
    assert [process.wait() for process in both] == [0, 0]


def device(kind: str, **attributes: object) -> types.SimpleNamespace:
    return types.SimpleNamespace(device_kind=kind, **attributes)


def test_the_devices_of_a_run_are_a_cluster() -> None:
    v5e = [device("TPU v5 lite", coords=(x, y, 0), slice_index=s) for s in (0, 1) for x in range(4) for y in range(2)]
    assert str(clusters.of_devices(v5e)) == "2 slices of v5e:2x4"
    assert clusters.islands(clusters.parse("v5e:2x4", "x", 2), v5e) == [0] * 8 + [1] * 8
    v5p = [device("TPU v5", coords=(x, y, z)) for x in range(4) for y in range(4) for z in range(8)]
    assert str(clusters.of_devices(v5p)) == "v5p:4x4x8"
    # One process a GPU, hosts by JAX's slices; and, as compiled for without one, a process a host.
    each = [device("NVIDIA H200", id=n, process_index=n, slice_index=n // 4) for n in range(8)]
    found = clusters.of_devices(each)
    assert str(found) == "h200:2x4"
    assert found is not None
    assert clusters.islands(found, each) == [0, 0, 0, 0, 1, 1, 1, 1]
    assert clusters.of_devices([device("cpu")]) is None
    assert clusters.of_devices(v5e[:3]) is None
