"""Factors on the learning rate by parameter, and frozen parameters, against plain steps."""

import jax
import numpy as np
import pytest
import tiny
from tiny_plan import jaxpr_flops

from clip_jax import optim, sharding
from clip_jax import state as train_state
from clip_jax.errors import UserError

LIT = "^image/=0"
NOISE = "qkv/bias"  # a bias of the keys changes nothing, so Adam follows the rounding
BY_LAYER = "^text/transformer/blocks/0/=0 ^text/transformer/blocks/1/=0.5 ^image/class=0"
BY_LAYER += " ^image/transformer/blocks/0/=0.25"


def take_step(factors: str, *, axes=(1, 1), name="vit", size=None, **settings):
    """Takes a step; returns the parameters before and after, the new state and the program."""
    net, mesh = tiny.make_net(name, size), tiny.make_mesh(*axes)
    zero1 = axes != (1, 1)
    state = tiny.init_state(net, mesh, zero1=zero1, factors=factors)
    before = tiny.named_leaves(state.params)
    step = tiny.compile_step(
        net, mesh, state, tiny.put_batch(net, mesh), optim={"factors": factors}, zero1=zero1,
        **settings,
    )  # fmt: skip
    state, metrics = step(state, tiny.put_batch(net, mesh))
    return before, tiny.named_leaves(state.params), state, metrics, step


@pytest.fixture(scope="module")
def plain():
    return take_step("")


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"axes": (2, 2)},
        pytest.param({"skip_above": 1e9, "accum_steps": 2}, marks=pytest.mark.slow),
    ],
)
def test_a_frozen_tower_keeps_every_bit(plain, settings):
    before, after, state, metrics, _ = take_step(LIT, **settings)
    expected = plain[1]
    for name, value in after.items():
        if name.startswith("image/"):
            np.testing.assert_array_equal(value, before[name], err_msg=name)
        elif not name.endswith(NOISE):  # Adam works element by element: the others move as ever
            moved = np.abs(expected[name] - before[name]).max()
            np.testing.assert_allclose(value, expected[name], atol=0.02 * moved, err_msg=name)
            assert moved > 0, name
    moments = tiny.named_leaves(state.opt_state)
    assert not [name for name in moments if "image/" in name]
    assert [name for name in moments if "text/" in name]
    assert float(metrics["grad_norm/image"]) == 0.0
    assert float(metrics["param_norm/image"]) == pytest.approx(
        np.sqrt(sum(np.sum(np.square(before[n])) for n in before if n.startswith("image/"))), 1e-5
    )


@pytest.mark.slow
def test_a_frozen_tower_has_no_backward_pass():
    """A third of the work of a tower is its forward pass."""
    wide = {"image_width": 128, "image_layers": (6,), "image_size": 32}
    whole, text = (
        take_step(factors, size=wide)[-1].cost_analysis()["flops"] for factors in ("", LIT)
    )
    without, smallest = (
        take_step(factors, size=wide | {"image_layers": (1,)})[-1].cost_analysis()["flops"]
        for factors in ("", LIT)
    )
    five_layers = whole - without
    assert text - smallest == pytest.approx(five_layers / 3, rel=0.1)


