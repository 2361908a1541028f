"""openMaMMUT: captioning beside the contrastive loss, both by one text tower that runs twice.

Nezhurina et al. 2025, arXiv:2506.04598, after MaMMUT (Kuo et al. 2023, arXiv:2303.16839). Shapes
from mammut_ViT-L-14.json and mammut_ViT-B-32.json of github.com/LAION-AI/open_clip_mammut; pairs
seen, batch, rate, warm-up and b2 from the names and the README of
github.com/LAION-AI/scaling-laws-for-comparison; decay and clipping from the example of the former,
the weight 2 of captioning from its defaults. Zero-shot top-1 on ImageNet in percent, as published:

    line  model      data            batch    rate    ImageNet
    l14   ViT-L/14   DataComp-1.4B   180,224  2.5e-3  80.34
    b32   ViT-B/32   DFN             180,224  2.5e-3

The rate and warm-up of L/14 are published in a picture alone: those here are of the B/32 that the
study names as its best, with the same batch and as many pairs. Their mean of the image tokens
counts the class token too; here it is that of the patches. Not run here beyond :smoke.

By `python -m clip_jax plan --topology=v5e:16x16` l14 needs 23.7 GiB of the 15.75 of each of 256
chips, and about 12.7 with --config.accum_steps=8.

    python main.py --config=configs/openmammut.py:l14 --config.data.source.type=tar
        --config.data.source.path='gs://BUCKET/shards/*.tar' --workdir=gs://BUCKET/runs/openmammut

    python main.py --config=configs/openmammut.py:l14,smoke   # a tiny version, seconds on a laptop
"""

from clip_jax.configs import datacomp, default, vit_b32, vit_l14

MODELS = {"l14": vit_l14, "b32": vit_b32}


def get_config(arg: str = ""):
    model, rest = default.choose(arg, MODELS)
    config = MODELS[model].get_config()
    datacomp.use_open_clip(config)
    config.model.size.update(
        activation="gelu",
        image_pool="avg",
        image_registers=1,  # the class token
        norm_after_pool=True,
        text_causal=False,
        text_pool="avg",
        text_projection=False,
        text_decoder_layers=6,  # every second one
        text_decoder_shared=True,
    )
    config.model.remat = "full"  # 704 pairs on each of 256 chips
    config.model.scan_layers = True
    config.model.packing.length = 0  # every token sees all others, padding too
    config.loss.captioning = 2.0
    config.duration = "12.8e9 examples"
    config.batch_size = 180_224
    config.optim.learning_rate = 2.5e-3
    config.optim.warmup = "6000 steps"
    config.optim.b2 = 0.95
    config.optim.grad_clip_norm = 1.0
    return default.finish(config, rest)
