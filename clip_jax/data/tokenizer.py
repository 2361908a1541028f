"""Tokenizers of captions: OpenAI's BPE, a SentencePiece model, or one used as SigLIP does.

A row of ids is start token, text, end token, zeros. The end token is the largest id, so the text
tower finds it as the row's maximum. Zero is an ordinary token as well, as in OpenAI's code.
SigLIP's rows are text and end tokens, without a start.
"""

import abc
import functools
import hashlib
import string
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from etils import epath
from jaxtyping import Int32, Int64

from clip_jax.data import bpe
from clip_jax.errors import UserError
from clip_jax.storage import locations, ranges

SIGLIP = "siglip:"  # before the path of a vocabulary that is used as SigLIP does
_ITEMSIZE = 4  # bytes of an int32
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


class Tokenizer(abc.ABC):
    """The base of all tokenizers. Safe to use from several threads.

    Attributes:
      vocab_size: number of ids; the start token is vocab_size - 2, the end token vocab_size - 1,
        except in SigLIP's.
      context_length: ids in a row, start and end token included.
      identity: name and checksum of the vocabulary; equal identities give equal ids.
    """

    vocab_size: int
    context_length: int
    identity: str

    @abc.abstractmethod
    def _pack(self, texts: Sequence[str]) -> Iterable[bytes]:
        """Returns the ids of each text, without start and end token, as packed int32."""

    @abc.abstractmethod
    def _unpack(self, ids: list[int]) -> str:
        """Returns the text of ids, which include neither start nor end token."""

    def encode(self, text: str) -> tuple[Int32[np.ndarray, " l"], bool]:
        """Encodes a text; also returns whether it was cut to fit."""
        (ids,) = self._pack([text])
        row = np.frombuffer(bytearray(self._row(ids)), np.int32)
        return row, self._length(ids) > self.context_length

    def encode_batch(
        self, texts: Sequence[str]
    ) -> tuple[Int32[np.ndarray, "n l"], Int64[np.ndarray, " n"]]:
        """Encodes n texts; those that are too long are cut, the end token kept.

        Returns:
          The ids, and the number of ids that each text would take if not cut, start and end token
          included.
        """
        packed = list(self._pack(texts))
        # A bytearray, unlike bytes, gives an array that can be written to.
        buffer = bytearray(b"".join(map(self._row, packed)))
        tokens = np.frombuffer(buffer, np.int32).reshape(len(packed), self.context_length)
        return tokens, np.array(list(map(self._length, packed)), np.int64)

    def is_empty(self, row: Int32[np.ndarray, " l"]) -> bool:
        """Returns whether a row of ids has no text."""
        return row[1] == self.vocab_size - 1

    def __call__(
        self, texts: str | Sequence[str], truncate: bool = False
    ) -> Int32[np.ndarray, "n l"]:
        """Encodes n texts (a single one counts as n = 1).

        Raises:
          ValueError: a text is too long and not `truncate`, which cuts it and keeps the end token.
          TypeError: a text is not a str.
        """
        texts = [texts] if isinstance(texts, str) else list(texts)
        for i, text in enumerate(texts):
            if not isinstance(text, str):
                raise TypeError(f"text {i} is not a str but {type(text).__name__}: {text!r:.70}")
        tokens, lengths = self.encode_batch(texts)
        if not truncate and lengths.max(initial=0) > self.context_length:
            i = int(np.argmax(lengths > self.context_length))
            raise ValueError(
                f"text {i} ({texts[i][:60]!r}) takes {lengths[i]} ids with start and end token, "
                f"the context has room for {self.context_length}; truncate=True cuts it and keeps "
                "the end token"
            )
        return tokens

    def decode(self, ids: Iterable[int]) -> str:
        """Decodes one row of ids: cleaned, lower-case, up to the first end token."""
        start, end = self.vocab_size - 2, self.vocab_size - 1
        ids = [int(token) for token in ids]
        ids = ids[: ids.index(end)] if end in ids else ids
        return self._unpack([token for token in ids if token != start]).strip()

    def _row(self, ids: bytes) -> bytes:
        start, end = self._ends
        width = _ITEMSIZE * self.context_length
        return (start + ids[: width - 2 * _ITEMSIZE] + end).ljust(width, b"\0")

    def _length(self, ids: bytes) -> int:
        return len(ids) // _ITEMSIZE + 2

    @functools.cached_property
    def _ends(self) -> tuple[bytes, bytes]:
        return np.int32(self.vocab_size - 2).tobytes(), np.int32(self.vocab_size - 1).tobytes()


