"""ViT-L/14@336px, one more epoch at 336 pixels: the paper's recipe on 400 million pairs.

In the paper: 76.2 % zero-shot top-1 on ImageNet.

Starts from a finished ViT-L/14, whose positions are interpolated.

By `python -m clip_jax plan --topology=v5e:16x16`, 256 chips: 6.6 GiB of 15.75 on
each, 1,627 ms per step, 20,100 pairs/s.

    python main.py --config=configs/vit_l14_336.py --config.init_from=gs://BUCKET/runs/vit_l14
        --config.data.source.type=tar
        --config.data.source.path='gs://BUCKET/shards/*.tar' --workdir=gs://BUCKET/runs/vit_l14_336

    python main.py --config=configs/vit_l14_336.py:smoke     # a tiny version, seconds on a laptop
"""

from clip_jax.configs import default


def get_config(arg: str = ""):
    config = default.get_config()
    config.model.name = "ViT-L/14@336px"
    config.model.remat = "full"
    config.accum_steps = 2  # 128 pairs at once take 16.7 GiB of a chip
    config.optim.learning_rate = 2e-5
    config.duration = "1 epochs"
    return default.finish(config, arg)
