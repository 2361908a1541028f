"""OpenAI's byte-pair encoding of captions: the same ids for any text, many times as fast.

Three things make it fast without a change of any id:
- ftfy and HTML unescaping run only where they can change the text (`clean`);
- no word crosses white space, so a text is split there and the pieces are looked up;
- ids are kept as packed int32, so that encoding a caption is one `bytes.join`.
"""

import array
import functools
import gzip
import hashlib
import heapq
import html
import importlib.metadata
import itertools
import re
import unicodedata
import zlib
from collections.abc import Callable

import ftfy
import regex
from ftfy.badness import is_bad
from ftfy.fixes import uncurl_quotes, unescape_html

from clip_jax.errors import UserError

VOCABULARY_SIZE = 49_408  # 256 bytes, 256 bytes that end a word, 48,894 merges, 2 special tokens
START, END = VOCABULARY_SIZE - 2, VOCABULARY_SIZE - 1
# The PyPI packages that bring the vocabulary, and the file in them. The first is the one that
# requirements name; the others need PyTorch, and are taken where they are there already.
VOCABULARY_FILES = {
    "openai-clip": "clip/bpe_simple_vocab_16e6.txt.gz",
    "open_clip_torch": "open_clip/bpe_simple_vocab_16e6.txt.gz",
    "clip-anytorch": "clip/bpe_simple_vocab_16e6.txt.gz",
}
VOCABULARY_SHA256 = "67603cfda2e032ad77b5f8808af37789d590db664b26df8705d2bf8b3c553fc8"  # unpacked

_MERGES = VOCABULARY_SIZE - 2 * 256 - 2
_GONE = -1  # in place of an id that has been merged into the one before
_SPECIAL = {"<|startoftext|>": START, "<|endoftext|>": END}
# OpenAI's word pattern. IGNORECASE matters although texts are lower-cased before: "'ſ" is "'s".
_WORDS = regex.compile(
    "|".join(map(regex.escape, _SPECIAL)) + r"|'(?:s|t|re|ve|m|ll|d)|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+",
    regex.IGNORECASE,
)

# Characters that ftfy removes, replaces or joins, curly quotes and HTML entities aside: controls,
# odd line breaks, Latin ligatures, full-width and half-width forms, surrogates.
_REPLACED = re.compile(
    "[\x00-\x08\x0b\r-\x1f\x7f-\x9f\u0132\u0133\u0149\u01c4-\u01cc\u01f1-\u01f3"
    "\u2028\u2029\u206a-\u206f\u3000\ud800-\udfff\ufb00-\ufb06\ufeff\uff01-\uffef\ufff9-\ufffc]"
)
# Without one of these, ftfy's mojibake detector, which is ten times as slow, cannot match.
_SUSPECT = re.compile("[ŒœÂÃ]|[\xa0-\u04ff\u2000-\u2fff\uf8ff-\ufffd]{2}")
_FTFY_SEGMENT = 1_000_000  # ftfy cuts longer texts into segments


def clean(text: str) -> str:
    """Cleans a text as OpenAI does, except for the amount of white space.

    That is ftfy.fix_text, html.unescape twice and lower-casing. Repeated white space, and that at
    the ends, stays: it does not change the ids.
    """
    if "&" in text or not (text.isascii() and text.replace("\n", " ").isprintable()):
        text = _fix_text(text)
        if "&" in text:
            text = html.unescape(html.unescape(text))
    return text.lower()


def _fix_text(text: str) -> str:
    """Returns ftfy.fix_text(text); calls only those of its fixes that common captions need."""
    if "\n" in text[:-1] or len(text) > _FTFY_SEGMENT:  # ftfy fixes each line by itself
        return ftfy.fix_text(text)
    fixed, previous = text, None
    has_entities = "&" in text and "<" not in text  # ftfy takes a text with "<" for real HTML
    while fixed != previous:
        previous = fixed
        if has_entities:
            fixed = unescape_html(fixed)
        if fixed.isascii() and fixed.isprintable():
            continue
        if _REPLACED.search(fixed) or (_SUSPECT.search(fixed) and is_bad(fixed)):
            return ftfy.fix_text(text)
        fixed = unicodedata.normalize("NFC", uncurl_quotes(fixed))
    return fixed


class Memo(dict[str, bytes]):
    """A cache of `function` for short strings; emptied when it holds `limit` of them.

    A hit is a plain dict look-up. Safe to use from several threads.
    """

    def __init__(self, function: Callable[[str], bytes], limit: int):
        super().__init__()
        self._function = function
        self._limit = limit

    def __missing__(self, key: str) -> bytes:
        value = self._function(key)
        if len(key) <= 32:  # longer ones are rarely repeated
            if len(self) >= self._limit:
                self.clear()
            self[key] = value
        return value


