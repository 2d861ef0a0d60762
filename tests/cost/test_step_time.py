"""The estimate of a step's time, against programs whose operations are counted by hand."""

import jax
import jax.numpy as jnp
import pytest

from jaxtrain.cost import hardware, hlo, step_time

CHIP = hardware.BY_NAME["v5e"]
VOCAB = 4096
# Seven turns of a loop: a product of 1,024 x 2,048 by 2,048 x 512 as a TPU writes it, whose weights are the slice of a
# stack of 7; a norm; and an attention kernel. Beside the product an all-gather. After the loop the head and an
# all-reduce of all chips.
TEXT = """HloModule jit_step, is_scheduled=true

FileNames
1 "/home/me/jaxtrain/jaxtrain/model/layers.py"
2 "/home/me/.venv/lib/python3.11/site-packages/flax/nnx/transforms.py"

FunctionNames
1 "Norm.__call__"
2 "DecoderLayer.<locals>.inner"

FileLocations
1 {file_name_id=1 function_name_id=1 line=34 end_line=34 column=1 end_column=2}
2 {file_name_id=2 function_name_id=2 line=7 end_line=7 column=1 end_column=2}

StackFrames
1 {file_location_id=1 parent_frame_id=1}
2 {file_location_id=2 parent_frame_id=2}

%product (x: bf16[1024,2048], stack: bf16[7,2048,512], i: s32[]) -> bf16[1024,512] {
  %x = bf16[1024,2048]{1,0} parameter(0)
  %stack = bf16[7,2048,512]{2,1,0} parameter(1)
  %i = s32[] parameter(2)
  %zero = s32[] constant(0)
  %slice = bf16[1,2048,512]{2,1,0} dynamic-slice(%stack, %i, %zero, %zero), dynamic_slice_sizes={1,2048,512}
  %w = bf16[2048,512]{1,0} bitcast(%slice)
  ROOT %convolution = bf16[1024,512]{1,0} convolution(%x, %w), dim_labels=bf_io->bf
}

%normed (x.1: f32[1024,2048]) -> bf16[1024,2048] {
  %x.1 = f32[1024,2048]{1,0} parameter(0)
  ROOT %convert = bf16[1024,2048]{1,0:T(8,128)(2,1)} convert(%x.1)
}

%body (arg: (s32[], f32[1024,2048], bf16[7,2048,512])) -> (s32[], f32[1024,2048], bf16[7,2048,512]) {
  %arg = (s32[], f32[1024,2048]{1,0}, bf16[7,2048,512]{2,1,0}) parameter(0)
  %i.1 = s32[] get-tuple-element(%arg), index=0
  %x.2 = f32[1024,2048]{1,0} get-tuple-element(%arg), index=1
  %stack.1 = bf16[7,2048,512]{2,1,0} get-tuple-element(%arg), index=2
  %norm = bf16[1024,2048]{1,0} fusion(%x.2), calls=%normed, metadata={op_name="a" stack_frame_id=2}
  %near = bf16[1024,2048]{1,0:T(8,128)(2,1)S(1)} copy(%norm)
  %gather = (bf16[64,512], bf16[512,512]) all-gather-start(%near), channel_id=1, replica_groups=[1,8]<=[8]
  %y = bf16[1024,512]{1,0} fusion(%norm, %stack.1, %i.1), calls=%product, metadata={op_name="transpose(jvp)"}
  %gathered = bf16[512,512]{1,0} all-gather-done(%gather)
  %splash_mqa_fwd = (f32[1,2,256,128]{3,2,1,0}, QUERY) custom-call(%q, %k), custom_call_target="tpu_custom_call"
  ROOT %out = (s32[], f32[1024,2048]{1,0}, bf16[7,2048,512]{2,1,0}) tuple(%i.1, %x.2, %stack.1)
}

%true (arg.c: (s32[], f32[1024,2048], bf16[7,2048,512])) -> pred[] {
  %arg.c = (s32[], f32[1024,2048]{1,0}, bf16[7,2048,512]{2,1,0}) parameter(0)
  ROOT %less = pred[] constant(true)
}

ENTRY %main (p: f32[1024,2048], s: bf16[7,2048,512], h: bf16[2048,4096]) -> f32[1024,4096] {
  %p = f32[1024,2048]{1,0} parameter(0)
  %s = bf16[7,2048,512]{2,1,0} parameter(1)
  %h = bf16[2048,4096]{1,0} parameter(2)
  %start = s32[] constant(0)
  %init = (s32[], f32[1024,2048]{1,0}, bf16[7,2048,512]{2,1,0}) tuple(%start, %p, %s)
  %loop = (s32[], f32[1], bf16[1]) while(%init), condition=%true, body=%body, config={"known_trip_count":{"n":"7"}}
  %head = f32[1024,4096]{1,0} dot(%p, %h), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  ROOT %reduced = f32[1024,4096]{1,0} all-reduce(%head), channel_id=2, replica_groups=[1,8]<=[8], to_apply=%add
}
"""
QUERY = "bf16[1,2,3,1024,128]{4,3,2,1,0}"
TEXT = TEXT.replace("QUERY", QUERY).replace(
    "  %near", f"  %q = {QUERY} bitcast(%norm)\n  %k = bf16[1,2,1024,128]{{3,2,1,0}} bitcast(%norm)\n  %near"
)


