"""Predicts zero-shot accuracy on ImageNet from published results (published.csv).

The odds of an error are a sum of power laws, times factors:

    (1 - top1) / top1 = (c + A weights^-a + B seen^-b + C pairs^-u (1 - 1 / epochs))
                        exp(k / image tokens) exp(collection + recipe + ResNet)

`weights` are those of the image tower that a token meets, half of its operations by token. The
third power law is what repetition costs: nothing within the first epoch. Collections of data and
recipes have an offset each, drawn to 0 by a normal prior of `PRIOR`. All is fitted by least squares
on the logarithm of the odds each time it is asked for.
"""

import csv
import dataclasses
import functools
import pathlib
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from clip_jax.models import flops
from clip_jax.models.sizes import Size, get_size

FILE = pathlib.Path(__file__).with_name("published.csv")
UNKNOWN = "unknown"  # name of a collection without results
PRIOR = 0.3  # standard deviation of the offsets, in logarithms of odds
NOISE = 0.1  # that of a result, against which the prior is weighed
COVERAGE = 0.9  # of the interval
CLIP = "clip"  # the recipe that has no offset: softmax loss, all tokens from the start
RECIPES = ("captions", "sigmoid", "clipa")
_START = (-2.0, -1.7, 0.5, -2.0, 0.7, -2.0, 1.0, 15.0, 0.2)

# Shapes of the published models that have no name here, by open_clip's model_configs and, for the
# smaller ones of OpenVision, its src/models: layers and width of the image tower, width and layers
# of the text tower, hidden units of both if not four times the width.
_SHAPES = {
    "Ti": (12, 192, 192, 12, 0, 0),
    "S": (12, 384, 384, 12, 0, 0),
    "M": (12, 512, 512, 12, 0, 0),
    "B": (12, 768, 512, 12, 0, 0),
    "B+": (12, 896, 640, 12, 0, 0),
    "L": (24, 1024, 768, 12, 0, 0),
    "So400m": (27, 1152, 1152, 27, 4304, 4304),
    "H": (32, 1280, 1024, 24, 0, 0),
    "g": (40, 1408, 1024, 24, 6144, 0),
    "bigG": (48, 1664, 1280, 32, 8192, 0),
}


@dataclasses.dataclass(frozen=True)
class Setting:
    """A training run, as far as its accuracy is predicted from it.

    Attributes:
      size: the model at the resolution of its evaluation.
      seen: pairs seen, repetitions counted.
      pairs: pairs that differ; infinite: not published, more than are seen.
      collection: family of the data, as in published.csv, or `UNKNOWN`.
      recipe: `CLIP` or one of `RECIPES`.
    """

    size: Size
    seen: float
    pairs: float
    collection: str
    recipe: str


@dataclasses.dataclass(frozen=True)
class Result:
    """A row of published.csv.

    Attributes:
      model, data, source, place: texts; `place` names the row in `source`.
      setting: what it is predicted from.
      batch: pairs per step; None: not published.
      top1: fraction of ImageNet's validation set, zero-shot.
    """

    model: str
    data: str
    setting: Setting
    batch: int | None
    top1: float
    source: str
    place: str


@dataclasses.dataclass(frozen=True)
class Prediction:
    """A predicted accuracy with its interval of `COVERAGE`, as fractions."""

    top1: float
    low: float
    high: float


@functools.cache
def published() -> tuple[Result, ...]:
    """Reads published.csv."""
    with FILE.open(newline="") as file:
        return tuple(_result(row) for row in csv.DictReader(file))


def _result(row: dict[str, str]) -> Result:
    size = published_size(row["model"], int(row["image_size"]), int(row["text_tokens"]))
    pairs = float(row["pairs"] or "inf")
    setting = Setting(size, float(row["seen"]), pairs, row["collection"], row["recipe"])
    batch = int(row["batch"]) if row["batch"] else None
    top1 = float(row["top1"]) / 100
    return Result(row["model"], row["data"], setting, batch, top1, row["source"], row["place"])


def published_size(model: str, image_size: int, text_tokens: int) -> Size:
    """Returns the size of a model of published.csv: "RN50", "ViT-B/16", "ViT-B/16 twin", …

    Args:
      model: behind the patch, "text 768" names another width of the text tower; "twin" one of the
        shape of the image tower.
      image_size: side of its images in pixels.
      text_tokens: context of its text tower.
    """
    shapes = {"image_size": image_size, "context_length": text_tokens}
    if model.startswith("RN"):
        return get_size(model, shapes)
    kind, _, rest = model.removeprefix("ViT-").partition("/")
    patch, _, text = rest.partition(" ")
    layers, width, text_width, text_layers, mlp, text_mlp = _SHAPES[kind]
    if text == "twin":
        text_width, text_layers = width, layers
    elif text:
        text_width = int(text.removeprefix("text "))
    fields = {
        "embed_dim": text_width,
        "image_layers": (layers,),
        "image_width": width,
        "image_heads": 16 if width % 64 else width // 64,
        "image_mlp": mlp,
        "patch_size": int(patch),
        "text_width": text_width,
        "text_heads": 16 if text_width % 64 else text_width // 64,
        "text_layers": text_layers,
        "text_mlp": text_mlp,
        "activation": "gelu",
    }
    return get_size("ViT-B/32", {**fields, **shapes})


