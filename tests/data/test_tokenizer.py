"""The tokenizers, against OpenAI's own class, known ids and a SentencePiece model made by hand."""

import gzip
import html
import importlib.metadata
import importlib.util
import random
import subprocess
import sys
import types
from concurrent.futures import ThreadPoolExecutor

import ftfy
import numpy as np
import pytest
from tiny_tokenizer import sentencepiece_model

from clip_jax.data import bpe, tokenizer
from clip_jax.errors import UserError

# Ids as openai-clip 1.0.1 gives them (ftfy 6.3.1), without start and end token; open_clip 3.3.0
# agrees but for the special tokens. The first is in many publications.
GOLDEN = [
    ("a photo of a cat", "320 1125 539 320 2368"),
    (
        "A   Photo\n of\tMY dog's toys, they'RE 12,345 years old!",
        "320 1125 539 607 1929 568 7162 267 889 982 272 273 267 274 275 276 1151 896 256",
    ),
    (
        "Tom &amp;amp; Jerry &#39;n&#39; &lt;b&gt;friends&lt;/b&gt; caf&eacute;",
        "2435 261 9164 262 333 262 283 321 285 1574 34308 321 285 15304",
    ),
    ("<b>5 &lt; 6</b> &amp; more", "283 321 285 276 283 277 34308 321 285 261 750"),
    (
        "“curly” ‘quotes’ – and… dashes",
        "257 20795 257 262 5808 262 1224 537 959 925 2502",
    ),
    ("caf\xc3\xa9 \xe2\u20ac\u0153mojibake\xe2\u20ac\x9d", "15304 257 617 3252 11878 257"),
    (
        "crème brûlée ŁÓDŹ cafe\u0301 ΣΊΣΥΦΟΣ",
        "1075 12138 614 711 127 119 75 13489 40419 8891 67 129 374 15304 139 225 138 107 139 "
        "225 139 227 139 228 138 123 139 480",
    ),
    (
        "一只猫坐在窗台上 東京タワー",
        "19759 222 34517 103 163 234 104 161 251 238 37746 101 163 103 245 34517 108 19759 488 "
        "48338 21078 105 34941 2429 107 30391",
    ),
    (
        "قطة جميلة في الحديقة",
        "27585 32050 20915 26375 12986 12046 14251 20915 24112 23853 12973 25722 19872 12046 "
        "27585 20915",
    ),
    (
        "кошка и собака",
        "27152 13506 141 230 27152 27080 140 372 23669 20978 109 16912 27152 27080",
    ),
    (
        "🐱👩\u200d👩\u200d👧\u200d👦 🇫🇷❤\ufe0f",
        "35710 26304 26304 48938 4244 964 355 39109 1752",
    ),
    ("ＦＵＬＬ\u3000ｗｉｄｔｈ ﬁre ﬂy", "1476 23571 1769 3228"),
    (  # code points that are unassigned or never will be assigned
        "\u0378 \U000e0080x \ufffe\U0010ffff unassigned",
        "137 372 175 254 224 478 343 27850 122 176 237 123 379 569 25767",
    ),
    ("it'ſ 'ſ \u212a 1½ ²", "585 6 129 379 6 129 379 330 272 33613 41175"),
    ("<|startoftext|>a<|ENDOFTEXT|> b <|endoftext|>!!", "49406 320 49407 321 49407 748"),
    (
        "zero\u200bwidth\xa0nbsp\ufeff\x00\x1b[31mred\x1b[0m",
        "5848 9844 23571 6459 588 736",
    ),
    ("\ud83d\udc31 \ud800 lone", "22979 39802 13576"),  # surrogates, paired and alone
    (
        "&#x1F431; &notit; &copy2024",
        "22979 126 361 585 282 5811 273 271 273 275",
    ),
    (
        "antidisestablishmentarianism 3.14159265",
        "3120 4262 7726 12658 1585 44351 274 269 272 275 272 276 280 273 277 276",
    ),
    ("", ""),
]
SPELLINGS = ["latin-1", "cp1252", "cp1251", "cp1253", "cp1257", "cp437", "macroman"]  # of mojibake
FRAGMENTS = """
    a the cat dog's it'S I'LL they'Re 'ſ <|startoftext|> <|endoftext|> </w> & &amp; &amp;amp; < >
    &lt; &eacute; &EACUTE; &#39; &#x2019; &#10; &#128; &nbsp &notit; ＆amp; “ ” ’ … – é œ Œuvre Ã Â
    à la Ã© â€œ â€™ Å“ Ð¿Ñ€ ﬁ ǆ ŉ ½ № ² ΣΑΣ İ ǅ 🐱 猫 2024 1,000
"""
INVISIBLE = (
    "\n|\r\n|\t|\0|\x1c|\x1b[1m|\x85|\xa0|Ã\xa0|\u2028|\u3000|\ufeff|x\ufffd|\ud800|\ud83d\udc31"
)
# What ftfy does line by line, a text with "<", and a word beyond what is remembered.
LINES = ["cat\nÃ la", "P&EACUTE;REZ\n<b>", "P&EACUTE;REZ <b>", "œ\n", "\nœ", "abcdefghij" * 60]
COMBINED = "e\u0301|\u1100\u1161|👩\u200d👧|❤\ufe0f"


