"""MobileCLIP's training: a ViT-B/16 distilled from two ViT-L/14.

Vasu et al. 2024, arXiv:2311.17049. Settings from training/configs of
github.com/apple/ml-mobileclip, and open_clip's defaults; zero-shot top-1 on ImageNet in percent:

    line   data             pairs seen   batch    distilled   result
    dr12m  DataCompDR-12M   246 M        8,192    all         -
    dr1b   DataCompDR-1B    13.1 B       65,536   0.75        76.8 (MobileCLIP-B)

What differs: their data keep the teachers' embeddings of 10 to 30 augmented views of each image,
made by RandAugment, and of each caption, real or synthetic; here the teachers run beside the model,
on the same crops as it, without RandAugment. They add the loss of real captions to that of
synthetic ones; here both are texts of one batch. MobileCLIP-B's image tower begins with
convolutions, this with patches; the smaller MobileCLIP-S are not built here. Not run here beyond
:smoke, whose teacher is the embedded data's own.

    python main.py --config=configs/mobileclip.py:dr12m --config.data.source.type=tar
        --config.data.source.path='gs://BUCKET/shards/*.tar' --workdir=gs://BUCKET/runs/mobileclip
        --config.data.source.text_key=txt,synthetic --config.data.captions=2

    python main.py --config=configs/mobileclip.py:dr12m,smoke   # a tiny one, seconds on a laptop
"""

from clip_jax.configs import datacomp, default, vit_b16

# Names on the Hugging Face hub; a path takes their place where a machine has no network.
TEACHERS = "openai/clip-vit-large-patch14, laion/CLIP-ViT-L-14-DataComp.XL-s13B-b90K"

# Settings of each line, by dotted name.
LINES = {
    "dr12m": {"batch_size": 8192, "duration": "30000 steps", "loss.distillation": 1.0},
    "dr1b": {"batch_size": 65_536, "duration": "200000 steps", "loss.distillation": 0.75},
}


def get_config(arg: str = ""):
    line, rest = default.choose(arg, LINES)
    config = vit_b16.get_config()
    datacomp.use_open_clip(config)
    config.model.size.activation = "gelu"
    config.data.crop_scale = (0.08, 1.0)
    config.loss.teachers = TEACHERS
    config.loss.teacher_scales = (100.0, 100.0)
    config.optim.learning_rate = 1e-3
    config.optim.warmup = "1000 steps"
    config.optim.b2 = 0.95
    config.optim.grad_clip_norm = 1.0
    config.update_from_flattened_dict(LINES[line])
    return default.finish(config, rest)
