"""The public API, against the module applied by hand to pixels made by hand."""

import json
import shutil

import jax
import numpy as np
import pytest
import tiny_run
from PIL import Image

import clip_jax
from clip_jax import api
from clip_jax.errors import UserError

SIDE = 16  # of the model's images


@pytest.fixture(scope="module")
def model() -> api.Model:
    return clip_jax.load(tiny_run.finished())


@pytest.fixture
def workdir(tmp_path):
    """A copy of the finished run that a test may spoil."""
    return shutil.copytree(tiny_run.finished(), tmp_path / "run")


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def embed(model: api.Model, pixels: np.ndarray) -> np.ndarray:
    """uint8 [n, SIDE, SIDE, 3] -> the module's own answer, op by op."""
    return np.asarray(model.net.apply(model.variables, pixels, method="encode_image"))


def shrink(picture: Image.Image) -> np.ndarray:
    """A square RGB picture at the model's size: [1, SIDE, SIDE, 3]."""
    return np.asarray(picture.resize((SIDE, SIDE), Image.Resampling.BICUBIC))[None]


def close(actual: np.ndarray, wanted: np.ndarray) -> None:
    assert actual.dtype == np.float32
    assert actual.shape == wanted.shape
    np.testing.assert_allclose(actual, wanted, atol=2e-6)
    np.testing.assert_allclose(np.linalg.norm(actual, axis=1), 1, atol=1e-5)


def test_names_of_the_package():
    assert {"load", "tokenize", "available_models", "models", "losses"} <= set(dir(clip_jax))
    assert all(getattr(clip_jax, name) is not None for name in dir(clip_jax))
    with pytest.raises(AttributeError, match="no attribute 'lod'"):
        clip_jax.lod  # noqa: B018


def test_available_models_are_those_of_the_paper_and_larger_ones():
    assert clip_jax.available_models() == [
        *("RN50", "RN101", "RN50x4", "RN50x16", "RN50x64"),
        *("ViT-B/32", "ViT-B/16", "ViT-L/14", "ViT-L/14@336px"),
        *("ViT-H/14", "ViT-g/14", "SigLIP-B/16", "SigLIP-So400m/14"),
        *("SigLIP2-B/16", "MetaCLIP2-H/14", "CLIPA-L/14", "CLIPA-H/14"),
        *("PE-Core-B/16", "PE-Core-L/14@336px"),
    ]


def test_tokenize():
    row = clip_jax.tokenize("a photo of a cat")
    # As OpenAI's clip.tokenize answers.
    assert row.dtype == np.int32
    assert row.shape == (1, 77)
    assert row[0, :7].tolist() == [49406, 320, 1125, 539, 320, 2368, 49407]
    assert not row[0, 7:].any()
    with pytest.raises(ValueError, match="77"):
        clip_jax.tokenize(["short", "cat " * 76])
    cut = clip_jax.tokenize(["short", "cat " * 76], truncate=True)
    assert cut.shape == (2, 77)
    assert cut[1].tolist() == [49406] + 75 * [2368] + [49407]


def test_load_takes_a_workdir_a_step_or_a_checkpoint(model):
    run = tiny_run.finished()
    pixels = noise(1, SIDE, SIDE, 3)
    last = embed(model, pixels)
    earlier = embed(clip_jax.load(str(run), step=8), pixels)
    assert not np.allclose(last, earlier, atol=1e-4)
    np.testing.assert_array_equal(embed(clip_jax.load(run / "checkpoints" / "8"), pixels), earlier)
    np.testing.assert_array_equal(
        embed(clip_jax.load(run / "checkpoints" / "12", step=12), pixels), last
    )


def test_load_reads_the_shapes_from_the_checkpoint(model):
    assert model.net.size.image_size == SIDE
    assert model.net.size.image_layers == (1,)
    assert model.tokenizer.context_length == 24
    assert {leaf.dtype for leaf in jax.tree.leaves(model.variables)} == {np.dtype("float32")}


