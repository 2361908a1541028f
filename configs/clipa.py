"""CLIPA-v2: 84 pixels and 8 tokens first, 224 and then 336 pixels last, in three stages.

Li et al. 2023, arXiv:2305.07017 and arXiv:2306.15658. Settings from clipa_jax/configs of
github.com/UCSC-VLAA/CLIPA. As published, on DataComp-1B: zero-shot top-1 on ImageNet in percent
after each stage, and the hours of an A100 that all three take:

    model            84     224     336   hours
    l14   L/14     72.7    79.7    80.3   4,520
    h14   H/14     75.6    81.5    81.8   8,640

By `python -m clip_jax plan --stage=stage1 --topology=v5e:16x16` of l14, 256 chips: 4.1 GiB of 15.75
on each, 216 ms per step, 303,000 pairs/s, so 12 hours for the first stage.

For the last two stages of L/14 there is no file. Its README says that they see as many pairs as
those of H/14, whose they are here. Jitter has no hue here, and the moments are float32. The
captions are in OpenAI's vocabulary; theirs is BERT's, which a folder of published weights brings:

    --config.tokenizer=huggingface:FOLDER --config.model.size.vocab_size=32000

The first stage needs NLTK for its data.text_mask (docs/data.md), or
--config.stages.stage1.data.text_mask=block. Not run here beyond :smoke.

    python main.py --config=configs/clipa.py:l14 --config.data.source.type=tar
        --config.data.source.path='gs://BUCKET/shards/*.tar' --workdir=gs://BUCKET/runs/clipa

    python main.py --config=configs/clipa.py:l14,smoke   # a tiny version, seconds on a laptop
"""

from clip_jax.configs import default

# Settings of the first stage that are the model's own, by dotted name.
MODELS = {
    "l14": {
        "model.name": "ViT-L/14",
        "optim.warmup": "52428800 examples",
        "data.augment.jitter": 0.0,
        "data.augment.grey": 0.0,
    },
    "h14": {"model.name": "ViT-H/14", "optim.warmup": "3200 steps"},
}


def get_config(arg: str = ""):
    model, rest = default.choose(arg, MODELS)
    first = dict(MODELS[model])
    config = default.get_config()
    config.model.name = first.pop("model.name")
    config.model.remat = "full"
    set_towers(config)
    config.model.size.context_length = 32
    set_training(config)
    low = {
        "model.size.image_size": 84,
        "model.size.context_length": 8,
        "data.text_mask": "syntax",
        "duration": "12.81167e9 examples",
        "batch_size": 65_536,
        "optim.learning_rate": 2.048e-3,
        **first,
    }
    middle = {
        "model.patch_dropout": 0.3,
        "duration": "524288e3 examples",
        "batch_size": 32_768,
        "optim.learning_rate": 5.12e-5,
        "optim.warmup": "26214400 examples",
    }
    high = {
        "model.size.image_size": 336,
        "model.patch_dropout": 0.4,
        "duration": "131072e3 examples",
        "batch_size": 16_384,
        "optim.learning_rate": 6.4e-6,
        "optim.warmup": "26214400 examples",
    }
    config.stages = default.stages(low, middle, high)
    return default.finish(config, rest)


def set_towers(config):
    """Gives both towers the forms of CLIPA: means of patches, fixed positions, no causal mask."""
    config.model.size.update(
        activation="gelu_tanh",
        image_pool="avg",
        image_positions="sincos",
        image_registers=1,  # the class token, which nothing reads
        norm_after_pool=True,
        pre_norm=False,
        text_causal=False,
        text_pool="last",
    )
    config.model.packing.length = 0  # every token sees all others, padding too


def set_training(config):
    """Sets crops, jitter and optimiser, equal in all stages."""
    config.data.crop = "resized"
    config.data.crop_scale = (0.4, 1.0)
    config.data.augment.update(
        jitter=0.8, brightness=0.32, contrast=0.32, saturation=0.32, grey=0.2
    )
    config.optim.b2 = 0.95
    config.optim.eps = 1e-8
    config.optim.decay_params = "kernel$"
