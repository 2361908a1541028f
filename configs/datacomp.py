"""DataComp at its four scales: training as the benchmark fixes it, on the data that one has chosen.

Gadre et al. 2023, arXiv:2304.14108; settings from scale_configs.py and train.py of
github.com/mlfoundations/datacomp, and open_clip's defaults where they name none. The accuracies are
those of open_clip's docs/datacomp_models.md, zero-shot top-1 on ImageNet in percent:

    scale    model      pairs seen   all pairs   by CLIP score   best baseline
    small    ViT-B/32       12.8 M         2.5             5.1             3.9
    medium   ViT-B/32        128 M        17.6            27.3            29.7
    large    ViT-B/16       1.28 B        45.9            57.8            63.1
    xlarge   ViT-L/14       12.8 B        72.3            76.4            79.2

The last column is a part of DataComp-1B. Other than there, pairs are drawn without replacement, and
computed in bfloat16 in place of float16. Not run here beyond :smoke.

    python main.py --config=configs/datacomp.py:medium --config.data.source.type=tar
        --config.data.source.path='gs://BUCKET/shards/*.tar' --workdir=gs://BUCKET/runs/datacomp

    python main.py --config=configs/datacomp.py:medium,smoke   # a tiny version, seconds on a laptop
"""

from clip_jax.configs import default, vit_b16, vit_b32, vit_l14

# The config of the model by scale, and settings on top of it by dotted name.
SCALES = {
    "small": (vit_b32, {"duration": "12.8e6 examples", "batch_size": 4096}),
    "medium": (vit_b32, {"duration": "128e6 examples", "batch_size": 4096}),
    "large": (vit_b16, {"duration": "1.28e9 examples", "batch_size": 8192}),
    "xlarge": (
        vit_l14,
        {
            "duration": "12.8e9 examples",
            "batch_size": 90_112,
            "optim.learning_rate": 1e-3,
            "optim.warmup": "10000 steps",
            "optim.b2": 0.95,
            "model.remat": "full",  # 352 pairs on each of 256 chips
            "model.scan_layers": True,
        },
    ),
}


def get_config(arg: str = ""):
    scale, rest = default.choose(arg, SCALES)
    model, settings = SCALES[scale]
    config = model.get_config()
    use_open_clip(config)
    config.model.size.activation = "gelu"
    config.optim.warmup = "500 steps"
    config.update_from_flattened_dict(settings)
    return default.finish(config, rest)


def use_open_clip(config):
    """Applies the settings of open_clip that differ from the paper's, for a ViT."""
    config.data.crop = "resized"
    config.data.crop_scale = (0.9, 1.0)
    config.optim.decay_params = "(kernel|embedding|positions)$"  # all but vectors
