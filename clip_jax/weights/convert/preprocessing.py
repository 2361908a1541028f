"""The preprocessing of images that other projects' files describe: followed exactly, or refused.

transformers computes (pixels * factor - mean) / deviation, where each part can be switched off. Our
models take pixels in [0, 1], so another factor becomes another mean and deviation.
"""

from collections.abc import Mapping
from typing import Any

from clip_jax import models
from clip_jax.errors import UserError
from clip_jax.models.sizes import IMAGE_MEAN, IMAGE_STD

_FILTERS = {1: "lanczos", 2: "bilinear", 3: "bicubic"}  # Pillow's numbers
_SCALE = 1 / 255
# Defaults of the image processors of transformers, which a file may leave out.
_STEPS = {"do_resize": True, "do_rescale": True, "do_normalize": True, "do_convert_rgb": True}
_STEPS |= {"rescale_factor": _SCALE, "resample": 3, "do_pad": False}
_PROCESSORS: dict[str, dict[str, Any]] = {
    "clip": _STEPS
    | {"size": {"shortest_edge": 224}, "crop_size": 224, "do_center_crop": True}
    | {"image_mean": IMAGE_MEAN, "image_std": IMAGE_STD},
    "siglip": _STEPS
    | {"size": {"height": 224, "width": 224}, "do_center_crop": False}
    | {"image_mean": (0.5, 0.5, 0.5), "image_std": (0.5, 0.5, 0.5)},
}
_KINDS = {"CLIP": "clip", "Siglip": "siglip"}
_REMEDY = "correct the file if it is wrong, or use the model in the project that made it"


def from_transformers(
    processor: Mapping[str, Any], kind: str, image_size: int, source: object
) -> dict[str, Any]:
    """Returns the fields of a size that a preprocessor_config.json of transformers describes.

    Args:
      processor: content of the file; {}: there is none, and the processor has its defaults.
      kind: processor that a file without its name is of, "clip" or "siglip".
      image_size: pixels along a side that the model takes.
      source: file, for messages.

    Raises:
      UserError: our models cannot be fed like that, or the file contradicts the model.
    """
    given = {name: value for name, value in processor.items() if value is not None}
    named = given.get("image_processor_type") or given.get("feature_extractor_type")
    if named is not None:
        stem = named.removesuffix("Fast").removesuffix("Pil")
        stem = stem.removesuffix("ImageProcessor").removesuffix("FeatureExtractor")
        if stem not in _KINDS:
            raise UserError(
                f"{source} prepares pictures by transformers' {named}; what is known here are "
                f"{' and '.join(f'{name}ImageProcessor' for name in _KINDS)}: {_REMEDY}."
            )
        kind = _KINDS[stem]
    if not processor:  # the model's own resolution; anything else is at its default
        side = {"height": image_size, "width": image_size}
        own = {"shortest_edge": image_size} if kind == "clip" else side
        given = {"size": own, "crop_size": image_size}
    settings = {**_PROCESSORS[kind], **given}
    for name, wanted in (("do_resize", True), ("do_convert_rgb", True), ("do_pad", False)):
        if settings[name] is not wanted:
            raise UserError(
                f"{source} has {name}={settings[name]!r}; our models are fed with {wanted}: "
                f"{_REMEDY}."
            )
    if settings["resample"] not in _FILTERS:
        raise UserError(
            f"{source} resizes pictures with Pillow's filter {settings['resample']!r} (resample); "
            f"ours are resized with {', '.join(f'{n} ({f})' for n, f in _FILTERS.items())}."
        )
    mean, std = _normalisation(settings, source)
    return {
        "image_mean": mean,
        "image_std": std,
        "image_crop": _crop(settings, image_size, source),
        "image_filter": _FILTERS[settings["resample"]],
    }


def _crop(settings: Mapping[str, Any], image_size: int, source: object) -> str:
    """Returns the field image_crop; UserError unless its result is image_size x image_size."""
    crops, size = settings["do_center_crop"], settings["size"]
    if isinstance(size, int):  # of early files; CLIP's is the shorter side
        size = {"shortest_edge": size} if crops else {"height": size, "width": size}
    square = {"height": image_size, "width": image_size}
    window = settings.get("crop_size")
    window = {"height": window, "width": window} if isinstance(window, int) else window
    if crops and window != square:
        actual = f"crop_size {window}"
    elif dict(size) == square:
        return "none"  # the middle of a square of that size is all of it
    elif crops and dict(size) == {"shortest_edge": image_size}:
        return "center"
    else:
        actual = f"size {dict(size)}, {'then the middle square' if crops else 'without a crop'}"
    raise UserError(
        f"{source} prepares pictures with {actual}, for a model with the image_size {image_size}; "
        f"ours are resized by the shorter side to {image_size} and cropped to the middle, or "
        f"squashed to {image_size} x {image_size}: {_REMEDY}."
    )