def random_texts(count: int, seed: int) -> list[str]:
    """Texts that mix plain words, every fix of ftfy, entities, mojibake and any code point."""
    rng = random.Random(seed)
    fragments = FRAGMENTS.split() + INVISIBLE.split("|") + COMBINED.split("|")

    def character() -> str:
        limit = rng.choice([0x80, 0x100, 0x250, 0x3000, 0x10000, 0x110000])
        return chr(rng.randrange(limit))

    def mojibake() -> str:
        text = "".join(character() for _ in range(rng.randint(1, 3)))
        return text.encode("utf-8", "replace").decode(rng.choice(SPELLINGS), "replace")

    def part() -> str:
        kind = rng.random()
        if kind < 0.6:
            return rng.choice(fragments)
        return mojibake() if kind < 0.7 else character()

    def text() -> str:
        return "".join(part() + rng.choice(["", " "]) for _ in range(rng.randint(0, 8)))

    return [text() for _ in range(count)]


@pytest.fixture(scope="module")
def openai() -> tokenizer.Tokenizer:
    return tokenizer.create("openai", 77)


@pytest.fixture(scope="module")
def reference():
    """OpenAI's SimpleTokenizer, loaded past its package, which would import torch."""
    path = importlib.metadata.distribution("openai-clip").locate_file("clip/simple_tokenizer.py")
    spec = importlib.util.spec_from_file_location("simple_tokenizer", str(path))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.SimpleTokenizer()


def ids_of(text: str, encoder: bpe.BPE) -> list[int]:
    return np.frombuffer(encoder.encode(text), np.int32).tolist()


@pytest.mark.parametrize(("text", "ids"), GOLDEN)
def test_known_ids(openai, text, ids):
    ids = [int(token) for token in ids.split()]
    for _ in range(2):  # the second time from memory
        row, truncated = openai.encode(text)
        np.testing.assert_array_equal(row, [49406, *ids, 49407, *[0] * (75 - len(ids))])
        assert row.dtype == np.int32
        assert not truncated


def test_same_ids_as_openai(reference):
    encoder = bpe.BPE()
    for text in LINES + random_texts(5000, seed=0):
        assert ids_of(text, encoder) == reference.encode(text), ascii(text)


def test_clean_is_openais_for_every_code_point():
    def expected(text: str) -> str:
        return html.unescape(html.unescape(ftfy.fix_text(text))).lower()

    planes = [0, 1, 2, 3, 14]  # the others are unassigned or for private use
    for first in (start for plane in planes for start in range(plane << 16, (plane + 1) << 16, 64)):
        text = " ".join(f"a{c}b {c} .{c}1{c}" for c in map(chr, range(first, first + 64)))
        assert bpe.clean(text).split() == expected(text).split(), hex(first)
    text = "a" * 999_999 + "e\u0301"  # ftfy cuts it between letter and accent
    assert bpe.clean(text) == expected(text)


