"""Turns names such as v5e:16x16 into devices to compile for."""

import contextlib
import dataclasses
import importlib.util
import math
import os
import re
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

from clip_jax.errors import UserError
from clip_jax.plan.chips import CHIPS, Chip

if TYPE_CHECKING:
    import jax

# libtpu asks the machine for its TPU; these variables answer in its place. They must be set before
# jax is imported. The CPU stays the backend: a plan needs no accelerator and takes none.
ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-16",  # any that exists; the topology's name overrides it
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # several plans at a time
    "TPU_STDERR_LOG_LEVEL": "3",
    "TPU_MIN_LOG_LEVEL": "3",
    "TPU_LOG_DIR": "disabled",
    "TF_CPP_MIN_LOG_LEVEL": "3",
}


@dataclasses.dataclass(frozen=True)
class Topology:
    """One or several TPU slices.

    Attributes:
      chip: generation.
      shape: chips of a slice along each dimension.
      slices: number of slices, joined by the data-centre network.
    """

    chip: Chip
    shape: tuple[int, ...]
    slices: int = 1

    @property
    def size(self) -> int:
        """The number of JAX devices."""
        return math.prod(self.shape) * self.slices * self.chip.devices

    @property
    def name(self) -> str:
        """The name of a slice."""
        return f"{self.chip.name}:{'x'.join(map(str, self.shape))}"

    def __str__(self) -> str:
        return (f"{self.slices} slices of " if self.slices > 1 else "") + self.name

    def wraps(self, dim: int) -> bool:
        """Tells whether the network closes to a ring along a dimension."""
        return dim < len(self.shape) and self.shape[dim] % self.chip.wraps == 0

    def devices(self) -> "list[jax.Device]":
        """Creates devices to compile for; they cannot compute.

        Raises:
          UserError: libtpu is missing or does not know the topology.
        """
        from jax.experimental import topologies

        if importlib.util.find_spec("libtpu") is None:
            raise UserError(
                "A plan is made by the TPU compiler, which is part of libtpu, and libtpu is not "
                'installed: pip install "jax[tpu]" brings the version that fits this jax. No TPU '
                "is needed to use it."
            )
        prepare_environment()
        options = dict(self.chip.options)
        if any(n % h for n, h in zip(self.shape, self.chip.host)):  # part of one host
            options["chips_per_host_bounds"] = (*self.shape, 1, 1)[:3]
        if self.slices > 1:
            options["num_slices"] = self.slices
        try:
            with silenced():
                found = topologies.get_topology_desc(
                    platform="tpu", topology_name=self.name, **options
                )
                return list(found.devices)
        except Exception as error:  # libtpu's own have no common class
            reason = str(error).strip().splitlines()[-1][:300]
            raise UserError(
                f"The TPU compiler cannot describe {self}: {reason.rstrip('.')}. "
                f"{_what_works(self.chip)}"
            ) from None


def parse_topology(name: str, slices: int = 1) -> Topology:
    """Parses "v5e:16x16" or "v5p:8x16x16".

    Raises:
      UserError: there is no such generation or shape; it names those that there are.
    """
    found = re.fullmatch(r"\s*(\w+)[:\-](\d+(?:x\d+)*)\s*", name.lower())
    if not found or found.group(1) not in CHIPS:
        raise UserError(
            f"{name!r} is no TPU topology: it is a generation ({', '.join(CHIPS)}), a colon and "
            "the chips along each dimension, such as v5e:16x16 or v5p:8x16x16."
        )
    chip = CHIPS[found.group(1)]
    shape = tuple(int(n) for n in found.group(2).split("x"))
    if len(shape) == 3 and chip.dims == 2 and shape[2] == 1:
        shape = shape[:2]
    whole_hosts = all(n % h == 0 for n, h in zip(shape, chip.host))
    part_of_host = all(n <= h for n, h in zip(shape, chip.host))
    if (
        len(shape) != chip.dims
        or min(shape) < 1
        or math.prod(shape) > chip.largest
        or not (whole_hosts or part_of_host)
    ):
        raise UserError(f"There is no TPU slice {name}. {_what_works(chip)}")
    if slices < 1:
        raise UserError(f"A run on {slices} slices of {name} is not possible: there is 1, or more.")
    return Topology(chip, shape, slices)


def _what_works(chip: Chip) -> str:
    example = {2: ("1x1", "2x2", "2x4", "4x4", "8x16", "16x16")}.get(
        chip.dims, ("1x1x1", "2x2x1", "2x2x2", "4x4x4", "4x4x8", "8x8x8", "8x16x16")
    )
    return (
        f"{chip.name} has {chip.dims} dimensions, whole hosts of {'x'.join(map(str, chip.host))} "
        f"chips or a part of one, and at most {chip.largest:,} chips in a slice: "
        f"{', '.join(f'{chip.name}:{shape}' for shape in example)}, ..."
    )


def prepare_environment() -> None:
    """Sets the variables that libtpu reads, unless the user has; call it before importing jax."""
    os.environ["JAX_PLATFORMS"] = "cpu"  # also where there is a TPU: it may be in use
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)


@contextlib.contextmanager
def silenced() -> Iterator[None]:
    """Discards what C++ libraries write to standard error in the meantime."""
    try:
        sys.stderr.flush()
        kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    except (OSError, AttributeError):  # no file descriptor, as in some notebooks
        yield
        return
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
