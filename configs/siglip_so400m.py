"""SigLIP-So400m/14: the shape-optimised SigLIP (arXiv:2303.15343) at 224 pixels, 16 tokens.

The recipe is that of siglip_b16.py, which also shows how to use a SentencePiece vocabulary. The
published model at this resolution reads 16 tokens; longer captions are cut and counted. In the
paper, at 384 pixels and 64 tokens: 83.2 % zero-shot top-1 on ImageNet. Not run here beyond :smoke.

By `python -m clip_jax plan --topology=v5e:16x16 --config.mesh.fsdp=16`, 256 chips:
4.7 GiB of 15.75 on each, 784 ms per step, 41,800 pairs/s.

    python main.py --config=configs/siglip_so400m.py --config.data.source.type=tar
        --config.data.source.path='gs://BUCKET/shards/*.tar'
        --workdir=gs://BUCKET/runs/siglip_so400m

    python main.py --config=configs/siglip_so400m.py:smoke     # a tiny version, seconds on a laptop
"""

from clip_jax.configs import default, siglip_b16


def get_config(arg: str = ""):
    config = default.get_config()
    config.model.name = "SigLIP-So400m/14"
    config.model.remat = "full"  # else its activations fill a chip at a few dozen pairs
    siglip_b16.set_recipe(config)
    return default.finish(config, arg)
