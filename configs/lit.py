"""LiT: a text tower learns to read a locked image tower (Zhai et al. 2022, arXiv:2111.07991).

For one accelerator: the frozen tower has no backward pass and no optimiser state. The image tower
comes from any model of its shape, a run's workdir or published weights:

    python main.py --config=configs/lit.py --config.init_from=openai/clip-vit-base-patch16
        --config.data.source.type=tfds --config.data.source.name=coco_captions

    python main.py --config=configs/lit.py:smoke    # a tiny version, of a random image tower

Batch, duration, rates, decay, clipping, crop and text length are those of big_vision's
configs/proj/image_text/lit_coco.py (commit 430df79), which trains on COCO Captions with a ViT-B/16
of ImageNet-21k and a BERT. It reports 20.7 % zero-shot top-1 on ImageNet; on COCO 47.2 % image to
text and 32.1 % text to image. Its RandAugment is missing here, and the text tower begins at random.
Not run here on COCO.
"""

from clip_jax.configs import default


def get_config(arg: str = ""):
    config = default.get_config()
    config.model.name = "ViT-B/16"
    config.model.size.context_length = 16
    config.model.packing.length = 0  # the tower reads 16 tokens
    config.init_params = "^image/"
    config.batch_size = 4096
    config.duration = "5000 steps"
    config.optim.factors = "^image/=0"
    config.optim.learning_rate = 1e-3
    config.optim.warmup = "150 steps"
    config.optim.b2 = 0.999
    config.optim.eps = 1e-8
    config.optim.weight_decay = 0.01
    config.optim.independent_decay = True
    config.optim.grad_clip_norm = 1.0
    config.data.crop = "none"
    config.data.augment.flip = 0.5
    return default.finish(config, arg)
