"""The embedded data set: scenes composed of real handwritten digits, with captions.

The digits are the 1,797 scans of 8 x 8 pixels and 17 grey levels that scikit-learn ships
(`sklearn.datasets.load_digits`; from UCI, "Optical Recognition of Handwritten Digits"), so nothing
is downloaded. A scene has one digit or two on a dark canvas. Everything is grey: with colours, a
model learns those and leaves the shapes alone.
"""

import dataclasses
import functools
import importlib.util
import math
import pathlib
import random

import numpy as np
from PIL import Image, ImageFilter

from clip_jax.data.sources.base import Example, Request
from clip_jax.data.sources.captions import Captions
from clip_jax.data.sources.labels import GROUP_SETTINGS, parse_groups
from clip_jax.errors import UserError

FIELD = "digits"  # the one that `teacher_keys` may name
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
HELD_OUT_PER_DIGIT = 36  # 360 of the 1,797 scans, drawn once and for all, whatever the seed

# Number of scenes; as many as there are held-out scans in "test".
TRAIN_SCENES = 60_000
TEST_SCENES = 1_000

_SINGLE_LARGE, _SINGLE_SMALL = 0.35, 0.1  # fractions of the scenes; the rest are pairs

# Side of the scanned square, in sides of the canvas.
_LARGE = (0.85, 0.95)  # alone on the canvas
_HALF = (0.46, 0.5)  # in pairs; captions do not mention it
_SMALL = (0.34, 0.38)  # alone, in some ninth of the canvas

_MAX_ANGLE = 8.0  # degrees
_PADDING = 2  # pixels of empty paper around a scan, so that its edge is interpolated smoothly

# The sizes of the shifts of "test".
_TILT = 25.0  # degrees further than other scenes, to either side
_BLUR = 0.08  # standard deviation, in sides of the canvas
_NOISE = 60.0  # standard deviation, in grey levels

# Frames of the digits of a pair: left, top, width, height.
_BESIDE = ((0, 0.2, 0.5, 0.6), (0.5, 0.2, 0.5, 0.6))
_STACKED = ((0.2, 0, 0.6, 0.5), (0.2, 0.5, 0.6, 0.5))

_PLACES = (
    ("in the top left corner", "at the top", "in the top right corner"),
    ("on the left", "in the middle", "on the right"),
    ("in the bottom left corner", "at the bottom", "in the bottom right corner"),
)
_BESIDE_CAPTIONS = (
    "{a} to the left of {b}",
    "{b} to the right of {a}",
    "{a} on the left and {b} on the right",
)
_STACKED_CAPTIONS = (
    "{a} above {b}",
    "{b} below {a}",
    "{a} at the top and {b} at the bottom",
)


@dataclasses.dataclass(frozen=True)
class Glyph:
    """A scan on the canvas.

    Attributes:
      scan: row of the scan in `load_digits`.
      digit: the digit that it shows.
      x, y: its centre, in sides of the canvas from the top left corner.
      size: side of the scanned square, in sides of the canvas.
      angle: degrees.
    """

    scan: int
    digit: int
    x: float
    y: float
    size: float
    angle: float

    @property
    def size_word(self) -> str:
        """The size as a caption may name it; "": neither small nor large."""
        return "small" if self.size <= _SMALL[1] else "large" if self.size >= _LARGE[0] else ""


def open_source(request: Request) -> "DigitScenes":
    """Opens a source of type "digits"."""
    spec = request.spec
    fields = parse_groups(spec.group_keys)
    if unknown := set(fields) - {FIELD}:
        raise UserError(
            f"The embedded digits have no field {', '.join(sorted(unknown))} (source."
            f'{GROUP_SETTINGS}): only "{FIELD}", ten numbers, 1 for each digit in the scene.'
        )
    return DigitScenes(spec.split, request.image_size, request.seed, len(fields))


