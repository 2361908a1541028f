"""Every setting of clip_jax stands here once, with its unit; other configs only override.

Durations are strings with a unit: "500 steps", "12.8e9 examples", "32 epochs", "5 percent"
(percent of the run; not for `duration` itself).
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from clip_jax.errors import UserError

OBJECTIVES = ("contrastive", "captioning", "bag_of_words", "near_duplicates")


def get_config(arg: str = "") -> ConfigDict:
    """The paper's common settings (Table 18), for a ViT; names no data."""
    del arg
    config = ConfigDict()
    # What is learned: "contrastive" (the paper's model), or what its figure 2 compares with that:
    # "captioning" (a transformer writes the caption) | "bag_of_words" (its words are predicted); or
    # "near_duplicates" (two views of an image belong together; captions are not looked at).
    config.objective = "contrastive"
    config.seed = 0  # the one PRNG key; all randomness is folded from it by step or example
    config.duration = "32 epochs"  # of the whole run; the learning rate ends at zero there
    config.batch_size = 32_768  # image-text pairs per step, over all devices of all hosts
    config.accum_steps = 1  # micro-batches that a batch is embedded in; the loss spans them all
    # "openai"; the path of a SentencePiece .model file; or "siglip:" and the path of the .model or
    # tokenizer.json file of a SigLIP model, which gives the ids that that model was trained with.
    config.tokenizer = "openai"
    # Whose model a new run starts from: workdir, checkpoint, or anything else that clip_jax.load
    # takes, others' weights too; "": from scratch.
    config.init_from = ""
    config.compilation_cache = ""  # directory for compiled programs; "": off
    config.model = _model()
    config.mesh = _mesh()
    config.loss = _loss()
    config.optim = _optim()
    config.data = _data()
    config.eval = _eval()
    config.checkpoint = _checkpoint()
    config.log = _log()
    return config.lock()


def finish(config: ConfigDict, arg: str) -> ConfigDict:
    """Applies what stands behind the colon of --config=FILE:ARG; every config ends with it."""
    if arg not in ("", "smoke"):
        raise UserError(f"Unknown config argument {arg!r}: the one there is, is smoke.")
    return smoke(config) if arg else config


def smoke(config: ConfigDict) -> ConfigDict:
    """The same run shrunk to seconds on a laptop: tiny shapes, embedded data, few steps."""
    resnet = config.model.name.startswith("RN")
    config.model.size.update(
        embed_dim=32,
        image_size=32,
        image_layers=(1, 1, 1, 1) if resnet else (2,),
        image_width=8 if resnet else 64,
        image_heads=4,
        patch_size=None if resnet else 8,
        text_layers=0 if config.model.size.text_pool == "bag" else 2,
        text_width=64,
        text_heads=4,
        context_length=24,
    )
    if config.model.packing.length:
        config.model.packing.length = 48
    config.batch_size = 32
    config.duration = "20 steps"
    config.optim.learning_rate = 1e-3
    config.optim.warmup = "5 steps"
    config.log.every = "5 steps"
    config.checkpoint.every = "10 steps"
    config.eval.every = "10 steps"
    config.eval.batch_size = 256
    use_digits(config)
    config.eval.retrieval.max_examples = 256
    return config


def use_digits(config: ConfigDict) -> ConfigDict:
    """Trains and evaluates on the embedded handwritten digits."""
    config.data.source = source(type="digits", split="train")
    config.eval.zeroshot.source = source(type="digits", split="test")
    config.eval.zeroshot.templates = ()
    config.eval.retrieval.source = source(type="digits", split="test_scenes")
    return config


