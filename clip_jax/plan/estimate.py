"""Rough estimates of the memory and time of settings, before anything is compiled.

They are good enough to skip hopeless settings and to try promising ones first. The compiler has the
last word, and its figures for one choice correct the estimates of its neighbours (`Correction`).
"""

import copy
import dataclasses
from collections.abc import Mapping

from ml_collections import ConfigDict

from clip_jax.models import flops as model_flops
from clip_jax.models import layers
from clip_jax.models.captioner import POSITIONS
from clip_jax.models.sizes import Size
from clip_jax.plan.topology import Topology

# By model.remat: numbers kept per token, channel and layer, in the compute dtype; and the fraction
# of the forward pass that is recomputed.
_REMAT: Mapping[str, tuple[float, float]] = {
    "none": (42.0, 0.0),
    "dots_saveable": (22.0, 0.1),
    "dots_with_no_batch_dims_saveable": (14.0, 0.15),
    "mlp": (10.0, 0.1),
    "residual": (6.0, 0.45),
    "qkv": (5.0, 0.55),
    "attention": (2.0, 0.8),
    "full": (1.0, 1.0),
}
_OTHER_REMAT = (8.0, 0.4)  # a policy that no figures are known of, until one is compiled
# Policies that do as another one.
_SAME_REMAT: Mapping[str, str] = {"everything_saveable": "none", "nothing_saveable": "full"}
_LAYER = 60.0  # numbers per token and channel that the active layer holds
_LOGITS = 3  # float32 copies of a device's logits that are alive at a time
_USUAL_MFU = 0.35  # fraction of the peak that a step usually reaches, memory traffic included


def remats() -> list[str]:
    """Returns the values of model.remat that differ."""
    return ["none", *(name for name in layers.POLICIES if name not in _SAME_REMAT)]


def _remat(name: str) -> tuple[float, float]:
    return _REMAT.get(
        {"everything_saveable": "none", "nothing_saveable": "full"}.get(name, name), _OTHER_REMAT
    )


@dataclasses.dataclass(frozen=True)
class Choice:
    """Settings that change memory and speed, but not the result of training.

    configs/default.py describes the fields.
    """

    fsdp: int = 1
    tensor: int = 1
    accum_steps: int = 1
    remat: str = "none"
    method: str = "all_gather"
    scan: bool = True
    text_remat: str = ""

    @classmethod
    def of(cls, config: ConfigDict) -> "Choice":
        """Reads the settings of a config."""
        mesh = config.mesh
        return cls(
            mesh.fsdp,
            mesh.tensor,
            config.accum_steps,
            config.model.remat,
            config.loss.method,
            config.model.scan_layers,
            config.model.text_remat,
        )

    def apply(self, config: ConfigDict) -> ConfigDict:
        """Returns a copy of a config with these settings."""
        config = copy.deepcopy(config).unlock()
        config.mesh.data, config.mesh.fsdp, config.mesh.tensor = -1, self.fsdp, self.tensor
        config.accum_steps, config.model.remat = self.accum_steps, self.remat
        config.loss.method, config.model.scan_layers = self.method, self.scan
        config.model.text_remat = self.text_remat
        return config

    @property
    def flags(self) -> str:
        """The flags that set them."""
        return (
            f"--config.mesh.fsdp={self.fsdp} --config.mesh.tensor={self.tensor} "
            f"--config.accum_steps={self.accum_steps} --config.model.remat={self.remat} "
            f"--config.loss.method={self.method} --config.model.scan_layers={self.scan} "
            f"--config.model.text_remat={self.text_remat}"
        )

    def __str__(self) -> str:
        return (
            f"fsdp {self.fsdp}, tensor {self.tensor}, accum_steps {self.accum_steps}, "
            f"remat {self.remat}{f' (text {self.text_remat})' if self.text_remat else ''}, "
            f"{self.method}, layers {'scanned' if self.scan else 'unrolled'}"
        )


@dataclasses.dataclass(frozen=True)
class Task:
    """The properties that all choices have in common.

    Attributes:
      size: size of the model.
      batch_size: images of a step.
      captions: captions of each image.
      parameters: number of parameters.
      state_bytes: bytes of parameter and optimiser state for each parameter.
      topology: topology to run on.
      scan: whether the config runs the layers in a scan.
    """

    size: Size
    batch_size: int
    captions: int
    parameters: float
    state_bytes: float
    topology: Topology
    scan: bool = True

    @property
    def image_bytes(self) -> float:
        """The bytes of one image."""
        return 3.0 * self.size.image_size**2


