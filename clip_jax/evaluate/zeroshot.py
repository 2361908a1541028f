"""Zero-shot classification with an ensemble of prompts (paper section 3.1)."""

from collections.abc import Iterator, Sequence

import numpy as np

from clip_jax.data.sources.base import Source
from clip_jax.data.tokenizer import Tokenizer
from clip_jax.embed.encoder import Encoder, Variables
from clip_jax.errors import UserError
from clip_jax.evaluate import confusion
from clip_jax.evaluate.run_results import ZeroshotResult
from clip_jax.models.prompts import average_classes, class_prompts, prepare
from clip_jax.sharding import to_host


class Zeroshot:
    """Classifies the labelled images of a source by the prompts of its classes."""

    def __init__(
        self,
        encoder: Encoder,
        source: Source,
        tokenizer: Tokenizer,
        class_names: Sequence[str] = (),
        templates: Sequence[str] = (),
    ):
        """Prepares the prompts.

        Args:
          encoder: of images and prompts.
          source: of labelled images; unlabelled ones are left out.
          tokenizer: of the prompts.
          class_names, templates: as in `class_prompts`; empty: those of the source.
        """
        self.class_names = tuple(class_names) or source.class_names
        self.templates = tuple(templates) or source.templates
        self._names = tuple(names.split("|")[0] for names in self.class_names)  # to show
        prompts, self._owners = class_prompts(self.class_names, self.templates)
        self._tokens = tokenizer(prompts)
        self._encoder = encoder
        self._source = source

    def run(self, variables: Variables) -> ZeroshotResult:
        """Embeds the prompts once and every image once, or scores every prompt for every image.

        Raises:
          UserError: no labelled image, or a label without a class name.
        """
        labels, indices, ranked, probabilities = self._classify(variables)
        return confusion.summarize(
            labels,
            ranked,
            probabilities,
            self._names,
            self.templates,
            lambda row: self._encoder.picture(self._source, int(indices[row])),
            by_score=self._encoder.scores_prompts,
        )

    def _logits(self, variables: Variables) -> Iterator[tuple[np.ndarray, ...]]:
        """Labels [m], indices [m] and logits [m, classes] of all labelled images."""
        encoder, classes = self._encoder, len(self.class_names)
        if encoder.scores_prompts:
            prompts = prepare(self._tokens)
            found = encoder.scores(variables, self._source, prompts, self._owners, classes)
            for batch in map(_labelled, found):
                yield batch["label"], batch["index"], batch["scores"]
            return
        embeds = encoder.texts(variables, self._tokens)
        class_embeds = average_classes(embeds, self._owners, classes)
        scale = float(np.exp(to_host(variables["params"]["logit_scale"])))
        for batch in map(_labelled, encoder.images(variables, self._source)):
            yield batch["label"], batch["index"], scale * batch["embed"] @ class_embeds.T

    def _classify(self, variables: Variables):
        """Labels [n], indices [n], the 5 best classes [n, 5], probability of the best [n]."""
        parts = []
        for label, index, logits in self._logits(variables):
            if len(label):
                parts.append((label, index, *confusion.rank(logits)))
        if not parts:
            raise UserError(
                "Zero-shot evaluation found no labelled image: set label_key of its source."
            )
        labels, indices, ranked, best = (np.concatenate(part) for part in zip(*parts))
        if labels.max() >= len(self.class_names):
            raise UserError(
                f"The data has label {labels.max()}, but only {len(self.class_names)} class names "
                "are given: set eval.zeroshot.class_names."
            )
        return labels, indices, ranked, best


def _labelled(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The rows of a batch that have a label."""
    return {name: rows[batch["label"] >= 0] for name, rows in batch.items()}
