"""Numbers of each log row about the hardware: speed per chip, MFU, memory."""

import jax
from jax.sharding import Mesh

from clip_jax.common import hardware
from clip_jax.models import flops
from clip_jax.models.sizes import Size


class Telemetry:
    """Measures how well the devices are used, and what this host holds."""

    def __init__(self, size: Size, batch_size: int, captions: int, mesh: Mesh):
        """Counts the FLOPs of a step.

        Args:
          size: the model's.
          batch_size: images per step.
          captions: captions of each image.
          mesh: devices of the run.
        """
        self._chips = mesh.size
        self._flops = flops.step_flops(size, batch_size, captions) / batch_size
        self._peak = hardware.peak_flops(mesh.devices.flat[0].device_kind)

    def measure(self, images_per_second: float) -> dict[str, float]:
        """Returns the numbers by name; memory, threads and descriptors are this host's.

        MFU is the FLOPs that the model needs (`flops.step_flops`), not those that are executed,
        over the bfloat16 peak of all devices; it is left out where that is not known.
        """
        per_chip = images_per_second / self._chips
        row = {"train/images_per_second_per_chip": per_chip}
        if self._peak:
            row["train/mfu"] = per_chip * self._flops / self._peak
        for name, value in hardware.device_memory(jax.local_devices()).items():
            row[f"device/{name}"] = value
        for name, value in hardware.process_usage().items():
            row[f"host/{name}"] = value
        return row