PICTURE = Image.fromarray(noise(32, 32, 3))
MASK = Image.fromarray(np.where(noise(32, 32, seed=1) > 127, 255, 0).astype(np.uint8))


def with_hole() -> tuple[Image.Image, Image.Image]:
    """A picture with transparent pixels, and what it looks like on white paper."""
    picture = PICTURE.copy()
    picture.putalpha(MASK)
    on_white = np.where(np.asarray(MASK)[..., None] > 0, np.asarray(PICTURE), 255)
    return picture, Image.fromarray(on_white.astype(np.uint8))


def palette() -> tuple[Image.Image, Image.Image]:
    """A picture of 8 colours, stored as their numbers and as RGB."""
    colours, numbers = noise(8, 3, seed=2), noise(32, 32, seed=3) % 8
    picture = Image.fromarray(numbers, "P")
    picture.putpalette(colours.tobytes())
    return picture, Image.fromarray(colours[numbers])


def grey() -> tuple[Image.Image, Image.Image]:
    values = noise(32, 32, seed=4)
    return Image.fromarray(values), Image.fromarray(np.stack(3 * [values], axis=-1))


@pytest.mark.parametrize("make", [lambda: (PICTURE, PICTURE), with_hole, palette, grey])
def test_encode_image_of_every_mode(model, make, tmp_path):
    picture, as_rgb = make()
    wanted = embed(model, shrink(as_rgb))
    close(model.encode_image(picture), wanted)
    path = tmp_path / "picture.png"
    picture.save(path)
    close(model.encode_image(path), wanted)
    close(model.encode_image(str(path)), wanted)


def test_encode_image_of_one_array_and_of_many(model):
    arrays = noise(5, SIDE, SIDE, 3)
    wanted = embed(model, arrays)
    close(model.encode_image(arrays), wanted)
    close(model.encode_image(list(arrays)), wanted)
    close(model.encode_image(arrays[3]), wanted[3:4])
    close(model.encode_image(np.array(PICTURE)), embed(model, shrink(PICTURE)))


def test_encode_image_of_different_kinds_and_sizes(model, tmp_path):
    path = tmp_path / "picture.png"
    PICTURE.save(path)
    hole, on_white = with_hole()
    small = noise(SIDE, SIDE, 3, seed=5)
    wanted = np.concatenate([shrink(PICTURE), shrink(on_white), small[None]])
    close(model.encode_image([path, hole, small]), embed(model, wanted))
    greys = [grey()[0], grey()[0]]  # two of one size without channels: not one array
    close(model.encode_image(greys), np.repeat(embed(model, shrink(grey()[1])), 2, axis=0))


def test_encode_image_crops_the_middle_square(model):
    wide = noise(SIDE, SIDE + 10, 3, seed=6)
    wanted = embed(model, wide[None, :, 5:-5])
    close(model.encode_image(wide), wanted)
    close(model.encode_image(Image.fromarray(wide)), wanted)
    tall = np.ascontiguousarray(wide.transpose(1, 0, 2))
    close(model.encode_image([tall]), embed(model, tall[None, 5:-5]))


def test_encode_text(model):
    texts = ["a seven", "the digit 3", "A SEVEN "]
    tokens = clip_jax.tokenize(texts, context_length=24)
    wanted = np.asarray(model.net.apply(model.variables, tokens, method="encode_text"))
    close(model.encode_text(texts), wanted)
    close(model.encode_text("the digit 3"), wanted[1:2])
    np.testing.assert_array_equal(model.encode_text(texts)[0], model.encode_text(texts)[2])
    long = "seven " * 30
    with pytest.raises(ValueError, match="32 ids"):
        model.encode_text(["short", long])
    cut = clip_jax.tokenize([long], context_length=24, truncate=True)
    assert cut[0, -1] == 49407
    close(
        model.encode_text(long, truncate=True),
        np.asarray(model.net.apply(model.variables, cut, method="encode_text")),
    )


def test_nothing_to_encode(model):
    assert model.encode_image([]).shape == (0, 16)
    assert model.encode_text([]).shape == (0, 16)


