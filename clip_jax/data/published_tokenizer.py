"""A vocabulary with rules for its rows, as folders of transformers and open_clip bring them."""

import dataclasses
import hashlib
import html
import json
import string
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import ftfy
import numpy as np
from jaxtyping import Int32

from clip_jax.data.tokenizer_base import ITEMSIZE, PUBLISHED, Tokenizer, sentencepiece_model
from clip_jax.errors import UserError

RULES = "tokenizer_rules.json"
JSON = "tokenizer.json"
REMEDY = "Copy the folder again, or name another tokenizer with --tokenizer."
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def _squeeze(text: str) -> str:
    return " ".join(text.split())


def _fixed(text: str) -> str:
    return html.unescape(html.unescape(ftfy.fix_text(text))).strip()


def _plain(text: str) -> str:
    return _squeeze(text.replace("_", " ").translate(_PUNCTUATION).lower())


# Clean-up before the vocabulary's own, as the project does it whose folder it is.
CLEANERS: Mapping[str, Callable[[str], str]] = {
    "": str,
    "siglip": lambda text: _squeeze(text.lower().translate(_PUNCTUATION)),
    "siglip_cased": lambda text: _squeeze(text.translate(_PUNCTUATION)),
    "open_clip:whitespace": lambda text: _squeeze(_fixed(text)),
    "open_clip:lower": lambda text: _squeeze(_fixed(text)).lower(),
    "open_clip:canonicalize": lambda text: _plain(_fixed(text)),
}


@dataclasses.dataclass(frozen=True)
class Rules:
    """The way from a caption to a row of ids.

    Attributes:
      file: name of the vocabulary, a tokenizer.json or a SentencePiece .model.
      clean: clean-up of a caption, a key of `CLEANERS`.
      start: ids before the caption.
      end: ids after the caption, kept where it is cut.
      pad: id that fills the row.
      pad_side: side that is filled, "right" or "left".
    """

    file: str
    clean: str
    start: tuple[int, ...]
    end: tuple[int, ...]
    pad: int
    pad_side: str


@dataclasses.dataclass(frozen=True)
class Published:
    """A vocabulary and its rules.

    Attributes:
      vocabulary: content of its file; a tokenizer.json holds the rules too, as far as it can.
      rules: way from a caption to a row.
    """

    vocabulary: bytes
    rules: Rules

    @property
    def identity(self) -> str:
        """The name and the checksum; equal identities give equal ids."""
        rules = json.dumps(dataclasses.asdict(self.rules), sort_keys=True).encode()
        return PUBLISHED + hashlib.sha256(rules + self.vocabulary).hexdigest()

    def files(self) -> dict[str, bytes]:
        """Returns the files from which `find` makes the same tokenizer, by name."""
        rules = dataclasses.asdict(self.rules) | {"sha256": checksum(self.vocabulary)}
        return {
            self.rules.file: self.vocabulary,
            RULES: (json.dumps(rules, indent=2) + "\n").encode(),
        }


class PublishedTokenizer(Tokenizer):
    """A tokenizer of transformers or open_clip; its rows are theirs."""

    def __init__(self, published: Published, context_length: int, source: object):
        """Raises UserError if the vocabulary is damaged; `source` names it in messages."""
        self.rules, self.context_length = published.rules, context_length
        self.identity = published.identity
        self._clean = CLEANERS[self.rules.clean]
        self._ids: Callable[[list[str]], list[list[int]]]
        self._text: Callable[[list[int]], str]
        if self.rules.file.endswith(".json"):
            model = load_json(published.vocabulary, source)
            self.vocab_size = 1 + max(model.get_vocab(with_added_tokens=True).values())
            self._ids = lambda texts: [
                row.ids for row in model.encode_batch(texts, add_special_tokens=False)
            ]
            self._text = model.decode
        else:
            pieces = sentencepiece_model(published.vocabulary, source)
            self.vocab_size = pieces.vocab_size()
            self._ids, self._text = pieces.encode, pieces.decode
        room = len(self.rules.start) + len(self.rules.end)
        if context_length < room + 1:
            raise UserError(
                f"A context_length of {context_length} has no room for text beside the {room} "
                f"special tokens of {source}."
            )
        self._empty = np.frombuffer(self._row(next(iter(self._pack([""])))), np.int32)

    @property
    def end(self) -> int | None:
        """The id that ends a caption; None: it has none."""
        return self.rules.end[-1] if self.rules.end else None

    def is_empty(self, row: Int32[np.ndarray, " l"]) -> bool:
        """Returns whether a row of ids has no text."""
        return np.array_equal(row, self._empty)

    def decode(self, ids: Iterable[int]) -> str:
        """Decodes one row of ids, up to the end token."""
        row = [int(token) for token in ids]
        first = len(row) - len(list(_without_leading(row, self.rules.pad)))
        row = row[first:] if self.rules.pad_side == "left" else row
        row = row[len(self.rules.start) :] if self.rules.start else row
        stop = {self.end, self.rules.pad}
        length = next((i for i, token in enumerate(row) if token in stop), len(row))
        return self._text(row[:length]).strip()

    def _pack(self, texts: Sequence[str]) -> Iterable[bytes]:
        if not texts:
            return []
        rows = self._ids([self._clean(_encodable(text)) for text in texts])
        return [np.asarray(ids, np.int32).tobytes() for ids in rows]

    def _unpack(self, ids: list[int]) -> str:
        return self._text(ids)

    def _row(self, ids: bytes) -> bytes:
        start, end = self.rules.start, self.rules.end
        room = self.context_length - len(start) - len(end)
        filled = [*start, *np.frombuffer(ids, np.int32)[:room], *end]
        padding = [self.rules.pad] * (self.context_length - len(filled))
        row = filled + padding if self.rules.pad_side == "right" else padding + filled
        return np.asarray(row, np.int32).tobytes()

    def _length(self, ids: bytes) -> int:
        return len(ids) // ITEMSIZE + len(self.rules.start) + len(self.rules.end)


