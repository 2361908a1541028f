"""Models on disk, ours and those of other projects: one way in, `open`, and one way out, `save`."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from etils import epath

    from clip_jax.weights.model import Weights

__all__ = ["open", "save"]


def open(
    path: "epath.PathLike",
    *,
    step: int | None = None,
    model: str = "",
    activation: str = "",
    tokenizer: str = "",
) -> "Weights":
    """Opens a model in any format; its arrays are read when they are asked for.

    Args:
      path: a workdir, or one of its checkpoints ("runs/quickstart/checkpoints/1500"); a converted
        or exported folder; weights in any format that `python -m clip_jax convert` reads; each
        local, gs:// or s3://; or a name on the Hugging Face hub ("org/name"), fetched once.
      step: checkpoint of a workdir; None: the most recent.
      model: expected model, one of `available_models()`; needed for a bare state dict. "": any.
      activation: replaces the activation that the source names. "": kept.
      tokenizer: "openai", or the vocabulary file of a SigLIP model. "": the one found there.

    Raises:
      UserError: there is no model, it is damaged, or it is not what the arguments say.
    """
    # Late, so that --help is instant, and training does not wait for formats that it does not read.
    from clip_jax.weights import opening

    return opening.open_model(path, step, model, activation, tokenizer)


def save(weights: "Weights", path: "epath.PathLike", to: str = "clip_jax") -> None:
    """Writes a model; nothing incomplete ever has the target's name.

    Args:
      weights: model to write.
      path: file or folder that does not exist yet, local or in a bucket.
      to: name in `convert.formats.FORMATS`.

    Raises:
      UserError: the target exists, its bucket does not, or the format has no such model.
    """
    from clip_jax.weights.convert import formats  # late, as above

    formats.save(weights, path, to)
