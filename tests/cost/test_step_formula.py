"""The step's time by arithmetic, against what the compiled programs of docs/benchmarks.md take by estimate."""

import pathlib

import jax
import pytest

from jaxtrain import cli
from jaxtrain.cost import clusters, step_formula
from jaxtrain.cost.roofline import Shape
from jaxtrain.distributed.sharding import MESH_AXES, MeshConfig
from jaxtrain.trainer import session
from jaxtrain.trainer.step import StepComponents, Variant

ROOT = pathlib.Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def components() -> StepComponents:
    config = cli.load(str(ROOT / "configs/1b.py"), ())
    return session.make_components(
        config, 49_152, config.plan(), MeshConfig(fsdp=1).build(jax.devices()[:1]), None, None
    )


def seconds(components: StepComponents, topology: str, variant: Variant, **axes: int) -> float:
    cluster = clusters.parse(topology, "topology")
    sizes = MeshConfig(**axes).sizes(cluster.num_chips)
    mesh = dict[str, int](zip(MESH_AXES, sizes, strict=True))
    shape = Shape(batch_size=512, seq_len=2048, micro_batches=variant.micro_batches, mesh=mesh)
    return step_formula.seconds(cluster, components.arranged(variant), shape, variant.chunk_tokens or 1024)


@pytest.mark.parametrize(
    ("topology", "variant", "compiled"),
    [
        ("v5e:2x4", Variant(micro_batches=16, remat="dots"), 6.12),
        ("v5e:2x4", Variant(micro_batches=32, remat="dots"), 6.11),
        ("v5p:2x2x2", Variant(micro_batches=2, remat="dots"), 2.67),
        ("v6e:2x4", Variant(micro_batches=16, remat="dots", chunk_tokens=4096), 2.03),
        ("v6e:2x4", Variant(micro_batches=2, remat="full", chunk_tokens=4096), 2.14),
        ("h200:1x1", Variant(micro_batches=16, remat="dots", chunk_tokens=4096), 12.51),
    ],
)
def test_it_is_near_the_compiled_program(
    components: StepComponents, topology: str, variant: Variant, compiled: float
) -> None:
    assert 0.75 < seconds(components, topology, variant) / compiled < 1.05


def test_what_slows_a_step_down(components: StepComponents) -> None:
    usual = Variant(micro_batches=16, remat="dots")
    v6e = seconds(components, "v6e:2x4", usual)
    assert seconds(components, "v6e:2x4", Variant(micro_batches=16, remat="full")) > v6e
    assert seconds(components, "v6e:2x4", Variant(micro_batches=64, remat="dots")) > v6e
    assert seconds(components, "v6e:2x4", Variant(micro_batches=16, remat="dots", chunk_tokens=256)) > v6e
    assert seconds(components, "v6e:2x4", usual, tensor=4) > v6e
    assert seconds(components, "v6e:2x4", usual, context=4) > v6e
    # Gradients scattered over a whole slice are summed everywhere first; over half of it, not.
    few = Variant(micro_batches=2, remat="dots")
    halves = seconds(components, "v5e:8x8", few, data=2)
    assert halves < seconds(components, "v5e:8x8", few)
    assert halves < seconds(components, "v5e:8x8", few, data=8)
    assert seconds(components, "v5e:2x4", usual) < seconds(components, "v5e:2x4", usual, data=2)
    # A host's GPUs are joined by fast links, hosts by a slow network.
    one, many = (seconds(components, f"h200:{hosts}x8", usual) for hosts in (1, 8))
    assert many > one / 8