def _normalisation(
    settings: Mapping[str, Any], source: object
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Returns mean and deviation for pixels in [0, 1]."""
    factor = settings["rescale_factor"] if settings["do_rescale"] else 1.0
    mean, std = settings["image_mean"], settings["image_std"]
    if not settings["do_normalize"]:
        mean, std = 0.0, 1.0
    if not isinstance(factor, (int, float)) or not factor > 0:
        raise UserError(f"{source} has rescale_factor={factor!r}; it is a number above 0.")
    mean, std = _colour("image_mean", mean, source), _colour("image_std", std, source)
    if abs(factor / _SCALE - 1) < 1e-6:
        return mean, std
    mean, std = (tuple(part * _SCALE / factor for part in channels) for channels in (mean, std))
    return mean, std


def _colour(name: str, value: Any, source: object) -> tuple[float, ...]:
    """Returns three numbers, of which a file may give one for all channels."""
    channels = (value,) * 3 if isinstance(value, (int, float)) else value
    if not (
        isinstance(channels, (list, tuple))
        and len(channels) == 3
        and all(isinstance(part, (int, float)) for part in channels)
        and (name.endswith("mean") or min(channels) > 0)
    ):
        raise UserError(
            f"{source} has {name}={value!r}: it is three numbers, one for each RGB channel."
        )
    return tuple(float(part) for part in channels)


def to_transformers(size: models.Size) -> dict[str, Any]:
    """Returns the preprocessor_config.json of a size."""
    square = {"height": size.image_size, "width": size.image_size}
    steps = {name: _STEPS[name] for name in _STEPS if name != "do_pad"}
    filters = {name: number for number, name in _FILTERS.items()}
    if size.image_crop == "none":
        place = {"size": square, "do_center_crop": False}
    else:
        place = {"size": {"shortest_edge": size.image_size}, "crop_size": square}
        place |= {"do_center_crop": True}
    return {
        "image_processor_type": f"{'Siglip' if size.image_pool == 'map' else 'CLIP'}ImageProcessor",
        **place,
        **steps,
        "resample": filters[size.image_filter],
        "image_mean": list(size.image_mean),
        "image_std": list(size.image_std),
    }


# ---- open_clip ---------------------------------------------------------------------------------

_RESIZES = {"shortest": "center", "squash": "none"}  # resize_mode: image_crop
_INTERPOLATIONS = ("bilinear", "bicubic")
_IGNORED = ("size", "fill_color")  # the model's own resolution counts; no picture is padded


def from_open_clip(settings: Mapping[str, Any], source: object) -> dict[str, Any]:
    """Returns the fields of a size that preprocess_cfg of open_clip describes.

    Raises:
      UserError: our models cannot be fed like that.
    """
    defaults: dict[str, Any] = {"mean": IMAGE_MEAN, "std": IMAGE_STD, "mode": "RGB"}
    defaults |= {"resize_mode": "shortest", "interpolation": "bicubic"}
    given = {name: value for name, value in settings.items() if value is not None}
    merged = {**defaults, **given}
    for name, takes in (
        ("mode", ("RGB",)),
        ("resize_mode", tuple(_RESIZES)),
        ("interpolation", _INTERPOLATIONS),
    ):
        if merged[name] not in takes:
            raise UserError(
                f"{source} prepares pictures with {name} {merged[name]!r} in preprocess_cfg; ours "
                f"take {' or '.join(takes)}: {_REMEDY}."
            )
    if unknown := sorted(set(given) - set(defaults) - set(_IGNORED)):
        raise UserError(
            f"{source} has the setting preprocess_cfg.{unknown[0]} = {given[unknown[0]]!r}, which "
            f"our models do not have: {_REMEDY}."
        )
    return {
        "image_mean": _colour("mean", merged["mean"], source),
        "image_std": _colour("std", merged["std"], source),
        "image_crop": _RESIZES[merged["resize_mode"]],
        "image_filter": merged["interpolation"],
    }


def to_open_clip(size: models.Size) -> dict[str, Any]:
    """Returns the preprocess_cfg of a size."""
    return {
        "mean": list(size.image_mean),
        "std": list(size.image_std),
        "interpolation": size.image_filter,
        "resize_mode": next(mode for mode, crop in _RESIZES.items() if crop == size.image_crop),
    }
