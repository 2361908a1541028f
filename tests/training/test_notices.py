"""Settings that do something else than they seem to are named, with the numbers."""

import re

import pytest
import tiny_run
from ml_collections import ConfigDict

from clip_jax import models
from clip_jax.configs import default
from clip_jax.data import mixture, order
from clip_jax.data.sources.base import Example
from clip_jax.data.sources.captions import Captions
from clip_jax.errors import BadExample, UserError
from clip_jax.training import notices, train


def said(total_steps: int = 100, net: str = "ViT-B/32", **overrides) -> str:
    config = tiny_run.config({name.replace("__", "."): v for name, v in overrides.items()})
    source, order_ = mixture.create(config.data, 16, 0, batch_size=config.batch_size, parts=1)
    made = models.create(net)
    return " ".join(notices.notices(config, made, source, order_, total_steps))


def test_nothing_to_say():
    assert said() == ""


@pytest.mark.parametrize("objective", ["contrastive", "near_duplicates"])
@pytest.mark.parametrize(
    ("batch", "message"),
    [(1, "batch_size is 1, but"), (128, "batch_size is 128, but the training data have 127 pairs")],
)
def test_batches_that_a_contrastive_loss_cannot_use(objective, batch, message):
    config = tiny_run.config({"objective": objective, "batch_size": batch})
    with pytest.raises(UserError, match=message):
        notices.check_batch(config, 127)
    config.objective = "bag_of_words"
    notices.check_batch(config, 127)


def test_before_the_first_step(tmp_path):
    config = tiny_run.config({"batch_size": 64})
    config.data.source = default.source(type="synthetic", size=40)
    with pytest.raises(UserError, match="batch_size is 64, but the training data have 40 pairs"):
        train.train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("warmup", "steps"), [("2000 steps", "2,000"), ("100 percent", "100")])
def test_a_warmup_longer_than_the_run(warmup, steps):
    found = said(optim__warmup=warmup)
    assert f"is {steps} steps, but the run has 100: it is shortened to 99" in found
    assert said(optim__warmup="99 steps") == ""


def test_durations_below_a_step():
    assert "log.every = '3 examples' is 0.19 of a step" in said(log__every="3 examples")
    assert "nothing is traced" in said(log__trace="1e6 steps")
    assert "traced" not in said(log__trace="1 steps")


def test_micro_batches_of_batch_norm():
    assert "micro-batch of 4 pairs, not over the batch of 16" in said(net="RN50", accum_steps=4)
    assert said(accum_steps=4) == ""


def test_images_with_fewer_captions_than_a_step_draws():
    assert "16 of the first 16 examples have fewer captions" in said(data__captions=2)

    class Half:
        """Every second example has two captions, every third one none."""

        def __len__(self) -> int:
            return 9

        def __getitem__(self, index: int) -> Example:
            if index % 3 == 2:
                raise BadExample("no caption", str(index))
            texts = ("a", "b")[: 1 + index % 2]
            return Example(b"", Captions(texts, (1.0,) * len(texts)), (), str(index))

    config = tiny_run.config({"data.captions": 2, "batch_size": 8})
    stored = order.Stored(9)
    assert notices.notices(config, models.create("ViT-B/32"), Half(), stored, 100) == []
    config.data.captions = 3
    (found,) = notices.notices(config, models.create("ViT-B/32"), Half(), stored, 100)
    assert "6 of the first 6 examples" in found


def test_mixtures_count_their_epochs():
    """By hand: the weights 3 and 1 over 30 and 70 examples."""
    config = tiny_run.config({"batch_size": 16})
    parts = {"a": (30, 3.0), "b": (70, 1.0)}
    config.data.mixture = default.mixture(
        **{n: default.source(type="synthetic", size=s, weight=w) for n, (s, w) in parts.items()}
    )
    source, order_ = mixture.create(config.data, 16, 0, batch_size=16, parts=1)
    (found,) = notices.notices(config, models.create("ViT-B/32"), source, order_, 100)
    counts = {"a": 0, "b": 0}
    for position in range(100):
        counts["a" if order_[position] < 30 else "b"] += 1
    assert isinstance(order_, order.Weighted)
    assert order_.epochs(100) == pytest.approx([counts["a"] / 30, counts["b"] / 70])
    assert order_.epochs(20_000) == pytest.approx([15_000 / 30, 5_000 / 70])
    times = re.findall(r"([ab]) ([\d.]+) times", found)
    assert {n: float(t) for n, t in times} == pytest.approx(
        {"a": counts["a"] / 30, "b": counts["b"] / 70}, rel=0.01
    )


def durations() -> list[str]:
    """Names the settings whose defaults are a number with a unit of length."""
    settings = dict(flatten(default.get_config()))
    units = re.compile(r"[\d.]+ (steps|examples|epochs|percent|minutes)")
    return [n for n, value in settings.items() if isinstance(value, str) and units.fullmatch(value)]


def flatten(config, prefix: str = ""):
    for name in config:
        if isinstance(value := config.get_ref(name).get(), ConfigDict):
            yield from flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


@pytest.mark.parametrize("name", [*durations(), "log.trace"])
def test_a_wrong_unit_names_its_setting(name: str):
    config = default.finish(default.get_config(), "smoke")
    group, _, field = name.rpartition(".")
    (config[group] if group else config)[field] = "10 min"
    with pytest.raises(UserError, match=rf"^{name}: '10 min' is not a duration: .* steps"):
        notices.check_durations(config)


def test_only_checkpoints_are_saved_by_the_clock():
    config = default.finish(default.get_config(), "smoke")
    config.checkpoint.every = "10 minutes"
    notices.check_durations(config)
    config.log.every = "10 minutes"
    with pytest.raises(UserError, match=r"^log\.every: '10 minutes' is not a duration"):
        notices.check_durations(config)
