"""The embedded digits, checked against scikit-learn's scans and a renderer of its own."""

import re
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from scipy import ndimage
from sklearn.datasets import load_digits

from clip_jax.configs import quickstart
from clip_jax.data import tokenizer
from clip_jax.data.sources.digits import SHIFTS, DigitScenes
from clip_jax.errors import UserError

SCANS = load_digits()
NAMES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
DIGITS = {name: d for d, name in enumerate(NAMES)} | {str(d): d for d in range(10)}
NOUN = rf"(?:an?|the)(?: (small|large))?(?: (?:handwritten|digit|number))? ({'|'.join(DIGITS)})"
# Pattern of a caption -> offset (right, down) of its second digit from its first.
PAIRS = {
    rf"{NOUN} to the left of {NOUN}": (1, 0),
    rf"{NOUN} to the right of {NOUN}": (-1, 0),
    rf"{NOUN} on the left and {NOUN} on the right": (1, 0),
    rf"{NOUN} above {NOUN}": (0, 1),
    rf"{NOUN} below {NOUN}": (0, -1),
    rf"{NOUN} at the top and {NOUN} at the bottom": (0, 1),
}
PLACES = {
    "in the top left corner": (-1, -1),
    "at the top": (0, -1),
    "in the top right corner": (1, -1),
    "on the left": (-1, 0),
    "in the middle": (0, 0),
    "on the right": (1, 0),
    "in the bottom left corner": (-1, 1),
    "at the bottom": (0, 1),
    "in the bottom right corner": (1, 1),
}


def parse(text):
    """Caption -> [(size word or None, digit)], offset of a second digit, place of a single one."""
    for pattern, offset in PAIRS.items():
        if match := re.fullmatch(pattern, text):
            size_a, name_a, size_b, name_b = match.groups()
            return [(size_a, DIGITS[name_a]), (size_b, DIGITS[name_b])], offset, None
    match = re.fullmatch(rf"{NOUN}(?: ({'|'.join(PLACES)}))?", text)
    assert match, f"ungrammatical: {text!r}"
    size, name, place = match.groups()
    return [(size, DIGITS[name])], None, place and PLACES[place]


def ink(image):
    """Bounding box (left, top, right, bottom) and centroid (x, y) of what is drawn."""
    grey = image[..., 0].astype(float)
    rows, columns = np.nonzero(grey > 40)
    centroid = np.average([columns + 0.5, rows + 0.5], axis=1, weights=grey[rows, columns])
    return (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1), centroid


def render(scans, glyph, side):
    """Bilinear drawing of 8 x 8 scans [n, 8, 8] as `glyph` places them -> [n, side, side]."""
    at = (np.arange(side) + 0.5) / side
    x, y = np.meshgrid(at - glyph.x, at - glyph.y)
    angle = np.radians(glyph.angle)
    u = (np.cos(angle) * x + np.sin(angle) * y) * 8 / glyph.size + 3.5 + 2
    v = (np.cos(angle) * y - np.sin(angle) * x) * 8 / glyph.size + 3.5 + 2
    u, v = np.clip(u, 0, 10.999), np.clip(v, 0, 10.999)
    i, j, fv, fu = v.astype(int), u.astype(int), v % 1, u % 1
    paper = np.pad(scans * (255 / 16), ((0, 0), (2, 2), (2, 2)))
    return (
        paper[:, i, j] * (1 - fv) * (1 - fu)
        + paper[:, i + 1, j] * fv * (1 - fu)
        + paper[:, i, j + 1] * (1 - fv) * fu
        + paper[:, i + 1, j + 1] * fv * fu
    )


@pytest.fixture(
    scope="module", params=["train", "train_scans", "test", "test_scenes", "test_tilted"]
)
def source(request):
    return DigitScenes(request.param, 24, seed=0)


def test_what_is_drawn_is_the_scan_named(source):
    """Among all 1,797 scans, the one a glyph names explains the pixels best."""
    for index in range(12):
        glyphs = source.glyphs(index)
        image = source[index].image[..., 0].astype(float)
        for glyph in glyphs:
            half = int(glyph.size * 12)
            x, y = int(glyph.x * 24), int(glyph.y * 24)
            window = np.s_[max(y - half, 0) : y + half + 1, max(x - half, 0) : x + half + 1]
            drawn = render(SCANS.images, glyph, 24)[(slice(None), *window)]
            error = np.square(drawn - image[window]).mean(axis=(1, 2))
            assert np.argmin(error) == glyph.scan
            assert SCANS.target[glyph.scan] == glyph.digit