class OpenAITokenizer(Tokenizer):
    """The paper's lower-cased byte-level BPE, 49,408 ids."""

    vocab_size = bpe.VOCABULARY_SIZE
    identity = f"openai-bpe:{bpe.VOCABULARY_SHA256}"

    def __init__(self, context_length: int):
        """Raises UserError if the package openai-clip, which has the vocabulary, is missing."""
        self.context_length = context_length
        self._bpe = bpe.BPE()

    def _pack(self, texts: Sequence[str]) -> Iterable[bytes]:
        return map(self._bpe.encode, texts)

    def _unpack(self, ids: list[int]) -> str:
        return self._bpe.decode(ids)


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model, its ids, and two more for start and end.

    Texts get the clean-up of OpenAI's tokenizer first: ftfy, HTML, white space, lower case. Best
    called through `encode_batch`: a call takes as long as dozens of short texts.
    """

    def __init__(self, path: str, context_length: int):
        """Raises UserError if `path` is no SentencePiece model."""
        self._model, content = _sentencepiece(locations.parse(path))
        self.vocab_size = self._model.vocab_size() + 2
        self.context_length = context_length
        self.identity = f"sentencepiece:{hashlib.sha256(content).hexdigest()}"

    def _pack(self, texts: Sequence[str]) -> Iterable[bytes]:
        cleaned = [" ".join(bpe.clean(text).split()) for text in texts]
        return [np.asarray(ids, np.int32).tobytes() for ids in self._model.encode(cleaned)]

    def _unpack(self, ids: list[int]) -> str:
        return self._model.decode(ids)


class SiglipTokenizer(Tokenizer):
    """A SentencePiece vocabulary used as SigLIP does: text, then end tokens up to the context.

    Texts are lower-cased and lose their punctuation first.
    """

    _END = 1  # also fills the rest of the row

    def __init__(self, path: epath.Path, context_length: int):
        """Raises UserError if `path` is neither a SentencePiece model nor a tokenizer.json."""
        self.context_length = context_length
        self.identity = siglip_identity(path)
        self._ids: Callable[[list[str]], list[list[int]]]
        self._text: Callable[[list[int]], str]
        if path.name.endswith(".json"):
            self._ids, self._text, self.vocab_size = _tokenizer_json(path)
        else:
            model, _ = _sentencepiece(path)
            self._ids, self._text, self.vocab_size = model.encode, model.decode, model.vocab_size()

    def is_empty(self, row: Int32[np.ndarray, " l"]) -> bool:
        """Returns whether a row of ids has no text."""
        return row[0] == self._END

    def decode(self, ids: Iterable[int]) -> str:
        """Decodes one row of ids, up to the first end token."""
        row = [int(token) for token in ids]
        return self._text(row[: row.index(self._END)] if self._END in row else row).strip()

    def _pack(self, texts: Sequence[str]) -> Iterable[bytes]:
        if not texts:
            return []
        cleaned = [text.replace("_", " ").translate(_NO_PUNCTUATION).lower() for text in texts]
        rows = self._ids([" ".join(text.split()) for text in cleaned])
        return [np.asarray(ids, np.int32).tobytes() for ids in rows]

    def _unpack(self, ids: list[int]) -> str:
        return self._text(ids)

    def _row(self, ids: bytes) -> bytes:
        row = np.full(self.context_length, self._END, np.int32)
        kept = np.frombuffer(ids, np.int32)[: self.context_length - 1]
        row[: len(kept)] = kept
        return row.tobytes()

    def _length(self, ids: bytes) -> int:
        return len(ids) // _ITEMSIZE + 1


def siglip_identity(path: epath.Path) -> str:
    """Returns the identity of a vocabulary used as SigLIP does; UserError where there is none."""
    try:
        return SIGLIP + hashlib.sha256(ranges.read(path)).hexdigest()
    except OSError as error:
        raise UserError(
            f"The tokenizer {path} cannot be read ({error}). Name the tokenizer.json or .model "
            "file that was published with the weights."
        ) from error


def _tokenizer_json(path: epath.Path) -> tuple[Callable, Callable, int]:
    from tokenizers import Tokenizer

    try:
        model = Tokenizer.from_str(ranges.read(path).decode())
    except Exception as error:  # the library raises no narrower one
        raise UserError(
            f"The tokenizer {path} cannot be read ({error}). Take the tokenizer.json or .model "
            "file that was published with the weights."
        ) from error
    model.no_padding()
    model.no_truncation()

    def ids(texts: list[str]) -> list[list[int]]:
        return [row.ids for row in model.encode_batch(texts, add_special_tokens=False)]

    return ids, model.decode, model.get_vocab_size()


def _sentencepiece(path: epath.Path) -> tuple[Any, bytes]:
    """Returns the SentencePieceProcessor of a .model file, and the file's content."""
    import sentencepiece  # only those who use it need wait for it

    try:
        content = ranges.read(path)
        processor = sentencepiece.SentencePieceProcessor()
        processor.LoadFromSerializedProto(content)
        return processor, content
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"The tokenizer {path} cannot be read as a SentencePiece model: {error}. Name a "
            ".model file as the sentencepiece trainer writes it, or use tokenizer 'openai'."
        ) from error


def create(name: str, context_length: int) -> Tokenizer:
    """Makes a tokenizer.

    Args:
      name: "openai"; the path of a SentencePiece .model file; or "siglip:" and the path of one, or
        of a tokenizer.json, that is used as SigLIP does.
      context_length: ids in a row.

    Raises:
      UserError: an unknown name, a missing package or an unreadable file.
      ValueError: a context without room for start and end token.
    """
    if context_length < 2:
        raise ValueError(f"context_length {context_length} has no room for start and end token")
    if name == "openai":
        return OpenAITokenizer(context_length)
    if name.startswith(SIGLIP):
        path = locations.parse(name.removeprefix(SIGLIP))
        return SiglipTokenizer(path, context_length)
    if name.endswith(".model"):
        return SentencePieceTokenizer(name, context_length)
    raise UserError(
        f"There is no tokenizer {name!r}. Use 'openai'; the path of a SentencePiece model, a file "
        f"whose name ends in .model; or {SIGLIP}PATH for one that SigLIP was trained with."
    )


def tokenize(
    texts: str | Sequence[str], context_length: int = 77, truncate: bool = False
) -> Int32[np.ndarray, "n {context_length}"]:
    """Encodes n texts by OpenAI's BPE (a single one counts as n = 1).

    Raises:
      ValueError: a text is too long and not `truncate`, which cuts it and keeps the end token.
    """
    return _openai(context_length)(texts, truncate)


@functools.lru_cache(maxsize=4)
def _openai(context_length: int) -> Tokenizer:
    return create("openai", context_length)
