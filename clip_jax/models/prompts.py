"""Prompts of classes: made from templates, then averaged, or scored by models that write texts."""

from collections.abc import Iterable, Mapping, Sequence, Set
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int

from clip_jax.choices import TEMPLATES
from clip_jax.errors import UserError
from clip_jax.models.image_model import Images


class Prompts(NamedTuple):
    """Prompts and their distinct prefixes.

    The likelihood of a prompt is the product of its next-token probabilities; prompts share most
    prefixes, so each prefix is computed once.

    Attributes:
      tokens: token ids, without the padding common to all.
      prefix_prompt: a prompt that starts with the prefix; the one that ends there, if there is one.
      prefix_end: place of the last token of each prefix.
      prefix_ids: number of the prefix up to each place of each prompt; arbitrary after the last one
        that a token follows.
    """

    tokens: Int[Array | np.ndarray, "prompts length"]
    prefix_prompt: Int[Array | np.ndarray, " prefixes"]
    prefix_end: Int[Array | np.ndarray, " prefixes"]
    prefix_ids: Int[Array | np.ndarray, "prompts length-1"]


def prepare(tokens: Int[np.ndarray, "prompts length"]) -> Prompts:
    """Finds the prefixes of prompts, each up to its end token, its largest id, and zeros."""
    lengths = tokens.argmax(axis=1)
    tokens = tokens[:, : lengths.max() + 1]
    known: dict[bytes, int] = {}
    prefix_prompt, prefix_end = [], []
    prefix_ids = np.zeros((len(tokens), tokens.shape[1] - 1), np.int32)
    # By length: a prompt that ends comes before those that continue.
    for prompt in np.argsort(lengths, kind="stable"):
        for end in range(lengths[prompt]):
            key = tokens[prompt, : end + 1].tobytes()
            if key not in known:
                known[key] = len(prefix_prompt)
                prefix_prompt.append(prompt)
                prefix_end.append(end)
            prefix_ids[prompt, end] = known[key]
    return Prompts(
        tokens, np.array(prefix_prompt, np.int32), np.array(prefix_end, np.int32), prefix_ids
    )


def class_prompts(
    class_names: Sequence[str], templates: Sequence[str]
) -> tuple[list[str], Int[np.ndarray, " prompts"]]:
    """Puts every name of every class into every template.

    Args:
      class_names: alternatives of one class joined by "|".
      templates: each with one {} for the name.

    Returns:
      The prompts, and the number of the class of each.

    Raises:
      UserError: no class, no template, or a template without its {}.
    """
    class_names = as_texts(class_names, "class names", "cat")
    templates = as_texts(templates, "templates", *TEMPLATES)
    if not class_names or not templates:
        raise UserError(
            "Zero-shot classification needs class names and templates: the data names none, so "
            "set eval.zeroshot.class_names and eval.zeroshot.templates in the config."
        )
    if bad := [template for template in templates if template.count("{}") != 1]:
        raise UserError(f"The template {bad[0]!r} must have exactly one {{}} for the class name.")
    prompts, class_ids = [], []
    for class_id, names in enumerate(class_names):
        for name in names.split("|"):
            if not name.strip():
                raise UserError(f"The class name {names!r}, number {class_id}, is or has no word.")
            prompts += [template.replace("{}", name) for template in templates]
            class_ids += [class_id] * len(templates)
    return prompts, np.array(class_ids)


def as_texts(texts: Any, what: str, example: str) -> list[str]:
    """Returns texts as a list.

    Args:
      texts: an iterable in a definite order.
      what: kind of the texts, for the message.
      example: one of them, for the message.

    Raises:
      UserError: it is a single text, which would be taken letter by letter, or holds other values.
    """
    if isinstance(texts, (str, bytes, Mapping, Set)) or not isinstance(texts, Iterable):
        raise UserError(
            f"The {what} are {texts!r:.60}, and must be a list of texts, as in [{example!r}]."
        )
    found = list(texts)
    for i, text in enumerate(found):
        if not isinstance(text, str):
            raise UserError(f"Number {i} of the {what} is {text!r:.60}, and must be a text.")
    return found


def average_classes(
    embeds: Float[np.ndarray, "prompts embed"],
    class_ids: Int[np.ndarray, " prompts"],
    classes: int,
) -> Float32[np.ndarray, "{classes} embed"]:
    """Averages the prompts' unit vectors by class, and normalises the means."""
    sums = np.zeros((classes, embeds.shape[1]))
    np.add.at(sums, class_ids, embeds)
    return (sums / np.linalg.norm(sums, axis=1, keepdims=True)).astype(np.float32)


def class_scores(
    net: Any,  # has the method `score`
    variables: Any,
    images: Images,
    prompts: Prompts,
    class_ids: Int[Array | np.ndarray, " prompts"],
    classes: int,
) -> Float32[Array, "batch {classes}"]:
    """Scores each class for each image, for models that embed no texts; to be jitted.

    The score of a class is the logarithm of the mean likelihood of its prompts: how likely the
    caption is if one of them was picked at random. The mean of the logarithms would let a single
    odd name, of several that are right, decide against a class.

    Args:
      net: one of `clip_jax.models.MODULES` that has `score`, which takes a prompt at a time: memory
        is that of as many captions as there are images, and a few numbers for each pair.
      variables: the model's.
      images: uint8.
      prompts: see `prepare`.
      class_ids: number of the class of each prompt.
      classes: number of classes; each has a prompt.

    Returns:
      Logarithms of likelihoods.
    """
    scores = cast(jax.Array, net.apply(variables, images, prompts, method="score")).T
    best = jax.ops.segment_max(scores, class_ids, classes)
    likelihoods = jax.ops.segment_sum(jnp.exp(scores - best[class_ids]), class_ids, classes)
    prompts_per_class = jax.ops.segment_sum(jnp.ones(len(class_ids)), class_ids, classes)
    return (best + jnp.log(likelihoods / prompts_per_class[:, None])).T
