"""Collectives read from HLO: against text written by hand, and against programs whose collectives are known."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jaxtrain.cost import hlo
from jaxtrain.cost.hlo import Collective
from jaxtrain.distributed.sharding import MeshConfig

# A loop of 5 iterations by its condition, one of 7 by the compiler's count, one that depends on data; a collective in
# two parts (on a TPU), a conditional, a start-done pair, and traffic between slices.
TEXT = """HloModule jit_step, is_scheduled=true

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %sum = f32[] add(%x, %y)
}

%piece.1 (p: bf16[2,16]) -> bf16[16,16] {
  %p = bf16[2,16]{1,0} parameter(0)
  ROOT %all-gather.1 = bf16[16,16]{1,0:T(8,128)(2,1)} all-gather(%p), channel_id=3, replica_groups=[1,8]<=[8], a={0}
}

%piece.2 (p.2: bf16[2,16]) -> bf16[16,16] {
  %p.2 = bf16[2,16]{1,0} parameter(0)
  ROOT %all-gather.2 = bf16[16,16]{1,0} all-gather(%p.2), channel_id=3, replica_groups=[1,8]<=[8], dimensions={0}
}

%body (arg: (s32[], f32[4])) -> (s32[], f32[4]) {
  %arg = (s32[], f32[4]{0}) parameter(0)
  %i = s32[] get-tuple-element(%arg), index=0
  %v = f32[4]{0} get-tuple-element(%arg), index=1
  %two = s32[] constant(2)
  %next = s32[] add(%i, %two)
  %w = bf16[2,16]{1,0} custom-call(%v), custom_call_target="tpu_custom_call"
  %fusion.1 = bf16[16,16]{1,0} fusion(%w), kind=kCustom, calls=%piece.1
  %fusion.2 = bf16[16,16]{1,0} fusion(%w), kind=kCustom, calls=%piece.2
  %reduced = (f32[4]{0}, f32[2]{0}) all-reduce(%v, %v), channel_id=1, replica_groups=[4,2]<=[2,4]T(1,0), to_apply=%add
  %all-reduce.2 = f32[4]{0} get-tuple-element(%reduced), index=0
  ROOT %out = (s32[], f32[4]{0}) tuple(%next, %all-reduce.2)
}

%condition (arg.c: (s32[], f32[4])) -> pred[] {
  %arg.c = (s32[], f32[4]{0}) parameter(0)
  %i.c = s32[] get-tuple-element(%arg.c), index=0
  %bound = s32[] constant(11)
  ROOT %less = pred[] compare(%i.c, %bound), direction=LT
}

%body.2 (arg.2: (s32[], f32[4])) -> (s32[], f32[4]) {
  %arg.2 = (s32[], f32[4]{0}) parameter(0)
  %i.2 = s32[] get-tuple-element(%arg.2), index=0
  %v.2 = f32[4]{0} get-tuple-element(%arg.2), index=1
  %permuted = (f32[4]{0}, f32[4]{0}, u32[]) collective-permute-start(%v.2), source_target_pairs={{0,1},{1,0}}
  %done = f32[4]{0} collective-permute-done(%permuted)
  ROOT %out.2 = (s32[], f32[4]{0}) tuple(%i.2, %done)
}

%condition.2 (arg.d: (s32[], f32[4])) -> pred[] {
  %arg.d = (s32[], f32[4]{0}) parameter(0)
  %v.d = f32[4]{0} get-tuple-element(%arg.d), index=1
  ROOT %any = pred[] custom-call(%v.d), custom_call_target="Any"
}

%small (s: f32[4]) -> f32[4] {
  %s = f32[4]{0} parameter(0)
  ROOT %all-reduce.3 = f32[4]{0} all-reduce(%s), replica_groups=mesh['a'=4,'b'=2] {'b'}, to_apply=%add
}

%large (l: f32[4]) -> f32[4] {
  %l = f32[4]{0} parameter(0)
  %a2a = f32[4]{0} all-to-all(%l), replica_groups={{0,2},{1,3}}, dimensions={0}
  ROOT %all-reduce.4 = f32[4]{0} all-reduce(%a2a), replica_groups={}, to_apply=%add
}