def test_training_and_held_out_scans_share_no_picture():
    def pictures(split, count):
        scenes = DigitScenes(split, 24, seed=0)
        glyphs = [g for i in range(min(count, len(scenes))) for g in scenes.glyphs(i)]
        return {SCANS.data[glyph.scan].tobytes() for glyph in glyphs}

    train = pictures("train", 20_000)
    test, test_scenes = pictures("test", 1_000), pictures("test_scenes", 1_000)
    assert train == pictures("train_scans", 2_000)
    assert len(train) == 1797 - 360
    assert len(test) == 360
    assert test_scenes <= test
    assert not train & test


def test_the_held_out_scans_do_not_depend_on_the_seed():
    scans = [
        [DigitScenes("test", 24, seed).glyphs(i)[0].scan for i in range(360)] for seed in (0, 1)
    ]
    assert scans[0] == scans[1]


def test_scenes_are_a_pure_function_of_seed_split_and_index(source):
    again = DigitScenes(source[0].key.split()[1], 24, seed=0)
    indices = list(np.random.RandomState(0).permutation(200))
    with ThreadPoolExecutor(4) as pool:
        shuffled = dict(zip(indices, pool.map(again.__getitem__, indices)))
    for index in range(200):
        one, other = source[index], shuffled[index]
        assert (one.text, one.label, one.key) == (other.text, other.label, other.key)
        np.testing.assert_array_equal(one.image, other.image)


def test_seeds_and_splits_differ():
    texts = {
        (split, seed): tuple(DigitScenes(split, 24, seed)[i].text for i in range(50))
        for split in ("train", "test", "test_scenes")
        for seed in (0, 1)
    }
    assert len(set(texts.values())) == 6


def test_captions_are_true(source):
    for index in range(min(len(source), 1000)):
        example, glyphs = source[index], source.glyphs(index)
        nouns, offset, place = parse(example.text)
        assert len(nouns) == len(glyphs)
        if offset in ((-1, 0), (0, -1)):  # "a to the right of b": b stands first
            nouns = nouns[::-1]
        for (size, digit), glyph in zip(nouns, glyphs):
            assert digit == SCANS.target[glyph.scan]
            assert size is None or len(glyphs) == 1
            assert size in (None, "small" if glyph.size < 0.4 else "large")
        if offset is not None:
            beside = offset[0] != 0
            assert_apart(example.image if beside else example.image.swapaxes(0, 1))
            dx, dy = glyphs[1].x - glyphs[0].x, glyphs[1].y - glyphs[0].y
            assert (dx > abs(dy)) if beside else (dy > abs(dx))
        if place is not None:
            _, centroid = ink(example.image)
            off = centroid / 24 - 0.5 - np.array(place) / 3
            assert np.abs(off).max() < 0.15


def test_the_second_caption_is_true_too():
    once, twice = (DigitScenes(split, 24, seed=0) for split in ("train", "train_two_captions"))
    words = 0
    for index in range(300):
        first, second = twice[index].captions.texts
        assert first == once[index].text
        assert twice[index].image.tobytes() == once[index].image.tobytes()
        assert {digit for _, digit in parse(second)[0]} == {digit for _, digit in parse(first)[0]}
        words += first != second
    assert words > 200


def assert_apart(image):
    """Ink in the left half and in the right half."""
    left, right = image[:, :12].astype(int), image[:, 12:].astype(int)
    assert min(left.sum(), right.sum()) > 0.1 * image.astype(int).sum()


def test_small_and_large_differ_in_the_pixels():
    scenes = DigitScenes("train", 24, seed=0)
    heights = {"small": [], "large": []}
    for index in range(2000):
        glyphs, example = scenes.glyphs(index), scenes[index]
        if len(glyphs) == 1:
            box, _ = ink(example.image)
            heights["small" if glyphs[0].size < 0.4 else "large"].append(box[3] - box[1])
    assert max(heights["small"]) < min(heights["large"])


def test_labels_and_balance():
    test = DigitScenes("test", 24, seed=0)
    assert Counter(test[i].label for i in range(len(test))) == dict.fromkeys(range(10), 36)
    for index in range(0, 360, 7):
        assert test[index].label == SCANS.target[test.glyphs(index)[0].scan]
        assert parse(test[index].text)[0][0][1] == test[index].label
    train = DigitScenes("train", 24, seed=0)
    scenes = [train.glyphs(i) for i in range(20_000)]
    shown = Counter(glyph.digit for glyphs in scenes for glyph in glyphs)
    assert max(shown.values()) < 1.1 * min(shown.values())
    pair = next(i for i, glyphs in enumerate(scenes) if len(glyphs) == 2)
    assert train[pair].label == -1


