"""Models by name, the nine of the paper (Tables 19 and 20) and larger ones; their variations."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from clip_jax import choices
from clip_jax.errors import UserError
from clip_jax.models import size_checks

# Mean and deviation of each RGB channel, pixels in [0, 1], of the models of OpenAI and open_clip.
IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)
IMAGE_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclasses.dataclass(frozen=True)
class Size:
    """Shapes and forms of both towers; the forms default to those of the paper.

    Attributes:
      embed_dim: width of the joint embedding space.
      image_size: side of the square input in pixels.
      image_layers: (layers,) of a ViT, or the blocks of the four stages of a ResNet.
      image_width: channels of a ViT, or of the first ResNet stage.
      image_heads: attention heads; in a ResNet those of the attention pool.
      patch_size: side of a patch in pixels; None for a ResNet.
      text_width: channels of the text transformer, which writes the captions where the objective is
        "captioning".
      text_heads: its attention heads.
      text_layers: its blocks; 0 for a bag of words, with text_pool="bag".
      context_length: tokens of a caption, start and end tokens included.
      vocab_size: entries of the tokenizer; its end token is the last one. For a SentencePiece
        tokenizer: its pieces plus 2.
      image_mlp: hidden units of an image block; 0 becomes four times the width, with a gate two
        thirds of that, up to a multiple of 8 (and stays 0 for a ResNet, which has no such blocks).
      text_mlp: hidden units of a text block; 0 becomes the same of its width.
      activation: activation of those units: "quick_gelu" (OpenAI), "gelu" (exact; open_clip),
        "gelu_tanh" (its approximation; SigLIP) or "swiglu" (gated by a SiLU; EVA-02, DINOv2 g).
      text_activation: activation of the text tower; None: the same.
      image_pool: pooling of a ViT: "class", a token of its own, projected; "avg", the mean of the
        patches, projected; or "map", an attention head with a learned probe over all tokens,
        projected only where embed_dim is not image_width.
      norm_after_pool: whether a ViT with image_pool "avg" normalises the mean (CLIPA), not each
        patch before it.
      image_positions: positions of a ViT: "learned"; or "sincos", fixed, the sine and cosine of
        column and row (MoCo v3), 0 for tokens that are no patches.
      image_rope: whether the blocks of a ViT rotate queries and keys by the column and row of their
        patch (axial RoPE), besides adding its position.
      image_layer_scale: initial multiplier of each branch of an image block, learned by channel
        (layer scale); None: there is none.
      image_qk_norm: whether the blocks of a ViT normalise queries and keys in each head.
      text_qk_norm: whether those of the text tower do.
      text_decoder_layers: layers that attend to the image and write captions beside the
        contrastive loss (loss.captioning); 0: none.
      text_decoder_shared: whether these are part of the text tower, evenly spaced, which runs a
        second time to write (MaMMUT); or else follow it (CoCa).
      views_mlp: hidden units of the MLP that embeds views for loss.views; 0: there is none.
      views_embed: width of what it returns.
      map_heads: attention heads of the pooling "map"; None: image_heads.
      map_mlp: hidden units of that pooling; None: image_mlp.
      map_projection: whether that pooling is projected to embed_dim of the same width too.
      image_projection_bias: whether the projection of a ViT has a bias.
      image_registers: learned tokens before the patches of a ViT that its blocks see and only the
        pooling "map" reads, such as the class token of CLIPA and PE; they have positions.
      pre_norm: whether a ViT normalises the embedded patches before the first block.
      patch_bias: whether a ViT adds a bias to the embedded patches.
      text_causal: whether a token sees only those before it.
      text_pool: token that stands for the caption: "end", the end token (paper); "first" or "last",
        that of the place. "avg": the mean of all places, padding included; "map": an attention
        head with a learned probe over them. "bag": the mean of the caption's embedded words
        instead, without positions or layers.
      end_token: id of the end token that text_pool "end" reads, the first in a row; None: the
        largest id of the row, as in the paper's code.
      text_projection: whether the text tower ends in a projection; without, its width is embed_dim.
      text_projection_bias: whether that projection has a bias.
      norm: normalisation in both transformers: "layer", LayerNorm; or "rms", RMSNorm.
      norm_eps: its addition to the variance.
      logit_bias: whether the similarities have a learned bias, as the sigmoid loss needs.
      image_mean: subtracted from pixels in [0, 1], per RGB channel.
      image_std: divisor of the result, per RGB channel.
      image_crop: square crop where nothing is drawn at random: "center", the middle; or "none", the
        whole picture squashed. See `data.crops.Crop`.
      image_filter: filter of that resize, antialiased: "bilinear", "bicubic" or "lanczos".
      resnet_activation: activation of a ResNet's convolutions: "relu" (paper) or "gelu" (exact; the
        paper's detector of near-duplicates).
      resnet_norm: normalisation of a ResNet: "batch" (paper), BatchNorm; or "weight", kernels of
        learned norm, which do not depend on the rest of the batch (its detector).
      objective: training objective, which decides on the modules beside the image tower; see
        `models.MODULES`.
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
    image_mlp: int = 0
    text_mlp: int = 0
    activation: str = "quick_gelu"
    image_pool: str = "class"
    pre_norm: bool = True
    patch_bias: bool = False
    text_causal: bool = True
    text_pool: str = "end"
    text_projection_bias: bool = False
    norm_eps: float = 1e-5
    logit_bias: bool = False
    image_mean: tuple[float, ...] = IMAGE_MEAN
    image_std: tuple[float, ...] = IMAGE_STD
    image_crop: str = "center"
    image_filter: str = "bicubic"
    resnet_activation: str = "relu"
    resnet_norm: str = "batch"
    objective: str = "contrastive"
    end_token: int | None = None
    norm_after_pool: bool = False
    image_positions: str = "learned"
    image_registers: int = 0
    text_projection: bool = True
    text_activation: str | None = None
    image_rope: bool = False
    map_heads: int | None = None
    map_mlp: int | None = None
    map_projection: bool = False
    image_projection_bias: bool = False
    image_layer_scale: float | None = None
    image_qk_norm: bool = False
    text_qk_norm: bool = False
    norm: str = "layer"
    text_decoder_layers: int = 0
    text_decoder_shared: bool = False
    views_mlp: int = 0
    views_embed: int = 0

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> "Size":
        """Inverts `dataclasses.asdict` and JSON; old dicts may lack fields."""
        known: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()
        }
        return cls(**known)

    @property
    def is_resnet(self) -> bool:
        """True for a ResNet, False for a ViT."""
        return self.patch_size is None

    @property
    def feature_width(self) -> int:
        """The width of the features for linear probes; see `ImageModel.encode_with_features`."""
        return self.embed_dim if self.is_resnet else self.image_width

    @property
    def image_projection(self) -> bool:
        """True where a ViT projects its pooled features."""
        widths_differ = self.embed_dim != self.image_width
        return self.image_pool != "map" or self.map_projection or widths_differ

    @property
    def has_class_token(self) -> bool:
        """True where a ViT has a token of its own for its pooling."""
        return not self.is_resnet and self.image_pool == "class"

    @property
    def patches_per_side(self) -> int:
        """The patches along a side of a ViT's input; an edge that fills none is left out."""
        return self.image_size // (self.patch_size or self.image_size)

    @property
    def image_tokens(self) -> int:
        """The tokens of a ViT: its patches, and those before them."""
        return self.patches_per_side**2 + self.has_class_token + self.image_registers

    @property
    def is_known_elsewhere(self) -> bool:
        """True where other projects have models of this form: CLIP and SigLIP."""
        forms = (self.objective, self.resnet_activation, self.resnet_norm, self.norm)
        known = forms == ("contrastive", "relu", "batch", "layer")
        known = known and self.text_pool not in ("bag", "map")
        known = known and not self.text_decoder_layers and not self.views_mlp
        return known and not {self.activation, self.text_activation} & {*choices.GATED}

    @property
    def activations(self) -> str:
        """The activation of both towers, or both, in words."""
        text = f" (images), {self.text_activation} (captions)" if self.text_activation else ""
        return f"{self.activation}{text}"

    @property
    def has_text_blocks(self) -> bool:
        """True where a transformer reads or writes captions."""
        return self.objective in ("contrastive", "captioning") and self.text_layers > 0

    def __str__(self) -> str:
        """Returns the name of a known model, whatever its loss, or the shape of another one."""
        for name, size in SIZES.items():
            trained: dict[str, Any] = {
                "logit_bias": size.logit_bias,
                "objective": size.objective,
                "text_decoder_layers": 0,
                "text_decoder_shared": False,
                "views_mlp": 0,
                "views_embed": 0,
            }
            if size == dataclasses.replace(self, **trained):
                objective = self.objective if self.objective != "contrastive" else ""
                beside = ", ".join(filter(None, (objective, *self._heads)))
                return f"{name} ({beside})" if beside else name
        kind = "ResNet" if self.is_resnet else f"ViT/{self.patch_size}"
        layers = "-".join(map(str, self.image_layers))
        return f"{kind} of {layers} layers x {self.image_width} ({self._beside})"

    @property
    def preprocessing(self) -> str:
        """The preparation of pictures in words."""
        mean, std = (
            " ".join(f"{x:.4g}" for x in channels) for channels in (self.image_mean, self.image_std)
        )
        side, filter_ = self.image_size, self.image_filter
        whole = f"squashed to {side} x {side} pixels ({filter_})"
        middle = f"shorter side to {side} pixels ({filter_}), middle square"
        crop = middle if self.image_crop == "center" else whole
        if not self.is_resnet and (edge := side % (self.patch_size or 1)):
            crop += f" without the right and lower {edge}, which fill no patch"
        return f"{crop}, mean {mean}, std {std}"

    @property
    def _beside(self) -> str:
        """A description of the modules beside the image tower."""
        other = "text" if self.objective == "contrastive" else self.objective
        if self.has_text_blocks:
            other = f"{other} {self.text_layers} layers x {self.text_width}"
        elif other == "text":
            other = f"text a bag of words x {self.text_width}"
        return ", ".join((other, *self._heads))

    @property
    def _heads(self) -> list[str]:
        """Descriptions of what further losses add to a contrastive model."""
        shared = " in the text tower" if self.text_decoder_shared else ""
        decoder, views = self.text_decoder_layers, self.views_mlp
        heads = [f"decoder {decoder} layers{shared}"] if decoder else []
        return heads + ([f"view head {views} x {self.views_embed}"] if views else [])

    def __post_init__(self):
        """Fills in derived fields; raises UserError for shapes that no model can have."""
        for field in dataclasses.fields(self):
            size_checks.check_field(field, getattr(self, field.name))
        if not self.is_resnet:
            self._default("image_mlp", _hidden(self.image_width, self.activation))
        text_activation = self.text_activation or self.activation
        self._default("text_mlp", _hidden(self.text_width, text_activation))
        for name, same in (
            ("text_activation", self.activation),
            ("map_heads", self.image_heads),
            ("map_mlp", self.image_mlp),
        ):  # equal models have equal sizes
            if getattr(self, name) == same:
                object.__setattr__(self, name, None)
        size_checks.check_shapes(self)

    def _default(self, name: str, value: int) -> None:
        if getattr(self, name) == 0:
            object.__setattr__(self, name, value)  # frozen for everyone else


