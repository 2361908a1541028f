"""The interconnect model: the time of a collective between given chips.

Inside a slice, chips form a grid whose dimensions are rings where the slice spans them whole (see
`Topology.wraps`). A collective over a box of chips uses every dimension of the box at once, each
at the bandwidth of its links: both directions of a ring, one of a line. With V the bytes of the
whole array, n the chips and W the sum over those dimensions:

    all-gather, reduce-scatter   V (n-1)/n / W
    all-reduce                   twice that
    all-to-all                   V side/4 / (bandwidth of the longest side), V of one chip
    collective-permute           V times the mean hops / one link

and ICI_HOP_SECONDS for every hop of the way across. Over the data-centre network a chip sends V, or
2 V (s-1)/s for an all-reduce among s slices, at its part of the host's network cards.
"""

import dataclasses
import functools

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Int

from clip_jax.plan import chips, groups
from clip_jax.plan.topology import Topology


@dataclasses.dataclass(frozen=True)
class Network:
    """The chips of a program, in its own order.

    Attributes:
      topology: the slices that the chips form.
      shape: sizes of the mesh by axis, over the devices of one program.
      coordinates: position in its slice of each device's chip.
    """

    topology: Topology
    shape: dict[str, int]
    coordinates: Int[np.ndarray, "devices dims"]

    @classmethod
    def of(cls, mesh: Mesh, topology: Topology, partitions: int) -> "Network":
        """Creates the network of a program of so many devices: the mesh, or one slice of it."""
        devices, shape = mesh.devices.flatten(), dict(mesh.shape)
        if partitions < devices.size:  # each slice has a program of its own
            first, shape = next(iter(shape)), {**shape}
            shape[first] = 1
            devices = devices[:partitions]
        dims = topology.chip.dims
        coordinates = np.array([tuple(device.coords)[:dims] for device in devices])
        return cls(topology, shape, coordinates)

    def seconds(
        self, kind: str, volume: float, members: Int[np.ndarray, "groups members"]
    ) -> float:
        """Predicts the time of a collective inside a slice.

        Args:
          kind: "all-gather", ...
          volume: bytes of the whole array, or of one chip's for all-to-all and permute.
          members: groups of chips, or the pairs of a permute.
        """
        if members.size == 0:
            return 0.0
        if kind == "collective-permute":
            hops = self._hops(members)
            mean = float(hops.mean())
            return volume * mean / self.topology.chip.ici_link + hops.max() * chips.ICI_HOP_SECONDS
        n = members.shape[1]
        if n == 1:
            return 0.0
        # All groups have the shape of the first.
        bandwidths, sides = self._sides(tuple(members[0].tolist()))
        latency = chips.ICI_HOP_SECONDS * sum(sides)
        if kind in ("all-to-all", "ragged-all-to-all"):
            # The links across the middle of the longest side are the bottleneck.
            longest = int(np.argmax(sides))
            return volume * (sides[longest] + 1) / 4 / bandwidths[longest] + latency
        once = volume * (n - 1) / n / sum(bandwidths) + latency
        return 2 * once if kind == "all-reduce" else once

    def dcn_seconds(self, kind: str, volume: float) -> float:
        """Predicts the time of a collective with the same chips of the other slices."""
        slices = self.topology.slices
        factor = {"all-reduce": 2 * (slices - 1) / slices, "all-gather": slices - 1}.get(kind, 1.0)
        return volume * factor / self.topology.chip.dcn + chips.DCN_SECONDS

    def axes(self, members: Int[np.ndarray, "groups members"]) -> str:
        """Names the mesh axes that a collective crosses: "data", "data+fsdp"."""
        return "+".join(groups.axes_crossed(members, self.shape)) or "none"

    @functools.cache  # noqa: B019 (one network lives as long as a plan)
    def _sides(self, members: tuple[int, ...]) -> tuple[list[float], list[int]]:
        """Returns bandwidth and hops of each dimension that a group spans."""
        coordinates = np.unique(self.coordinates[list(members)], axis=0)
        chip, bandwidths, sides = self.topology.chip, [], []
        if len(coordinates) == 1 and chip.die_link:
            return [chip.die_link], [1]
        # The devices of a chip share its links, for one collective or for two.
        link = chip.ici_link * len(members) / len(coordinates) / chip.devices
        distinct = [np.unique(coordinates[:, d]) for d in range(coordinates.shape[1])]
        box = np.prod([len(d) for d in distinct]) == len(coordinates)
        for dim, values in enumerate(distinct):
            if len(values) == 1:
                continue
            extent = int(values.max() - values.min()) + 1
            ring = box and extent == self.topology.shape[dim] and self.topology.wraps(dim)
            # A group of every other chip shares the links with the groups between.
            fraction = len(values) / extent if box else 0.5
            # A ring is used in both directions; two chips are joined by one link alone.
            bandwidths.append(link * (2 if ring and extent > 2 else 1) * fraction)
            sides.append(extent // 2 if ring else extent - 1)
        if not box and bandwidths:  # no ring can be laid through them: one dimension at a time
            bandwidths = [min(bandwidths)] + [0.0] * (len(bandwidths) - 1)
        return bandwidths or [link], sides or [1]

    def _hops(self, pairs: Int[np.ndarray, "pairs 2"]) -> Int[np.ndarray, " pairs"]:
        """Counts the links between the two chips of each pair, the shortest way."""
        distance = np.abs(self.coordinates[pairs[:, 0]] - self.coordinates[pairs[:, 1]])
        for dim in range(distance.shape[1]):
            if self.topology.wraps(dim):
                # Round the ring, the other way may be shorter.
                around = self.topology.shape[dim] - distance[:, dim]
                distance[:, dim] = np.minimum(distance[:, dim], around)
        return np.maximum(distance.sum(axis=1), 1)

    def __hash__(self) -> int:
        return id(self)

    def __eq__(self, other: object) -> bool:
        return self is other
