"""Tokenizers of folders: their rows by hand, through every way of writing, and damaged files."""

import json
import pathlib

import numpy as np
import pytest
import tiny_weights
from etils import epath
from tiny_tokenizer import sentencepiece_model
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors

import clip_jax
from clip_jax import weights
from clip_jax.data import published
from clip_jax.errors import UserError
from clip_jax.models.sizes import Size

WORDS = ["<pad>", "<eos>", "<bos>", "<unk>", "a", "cat", "dog", "Cat", ".", "</s>"]
TEXTS = ["a cat .", "Cat dog", "", "a " * 20]


def write_words(folder: pathlib.Path, start: bool = False, **config) -> None:
    """A tokenizer.json of whole words that ends texts with <eos>, and its tokenizer_config."""
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    made.normalizer = normalizers.Replace(Regex(" +"), " ")
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>" if start else "$A <eos>",
        special_tokens=[("<bos>", 2), ("<eos>", 1)],
    )
    made.save(str(folder / "tokenizer.json"))
    fields = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "<pad>"} | config
    (folder / "tokenizer_config.json").write_text(json.dumps(fields))


def rows(folder: pathlib.Path, length: int = 5) -> list[list[int]]:
    return published.create(epath.Path(folder), length)(TEXTS, truncate=True).tolist()


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, [[4, 5, 8, 1, 0], [7, 6, 1, 0, 0], [1, 0, 0, 0, 0], [4, 4, 4, 4, 1]]),
        (
            {"padding_side": "left", "pad_token": {"content": "<bos>"}},
            [[2, 4, 5, 8, 1], [2, 2, 7, 6, 1], [2, 2, 2, 2, 1], [4, 4, 4, 4, 1]],
        ),
        (
            {"add_bos_token": True, "add_eos_token": False, "bos_token": "<bos>"},
            [[2, 4, 5, 8, 0], [2, 7, 6, 0, 0], [2, 0, 0, 0, 0], [2, 4, 4, 4, 4]],
        ),
        (  # SigLIP's class cleans: lower case, no punctuation
            {"tokenizer_class": "SiglipTokenizer", "pad_token": "</s>"},
            [[4, 5, 1, 9, 9], [5, 6, 1, 9, 9], [1, 9, 9, 9, 9], [4, 4, 4, 4, 1]],
        ),
    ],
)
def test_rows(config: dict, expected: list, tmp_path: pathlib.Path):
    write_words(tmp_path, **config)
    assert rows(tmp_path) == expected
    made = published.create(epath.Path(tmp_path), 5)
    assert [made.is_empty(np.array(row, np.int32)) for row in expected] == [0, 0, 1, 0]
    assert made.decode(expected[0]).startswith("a cat")
    assert made.encode_batch(["a cat ."])[1] == [3 + len(made.rules.start + made.rules.end)] or (
        config.get("tokenizer_class") == "SiglipTokenizer"
    )


def test_open_clip_says_how_it_cleans(tmp_path: pathlib.Path):
    write_words(tmp_path)
    text = {"hf_tokenizer_name": "x", "tokenizer_kwargs": {"clean": "canonicalize"}}
    config = tmp_path / "open_clip_config.json"
    config.write_text(json.dumps({"model_cfg": {"text_cfg": text}}))
    made = published.create(epath.Path(tmp_path), 5)
    assert made(["A_CAT&amp;.", "ｃａｔ"]).tolist() == [[4, 5, 1, 0, 0], [5, 1, 0, 0, 0]]
    text["tokenizer_kwargs"] = {"clean": "canonicalize", "language": "en"}
    config.write_text(json.dumps({"model_cfg": {"text_cfg": text}}))
    with pytest.raises(UserError, match=r"used with .*language.* not known"):
        published.create(epath.Path(tmp_path), 5)