@pytest.mark.parametrize("size", [24, 32, 224])
def test_pixels(size):
    for split in ("train", "test_scenes"):
        scenes = DigitScenes(split, size, seed=0)
        for index in range(40):
            image = scenes[index].image
            assert image.shape == (size, size, 3)
            assert image.dtype == np.uint8
            assert np.ptp(image, axis=2).max() == 0  # no colour to read the answer from
            assert image.max() > 200
            assert np.median(image[[0, 0, -1, -1], [0, -1, 0, -1]]) == 0


def test_brightness_does_not_tell_the_digits_apart():
    """Nearest mean brightness classifies little better than chance would."""
    test = DigitScenes("test", 24, seed=0)
    examples = [test[i] for i in range(len(test))]
    brightness = np.array([e.image.mean() for e in examples])
    labels = np.array([e.label for e in examples])
    means = np.array([brightness[labels == d].mean() for d in range(10)])
    guess = np.abs(brightness[:, None] - means).argmin(axis=1)
    assert (guess == labels).mean() < 0.25


def test_retrieval_has_few_captions_twice():
    scenes = DigitScenes("test_scenes", 24, seed=0)
    assert len(scenes) == 1000
    texts = Counter(scenes[i].text for i in range(len(scenes)))
    positives = sum(count**2 for count in texts.values()) / len(scenes)  # mean over captions
    assert positives < 5  # chance of recall@1 stays under half a percent


def test_training_scans_come_once_each():
    scans = DigitScenes("train_scans", 24, seed=0)
    glyphs = [glyph for i in range(len(scans)) for glyph in scans.glyphs(i)]
    assert len({glyph.scan for glyph in glyphs}) == len(glyphs) == len(scans) == 1437
    assert min(glyph.size for glyph in glyphs) >= 0.85
    for index in range(0, 1437, 31):
        assert scans[index].labels == (SCANS.target[glyphs[index].scan],)


@pytest.mark.parametrize("side", [24, 32])
def test_shifts_of_the_test_images(side):
    """Each against the plain image, changed here by other means."""
    plain, *shifts = (
        [DigitScenes(split, side, seed=0)[i] for i in range(60)] for split in ("test", *SHIFTS)
    )
    assert {len(DigitScenes(split, side, seed=0)) for split in SHIFTS} == {360}
    inverted, blurred, noisy, tilted = (np.stack([e.image for e in each]) for each in shifts)
    images = np.stack([example.image for example in plain])
    for each in shifts:
        assert [(e.labels, e.text) for e in each] == [(e.labels, e.text) for e in plain]
    np.testing.assert_array_equal(inverted.astype(int), 255 - images.astype(int))
    sigma = (0, 0.08 * side, 0.08 * side, 0)
    soft = ndimage.gaussian_filter(images.astype(float), sigma, mode="nearest")
    assert np.abs(blurred - soft).mean() < 1.5  # Pillow approximates by boxes
    middle = (images > 100) & (images < 150)  # so that little is clipped
    grain = (noisy.astype(float) - images)[middle]
    assert abs(grain.mean()) < 3
    assert grain.std() == pytest.approx(60, rel=0.05)
    assert len({image.tobytes() for image in noisy - images}) == 60  # another one each time
    assert np.ptp(noisy, axis=3).max() == 0
    turned = DigitScenes("test_tilted", side, seed=0)
    upright = DigitScenes("test", side, seed=0)
    for index in range(60):
        (glyph,), (before,) = turned.glyphs(index), upright.glyphs(index)
        assert (glyph.scan, glyph.x, glyph.size) == (before.scan, before.x, before.size)
        assert abs(glyph.angle) == pytest.approx(abs(before.angle) + 25)
    assert not np.array_equal(tilted, images)


def test_prompts_are_captions_seen_in_training():
    scenes = DigitScenes("train", 24, seed=0)
    captions = {scenes[i].text for i in range(10_000)}
    for name, digit in DIGITS.items():
        assert name in scenes.class_names[digit].split("|")
        assert {template.format(name) for template in scenes.templates} <= captions


def test_bad_arguments():
    with pytest.raises(
        UserError, match="train, train_two_captions, train_scans, test, test_scenes"
    ):
        DigitScenes("val", 24, seed=0)
    for index in (-1, 360):
        with pytest.raises(IndexError):
            DigitScenes("test", 24, seed=0)[index]


def test_quickstart_config_fits_the_captions():
    config = quickstart.get_config()
    encode = tokenizer.create(config.tokenizer, config.model.size.context_length).encode
    scenes = DigitScenes("train", config.model.size.image_size, config.seed)
    assert not any(encode(scenes[i].text)[1] for i in range(3000))


def test_quickstart_config_arguments():
    assert quickstart.get_config("smoke").duration != quickstart.get_config().duration
    with pytest.raises(UserError, match="smoke"):
        quickstart.get_config("large")
