"""Checks of a config that need neither data nor devices."""

from ml_collections import ConfigDict

from clip_jax import choices
from clip_jax.configs import default
from clip_jax.data import teachers
from clip_jax.data.sources import captions
from clip_jax.errors import UserError


def validate(config: ConfigDict) -> None:
    """Checks the settings that need neither data nor devices.

    Raises:
      UserError: names the field, its value and the values that it takes.
    """
    for name in config.stages:
        validate(default.of_stage(config, name))
    problems = []
    for name, value, allowed in (
        ("objective", config.objective, choices.OBJECTIVES),
        ("model.dtype", config.model.dtype, choices.COMPUTE_DTYPES),
        ("model.attention", config.model.attention, choices.ATTENTIONS),
        ("data.crop", config.data.crop, choices.CROPS),
        ("data.order", config.data.order, choices.ORDERS),
        ("data.text_mask", config.data.text_mask, choices.TEXT_MASKS),
        ("loss.name", config.loss.name, choices.LOSS_NAMES),
        ("loss.method", config.loss.method, choices.LOSS_METHODS),
        ("optim.name", config.optim.name, choices.OPTIMIZERS),
        ("optim.schedule", config.optim.schedule, choices.SCHEDULES),
        ("optim.cooldown_shape", config.optim.cooldown_shape, choices.COOLDOWN_SHAPES),
        ("optim.moment_dtype", config.optim.moment_dtype, choices.MOMENT_DTYPES),
        ("step.nonfinite", config.step.nonfinite, choices.NONFINITE),
    ):
        if value not in allowed:
            problems.append(f"{name} is {value!r}, and must be one of {', '.join(allowed)}")
    for name, value, least in (
        ("batch_size", config.batch_size, 1),
        ("accum_steps", config.accum_steps, 1),
        ("loss.tile", config.loss.tile, 1),
        ("loss.temperature", config.loss.temperature, 1e-4),
        ("loss.captioning", config.loss.captioning, 0),
        ("loss.views", config.loss.views, 0),
        ("loss.views_temperature", config.loss.views_temperature, 1e-4),
        ("seed", config.seed, 0),
        ("optim.max_logit_scale", config.optim.max_logit_scale, 1),
        ("optim.grad_clip_norm", config.optim.grad_clip_norm, 0),
        ("optim.final_fraction", config.optim.final_fraction, 0),
        ("step.timeout", config.step.timeout, 0),
        ("step.max_grad_norm", config.step.max_grad_norm, 0),
        ("step.max_skipped", config.step.max_skipped, 0),
        ("step.max_rollbacks", config.step.max_rollbacks, 0),
        ("step.saved_batches", config.step.saved_batches, 0),
        ("eval.batch_size", config.eval.batch_size, 1),
        ("checkpoint.keep", config.checkpoint.keep, 1),
        ("checkpoint.give_up_after", config.checkpoint.give_up_after, 0),
        ("log.trace_steps", config.log.trace_steps, 1),
        ("data.captions", config.data.captions, 1),
        ("data.prefetch", config.data.prefetch, 1),
        ("data.processes", config.data.processes, -1),
        ("data.threads", config.data.threads, 0),
        ("data.shuffle_window", config.data.shuffle_window, 1),
        ("data.chunk", config.data.chunk, 1),
    ):
        if not value >= least:  # NaN too
            problems.append(f"{name} is {value}, and must be at least {least}")
    names = [name.strip() for name in config.log.trackers.split(",") if name.strip()]
    if unknown := [name for name in names if name not in choices.TRACKERS]:
        problems.append(
            f"log.trackers names {', '.join(unknown)}, and may name {', '.join(choices.TRACKERS)}"
        )
    data, views = config.data, config.data.views
    for name, pair in (
        ("data.crop_scale", data.crop_scale),
        ("data.crop_ratio", data.crop_ratio),
        ("data.views.scale", views.scale),
        ("data.views.ratio", views.ratio),
        ("data.views.quality", views.quality),
    ):
        if len(pair) != 2:
            problems.append(
                f"{name} is {pair}, and must be two numbers, the least and the greatest"
            )
    if config.step.max_grad_norm and config.step.nonfinite != "skip":
        problems.append(
            f"step.max_grad_norm is {config.step.max_grad_norm}, and skips steps only with "
            "step.nonfinite=skip"
        )
    if config.init_params and not config.init_from:
        problems.append(
            f"init_params is {config.init_params!r}, and init_from names no model to take them from"
        )
    if config.init_from and config.branch_from:
        problems.append("init_from and branch_from are both set, and a run has one beginning")
    if not 0 <= config.optim.ema_decay < 1:
        problems.append(f"optim.ema_decay is {config.optim.ema_decay}, and must be from 0 to 1")
    if len(set(config.loss.widths)) < len(config.loss.widths):
        problems.append(f"loss.widths is {tuple(config.loss.widths)}, and names a width twice")
    for each in default.sources(data):
        if each.weight_key and each.type in ("digits", "synthetic"):
            problems.append(
                f"source.weight_key is {each.weight_key!r}, but {each.type} data have no such field"
            )
        if "," in each.weight_key:
            problems.append(f"source.weight_key is {each.weight_key!r}, and must be a single name")
    for name in ("zeroshot", "retrieval"):
        for key in ("weight_key", "teacher_keys", "weight"):
            if value := config.eval[name].source[key]:
                problems.append(
                    f"eval.{name}.source.{key} is {value!r}, and only training data have it"
                )
    problems += _distillation(config)
    if not 0 <= config.loss.label_smoothing < 1:
        problems.append(
            f"loss.label_smoothing is {config.loss.label_smoothing}, and must be at least 0 and "
            "below 1"
        )
    elif config.loss.label_smoothing and config.loss.name != "softmax":
        problems.append(
            f"loss.label_smoothing is {config.loss.label_smoothing}, but only loss.name=softmax "
            f"has distributions over the batch to smooth: {config.loss.name} judges every pair by "
            "itself"
        )
    if config.objective != "contrastive":
        for name, value, neutral in (
            ("data.captions", config.data.captions, 1),
            ("loss.label_smoothing", config.loss.label_smoothing, 0),
            ("loss.widths", tuple(config.loss.widths), ()),
            ("loss.distillation", config.loss.distillation, 0),
            ("loss.captioning", config.loss.captioning, 0),
            ("loss.views", config.loss.views, 0),
            ("source.weight_key", "".join(each.weight_key for each in default.sources(data)), ""),
        ):
            if value != neutral:
                problems.append(
                    f"{name} is {value!r}, but objective={config.objective} takes {neutral!r}: "
                    "only the contrastive one has it"
                )
    if data.text_mask != "none" and (config.objective == "captioning" or config.loss.captioning):
        which = "objective=captioning" if config.objective == "captioning" else "loss.captioning"
        problems.append(
            f"data.text_mask is {data.text_mask!r}, and must be none with {which}, "
            "which would learn to write captions with gaps"
        )
    if not 0 < config.eval.confidence < 1:
        problems.append(f"eval.confidence is {config.eval.confidence}, and must be between 0 and 1")
    if not config.data.source.type and not config.data.mixture:
        problems.append(
            "it names no training data: set --config.data.source.type (tar, folder, tfds) "
            "and --config.data.source.path or .name to yours, or put :smoke behind the config's "
            "name, as in --config=configs/vit_b32.py:smoke, for a small run on embedded data"
        )
    if problems:
        raise UserError(f"This config cannot be run: {'; '.join(problems)}.")


