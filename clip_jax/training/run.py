"""A run: the parts that do not change, made from its config, and its progress."""

import dataclasses
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from clip_jax import models, sharding
from clip_jax.common import clock, hosts, trackers
from clip_jax.data import identity, mixture, pipeline, rows, text_mask, tokenizer
from clip_jax.data.order import Order
from clip_jax.data.sources.base import Source
from clip_jax.errors import UserError
from clip_jax.evaluate.evaluator import Evaluator
from clip_jax.training import agreement, notices, program

# Before the metrics of the moving average of the parameters.
EMA = "ema/"


@dataclasses.dataclass(frozen=True)
class Run:
    """The parts of a run that do not change.

    Attributes:
      directory: the workdir.
      program: model, optimiser, mesh and training step, with the config.
      tokenizer, source, order: the training data, not opened at a position yet.
      data: description of the data, by which a resumed run can tell that they have changed.
      evaluator: evaluations of the config.
      log_every, eval_every: steps between logs and evaluations.
      checkpoint_every: steps between checkpoints; 0: by the clock, or only at the end.
      trace_at: first step of a trace; 0: none.
    """

    directory: epath.Path
    program: program.Program
    tokenizer: tokenizer.Tokenizer
    source: Source
    order: Order
    data: identity.Identity
    evaluator: Evaluator
    log_every: int
    eval_every: int
    checkpoint_every: int
    trace_at: int

    @property
    def config(self) -> ConfigDict:
        """The whole config."""
        return self.program.config

    @property
    def mesh(self) -> Mesh:
        """The devices."""
        return self.program.mesh

    @property
    def total_steps(self) -> int:
        """The length of the run."""
        return self.program.total_steps

    def measures(self, metric: str) -> bool:
        """Tells whether evaluations measure a metric, before any is made."""
        averaged = metric.startswith(EMA) and not self.config.optim.ema_decay
        return not averaged and self.evaluator.measures(metric.removeprefix(EMA))

    @property
    def net(self) -> models.ImageModel:
        """The model."""
        return self.program.net


@dataclasses.dataclass(frozen=True)
class ResumeState:
    """The progress of a run and of those that it resumes, as a checkpoint stores it."""

    step: int = 0
    examples_seen: int = 0
    seconds: float = 0.0  # wall time
    skipped: Mapping[str, int] = dataclasses.field(default_factory=dict)  # examples by reason
    truncated: int = 0  # captions
    skipped_steps: Mapping[str, int] = dataclasses.field(default_factory=dict)  # by reason
    skipped_in_a_row: int = 0  # steps, the last ones
    # Each with "from_step", "to_step", and "examples_seen", the position to go on from.
    rollbacks: Sequence[Mapping[str, int]] = ()
    seconds_by_phase: Mapping[str, float] = dataclasses.field(default_factory=dict)
    evaluation_due: bool = False  # the run was stopped before the evaluation of this step was done

    @classmethod
    def from_meta(cls, meta: Mapping[str, Any]) -> "ResumeState":
        """Reads the metadata of a checkpoint; an earlier version's has not all fields."""
        names = [field.name for field in dataclasses.fields(cls)]
        return cls(**{name: meta[name] for name in names if name in meta})


def prepare(config: ConfigDict, directory: epath.Path) -> Run:
    """Does all that can fail on a wrong setting, before anything slow."""
    mesh, net = program.make_mesh_and_net(config)
    trackers.parse(config.log.trackers)
    tokens = tokenizer.create(config.tokenizer, net.size.context_length)
    _check_tokenizer(config, tokens, net.size)
    text_mask.create(config.data.text_mask, tokens)  # raises where NLTK is missing
    fallback_dir = _fallback_dir(directory)
    with hosts.first_host_first("indices of the data"):
        source, order = mixture.create(
            config.data,
            net.size.image_size,
            config.seed,
            batch_size=config.batch_size,
            parts=sharding.process_part(mesh)[1],
            fallback_dir=fallback_dir,
        )
        evaluator = Evaluator(config, net, mesh, tokens, fallback_dir)
    notices.check_batch(config, len(source))
    described = identity.describe(config.data, source)
    agreement.check_data(described)
    made = program.build(config, len(source))
    _, to_steps = program.count_steps(config, len(source))
    return Run(
        directory=directory,
        program=made,
        tokenizer=tokens,
        source=source,
        order=order,
        data=described,
        evaluator=evaluator,
        log_every=to_steps(config.log.every),
        eval_every=to_steps(config.eval.every),
        checkpoint_every=_every(config.checkpoint.every, to_steps),
        trace_at=to_steps(config.log.trace) if config.log.trace else 0,
    )


def _every(interval: str, to_steps: Callable[[str], int]) -> int:
    """Returns an interval in steps; 0: it is a time."""
    return to_steps(interval) if clock.to_seconds(interval) is None else 0


def _fallback_dir(directory: epath.Path) -> epath.Path:
    """Returns the directory for indices of shards whose own directory cannot be written to."""
    return directory / "index"


def _check_tokenizer(config: ConfigDict, tokens: tokenizer.Tokenizer, size: models.Size) -> None:
    """Raises UserError where the model cannot read the ids of the tokenizer."""
    if isinstance(tokens, tokenizer.SiglipTokenizer) and size.text_pool == "end":
        raise UserError(
            f"{size} finds the end of a caption by the largest id, which SigLIP's end token is "
            f"not: leave {tokenizer.SIGLIP!r} out of --config.tokenizer={config.tokenizer}, or "
            "train a SigLIP model."
        )
    largest = tokens.vocab_size - 1 if size.end_token is None else size.end_token
    reads_end = size.text_pool in ("end", "bag") or size.text_decoder_layers > 0
    if reads_end and tokens.end != largest:
        raise UserError(
            f"{size} finds the end of a caption by the id {largest}, but the tokenizer "
            f"{config.tokenizer!r} ends it with {tokens.end}: add "
            f"--config.model.size.end_token={tokens.end}, or take another tokenizer."
        )
    # Published models of this form have more entries than their tokenizer.
    unused = bool(config.init_from)
    if tokens.vocab_size > size.vocab_size or (tokens.vocab_size < size.vocab_size and not unused):
        raise UserError(
            f"The tokenizer {config.tokenizer!r} has {tokens.vocab_size} entries, the model "
            f"{size.vocab_size}: add --config.model.size.vocab_size={tokens.vocab_size}."
        )


def open_data(run: Run, examples_seen: int) -> pipeline.TrainPipeline:
    """Opens the training data after the examples seen already, this host's part of them."""
    part, parts = sharding.process_part(run.mesh)
    config, size = run.config, run.net.size
    spec = rows.Spec(
        config=config.data,
        tokenizer=config.tokenizer,
        context_length=size.context_length,
        image_size=size.image_size,
        seed=config.seed,
        batch_size=config.batch_size,
        parts=parts,
        fallback_dir=_fallback_dir(run.directory),
    )
    return pipeline.TrainPipeline(
        run.source, run.order, run.tokenizer, spec, start=examples_seen, part=part
    )


def list_counts(counts: Mapping[str, int]) -> str:
    """Lists counts, most frequent first: "3 x unreadable image, 1 x empty caption"."""
    return ", ".join(f"{count:,} x {name}" for name, count in Counter(counts).most_common())


def hardware(mesh: Mesh) -> str:
    """Returns number and kind of the devices."""
    return f"{mesh.size} x {jax.devices()[0].device_kind}"
