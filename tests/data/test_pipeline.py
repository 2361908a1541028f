"""Training and evaluation batches, and unusable examples, against values computed by hand."""

import collections
import dataclasses
import io
import time

import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

from clip_jax.configs import default
from clip_jax.data import order, pipeline, rows, tokenizer
from clip_jax.data.sources.base import Example
from clip_jax.data.sources.captions import Captions
from clip_jax.errors import BadExample, UserError

TOKENIZER = tokenizer.create("openai", 16)
SIZE = 8


class Numbers:
    """Example i shows the number i in its pixels and its caption; some raise what they are told."""

    class_names = ("even", "odd")
    templates = ()

    def __init__(self, size: int, faults: dict[int, Exception | str] | None = None):
        self.size = size
        self.faults = faults or {}
        self.reads: collections.Counter[int] = collections.Counter()

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Example:
        self.reads[index] += 1
        text = f"number {index}"
        fault = self.faults.get(index)
        if isinstance(fault, Exception):
            raise fault
        if fault is not None:
            text = fault
        return Example(show(index), one(text), labels=(index % 2,), key=f"key {index}")


def one(text: str) -> Captions:
    return Captions((text,), (1.0,))


def show(index: int, size: int = SIZE) -> np.ndarray:
    return np.full((size, size, 3), [index // 256, index % 256, 77], np.uint8)


def read(image: np.ndarray) -> np.ndarray:
    """The numbers that images [..., h, w, 3] show."""
    return image[..., 0, 0, 0].astype(int) * 256 + image[..., 0, 0, 1]


def settings(**overrides) -> ConfigDict:
    config = default.get_config().data
    config.threads = 2
    config.update(overrides)
    return config


def make(
    source,
    *,
    config: ConfigDict | None = None,
    batch_size: int = 4,
    seed: int = 0,
    part: int = 0,
    parts: int = 1,
    start: int = 0,
) -> pipeline.TrainPipeline:
    config = config or settings()
    orders = {"shuffled": order.Shuffled(len(source), seed), "stored": order.Stored(len(source))}
    spec = rows.Spec(
        config, "openai", 16, image_size=SIZE, seed=seed, batch_size=batch_size, parts=parts
    )
    return pipeline.TrainPipeline(
        source, orders[config.order], TOKENIZER, spec, start=start, part=part
    )


def take(batches, steps: int) -> dict[str, np.ndarray]:
    """The first batches, one after the other along their first axis."""
    iterator = iter(batches)
    found = [next(iterator) for _ in range(steps)]
    return {name: np.concatenate([batch[name] for batch in found]) for name in found[0]}


def assert_same(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name])


class TestTrainPipeline:
    def test_every_example_once_per_epoch(self):
        source = Numbers(21)
        epochs = read(take(make(source), 21)["image"]).reshape(4, 21)
        for epoch in epochs:
            assert sorted(epoch) == list(range(21))
        assert len({tuple(epoch) for epoch in epochs}) == 4
        assert make(source).examples_per_epoch == 21

    def test_captions_go_with_their_images(self):
        batch = take(make(Numbers(300)), 10)
        assert batch["image"].dtype == np.uint8
        assert batch["tokens"].dtype == np.int32
        expected = TOKENIZER([f"number {index}" for index in read(batch["image"])])
        np.testing.assert_array_equal(batch["tokens"], expected)

    def test_several_captions_go_with_their_images(self):
        class Several(Numbers):
            def __getitem__(self, index: int) -> Example:
                texts = (f"number {index}", f"no {index}", f"{index} of them")
                return dataclasses.replace(
                    super().__getitem__(index), captions=Captions(texts, (3.0, 1.0, 1.0))
                )

        batch = take(make(Several(300), config=settings(captions=2)), 10)
        assert batch["tokens"].shape == (40, 2, 16)
        drawn = [[TOKENIZER.decode(row) for row in rows] for rows in batch["tokens"]]
        for index, texts in zip(read(batch["image"]), drawn):
            assert len(set(texts)) == 2
            assert all(str(index) in text.replace(" ", "") for text in texts)
        # The first is the one that a run with one caption an image draws.
        alone = take(make(Several(300)), 10)
        np.testing.assert_array_equal(batch["tokens"][:, 0], alone["tokens"])

    def test_stored_order(self):
        batch = take(make(Numbers(10), config=settings(order="stored")), 5)
        assert read(batch["image"]).tolist() == [*range(10), *range(10)]

    @pytest.mark.parametrize("hosts", [2, 3, 4])
    def test_hosts_share_one_global_batch(self, hosts):
        whole = take(make(Numbers(50), batch_size=12), 6)
        parts = [
            take(make(Numbers(50), batch_size=12, part=k, parts=hosts), 6) for k in range(hosts)
        ]
        shape = (6, 12 // hosts)
        for name, expected in whole.items():
            joined = np.concatenate(
                [part[name].reshape(*shape, *expected.shape[1:]) for part in parts], axis=1
            )
            np.testing.assert_array_equal(joined.reshape(expected.shape), expected)

    @pytest.mark.parametrize("options", [{}, {"batch_size": 6}, {"parts": 2}])
    def test_resumes_at_the_next_example(self, options):
        """Also with another batch size; crops included."""
        source = Photos(30)
        whole = take(make(source, config=settings(crop="random")), 24)
        start = 4 * 7
        resumed = make(source, config=settings(crop="random"), start=start, **options)
        batch = take(resumed, 3)
        if resumed._positions.rows == range(2):  # half of the rows
            rows = [start + 4 * step + row for step in range(3) for row in range(2)]
        else:
            rows = range(start, start + len(batch["image"]))
        assert_same(batch, {name: value[list(rows)] for name, value in whole.items()})

    def test_threads_do_not_matter(self):
        one, two, five = (
            take(make(Photos(30), config=settings(threads=threads)), 10) for threads in (1, 2, 5)
        )
        assert_same(one, two)
        assert_same(one, five)

    def test_seed_decides_order_and_crops(self):
        first, again, other = (take(make(Photos(9), seed=seed), 9) for seed in (3, 3, 4))
        assert_same(first, again)
        assert not np.array_equal(first["image"], other["image"])
        # The same photo is cropped anew in each epoch, at one of 17 places.
        crops = {image.tobytes() for image in take(make(Photos(1)), 3)["image"]}
        assert len(crops) > 6

    def test_crop_setting(self):
        middle = take(make(Photos(1), config=settings(crop="center")), 1)["image"]
        whole = take(make(Photos(1), config=settings(crop="none")), 1)["image"]
        photo = Image.fromarray(Photos(1).pixels(0))
        resized = photo.resize((int(SIZE * 40 / 24), SIZE), Image.BICUBIC)
        np.testing.assert_array_equal(middle[0], np.asarray(resized)[:, 2 : 2 + SIZE])
        np.testing.assert_array_equal(
            whole[0], np.asarray(photo.resize((SIZE, SIZE), Image.BICUBIC))
        )

    def test_unusable_examples_are_replaced_and_counted(self):
        faults = {
            3: BadExample("unreadable image", "key 3"),
            5: BadExample("missing shard", "key 5"),
            8: " &nbsp;\n",
            12: BadExample("missing shard", "key 12"),
        }
        source = Numbers(40, faults)
        clean = read(take(make(Numbers(40)), 20)["image"])
        config = settings(max_skipped=0.2)
        run = make(source, config=config)
        batch = take(run, 20)
        shown = read(batch["image"])
        bad = np.isin(clean, list(faults))
        np.testing.assert_array_equal(shown[~bad], clean[~bad])  # nothing else moves or is lost
        assert bad.sum() == 8
        assert not np.isin(shown, list(faults)).any()
        np.testing.assert_array_equal(
            batch["tokens"], TOKENIZER([f"number {index}" for index in shown])
        )
        assert_same(
            take(make(source, config=config, start=24), 14), {n: v[24:] for n, v in batch.items()}
        )
        # Two epochs; what was read ahead of the last batch does not count.
        assert run.skipped == {"unreadable image": 2, "missing shard": 4, "empty caption": 2}

    def test_too_many_unusable_examples_end_the_run(self):
        faults = {i: BadExample("unreadable image", f"key {i}") for i in range(0, 100, 5)}
        take(make(Numbers(100, faults), config=settings(max_skipped=0.3)), 50)
        with pytest.raises(UserError) as caught:
            take(make(Numbers(100, faults), config=settings(max_skipped=0.19)), 50)
        message = str(caught.value)
        assert "20 unreadable image" in message
        assert "--config.data.max_skipped" in message
        assert "key " in message

    @pytest.mark.parametrize("size", [1, 7])
    def test_nothing_usable_ends_the_run(self, size):
        faults = {i: BadExample("unreadable image", f"key {i}") for i in range(size)}
        with pytest.raises(UserError, match="unreadable image"):
            take(make(Numbers(size, faults), config=settings(max_skipped=1.0)), 1)

    def test_other_errors_come_through_as_they_are(self):
        with pytest.raises(ZeroDivisionError, match="of the source"):
            take(make(Numbers(9, {4: ZeroDivisionError("of the source")})), 3)

    def test_long_captions_are_counted(self):
        text = "many words " * 30
        run = make(Numbers(10, {2: text}), config=settings())
        batch = take(run, 5)
        assert run.truncated == 2
        several = make(Numbers(10, {2: text}), config=settings(captions=3))
        take(several, 5)
        assert several.truncated == 6
        rows = batch["tokens"][read(batch["image"]) == 2]
        assert (rows[:, -1] == TOKENIZER.vocab_size - 1).all()
        np.testing.assert_array_equal(rows[0], TOKENIZER([text], truncate=True)[0])

    def test_impossible_settings(self):
        with pytest.raises(UserError, match="10 examples cannot be split over 4 hosts"):
            make(Numbers(9), batch_size=10, parts=4)
        with pytest.raises(UserError, match="empty"):
            make(Numbers(0))

    def test_starts_at_once_anywhere(self):
        began = time.monotonic()
        batch = take(make(Numbers(12_000_000), start=10**10), 1)
        assert time.monotonic() - began < 5
        assert batch["image"].shape == (4, SIZE, SIZE, 3)


class Photos:
    """Noise as PNG files of 40 x 24 pixels."""

    class_names = ()
    templates = ()

    def __init__(self, size: int):
        self.size = size

    def __len__(self) -> int:
        return self.size

    def pixels(self, index: int) -> np.ndarray:
        return np.random.default_rng(index).integers(0, 256, (24, 40, 3), np.uint8)

    def __getitem__(self, index: int) -> Example:
        file = io.BytesIO()
        Image.fromarray(self.pixels(index)).save(file, "PNG")
        return Example(file.getvalue(), one(f"photo {index}"), labels=(), key=str(index))


def evaluate(source, **options) -> list[dict[str, np.ndarray]]:
    options = {"batch_size": 4, "part": 0, "parts": 1, "threads": 2, **options}
    return list(pipeline.eval_batches(source, image_size=SIZE, **options))


class TestEvalBatches:
    @pytest.mark.parametrize("hosts", [1, 2, 4])
    def test_every_example_once_in_order(self, hosts):
        parts = [evaluate(Numbers(10), part=k, parts=hosts) for k in range(hosts)]
        assert {len(part) for part in parts} == {3}
        batches = [
            {name: np.concatenate([part[step][name] for part in parts]) for name in parts[0][0]}
            for step in range(3)
        ]
        joined = {name: np.concatenate([b[name] for b in batches]) for name in batches[0]}
        assert joined["mask"].tolist() == [True] * 10 + [False] * 2
        assert joined["index"].tolist() == list(range(12))
        assert joined["label"].tolist() == [0, 1] * 5 + [-1, -1]
        assert read(joined["image"])[:10].tolist() == list(range(10))
        types = {name: value.dtype for name, value in joined.items()}
        assert types == {
            "image": np.uint8,
            "label": np.int32,
            "index": np.int32,
            "mask": bool,
        }

    def test_images_need_no_captions(self):
        batches = evaluate(Numbers(5, {1: ""}))
        assert [batch["mask"].sum() for batch in batches] == [4, 1]

    def test_unusable_examples_are_masked_and_logged(self, caplog):
        faults = {2: BadExample("unreadable image", "key 2"), 5: BadExample("no image", "key 5")}
        batches = evaluate(Numbers(8, faults))
        mask = np.concatenate([batch["mask"] for batch in batches])
        assert np.flatnonzero(~mask).tolist() == [2, 5]
        assert "2 of 8" in caplog.text
        assert "key 2: unreadable image" in caplog.text

    def test_other_errors_come_through_as_they_are(self):
        with pytest.raises(ZeroDivisionError):
            evaluate(Numbers(5, {3: ZeroDivisionError()}))

    def test_centre_crop(self):
        (batch,) = evaluate(Photos(1))
        resized = Image.fromarray(Photos(1).pixels(0)).resize((13, SIZE), Image.BICUBIC)
        np.testing.assert_array_equal(batch["image"][0], np.asarray(resized)[:, 2:10])


def test_unusable_data_end_the_run_before_a_batch_is_full():
    """Each bad row tries many others: a whole batch of them would take minutes."""

    class Bad(Numbers):
        reads = 0

        def __getitem__(self, index: int) -> Example:
            Bad.reads += 1
            raise BadExample("no caption", f"key {index}")

    with pytest.raises(UserError, match="usable"):
        take(make(Bad(5000), batch_size=1024), 1)
    assert Bad.reads < 5000
