"""The baselines of figure 2: models, losses and scores against NumPy in float64."""

import functools
import math

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import numpy_models
import pytest
import reference
import tiny

from clip_jax import choices, losses, models, sharding
from clip_jax import state as train_state
from clip_jax.configs import default, figure2
from clip_jax.errors import UserError
from clip_jax.models import captioner, clip
from clip_jax.models import prompts as prompts_module
from clip_jax.training import objectives, program, validation

BAG = {"text_pool": "bag", "text_layers": 0}
EXACT = {"rtol": 1e-5, "atol": 1e-5}


@functools.cache
def model(objective: str = "contrastive", **size):
    """A model whose variables are all of size 1 or so, a batch, and the image features."""
    net = tiny.make_net("vit", {"objective": objective, **size})
    batch = tiny.make_batch(net)
    shapes = jax.eval_shape(net.init, jax.random.key(0), batch["image"], batch["tokens"])
    rng = np.random.default_rng(1)
    variables = jax.tree.map(lambda x: rng.normal(0, 0.3, x.shape).astype(np.float32), shapes)
    features = jax.jit(functools.partial(net.apply, method="image_features"))
    return net, variables, batch, np.asarray(features(variables, batch["image"]), np.float64)


def parameters(variables) -> dict:
    return jax.tree.map(lambda x: np.asarray(x, np.float64), variables["params"])


def words_of(row: np.ndarray) -> list[int]:
    """The caption's own tokens."""
    return list(row[1 : list(row).index(max(row))])


def log_softmax(x: np.ndarray) -> np.ndarray:
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


# ---- Captioning --------------------------------------------------------------------------------


def token_logs(feature: np.ndarray, row: np.ndarray, p: dict) -> list[float]:
    """Log-probabilities of the tokens of one caption behind its start token, the end token last."""
    text, end = p["text"], list(row).index(max(row))
    embedding = text["token_embed"]["embedding"]
    prefix = np.einsum("e,epw->pw", feature, p["prefix"]["kernel"]) + p["prefix"]["bias"]
    read = embedding[row[:end]] + text["positions"][:end]
    x = numpy_models.transformer(
        np.concatenate([prefix, read])[None], text["transformer"]["blocks"], causal=True
    )
    logits = numpy_models.layer_norm(x[0, 4:], text["ln_final"]) @ embedding.T
    return [float(log_softmax(logits)[i, row[i + 1]]) for i in range(end)]


def test_captioning_equals_numpy():
    net, variables, batch, features = model("captioning")
    p = parameters(variables)
    logs = [token_logs(f, row, p) for f, row in zip(features, batch["tokens"])]
    nats, predictions = jax.jit(net.apply)(variables, batch["image"], batch["tokens"])
    np.testing.assert_allclose(nats, [-sum(each) for each in logs], **EXACT)
    np.testing.assert_array_equal(predictions, [len(each) for each in logs])
    assert len(set(map(len, logs))) > 3
    # Every token counts the same, whatever caption it is of.
    mean = -np.mean(np.concatenate(logs))
    assert float(losses.prediction_loss(nats, predictions)) == pytest.approx(mean, rel=1e-5)


def test_a_caption_is_likely_by_its_past_alone_and_padding_changes_nothing():
    net, variables, batch, _ = model("captioning")
    call, ends = jax.jit(net.apply), batch["tokens"].argmax(axis=1)
    before, _ = call(variables, batch["image"], batch["tokens"])
    padded = batch["tokens"].copy()
    padded[np.arange(padded.shape[1]) > ends[:, None]] = 5
    np.testing.assert_array_equal(call(variables, batch["image"], padded)[0], before)
    other = batch["image"][::-1].copy()
    assert np.abs(call(variables, other, batch["tokens"])[0] - before).min() > 1e-3


def test_probabilities_of_all_captions_of_one_word_sum_to_that_of_a_word():
    """Captions that end at once and those that continue add up to a distribution."""
    net, variables, batch, features = model("captioning")
    start, end = net.size.vocab_size - 2, net.size.vocab_size - 1
    prompts = np.zeros((net.size.vocab_size - 1, 4), np.int32)
    prompts[:, 0], prompts[:, 1], prompts[:, 2] = start, np.arange(len(prompts)), end
    score = jax.jit(functools.partial(net.apply, method="score"))
    prepared = prompts_module.prepare(prompts)
    found = np.exp(np.asarray(score(variables, batch["image"][:3], prepared), np.float64))
    p = parameters(variables)
    for row, feature in zip(found, features):
        wanted = [np.exp(sum(token_logs(feature, prompt, p))) for prompt in prompts[::9]]
        np.testing.assert_allclose(row[::9], wanted, rtol=1e-4)
        at_once = np.exp(token_logs(feature, np.array([start, end, 0, 0]), p)[0])
        assert 0 < row.sum() < 1 - at_once