def _hidden(width: int, activation: str) -> int:
    """Returns the usual hidden units: with a gate, those of as many weights."""
    return -(-width // 3) * 8 if activation in choices.GATED else 4 * width


# Fields that config.model.size cannot override: they go with the weights that have them.
_OF_WEIGHTS = ("patch_bias", "text_projection_bias", "norm_eps", "logit_bias", "image_mean")
_OF_WEIGHTS += ("image_std", "image_crop", "image_filter", "objective")
# Those that it can, for models that have no name: shapes, and the forms that a run may choose.
CONFIGURABLE = tuple(
    field.name for field in dataclasses.fields(Size) if field.name not in _OF_WEIGHTS
)


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


def _large_vit(layers, width, mlp) -> Size:
    """Returns the size of one of open_clip's larger models, all with the same text tower."""
    return Size(
        embed_dim=1024,
        image_size=224,
        image_layers=(layers,),
        image_width=width,
        image_heads=16,
        image_mlp=mlp,
        patch_size=14,
        text_layers=24,
        text_width=1024,
        text_heads=16,
        activation="gelu",
    )


def _siglip(layers, width, mlp, heads, patch_size, context_length) -> Size:
    """Returns the size of a SigLIP, whose towers have the same shape (Zhai et al. 2023)."""
    return Size(
        embed_dim=width,
        image_size=224,
        image_layers=(layers,),
        image_width=width,
        image_heads=heads,
        image_mlp=mlp,
        patch_size=patch_size,
        text_layers=layers,
        text_width=width,
        text_heads=heads,
        text_mlp=mlp,
        context_length=context_length,
        vocab_size=32_000,
        activation="gelu_tanh",
        image_pool="map",
        pre_norm=False,
        patch_bias=True,
        text_causal=False,
        text_pool="last",
        text_projection_bias=True,
        norm_eps=1e-6,
        logit_bias=True,
        image_mean=(0.5, 0.5, 0.5),
        image_std=(0.5, 0.5, 0.5),
        image_crop="none",
    )


# The changes of CLIPA (Li et al. 2023) to the paper's models, as open_clip has them; in BERT's
# vocabulary.
_CLIPA: Mapping[str, Any] = {
    "activation": "gelu",
    "pre_norm": False,
    "image_pool": "avg",
    "norm_after_pool": True,
    "image_registers": 1,
    "text_causal": False,
    "text_pool": "last",
    "context_length": 32,
    "vocab_size": 32_000,
    "image_mean": (0.485, 0.456, 0.406),
    "image_std": (0.229, 0.224, 0.225),
    "image_crop": "none",
    "image_filter": "bilinear",
}


def _pe(layers, width, image_size, patch_size) -> Size:
    """Returns the size of a PE-Core, the Perception Encoder (Bolya et al. 2025)."""
    return dataclasses.replace(
        _large_vit(layers, width, 4 * width),
        image_size=image_size,
        image_heads=width // 64,
        patch_size=patch_size,
        image_rope=True,
        image_registers=1,
        image_pool="map",
        map_heads=8,
        map_projection=True,
        context_length=32,
        image_mean=(0.5, 0.5, 0.5),
        image_std=(0.5, 0.5, 0.5),
        image_crop="none",
        image_filter="bilinear",
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
    "ViT-H/14": _large_vit(32, 1280, 5120),
    "ViT-g/14": _large_vit(40, 1408, 6144),
    "SigLIP-B/16": _siglip(12, 768, 3072, 12, 16, 64),
    "SigLIP-So400m/14": _siglip(27, 1152, 4304, 16, 14, 16),
    # In Gemma's vocabulary.
    "SigLIP2-B/16": dataclasses.replace(_siglip(12, 768, 3072, 12, 16, 64), vocab_size=256_000),
    # In XLM-V's vocabulary, whose end token is the id 2.
    "MetaCLIP2-H/14": dataclasses.replace(
        _large_vit(32, 1280, 5120), activation="quick_gelu", vocab_size=901_629, end_token=2
    ),
    "CLIPA-L/14": dataclasses.replace(_vit(768, 224, 24, 1024, 14, 768), **_CLIPA),
    "CLIPA-H/14": dataclasses.replace(_large_vit(32, 1280, 5120), **_CLIPA),
    "PE-Core-B/16": _pe(12, 768, 224, 16),
    "PE-Core-L/14@336px": _pe(24, 1024, 336, 14),
}


def configurable() -> dict[str, type]:
    """Returns the fields of `CONFIGURABLE` with their types, for config.model.size."""
    plain: dict[Any, type] = {kind: kind for kind in (str, bool, int)}
    plain |= {kind | None: kind for kind in (str, int, float)}
    plain[tuple[int, ...]] = tuple
    types = {field.name: field.type for field in dataclasses.fields(Size)}
    return {name: plain[types[name]] for name in CONFIGURABLE}


def available_models() -> list[str]:
    """Returns the names that `create` and `config.model.name` accept."""
    return list(SIZES)


def get_size(name: str, overrides: Mapping[str, Any] | None = None) -> Size:
    """Returns the named size; fields of `overrides` that are not None replace its own.

    Raises:
      UserError: unknown name or field, or shapes that do not go together.
    """
    if name not in SIZES:
        raise UserError(f"Unknown model {name!r}: choose one of {', '.join(SIZES)}.")
    changed = {k: v for k, v in (overrides or {}).items() if v is not None}
    known = {field.name for field in dataclasses.fields(Size)}
    if unknown := sorted(set(changed) - known):
        raise UserError(f"A model has no {', '.join(unknown)}: it has {', '.join(sorted(known))}.")
    form = changed.get("activation")
    forms = {"image": form, "text": changed.get("text_activation", form)}
    for tower in forms:  # another width, or a gate, goes with its own number of hidden units
        if f"{tower}_width" in changed or forms[tower] in choices.GATED:
            changed.setdefault(f"{tower}_mlp", 0)
    for field in ("image_layers", "image_mean", "image_std"):
        if field in changed:
            changed[field] = tuple(changed[field])
    return dataclasses.replace(SIZES[name], **changed)