def test_forgetting_changes_nothing_and_bounds_memory():
    small, large = bpe.BPE(remembered=4), bpe.BPE()
    texts = [*random_texts(300, seed=1), "x" * 40]
    with ThreadPoolExecutor(4) as pool:
        forgetful = list(pool.map(small.encode, texts))
    assert forgetful == list(map(large.encode, texts))
    assert max(len(small._pieces), len(small._words)) <= 4 + 4  # threads may add one each
    assert "x" * 40 not in large._pieces


def test_batch(openai):
    rows = openai(["a photo of a cat", "", "a" + " cat" * 74])
    assert rows.shape == (3, 77)
    assert rows.dtype == np.int32
    assert rows.flags.writeable
    np.testing.assert_array_equal(rows[1, :3], [49406, 49407, 0])
    np.testing.assert_array_equal(rows.argmax(-1), [6, 1, 77 - 1])
    np.testing.assert_array_equal(openai("a photo of a cat"), rows[:1])
    assert openai([]).shape == (0, 77)
    _, lengths = openai.encode_batch(["", "cat " * 200])
    np.testing.assert_array_equal(lengths, [2, 202])


def test_too_long(openai):
    with pytest.raises(ValueError, match=r"text 1 \('cat.* takes 202 ids.* 77; truncate=True"):
        openai(["a cat", "cat " * 200])
    row = openai("cat " * 200, truncate=True)[0]
    np.testing.assert_array_equal(row, [49406, *[2368] * 75, 49407])
    again, truncated = openai.encode("cat " * 200)
    np.testing.assert_array_equal(again, row)
    assert truncated
    _, truncated = openai.encode("cat " * 75)  # just fits
    assert not truncated


def test_tokenize():
    np.testing.assert_array_equal(
        tokenizer.tokenize("a photo of a cat", context_length=8),
        [[49406, 320, 1125, 539, 320, 2368, 49407, 0]],
    )
    with pytest.raises(ValueError, match=r"text 0 .* takes 7 ids .* room for 6;"):
        tokenizer.tokenize(["a photo of a cat"], context_length=6)
    row = tokenizer.tokenize("a photo of a cat", context_length=6, truncate=True)
    np.testing.assert_array_equal(row, [[49406, 320, 1125, 539, 320, 49407]])
    with pytest.raises(TypeError, match="text 0 is not a str but bytes: b'a cat'"):
        tokenizer.tokenize([b"a cat"])


def test_decode(openai):
    assert openai.decode(openai("A photo of  a CAF&eacute; 🐱!")[0]) == "a photo of a café 🐱!"
    assert openai.decode([49406, 4244, 49407, 320, 0, 0]) == openai.decode([4244])
    assert openai.decode([]) == ""
    assert openai.decode([163]) == "\ufffd"  # part of a character


def test_what_it_is(openai):
    assert openai.vocab_size == 49_408
    assert openai.context_length == 77
    assert openai.identity == tokenizer.create("openai", 32).identity
    with pytest.raises(UserError, match=r"no tokenizer 'gpt2'\. Use 'openai'"):
        tokenizer.create("gpt2", 77)
    with pytest.raises(ValueError, match="context_length 1 has no room"):
        tokenizer.create("openai", 1)