def test_zero_shot_equals_the_definition(model):
    pictures = noise(3, SIDE, SIDE, 3, seed=7)
    templates = ["a handwritten {}", "the digit {}"]
    actual = model.zero_shot(pictures, ["seven|7", "three"], templates)

    def centre(names: list[str]) -> np.ndarray:
        prompts = [template.format(name) for name in names for template in templates]
        mean = model.encode_text(prompts).astype(np.float64).mean(axis=0)
        return mean / np.linalg.norm(mean)

    classes = np.stack([centre(["seven", "7"]), centre(["three"])])
    scale = np.exp(float(model.variables["params"]["logit_scale"]))
    logits = scale * model.encode_image(pictures).astype(np.float64) @ classes.T
    weights = np.exp(logits)
    assert actual.dtype == np.float32
    np.testing.assert_allclose(actual, weights / weights.sum(axis=1, keepdims=True), rtol=1e-4)
    assert np.ptp(actual) > 1e-4  # not a comparison of constants
    one = model.zero_shot(pictures[0], ["seven", "three"])
    assert one.shape == (1, 2)
    with pytest.raises(UserError, match="exactly one"):
        model.zero_shot(pictures, ["seven"], ["no place for it"])


def test_many_inputs_use_one_program_and_few_a_smaller_one(model):
    small = api.Model(model.net, model.variables, model.tokenizer, batch_size=6)
    pictures, texts = noise(11, SIDE, SIDE, 3), [f"the digit {i}" for i in range(11)]
    programs = {11: 1, 6: 1, 5: 1, 3: 2, 4: 2, 1: 3, 7: 3}  # by number of inputs, in this order
    for count, compiled in programs.items():
        close(small.encode_image(pictures[:count]), embed(model, pictures[:count]))
        close(small.encode_text(texts[:count]), model.encode_text(texts[:count]))
        assert small._image._cache_size() == compiled, count
        assert small._text._cache_size() == compiled, count


