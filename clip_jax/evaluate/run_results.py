"""What evaluations find and what a run was: plain data that report.py turns into a page.

Shares (accuracies, recalls, probabilities) are fractions in [0, 1] everywhere.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

import numpy as np

from clip_jax.common.pages.page import Picture


@dataclass(frozen=True)
class Mistake:
    """One wrongly classified image."""

    image: Picture
    true: str  # name of its class
    predicted: str  # name of the class chosen
    probability: float  # given to the class chosen


@dataclass(frozen=True)
class ZeroshotResult:
    """Zero-shot classification of one labelled set."""

    class_names: tuple[str, ...]
    templates: tuple[str, ...]  # prompts whose embeddings were averaged
    confusion: np.ndarray  # int64 [classes, classes], counts; rows: true, columns: predicted
    top1: float
    top5: float | None  # None: too few classes for it to mean anything
    per_class: np.ndarray  # float [classes], share right of each class; NaN: no example of it
    n: int  # images classified
    mistakes: Sequence[Mistake] = ()  # the most confident ones, at most a dozen or so
    by_score: bool = False  # of prompts, for want of embeddings: see evals/scores.py


@dataclass(frozen=True)
class GalleryRow:
    """One caption and the images nearest to it, best first."""

    query: str
    images: Sequence[Picture]
    hits: Sequence[bool]  # as long as images; True: the image belongs to the caption


@dataclass(frozen=True)
class RetrievalResult:
    """Recall between images and captions of one set."""

    metrics: Mapping[str, float]  # such as "text_to_image/recall@1"
    chance: Mapping[str, float]  # of the same names: what random embeddings would reach
    gallery: Sequence[GalleryRow] = ()


@dataclass(frozen=True)
class RunSummary:
    """What ran, on what, for how long."""

    title: str
    command: str
    started: datetime
    finished: datetime
    wall_seconds: float
    hardware: str
    params: int
    images_seen: int
    steps: int
    images_per_second: float
    skipped: Mapping[str, int]  # unusable examples by reason
    truncated: int  # captions cut to the context length
    config_text: str
