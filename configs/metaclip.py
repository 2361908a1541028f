"""MetaCLIP: CLIP's training on data whose curation is published (Xu et al. 2023, arXiv:2309.16671).

Settings from configs/ and src/ of github.com/facebookresearch/MetaCLIP, the first version: 12.8
billion pairs in batches of 32,768. In the paper, zero-shot top-1 on ImageNet in percent, after
training on 400 million pairs or on 2.5 billion:

    model           400 M   2.5 B
    b32   ViT-B/32   65.5    67.6
    b16   ViT-B/16   70.8    72.1
    l14   ViT-L/14   76.2    79.2
    h14   ViT-H/14      -    80.5

`python -m clip_jax data curate` balances pairs as MetaCLIP does. It trained in float16, this in
bfloat16. Shapes, batch and so plans are those of configs/vit_b32.py, vit_b16.py, vit_l14.py and
vit_h14.py. Not run here beyond :smoke.

    python main.py --config=configs/metaclip.py:b16 --config.data.source.type=tar
        --config.data.source.path='gs://BUCKET/shards/*.tar' --workdir=gs://BUCKET/runs/metaclip

    python main.py --config=configs/metaclip.py:b16,smoke   # a tiny version, seconds on a laptop
"""

from clip_jax.configs import datacomp, default, vit_b16, vit_b32, vit_h14, vit_l14

# The config of each model, whose learning rate is the paper's of CLIP.
MODELS = {"b32": vit_b32, "b16": vit_b16, "l14": vit_l14, "h14": vit_h14}


def get_config(arg: str = ""):
    model, rest = default.choose(arg, MODELS)
    config = MODELS[model].get_config()
    datacomp.use_open_clip(config)
    config.duration = "12.8e9 examples"
    if model == "h14":
        config.model.size.activation = "quick_gelu"
        config.optim.learning_rate = 4e-4
    return default.finish(config, rest)
