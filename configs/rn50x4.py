"""RN50x4: the paper's recipe on 400 million pairs.

In the paper: 65.8 % zero-shot top-1 on ImageNet.

By `python -m clip_jax plan --topology=v5e:16x16`, 256 chips: 14.4 GiB of 15.75 on
each, 399 ms per step, 82,100 pairs/s.

    python main.py --config=configs/rn50x4.py --config.data.source.type=tar
        --config.data.source.path='gs://BUCKET/shards/*.tar' --workdir=gs://BUCKET/runs/rn50x4

    python main.py --config=configs/rn50x4.py:smoke     # a tiny version, seconds on a laptop
"""

from clip_jax.configs import default


def get_config(arg: str = ""):
    config = default.get_config()
    config.model.name = "RN50x4"
    config.optim.learning_rate = 5e-4
    config.optim.b2 = 0.999
    config.optim.eps = 1e-8
    return default.finish(config, arg)
