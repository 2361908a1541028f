"""ViT-B/16: the paper's recipe on 400 million pairs.

In the paper: 68.6 % zero-shot top-1 on ImageNet.

By `python -m clip_jax plan --topology=v5e:16x16`, 256 chips: 7.4 GiB of 15.75 on
each, 135 ms per step, 242,000 pairs/s.

    python main.py --config=configs/vit_b16.py --config.data.source.type=tar
        --config.data.source.path='gs://BUCKET/shards/*.tar' --workdir=gs://BUCKET/runs/vit_b16

    python main.py --config=configs/vit_b16.py:smoke     # a tiny version, seconds on a laptop
"""

from clip_jax.configs import default


def get_config(arg: str = ""):
    config = default.get_config()
    config.model.name = "ViT-B/16"
    config.model.scan_layers = False
    config.model.remat = "mlp"  # unrolled so, 135 ms; scanned with "full", 164 ms and 2.3 GiB
    config.optim.learning_rate = 5e-4
    return default.finish(config, arg)
