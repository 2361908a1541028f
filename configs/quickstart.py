"""CLIP on the embedded handwritten digits: minutes on a laptop, nothing to download.

python main.py --config=configs/quickstart.py           # 2 CPU cores
python main.py --config=configs/quickstart.py:smoke     # a tiny version, seconds
"""

from configs import default


def get_config(arg: str = ""):
    config = default.get_config()
    config.duration = "2000 steps"
    config.batch_size = 64
    config.model.name = "ViT-B/32"
    config.model.scan_layers = False  # twice as fast on CPU; 4 layers compile soon enough
    config.model.size.update(
        embed_dim=64,
        image_size=24,
        image_layers=(4,),
        image_width=96,
        image_heads=3,
        patch_size=6,
        text_layers=2,
        text_width=64,
        text_heads=2,
        context_length=16,
    )
    default.use_digits(config)
    config.optim.learning_rate = 1e-3
    config.optim.warmup = "100 steps"
    config.optim.grad_clip_norm = 1.0
    config.log.every = "20 steps"
    config.eval.every = "250 steps"
    config.eval.batch_size = 250
    config.checkpoint.every = "500 steps"
    return default.finish(config, arg)