def largest(jaxpr) -> int:
    """Elements of the largest array that is ever made."""
    sizes = [0]
    for eqn in jaxpr.eqns:
        sizes += [math.prod(getattr(var.aval, "shape", ())) for var in eqn.outvars]
        sizes += [largest(inner) for inner in jax.extend.core.jaxprs_in_params(eqn.params)]
    return max(sizes)


def test_logits_of_a_whole_batch_never_exist():
    """Nor do their gradients; and both are those of the plain form."""
    b, length, width, vocabulary = 4, 21, 8, 300
    rng = np.random.default_rng(0)
    states = rng.normal(size=(b, length, width)).astype(np.float32)
    embedding = rng.normal(size=(vocabulary, width)).astype(np.float32)
    wanted = rng.integers(0, vocabulary, (b, length)).astype(np.int32)
    weights = rng.normal(size=(b, length)).astype(np.float32)

    def bounded(states, embedding):
        return jnp.sum(weights * captioner.token_nats(states, embedding, wanted))

    def plain(states, embedding):
        logs = jax.nn.log_softmax(states @ embedding.T)
        return -jnp.sum(weights * jnp.take_along_axis(logs, wanted[..., None], 2)[..., 0])

    made = {
        f: largest(jax.make_jaxpr(jax.value_and_grad(f, (0, 1)))(states, embedding).jaxpr)
        for f in (bounded, plain)
    }
    assert made[plain] >= b * length * vocabulary
    assert made[bounded] <= b * captioner.POSITIONS * vocabulary
    (value, grads), (want, wants) = (
        jax.jit(jax.value_and_grad(f, (0, 1)))(states, embedding) for f in (bounded, plain)
    )
    assert float(value) == pytest.approx(float(want), rel=1e-5)
    for got, expected in zip(grads, wants):
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


# ---- Bags of words -----------------------------------------------------------------------------


def bag_log(feature: np.ndarray, row: np.ndarray, p: dict) -> float:
    """Minus the cross-entropy of the caption's multi-hot target, normalised."""
    target = np.zeros(p["head"]["bias"].shape)
    target[words_of(row)] = 1
    logs = log_softmax(feature @ p["head"]["kernel"] + p["head"]["bias"])
    return float(target @ logs / target.sum())


def repeated(tokens: np.ndarray) -> np.ndarray:
    """Captions in half of which a word stands twice or more."""
    tokens = tokens.copy()
    tokens[::2, 2] = np.where(tokens[::2].argmax(axis=1) > 2, tokens[::2, 1], tokens[::2, 2])
    return tokens


def test_bag_of_words_equals_numpy():
    net, variables, batch, features = model("bag_of_words")
    tokens, p = repeated(batch["tokens"]), parameters(variables)
    assert any(len(set(words_of(row))) < len(words_of(row)) for row in tokens)
    nats, predictions = jax.jit(net.apply)(variables, batch["image"], tokens)
    wanted = [-bag_log(f, row, p) for f, row in zip(features, tokens)]
    np.testing.assert_allclose(nats, wanted, **EXACT)
    loss = losses.prediction_loss(nats, predictions)
    assert float(loss) == pytest.approx(np.mean(wanted), rel=1e-5)


def test_a_text_tower_of_no_layers_is_the_mean_of_the_words():
    net, variables, batch, _ = model(**BAG)
    p, encode = parameters(variables)["text"], jax.jit(net.apply, static_argnames="method")
    tokens = batch["tokens"]
    means = [p["token_embed"]["embedding"][words_of(row)].mean(axis=0) for row in tokens]
    wanted = numpy_models.layer_norm(np.stack(means), p["ln_final"]) @ p["projection"]["kernel"]
    found = encode(variables, tokens, method="encode_text")
    np.testing.assert_allclose(found, numpy_models.unit(wanted), **EXACT)
    turned = tokens.copy()
    for row in turned:
        row[1 : row.argmax()] = row[1 : row.argmax()][::-1].copy()
    np.testing.assert_allclose(encode(variables, turned, method="encode_text"), found, atol=1e-6)


# ---- Scores of classes -------------------------------------------------------------------------

LOGS = {"captioning": lambda *of: sum(token_logs(*of)), "bag_of_words": bag_log}