@pytest.mark.parametrize(
    ("scan_layers", "packing"),
    [
        (True, {"length": 12, "rows": 1.0}),
        pytest.param(True, None, marks=pytest.mark.slow),
        pytest.param(False, None, marks=pytest.mark.slow),
    ],
)
def test_frozen_layers_have_no_gradients(scan_layers, packing):
    """The trace has no backward pass below all that learns, and no gradients of frozen weights."""
    size = {"text_layers": 6}
    net = tiny.make_net("vit", size, scan_layers=scan_layers, packing=packing)
    mesh, batch = tiny.make_mesh(1, 1), tiny.make_batch(tiny.make_net("vit"))

    def flops(factors):
        optimizer = tiny.make_optimizer(factors=factors)
        state = train_state.abstract_state(net, optimizer, mesh, zero1=False)
        step = tiny.make_step(net, mesh, optim={"factors": factors})
        return jaxpr_flops(jax.make_jaxpr(step)(state, batch).jaxpr)

    layers = "transformer/blocks/[0-3]/"
    whole = flops(LIT)
    below = flops(f"{LIT} ^text/(token_embed|positions|{layers})=0")
    between = flops(f"{LIT} ^text/{layers}=0")
    tokens = tiny.BATCH * (packing["length"] if packing else net.size.context_length)
    width, length = net.size.text_width, tokens // tiny.BATCH
    products = 2 * tokens * width * 12 * width
    assert whole - between == pytest.approx(4 * products)
    assert whole - below == pytest.approx(4 * 2 * (products + 4 * tokens * length * width))


@pytest.mark.parametrize("axes", [pytest.param((1, 1), marks=pytest.mark.slow), (2, 2)])
def test_layers_learn_at_rates_of_their_own(plain, axes):
    before, after, *_ = take_step(BY_LAYER, axes=axes)
    moved, expected = (
        {name: value - before[name] for name, value in params.items()}
        for params in (after, plain[1])
    )
    for name, change in moved.items():
        if name.endswith(NOISE):
            continue
        factors = np.ones(())
        if "/transformer/blocks" in name:
            by_layer = [0, 0.5] if name.startswith("text/") else [0.25, 1]
            factors = np.reshape(by_layer, (2, *[1] * (change.ndim - 1)))
        elif name == "image/class_token":
            factors = 0
        want = factors * expected[name]
        atol = 0.02 * np.abs(expected[name]).max() + 1e-7
        np.testing.assert_allclose(change, want, atol=atol, err_msg=name)


def test_the_summary_counts_what_learns():
    net = tiny.make_net("vit")
    params = jax.eval_shape(lambda: train_state.init_variables(net, 0))["params"]
    names = {sharding.path_name(path): x for path, x in jax.tree.leaves_with_path(params)}
    counts = {name: value.size for name, value in names.items()}
    frozen = sum(count for name, count in counts.items() if name.startswith("image/"))
    tenth = counts["text/token_embed/embedding"]
    rest = sum(counts.values()) - frozen - tenth
    assert optim.Factors.parse(f"{LIT} token_embed=0.1").summary(params) == (
        f"Of the parameters {frozen / 1e6:.3g} M are frozen, {tenth / 1e6:.3g} M learn at 0.1 "
        f"of the rate, {rest / 1e6:.3g} M learn."
    )
    assert optim.ALL.summary(params) == ""


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("^image/", "PATTERN=FACTOR"),
        ("=0", "PATTERN=FACTOR"),
        ("^image/=-1", "PATTERN=FACTOR"),
        ("^image/=nan", "PATTERN=FACTOR"),
        ("^image/=inf", "PATTERN=FACTOR"),
        ("(=0", "no regular expression"),
        ("^img/=0", r"'\^img/' finds no parameter.*blocks/0/"),
        ("^image/=0 ^text/blocks/3=1", r"'\^text/blocks/3' finds no parameter"),
        ("^image/=0 kernel=0.1", r"'\^image/' \(0\) and 'kernel' \(0.1\) both find 'image/"),
        (".=0", "nothing would learn"),
    ],
)
def test_tables_that_cannot_be_meant(table, message):
    kernel = {"kernel": np.ones((2, 4))}
    params = {tower: {"blocks": {"mlp_in": kernel}} for tower in ("image", "text")}
    with pytest.raises(UserError, match=message):
        optim.Factors.parse(table).by_parameter(params)


def test_the_same_factor_twice_is_no_fight():
    params = {"a": np.ones(2), "b": np.ones(2)}
    factors = optim.Factors.parse("a=0.5 [ab]=0.5").by_parameter(params)
    assert jax.tree.leaves(factors) == [0.5, 0.5]
