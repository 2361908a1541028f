"""ViT-B/32 and RN50 against open_clip's PyTorch: same weights, same batch, same numbers.

The weights are open_clip's random initialisation, carried over by the table of
`clip_jax.weights.convert`, a linear map of tensors, which carries gradients over as well.
"""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import pytest

from clip_jax import losses, models
from clip_jax.weights.convert import openai
from clip_jax.weights.convert.mapping import import_tensors
from clip_jax.weights.model import Tensors, variable_shapes

torch = pytest.importorskip("torch")
open_clip = pytest.importorskip("open_clip")

BATCH = 4
NAMES = {"ViT-B/32": "ViT-B-32-quickgelu", "RN50": "RN50-quickgelu"}  # ours: open_clip's
Arrays = Mapping[str, np.ndarray]


# ---- Weights by name ---------------------------------------------------------------------------


def to_clip_jax(tensors: Arrays, size: models.Size, part: str = "params") -> dict:
    """One collection of our variables, or gradients, from open_clip's names."""
    table = [row for row in openai.table(size) if row.pieces[0].path.startswith(f"{part}/")]
    wanted = variable_shapes(size).items()
    wanted = {path: shape for path, shape in wanted if path.startswith(f"{part}/")}
    shapes = {name: value.shape for name, value in tensors.items()}
    theirs = Tensors(shapes, tensors.__getitem__)
    ours = import_tensors(table, theirs, wanted, "open_clip")
    return nest({path.removeprefix(f"{part}/"): ours.read(path) for path in wanted})


def batch_stats(buffers: Arrays, size: models.Size) -> dict:
    """The running statistics of every BatchNorm."""
    kept = {name: value for name, value in buffers.items() if "running" in name}
    return to_clip_jax(kept, size, "batch_stats")


def nest(flat: Mapping[str, Any]) -> dict:
    """{"a/b": x} -> {"a": {"b": x}}."""
    tree: dict = {}
    for path, leaf in flat.items():
        *parents, last = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = leaf
    return tree


# ---- The two sides -----------------------------------------------------------------------------


def make_torch_model(size: models.Size, name: str) -> torch.nn.Module:
    """A random open_clip model of these shapes; nothing is downloaded."""
    config = open_clip.get_model_config(NAMES[name])
    config["vision_cfg"]["image_size"] = size.image_size
    config["text_cfg"]["layers"] = size.text_layers
    if not size.is_resnet:
        config["vision_cfg"]["layers"] = size.image_layers[0]
    torch.manual_seed(0)
    model = open_clip.model.CLIP(**config, output_dict=True)
    # Gains that start at zero and statistics that start at (0, 1) would hide mistakes.
    for path, module in model.named_modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            in_block = path.startswith("visual.layer")
            low, high = (0.1, 0.3) if in_block and path.endswith("bn3") else (0.5, 1.5)
            torch.nn.init.uniform_(module.weight, low, high)
            torch.nn.init.uniform_(module.bias, -0.2, 0.2)
            torch.nn.init.uniform_(module.running_mean, -0.2, 0.2)
            torch.nn.init.uniform_(module.running_var, 0.5, 1.5)
    return model


def make_batch(size: models.Size) -> tuple[np.ndarray, np.ndarray]:
    """Normalised images [b, h, w, 3] and captions of several lengths, padded with zeros."""
    rng = np.random.default_rng(2)
    images = rng.normal(size=(BATCH, size.image_size, size.image_size, 3)).astype(np.float32)
    tokens = np.zeros((BATCH, size.context_length), np.int32)
    for row, length in zip(tokens, (3, 9, 40, size.context_length)):
        row[1 : length - 1] = rng.integers(1, size.vocab_size - 2, length - 2)
        row[0], row[length - 1] = size.vocab_size - 2, size.vocab_size - 1
    return images, tokens


def to_numpy(named_tensors) -> dict[str, np.ndarray]:
    return {name: tensor.detach().numpy().copy() for name, tensor in named_tensors}


def variables_of(model: torch.nn.Module, size: models.Size) -> dict:
    variables = {"params": to_clip_jax(to_numpy(model.named_parameters()), size)}
    if size.is_resnet:
        variables["batch_stats"] = batch_stats(to_numpy(model.named_buffers()), size)
    return variables


def torch_run(model: torch.nn.Module, size: models.Size, batch: tuple, train: bool) -> dict:
    """Embeddings, loss, gradients and running statistics after it, in the model's dtype."""
    images, tokens = (torch.from_numpy(array) for array in batch)
    images = images.permute(0, 3, 1, 2).to(model.logit_scale.dtype)
    out = model.train(train)(images, tokens.long())
    loss = open_clip.ClipLoss()(out["image_features"], out["text_features"], out["logit_scale"])
    loss.backward()
    grads = to_numpy((name, value.grad) for name, value in model.named_parameters())
    buffers = to_numpy(model.named_buffers())
    return {
        "image": out["image_features"].detach().numpy(),
        "text": out["text_features"].detach().numpy(),
        "loss": loss.item(),
        "grads": to_clip_jax(grads, size),
        "batch_stats": batch_stats(buffers, size) if size.is_resnet else {},
    }


