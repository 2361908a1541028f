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
from clip_jax.weights.base import TokenizerFile
from clip_jax.weights.convert import files

OPENAI = TokenizerFile("openai", tokenizers.OpenAITokenizer.identity)
UNKNOWN = TokenizerFile("", "")
_SIGLIP_FILES = ("spiece.model", "sentencepiece.model", "tokenizer.model", "tokenizer.json")


def create(file: TokenizerFile, context_length: int) -> tokenizers.Tokenizer | None:
    """The tokenizer, checked against its identity; None where it is not known.

    Raises:
      UserError: its vocabulary is not the one the model was trained with.
    """
    if not file.name:
        return None
    made = tokenizers.create(file.setting, context_length)
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
    path = locations.parse(name)
    file = TokenizerFile("siglip", tokenizers.siglip_identity(path), path)
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
        path = files.find(folder, _SIGLIP_FILES)
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
    path = files.find(folder, ("vocab.json", "tokenizer.json"))
    if path is None:
        return None
    content = ranges.read(path)
    try:
        found = json.loads(content)
        return found if path.name == "vocab.json" else found["model"]["vocab"]
    except (ValueError, KeyError) as error:
        raise UserError(
            f"The tokenizer in {folder} is damaged ({error}): copy it again."
        ) from error


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


def write_huggingface(file: TokenizerFile, size: Size, folder: pathlib.Path) -> None:
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
