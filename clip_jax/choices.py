"""The values that named settings may take, each list once; imports nothing."""

# config.objective and `Size.objective`: training objectives. `models.MODULES` has the model of
# each, `objectives.OBJECTIVES` its loss and augmentation.
OBJECTIVES = ("contrastive", "captioning", "bag_of_words", "near_duplicates")

# config.loss.name and config.loss.method; see `clip_jax.losses`.
LOSS_NAMES = ("softmax", "sigmoid")
LOSS_METHODS = ("all_gather", "ring")

# config.model.dtype and config.optim.moment_dtype.
COMPUTE_DTYPES = ("auto", "float32", "bfloat16")
ATTENTIONS = ("auto", "xla", "pallas", "cudnn")  # config.model.attention
MOMENT_DTYPES = ("float32", "bfloat16")

# config.optim.name, config.optim.schedule and config.optim.cooldown_shape; see `clip_jax.optim`.
OPTIMIZERS = ("adamw", "lion", "adafactor", "lamb", "muon")
SCHEDULES = ("cosine", "constant", "rsqrt")
COOLDOWN_SHAPES = ("linear", "sqrt")

# config.step.nonfinite.
NONFINITE = ("stop", "skip")

# config.data.crop and config.data.order; see `data.crops` and `data.order`.
CROPS = ("random", "resized", "center", "none")
ORDERS = ("shuffled", "windowed", "stored")
TEXT_MASKS = ("none", "random", "shuffle", "block", "syntax")  # config.data.text_mask

# config.log.trackers; see `common.trackers`.
TRACKERS = ("wandb", "mlflow", "trackio")

# Forms of the towers, fields of `models.Size`.
ACTIVATIONS = ("quick_gelu", "gelu", "gelu_tanh", "swiglu")
GATED = ("swiglu",)  # of these, which take twice the units
NORMS = ("layer", "rms")
IMAGE_POOLS = ("class", "avg", "map")
IMAGE_POSITIONS = ("learned", "sincos")
TEXT_POOLS = ("end", "first", "last", "avg", "map", "bag")
IMAGE_CROPS = ("center", "none")
IMAGE_FILTERS = ("bilinear", "bicubic", "lanczos")
RESNET_ACTIVATIONS = ("relu", "gelu")
RESNET_NORMS = ("batch", "weight")

# evaluate --datasets: all data sets of the registry that are on disk.
AVAILABLE = "available"

# Prompt templates of classes for which nobody gives others: the paper's default.
TEMPLATES = ("a photo of a {}.",)
