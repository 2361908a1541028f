"""Every setting of clip_jax, once, with its unit; other configs only override.

Durations are strings with a unit: "500 steps", "12.8e9 examples", "32 epochs", or "5 percent"
(percent of the run, so not for `duration` itself). `checkpoint.every` may be a time: "10 minutes".
"""

import copy
from collections.abc import Collection, Mapping
from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from clip_jax.errors import UserError
from clip_jax.models import sizes

# Earlier names of settings: a command line or a config that has them is told the new one.
RENAMED = {
    "optim.half_weights": "optim.bf16_params",
    "data.run": "data.chunk",
    "data.window": "data.shuffle_window",
    "data.patience": "data.stall_timeout",
    "model.pack.length": "model.packing.length",
    "model.pack.rows": "model.packing.rows",
    "eval.suite.datasets": "eval.datasets",
    "eval.suite.data_dir": "eval.data_dir",
    "eval.suite.tasks": "eval.tasks",
    "eval.suite.every": "eval.every",
    "eval.suite.prompts": "eval.prompts",
    "eval.suite.retrieval_prompt": "eval.retrieval_prompt",
    "eval.suite.confidence": "eval.confidence",
    "eval.suite.shots": "eval.shots",
    "eval.suite.repeats": "eval.repeats",
    "eval.suite.label_thresholds": "eval.label_thresholds",
    "eval.suite.overlap_threshold": "eval.overlap_threshold",
}


def get_config(arg: str = "") -> ConfigDict:
    """Returns the paper's common settings (Table 18), for a ViT; names no data."""
    del arg
    config = ConfigDict()
    # Training objective: "contrastive" (CLIP); the baselines of the paper's figure 2, "captioning"
    # (a transformer writes the caption) and "bag_of_words" (predicts the words of the caption); or
    # "near_duplicates" (matches two views of an image; captions are ignored).
    config.objective = "contrastive"
    config.seed = 0  # PRNG seed, non-negative; all randomness is folded from it by step or example
    config.duration = "32 epochs"  # length of the run; the learning rate reaches zero at its end
    config.batch_size = 32_768  # image-text pairs per step, over all devices of all hosts
    # Micro-batches that each batch is embedded in, to save memory; the loss spans the whole batch.
    config.accum_steps = 1
    # "openai"; or the path of a SentencePiece .model file; or "siglip:" and the path of the .model
    # or tokenizer.json file of a SigLIP model, for the ids that it was trained with; or
    # "huggingface:" and a folder of transformers or open_clip, for the tokenizer in it.
    config.tokenizer = "openai"
    # Model that a new run starts from: a workdir, a checkpoint, or anything else that clip_jax.load
    # takes, published weights too; "": random initialisation.
    config.init_from = ""
    # Regular expression on the paths of the parameters that are taken from there, others stay
    # random: "^image/" takes the image tower, and then the text tower may be another; "": all.
    config.init_params = ""
    # Run that a new one goes on from, with its optimiser and its place in the data: a workdir, or a
    # checkpoint in it, WORKDIR/checkpoints/STEP; of a stage, the name of an earlier one; "": none.
    # Only what may change at a resumption may differ: with optim.schedule constant or rsqrt, the
    # cooldown and the duration; and the batch_size, with the duration in steps.
    config.branch_from = ""
    # Directory that keeps compiled programs; "auto": compiled/ in the workdir; "": none.
    config.compilation_cache = "auto"
    # Stages trained one after the other, each from the model of the one before: settings of its own
    # on top of the others, as `stages` makes them; none: one run.
    config.stages = stages()
    config.model = _model()
    config.mesh = _mesh()
    config.loss = _loss()
    config.optim = _optim()
    config.step = _step()
    config.data = _data()
    config.eval = _eval()
    config.checkpoint = _checkpoint()
    config.log = _log()
    return config.lock()


def choose(arg: str, lines: Collection[str]) -> tuple[str, str]:
    """Splits the argument of a config with several lines, as in --config=FILE:LINE,smoke.

    Args:
      arg: argument after the colon; one without a line means the first.
      lines: names of the lines.

    Returns:
      The line, and the argument for `finish`.

    Raises:
      UserError: there is no such line.
    """
    line, _, rest = arg.partition(",")
    if arg in ("", "smoke"):
        line, rest = next(iter(lines)), arg
    if line not in lines:
        raise UserError(
            f"Unknown config argument {arg!r}: it is one of {', '.join(lines)}, and ,smoke behind "
            "any of them for a tiny version."
        )
    return line, rest