@pytest.mark.parametrize("objective", LOGS)
def test_class_scores_by_enumeration(objective: str):
    net, variables, batch, features = model(objective)
    prompts = repeated(batch["tokens"])[:9]
    prompts[8] = prompts[7]
    prompts[7, 2:] = [net.size.vocab_size - 1, *np.zeros(prompts.shape[1] - 3, int)]
    class_ids = np.array([0, 0, 1, 2, 2, 2, 1, 0, 3])
    score = jax.jit(functools.partial(prompts_module.class_scores, net), static_argnums=4)
    found = score(variables, batch["image"][:5], prompts_module.prepare(prompts), class_ids, 4)
    p = parameters(variables)
    for i in range(5):
        for c in range(4):
            likely = [
                math.exp(LOGS[objective](features[i], prompt, p))
                for prompt, class_id in zip(prompts, class_ids)
                if class_id == c
            ]
            assert float(found[i, c]) == pytest.approx(math.log(np.mean(likely)), abs=2e-4)


def test_prompts_share_their_prefixes():
    """One is the prefix of another, one stands twice."""
    rows = [[8, 1, 2, 9, 0, 0], [8, 1, 9, 0, 0, 0], [8, 3, 1, 2, 9, 0], [8, 1, 9, 0, 0, 0]]
    found = prompts_module.prepare(np.array(rows, np.int32))
    np.testing.assert_array_equal(found.tokens, np.array(rows)[:, :5])
    spans = zip(found.prefix_prompt, found.prefix_end)
    prefixes = [rows[prompt][: end + 1] for prompt, end in spans]
    distinct = [[8], [8, 1], [8, 1, 2], [8, 3], [8, 3, 1], [8, 3, 1, 2]]
    assert sorted(prefixes) == distinct
    for row, own in zip(rows, found.prefix_ids):
        for end in range(row.index(9)):
            assert prefixes[own[end]] == row[: end + 1]
        last = own[row.index(9) - 1]
        assert rows[found.prefix_prompt[last]] == row  # the one that ends there


# ---- Sizes, parameters and where they live ------------------------------------------------------


def test_the_transformer_that_writes_has_63_million_parameters():
    """The paper's number; and nothing large of any of these models is whole on a device."""
    counts = {}
    optimizer = tiny.make_optimizer()
    for line, overrides in figure2.LINES.items():
        config = figure2.get_config(line)
        net = program.make_net(config, sharding.make_mesh(1, 8))
        state = train_state.abstract_state(net, optimizer, sharding.make_mesh(1, 8))
        counts[line] = {
            name: train_state.count_params(part) / 1e6 for name, part in state.params.items()
        }
        assert net.size.objective == overrides.get("objective", "contrastive")
        for path, leaf in jax.tree.leaves_with_path(state):
            if leaf.size > 500_000:
                assert "fsdp" in leaf.sharding.spec, (line, sharding.path_name(path))
    assert counts["captioning"]["text"] == pytest.approx(63.2, abs=0.1)
    assert counts["bag_contrastive"]["text"] == pytest.approx(25.8, abs=0.1)
    assert counts["bag_of_words"]["head"] == pytest.approx(50.6, abs=0.1)
    assert len({line["image"] for line in counts.values()}) == 1


def test_the_transformer_that_writes_is_split_by_the_tensor_axis():
    optimizer = tiny.make_optimizer()
    net = tiny.make_net("vit", {"objective": "captioning"})
    state = train_state.abstract_state(net, optimizer, tiny.make_mesh(1, 2, 4))
    blocks = state.params["text"]["transformer"]["blocks"]
    for part, axis in (("mlp_in", 2), ("mlp_out", 1), ("attn_out", 1)):
        assert blocks[part]["kernel"].sharding.spec[axis] == "tensor", part


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"objective": "translation"}, r"objective is 'translation'.*captioning"),
        ({"text_pool": "bag"}, r"text_layers is 2.*text_pool 'bag'.*text_layers=0"),
        ({"text_layers": 0}, r"text_layers is 0.*text_pool 'end'"),
        ({**BAG, "objective": "captioning"}, r"only they write captions"),
    ],
)
def test_sizes_that_do_not_go_together(overrides: dict, message: str):
    with pytest.raises(UserError, match=message):
        tiny.make_net("vit", overrides)


def test_bags_of_words_cannot_be_packed():
    with pytest.raises(UserError, match=r"--config\.model\.packing\.length=0"):
        models.create("ViT-B/32", size=BAG, packing={"length": 80, "rows": 0.3})


@pytest.mark.parametrize("line", figure2.LINES)
def test_configs_of_figure_2(line: str):
    config = figure2.get_config(f"{line},smoke")
    validation.validate(config)
    _, net = program.make_mesh_and_net(config)
    assert net.size.is_resnet
    assert net.size.image_size == 32
    with pytest.raises(UserError, match=r"captioning.*smoke"):
        figure2.get_config(line[:-1])


