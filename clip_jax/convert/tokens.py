"""Tokenizers that come with weights: recognised, checked, written, and SigLIP's own."""

import functools
import hashlib
import json
import shutil
import string
from collections.abc import Iterable, Sequence

import numpy as np
from etils import epath

from clip_jax.data import bpe
from clip_jax.data import tokenizer as tokenizers
from clip_jax.errors import UserError
from clip_jax.models import Size
from clip_jax.weights import TokenizerFile

OPENAI = TokenizerFile("openai", tokenizers.OpenAITokenizer.identity)
UNKNOWN = TokenizerFile("", "")
_SIGLIP_FILES = ("spiece.model", "sentencepiece.model", "tokenizer.model", "tokenizer.json")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


class SiglipTokenizer(tokenizers.Tokenizer):
    """A SentencePiece vocabulary used as SigLIP does: text, then end tokens up to the context.

    Texts are lower-cased and lose their punctuation first. There is no start token.
    """

    _END = 1  # also fills the rest of the row

    def __init__(self, path: epath.Path, context_length: int):
        """Raises UserError if `path` is neither a SentencePiece model nor a tokenizer.json."""
        self.context_length = context_length
        self.identity = siglip_identity(path)
        load = _tokenizer_json if path.name.endswith(".json") else _sentencepiece
        self._ids, self._text, self.vocab_size = load(path)

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
        return len(ids) // 4 + 1

    def decode(self, ids: Iterable[int]) -> str:
        """Text of one row of ids, up to the first end token."""
        row = [int(token) for token in ids]
        return self._text(row[: row.index(self._END)] if self._END in row else row).strip()


def _tokenizer_json(path: epath.Path) -> tuple:
    from tokenizers import Tokenizer

    try:
        model = Tokenizer.from_str(path.read_text())
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


def _sentencepiece(path: epath.Path) -> tuple:
    inner = tokenizers.create(str(path), context_length=2)
    assert isinstance(inner, tokenizers.SentencePieceTokenizer)
    model = inner._model
    return (
        lambda texts: [row.numpy() for row in model.tokenize(texts)],
        lambda ids: model.detokenize(np.array(ids, np.int32)).numpy().decode("utf-8", "replace"),
        inner.vocab_size - 2,  # without our start and end token
    )


def siglip_identity(path: epath.Path) -> str:
    """Of a vocabulary file used as SigLIP does; UserError where there is none."""
    try:
        return f"siglip:{hashlib.sha256(path.read_bytes()).hexdigest()}"
    except OSError as error:
        raise UserError(
            f"The tokenizer {path} cannot be read ({error}). Give --tokenizer the tokenizer.json "
            "or .model file that was published with the weights."
        ) from error


def create(file: TokenizerFile, context_length: int) -> tokenizers.Tokenizer | None:
    """The tokenizer, checked against its identity; None where it is not known.

    Raises:
      UserError: its vocabulary is not the one the model was trained with.
    """
    if not file.name:
        return None
    if file.name == "siglip":
        assert file.path is not None
        made: tokenizers.Tokenizer = SiglipTokenizer(file.path, context_length)
    else:
        made = tokenizers.create(str(file.path or file.name), context_length)
    if made.identity != file.identity:
        raise UserError(
            f"The model was trained with the tokenizer {file.identity}, but "
            f"{file.path or file.name} is now {made.identity}."
        )
    return made


def named(name: str, size: Size) -> TokenizerFile:
    """What --tokenizer=NAME means for weights of another project."""
    if name == "openai":
        return _checked(OPENAI, bpe.VOCABULARY_SIZE, size, name)
    path = epath.Path(name).expanduser()
    file = TokenizerFile("siglip", siglip_identity(path), path)
    made = create(file, size.context_length)
    assert made is not None
    return _checked(file, made.vocab_size, size, name)


def _checked(file: TokenizerFile, count: int, size: Size, name: object) -> TokenizerFile:
    if count > size.vocab_size:
        raise UserError(
            f"The tokenizer {name} has {count:,} entries, but the model has vocab_size "
            f"{size.vocab_size:,}: it is of another model. Name the right one with --tokenizer."
        )
    return file


