"""Reference runs: small, fixed and seeded, for `python -m clip_jax check-curve`.

Whoever has set up a new machine trains one of them and compares its curves with those of five
seeds, which stand in clip_jax/status/reference.json. Lines:

    line             data                     model      steps   batch   five seeds
    digits           embedded                 4 layers     600      64   stored
    coco             COCO Captions            ViT-B/32   3,000   1,024   not yet run
    cc3m             Conceptual Captions 3M   ViT-B/32   3,000   4,096   not yet run
    cc12m            Conceptual Captions 12M  ViT-B/32   3,000   4,096   not yet run
    datacomp_small   DataComp small           ViT-B/32   3,125   4,096   not yet run

Lengths are in steps, since links go and nobody's copy of a web set is quite another's. The model of
digits is that of configs/quickstart.py. `datacomp_small` is configs/datacomp.py:small. The others
take open_clip's settings for CC3M, shortened.

    python main.py --config=configs/reference.py:digits --workdir=runs/reference   # 2 CPU cores
    python -m clip_jax check-curve runs/reference

    python main.py --config=configs/reference.py:cc3m --config.data.source.type=tar
        --config.data.source.path='gs://BUCKET/shards/*.tar' --workdir=gs://BUCKET/runs/reference

    python main.py --config=configs/reference.py:cc3m,smoke    # a tiny one, seconds on a laptop
"""

from clip_jax.configs import datacomp, default, quickstart, vit_b32

_OPEN_CLIP = {
    "duration": "3000 steps",
    "data.crop": "resized",
    "data.crop_scale": (0.9, 1.0),
    "optim.learning_rate": 1e-3,
    "optim.warmup": "500 steps",
    "optim.weight_decay": 0.1,
}

# The config of the model by line, and settings on top of it by dotted name.
LINES = {
    "digits": (
        quickstart,
        {
            "duration": "600 steps",
            "log.every": "10 steps",
            "log.tensorboard": False,
            "eval.every": "150 steps",
            "checkpoint.every": "600 steps",
            "checkpoint.best_metric": "",
        },
    ),
    "coco": (vit_b32, {**_OPEN_CLIP, "batch_size": 1024}),
    "cc3m": (vit_b32, {**_OPEN_CLIP, "batch_size": 4096}),
    "cc12m": (vit_b32, {**_OPEN_CLIP, "batch_size": 4096}),
    "datacomp_small": (datacomp, {}),
}


def get_config(arg: str = ""):
    line, rest = default.choose(arg, LINES)
    model, settings = LINES[line]
    config = model.get_config()
    config.update_from_flattened_dict(settings)
    return default.finish(config, rest)
