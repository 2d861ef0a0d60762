"""Accelerators: memory, arithmetic, bandwidths. For utilization, estimates and compile checks.

Numbers are published ones for one JAX device (a TPU v4 or v5p chip is one device), from cloud.google.com/tpu/docs and
NVIDIA's data sheets. A GPU's memory is what CUDA reports: the data sheet's number less the driver's share.
"""

import dataclasses

GiB = 1 << 30


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
    """One kind of accelerator.

    Attributes:
        name: as in flags.
        kinds: JAX's device kind contains one of them.
        platform: JAX's.
        memory: bytes.
        flops: dense bf16 FLOP/s with fp32 accumulation.
        bandwidth: of its memory, bytes/s.
        links: bytes/s that a chip sends within its slice (TPU) or host (GPU), all links together, one direction.
        ring: of those, what one collective can use. A TPU's ring goes both ways around, over two links.
        network: bytes/s that a chip sends to other slices or hosts, one direction. For GPUs it depends on the cluster;
            these are usual: 400 Gb/s for a Hopper, 200 for an A100, a host's 100 Gb/s shared by 8 for the others.
        compute_capability: of an NVIDIA GPU.
    """

    name: str
    kinds: tuple[str, ...]
    platform: str
    memory: int
    flops: float
    bandwidth: float
    links: float
    ring: float
    network: float
    compute_capability: tuple[int, int] | None = None


def _tpu(
    name: str, kinds: tuple[str, ...], gib: int, tflops: float, gbps: float, ici: float, link: float, dcn: float
) -> Chip:
    """ici (all links), link, dcn: GB/s in one direction."""
    return Chip(
        name=name,
        kinds=kinds,
        platform="tpu",
        memory=gib * GiB,
        flops=tflops * 1e12,
        bandwidth=gbps * 1e9,
        links=ici * 1e9,
        ring=2 * link * 1e9,
        network=dcn * 1e9,
    )


def _gpu(
    name: str,
    kind: str,
    gib: float,
    tflops: float,
    gbps: float,
    nvlink: float,
    network: float,
    capability: tuple[int, int],
) -> Chip:
    """nvlink (or PCIe), network: GB/s in one direction."""
    return Chip(
        name=name,
        kinds=(kind,),
        platform="gpu",
        memory=round(gib * GiB),
        flops=tflops * 1e12,
        bandwidth=gbps * 1e9,
        links=nvlink * 1e9,
        ring=nvlink * 1e9,
        network=network * 1e9,
        compute_capability=capability,
    )


# The first match counts: "TPU v5 lite" is a v5e, "TPU v5" a v5p.
CHIPS = (
    _tpu("v4", ("TPU v4",), 32, 275.0, 1228, 300, 45, 6.25),
    _tpu("v5e", ("TPU v5 lite", "TPU v5e"), 16, 197.0, 819, 200, 45, 3.125),
    _tpu("v5p", ("TPU v5p", "TPU v5"), 95, 459.0, 2765, 600, 90, 6.25),
    _tpu("v6e", ("TPU v6 lite", "TPU v6e"), 32, 918.0, 1640, 400, 90, 12.5),
    _gpu("a100-40gb", "A100-SXM4-40GB", 39.4, 312.0, 1555, 300, 25, (8, 0)),
    _gpu("a100", "A100", 79.1, 312.0, 2039, 300, 25, (8, 0)),
    _gpu("h100-pcie", "H100 PCIe", 79.1, 756.0, 2039, 64, 12.5, (9, 0)),
    _gpu("h100", "H100 80GB HBM3", 79.1, 989.0, 3350, 450, 50, (9, 0)),  # SXM; the NVL is another
    _gpu("h200", "H200", 139.8, 989.0, 4800, 450, 50, (9, 0)),
    _gpu("l40s", "L40S", 44.4, 362.0, 864, 32, 1.5625, (8, 9)),
    _gpu("rtx4090", "RTX 4090", 23.6, 165.2, 1008, 32, 1.5625, (8, 9)),
)
BY_NAME = {chip.name: chip for chip in CHIPS}


def of_kind(device_kind: str) -> Chip | None:
    """The chip of a device kind such as "TPU v5 lite" or "NVIDIA H100 80GB HBM3"; None if it is not in the table."""
    return next((chip for chip in CHIPS if any(kind in device_kind for kind in chip.kinds)), None)
