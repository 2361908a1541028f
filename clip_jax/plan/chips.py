"""The table of TPU generations: rates of a chip, and the network between chips."""

import dataclasses
from typing import Any

GIB = 2**30

# Fraction of the nominal HBM bandwidth that plain copies reach in XLA's own cycle estimates (0.71
# to 0.81 over the four generations); used for instructions that carry no estimate.
HBM_EFFICIENCY = 0.77
# Assumed fraction of the peak that a Pallas kernel reaches whose time the compiler does not tell:
# heads of 64 channels fill half of a matrix unit.
KERNEL_EFFICIENCY = 0.5
# Images that a core of a host decodes, crops and resizes per second, from photographs of about
# 400 x 300 to 224 x 224: benchmarks/README.md, 4,400 by four processes on 16 cores.
IMAGES_PER_CORE = 275.0
# Latency of a message per hop between neighbouring chips, and between slices.
ICI_HOP_SECONDS = 1e-6
DCN_SECONDS = 20e-6


@dataclasses.dataclass(frozen=True)
class Chip:
    """One generation. All rates and sizes are those of one JAX device.

    A device is a chip, whose two TensorCores count as one where it has two, or half a chip where
    each of the two is a device.

    Attributes:
      name: prefix of a topology name.
      flops: peak bfloat16 operations per second.
      clock: frequency of the TensorCores, hertz; XLA's estimated cycles are divided by it.
      hbm: bytes of memory that the compiler lets a program use.
      hbm_bandwidth: bytes per second.
      ici_link: bytes per second of one link between neighbouring chips, in one direction.
      dcn: bytes per second of a chip over the network between slices: its part of the host's.
      dims: dimensions of the network inside a slice.
      wraps: the network closes to a ring along a dimension of this many chips, or a multiple of
        it; 16 is the side of a whole pod of v5e and v6e.
      largest: most chips of a slice.
      host: chips of a host along each dimension.
      host_cores: processor cores of a host, two vCPUs each.
      devices: JAX devices of a chip.
      die_link: bytes per second between the two devices of a chip; 0: it has one.
      options: libtpu's options that describe the topology.
    """

    name: str
    flops: float
    clock: float
    hbm: float
    hbm_bandwidth: float
    ici_link: float
    dcn: float
    dims: int
    wraps: int
    largest: int
    host: tuple[int, ...]
    host_cores: int
    devices: int = 1
    die_link: float = 0.0
    options: dict[str, Any] = dataclasses.field(default_factory=dict)


# Peak, HBM bandwidth, links: cloud.google.com/tpu/docs/v4, /v5e, /v5p, /v6e; a chip's bandwidth
# there is over its four (v5e, v6e) or six (v4, v5p) links in both directions. Links as used in
# practice and the part of the data-centre network: jax-ml.github.io/scaling-book/tpus, and for
# v5e and v6e the hosts' network cards (2 x 100 and 4 x 200 Gbit/s for 8 chips). HBM: what the
# compiler of libtpu 0.0.42 names as available. Clocks: v5e from the scaling book; v4 from Jouppi
# et al. 2023 (1,050 MHz); v5p and v6e follow from the peak (2 x 4 matrix units of 128 x 128, and
# units of 256 x 256 at four in all, each one product and sum per place and cycle), and XLA's
# estimates for copies then give the same fraction of the HBM bandwidth in every generation.
# tpu7x: docs.cloud.google.com/tpu/docs/tpu7x, half a chip's each; links like v5p's, six times as
# fast between the halves; its clock follows from the peak like v6e's, with four units to a half.
# Not looked up there, but known: tpu7x's HBM bandwidth and the link between its halves, and the
# vCPUs of a host of every generation but v5p (208).
CHIPS = {
    chip.name: chip
    for chip in (
        Chip(
            name="v4",
            flops=275e12,
            clock=1.05e9,
            hbm=30.75 * GIB,
            hbm_bandwidth=1228e9,
            ici_link=45e9,
            dcn=6.25e9,
            dims=3,
            wraps=4,
            largest=4096,
            host=(2, 2, 1),
            host_cores=120,
            options={"chip_config_name": "megacore"},  # else every core is a device
        ),
        Chip(
            name="v5e",
            flops=197e12,
            clock=1.5e9,
            hbm=15.75 * GIB,
            hbm_bandwidth=819e9,
            ici_link=45e9,
            dcn=3.125e9,
            dims=2,
            wraps=16,
            largest=256,
            host=(2, 2),
            host_cores=56,
        ),
        Chip(
            name="v5p",
            flops=459e12,
            clock=1.75e9,
            hbm=95.74 * GIB,
            hbm_bandwidth=2765e9,
            ici_link=90e9,
            dcn=6.25e9,
            dims=3,
            wraps=4,
            largest=8960,
            host=(2, 2, 1),
            host_cores=104,
        ),
        Chip(
            name="v6e",
            flops=918e12,
            clock=1.75e9,
            hbm=31.25 * GIB,
            hbm_bandwidth=1638e9,
            ici_link=90e9,
            dcn=12.5e9,
            dims=2,
            wraps=16,
            largest=256,
            host=(2, 2),
            host_cores=90,
        ),
        Chip(
            name="tpu7x",
            flops=2307e12 / 2,
            clock=2.2e9,
            hbm=94.74 * GIB,
            hbm_bandwidth=7380e9 / 2,
            ici_link=90e9,
            dcn=12.5e9 / 2,
            dims=3,
            wraps=4,
            largest=9216,
            host=(2, 2, 1),
            host_cores=112,
            devices=2,
            die_link=6 * 90e9,
        ),
    )
}
