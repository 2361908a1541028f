"""RN50: the paper's recipe on 400 million pairs.

In the paper: 59.6 % zero-shot top-1 on ImageNet.

By `python -m clip_jax plan --topology=v5e:16x16`, 256 chips: 6.4 GiB of 15.75 on
each, 141 ms per step, 232,000 pairs/s.

    python main.py --config=configs/rn50.py --config.data.source.type=tar
        --config.data.source.path='gs://BUCKET/shards/*.tar' --workdir=gs://BUCKET/runs/rn50

    python main.py --config=configs/rn50.py:smoke     # a tiny version, seconds on a laptop
"""

from clip_jax.configs import default


def get_config(arg: str = ""):
    config = default.get_config()
    config.model.name = "RN50"
    config.optim.learning_rate = 5e-4
    config.optim.b2 = 0.999
    config.optim.eps = 1e-8
    return default.finish(config, arg)
