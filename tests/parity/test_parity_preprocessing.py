"""The pixels that transformers makes of a folder's settings, against ours, on unusual pictures."""

import json
import pathlib

import numpy as np
import pytest
import tiny_weights
from PIL import Image

from clip_jax import weights
from clip_jax.data import crops, images
from clip_jax.models.image_model import normalize_images

transformers = pytest.importorskip("transformers")

SIDE = 32
SQUARE = {"height": SIDE, "width": SIDE}
SQUASHED = {"size": SQUARE, "do_center_crop": False}
SETTINGS = [
    {},
    SQUASHED,
    SQUASHED | {"resample": 2},
    SQUASHED | {"resample": 1, "image_processor_type": "SiglipImageProcessor"},
    {"resample": 2},
    {"size": SQUARE, "do_center_crop": True},
    {"do_normalize": False},
    {"do_rescale": False},
    {"do_rescale": False, "do_normalize": False},
    {"rescale_factor": 1 / 127.5, "image_mean": [1.0, 1.0, 1.0], "image_std": [1.0, 0.5, 2.0]},
    {"rescale_factor": 1 / 128, "do_normalize": False},
    {"image_mean": 0.5, "image_std": 0.25},
]


def pictures() -> list[Image.Image]:
    """Of odd sizes whose margins are even; in colour, grey, with alpha, with a palette."""
    rng = np.random.default_rng(0)
    made = []
    for width, height in ((70, 32), (44, 41), (32, 32), (17, 18)):
        rgba = rng.integers(0, 256, (height, width, 4), np.uint8)
        picture = Image.fromarray(rgba)
        made += [picture.convert(mode) for mode in ("RGB", "L", "RGBA", "LA")]
        made.append(picture.convert("RGB").quantize(16))
    return made


@pytest.mark.parametrize("changes", SETTINGS, ids=lambda x: json.dumps(x)[:40])
def test_transformers(changes: dict, tmp_path: pathlib.Path):
    weights.save(tiny_weights.make("vit"), tmp_path / "x", "huggingface")
    file = tmp_path / "x" / "preprocessor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    size = weights.open(tmp_path / "x").size
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "x", backend="pil")
    for number, picture in enumerate(pictures()):
        crop = crops.Crop(size.image_crop, filter=size.image_filter)
        ours = images.pixels(picture, "x", SIDE, crop, None)
        theirs = processor(picture, return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)
        spread = 1 / np.min(size.image_std)
        np.testing.assert_allclose(
            normalize_images(ours, size), theirs, rtol=1e-5, atol=1e-5 * spread, err_msg=str(number)
        )


def test_the_folder_is_written_as_it_was_read(tmp_path: pathlib.Path):
    """Another factor becomes another mean and deviation, with the same result."""
    weights.save(tiny_weights.make("vit"), tmp_path / "x", "huggingface")
    file = tmp_path / "x" / "preprocessor_config.json"
    changes = {"rescale_factor": 1 / 128, "resample": 2} | SQUASHED
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    weights.save(weights.open(tmp_path / "x"), tmp_path / "y", "huggingface")
    first, second = (
        transformers.AutoImageProcessor.from_pretrained(tmp_path / name, backend="pil")
        for name in "xy"
    )
    for picture in pictures():
        theirs, ours = (p(picture, return_tensors="np")["pixel_values"] for p in (first, second))
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)