@pytest.mark.parametrize("to", ["clip_jax", "huggingface", "open_clip"])
def test_it_travels_along(to: str, tmp_path: pathlib.Path):
    """CLIP whose end token is not the largest id: same ids, identity and embeddings."""
    ours = tiny_weights.make("vit")
    weights.save(ours, tmp_path / "x", "huggingface")
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / "x" / name).unlink()
    write_words(tmp_path / "x", start=True)
    config = json.loads((tmp_path / "x" / "config.json").read_text())
    config["text_config"]["eos_token_id"] = 1
    (tmp_path / "x" / "config.json").write_text(json.dumps(config))
    first = clip_jax.load(str(tmp_path / "x"))
    assert first.net.size.end_token == 1
    weights.save(weights.open(str(tmp_path / "x")), str(tmp_path / "y"), to)
    again = clip_jax.load(str(tmp_path / "y"))
    assert again.tokenizer.identity == first.tokenizer.identity
    assert again.net.size == first.net.size
    texts = TEXTS[:3]
    np.testing.assert_array_equal(again.tokenizer(texts), first.tokenizer(texts))
    assert first.tokenizer(["cat"])[0, :4].tolist() == [2, 5, 1, 0]
    # The largest id of "Cat ." is that of ".", which must not be what the tower reads.
    one, other = first.encode_text(["Cat .", "Cat . "]), again.encode_text(["Cat .", "Cat . "])
    np.testing.assert_allclose(one, other, atol=1e-6)
    legacy = Size(**{**vars(first.net.size), "end_token": None})
    assert not np.allclose(
        one,
        type(first.net)(legacy).apply(
            first.variables, first.tokenizer(["Cat .", "Cat ."]), method="encode_text"
        ),
        atol=1e-3,
    )


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("tokenizer.json", b"{", r"tokenizer\.json cannot be read as JSON"),
        ("tokenizer.json", b"[" * 100_000, r"tokenizer\.json cannot be read as JSON"),
        ("tokenizer.json", b"[1]", r"no JSON object but a list"),
        ("tokenizer.json", b'{"model": {"vocab": {"a": 0, "b": 2}}}', r"ids 0 to 1, each once"),
        ("tokenizer.json", b'{"model": {"vocab": {"a": "x"}}}', r"ids 0 to 0, each once"),
        ("tokenizer.json", b'{"model": {}}', r"is no tokenizer \(KeyError"),
        ("tokenizer.json", b'{"model": {"vocab": {"a": 0}}}', r"tokenizer\.json cannot be read"),
        ("tokenizer_config.json", b"\xff\xfe", r"tokenizer_config\.json cannot be read as JSON"),
        ("tokenizer_config.json", b'{"pad_token": "<none>"}', r"'<none>' as its pad_token"),
        ("tokenizer_config.json", b"{}", r"names the token None as its pad_token"),
        ("tokenizer_rules.json", b'{"file": "../../x"}', r"tokenizer_rules\.json is damaged"),
    ],
)
def test_damaged_files(name: str, content: bytes, match: str, tmp_path: pathlib.Path):
    write_words(tmp_path)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=match):
        published.create(epath.Path(tmp_path), 5)


@pytest.mark.parametrize("length", [0, 20, 50, -4])
def test_a_sentencepiece_model_cut_off(length: int, tmp_path: pathlib.Path):
    (tmp_path / "spiece.model").write_bytes(sentencepiece_model()[:length])
    with pytest.raises(UserError, match=r"spiece\.model"):
        published.create(epath.Path(tmp_path), 5)


def test_a_class_that_only_transformers_makes(tmp_path: pathlib.Path):
    (tmp_path / "vocab.txt").write_text("[PAD]\n")
    with pytest.raises(UserError, match=r"save it there once"):
        published.create(epath.Path(tmp_path), 5)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"eos_token_id": 60_000}, r"names the end token 60000"),
        ({"eos_token_id": 8}, r"reads captions at the id 8"),
    ],
)
def test_an_end_that_is_no_end(change: dict, match: str, tmp_path: pathlib.Path):
    weights.save(tiny_weights.make("vit"), tmp_path / "x", "huggingface")
    config = json.loads((tmp_path / "x" / "config.json").read_text())
    config["text_config"] |= change
    (tmp_path / "x" / "config.json").write_text(json.dumps(config))
    write_words(tmp_path / "x")
    with pytest.raises(UserError, match=match):
        weights.open(str(tmp_path / "x"))


def test_another_kind_of_model_is_named(tmp_path: pathlib.Path):
    (tmp_path / "config.json").write_text('{"model_type": "chinese_clip"}')
    with pytest.raises(UserError, match=r"of the kind 'chinese_clip' of transformers"):
        weights.open(str(tmp_path))