def finish(config: ConfigDict, arg: str) -> ConfigDict:
    """Applies the argument after the colon of --config=FILE:ARG; every config ends with it."""
    if arg not in ("", "smoke"):
        raise UserError(f"Unknown config argument {arg!r}: the only one is smoke.")
    return smoke(config) if arg else config


def smoke(config: ConfigDict) -> ConfigDict:
    """Shrinks a run to seconds on a laptop: tiny shapes, embedded data, few steps."""
    resnet = config.model.name.startswith("RN")
    config.model.size.update(
        embed_dim=64 if config.model.size.text_projection is False else 32,
        image_size=32,
        image_layers=(1, 1, 1, 1) if resnet else (2,),
        image_width=8 if resnet else 64,
        image_heads=4,
        patch_size=None if resnet else 8,
        views_mlp=64,
        views_embed=32,
        text_layers=0 if config.model.size.text_pool == "bag" else 2,
        text_width=64,
        text_heads=4,
        context_length=24,
    )
    if config.model.size.text_decoder_layers:
        config.model.size.text_decoder_layers = 1
    if config.model.packing.length:
        config.model.packing.length = 48
    config.init_params = ""
    if (
        config.loss.distillation
    ):  # the embedded data keep a teacher, who knows which digits they show
        config.loss.update(teachers="", teacher_scales=(10.0,))
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
    last = list(config.stages)[-1:]
    for name, stage in config.stages.items():
        shrunk: dict[str, Any] = {"duration": "10 steps", "optim.warmup": "2 steps"}
        if "image_size" in stage.get("model", {}).get("size", {}):
            shrunk["model.size.image_size"] = 32 if name in last else 16
        config.stages[name] = stages(shrunk).stage1
    return config


def stages(*settings: Mapping[str, Any]) -> ConfigDict:
    """Returns stages "stage1", "stage2", ..., for `config.stages`.

    Args:
      *settings: settings of each stage, by dotted names, on top of those of the config.
    """
    made = ConfigDict()
    for number, own in enumerate(settings, start=1):
        stage = made[f"stage{number}"] = ConfigDict()
        for name, value in own.items():
            *parents, last = name.split(".")
            place = stage
            for parent in parents:
                if parent not in place:
                    place[parent] = ConfigDict()
                place = place[parent]
            place[last] = value
    return made


def of_stage(config: ConfigDict, name: str) -> ConfigDict:
    """Returns the config of one stage.

    Raises:
      UserError: it sets what no config has.
    """
    own = copy.deepcopy(config)
    own.stages = ConfigDict()
    if config.stages[name].get("branch_from"):  # a run has one beginning
        own.init_from = own.init_params = ""
    try:
        own.update(config.stages[name])
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"config.stages.{name} cannot be applied: {error}.") from None
    return own


def use_digits(config: ConfigDict) -> ConfigDict:
    """Trains and evaluates on the embedded handwritten digits."""
    keys = "digits+digits:10" if config.loss.distillation else ""
    config.data.source = source(type="digits", split="train", teacher_keys=keys)
    config.eval.zeroshot.source = source(type="digits", split="test")
    config.eval.zeroshot.templates = ()
    config.eval.retrieval.source = source(type="digits", split="test_scenes")
    return config