def activations(size: Size, captions: int) -> float:
    """Computes tokens times channels times layers of both towers, for one image."""
    views = 2 if size.objective == "near_duplicates" else 3 if size.views_mlp else 1
    layers = _text_layers(size)
    text = size.context_length * size.text_width * layers * captions
    if size.patch_size is not None:
        tokens = (size.image_size // size.patch_size) ** 2 + 1
        return float(views * tokens * size.image_width * size.image_layers[0] + text)
    total, side = 0.0, size.image_size // 4
    for stage, blocks in enumerate(size.image_layers):
        inner = size.image_width * 2**stage
        # Three convolutions a block keep about half of what a transformer block of the width keeps.
        total += blocks * side**2 * inner * 0.5
        side //= 2
    return views * total + text


def _text_layers(size: Size) -> int:
    """Counts the layers that captions pass, those that attend to the image as well."""
    if not size.has_text_blocks:
        return 0
    again = size.text_layers if size.text_decoder_shared else size.text_decoder_layers
    return size.text_layers + (again + size.text_decoder_layers) * (size.text_decoder_layers > 0)


def temporaries(choice: Choice, task: Task) -> float:
    """Estimates the bytes of one chip that live only inside the step."""
    chips, size = task.topology.size, task.size
    examples = task.batch_size * choice.tensor / chips / choice.accum_steps
    kept = _remat(choice.remat)[0]
    depth = _text_layers(size)
    depth += sum(size.image_layers) if not size.is_resnet else 0
    # The tensor axis splits about three quarters of the kept numbers: those inside a block.
    split = 0.25 + 0.75 / choice.tensor if choice.remat != "full" else 1.0
    held = activations(size, task.captions) * (kept * split + _LAYER / max(depth / 2, 1)) * 2
    gradients = task.parameters * 4 / choice.fsdp / choice.tensor
    total = examples * held + gradients
    if choice.accum_steps > 1:  # the sum of the gradients, beside those of a micro-batch
        total += gradients
    return total + _loss(choice, task)


def _loss(choice: Choice, task: Task) -> float:
    """Estimates the bytes of one chip's logits."""
    size, examples = task.size, task.batch_size / task.topology.size
    words = 0.0
    if size.objective in ("captioning", "bag_of_words") or size.text_decoder_layers:
        words = size.vocab_size * (1 if size.objective == "bag_of_words" else POSITIONS)
        words *= _LOGITS * 4 * task.captions * examples / choice.accum_steps
    if size.objective in ("captioning", "bag_of_words"):
        return words
    if choice.method == "ring":  # it holds one tile of logits at a time
        return words
    texts = task.batch_size * task.captions
    return words + _LOGITS * 4 * examples * texts + 6.0 * texts * size.embed_dim


def resident(choice: Choice, task: Task) -> float:
    """Computes the bytes of one chip that stay: training state and batch."""
    state = task.parameters * task.state_bytes / choice.fsdp / choice.tensor
    shards = task.topology.size / choice.tensor
    tokens = task.captions * task.size.context_length
    return state + task.batch_size / shards * (task.image_bytes + 4 * tokens)


def seconds(choice: Choice, task: Task) -> float:
    """Estimates the seconds of one step; the ratios between choices are better than the value."""
    chip, size = task.topology.chip, task.size
    towers = 3 * task.batch_size * model_flops.pair_flops(size, task.captions)
    loss = model_flops.step_flops(size, task.batch_size, task.captions) - towers
    again = _remat(choice.remat)[1] + (choice.accum_steps > 1)
    # Forward is a third of a step. A ring computes its logits once more in the backward pass.
    work = towers * (1 + again / 3) + loss * (4 / 3 if choice.method == "ring" else 1)
    computing = work / task.topology.size / chip.flops / _USUAL_MFU
    # Weights are gathered for every pass over the layers: forward, backward, and recomputation.
    passes = choice.accum_steps * (3 if again >= 1 else 2)
    weights = task.parameters / choice.tensor * 4
    link = 4 * chip.ici_link
    moving = weights * (2 + (passes if choice.fsdp > 1 else 0)) / link
    if choice.tensor > 1:  # four all-reduces of the activations per layer, forward and backward
        examples = task.batch_size * choice.tensor / task.topology.size
        moving += 8 * 2 * examples * activations(size, task.captions) / link
    return computing + moving + 1e-3 * choice.accum_steps


@dataclasses.dataclass
class Correction:
    """Ratios of the compiler's figures to the estimates, by remat; 1 before the first figure.

    Attributes:
      memory: ratios of the temporaries.
      speed: ratios of the seconds of a step.
    """

    memory: dict[str, float] = dataclasses.field(default_factory=dict)
    speed: dict[str, float] = dataclasses.field(default_factory=dict)

    def learn(
        self, choice: Choice, task: Task, found: float | None, time: float | None = None
    ) -> None:
        """Learns from the compiler's figures for a choice.

        Args:
          choice: the compiled settings.
          task: the common properties.
          found: bytes of the temporaries; where it did not fit, a lower bound.
          time: seconds of a step; None: it did not fit.
        """
        if found:
            ratio = found / temporaries(choice, task)
            self.memory[choice.remat] = ratio if time else max(ratio, self._memory(choice))
        if time:
            self.speed[choice.remat] = time / seconds(choice, task)

    def need(self, choice: Choice, task: Task) -> float:
        """Returns the corrected bytes of a chip in all."""
        return resident(choice, task) + temporaries(choice, task) * self._memory(choice)

    def time(self, choice: Choice, task: Task) -> float:
        """Returns the corrected seconds of a step."""
        return seconds(choice, task) * self._of(self.speed, choice.remat)

    def _memory(self, choice: Choice) -> float:
        return self._of(self.memory, choice.remat)

    @staticmethod
    def _of(known: dict[str, float], remat: str) -> float:
        if remat in known:
            return known[remat]
        return sum(known.values()) / len(known) if known else 1.0  # the mean of other policies