def validate(config: ConfigDict) -> None:
    """Checks what can be checked without data or devices.

    Raises:
      UserError: names the field, what it holds and what it may hold.
    """
    problems = []
    for name, value, choices in (
        ("objective", config.objective, OBJECTIVES),
        ("model.dtype", config.model.dtype, ("auto", "float32", "bfloat16")),
        ("data.crop", config.data.crop, ("random", "resized", "center", "none")),
        ("data.order", config.data.order, ("shuffled", "windowed", "stored")),
        ("loss.name", config.loss.name, ("softmax", "sigmoid")),
        ("loss.method", config.loss.method, ("all_gather", "ring")),
        ("optim.moment_dtype", config.optim.moment_dtype, ("float32", "bfloat16")),
    ):
        if value not in choices:
            problems.append(f"{name} is {value!r}, and must be one of {', '.join(choices)}")
    for name, value, least in (
        ("batch_size", config.batch_size, 1),
        ("accum_steps", config.accum_steps, 1),
        ("loss.tile", config.loss.tile, 1),
        ("loss.temperature", config.loss.temperature, 1e-4),
        ("seed", config.seed, 0),
        ("optim.max_logit_scale", config.optim.max_logit_scale, 1),
        ("optim.grad_clip_norm", config.optim.grad_clip_norm, 0),
        ("eval.batch_size", config.eval.batch_size, 1),
        ("checkpoint.keep", config.checkpoint.keep, 1),
        ("data.prefetch", config.data.prefetch, 1),
        ("data.processes", config.data.processes, 0),
        ("data.threads", config.data.threads, 0),
        ("data.shuffle_window", config.data.shuffle_window, 1),
        ("data.chunk", config.data.chunk, 1),
    ):
        if value < least:
            problems.append(f"{name} is {value}, and must be at least {least}")
    if not config.data.source.type and not config.data.mixture:
        problems.append(
            "it names no training data: set --config.data.source.type (tar, folder, tfds) "
            "and --config.data.source.path or .name to yours, or put :smoke behind the config's "
            "name, as in --config=configs/vit_b32.py:smoke, for a small run on embedded data"
        )
    if problems:
        raise UserError(f"This config cannot be run: {'; '.join(problems)}.")


def source(**overrides) -> ConfigDict:
    """Where examples come from; the same fields for training and evaluation data."""
    spec = ConfigDict()
    spec.type = ""  # "digits" (embedded) | "folder" | "tar" | "tfds" | "tfrecord" | "synthetic"
    # folder: directory; tar, tfrecord: files or patterns, comma-separated; tfds: data_dir
    spec.path = ""
    spec.name = ""  # tfds: dataset name, such as "coco_captions"
    # digits: "train" | "train_scans" | "test" | "test_scenes" | ...; tfds: such as "train[:90%]"
    spec.split = ""
    spec.image_key = ""  # tfds ("/" for nesting), tfrecord: the feature; "": the usual name
    # Where captions stand: a feature (tfds, tfrecord), a key of the .json (tar) or a column
    # (folder); several with weights as in "caption:0.3,synthetic:0.7"; "": the usual name.
    spec.text_key = ""
    # Where the class of an example stands, as for text_key; tar: "cls" and "npy" are files; "": no
    # classes.
    spec.label_key = ""
    spec.group_keys = ""  # where its groups stand ("gender,race"), for bias probes; "": no groups
    spec.size = 0  # synthetic: number of examples
    spec.weight = 0.0  # in a mixture; 0: its number of examples
    spec.update(overrides)
    return spec


def mixture(**sources: ConfigDict) -> ConfigDict:
    """Sources by name, for `data.mixture`."""
    return ConfigDict(sources)


