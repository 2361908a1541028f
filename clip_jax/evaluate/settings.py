"""What an evaluation may vary; the defaults stand in configs/default.py under eval.suite."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict


@dataclasses.dataclass(frozen=True)
class Settings:
    """See the fields of the same names in configs/default.py."""

    prompts: str
    confidence: float
    shots: tuple[int, ...]
    repeats: int
    retrieval_prompt: str
    label_thresholds: tuple[float, ...]
    overlap_threshold: float
    seed: int
    # Of the command alone: thresholds of single data sets, and accuracies of other models.
    thresholds: Mapping[str, float] = dataclasses.field(default_factory=dict)
    testbed: str = ""

    @classmethod
    def of(cls, suite: ConfigDict, seed: int, **more: Any) -> "Settings":
        """From config.eval.suite and config.seed."""
        names = {field.name for field in dataclasses.fields(cls)}
        fields = {name: value for name, value in suite.items() if name in names}
        return cls(**fields, seed=seed, **more)