def test_every_operation_is_counted() -> None:
    found = step_time.estimate(TEXT, CHIP, [0] * 8, VOCAB)
    kernels = {kernel.name: kernel for kernel in found.kernels}
    assert found.exact

    product = kernels["y"]
    assert product.part == "matmuls, backward"
    assert product.times == 7
    assert product.flops == 7 * 2 * 1024 * 2048 * 512
    assert product.bytes == 7 * 2 * (1024 * 2048 + 2048 * 512 + 1024 * 512 + 2)  # the slice of the stack, and the index
    product_seconds = max(product.flops / CHIP.flops, product.bytes / CHIP.bandwidth)
    assert product.seconds == pytest.approx(product_seconds)

    norm = kernels["norm"]
    assert (norm.bytes, norm.flops) == (7 * 1024 * 2048 * (4 + 2), 0)
    assert norm.seconds == pytest.approx(norm.bytes / CHIP.bandwidth / 0.85)
    assert (norm.source, norm.part) == ("Norm.__call__ model/layers.py:34", "norms")  # not flax, which it called
    assert kernels["near"].bytes == 7 * 1024 * 2048 * 2  # VMEM costs no traffic of HBM

    attention = kernels["splash_mqa_fwd"]
    assert attention.part == "attention, forward"
    # Blocks of 256 leave 10 of 16, for two products of 6 heads.
    assert attention.flops == pytest.approx(7 * 2 * 2 * 6 * 1024 * 1024 * 128 * 10 / 16)
    assert attention.seconds == pytest.approx(attention.flops / CHIP.flops / 0.45)

    head = kernels["head"]
    assert head.part == "head and loss"
    assert head.flops == 2 * 1024 * 2048 * 4096

    gather, reduced = found.communication
    sent = 512 * 512 * 2 * 7 / 8
    assert (gather.kind, gather.seconds) == ("all-gather", pytest.approx(7 * sent / 90e9))
    assert gather.exposed == pytest.approx(max(0, 7 * sent / 90e9 - product_seconds))
    assert reduced.seconds == pytest.approx(2 * 1024 * 4096 * 4 * 7 / 8 / 90e9)
    assert reduced.exposed == pytest.approx(reduced.seconds)
    assert found.seconds == pytest.approx(sum(kernel.seconds for kernel in found.kernels) + found.exposed)
    assert sum(found.parts().values()) == pytest.approx(found.seconds)
    assert found.wastes()[0][0].startswith("all-reduce, exposed")


