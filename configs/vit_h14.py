"""ViT-H/14: open_clip's shapes, the paper's recipe, on 400 million pairs or more.

Larger than the paper's models: 986 million parameters, with exact GELU.

By `python -m clip_jax plan --topology=v5e:16x16 --config.mesh.fsdp=16`, 256 chips:
5.4 GiB of 15.75 on each, 1,134 ms per step, 28,900 pairs/s.

    python main.py --config=configs/vit_h14.py --config.data.source.type=tar
        --config.data.source.path='gs://BUCKET/shards/*.tar' --workdir=gs://BUCKET/runs/vit_h14

    python main.py --config=configs/vit_h14.py:smoke     # a tiny version, seconds on a laptop
"""

from clip_jax.configs import default


def get_config(arg: str = ""):
    config = default.get_config()
    config.model.name = "ViT-H/14"
    config.model.remat = "full"  # else its activations fill a chip at a few dozen pairs
    return default.finish(config, arg)
