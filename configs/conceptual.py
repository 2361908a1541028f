"""Conceptual Captions, 3 or 12 million pairs: the baselines of papers on small data.

Zero-shot top-1 on ImageNet in percent, as their authors report it:

    line        model      epochs   batch   result   source
    cc3m        ViT-B/16       40   4,096     17.1   SLIP (Mu et al. 2021, arXiv:2112.12750)
    cc12m       ViT-B/16       35   4,096     36.5   SLIP
    cc3m_rn50   RN50           30   1,024        -   open_clip

SLIP's settings of CLIP are from the README and main.py of github.com/facebookresearch/SLIP. It
gives their decay, 0.5, for YFCC15M, and it is assumed for these two. Its image tower is timm's,
with exact GELU and without a norm before the first block; this is CLIP's. The settings of open_clip
are from the command in its README, on 8 GPUs. Of RN50x4 it reported 22.2 %:
--config.model.name=RN50x4. Not run here beyond :smoke.

    python main.py --config=configs/conceptual.py:cc12m --config.data.source.type=tar
        --config.data.source.path='gs://BUCKET/shards/*.tar' --workdir=gs://BUCKET/runs/cc12m

    python main.py --config=configs/conceptual.py:cc12m,smoke   # a tiny one, seconds on a laptop
"""

from clip_jax.configs import default, rn50, vit_b16

_SLIP = {
    "batch_size": 4096,
    "data.crop": "resized",
    "data.crop_scale": (0.5, 1.0),
    "optim.learning_rate": 5e-4,
    "optim.warmup": "1 epochs",
    "optim.final_fraction": 0.02,  # 1e-5
    "optim.eps": 1e-8,
    "optim.weight_decay": 0.5,
}
_OPEN_CLIP = {
    "batch_size": 1024,
    "data.crop": "resized",
    "optim.learning_rate": 1e-3,
    "optim.warmup": "10000 steps",
    "optim.weight_decay": 0.1,
}

# The config of the model by line, and settings on top of it by dotted name.
LINES = {
    "cc3m": (vit_b16, {**_SLIP, "duration": "40 epochs"}),
    "cc12m": (vit_b16, {**_SLIP, "duration": "35 epochs"}),
    "cc3m_rn50": (rn50, {**_OPEN_CLIP, "duration": "30 epochs"}),
}


def get_config(arg: str = ""):
    line, rest = default.choose(arg, LINES)
    model, settings = LINES[line]
    config = model.get_config()
    config.update_from_flattened_dict(settings)
    return default.finish(config, rest)