class DigitScenes:
    """Scenes of one digit or two; a `Source`. Scene i depends on seed, split and i alone.

    Splits:
      "train": scenes of the training scans.
      "train_two_captions": the same scenes, each with two captions.
      "train_scans": every training scan once, alone and large, labelled.
      "test": every held-out scan once in the same way; for zero-shot classification.
      "test_scenes": scenes of the held-out scans composed as in "train"; for retrieval.
      "test_inverted", "test_blurred", "test_noisy", "test_tilted": the images of "test", dark on
        light, out of focus, with a grain, turned further; for robustness.

    Args:
      split: name of the split.
      image_size: pixels along a side of the canvas.
      seed: PRNG seed of the compositions and captions; the held-out scans do not depend on it.
      fields: number of times that each example has the digits in it, as its groups.

    Raises:
      UserError: unknown split.
    """

    class_names = tuple(f"{word}|{digit}" for digit, word in enumerate(WORDS))
    templates = (
        "a handwritten {}",
        "a large handwritten {}",
        "the digit {}",
        "the number {}",
    )

    def __init__(self, split: str, image_size: int, seed: int, fields: int = 0):
        if split not in SPLITS:
            raise UserError(
                f"The embedded digits have no split {split!r}: source.split is one of "
                f"{', '.join(SPLITS)}."
            )
        self._split = split
        # The scenes before a shift, or with one caption.
        self._scenes = "test" if split in SHIFTS else split.removesuffix(TWICE)
        self._image_size = image_size
        self._seed = seed
        self._fields = fields
        self._papers, self._digits = _scans()
        train, held_out = _split_scans()
        self._rows = train if split.startswith("train") else held_out
        self._rows_of = [[r for r in self._rows if self._digits[r] == d] for d in range(10)]

    def __len__(self) -> int:
        composed = {"train": TRAIN_SCENES, "test_scenes": TEST_SCENES}
        return composed.get(self._scenes, len(self._rows))

    def __getitem__(self, index: int) -> Example:
        rng = self._rng(index)
        glyphs = self._compose(rng, index)
        count = 2 if self._split.endswith(TWICE) else 1
        captions = tuple(_caption(rng, glyphs) for _ in range(count))
        return Example(
            image=self._shift(self._draw(glyphs), index),
            captions=Captions(captions, (1.0,) * len(captions)),
            labels=(glyphs[0].digit,) if len(glyphs) == 1 else (),
            key=f"digits {self._split} {index}",
            groups=([float(d in {g.digit for g in glyphs}) for d in range(10)],) * self._fields,
        )

    def glyphs(self, index: int) -> tuple[Glyph, ...]:
        """The glyphs of scene `index`; of two, the left or upper one first."""
        return self._compose(self._rng(index), index)

    def _rng(self, index: int) -> random.Random:
        if not 0 <= index < len(self):
            raise IndexError(f"{index} is not in [0, {len(self)})")
        # random.Random rather than NumPy's: a third of the time for a handful of draws.
        return random.Random(f"{self._seed} {self._scenes} {index}")

    def _compose(self, rng: random.Random, index: int) -> tuple[Glyph, ...]:
        if self._scenes in ("train_scans", "test"):
            glyph = self._glyph(rng, self._rows[index], _LARGE)
            if self._split == "test_tilted":
                turned = glyph.angle + math.copysign(_TILT, glyph.angle)
                glyph = dataclasses.replace(glyph, angle=turned)
            return (glyph,)
        kind = rng.random()
        if kind < _SINGLE_LARGE:
            return (self._glyph(rng, self._pick(rng), _LARGE),)
        if kind < _SINGLE_LARGE + _SINGLE_SMALL:
            ninth = (rng.randrange(3) / 3, rng.randrange(3) / 3, 1 / 3, 1 / 3)
            return (self._glyph(rng, self._pick(rng), _SMALL, ninth),)
        return tuple(
            self._glyph(rng, self._pick(rng), _HALF, half)
            for half in rng.choice((_BESIDE, _STACKED))
        )

    def _pick(self, rng: random.Random) -> int:
        return rng.choice(self._rows_of[rng.randrange(10)])

    def _glyph(self, rng, scan: int, sizes, frame=(0.0, 0.0, 1.0, 1.0)) -> Glyph:
        """Places a scan at random within a frame (left, top, width, height)."""
        left, top, width, height = frame
        size = rng.uniform(*sizes)
        return Glyph(
            scan=scan,
            digit=int(self._digits[scan]),
            x=left + width / 2 + (width - size) * rng.uniform(-0.5, 0.5),
            y=top + height / 2 + (height - size) * rng.uniform(-0.5, 0.5),
            size=size,
            angle=rng.uniform(-_MAX_ANGLE, _MAX_ANGLE),
        )

    def _draw(self, glyphs: tuple[Glyph, ...]) -> np.ndarray:
        canvas = functools.reduce(np.maximum, map(self._draw_glyph, glyphs))
        return np.repeat(canvas[:, :, None], 3, axis=2)

    def _draw_glyph(self, glyph: Glyph) -> np.ndarray:
        side = self._image_size
        scale = 8 / (glyph.size * side)  # pixels of the scan per pixel of the canvas
        cos = scale * math.cos(math.radians(glyph.angle))
        sin = scale * math.sin(math.radians(glyph.angle))
        x, y, centre = glyph.x * side, glyph.y * side, _PADDING + 4
        to_scan = (cos, sin, centre - cos * x - sin * y, -sin, cos, centre + sin * x - cos * y)
        paper = self._papers[glyph.scan].transform(
            (side, side), Image.Transform.AFFINE, to_scan, Image.Resampling.BICUBIC
        )
        return np.asarray(paper)

    def _shift(self, image: np.ndarray, index: int) -> np.ndarray:
        if self._split == "test_inverted":
            return 255 - image
        if self._split == "test_blurred":
            blur = ImageFilter.GaussianBlur(_BLUR * self._image_size)
            return np.asarray(Image.fromarray(image).filter(blur))
        if self._split == "test_noisy":
            grain = np.random.default_rng([self._seed, index]).normal(0, _NOISE, image.shape[:2])
            return np.clip(np.round(image + grain[:, :, None]), 0, 255).astype(np.uint8)
        return image


