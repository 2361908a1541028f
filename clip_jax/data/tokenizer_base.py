"""The base of all tokenizers: rows of ids from the ids of texts."""

import abc
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int32, Int64

from clip_jax.errors import UserError

ITEMSIZE = 4  # bytes of an int32
PUBLISHED = "huggingface:"  # before the folder of a tokenizer that came with weights

Ids = Int32[np.ndarray, " n"]  # of a text, without start and end token
Shorten = Callable[[Ids, int], Ids]  # chooses as many ids as asked for from a text with more


class Tokenizer(abc.ABC):
    """The base of all tokenizers. Safe to use from several threads.

    Attributes:
      vocab_size: number of ids; the start token is vocab_size - 2, the end token vocab_size - 1,
        except in SigLIP's and in published ones.
      context_length: ids in a row, start and end token included.
      identity: name and checksum of the vocabulary; equal identities give equal ids.
    """

    vocab_size: int
    context_length: int
    identity: str

    @property
    def end(self) -> int | None:
        """The id that ends a text; None: there is none."""
        return self.vocab_size - 1

    @abc.abstractmethod
    def _pack(self, texts: Sequence[str]) -> Iterable[bytes]:
        """Returns the ids of each text, without start and end token, as packed int32."""

    @abc.abstractmethod
    def _unpack(self, ids: list[int]) -> str:
        """Returns the text of ids, which include neither start nor end token."""

    def encode(
        self, text: str, shorten: Shorten | None = None
    ) -> tuple[Int32[np.ndarray, " l"], bool]:
        """Encodes a text; also returns whether it was shortened to fit.

        Args:
          text: any text.
          shorten: makes a text that is too long fit; None: its end is cut off.
        """
        (ids,) = self._pack([text])
        too_long = self._length(ids) > self.context_length
        if too_long and shorten is not None:
            room = self.context_length - self._length(b"")
            ids = shorten(np.frombuffer(ids, np.int32), room).tobytes()
        return np.frombuffer(bytearray(self._row(ids)), np.int32), too_long

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

    def piece(self, token: int) -> str:
        """Returns the text of a single id, without the blanks around it."""
        return self._unpack([token]).strip()

    def decode(self, ids: Iterable[int]) -> str:
        """Decodes one row of ids: cleaned, lower-case, up to the first end token."""
        start, end = self.vocab_size - 2, self.vocab_size - 1
        ids = [int(token) for token in ids]
        ids = ids[: ids.index(end)] if end in ids else ids
        return self._unpack([token for token in ids if token != start]).strip()

    def _row(self, ids: bytes) -> bytes:
        start, end = self._ends
        width = ITEMSIZE * self.context_length
        return (start + ids[: width - 2 * ITEMSIZE] + end).ljust(width, b"\0")

    def _length(self, ids: bytes) -> int:
        return len(ids) // ITEMSIZE + 2

    @functools.cached_property
    def _ends(self) -> tuple[bytes, bytes]:
        return np.int32(self.vocab_size - 2).tobytes(), np.int32(self.vocab_size - 1).tobytes()


def sentencepiece_model(content: bytes, source: object) -> Any:
    """Returns the SentencePieceProcessor of a .model file; `source` names it in messages."""
    import sentencepiece  # only those who use it need wait for it

    try:
        processor = sentencepiece.SentencePieceProcessor()
        processor.LoadFromSerializedProto(content)
        return processor
    except RuntimeError as error:
        raise UserError(
            f"The tokenizer {source} cannot be read as a SentencePiece model: {error}. Name a "
            ".model file as the sentencepiece trainer writes it, or use tokenizer 'openai'."
        ) from error