def test_every_table_names_the_same_objectives():
    assert set(objectives.OBJECTIVES) == set(models.MODULES) == set(choices.OBJECTIVES)


@pytest.mark.parametrize(
    "setting",
    [
        {"data.captions": 2},
        {"loss.label_smoothing": 0.1},
        {"data.source.weight_key": "score"},
        {"loss.widths": (8,)},
        {"loss.captioning": 2.0},
        {"loss.views": 1.0},
    ],
)
@pytest.mark.parametrize("objective", ["captioning", "bag_of_words", "near_duplicates"])
def test_forms_of_the_contrastive_loss_are_refused_elsewhere(objective: str, setting: dict):
    config = default.smoke(default.get_config().unlock())
    config.data.source = default.source(type="tar", path="somewhere")
    config.update_from_flattened_dict(setting)
    validation.validate(config)
    config.objective = objective
    name = next(iter(setting)).rpartition(".")[2]
    with pytest.raises(UserError, match=rf"{name} is .*objective={objective}"):
        validation.validate(config)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"loss.label_smoothing": 1.0}, r"label_smoothing is 1\.0.*below 1"),
        ({"loss.label_smoothing": -0.1}, r"label_smoothing is -0\.1"),
        ({"loss.widths": (4, 8, 4)}, r"widths is \(4, 8, 4\), and names a width twice"),
        (
            {"loss.label_smoothing": 0.1, "loss.name": "sigmoid"},
            r"only loss\.name=softmax .* sigmoid judges every pair",
        ),
    ],
)
def test_losses_that_there_are_not(setting: dict, message: str):
    config = default.smoke(default.get_config().unlock())
    config.update_from_flattened_dict(setting)
    with pytest.raises(UserError, match=message):
        validation.validate(config)


@pytest.mark.parametrize("width", [0, 32, 100, 7.5])
def test_widths_that_the_model_does_not_have(width: float):
    config = default.smoke(default.get_config().unlock())
    config.loss.widths = (8, width)
    with pytest.raises(UserError, match=rf"loss\.widths names {width}, .* have 32 features"):
        program.make_mesh_and_net(config)


@pytest.mark.parametrize("method", choices.LOSS_METHODS)
@pytest.mark.parametrize("name", ["softmax", "sigmoid"])
def test_nested_widths_add_up(name: str, method: str):
    """Value and gradients are the sums over widths, through the length of the cut vectors."""
    config = default.smoke(default.get_config().unlock())
    config.loss.update(name=name, method=method, tile=2, widths=(5, 12))
    mesh = sharding.make_mesh(2, 4)
    images, texts = reference.pairs(16, 32, captions=2)
    scalars, weights = ((2.0,), (2.0, -3.0))[name == "sigmoid"], np.arange(16, dtype=np.float32)
    wanted_loss = reference.softmax_loss if name == "softmax" else reference.sigmoid_loss
    wants = [0.0, np.zeros(images.shape), np.zeros(texts.shape), *np.zeros(len(scalars))]
    for width in (5, 12, 32):
        cut = [x[..., :width].astype(np.float64) for x in (images, texts)]
        lengths = [np.linalg.norm(x, axis=-1, keepdims=True) for x in cut]
        units = [x / length for x, length in zip(cut, lengths)]
        value, *grads = wanted_loss(*units, *scalars, weights=weights)
        for i, (unit, length) in enumerate(zip(units, lengths)):
            inward = np.sum(grads[i] * unit, axis=-1, keepdims=True) * unit
            if width < 32:  # the whole embeddings are not normalised again
                grads[i] = (grads[i] - inward) / length
            wants[1 + i][..., :width] += grads[i]
        wants[0] += value
        for i in range(len(scalars)):
            wants[3 + i] += grads[2 + i]
    loss, _ = objectives.OBJECTIVES["contrastive"](config, mesh)
    batch = {"weight": jnp.asarray(weights)}
    arguments = dict(zip(clip.PAIRS, map(jnp.float32, (images, texts, *scalars))))
    with jax.set_mesh(mesh):
        (value, _), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(arguments, batch)
    for got, want in zip((value, *(grads[name] for name in arguments)), wants):
        assert reference.relative_error(got, want) < 1e-5


def test_unknown_objective():
    config = figure2.get_config("smoke")
    config.objective = "captions"
    with pytest.raises(UserError, match=r"objective is 'captions'.*captioning, bag_of_words"):
        validation.validate(config)


def test_the_tensor_axis_needs_no_heads_of_a_text_tower_that_is_not_there():
    net = models.create("RN50", size={"objective": "bag_of_words"})
    program.check_tensor(net.size, 5)
    with pytest.raises(UserError, match=r"text_heads 8"):
        program.check_tensor(models.get_size("RN50"), 5)
