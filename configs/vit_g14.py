"""ViT-g/14: open_clip's shapes, the paper's recipe, on 400 million pairs or more.

Larger than the paper's models: 1,367 million parameters, with exact GELU.

By `python -m clip_jax plan --topology=v5e:16x16 --config.mesh.fsdp=16`, 256 chips:
7.0 GiB of 15.75 on each, 1,707 ms per step, 19,200 pairs/s.

    python main.py --config=configs/vit_g14.py --config.data.source.type=tar
        --config.data.source.path='gs://BUCKET/shards/*.tar' --workdir=gs://BUCKET/runs/vit_g14

    python main.py --config=configs/vit_g14.py:smoke     # a tiny version, seconds on a laptop
"""

from clip_jax.configs import default


def get_config(arg: str = ""):
    config = default.get_config()
    config.model.name = "ViT-g/14"
    config.model.remat = "full"  # else its activations fill a chip at a few dozen pairs
    return default.finish(config, arg)