SHIFTS = ("test_inverted", "test_blurred", "test_noisy", "test_tilted")
TWICE = "_two_captions"
SPLITS = ("train", f"train{TWICE}", "train_scans", "test", "test_scenes", *SHIFTS)


def _caption(rng: random.Random, glyphs: tuple[Glyph, ...]) -> str:
    if len(glyphs) == 2:
        a, b = glyphs
        captions = _BESIDE_CAPTIONS if b.x - a.x > b.y - a.y else _STACKED_CAPTIONS
        return rng.choice(captions).format(a=_noun(rng, a), b=_noun(rng, b))
    (glyph,) = glyphs
    noun = _noun(rng, glyph)
    if glyph.size_word == "small":
        return f"{noun} {_PLACES[int(glyph.y * 3)][int(glyph.x * 3)]}"
    return noun


def _noun(rng: random.Random, glyph: Glyph) -> str:
    """ "a seven", "a small handwritten 7", "the digit 7" ..."""
    name = rng.choice((WORDS[glyph.digit], str(glyph.digit)))
    form = rng.randrange(4)
    if form == 0:
        return f"the {rng.choice(('digit', 'number'))} {name}"
    adjectives = [glyph.size_word] if glyph.size_word and form > 1 else []
    adjectives += ["handwritten"] if rng.random() < 0.5 else []
    article = "an" if glyph.digit == 8 and not adjectives else "a"
    return " ".join([article, *adjectives, name])


@functools.cache
def _scans() -> tuple[list[Image.Image], np.ndarray]:
    """The scans as padded 8-bit pictures, and their digits, int [1797]."""
    # Read as `load_digits` reads it, which takes a second to import.
    rows = np.loadtxt(_scans_file(), delimiter=",")
    images, digits = rows[:, :-1].reshape(-1, 8, 8), rows[:, -1].astype(int)
    grey = np.round(images * (255 / 16)).astype(np.uint8)
    padded = np.pad(grey, ((0, 0), (_PADDING, _PADDING), (_PADDING, _PADDING)))
    return [Image.fromarray(scan) for scan in padded], digits


def _scans_file() -> pathlib.Path:
    """Returns the path of the scans: a row each, 64 grey levels and the digit."""
    package = importlib.util.find_spec("sklearn")
    assert package is not None  # it is required
    assert package.origin is not None
    return pathlib.Path(package.origin).parent / "datasets/data/digits.csv.gz"


@functools.cache
def _split_scans() -> tuple[list[int], list[int]]:
    """The rows of the training and of the held-out scans; of these, equally many of each digit."""
    digits = _scans()[1]
    order = np.random.RandomState(0).permutation(len(digits))  # frozen by NumPy's policy
    held_out = [
        int(row) for d in range(10) for row in order[digits[order] == d][:HELD_OUT_PER_DIGIT]
    ]
    train = sorted(set(range(len(digits))) - set(held_out))
    return train, sorted(held_out)
