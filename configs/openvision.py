"""OpenVision: CLIPA's three stages on web captions beside synthetic ones, without short captions.

Li et al. 2025, arXiv:2505.04601. Settings from src/configs/openvision.py and
scripts/project/openvision/train.sh of github.com/UCSC-VLAA/OpenVision, shapes from the
configurations of its released weights. As published, on Recap-DataComp-1B: zero-shot top-1 on
ImageNet in percent, and the side of the images in pixels, of each stage:

    model            side                  top-1
    l14      L/14     84, 224, 336      74.7, 78.5, 78.9
    h14      H/14     84, 224           77.4, 80.4
    so400m   So/14    84, 224, 384      76.2, 79.7, 79.9
    b16      B/16    160, 224, 384      72.4, 73.9, 74.5
    s16      S/16    160, 224, 384      63.5, 65.9, 67.1
    t16      T/16    160, 224, 384      46.9, 49.6, 51.5

Theirs differs:
- A decoder writes the synthetic caption, with twice the weight of the contrastive loss. It sees the
  patches and the whole web caption, and predicts all tokens from queries of their own. There is no
  such decoder here, so loss.captioning is 0.
- Each image has a web caption and a sentence of the synthetic one, and the loss is the mean of the
  contrastive losses of either kind. Here both are the positives of the image in one loss. The
  columns are named by data.source.text_key, such as "txt:1,llava_caption:1".
- Vocabulary and preprocessing are those of CLIPA (configs/clipa.py), with tokens of BERT for begin
  and end. LayerNorm adds 1e-6 to the variance, here 1e-5; the first moments are bfloat16.

The side of the first stage for t16, s16 and b16 is known from the names of the released weights
alone. Not run here beyond :smoke.

    python main.py --config=configs/openvision.py:l14 --config.data.source.type=tar
        --config.data.source.path='gs://BUCKET/shards/*.tar' --workdir=gs://BUCKET/runs/openvision

    python main.py --config=configs/openvision.py:l14,smoke   # a tiny version, seconds on a laptop
"""

from clip_jax.configs import clipa, default

EPOCH = 1_281_167  # examples of ImageNet, in which durations are counted


def _small(width: int) -> dict[str, int]:
    heads = width // 64
    return {
        "embed_dim": width,
        "image_width": width,
        "image_heads": heads,
        "text_width": width,
        "text_heads": heads,
    }


# Name, sides of the stages' images, and fields of model.size.
MODELS = {
    "l14": ("ViT-L/14", (84, 224, 336), {}),
    "h14": ("ViT-H/14", (84, 224), {}),
    "so400m": (
        "ViT-H/14",
        (84, 224, 384),
        {
            "embed_dim": 1152,
            "image_layers": (27,),
            "image_width": 1152,
            "image_mlp": 4304,
            "text_layers": 27,
            "text_width": 1152,
            "text_mlp": 4304,
        },
    ),
    "b16": ("ViT-B/16", (160, 224, 384), {}),
    "s16": ("ViT-B/16", (160, 224, 384), _small(384)),
    "t16": ("ViT-B/16", (160, 224, 384), _small(192)),
}


def get_config(arg: str = ""):
    model, rest = default.choose(arg, MODELS)
    name, sides, size = MODELS[model]
    config = default.get_config()
    config.model.name = name
    config.model.remat = "full"
    clipa.set_towers(config)
    config.model.size.update(
        activation="gelu", text_activation="gelu_tanh", context_length=80, **size
    )
    clipa.set_training(config)
    config.data.captions = 2
    stages = [
        {
            "duration": f"{10_000 * EPOCH} examples",
            "batch_size": 32_768,
            "optim.learning_rate": 1.024e-3,
            "optim.warmup": f"{40 * EPOCH} examples",
        },
        {
            "duration": f"{800 * EPOCH} examples",
            "batch_size": 16_384,
            "optim.learning_rate": 2.56e-5,
            "optim.warmup": f"{20 * EPOCH} examples",
        },
        {
            "duration": f"{200 * EPOCH} examples",
            "batch_size": 8192,
            "optim.learning_rate": 3.2e-6,
            "optim.warmup": "0 steps",
        },
    ]
    stages = [{"model.size.image_size": side, **stage} for side, stage in zip(sides, stages)]
    config.stages = default.stages(*stages)
    return default.finish(config, rest)