def _without_leading(row: Sequence[int], token: int) -> Iterable[int]:
    place = next((i for i, other in enumerate(row) if other != token), len(row))
    return row[place:]


def _encodable(text: str) -> str:
    """Returns the text with lone surrogates replaced, which the libraries do not take."""
    return text.encode("utf-8", "replace").decode("utf-8")


# ---- tokenizer.json ----------------------------------------------------------------------------

SPACES: list[dict[str, Any]] = [
    {"type": "Replace", "pattern": {"Regex": r"\s+"}, "content": " "},
    {"type": "Strip", "strip_left": True, "strip_right": True},
]
_NO_PUNCTUATION: dict[str, Any] = {
    "type": "Replace",
    "pattern": {"Regex": r"[!-/:-@\[-`{-~]"},
    "content": "",
}
CANONICAL: dict[str, list[dict[str, Any]]] = {
    "siglip": [{"type": "Lowercase"}, _NO_PUNCTUATION, *SPACES],
    "siglip_cased": [_NO_PUNCTUATION, *SPACES],
    "open_clip:whitespace": SPACES,
    "open_clip:lower": [*SPACES, {"type": "Lowercase"}],
    "open_clip:canonicalize": [
        {"type": "Replace", "pattern": {"String": "_"}, "content": " "},
        _NO_PUNCTUATION,
        {"type": "Lowercase"},
        *SPACES,
    ],
}


def self_contained(published: Published) -> bytes:
    """Returns a tokenizer.json that cleans up by itself, but for ftfy and HTML entities."""
    fields = json.loads(published.vocabulary)
    if published.rules.clean:
        first = CANONICAL[published.rules.clean]
        fields["normalizer"] = sequence(first, fields.get("normalizer"))
    return dump(fields)


def token_names(published: Published, source: object) -> dict[str, str]:
    """Returns the special tokens as transformers names them."""
    rules = published.rules
    if rules.file == JSON:
        name = load_json(published.vocabulary, source).id_to_token
    else:
        name = sentencepiece_model(published.vocabulary, source).id_to_piece
    ids = {"bos_token": rules.start[:1], "eos_token": rules.end[-1:], "pad_token": (rules.pad,)}
    return {key: name(*value) for key, value in ids.items() if value}


def sequence(first: list[dict[str, Any]], then: dict[str, Any] | None) -> dict[str, Any]:
    return {"type": "Sequence", "normalizers": [*first, *([then] if then else [])]}


def load_json(content: bytes, source: object) -> Any:
    """Returns the library's tokenizer."""
    from tokenizers import Tokenizer as Library  # only those who use it need wait for it

    try:
        model = Library.from_str(content.decode())
    except Exception as error:  # the library raises no narrower one
        raise UserError(f"The tokenizer {source} cannot be read ({error}). {REMEDY}") from error
    model.no_padding()
    model.no_truncation()
    return model


def dump(fields: Mapping[str, Any]) -> bytes:
    return json.dumps(fields, ensure_ascii=False).encode("utf-8", "surrogatepass")


def checksum(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
