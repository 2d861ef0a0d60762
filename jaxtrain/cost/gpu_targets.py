"""What XLA's compiler wants to know of a GPU that is not there: a GpuTargetConfigProto as text."""

from jaxtrain.cost.hardware import Chip

# cores, FPUs a core, shared memory a core, of that for one block at most, L2, GHz, threads a core, JAX's device kind.
# NVIDIA's architecture white papers, and CUDA C++ Programming Guide, "Compute Capabilities".
_DETAILS = {
    "a100-40gb": (108, 64, 167_936, 166_912, 40 << 20, 1.41, 2048, "NVIDIA A100-SXM4-40GB"),
    "a100": (108, 64, 167_936, 166_912, 40 << 20, 1.41, 2048, "NVIDIA A100-SXM4-80GB"),
    "h100-pcie": (114, 128, 233_472, 232_448, 50 << 20, 1.755, 2048, "NVIDIA H100 PCIe"),
    "h100": (132, 128, 233_472, 232_448, 50 << 20, 1.98, 2048, "NVIDIA H100 80GB HBM3"),
    "h200": (132, 128, 233_472, 232_448, 60 << 20, 1.98, 2048, "NVIDIA H200"),
    "l40s": (142, 128, 102_400, 101_376, 96 << 20, 2.52, 1536, "NVIDIA L40S"),
    "rtx4090": (128, 128, 102_400, 101_376, 72 << 20, 2.52, 1536, "NVIDIA GeForce RTX 4090"),
}


def target_config(chip: Chip) -> str:
    """The proto's text for a GPU of the hardware table."""
    cores, fpus, shared, optin, l2, clock, threads, kind = _DETAILS[chip.name]
    assert chip.compute_capability is not None
    major, minor = chip.compute_capability
    return f"""gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: {threads}
  shared_memory_per_block: 49152 shared_memory_per_core: {shared} shared_memory_per_block_optin: {optin}
  core_count: {cores} fpus_per_core: {fpus} clock_rate_ghz: {clock}
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: {chip.bandwidth:.0f} l2_cache_size: {l2} device_memory_size: {chip.memory}
  cuda_compute_capability {{ major: {major} minor: {minor} }}
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 }}
device_description_str: "{kind}"
"""