ENTRY %main.1 (in: f32[4]) -> f32[4] {
  %in = f32[4]{0} parameter(0)
  %one = s32[] constant(1)
  %initial = (s32[], f32[4]{0}) tuple(%one, %in)
  %while.1 = (s32[], /*index=1*/f32[4]{0}) while(%initial), condition=%condition, body=%body
  %while.2 = (s32[], f32[4]{0}) while(%while.1), condition=%condition.2, body=%body.2
  %while.3 = (s32[], f32[4]{0}) while(%while.2), condition=%condition.2, body=%body.2, x={"known_trip_count":{"n":"7"}}
  %got = f32[4]{0} get-tuple-element(%while.3), index=1
  %pred = pred[] custom-call(%got), custom_call_target="Any"
  %chosen = f32[4]{0} conditional(%pred, %got, %got), true_computation=%small, false_computation=%large
  %scattered = f32[1]{0} reduce-scatter(%chosen), replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}, to_apply=%add
  %gathered = ((f32[1]{0}), (f32[8]{0})) all-gather-start(%scattered), replica_groups=[1,8]<=[8], dimensions={0}
  %rs = ((f32[8]{0}, f32[16]{0}), (f32[1]{0}, f32[2]{0})) reduce-scatter-start(%in, %in), replica_groups=[1,8]<=[8]
  %aa = ((f32[8]{0}), f32[8]{0}) all-to-all-start(%in), replica_groups=mesh['a'=8,'b'=1] {'a'}, dimensions={0}
  %ar = (f32[8]{0}, f32[2]{0}) all-reduce-start(%in, %in), replica_groups=[1,8]<=[8], to_apply=%add
  %alone = f32[4]{0} all-reduce(%got), replica_groups={{0},{1}}, to_apply=%add
  %token = token[] after-all()
  %send.1 = (bf16[3,4]{1,0}, u32[], token[]) send(%got, %token), channel_id=5, is_host_transfer=true
  %send.2 = (bf16[3,4]{1,0}, u32[], token[]) send(%got, %token), channel_id=6
  ROOT %result = f32[4]{0} copy(%got)
}
"""
ALL = (tuple(range(8)),)


def test_a_text_by_hand() -> None:
    assert hlo.collectives(TEXT, 8) == [
        Collective("all-gather", 512, ALL, 5, True),
        Collective("all-reduce", 24, ((0, 4), (1, 5), (2, 6), (3, 7)), 5, True),
        Collective("collective-permute", 16, ((0, 1), (1, 0)), 1, False),
        Collective("collective-permute", 16, ((0, 1), (1, 0)), 7, True),
        Collective("all-to-all", 16, ((0, 2), (1, 3)), 1, True),
        Collective("all-reduce", 16, ALL, 1, True),
        Collective("reduce-scatter", 16, ((0, 1, 2, 3), (4, 5, 6, 7)), 1, True),
        Collective("all-gather", 32, ALL, 1, True),
        Collective("reduce-scatter", 96, ALL, 1, True),
        Collective("all-to-all", 32, ALL, 1, True),
        Collective("all-reduce", 40, ALL, 1, True),
        Collective("send", 24, (), 1, True),
    ]
    assert hlo.custom_calls(TEXT) == {"tpu_custom_call", "Any"}


def test_a_condition_in_a_fusion() -> None:
    """XLA for GPUs fuses the bound of a loop with its comparison; several GPUs' micro-batches have no known count."""
    compared = """  %bound = s32[] constant(11)
  ROOT %less = pred[] compare(%i.c, %bound), direction=LT
}
"""
    fused = "\n%fused (i.f: s32[]) -> pred[] {\n  %i.f = s32[] parameter(0)\n" + compared.replace("%i.c", "%i.f")
    text = TEXT.replace(compared, "  ROOT %less.c = pred[] fusion(%i.c), kind=kLoop, calls=%fused\n}\n" + fused)
    assert text != TEXT
    assert hlo.collectives(text, 8) == hlo.collectives(TEXT, 8)


@pytest.mark.parametrize(
    ("written", "groups"),
    [
        ("[2,4]<=[8]", ((0, 1, 2, 3), (4, 5, 6, 7))),
        ("[4,2]<=[2,2,2]T(2,1,0)", ((0, 4), (2, 6), (1, 5), (3, 7))),
        ("mesh['x'=2,'y'=2,'z'=2] {'y'}", ((0, 2), (1, 3), (4, 6), (5, 7))),
        ("mesh['x'=2,'y'=2,'z'=2] {'x','z'}", ((0, 1, 4, 5), (2, 3, 6, 7))),
        ("{{0,1,2,3,4,5,6,7}}", ALL),
    ],
)
def test_the_forms_of_groups(written: str, groups: tuple[tuple[int, ...], ...]) -> None:
    text = (
        "ENTRY %m (p: f32[2]) -> f32[2] {\n  ROOT %r = f32[2]{0} all-reduce(%p), replica_groups=" + written + ", x=1\n}"
    )
    (found,) = hlo.collectives(text, 8)
    assert found.groups == groups


def test_a_program_of_eight_devices() -> None:
    """Compiled by XLA: collectives of a shard_map, in a scan of 5 iterations inside one of 3."""
    mesh = MeshConfig(data=2, fsdp=4).build()

    @jax.jit
    @functools.partial(jax.shard_map, mesh=mesh, in_specs=P(("data", "fsdp")), out_specs=P(), check_vma=False)
    def program(x: jax.Array) -> jax.Array:
        def inner(total: jax.Array, _: None) -> tuple[jax.Array, None]:
            whole = jax.lax.all_gather(x * total[0], "fsdp", tiled=True)  # 4 * 16 fp32
            return total + jnp.sin(whole).sum(), None

        def outer(total: jax.Array, _: None) -> tuple[jax.Array, None]:
            total = jax.lax.scan(inner, total, length=5)[0]
            return jax.lax.psum(total, "data"), None  # 16 fp32

        total = jax.lax.scan(outer, x, length=3)[0]
        part = jax.lax.psum_scatter(total, "fsdp", tiled=True)  # of 16 fp32
        return jax.lax.psum(part, ("data", "fsdp"))  # 4 fp32

    text = program.lower(jnp.zeros(128, jnp.float32)).compile().as_text() or ""
    found = {(one.kind, one.size, one.groups[0], one.times) for one in hlo.collectives(text, 8)}
    fsdp, data = (0, 1, 2, 3), (0, 4)
    assert found == {
        ("all-gather", 256, fsdp, 15),
        ("all-reduce", 64, data, 3),
        ("reduce-scatter", 64, fsdp, 1),
        ("all-reduce", 16, ALL[0], 1),
    }
    assert all(one.exact for one in hlo.collectives(text, 8))
    assert np.all([device in range(8) for one in hlo.collectives(text, 8) for group in one.groups for device in group])