class BPE:
    """The vocabulary, and a cache of the ids of words."""

    def __init__(self, remembered: int = 2**17):
        """Reads the vocabulary.

        Args:
          remembered: number of words, and of pieces between white space, that are cached at most;
            they take 50 MB by default.
        """
        self._byte_ids, self._merges, self._bytes = _vocabulary()
        self._pieces = Memo(self._encode_piece, remembered)
        self._words = Memo(self._encode_word, remembered)

    def encode(self, text: str) -> bytes:
        """Encodes a text: ids as packed int32 in native byte order, no start and end token added.

        As in OpenAI's code, "<|startoftext|>" and "<|endoftext|>" in a text are the special tokens.
        """
        return b"".join(map(self._pieces.__getitem__, clean(text).split()))

    def decode(self, ids: list[int]) -> str:
        """Decodes ids, with a space after each word; bytes that are not UTF-8 become U+FFFD."""
        return b"".join(map(self._bytes.__getitem__, ids)).decode("utf-8", errors="replace")

    def _encode_piece(self, piece: str) -> bytes:
        if piece.isalpha() and piece.isascii():  # certainly one word, and the usual case
            return self._words[piece]
        return b"".join(map(self._words.__getitem__, _WORDS.findall(piece)))

    def _encode_word(self, word: str) -> bytes:
        if word in _SPECIAL:
            return array.array("i", [_SPECIAL[word]]).tobytes()
        ids = [self._byte_ids[byte] for byte in word.encode()]
        ids[-1] += 256  # the form that ends a word
        return array.array("i", self._merge(ids)).tobytes()

    def _merge(self, ids: list[int]) -> list[int]:
        """Merges the pair learnt first, leftmost first, until none is left; overwrites `ids`.

        O(n log n), so that a word of a million letters does not stall the pipeline.
        """
        find, size = self._merges.get, len(ids)
        left, right = list(range(-1, size - 1)), list(range(1, size + 1))  # neighbours still alive
        pairs = enumerate(itertools.pairwise(ids))
        heap = [(merged, i) for i, pair in pairs if (merged := find(pair))]  # ids in learning order
        heapq.heapify(heap)
        while heap:
            merged, i = heapq.heappop(heap)
            j = right[i]
            if j == size or find((ids[i], ids[j])) != merged:
                continue  # one of the two has been merged with another since
            ids[i], ids[j] = merged, _GONE
            right[i] = k = right[j]
            if k < size:
                left[k] = i
                if follower := find((merged, ids[k])):
                    heapq.heappush(heap, (follower, i))
            if (h := left[i]) >= 0 and (follower := find((ids[h], merged))):
                heapq.heappush(heap, (follower, h))
        return [token for token in ids if token != _GONE]


@functools.cache
def _vocabulary() -> tuple[list[int], dict[tuple[int, int], int], list[bytes]]:
    """Returns (id of each byte, id of each pair that is merged, the bytes of each id)."""
    # In the file a byte is written as the Latin-1 character of its number where that shows, and
    # else as the next free character from 256 on; ids follow the same order.
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in shown]
    written = [*map(chr, shown), *(chr(256 + i) for i in range(len(hidden)))]
    byte_of = [bytes([byte]) for byte in shown + hidden]

    names = {name: i for i, name in enumerate(written + [char + "</w>" for char in written])}
    decoded = byte_of + [byte + b" " for byte in byte_of]
    merges = {}
    for line in read_vocabulary().split("\n")[1 : 1 + _MERGES]:
        left, right = line.split(" ")
        pair = names[left], names[right]
        merges[pair] = names[left + right] = len(names)
        decoded.append(decoded[pair[0]] + decoded[pair[1]])
    decoded += [name.encode() for name in _SPECIAL]
    byte_ids = [byte_of.index(bytes([byte])) for byte in range(256)]
    return byte_ids, merges, decoded


def read_vocabulary() -> str:
    """Reads the data file of a package without importing it, which would import torch."""
    for package, name in VOCABULARY_FILES.items():
        try:
            path = importlib.metadata.distribution(package).locate_file(name)
            break
        except importlib.metadata.PackageNotFoundError:
            continue
    else:
        raise UserError(
            "OpenAI's vocabulary comes with the package openai-clip, which is not installed. "
            "Run `pip install openai-clip`."
        )
    remedy = f"Run `pip install --force-reinstall --no-deps {package}`."
    try:
        with open(str(path), "rb") as file:
            content = gzip.decompress(file.read())
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"OpenAI's vocabulary cannot be read: {error}. {remedy}") from error
    if hashlib.sha256(content).hexdigest() != VOCABULARY_SHA256:
        raise UserError(f"{path} is not OpenAI's vocabulary: its checksum differs. {remedy}")
    return content.decode("utf-8")