@pytest.mark.parametrize(
    ("picture", "message"),
    [
        ("nowhere.png", "nowhere.png"),
        ("broken.png", "broken.png.*unreadable image"),
        ("https://example.org/a.png", "https:// is not read"),
        (np.zeros((16, 16, 4), np.uint8), "uint8 .h, w, 3.*4"),
        (np.zeros((16, 16, 3)), "uint8 .h, w, 3.*float64"),
        ([np.zeros((16, 16), np.uint8)], "uint8 .h, w, 3"),
        (np.array([None]), "None is no picture"),
        (np.zeros((3, 16, 16), np.uint8), "channels come last"),
        (np.zeros((2, 16, 16, 1), np.uint8), "grey values"),
        (np.zeros((0, 16, 3), np.uint8), "uint8 .h, w, 3"),
        (np.zeros((16, 16, 3), np.float32), "from 0 to 1"),
        (None, "None is no picture.*Pillow image"),
        (b"GIF89a", "no picture.*BytesIO"),
        (7, "7 is no picture"),
        ({"a.png": 1}, "no picture"),
        ([noise(16, 16, 3), None], "None is no picture"),
        ([[noise(16, 16, 3)]], "no picture"),
        (Image.new("F", (16, 16)), "unsupported pixel format"),
    ],
    ids=[
        *("missing", "broken", "URL", "channels", "dtype", "dimensions", "nothing"),
        *("channels first", "grey", "empty", "float", "None", "bytes", "number", "dict"),
        *("None in a list", "nested", "mode F"),
    ],
)
def test_unusable_pictures(model, picture, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.png").write_bytes(b"no picture at all")
    with pytest.raises(UserError, match=message):
        model.encode_image(picture)


class Tensor:
    """Another library's array: no np.ndarray, but one when asked, and iterable."""

    def __init__(self, array: np.ndarray):
        self._array = array

    def __array__(self, dtype=None, copy=None):
        return self._array

    def __iter__(self):
        return map(Tensor, self._array)


def test_arrays_of_other_libraries_and_generators(model):
    arrays = noise(3, SIDE, SIDE, 3)
    wanted = embed(model, arrays)
    close(model.encode_image(Tensor(arrays)), wanted)
    close(model.encode_image(Tensor(arrays[1])), wanted[1:2])
    close(model.encode_image([Tensor(each) for each in arrays]), wanted)
    close(model.encode_image(jax.numpy.asarray(arrays)), wanted)
    close(model.encode_image(each for each in arrays), wanted)
    names = ["seven", "three"]
    expected = model.zero_shot(arrays, names)
    for given in (iter(names), tuple(names), np.array(names)):
        np.testing.assert_array_equal(model.zero_shot(arrays, given), expected)
    np.testing.assert_array_equal(
        model.zero_shot(arrays, names, templates=iter(["a photo of a {}."])), expected
    )


@pytest.mark.parametrize(
    ("names", "templates", "message"),
    [
        ("cat", ["{}"], "class names are 'cat', and must be a list.*'cat'"),
        (b"cat", ["{}"], "must be a list"),
        (None, ["{}"], "class names are None"),
        ({"cat", "dog"}, ["{}"], "must be a list"),
        ({0: "cat"}, ["{}"], "must be a list"),
        (["cat", None], ["{}"], "Number 1 of the class names is None"),
        (["cat", ["dog"]], ["{}"], "Number 1 of the class names"),
        ([0, 1], ["{}"], "Number 0 of the class names is 0"),
        (["cat", "dog", "cat"], ["{}"], "'cat' is given twice"),
        (["cat", " "], ["{}"], "no word"),
        (["cat|"], ["{}"], "no word"),
        ([], ["{}"], "needs class names"),
        (["cat"], [], "needs class names and templates"),
        (["cat"], "a photo of a {}.", "templates are 'a photo"),
        (["cat"], [None], "Number 0 of the templates"),
    ],
)
def test_unusable_class_names(model, names, templates, message):
    with pytest.raises(UserError, match=message):
        model.zero_shot(PICTURE, names, templates)


@pytest.mark.parametrize("texts", [None, b"cat", {"cat"}, {"cat": 1}, 3])
def test_unusable_texts(model, texts):
    with pytest.raises(UserError, match=r"The texts are.*must be a list of texts"):
        model.encode_text(texts)


def test_load_leaves_the_workdir_as_it_is(workdir):
    def content() -> dict[str, bytes]:
        return {str(p): p.read_bytes() if p.is_file() else b"" for p in workdir.rglob("*")}

    before = content()
    clip_jax.load(workdir)
    assert content() == before


def test_load_where_there_is_nothing(tmp_path, workdir):
    with pytest.raises(UserError, match=r"nowhere.*give the workdir"):
        clip_jax.load(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"no finished checkpoint 7.*12"):
        clip_jax.load(workdir, step=7)
    shutil.rmtree(workdir / "checkpoints")
    (workdir / "checkpoints").mkdir()
    with pytest.raises(UserError, match="no finished checkpoint"):
        clip_jax.load(workdir)


def test_load_refuses_another_tokenizer(workdir):
    path = workdir / "checkpoints" / "12" / "meta" / "metadata"
    meta = json.loads(path.read_text())
    assert meta["tokenizer"].startswith("openai-bpe:")
    del meta["checksum"]  # as of an early version, whose vocabulary may have been another
    path.write_text(json.dumps({**meta, "tokenizer": "openai-bpe:0123"}))
    with pytest.raises(UserError, match="tokenizer openai-bpe:0123"):
        clip_jax.load(workdir)


def test_load_of_a_checkpoint_cut_short(workdir):
    files = [path for path in (workdir / "checkpoints/12/model").rglob("*") if path.is_file()]
    largest = max(files, key=lambda path: path.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:1000])
    with pytest.raises(UserError, match=r"checkpoints/12 cannot be read.*step 8"):
        clip_jax.load(workdir)
    assert clip_jax.load(workdir, step=8)