def test_no_torch_is_imported():
    program = (
        "import sys; from clip_jax.data import tokenizer; tokenizer.tokenize('a cat'); "
        "print({'clip', 'torch', 'jax', 'tensorflow'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout == "set()\n", done.stderr


def test_missing_or_damaged_vocabulary(monkeypatch, tmp_path):
    def missing(name: str):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", missing)
    with pytest.raises(UserError, match="pip install openai-clip"):
        bpe.read_vocabulary()

    def elsewhere(name: str):
        return types.SimpleNamespace(locate_file=lambda path: tmp_path / "vocabulary")

    monkeypatch.setattr(importlib.metadata, "distribution", elsewhere)
    with pytest.raises(UserError, match=r"cannot be read: .*`pip install --force-reinstall"):
        bpe.read_vocabulary()
    other = gzip.compress(b"#version\na b\n")
    (tmp_path / "vocabulary").write_bytes(other[:10] + b"\xff" + other[11:])
    with pytest.raises(UserError, match="cannot be read"):
        bpe.read_vocabulary()
    (tmp_path / "vocabulary").write_bytes(other)
    with pytest.raises(UserError, match="checksum differs"):
        bpe.read_vocabulary()


@pytest.fixture(scope="module")
def pieces(tmp_path_factory):
    path = tmp_path_factory.mktemp("sentencepiece") / "nine.model"
    path.write_bytes(sentencepiece_model())
    return tokenizer.create(str(path), context_length=7)


def test_sentencepiece(pieces):
    assert pieces.vocab_size == 11
    rows = pieces(["a cat cats", "", " A\n&#99;AT dog"])
    expected = [[9, 3, 4, 4, 7, 10, 0], [9, 10, 0, 0, 0, 0, 0], [9, 3, 4, 8, 0, 10, 0]]
    np.testing.assert_array_equal(rows, expected)
    assert rows.dtype == np.int32
    assert pieces.decode(rows[0]) == "a cat cats"
    assert pieces([]).shape == (0, 7)
    row, truncated = pieces.encode("a cat cat cat cat cat")
    np.testing.assert_array_equal(row, [9, 3, 4, 4, 4, 4, 10])
    assert truncated
    with pytest.raises(ValueError, match=r"text 0 .* takes 8 ids .* room for 7;"):
        pieces("cat cat cat cat cat cat")


def test_sentencepiece_identity_and_errors(pieces, tmp_path):
    path = tmp_path / "other.model"
    path.write_bytes(sentencepiece_model().replace("▁cat".encode(), "▁dog".encode()))
    other = tokenizer.create(str(path), 7)
    assert other.identity != pieces.identity
    assert other.identity.startswith("sentencepiece:")
    path.write_bytes(b"not a model")
    with pytest.raises(UserError, match=r"other.model cannot be read as a SentencePiece model"):
        tokenizer.create(str(path), 7)
    with pytest.raises(UserError, match=r"none.model cannot be read"):
        tokenizer.create(str(tmp_path / "none.model"), 7)


@pytest.mark.parametrize("kind", ["unigram", "bpe"])
def test_sentencepiece_is_that_of_tensorflow_text(kind, tmp_path):
    """SigLIP was trained with the ids of tensorflow_text, ties between segmentations included."""
    theirs = pytest.importorskip("tensorflow_text")
    import sentencepiece

    rng = random.Random(0)
    runs = [
        "".join(rng.choice("aei .=") * rng.randint(1, 7) for _ in range(5)) for _ in range(3000)
    ]
    texts = [text.encode("utf-8", "replace").decode() for text in random_texts(3000, seed=2)] + runs
    model = tmp_path / f"{kind}.model"
    with model.open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(text for text in texts if text and "\0" not in text),
            model_writer=file,
            model_type=kind,
            vocab_size=4000,
            hard_vocab_limit=False,
            character_coverage=0.98,
            minloglevel=2,
        )
    reference = theirs.SentencepieceTokenizer(model.read_bytes())
    ours = tokenizer.create(str(model), 77)
    cleaned = [" ".join(bpe.clean(text).split()) for text in texts]
    ragged = reference.tokenize(cleaned)
    ids = ragged.to_list()
    assert [np.frombuffer(row, np.int32).tolist() for row in ours._pack(texts)] == ids
    assert [ours._unpack(row) for row in ids] == [
        text.decode("utf-8", "replace") for text in reference.detokenize(ragged).numpy()
    ]
    siglip = tokenizer.create(f"siglip:{model}", 64)
    plain = [text for text in runs if "." not in text and "=" not in text]
    rows = [np.frombuffer(row, np.int32).tolist() for row in siglip._pack(plain)]
    assert rows == reference.tokenize([" ".join(text.split()) for text in plain]).to_list()