def jax_run(
    net: models.CLIP, variables: dict, batch: tuple, train: bool, gradients: bool = True
) -> dict:
    def loss_fn(params):
        (image, text, logit_scale), updated = net.apply(
            variables | {"params": params}, *batch, train, mutable=["batch_stats"]
        )
        loss = losses.softmax_loss(image, text, logit_scale)
        return loss, {"image": image, "text": text, "loss": loss, **updated}

    step = jax.grad(loss_fn, has_aux=True) if gradients else lambda params: ({}, loss_fn(params)[1])
    grads, out = jax.jit(step)(variables["params"])
    return jax.device_get(out | {"grads": grads})


# ---- Comparison --------------------------------------------------------------------------------


def assert_outputs_agree(ours: dict, theirs: dict, tolerance: float):
    """Embeddings relative to their largest entry, the loss relative to itself."""
    for name in ("image", "text"):
        difference = np.abs(ours[name] - theirs[name]).max()
        assert difference < tolerance * np.abs(theirs[name]).max(), name
    assert ours["loss"] == pytest.approx(theirs["loss"], rel=tolerance)


def assert_gradients_agree(ours: dict, theirs: dict, tolerance: float):
    """The norm of each tensor's difference, relative to the norm of the tensor.

    Below 1e-4 of the whole gradient a tensor counts as that large: the gradient of an attention
    pool's key bias is zero but for rounding.
    """
    ours, theirs = (dict(_named_leaves(side["grads"])) for side in (ours, theirs))
    assert ours.keys() == theirs.keys()
    whole = np.sqrt(sum(np.sum(np.square(grad)) for grad in theirs.values()))
    for name, theirs_grad in theirs.items():
        difference = np.linalg.norm(ours[name] - theirs_grad)
        size = max(np.linalg.norm(theirs_grad), 1e-4 * whole)
        assert difference < tolerance * size, f"{name}: {difference / size:.1e}"


def _named_leaves(tree: Any) -> list[tuple[str, np.ndarray]]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return [(jax.tree_util.keystr(path, simple=True, separator="/"), leaf) for path, leaf in leaves]


# ---- Tests -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("layers", "scan"), [(12, True), (2, False)])
def test_vit_b32(layers: int, scan: bool):
    """Seen: embeddings 2e-6, loss 2e-7, gradients 1.4e-5; either framework is as far from the
    float64 result. The unrolled model is shortened because it compiles slowly."""
    overrides = {"image_layers": (layers,), "text_layers": layers}
    net = models.create("ViT-B/32", scan_layers=scan, size=overrides)
    model, batch = make_torch_model(net.size, "ViT-B/32"), make_batch(net.size)
    ours = jax_run(net, variables_of(model, net.size), batch, train=True)
    theirs = torch_run(model, net.size, batch, train=True)
    assert_outputs_agree(ours, theirs, 1e-5)
    assert_gradients_agree(ours, theirs, 1e-4)


@pytest.mark.parametrize("train", [False, True])
def test_rn50_outputs(train: bool):
    """Running statistics, or those of the batch and what they do to the running ones."""
    net = models.create("RN50")
    model, batch = make_torch_model(net.size, "RN50"), make_batch(net.size)
    variables = variables_of(model, net.size)
    ours = jax_run(net, variables, batch, train, gradients=False)
    theirs = torch_run(model, net.size, batch, train)
    assert_outputs_agree(ours, theirs, 1e-5)

    before, theirs = (dict(_named_leaves(x["batch_stats"])) for x in (variables, theirs))
    for name, ours_value in _named_leaves(ours["batch_stats"]):
        expected = theirs[name]
        if train and name.endswith("/var"):
            # PyTorch's running variance is the unbiased one, ours the biased one.
            count = BATCH * _side(name, net.size.image_size) ** 2
            expected = 0.9 * before[name] + (expected - 0.9 * before[name]) * (count - 1) / count
        np.testing.assert_allclose(ours_value, expected, rtol=1e-5, atol=1e-6, err_msg=name)


def _side(name: str, image_size: int) -> int:
    """Pixels along a side of what a BatchNorm sees."""
    if "stem" in name:
        return image_size // 2
    stage, block = (int(part.strip("stageblock")) for part in name.split("/")[1].split("_"))
    before_stride = block == 0 and stage > 1 and ("/bn1/" in name or "/bn2/" in name)
    return image_size // 4 // 2 ** (stage - 1 - before_stride)


def test_rn50_gradients():
    """The gradients agree to 2e-6, in float64 and at 64 px.

    In float32 the frameworks, and each with its own float64 result, agree to 1e-2 only: a rounding
    error that carries a ReLU's input over zero switches a path on or off.
    """
    size = {"image_size": 64, "text_layers": 2}  # the text tower is that of the ViT
    with jax.enable_x64(True):
        net = models.create("RN50", dtype=np.float64, size=size)
        model, batch = make_torch_model(net.size, "RN50").double(), make_batch(net.size)
        ours = jax_run(net, variables_of(model, net.size), batch, train=True)
    theirs = torch_run(model, net.size, batch, train=True)
    assert_outputs_agree(ours, theirs, 1e-6)
    assert_gradients_agree(ours, theirs, 1e-5)