def source(**overrides) -> ConfigDict:
    """Returns a data source; training and evaluation data have the same fields."""
    spec = ConfigDict()
    # Kind of data: "digits" (embedded) | "folder" | "tar" | "tfds" | "tfrecord" | "synthetic".
    spec.type = ""
    # folder: directory, a table in it, or .parquet files that hold images; tar, tfrecord: files or
    # glob patterns, comma-separated, as for .parquet files; tfds: data_dir.
    spec.path = ""
    spec.name = ""  # tfds: data set name, such as "coco_captions"
    # digits: "train" | "train_two_captions" | "train_scans" | "test" | "test_scenes" |
    # "test_inverted" | "test_blurred" | "test_noisy" | "test_tilted"; tfds: such as "train[:90%]".
    spec.split = ""
    # Name of the image: a feature (tfds, "/" for nesting; tfrecord) or a column (folder), which
    # holds paths, or in .parquet files the images themselves; "": the usual name.
    spec.image_key = ""
    # Name of the caption: a feature (tfds, tfrecord), a key of the .json (tar) or a column
    # (folder); several with weights as in "caption:0.3,synthetic:0.7"; "": the usual name.
    spec.text_key = ""
    # Name of the class label, as for text_key; tar: also "cls" or "npy", files; "": no classes.
    spec.label_key = ""
    # Name of the weight of a pair in the loss, a number from 0 on, as for label_key: a score of its
    # curation, or a teacher's agreement. "": all pairs count the same.
    spec.weight_key = ""
    # Embeddings by teachers for loss.distillation: for each teacher the names of those of image and
    # caption, as for label_key, and their width, "l14_image+l14_text:768". "": none.
    spec.teacher_keys = ""
    spec.group_keys = ""  # names of group labels ("gender,race"), for bias probes; "": no groups
    spec.size = 0  # synthetic: number of examples
    spec.weight = 0.0  # weight in a mixture; 0: the number of examples
    spec.update(overrides)
    return spec


def sources(data: ConfigDict) -> list[ConfigDict]:
    """Returns the sources of the training data, of the fields of `data`."""
    return list(data.mixture.values()) or [data.source]


def has_pair_weights(data: ConfigDict) -> bool:
    """Tells whether pairs of the training data have weights, of the fields of `data`."""
    return any(source.weight_key for source in sources(data))


def teacher_names(config: ConfigDict) -> list[str]:
    """Returns the models that `loss.teachers` names."""
    return [name.strip() for name in config.loss.teachers.split(",") if name.strip()]


def mixture(**sources: ConfigDict) -> ConfigDict:
    """Returns sources by name, for `data.mixture`."""
    return ConfigDict(sources)


def _model() -> ConfigDict:
    model = ConfigDict()
    model.name = "ViT-B/32"  # one of clip_jax.available_models()
    # Compute dtype: "float32" | "bfloat16" | "auto" (bfloat16, on a CPU float32).
    model.dtype = "auto"
    model.scan_layers = True  # run transformer layers in lax.scan (compiles fast), or unroll them
    # Activations recomputed in the backward pass, from the least memory to the least time: "full"
    # (all but the input of each layer) | "attention" (its output is kept) | "qkv" (so are queries,
    # keys and values) | "residual" (and the input of the MLP) | "mlp" (and its hidden units) |
    # "none". Or a policy of jax.checkpoint_policies: "nothing_saveable" | "dots_saveable" |
    # "dots_with_no_batch_dims_saveable" | "everything_saveable".
    model.remat = "none"
    model.text_remat = ""  # the same for the text tower; "": as model.remat
    # Attention of the transformers: "xla" | "pallas" (kernels for TPUs, of LayerNorm too) | "cudnn"
    # (NVIDIA's, in bfloat16) | "auto" (the kernels on TPUs where they fit, else XLA's).
    model.attention = "auto"
    model.patch_dropout = 0.0  # fraction of the patches that a ViT leaves out in training
    # Packing: several captions share a row of the contrastive text tower, so that little compute is
    # spent on padding. Results are the same; the rows needed depend on the captions: see
    # docs/scale.md.
    model.packing = ConfigDict()
    model.packing.length = 80  # tokens in a row, at least context_length; 0: one caption a row
    # Rows per caption, above 0, up to 1; a batch that needs more rows is computed in further passes
    # of as many.
    model.packing.rows = 0.3
    model.size = _size()
    return model


def _size() -> ConfigDict:
    """Overrides of the named model's size, for models that have no name; None: as named.

    `Size` in clip_jax/models/sizes.py documents the fields.
    """
    size = ConfigDict()
    for name, kind in sizes.configurable().items():
        size[name] = placeholder(kind)
    return size


def _mesh() -> ConfigDict:
    mesh = ConfigDict()
    # TPU slices joined by the data-centre network; each takes a part of the batch.
    mesh.slices = 1
    mesh.data = -1  # devices along the pure data axis; -1: all that remain
    mesh.fsdp = 1  # devices that parameters and optimiser state are sharded over as well
    mesh.tensor = 1  # devices that the heads and hidden units of blocks are split over
    mesh.zero1 = True  # shard the optimiser over the data axis too (ZeRO, stage 1)
    return mesh