# ---- Beside weights of transformers and open_clip ----------------------------------------------


def find(folder: epath.Path, size: Size) -> TokenizerFile:
    """The tokenizer in a folder of transformers or open_clip, by its files or vocabulary size.

    Raises:
      UserError: it splits words as OpenAI's does, but in another vocabulary.
    """
    if size.vocab_size != bpe.VOCABULARY_SIZE:
        path = next((folder / f for f in _SIGLIP_FILES if (folder / f).is_file()), None)
        return UNKNOWN if path is None else named(str(path), size)
    vocabulary = _published_vocabulary(folder)
    if vocabulary is not None and vocabulary != openai_vocabulary():
        known, found = openai_vocabulary(), vocabulary
        other = next((word for word, i in found.items() if known.get(word) != i), "its merges")
        raise UserError(
            f"The tokenizer in {folder} is not OpenAI's: {other!r} has the id "
            f"{found.get(other)} instead of {known.get(other)}. Such a model cannot be converted "
            "yet; if the files are wrong, delete them, or name the tokenizer: --tokenizer=openai."
        )
    return OPENAI


def _published_vocabulary(folder: epath.Path) -> dict[str, int] | None:
    """Words to ids, or None where the folder has no such file."""
    try:
        if (folder / "vocab.json").is_file():
            return json.loads((folder / "vocab.json").read_text())
        if (folder / "tokenizer.json").is_file():
            return json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    except (ValueError, KeyError) as error:
        raise UserError(
            f"The tokenizer in {folder} is damaged ({error}): copy it again."
        ) from error
    return None


@functools.cache
def openai_vocabulary() -> dict[str, int]:
    """OpenAI's words, as they are written in its file, to ids."""
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    written = [*map(chr, shown), *(chr(256 + i) for i in range(256 - len(shown)))]
    words = [*written, *(char + "</w>" for char in written)]
    words += [merge.replace(" ", "") for merge in openai_merges()]
    words += ["<|startoftext|>", "<|endoftext|>"]
    return {word: i for i, word in enumerate(words)}


def openai_merges() -> list[str]:
    """OpenAI's merges in order, "left right"."""
    count = bpe.VOCABULARY_SIZE - 2 * 256 - 2
    return bpe.read_vocabulary().split("\n")[1 : 1 + count]


def write_huggingface(file: TokenizerFile, size: Size, folder: epath.Path) -> None:
    """Writes what transformers needs to make the tokenizer, as far as it is known.

    Raises:
      UserError: transformers has no such tokenizer.
    """
    if file.name == "sentencepiece":
        raise UserError(
            "The model's captions have start and end tokens on top of a SentencePiece vocabulary, "
            "which no tokenizer of transformers adds: convert it with --to=clip_jax."
        )
    settings: dict = {"model_max_length": size.context_length}
    if file.name == "openai":
        vocabulary = json.dumps(openai_vocabulary(), ensure_ascii=False)
        (folder / "vocab.json").write_text(vocabulary)
        (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *openai_merges()]) + "\n")
        start, end = "<|startoftext|>", "<|endoftext|>"
        special = {"bos_token": start, "eos_token": end, "pad_token": end, "unk_token": end}
        settings |= {"tokenizer_class": "CLIPTokenizer", "do_lower_case": True}
    elif file.path is not None:
        is_json = file.path.name.endswith(".json")
        shutil.copyfile(file.path, folder / ("tokenizer.json" if is_json else "spiece.model"))
        special = {"eos_token": "</s>", "pad_token": "</s>", "unk_token": "<unk>"}
        kind = "PreTrainedTokenizerFast" if is_json else "SiglipTokenizer"
        settings |= {"tokenizer_class": kind, "do_lower_case": True}
    else:
        return
    for name, content in (
        ("special_tokens_map.json", special),
        ("tokenizer_config.json", settings | special),
    ):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")
