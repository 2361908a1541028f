"""The program of a config: mesh, model, optimiser and the training step; it needs no data."""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from clip_jax import models, optim, sharding
from clip_jax import state as train_state
from clip_jax.common import clock
from clip_jax.configs import default
from clip_jax.data import teachers
from clip_jax.errors import UserError
from clip_jax.training import objectives
from clip_jax.training import step as train_step


@dataclasses.dataclass(frozen=True)
class Program:
    """The training step of a config on a mesh, before any array exists.

    Attributes:
      config: the whole config.
      mesh: devices.
      net: the model.
      optimizer: the optimiser.
      total_steps: length of the run.
      teacher_widths: numbers in the embeddings by each running teacher.
    """

    config: ConfigDict
    mesh: Mesh
    net: models.ImageModel
    optimizer: optim.Optimizer
    total_steps: int
    teacher_widths: tuple[int, ...] = ()

    @functools.cached_property
    def state(self) -> train_state.TrainState:
        """Shapes, dtypes and shardings of the training state."""
        return train_state.abstract_state(
            self.net, self.optimizer, self.mesh, zero1=self.config.mesh.zero1
        )

    @functools.cached_property
    def batch(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes, dtypes and shardings of a batch."""
        size, rows = self.net.size, self.config.batch_size
        place = sharding.batch_sharding(self.mesh)
        image_shape = (rows, size.image_size, size.image_size, 3)
        captions = self.config.data.captions
        token_shape = (rows, *[captions] * (captions > 1), size.context_length)
        like = functools.partial(jax.ShapeDtypeStruct, sharding=place)
        batch = {"image": like(image_shape, jnp.uint8), "tokens": like(token_shape, jnp.int32)}
        if default.has_pair_weights(self.config.data):
            batch["weight"] = like((rows,), jnp.float32)
        stored = [teacher.width for teacher in teachers.of_data(self.config.data)]
        for number, width in enumerate([*stored, *self.teacher_widths]):
            shapes = (rows, width), (*token_shape[:-1], width)
            for name, shape in zip(teachers.field_names(number), shapes):
                batch[name] = like(shape, jnp.float32)
        return batch

    def init(self, variables: Any = None) -> train_state.TrainState:
        """Initialises the state of a run from a model's variables; where None, at random."""
        return train_state.init_state(
            self.state, self.net, self.optimizer, self.config.seed, variables=variables
        )

    def lower(self, scales: Sequence[float] = ()) -> jax.stages.Lowered:
        """Lowers the training step, step(state, batch), to be compiled; the state is donated.

        Args:
          scales: multiplier of the similarities by each teacher, where `loss.teacher_scales` gives
            none.
        """
        config = self.config.copy_and_resolve_references()
        config.loss.teacher_scales = tuple(config.loss.teacher_scales) or tuple(scales)
        loss_fn, augment_fn = objectives.OBJECTIVES[config.objective](config, self.mesh)
        step = functools.partial(
            train_step.train_step,
            net=self.net,
            optimizer=self.optimizer,
            loss_fn=loss_fn,
            augment=augment_fn,
            accum_steps=config.accum_steps,
            zero1=config.mesh.zero1,
            seed=config.seed,
            max_logit_scale=config.optim.max_logit_scale,
            skip_above=_skip_above(config.step),
        )
        return train_step.lower_step(step, self.state, self.batch, self.mesh)


def _skip_above(step_config: ConfigDict) -> float | None:
    """Returns the gradient norm above which steps are skipped, as the step takes it."""
    if step_config.nonfinite == "stop":
        return None
    return step_config.max_grad_norm or math.inf


def make_mesh_and_net(
    config: ConfigDict, devices: list[jax.Device] | None = None
) -> tuple[Mesh, models.ImageModel]:
    """Makes mesh and model of a config; arguments and errors are those of `build`."""
    axes = config.mesh
    mesh = sharding.make_mesh(axes.data, axes.fsdp, axes.tensor, axes.slices, devices)
    sharding.check_batch(config.batch_size, config.accum_steps, mesh)
    net = make_net(config, mesh)
    check_tensor(net.size, axes.tensor)
    widths = range(1, net.size.embed_dim)
    if wrong := [width for width in config.loss.widths if width not in widths]:
        raise UserError(
            f"loss.widths names {', '.join(map(str, wrong))}, but the embeddings have "
            f"{net.size.embed_dim} features: a width is a whole number from 1 to "
            f"{net.size.embed_dim - 1}. All features together count anyway."
        )
    return mesh, net


def build(
    config: ConfigDict,
    examples: int,
    *,
    teacher_widths: Sequence[int] = (),
    devices: list[jax.Device] | None = None,
) -> Program:
    """Builds the program of a config.

    Args:
      config: fields as in configs/default.py.
      examples: size of the training set, by which durations in epochs are counted.
      teacher_widths: numbers in the embeddings by each model of `loss.teachers`.
      devices: devices to compile for, which need not be attached; None: all attached.

    Raises:
      UserError: model, batch and mesh do not fit together, or parts of the optimiser do not.
    """
    mesh, net = make_mesh_and_net(config, devices)
    total, schedule = make_schedule(config, examples)
    optimizer = optim.make_optimizer(schedule, config.optim, config.seed)
    return Program(config, mesh, net, optimizer, total, tuple(teacher_widths))


def make_schedule(config: ConfigDict, examples: int) -> tuple[int, optax.Schedule]:
    """Returns the steps of a run and its learning rate by step; arguments as for `count_steps`."""
    total, to_steps = count_steps(config, examples)
    return total, optim.make_schedule(config.optim, to_steps, total)


def count_steps(config: ConfigDict, examples: int) -> tuple[int, Callable[[str], int]]:
    """Returns the steps of a run, and the conversion of other durations to steps.

    Args:
      config: the whole config.
      examples: size of the training set.

    Raises:
      UserError: the run has none.
    """
    to_steps = functools.partial(
        clock.to_steps, batch_size=config.batch_size, examples_per_epoch=examples
    )
    total = to_steps(config.duration)
    if not total:
        raise UserError(f"duration is {config.duration!r}: there is nothing to train.")
    return total, functools.partial(to_steps, total_steps=total)


def make_net(config: ConfigDict, mesh: Mesh) -> models.ImageModel:
    """Makes the model that a config describes, for the devices of a mesh."""
    device = mesh.devices.flat[0]
    dtype = config.model.dtype
    if dtype == "auto":
        dtype = "float32" if device.platform == "cpu" else "bfloat16"
    contrastive = config.objective == "contrastive"
    trained = {
        "objective": config.objective,
        "logit_bias": contrastive and config.loss.name == "sigmoid",
        **_decoder(config),
        **_view_head(config),
    }
    return models.create(
        config.model.name,
        dtype=jnp.dtype(dtype),
        scan_layers=config.model.scan_layers,
        remat=config.model.remat,
        patch_dropout=config.model.patch_dropout,
        text_remat=config.model.text_remat,
        attention=choose_attention(
            config.model.attention, device.platform, device.device_kind, dtype
        ),
        packing=config.model.packing.to_dict(),
        size={**config.model.size.to_dict(), **trained},
    )


def _decoder(config: ConfigDict) -> dict[str, Any]:
    """Returns the fields of the decoder, which is there where its loss has a weight."""
    none = {"text_decoder_layers": 0, "text_decoder_shared": False}
    if not config.loss.captioning:
        return none
    size = config.model.size.to_dict()
    layers = size["text_decoder_layers"]
    if layers is None:
        layers = models.get_size(config.model.name, {**size, **none}).text_layers
    elif layers < 1:
        raise UserError(
            f"loss.captioning is {config.loss.captioning}, and model.size.text_decoder_layers "
            f"{layers}: a decoder has at least one layer. Without either there is none."
        )
    return {"text_decoder_layers": layers}


def _view_head(config: ConfigDict) -> dict[str, Any]:
    """Returns the fields of the head of views, SLIP's unless the config has others."""
    if not config.loss.views:
        return {"views_mlp": 0, "views_embed": 0}
    size = config.model.size
    return {"views_mlp": size.views_mlp or 4096, "views_embed": size.views_embed or 256}


def choose_attention(asked: str, platform: str, kind: str, dtype: str) -> str:
    """Returns the form of attention, one of `choices.ATTENTIONS`, that a run computes.

    Args:
      asked: config.model.attention.
      platform: platform of the devices, as JAX names it.
      kind: kind of the devices, as JAX names it.
      dtype: compute dtype.

    Raises:
      UserError: the devices have no such kernel.
    """
    small = kind in ("TPU v2", "TPU v3", "TPU v4")  # 16 MiB of VMEM, in which not all fits
    if asked == "auto":
        return "pallas" if platform == "tpu" and dtype == "bfloat16" and not small else "xla"
    needed = {"pallas": "tpu", "cudnn": "gpu"}.get(asked)
    if needed and (platform != needed or dtype != "bfloat16"):
        raise UserError(
            f"model.attention={asked} is a kernel for {needed.upper()}s in bfloat16, and this run "
            f"computes in {dtype} on {platform}: leave --config.model.attention=auto."
        )
    return asked


def split_by_tensor(size: models.Size) -> dict[str, int]:
    """Returns the dimensions that the tensor axis splits, by name."""
    split = {}
    if size.has_text_blocks:
        split |= {"text_heads": size.text_heads, "text_mlp": size.text_mlp}
    if not size.is_resnet:  # a ResNet has no blocks to split, only more examples per device
        split |= {"image_heads": size.image_heads, "image_mlp": size.image_mlp}
    return split


def check_tensor(size: models.Size, tensor: int) -> None:
    """Checks that the tensor axis divides the dimensions that it splits.

    Raises:
      UserError: names the dimension, and the values that fit.
    """
    split = split_by_tensor(size)
    unfit = {name: value for name, value in split.items() if value % tensor}
    if unfit:
        fitting = [
            n for n in range(1, max(split.values()) + 1) if not any(v % n for v in split.values())
        ]
        raise UserError(
            f"mesh.tensor={tensor} does not divide "
            + ", ".join(f"{name} {value}" for name, value in unfit.items())
            + f" of {size}: it may be one of {', '.join(map(str, fitting))}."
        )