def _loss() -> ConfigDict:
    loss = ConfigDict()
    loss.name = "softmax"  # contrastive loss: "softmax" (paper) | "sigmoid" (SigLIP)
    # "all_gather" (fewer operations) | "ring" (memory of one tile of logits).
    loss.method = "all_gather"
    loss.tile = 1024  # ring: rows and columns of a tile of logits
    # softmax: fraction of each target that is spread over all texts, or all images, of the batch.
    loss.label_smoothing = 0.0
    # Matryoshka: numbers of first features, as (64, 128), whose losses are added to that of all.
    loss.widths = ()
    # Fraction of the loss that is distillation (MobileCLIP): the divergence of the similarities
    # from those of teachers. The rest is the contrastive loss.
    loss.distillation = 0.0
    # Teachers that run beside the model, comma-separated: whatever clip_jax.load takes. Those that
    # the data keep come before them; see source.teacher_keys.
    loss.teachers = ""
    # Multiplier of each teacher's similarities; (): what the running ones have learned.
    loss.teacher_scales = ()
    # Weight of the loss of captioning, nats per token, beside the contrastive one (openMaMMUT: 2).
    # 0: none. Its decoder is model.size.text_decoder_layers, by default those of the text tower.
    loss.captioning = 0.0
    # Weight of SimCLR's loss of two further views of each image, made by data.views (SLIP: 1). 0:
    # none. Its head is model.size.views_mlp and .views_embed, by default SLIP's 4096 and 256.
    loss.views = 0.0
    loss.views_temperature = 0.1  # divisor of the similarities of views
    loss.temperature = 0.07  # near_duplicates: divisor of the similarities; fixed, as in the paper
    return loss


def _optim() -> ConfigDict:
    optim = ConfigDict()
    # "adamw" (paper) | "lion" | "adafactor" (as in big_vision) | "lamb" | "muon" (the matrices of
    # transformer blocks; adamw for the others). b1, b2 and eps are theirs where they have them.
    optim.name = "adamw"
    optim.learning_rate = 5e-4  # peak learning rate
    optim.warmup = "2000 steps"  # duration of the linear warm-up
    # Curve after the warm-up: "cosine", down to final_fraction | "constant" | "rsqrt", an inverse
    # square root. With the last two a run may be made longer, or cooled down, when it is resumed.
    optim.schedule = "cosine"
    optim.timescale = "10000 steps"  # rsqrt: duration after the warm-up in which it falls to 0.71
    optim.cooldown = "0 steps"  # constant, rsqrt: last part of the run, down to final_fraction
    optim.cooldown_shape = "linear"  # "linear" | "sqrt" (1 - sqrt, fast at first)
    optim.final_fraction = 0.0  # learning rate at the end, as a fraction of the one before it falls
    # Factors on the learning rate, "PATTERN=FACTOR" separated by spaces: regular expressions on the
    # paths of parameters, whose layers have numbers ("image/transformer/blocks/3/mlp_in/kernel").
    # 0 freezes: "^image/=0" is LiT. Each must find something; no two may differ on a parameter.
    optim.factors = ""
    optim.b1 = 0.9  # decay rate of the first moment
    optim.b2 = 0.98  # decay rate of the second moment; paper: 0.98 for ViT, 0.999 for ResNet
    optim.eps = 1e-6  # Adam's epsilon; paper: 1e-6 for ViT, 1e-8 for ResNet
    optim.muon_momentum = 0.95  # muon: decay rate of its first moment
    # Decoupled. Each step takes weight_decay times the learning rate of every parameter that
    # decays, as in PyTorch's AdamW; if independent, as in big_vision, weight_decay times the
    # learning rate's fraction of its peak. Independent 1e-4 at a peak of 1e-3 is 0.1 otherwise.
    optim.weight_decay = 0.2
    optim.independent_decay = False
    # Regular expression on the paths of the parameters that decay. Paper: all but gains, biases and
    # logit_scale. By name, not by rank: the gains of stacked layers are matrices.
    optim.decay_params = "(kernel|embedding|positions|class_token|probe)$"
    optim.grad_clip_norm = 0.0  # bound on the global gradient norm; 0: none
    optim.max_logit_scale = 100.0  # bound on the multiplier exp(logit_scale)
    # Decay rate a step of a moving average of the parameters, which is evaluated beside them (as
    # ema/...) and saved: WORKDIR/ema is a model; 0: none. In the first steps it is less.
    optim.ema_decay = 0.0
    # Storage of the moments: "float32" | "bfloat16" (with stochastic rounding).
    optim.moment_dtype = "float32"
    # Regular expression on the paths of the parameters to store in bfloat16, with stochastic
    # rounding; "": none. Paper: "^text/".
    optim.bf16_params = ""
    return optim


