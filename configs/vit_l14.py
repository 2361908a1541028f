"""ViT-L/14: the paper's recipe on 400 million pairs.

In the paper: 75.3 % zero-shot top-1 on ImageNet.
The paper trained it in 12 days on 256 V100.

By `python -m clip_jax plan --topology=v5e:16x16`, 256 chips: 14.7 GiB of 15.75 on
each, 503 ms per step, 65,200 pairs/s.

    python main.py --config=configs/vit_l14.py --config.data.source.type=tar
        --config.data.source.path='gs://BUCKET/shards/*.tar' --workdir=gs://BUCKET/runs/vit_l14

    python main.py --config=configs/vit_l14.py:smoke     # a tiny version, seconds on a laptop
"""

from clip_jax.configs import default


def get_config(arg: str = ""):
    config = default.get_config()
    config.model.name = "ViT-L/14"
    config.model.scan_layers = False
    config.model.remat = "residual"  # scanned with "full": 556 ms, 6.1 GiB
    config.optim.learning_rate = 4e-4
    return default.finish(config, arg)
