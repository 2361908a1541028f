"""RN50x16: the paper's recipe on 400 million pairs.

In the paper: 70.5 % zero-shot top-1 on ImageNet.

By `python -m clip_jax plan --topology=v5e:16x16 --config.accum_steps=2`, 256 chips: 14.3 GiB of
15.75 on each, 1,829 ms per step, 17,900 pairs/s; batches are then normalised by halves. Without
micro-batches it needs 28 GiB, or 17.7 with --config.model.remat=full.

    python main.py --config=configs/rn50x16.py --config.data.source.type=tar
        --config.data.source.path='gs://BUCKET/shards/*.tar' --workdir=gs://BUCKET/runs/rn50x16

    python main.py --config=configs/rn50x16.py:smoke     # a tiny version, seconds on a laptop
"""

from clip_jax.configs import default


def get_config(arg: str = ""):
    config = default.get_config()
    config.model.name = "RN50x16"
    config.optim.learning_rate = 4e-4
    config.optim.b2 = 0.999
    config.optim.eps = 1e-8
    return default.finish(config, arg)
