"""The hardware of this host: peak rates of its devices, and the memory in use."""

import os
import re
from collections.abc import Sequence

import jax

GIB = 2**30

# Dense bfloat16 operations per second of one JAX device, by the beginning of its `device_kind`; the
# first that matches counts. TPU: cloud.google.com/tpu/docs; up to v3 and from 7x on a device is one
# of a chip's two cores. GPU: the makers' data sheets, without sparsity, at the full power limit.
_PEAKS = (
    ("TPU v2", 22.5e12),
    ("TPU v3", 61.5e12),
    ("TPU v4 lite", 138e12),
    ("TPU v4", 275e12),
    ("TPU v5 lite", 197e12),
    ("TPU v5e", 197e12),
    ("TPU v5", 459e12),
    ("TPU v6", 918e12),
    ("TPU7x", 1153.5e12),
    ("NVIDIA GB300", 2500e12),
    ("NVIDIA GB200", 2500e12),
    ("NVIDIA B300", 2250e12),
    ("NVIDIA B200", 2250e12),
    ("NVIDIA GH200", 989.4e12),
    ("NVIDIA H200 NVL", 835.5e12),
    ("NVIDIA H200", 989.4e12),
    ("NVIDIA H100 NVL", 835.5e12),
    ("NVIDIA H100 PCIe", 756e12),
    ("NVIDIA H100", 989.4e12),
    ("NVIDIA A100", 312e12),
    ("NVIDIA A40", 149.7e12),
    ("NVIDIA A30", 165e12),
    ("NVIDIA A10G", 70e12),
    ("NVIDIA A10", 125e12),
    ("NVIDIA L40S", 362e12),
    ("NVIDIA L40", 181e12),
    ("NVIDIA L4", 121e12),
    ("NVIDIA RTX 6000 Ada", 364.2e12),
    ("NVIDIA RTX A6000", 154.8e12),
    ("NVIDIA GeForce RTX 4090", 165.2e12),
    ("NVIDIA GeForce RTX 3090", 71e12),
    ("AMD Instinct MI355X", 2500e12),
    ("AMD Instinct MI325X", 1307.4e12),
    ("AMD Instinct MI300X", 1307.4e12),
    ("AMD Instinct MI250", 191.5e12),  # a device is one of its two dies
)


def peak_flops(device_kind: str) -> float | None:
    """Returns the peak bfloat16 operations per second of a device; None: not known, as of a CPU."""
    for kind, peak in _PEAKS:
        # "NVIDIA A100-SXM4-80GB" is an A100, "NVIDIA A1000" is not.
        if re.match(re.escape(kind) + r"(?![0-9])", device_kind):
            return peak
    return None


def device_memory(devices: Sequence[jax.Device]) -> dict[str, float]:
    """Measures the memory of the devices in GiB, the largest of them; {} where none tells it."""
    stats = [device.memory_stats() or {} for device in devices]
    names = {"bytes_in_use": "memory_gib", "peak_bytes_in_use": "peak_memory_gib"}
    return {
        name: max(one[key] for one in stats) / GIB
        for key, name in names.items()
        if all(key in one for one in stats)
    }


def process_usage() -> dict[str, float]:
    """Measures resident memory in GiB, threads and open descriptors; {} where there is no /proc."""
    try:
        with open("/proc/self/stat", "rb") as file:
            fields = file.read().rpartition(b") ")[2].split()  # the name before may have spaces
        descriptors = len(os.listdir("/proc/self/fd"))
    except OSError:
        return {}
    resident = int(fields[21]) * os.sysconf("SC_PAGE_SIZE")
    return {
        "memory_gib": resident / GIB,
        "threads": int(fields[17]),
        "descriptors": descriptors - 1,  # that of the listing itself
    }