def _step() -> ConfigDict:
    step = ConfigDict()
    # Seconds without a step after which the run says what each host was doing, and ends for a
    # restart; 0: none. Waits for data have data.stall_timeout in addition, evaluations and
    # checkpoints six times this without a sign of life.
    step.timeout = 900.0
    # At a loss or gradient norm that is NaN or infinite: "stop" the run | "skip" the step, which
    # then changes neither model nor optimiser.
    step.nonfinite = "stop"
    # skip: gradient norm, before clipping, above which a step is skipped too; 0: none. Should be
    # several times the train/grad_norm of healthy steps.
    step.max_grad_norm = 0.0
    # skip: steps skipped in a row, above which the run goes back to the last checkpoint before them
    # and on from there, past the examples read since then.
    step.max_skipped = 10
    step.max_rollbacks = 3  # skip: number of times that a run may go back so; then it ends
    # skip: number of skipped batches to save in the workdir, for inspection; 0: none. One takes
    # batch_size x image_size^2 x 3 bytes.
    step.saved_batches = 3
    return step


def _data() -> ConfigDict:
    data = ConfigDict()
    data.source = source()
    # Several sources by name, in proportion to their weights; none: `source` alone. In a config
    # file: config.data.mixture = default.mixture(mine=source(...), theirs=source(...)).
    data.mixture = mixture()
    # Captions of each image in a step, drawn by weight from its own; where it has fewer, all of
    # them before any comes twice. Together they are the positives of the image: docs/scale.md.
    data.captions = 1
    # "random" square (paper) | "resized" (RandomResizedCrop) | "center" square | "none" (squash).
    data.crop = "random"
    data.crop_scale = (0.9, 1.0)  # resized: least and greatest fraction of the area
    data.crop_ratio = (3 / 4, 4 / 3)  # resized: least and greatest width / height
    # Tokens that training keeps of captions longer than model.size.context_length (CLIPA): "none"
    # (the first ones) | "random" (drawn, in their order) | "shuffle" (drawn, in any order) |
    # "block" (neighbours, from a place drawn at random) | "syntax" (nouns, then adjectives, then
    # verbs; for English, and needs NLTK). Evaluation keeps the first ones.
    data.text_mask = "none"
    # Augmentation on the device: probability of each change, and the greatest change by jitter as a
    # fraction (0.4: a factor of 0.6 to 1.4). The paper has none of it.
    data.augment = ConfigDict()
    data.augment.flip = 0.0  # probability of mirroring; left and right in captions become wrong
    data.augment.jitter = 0.0  # probability of changing brightness, contrast and saturation
    data.augment.grey = 0.0  # probability of removing the colour
    data.augment.brightness = 0.4  # greatest change, a fraction
    data.augment.contrast = 0.4  # greatest change, a fraction
    data.augment.saturation = 0.4  # greatest change, a fraction
    # near_duplicates: the two views of each image, made on the device. The paper names these
    # changes, but not their strengths.
    data.views = ConfigDict()
    data.views.scale = (0.4, 1.0)  # least and greatest fraction of the area in the crop
    data.views.ratio = (3 / 4, 4 / 3)  # least and greatest width / height of the crop
    data.views.angle = 10.0  # greatest rotation in degrees
    data.views.shrink = 0.4  # least fraction of the side that it is downsampled to, and back
    data.views.hue = 0.05  # greatest shift of the hue, as a fraction of the circle
    data.views.saturation = 0.4  # greatest change, a fraction: a factor of 0.6 to 1.4
    data.views.value = 0.4  # greatest change of the brightness, a fraction
    data.views.quality = (30.0, 95.0)  # least and greatest quality of JPEG compression
    # Order of the examples in each epoch: "shuffled" over the whole set | "windowed" (reads
    # neighbours together, where random reads are slow: docs/data.md) | "stored".
    data.order = "shuffled"
    # windowed: examples shuffled together, held in memory by all hosts together.
    data.shuffle_window = 32_768
    data.chunk = 32  # windowed: neighbouring examples read at once
    data.max_skipped = 0.1  # fraction of unusable examples above which the run stops
    data.threads = 0  # threads that read and decode on each host; 0: one per CPU core
    # Processes on each host that run these threads, where the GIL limits a single one; 0: only
    # the trainer's own; -1: from 16 CPU cores on, one for every four; else 0.
    data.processes = -1
    data.prefetch = 2  # batches held ready on the host, and the same number on the device
    # Seconds without a batch after which the run stops, naming the cause.
    data.stall_timeout = 600.0
    return data


