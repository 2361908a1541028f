"""Tokenizers of captions: OpenAI's BPE, a SentencePiece model, or one used as SigLIP does.

A row of ids is start token, text, end token, zeros. The end token is the largest id, so the text
tower finds it as the row's maximum. Zero is an ordinary token as well, as in OpenAI's code.
SigLIP's rows are text and end tokens, without a start.
"""

import functools
import hashlib
import string
from collections.abc import Callable, Iterable, Sequence

import numpy as np
from etils import epath
from jaxtyping import Int32

from clip_jax.data import bpe
from clip_jax.data.tokenizer_base import ITEMSIZE, PUBLISHED, Tokenizer, sentencepiece_model
from clip_jax.errors import UserError
from clip_jax.storage import locations, ranges

SIGLIP = "siglip:"  # before the path of a vocabulary that is used as SigLIP does
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


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
        content = _read(locations.parse(path))
        self._model = sentencepiece_model(content, path)
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
            model = sentencepiece_model(_read(path), path)
            self._ids, self._text, self.vocab_size = model.encode, model.decode, model.vocab_size()

    @property
    def end(self) -> int:
        """The id that ends a text."""
        return self._END

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
        return len(ids) // ITEMSIZE + 1


def siglip_identity(path: epath.Path) -> str:
    """Returns the identity of a vocabulary used as SigLIP does; UserError where there is none."""
    return SIGLIP + hashlib.sha256(_read(path)).hexdigest()


def _read(path: epath.Path) -> bytes:
    """Reads a vocabulary; UserError where there is none."""
    try:
        return ranges.read(path)
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


def create(name: str, context_length: int) -> Tokenizer:
    """Makes a tokenizer.

    Args:
      name: "openai"; the path of a SentencePiece .model file; "siglip:" and the path of one, or of
        a tokenizer.json, that is used as SigLIP does; or "huggingface:" and a folder of
        transformers or open_clip, for the tokenizer in it.
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
    if name.startswith(PUBLISHED):
        from clip_jax.data import published  # the rules of others: few runs need them

        folder = locations.parse(name.removeprefix(PUBLISHED))
        return published.create(folder, context_length)
    if name.endswith(".model"):
        return SentencePieceTokenizer(name, context_length)
    raise UserError(
        f"There is no tokenizer {name!r}. Use 'openai'; the path of a SentencePiece model, a file "
        f"whose name ends in .model; {SIGLIP}PATH for one that SigLIP was trained with; or "
        f"{PUBLISHED}FOLDER for the one in a folder of transformers or open_clip."
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