def _distillation(config: ConfigDict) -> list[str]:
    """Returns the problems of distillation and its teachers."""
    loss, data = config.loss, config.data
    stored, running = teachers.of_data(data), default.teacher_names(config)
    scales, count = tuple(loss.teacher_scales), len(stored) + len(running)
    named = [f"loss.teachers names {', '.join(running)}"] if running else []
    named += ["source.teacher_keys names teachers"] if stored else []
    problems = []
    if not 0 <= loss.distillation <= 1:
        problems.append(f"loss.distillation is {loss.distillation}, and must be from 0 to 1")
    if loss.distillation and not count:
        problems.append(
            f"loss.distillation is {loss.distillation}, and there is no teacher: name models in "
            "loss.teachers, or their embeddings in source.teacher_keys"
        )
    if named and not loss.distillation:
        problems.append(
            f"{' and '.join(named)}, but loss.distillation is 0, and nothing would be learned of "
            "them: give the fraction of the loss that is theirs, such as 0.75"
        )
    if not all(0 < scale < float("inf") for scale in scales):
        problems.append(f"loss.teacher_scales is {scales}, and must be of positive numbers")
    if len(scales) != count and (scales or stored):
        problems.append(
            f"loss.teacher_scales is {scales}, and must have a multiplier of the similarities for "
            f"each of the {count} teacher(s): 100 is that of most CLIP models"
            + ("; what the data keep of a teacher does not tell it" if stored else "")
        )
    if stored and data.captions > 1:
        problems.append(
            f"data.captions is {data.captions}, but the data keep a teacher's embedding of one "
            "caption each (source.teacher_keys): take 1, or a running teacher (loss.teachers)"
        )
    for each in default.sources(data):
        if each.teacher_keys and each.type == "synthetic":
            problems.append(
                f"source.teacher_keys is {each.teacher_keys!r}, but synthetic data have no such "
                "fields"
            )
        if each.teacher_keys and len(captions.parse_fields(each.text_key)) > 1:
            problems.append(
                f"source.text_key is {each.text_key!r}, but source.teacher_keys names the "
                "embedding of one caption: name its field alone"
            )
    return problems