def test_the_kernel_of_a_whole_backward_pass_has_five_products() -> None:
    """It returns one dq per block of keys."""
    fused = TEXT.replace("splash_mqa_fwd", "splash_mqa_dkv").replace(
        f"{QUERY}) custom", "bf16[1,2,4,3,1024,128]{5,4,3,2,1,0}, bf16[1,2,1024,128]{3,2,1,0}) custom"
    )
    kernel = next(k for k in step_time.estimate(fused, CHIP, [0] * 8, VOCAB).kernels if "splash" in k.name)
    assert kernel.part == "attention, backward"
    assert kernel.flops == pytest.approx(7 * 5 * 2 * 6 * 1024 * 1024 * 128 * 10 / 16)


def test_gpu_kernels_have_gaps_and_conditionals_wait_for_the_host() -> None:
    chip = hardware.BY_NAME["h200"]
    text = """HloModule jit_step, is_scheduled=true

%yes (a: bf16[8,128]) -> bf16[8,128] {
  %a = bf16[8,128]{1,0} parameter(0)
  ROOT %copied = bf16[8,128]{1,0} copy(%a)
}

%no (b: bf16[8,128]) -> bf16[8,128] {
  ROOT %b = bf16[8,128]{1,0} parameter(0)
}

ENTRY %main (p: pred[], q: bf16[4,2048,16,128], w: bf16[8192,2048], x: bf16[8,128]) -> bf16[8,128] {
  %p = pred[] parameter(0)
  %q = bf16[4,2048,16,128]{3,2,1,0} parameter(1)
  %w = bf16[8192,2048]{1,0} parameter(2)
  %x = bf16[8,128]{1,0} parameter(3)
  %gemm = (bf16[8192,8192], s8[32]) custom-call(%w, %w), custom_call_target="__cublas$gemm", backend_config=CONTRACTED
  %eight = (bf16[8192,8192], s8[32]) custom-call(%w, %w), custom_call_target="EIGHT", backend_config=CONTRACTED
  %fmha = (bf16[4,2048,16,128], u8[0]) custom-call(%q, %q, %q), custom_call_target="__cudnn$fmhaSoftmaxBackward"
  ROOT %either = bf16[8,128]{1,0} conditional(%p, %x, %x), true_computation=%yes, false_computation=%no
}
"""
    text = text.replace("EIGHT", "__cublas$lt$matmul$f8").replace("CONTRACTED", '{"lhs_contracting_dimensions":["1"]}')
    found = step_time.estimate(text, chip, [0], VOCAB)
    kernels = {kernel.name: kernel for kernel in found.kernels}
    assert kernels["gemm"].flops == 2 * 8192 * 8192 * 2048
    assert kernels["gemm"].seconds == pytest.approx(kernels["gemm"].flops / 780e12 + 1.5e-6)
    assert kernels["eight"].seconds == pytest.approx(kernels["gemm"].flops / 2 / 780e12 + 1.5e-6)
    assert kernels["fmha"].flops == 5 * 4 * 16 * 2048 * 2048 * 128  # half of the square
    assert "copied" not in kernels  # of the longer branch
    assert kernels["either"].part == "host waits of conditionals"


def test_a_compiled_program() -> None:
    """JAX's own text: a gradient through a scan, whose products and source lines are known."""

    def loss(w: jax.Array, x: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0].sum()

    shapes = (jax.ShapeDtypeStruct((5, 256, 256), jnp.float32), jax.ShapeDtypeStruct((128, 256), jnp.float32))
    text = str(jax.jit(jax.grad(loss)).lower(*shapes).compile().as_text())
    found = step_time.estimate(text, CHIP, [0], VOCAB)
    products = [kernel for kernel in found.kernels if kernel.flops]
    # One forward and two backward, of which XLA drops the gradient by the first input or not.
    assert sum(kernel.flops for kernel in products) == 5 * 3 * 2 * 128 * 256 * 256
    assert any("test_step_time.py" in kernel.source for kernel in found.kernels)
    assert any("test_step_time.py" in source for source in hlo.Program(text).sources.values())
