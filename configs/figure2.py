"""Figure 2 of the paper: zero-shot accuracy per image processed, for several training objectives.

One run per line, equal in all but the objective; `python -m clip_jax compare` draws them:

    python main.py --config=configs/figure2.py:captioning      # a 63 M transformer writes captions
    python main.py --config=configs/figure2.py:bag_of_words    # their words are predicted
    python main.py --config=configs/figure2.py:bag_contrastive # pairs, the text a bag of words
    python main.py --config=configs/figure2.py:contrastive     # pairs, the text tower of CLIP

each with --config.data.source.type=tar --config.data.source.path='gs://BUCKET/shards/*.tar' and
labelled images in --config.eval.zeroshot.source. In the paper, for the same accuracy on ImageNet,
predicting words takes a third of the images that captioning takes, and the contrastive objective a
quarter of that.

The model is RN50, on 400 million images, where the figure ends, with the recipe of configs/rn50.py.
`,smoke` after any of them, as in :captioning,smoke, is a tiny version, seconds on a laptop. On the
embedded digits, runs of configs/quickstart.py compare them, in minutes on 2 CPU cores:

    python main.py --config=configs/quickstart.py --config.objective=bag_of_words --workdir=runs/bag
"""

from clip_jax.configs import default

# Settings by line, by dotted name.
LINES = {
    "contrastive": {},
    "bag_contrastive": {
        "model.size.text_pool": "bag",
        "model.size.text_layers": 0,
        "model.packing.length": 0,
    },
    "bag_of_words": {"objective": "bag_of_words"},
    "captioning": {"objective": "captioning"},
}


def get_config(arg: str = ""):
    line, rest = default.choose(arg, LINES)
    config = default.get_config()
    config.update_from_flattened_dict(LINES[line])
    config.duration = "400e6 examples"
    config.model.name = "RN50"
    config.optim.learning_rate = 5e-4
    config.optim.b2 = 0.999
    config.optim.eps = 1e-8
    config.eval.every = "500 steps"
    return default.finish(config, rest)