def _eval() -> ConfigDict:
    evals = ConfigDict()
    evals.every = "1 epochs"  # and once at the end of the run
    evals.batch_size = 1024  # images or captions per step, over all devices of all hosts
    # Labelled images, to be classified by prompts; logged as zeroshot/top1.
    zeroshot = ConfigDict()
    zeroshot.source = source()  # type "": none
    zeroshot.class_names = ()  # (): the source's own; alternatives of one class joined by "|"
    zeroshot.templates = ("a photo of a {}.",)  # prompts whose embeddings are averaged
    evals.zeroshot = zeroshot
    # Captioned images, to be retrieved; logged as retrieval/text_to_image/recall@1 and so on.
    # near_duplicates: images whose second view is to be retrieved.
    retrieval = ConfigDict()
    retrieval.source = source()  # type "": none
    retrieval.max_examples = 5000  # at most this many examples, the first ones
    evals.retrieval = retrieval
    # Data sets that clip_jax knows, and others by path: names, collections and paths,
    # comma-separated; "": none. Logged as TASK/DATASET/METRIC.
    evals.datasets = ""
    evals.data_dir = ""  # directory of these data sets; "": only embedded and TFDS's own
    # Their tasks, comma-separated: "zeroshot" | "retrieval" | "near_duplicates" | "linear_probe" |
    # "few_shot" | "robustness" | "bias".
    evals.tasks = "zeroshot"
    # The remaining settings are for all data sets, and are the defaults of clip_jax evaluate.
    evals.prompts = "paper"  # set of prompts: "paper" | "clip_benchmark"
    evals.retrieval_prompt = "a photo of {}"  # prompt that captions are also tried with
    evals.confidence = 0.995  # coverage of confidence intervals
    evals.shots = (1, 2, 4, 8, 16)  # few-shot probes: training examples per class
    evals.repeats = 3  # few-shot probes: random draws of the training examples
    evals.label_thresholds = (0.005, 0.04)  # least probabilities of a label, bias probes
    evals.overlap_threshold = 0.95  # least cosine of near-duplicates
    return evals


def _checkpoint() -> ConfigDict:
    checkpoint = ConfigDict()
    # Interval of checkpoints, a time or a duration. One more is saved at the end of the run, when
    # it is asked to stop (SIGTERM, SIGHUP, Ctrl-C), and where best_metric reaches a new height.
    checkpoint.every = "10 minutes"
    checkpoint.keep = 3  # number of most recent checkpoints to keep
    # The checkpoint with the highest value of this metric is kept too; "": none.
    checkpoint.best_metric = "zeroshot/top1"
    # Seconds for which saves may fail, on a full disk for instance, before the run ends. Training
    # goes on meanwhile. With several hosts the first failure ends the run.
    checkpoint.give_up_after = 3600.0
    checkpoint.allow_config_change = False  # resume although settings that change results differ
    # Resume on other training data: order, epochs and the length of the schedule change.
    checkpoint.allow_data_change = False
    return checkpoint


def _log() -> ConfigDict:
    log = ConfigDict()
    log.every = "50 steps"  # interval of rows in metrics.jsonl, TensorBoard and the progress line
    log.tensorboard = True  # write TensorBoard events beside metrics.jsonl
    # Experiment trackers that get the rows too, comma-separated: "wandb" | "mlflow" | "trackio";
    # "": none. Server, account and key are those of the tracker's own environment variables.
    log.trackers = ""
    log.project = "clip_jax"  # project there; of MLflow the experiment
    log.trace = ""  # step at which a trace for XProf begins, "200 steps"; "": only at SIGUSR2
    log.trace_steps = 5  # steps in a trace
    return log
