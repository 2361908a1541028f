"""Tokenizers that come with weights: recognised, checked, written."""

import functools
import json
import pathlib

from etils import epath

from clip_jax.data import bpe
from clip_jax.data import tokenizer as tokenizers
from clip_jax.errors import UserError
from clip_jax.models import Size
from clip_jax.storage import locations, ranges
from clip_jax.weights.convert import files
from clip_jax.weights.model import TokenizerFile

OPENAI = TokenizerFile("openai", tokenizers.OpenAITokenizer.identity)
UNKNOWN = TokenizerFile("", "")
_SIGLIP_FILES = ("spiece.model", "sentencepiece.model", "tokenizer.model", "tokenizer.json")


def named(name: str, size: Size) -> TokenizerFile:
    """Returns the tokenizer that --tokenizer=NAME names for weights of another project."""
    if name == "openai":
        return _checked(OPENAI, bpe.VOCABULARY_SIZE, size, name)
    path = locations.parse(name)
    file = TokenizerFile("siglip", tokenizers.siglip_identity(path), path)
    tokenizer = file.create(size.context_length)
    assert tokenizer is not None
    return _checked(file, tokenizer.vocab_size, size, name)


def _checked(file: TokenizerFile, count: int, size: Size, name: object) -> TokenizerFile:
    if count > size.vocab_size:
        raise UserError(
            f"The tokenizer {name} has {count:,} entries, but the model has vocab_size "
            f"{size.vocab_size:,}: it is of another model. Name the right one with --tokenizer."
        )
    return file


# ---- Beside weights of transformers and open_clip ----------------------------------------------


def find(folder: epath.Path, size: Size) -> TokenizerFile:
    """Returns the tokenizer in a folder of transformers or open_clip.

    Its files say which it is, or the size of the vocabulary.

    Raises:
      UserError: it splits words as OpenAI's does, but in another vocabulary.
    """
    if size.vocab_size != bpe.VOCABULARY_SIZE:
        path = files.find(folder, _SIGLIP_FILES)
        return UNKNOWN if path is None else named(str(path), size)
    vocabulary = _published_vocabulary(folder)
    if vocabulary is not None and vocabulary != openai_vocabulary():
        known = openai_vocabulary()
        other = next((word for word, i in vocabulary.items() if known.get(word) != i), "its merges")
        raise UserError(
            f"The tokenizer in {folder} is not OpenAI's: {other!r} has the id "
            f"{vocabulary.get(other)} instead of {known.get(other)}. Such a model cannot be "
            "converted yet; if the files are wrong, delete them, or name the "
            "tokenizer: --tokenizer=openai."
        )
    return OPENAI


def _published_vocabulary(folder: epath.Path) -> dict[str, int] | None:
    """Returns words to ids, or None where the folder has no such file."""
    path = files.find(folder, ("vocab.json", "tokenizer.json"))
    if path is None:
        return None
    content = ranges.read(path)
    try:
        fields = json.loads(content)
        return fields if path.name == "vocab.json" else fields["model"]["vocab"]
    except (ValueError, KeyError) as error:
        raise UserError(
            f"The tokenizer in {folder} is damaged ({error}): copy it again."
        ) from error


@functools.cache
def openai_vocabulary() -> dict[str, int]:
    """Returns OpenAI's words, as they are written in its file, to ids."""
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    written = [*map(chr, shown), *(chr(256 + i) for i in range(256 - len(shown)))]
    words = [*written, *(char + "</w>" for char in written)]
    words += [merge.replace(" ", "") for merge in openai_merges()]
    words += ["<|startoftext|>", "<|endoftext|>"]
    return {word: i for i, word in enumerate(words)}


def openai_merges() -> list[str]:
    """Returns OpenAI's merges in order, "left right"."""
    count = bpe.VOCABULARY_SIZE - 2 * 256 - 2
    return bpe.read_vocabulary().split("\n")[1 : 1 + count]


def write_huggingface(file: TokenizerFile, size: Size, folder: pathlib.Path) -> None:
    """Writes the files from which transformers makes the tokenizer, as far as it is known.

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
        copy = folder / ("tokenizer.json" if is_json else "spiece.model")
        copy.write_bytes(ranges.read(file.path))
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
