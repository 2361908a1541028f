"""The nine models of the paper by name (Tables 19 and 20), and how to shrink or stretch them."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from clip_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Size:
    """Shapes of both towers.

    Attributes:
      embed_dim: width of the joint embedding space.
      image_size: pixels along a side of the square input.
      image_layers: (layers,) of a ViT, or the blocks of the four stages of a ResNet.
      image_width: channels of a ViT, or of the first ResNet stage.
      image_heads: attention heads; in a ResNet those of the attention pool.
      patch_size: pixels along a side of a patch; None for a ResNet.
      text_layers, text_width, text_heads: of the text transformer.
      context_length: tokens of a caption, start and end tokens included.
      vocab_size: entries of the tokenizer; the end token is the last one.
    """

    embed_dim: int
    image_size: int
    image_layers: tuple[int, ...]
    image_width: int
    image_heads: int
    patch_size: int | None
    text_width: int
    text_heads: int
    text_layers: int = 12
    context_length: int = 77
    vocab_size: int = 49_408

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> "Size":
        """The inverse of `dataclasses.asdict`, after a trip through JSON."""
        known: dict[str, Any] = {**fields, "image_layers": tuple(fields["image_layers"])}
        return cls(**known)

    @property
    def is_resnet(self) -> bool:
        return self.patch_size is None

    def __str__(self) -> str:
        """The name of a model of the paper, or the shape of another one."""
        for name, size in SIZES.items():
            if size == self:
                return name
        kind = "ResNet" if self.is_resnet else f"ViT/{self.patch_size}"
        layers = "-".join(map(str, self.image_layers))
        text = f"{self.text_layers} layers x {self.text_width}"
        return f"{kind} of {layers} layers x {self.image_width} (text {text})"

    def __post_init__(self):
        """Raises UserError for shapes that no model can have."""
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            least = 2 if field.name == "context_length" else 1  # start and end token
            for number in value if isinstance(value, tuple) else (value,):
                if number is not None and not (isinstance(number, int) and number >= least):
                    raise UserError(
                        f"Size {field.name} is {value!r}: it takes whole numbers, {least} or more."
                    )
        stages = 4 if self.is_resnet else 1
        if len(self.image_layers) != stages:
            raise UserError(
                f"Size image_layers is {self.image_layers}: it takes {stages} number(s), the "
                "blocks of each of the 4 stages of a ResNet, or the layers of a ViT, as in (12,)."
            )
        pixels = self.patch_size or 32  # a ResNet halves its input five times
        width = self.image_width * (32 if self.is_resnet else 1)
        for name, value, unit, divisor in (
            ("image_size", self.image_size, "patch_size or stride", pixels),
            ("width of the image tower", width, "image_heads", self.image_heads),
            ("text_width", self.text_width, "text_heads", self.text_heads),
        ):
            if value % divisor:
                raise UserError(f"The {name} ({value}) must be a multiple of {unit} ({divisor}).")


def _resnet(embed_dim, image_size, layers, width, text_width) -> Size:
    return Size(
        embed_dim=embed_dim,
        image_size=image_size,
        image_layers=layers,
        image_width=width,
        image_heads=width * 32 // 64,
        patch_size=None,
        text_width=text_width,
        text_heads=text_width // 64,
    )


def _vit(embed_dim, image_size, layers, width, patch_size, text_width) -> Size:
    return Size(
        embed_dim=embed_dim,
        image_size=image_size,
        image_layers=(layers,),
        image_width=width,
        image_heads=width // 64,
        patch_size=patch_size,
        text_width=text_width,
        text_heads=text_width // 64,
    )


SIZES: Mapping[str, Size] = {
    "RN50": _resnet(1024, 224, (3, 4, 6, 3), 64, 512),
    "RN101": _resnet(512, 224, (3, 4, 23, 3), 64, 512),
    "RN50x4": _resnet(640, 288, (4, 6, 10, 6), 80, 640),
    "RN50x16": _resnet(768, 384, (6, 8, 18, 8), 96, 768),
    "RN50x64": _resnet(1024, 448, (3, 15, 36, 10), 128, 1024),
    "ViT-B/32": _vit(512, 224, 12, 768, 32, 512),
    "ViT-B/16": _vit(512, 224, 12, 768, 16, 512),
    "ViT-L/14": _vit(768, 224, 24, 1024, 14, 768),
    "ViT-L/14@336px": _vit(768, 336, 24, 1024, 14, 768),
}


def available_models() -> list[str]:
    """Names that `create` and `config.model.name` accept."""
    return list(SIZES)


def get_size(name: str, overrides: Mapping[str, Any] | None = None) -> Size:
    """The named size; fields of `overrides` that are not None replace its own.

    Raises:
      UserError: unknown name or field, or shapes that do not go together.
    """
    if name not in SIZES:
        raise UserError(f"Unknown model {name!r}: choose one of {', '.join(SIZES)}.")
    changed = {k: v for k, v in (overrides or {}).items() if v is not None}
    known = {field.name for field in dataclasses.fields(Size)}
    if unknown := sorted(set(changed) - known):
        raise UserError(f"A model has no {', '.join(unknown)}: it has {', '.join(sorted(known))}.")
    if "image_layers" in changed:
        changed["image_layers"] = tuple(changed["image_layers"])
    return dataclasses.replace(SIZES[name], **changed)
