"""SigLIP-B/16: the sigmoid loss (Zhai et al. 2023, arXiv:2303.15343) at 224 pixels, 64 tokens.

In the paper: 76.2 % zero-shot top-1 on ImageNet, after 40 billion pairs at 256 pixels and 5 billion
at 224, the latter with a hundredth of the learning rate and no decay. Not run here beyond :smoke.

The 40 billion pairs, the batch, b2, and the first temperature and bias are the paper's. It does not
give learning rate, decay, clipping and schedule. These are those of SigLIP 2 (Tschannen et al.
2025, arXiv:2502.14786), for as many pairs in as large batches. The paper trained by Adafactor,
which is --config.optim.name=adafactor; SigLIP 2 by Adam. Kernels alone decay, as in their code.

By `python -m clip_jax plan --topology=v5e:16x16`, 256 chips: 8.2 GiB of 15.75 on
each, 168 ms per step, 195,000 pairs/s.

    python main.py --config=configs/siglip_b16.py --config.data.source.type=tar
        --config.data.source.path='gs://BUCKET/shards/*.tar' --workdir=gs://BUCKET/runs/siglip_b16

    python main.py --config=configs/siglip_b16.py:smoke     # a tiny version, seconds on a laptop

The captions are in OpenAI's vocabulary, which needs no download. The published model has 32,000
SentencePiece entries; to train with such a file (our start and end token come on top of its own):

    --config.tokenizer=PATH/sentencepiece.model --config.model.size.vocab_size=32002

To start from published weights (a folder of transformers, or its name on the hub), use the ids that
they were trained with, by the vocabulary file in that folder:

    --config.init_from=FOLDER --config.tokenizer=siglip:FOLDER/spiece.model
        --config.model.size.vocab_size=32000
"""

from clip_jax.configs import default


def get_config(arg: str = ""):
    config = default.get_config()
    config.model.name = "SigLIP-B/16"
    config.model.scan_layers = False
    config.model.remat = "mlp"  # "residual" takes 182 ms and 6.4 GiB
    set_recipe(config)
    return default.finish(config, arg)


def set_recipe(config):
    """Applies the settings that all SigLIP models have in common."""
    config.duration = "40e9 examples"
    config.model.size.vocab_size = 49_408  # that of the "openai" tokenizer
    config.model.packing.length = 0  # every token sees all others, padding too
    config.loss.name = "sigmoid"
    config.optim.learning_rate = 1e-3
    config.optim.warmup = "20000 steps"
    config.optim.b2 = 0.95  # steadier than 0.999 in large batches
    config.optim.eps = 1e-8
    config.optim.weight_decay = 1e-4
    config.optim.independent_decay = True
    config.optim.decay_params = "kernel$"  # neither embeddings nor positions nor the probe
    config.optim.grad_clip_norm = 1.0
    config.optim.max_logit_scale = 1000.0  # practically unbounded: published ones end above 100