def _model() -> ConfigDict:
    model = ConfigDict()
    model.name = "ViT-B/32"  # one of clip_jax.available_models()
    model.dtype = "auto"  # of the compute: "float32" | "bfloat16" | "auto" (bfloat16 off CPU)
    model.scan_layers = True  # transformer layers in lax.scan (short compile) or unrolled
    model.remat = "none"  # "none" | "full" | a name in jax.checkpoint_policies
    model.patch_dropout = 0.0  # share of patches that a ViT does not see in training
    # Several captions in a row of the contrastive text tower, so that it does not compute padding.
    # The result is the same; how many rows it takes depends on the captions
    # (docs/scale.md).
    model.packing = ConfigDict()
    model.packing.length = 80  # tokens in a row, at least context_length; 0: one caption a row
    model.packing.rows = (
        0.3  # rows per caption; more are computed, in turns, when they do not suffice
    )
    # Overrides of the named size, for models the paper does not have; None: as named.
    size = ConfigDict()
    size.embed_dim = placeholder(int)  # of the joint space
    size.image_size = placeholder(int)  # pixels along a side
    size.image_layers = placeholder(tuple)  # (layers,) of a ViT; blocks of the 4 ResNet stages
    size.image_width = placeholder(int)  # ViT: channels; ResNet: channels of the first stage
    size.image_heads = placeholder(int)  # attention heads; of the attention pool in ResNets
    size.image_mlp = placeholder(int)  # hidden units of a block; 0: 4 * image_width; ViT only
    size.patch_size = placeholder(int)  # pixels along a side; ViT only
    size.text_layers = placeholder(int)
    # "end" (paper) | "last" | "bag": of words, without layers, which goes with text_layers=0
    size.text_pool = placeholder(str)
    size.text_width = placeholder(int)
    size.text_heads = placeholder(int)
    size.text_mlp = placeholder(int)  # hidden units of a block; 0: 4 * text_width
    size.context_length = placeholder(int)  # tokens, start and end tokens included
    size.vocab_size = placeholder(int)  # for a SentencePiece tokenizer: its pieces plus 2
    size.resnet_activation = placeholder(str)  # "relu" (paper) | "gelu" (its duplicate detector)
    size.resnet_norm = placeholder(str)  # "batch" (paper) | "weight" (its duplicate detector)
    size.activation = placeholder(str)  # "quick_gelu" (OpenAI) | "gelu" (open_clip) | "gelu_tanh"
    model.size = size
    return model


def _mesh() -> ConfigDict:
    mesh = ConfigDict()
    mesh.slices = 1  # TPU slices joined by the data-centre network; examples are split over them
    mesh.data = -1  # devices along the pure data axis; -1: all that remain
    mesh.fsdp = 1  # devices over which parameters and optimiser state are sharded as well
    mesh.tensor = 1  # devices over which the heads and hidden units of blocks are split
    mesh.zero1 = True  # the optimiser works in shards over the data axis too (ZeRO, stage 1)
    return mesh


def _loss() -> ConfigDict:
    loss = ConfigDict()
    loss.name = "softmax"  # contrastive: "softmax" (paper) | "sigmoid" (SigLIP)
    loss.method = "all_gather"  # "all_gather" (fewer operations) | "ring" (memory of one tile)
    loss.tile = 1024  # ring: rows and columns of logits held at once
    loss.temperature = 0.07  # near_duplicates: divides the similarities; fixed, as in the paper
    return loss


def _optim() -> ConfigDict:
    optim = ConfigDict()
    optim.learning_rate = 5e-4  # peak
    optim.warmup = "2000 steps"  # linear, from zero; cosine to zero after it
    optim.b1 = 0.9
    optim.b2 = 0.98  # paper: 0.98 for ViT, 0.999 for ResNet
    optim.eps = 1e-6  # paper: 1e-6 for ViT, 1e-8 for ResNet
    optim.weight_decay = 0.2  # decoupled; not on gains, biases and logit_scale
    optim.grad_clip_norm = 0.0  # bound on the global gradient norm; 0: off
    optim.max_logit_scale = 100.0  # bound on the multiplier exp(logit_scale)
    optim.moment_dtype = (
        "float32"  # of both Adam moments: "float32" | "bfloat16" (rounded randomly)
    )
    # Regular expression: parameters kept in bfloat16, rounded randomly; "": none. Paper: "^text/".
    optim.bf16_params = ""
    return optim


