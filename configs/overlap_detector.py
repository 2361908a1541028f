"""The detector of near-duplicates with which the paper measures overlap (section 5, appendix C).

An RN50 with GELU and weight normalisation learns which of 1,712 images a view belongs to. Views are
cropped, stretched, rotated, resized, recoloured and compressed (`data.views`); captions are unused.
Its embeddings find copies of test images among training images, whereas those of CLIP also find
images of the same content. Training takes about 30 million images in 17,500 steps, a day or less on
8 accelerators.

    python main.py --config=configs/overlap_detector.py --config.data.source.type=tar
        --config.data.source.path='gs://BUCKET/shards/*.tar' --workdir=gs://BUCKET/runs/detector

    python main.py --config=configs/overlap_detector.py:smoke   # a tiny version, seconds

    python -m clip_jax evaluate --checkpoint=MODEL --tasks=overlap --train_data="shards/*.tar"
        --detector=runs/detector
    python -m clip_jax data dedup "shards/*.tar" --against="test/*.tar" --checkpoint=runs/detector
    python -m clip_jax embed --model=runs/detector pictures --out=embeddings

Progress is the fraction of held-out images (`eval.retrieval.source`) whose two views are nearest to
each other; in the paper nearly all are at the end. Learning rate, warm-up and strengths of the
changes are ours; the paper gives temperature, batch size and number of images.
"""

from clip_jax.configs import default


def get_config(arg: str = ""):
    config = default.get_config()
    config.objective = "near_duplicates"
    config.duration = "30e6 examples"
    config.batch_size = 1712
    config.model.name = "RN50"
    config.model.size.resnet_activation = "gelu"
    config.model.size.resnet_norm = "weight"
    config.optim.learning_rate = 5e-4
    config.optim.warmup = "1000 steps"
    config.optim.b2 = 0.999
    config.optim.eps = 1e-8
    config.optim.grad_clip_norm = 1.0  # without BatchNorm, nothing else bounds the first steps
    config.eval.every = "1000 steps"
    config.checkpoint.best_metric = "near_duplicates/recall@1"
    return default.finish(config, arg)
