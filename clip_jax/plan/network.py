"""The interconnect model: how long a collective takes between given chips.

Inside a slice, chips form a grid whose dimensions are rings where the slice spans them whole (see
`Topology.wraps`). A collective over a box of chips uses every dimension of the box at once, each
at the bandwidth of its links: both directions of a ring, one of a line. With V the bytes of the
whole array, n the chips and W the sum over those dimensions:

    all-gather, reduce-scatter   V (n-1)/n / W
    all-reduce                   twice that
    all-to-all                   V side/4 / (bandwidth of the longest side), V of one chip
    collective-permute           V times the mean hops / one link

and ICI_HOP_SECONDS for every hop of the way across. Over the data-centre network a chip sends V, or
2 V (s-1)/s for an all-reduce among s slices, at its share of the host's network cards.
"""

import dataclasses
import functools

import numpy as np
from jax.sharding import Mesh

from clip_jax.plan import chips, groups
from clip_jax.plan.topology import Topology


@dataclasses.dataclass(frozen=True)
class Network:
    """Chips in the order that a program counts them.

    Attributes:
      topology: that they form.
      shape: sizes of the mesh by axis, over the devices that one program counts.
      places: coordinates of each, [devices, dimensions].
    """

    topology: Topology
    shape: dict[str, int]
    places: np.ndarray

    @classmethod
    def of(cls, mesh: Mesh, topology: Topology, partitions: int) -> "Network":
        """For a program of `partitions` devices: all of the mesh, or those of one slice."""
        devices, shape = mesh.devices.flatten(), dict(mesh.shape)
        if partitions < devices.size:  # between slices a program of its own sends and receives
            first, shape = next(iter(shape)), {**shape}
            shape[first] = 1
            devices = devices[:partitions]
        dims = topology.chip.dims
        places = np.array([tuple(device.coords)[:dims] for device in devices])
        return cls(topology, shape, places)

    def seconds(self, kind: str, volume: float, members: np.ndarray) -> float:
        """Time of a collective inside a slice.

        Args:
          kind: "all-gather", ...
          volume: bytes of the whole array, or of one chip's for all-to-all and permute.
          members: groups [groups, chips], or pairs [pairs, 2] of a permute.
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
        bandwidths, sides = self._sides(tuple(members[0].tolist()))
        latency = chips.ICI_HOP_SECONDS * sum(sides)
        if kind in ("all-to-all", "ragged-all-to-all"):
            longest = int(np.argmax(sides))
            return volume * (sides[longest] + 1) / 4 / bandwidths[longest] + latency
        once = volume * (n - 1) / n / sum(bandwidths) + latency
        return 2 * once if kind == "all-reduce" else once

    def dcn_seconds(self, kind: str, volume: float) -> float:
        """Time of what a chip exchanges with the chips in its place in the other slices."""
        slices = self.topology.slices
        share = {"all-reduce": 2 * (slices - 1) / slices, "all-gather": slices - 1}.get(kind, 1.0)
        return volume * share / self.topology.chip.dcn + chips.DCN_SECONDS

    def axes(self, members: np.ndarray) -> str:
        """Mesh axes that a collective crosses: "data", "data+fsdp"."""
        return "+".join(groups.axes_crossed(members, self.shape)) or "none"

    @functools.cache  # noqa: B019 (one network lives as long as a plan)
    def _sides(self, members: tuple[int, ...]) -> tuple[list[float], list[int]]:
        """Bandwidth along each dimension that a group spans, and the hops to cross it."""
        places = self.places[list(members)]
        link, bandwidths, sides = self.topology.chip.ici_link, [], []
        distinct = [np.unique(places[:, d]) for d in range(places.shape[1])]
        box = np.prod([len(d) for d in distinct]) == len(members)
        for dim, values in enumerate(distinct):
            if len(values) == 1:
                continue
            extent = int(values.max() - values.min()) + 1
            ring = box and extent == self.topology.shape[dim] and self.topology.wraps(dim)
            # Every other chip only: the groups between share the links.
            share = len(values) / extent if box else 0.5
            bandwidths.append(link * (2 if ring and extent > 2 else 1) * share)
            sides.append(extent // 2 if ring else extent - 1)
        if not box and bandwidths:  # no ring can be laid through them: one dimension at a time
            bandwidths = [min(bandwidths)] + [0.0] * (len(bandwidths) - 1)
        return bandwidths or [link], sides or [1]

    def _hops(self, pairs: np.ndarray) -> np.ndarray:
        """Links between the two chips of each pair, the shortest way."""
        distance = np.abs(self.places[pairs[:, 0]] - self.places[pairs[:, 1]])
        for dim in range(distance.shape[1]):
            if self.topology.wraps(dim):
                around = self.topology.shape[dim] - distance[:, dim]
                distance[:, dim] = np.minimum(distance[:, dim], around)
        return np.maximum(distance.sum(axis=1), 1)

    def __hash__(self) -> int:
        return id(self)

    def __eq__(self, other: object) -> bool:
        return self is other