def image_tokens(size: Size) -> int:
    """Returns the tokens of the image tower; of a ResNet, those of its attention pool."""
    return (size.image_size // 32) ** 2 + 1 if size.is_resnet else size.image_tokens


class Law:
    """The power laws, fitted to results.

    Attributes:
      collections: names of those that have an offset.
      coefficients: those of `_log_odds`, then the offsets of collections and recipes.
      residuals: predicted minus published logarithm of the odds, of each result.
      leverage: weight of each result in its own prediction, 0 to 1.
      freedom: results minus fitted coefficients, those that the prior holds counted in part.
      noise: standard deviation of the logarithm of the odds of a result.
      spread: standard deviation of the offsets of the collections.
    """

    def __init__(self, results: Sequence[Result]):
        from scipy import optimize

        self.collections = sorted({result.setting.collection for result in results})
        table = self._table([result.setting for result in results])
        odds = np.array([np.log(1 / result.top1 - 1) for result in results])

        def residuals(x: Float[np.ndarray, " k"]) -> Float[np.ndarray, " n"]:
            return np.concatenate([(_log_odds(x, table) - odds) / NOISE, x[len(_START) :] / PRIOR])

        start = np.concatenate([_START, np.zeros(len(self.collections) + len(RECIPES))])
        fitted = optimize.least_squares(residuals, start)
        self.coefficients = fitted.x
        self._inverse = np.linalg.pinv(fitted.jac.T @ fitted.jac) * NOISE**2
        rows = fitted.jac[: len(results)]
        self.leverage = np.einsum("ij,jk,ik->i", rows, self._inverse, rows) / NOISE**2
        self.residuals = _log_odds(fitted.x, table) - odds
        self.freedom = float(len(results) - self.leverage.sum())
        self.noise = float(np.sqrt((self.residuals**2).sum() / self.freedom))
        offsets = fitted.x[len(_START) : len(_START) + len(self.collections)]
        self.spread = float(offsets.std(ddof=1))

    def predict(self, setting: Setting) -> Prediction:
        """Predicts the accuracy of a run; data of no known collection have no offset."""
        from scipy import stats

        odds, slopes = self._linear(setting)
        variance = self.noise**2 * (1 + slopes @ self._inverse @ slopes / NOISE**2)
        freedom = self.freedom
        if setting.collection not in self.collections:  # the next draw of few collections
            freedom = len(self.collections) - 1.0
            variance += self.spread**2 * (1 + 1 / len(self.collections))
        half = stats.t.ppf((1 + COVERAGE) / 2, freedom) * np.sqrt(variance)
        top1, low, high = (1 / (1 + np.exp(odds + shift)) for shift in (0.0, half, -half))
        return Prediction(float(top1), float(low), float(high))

    def leave_one_out(self) -> tuple[Float[np.ndarray, " n"], float]:
        """Predicts each result from all others.

        The fit without a result is that of the linearised law, which costs nothing.

        Returns:
          The logarithms of the odds, predicted minus published, and the fraction of results within
          the interval that the others give.
        """
        from scipy import stats

        kept = 1 - self.leverage
        others = (self.residuals**2).sum() - self.residuals**2 / kept
        scale = np.sqrt(others / (self.freedom - 1) / kept)
        error = self.residuals / kept
        inside = abs(error) <= stats.t.ppf((1 + COVERAGE) / 2, self.freedom - 1) * scale
        return error, float(inside.mean())

    def _linear(self, setting: Setting) -> tuple[float, Float[np.ndarray, " k"]]:
        """Returns the logarithm of the odds and its derivatives by the coefficients."""
        table, x = self._table([setting]), self.coefficients
        odds = float(_log_odds(x, table)[0])
        steps = 1e-5 * np.eye(len(x))
        slopes = [(_log_odds(x + step, table)[0] - odds) / 1e-5 for step in steps]
        return odds, np.array(slopes)

    def _table(self, settings: Sequence[Setting]) -> Float[np.ndarray, "n columns"]:
        """Returns weights, tokens, seen, pairs, ResNet or not, and the offsets that apply."""
        return np.array([self._row(setting) for setting in settings])

    def _row(self, setting: Setting) -> list[float]:
        tokens = image_tokens(setting.size)
        weights = _image_flops(setting.size) / 2 / tokens
        pairs = min(setting.pairs, setting.seen)
        collections = [float(setting.collection == name) for name in self.collections]
        recipes = [float(setting.recipe == name) for name in RECIPES]
        row = [weights / 1e8, tokens, setting.seen / 1e9, pairs / 1e8, setting.size.is_resnet]
        return [*map(float, row), *collections, *recipes]


@functools.cache
def _image_flops(size: Size) -> float:
    return flops.image_flops(size)


def top1_errors(
    results: Sequence[Result], errors: Float[np.ndarray, " n"]
) -> Float[np.ndarray, " n"]:
    """Converts errors of the logarithm of the odds to those of the accuracy, as fractions."""
    top1 = np.array([result.top1 for result in results])
    return 1 / (1 + (1 / top1 - 1) * np.exp(errors)) - top1


def _log_odds(
    x: Float[np.ndarray, " k"], table: Float[np.ndarray, "n columns"]
) -> Float[np.ndarray, " n"]:
    """Returns the logarithm of the odds of an error.

    Args:
      x: logarithms of c, A, B and C, each behind the first before its exponent; k; offset of a
        ResNet; other offsets.
      table: rows of `Law._row`.
    """
    c, size, a, data, b, again, u, k, resnet = x[: len(_START)]
    weights, tokens, seen, pairs, is_resnet = table[:, :5].T
    fresh = pairs * 1e8 / (seen * 1e9)  # 1 / epochs
    odds = np.exp(c) + np.exp(size) * weights**-a + np.exp(data) * seen**-b
    odds = odds + np.exp(again) * pairs**-u * (1 - fresh)
    return np.log(odds) + k / tokens + resnet * is_resnet + table[:, 5:] @ x[len(_START) :]
