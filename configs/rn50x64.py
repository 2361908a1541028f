"""RN50x64: the paper's recipe on 400 million pairs.

In the paper: 73.6 % zero-shot top-1 on ImageNet.
The paper trained it in 18 days on 592 V100.

By `python -m clip_jax plan --topology=v5e:16x16 --config.accum_steps=8`, 256 chips: 14.2 GiB of
15.75 on each, 4,173 ms per step, 7,850 pairs/s, 19 days; batches are then normalised by eighths.
Without micro-batches it needs 77 GiB, or 41 with --config.model.remat=full.

    python main.py --config=configs/rn50x64.py --config.data.source.type=tar
        --config.data.source.path='gs://BUCKET/shards/*.tar' --workdir=gs://BUCKET/runs/rn50x64

    python main.py --config=configs/rn50x64.py:smoke     # a tiny version, seconds on a laptop
"""

from clip_jax.configs import default


def get_config(arg: str = ""):
    config = default.get_config()
    config.model.name = "RN50x64"
    config.optim.learning_rate = 3.6e-4
    config.optim.b2 = 0.999
    config.optim.eps = 1e-8
    return default.finish(config, arg)
