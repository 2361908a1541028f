"""Flags of XLA for tests on a CPU."""

import importlib.metadata
import os

DEVICES = "--xla_force_host_platform_device_count"

# Programs that run slower and take a quarter of the time to compile, which is most of the suite's.
# Without the last of these, collectives of such programs may wait for each other forever.
QUICK = "--xla_backend_optimization_level=0 --xla_cpu_enable_concurrency_optimized_scheduler=false"
if importlib.metadata.version("jaxlib").startswith("0.10."):  # later ones do not know it
    QUICK = f"--xla_cpu_use_fusion_emitters=false {QUICK}"


def environment(devices: int, quick: str = QUICK) -> dict[str, str]:
    """The environment of a separate process with this many virtual devices."""
    flags = f"{os.environ['XLA_FLAGS']} {quick} {DEVICES}={devices}"  # the last one counts
    return os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
