"""The meaning of a config for the data that were found, said before the first step."""

import contextlib

from ml_collections import ConfigDict

from clip_jax import models
from clip_jax.common import clock
from clip_jax.data import mixture
from clip_jax.data.order import Order, Weighted
from clip_jax.data.sources.base import Source
from clip_jax.errors import BadExample, UserError
from clip_jax.models import attention

# Objectives whose loss tells the pairs of a batch from each other.
_CONTRASTIVE = ("contrastive", "near_duplicates")
_LOOKED_AT = 16  # examples whose captions are counted


def _durations(config: ConfigDict) -> dict[str, str]:
    """Returns the durations of a config by the names of their settings."""
    return {
        "duration": config.duration,
        "optim.warmup": config.optim.warmup,
        "optim.cooldown": config.optim.cooldown,
        "optim.timescale": config.optim.timescale,
        "log.every": config.log.every,
        "eval.every": config.eval.every,
        "checkpoint.every": config.checkpoint.every,
        "log.trace": config.log.trace or "0 steps",
    }


def check_durations(config: ConfigDict) -> None:
    """Checks how durations are written, before the data are read, which may take minutes.

    Raises:
      UserError: one has no number or a unit that its setting does not take.
    """
    for name, duration in _durations(config).items():
        if fault := clock.fault(duration, may_be_time=name == "checkpoint.every"):
            raise UserError(f"{name}: {fault}")


def check_batch(config: ConfigDict, examples: int) -> None:
    """Checks the batch of a contrastive loss.

    Raises:
      UserError: it has a single pair, or more than there are.
    """
    if config.objective not in _CONTRASTIVE:
        return
    if config.batch_size == 1:
        raise UserError(
            "batch_size is 1, but the loss tells each pair from the others of its batch: with one "
            "pair nothing is learned. Set --config.batch_size to at least 2, better hundreds."
        )
    if config.batch_size > examples:
        raise UserError(
            f"batch_size is {config.batch_size:,}, but the training data have {examples:,} pairs: "
            "every batch would hold some twice, and the loss would push the copies apart. Set "
            f"--config.batch_size to at most {examples:,}, or give more data."
        )


def check_branch(before: ConfigDict, config: ConfigDict) -> None:
    """Checks that a run can go on from another with its own batch.

    Args:
      before: config of the run that it goes on from.
      config: its own.

    Raises:
      UserError: its length, or the order of the examples, would be another.
    """
    sizes = f"branch_from: batch_size was {before.batch_size:,}, now {config.batch_size:,}"
    if config.batch_size == before.batch_size:
        return
    if not config.duration.rstrip("s").endswith("step"):
        raise UserError(
            f"{sizes}, and duration is {config.duration!r}: it counts from the start of the run "
            "before, whose batches had another size, so write it in steps."
        )
    old, new = (mixture.windowed_streams(each.batch_size) for each in (before, config))
    if config.data.order == "windowed" and old != new:
        raise UserError(
            f"{sizes}, and data.order=windowed interleaves {old} streams in batches of the former, "
            f"{new} in those of the latter: the order would be another, and examples come twice. "
            "Take batch sizes with the same power of two, such as multiples of 256, or another "
            "data.order."
        )


def notices(
    config: ConfigDict, net: models.ImageModel, source: Source, order: Order, total_steps: int
) -> list[str]:
    """Returns sentences about settings that do something else than they seem to.

    Args:
      config: the whole config.
      net: the model.
      source: the training data.
      order: their order.
      total_steps: length of the run.
    """
    found = []
    if net.attention == "pallas":
        length = config.model.packing.length or net.size.context_length
        at_a_time = config.batch_size // config.accum_steps
        for tower, why in attention.misfits(net.size, length, at_a_time).items():
            found.append(f"Attention of the {tower} tower is XLA's, not the kernel's: {why}.")
        if net.size.norm == "rms":
            found.append("Norms are XLA's, not the kernel's: it computes no RMSNorm (norm='rms').")
    examples, batch = len(source), config.batch_size
    if batch > examples:
        found.append(f"A batch of {batch:,} holds some of the {examples:,} examples several times.")
    if config.data.captions > 1:
        found += _few_captions(config.data.captions, source)
    for name, duration in _durations(config).items():
        if name == "checkpoint.every" and clock.to_seconds(duration) is not None:
            continue
        steps = clock.exact_steps(
            duration, batch_size=batch, examples_per_epoch=examples, total_steps=total_steps
        )
        if 0 < steps < 0.5:
            found.append(f"{name} = {duration!r} is {steps:.2g} of a step, taken as one step.")
        if name == "log.trace" and round(steps) > total_steps:
            found.append(
                f"log.trace = {duration!r} is step {round(steps):,}, but the run has "
                f"{total_steps:,}: nothing is traced, unless SIGUSR2 asks for it."
            )
        if name == "optim.warmup" and round(steps) >= total_steps:
            found.append(
                f"optim.warmup = {duration!r} is {round(steps):,} steps, but the run has "
                f"{total_steps:,}: it is shortened to {max(total_steps - 1, 0):,}, so that the "
                "learning rate reaches its peak only at the end. About 5 percent is usual: "
                '--config.optim.warmup="5 percent".'
            )
    if config.accum_steps > 1 and net.size.is_resnet:
        found.append(
            f"accum_steps = {config.accum_steps}: BatchNorm takes its statistics over each "
            f"micro-batch of {batch // config.accum_steps:,} pairs, not over the batch of "
            f"{batch:,}, so that this is another computation than without."
        )
    if isinstance(order, Weighted):
        per_epoch = order.epochs(examples)
        shares = ", ".join(f"{n} {e:.3g} times" for n, e in zip(config.data.mixture, per_epoch))
        found.append(
            f"The mixture goes by its weights: in an epoch of {examples:,} pairs, the examples of "
            f"{shares}. Some come more than once, others not at all (data/epoch/NAME counts)."
        )
        for name, size, slots in zip(config.data.mixture, order.sizes, order.slots):
            if (share := batch * slots / order.ROUND) > size:
                found.append(
                    f"Of a batch, {share:,.0f} pairs are from {name}, which has {size:,}: each "
                    "batch holds some of them twice."
                )
    return found


def _few_captions(wanted: int, source: Source) -> list[str]:
    """Says so if most of the first examples have fewer captions than a step draws."""
    counts = []
    for index in range(min(len(source), _LOOKED_AT)):
        with contextlib.suppress(BadExample):
            counts.append(len(source[index].captions.texts))
    fewer = sum(count < wanted for count in counts)
    if fewer <= len(counts) / 2:
        return []
    return [
        f"data.captions = {wanted}, but {fewer} of the first {len(counts)} examples have fewer "
        "captions, and repeat some: does source.text_key name all fields with captions?"
    ]