def _data() -> ConfigDict:
    data = ConfigDict()
    data.source = source()
    # Several sources by name, in proportion to their weights; none: `source` alone. In a config
    # file: config.data.mixture = default.mixture(mine=source(...), theirs=source(...)).
    data.mixture = mixture()
    # "random" square window (paper) | "resized" (RandomResizedCrop) | "center" | "none" (squash)
    data.crop = "random"
    data.crop_scale = (0.9, 1.0)  # resized: least and greatest share of the area
    data.crop_ratio = (3 / 4, 4 / 3)  # resized: least and greatest width / height
    # On the device: the probability of each, and the greatest change of what jitter changes, as a
    # share (0.4: a factor of 0.6 to 1.4). The paper has none of it.
    data.augment = ConfigDict()
    data.augment.flip = 0.0  # mirror images; captions that say left or right then lie
    data.augment.jitter = 0.0  # change brightness, contrast and saturation
    data.augment.grey = 0.0  # take the colour away
    data.augment.brightness = 0.4
    data.augment.contrast = 0.4
    data.augment.saturation = 0.4
    # near_duplicates: the two views of each image, on the device. The paper names these changes,
    # but not their strengths.
    data.views = ConfigDict()
    data.views.scale = (0.4, 1.0)  # least and greatest share of the area that is cut out
    data.views.ratio = (3 / 4, 4 / 3)  # of its width / height; it is stretched to a square
    data.views.angle = 10.0  # degrees by which it is turned, at most
    data.views.shrink = 0.4  # least share of the side that it is resized to, and back
    data.views.hue = 0.05  # greatest shift, as a share of the circle of colours
    data.views.saturation = 0.4  # greatest change, as a share: a factor of 0.6 to 1.4
    data.views.value = 0.4
    data.views.quality = (30.0, 95.0)  # of JPEG compression
    # Of each epoch: "shuffled" over the whole set | "windowed" (reads neighbours together, where
    # jumping is slow: docs/data.md) | "stored".
    data.order = "shuffled"
    data.shuffle_window = (
        32_768  # windowed: examples shuffled together, which all hosts hold in memory
    )
    data.chunk = 32  # windowed: neighbours read at once
    data.max_skipped = 0.1  # share of examples that may be unusable before the run stops
    data.threads = 0  # threads that read and decode on each host; 0: one per CPU core
    # Processes on each host that these threads are spread over, past what Python's lock allows one
    # process; 0: none but the trainer's own.
    data.processes = 0
    data.prefetch = 2  # batches held ready on the host, and as many on the device
    data.stall_timeout = 600.0  # seconds without a batch until the run stops and says what hangs
    return data


def _eval() -> ConfigDict:
    evals = ConfigDict()
    evals.every = "1 epochs"  # and once at the end of the run
    evals.batch_size = 1024  # images or captions per step, over all devices of all hosts
    zeroshot = ConfigDict()
    zeroshot.source = source()  # labelled images; type "": no zero-shot evaluation
    zeroshot.class_names = ()  # (): the source's own; alternatives of one class joined by "|"
    zeroshot.templates = ("a photo of a {}.",)  # prompts whose embeddings are averaged
    evals.zeroshot = zeroshot
    retrieval = ConfigDict()
    # Captioned images; type "": no retrieval evaluation. near_duplicates: images that are to find
    # their own second view.
    retrieval.source = source()
    retrieval.max_examples = 5000  # the first so many
    evals.retrieval = retrieval
    evals.suite = _suite()
    return evals


def _suite() -> ConfigDict:
    """The paper's protocols, in training and as defaults of python -m clip_jax evaluate."""
    suite = ConfigDict()
    suite.datasets = ""  # names, collections and paths, comma-separated; "": none in training
    suite.data_dir = ""  # directory of the data sets; "": only embedded and TFDS's own
    suite.tasks = "zeroshot"  # in training: "zeroshot" | "retrieval" | "linear_probe" | ...
    suite.every = "5 epochs"  # in training, and once at the end of the run
    suite.prompts = "paper"  # set of prompts: "paper" | "clip_benchmark"
    suite.retrieval_prompt = "a photo of {}"  # that captions are also tried behind
    suite.confidence = 0.995  # of intervals
    suite.shots = (1, 2, 4, 8, 16)  # examples per class, few-shot probes
    suite.repeats = 3  # draws of them
    suite.label_thresholds = (0.005, 0.04)  # probabilities from which a label is given, bias
    suite.overlap_threshold = 0.95  # cosine from which an image counts as a near-duplicate
    return suite


def _checkpoint() -> ConfigDict:
    checkpoint = ConfigDict()
    checkpoint.every = "1000 steps"  # and once at the end of the run
    checkpoint.keep = 3  # most recent checkpoints kept
    checkpoint.best_metric = "zeroshot/top1"  # the checkpoint highest in it is kept too; "": none
    checkpoint.allow_config_change = False  # resume although the stored config trains otherwise
    return checkpoint


def _log() -> ConfigDict:
    log = ConfigDict()
    log.every = "50 steps"  # between rows of metrics.jsonl, TensorBoard and the progress line
    log.tensorboard = True
    return log
