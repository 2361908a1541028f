"""ViT-B/32: the paper's recipe on 400 million pairs.

In the paper: 63.2 % zero-shot top-1 on ImageNet.

By `python -m clip_jax plan --topology=v5e:16x16`, 256 chips: 3.3 GiB of 15.75 on
each, 50 ms per step, 658,000 pairs/s.

    python main.py --config=configs/vit_b32.py --config.data.source.type=tar
        --config.data.source.path='gs://BUCKET/shards/*.tar' --workdir=gs://BUCKET/runs/vit_b32

    python main.py --config=configs/vit_b32.py:smoke     # a tiny version, seconds on a laptop
"""

from clip_jax.configs import default


def get_config(arg: str = ""):
    config = default.get_config()
    config.model.name = "ViT-B/32"
    config.model.scan_layers = False  # twice as fast on a TPU, for three minutes of compilation
    config.optim.learning_rate = 5e-4
    return default.finish(config, arg)
