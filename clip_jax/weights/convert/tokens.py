"""Tokenizers that come with weights: recognised, checked, written."""

import functools
import json
import pathlib
from typing import Any

from etils import epath

from clip_jax.data import bpe, published
from clip_jax.data import tokenizer as tokenizers
from clip_jax.data.published_tokenizer import (
    RULES,
    Published,
    PublishedTokenizer,
    self_contained,
    token_names,
)
from clip_jax.data.tokenizer_base import PUBLISHED
from clip_jax.errors import UserError
from clip_jax.models import Size
from clip_jax.storage import locations, ranges
from clip_jax.weights.convert import files
from clip_jax.weights.model import TokenizerFile

OPENAI = TokenizerFile("openai", tokenizers.OpenAITokenizer.identity)
UNKNOWN = TokenizerFile("", "")


def named(name: str, size: Size) -> TokenizerFile:
    """Returns the tokenizer that --tokenizer=NAME names for weights of another project."""
    if name == "openai":
        return _checked(OPENAI, bpe.VOCABULARY_SIZE, size, name)
    if name.startswith(PUBLISHED):
        folder = locations.parse(name.removeprefix(PUBLISHED))
        made = published.create(folder, size.context_length)
        _check_end(made, size, folder)
        file = TokenizerFile("huggingface", made.identity, folder)
        return _checked(file, made.vocab_size, size, name)
    path = locations.parse(name.removeprefix(tokenizers.SIGLIP))
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

    Its files say which it is. Without any, a model of 49,408 entries has OpenAI's.

    Raises:
      UserError: a file is damaged, or the model cannot read its ids.
    """
    openai_count = size.vocab_size == bpe.VOCABULARY_SIZE
    openai_size = openai_count and size.text_pool == "end"
    text = _open_clip_text(folder)
    ours = files.find(folder, (RULES,)) is not None
    if openai_count and text is not None and not (text.get("hf_tokenizer_name") or ours):
        _check_simple(text, folder)
        return OPENAI  # open_clip takes its own, whatever else lies there
    found = published.find(folder)
    if found is None:
        return OPENAI if openai_size else UNKNOWN
    if openai_size and _is_openai(found):
        return OPENAI
    tokenizer = published.create(folder, size.context_length)
    file = TokenizerFile("huggingface", found.identity, folder)
    _checked(file, tokenizer.vocab_size, size, f"in {folder}")
    _check_end(tokenizer, size, folder)
    return file


def _open_clip_text(folder: epath.Path) -> dict | None:
    """Returns the text_cfg of open_clip; None: the folder is none of its."""
    path = files.find(folder, ("open_clip_config.json",))
    return None if path is None else files.read_json(path)["model_cfg"]["text_cfg"]


def _check_simple(text: dict, folder: epath.Path) -> None:
    extra = {k: v for k, v in (text.get("tokenizer_kwargs") or {}).items() if v}
    if extra not in ({}, {"clean": "lower"}):
        raise UserError(
            f"{folder} uses OpenAI's tokenizer with {json.dumps(extra)} (tokenizer_kwargs), which "
            "is not known here: name one with --tokenizer."
        )


def _check_end(tokenizer: PublishedTokenizer, size: Size, folder: epath.Path) -> None:
    """Raises UserError where the tower would not find the end of a caption."""
    rules = tokenizer.rules
    if size.text_pool != "end":
        return
    if size.end_token is not None and size.end_token not in rules.end:
        raise UserError(
            f"The model in {folder} reads captions at the id {size.end_token} (eos_token_id), with "
            f"which its tokenizer does not end them: it ends them with {list(rules.end)}. One of "
            "the two is of another model; name the right tokenizer with --tokenizer."
        )
    if not rules.end or rules.pad_side == "left":
        what = "fills rows on the left" if rules.end else "adds no end token"
        raise UserError(
            f"The tokenizer in {folder} {what}, but the model reads captions at their end token "
            "and counts positions from the left. Save it with padding_side='right' and an end "
            "token, or name another with --tokenizer."
        )


def _is_openai(found: Published) -> bool:
    """Returns whether a tokenizer is OpenAI's vocabulary with its clean-up and end tokens."""
    if not found.rules.file.endswith(".json") or found.rules.clean:
        return False
    fields = json.loads(found.vocabulary)
    model = fields["model"]
    merges = [m if isinstance(m, str) else " ".join(m) for m in model.get("merges", ())]
    words = {token["content"] for token in fields.get("added_tokens") or ()}
    normalizer = json.dumps(fields.get("normalizer"))
    return (
        model["vocab"] == openai_vocabulary()
        and merges == openai_merges()
        and words <= {"<|startoftext|>", "<|endoftext|>"}
        and "Lowercase" in normalizer
        and not any(kind in normalizer for kind in ("StripAccents", "NFK", "BertNormalizer"))
        and (found.rules.start, found.rules.end) == ((bpe.START,), (bpe.END,))
        and found.rules.pad_side == "right"
    )


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
    elif file.name == "huggingface":
        special = _write_published(file.published(), folder)
        settings |= {"tokenizer_class": special.pop("tokenizer_class")}
        settings |= {"padding_side": special.pop("padding_side")}
    elif file.path is not None and file.path.name.endswith(".json"):
        found = published.as_siglip(ranges.read(file.path), file.path)
        special = _write_published(found, folder)
        settings |= {k: special.pop(k) for k in ("tokenizer_class", "padding_side")}
    elif file.path is not None:
        (folder / "spiece.model").write_bytes(ranges.read(file.path))
        special = {"eos_token": "</s>", "pad_token": "</s>", "unk_token": "<unk>"}
        settings |= {"tokenizer_class": "SiglipTokenizer", "do_lower_case": True}
    else:
        return
    for name, content in (
        ("special_tokens_map.json", special),
        ("tokenizer_config.json", settings | special),
    ):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")


def write_open_clip(file: TokenizerFile, size: Size, folder: pathlib.Path) -> dict[str, Any]:
    """Writes a tokenizer for open_clip and for us; returns the settings that name it."""
    for name, content in file.files().items():
        (folder / name).write_bytes(content)
    if file.name != "huggingface":
        return {}
    write_huggingface(file, size, folder)
    found = file.published()  # again as it is: open_clip cleans by itself
    (folder / found.rules.file).write_bytes(found.vocabulary)
    clean = found.rules.clean.removeprefix("open_clip:")
    kwargs = {"clean": clean} if clean != found.rules.clean else {}
    return {"hf_tokenizer_name": found.rules.file, "tokenizer_kwargs": kwargs}


def _write_published(found: Published, folder: pathlib.Path) -> dict[str, Any]:
    """Writes a vocabulary as transformers reads it; returns the settings beside it."""
    rules = found.rules
    if rules.file.endswith(".json"):
        (folder / "tokenizer.json").write_bytes(self_contained(found))
        kind = {"tokenizer_class": "PreTrainedTokenizerFast"}
    elif rules.clean.startswith("siglip"):
        (folder / "spiece.model").write_bytes(found.vocabulary)
        kind = {"tokenizer_class": "SiglipTokenizer", "do_lower_case": rules.clean == "siglip"}
    else:
        raise UserError(
            f"The tokenizer is a SentencePiece model cleaned as {rules.clean or 'it is'}, which no "
            "tokenizer of transformers does: convert the model with --to=clip_jax."
        )
    names = token_names(found, rules.file)
    return {**kind, "padding_side": rules.pad_side, **names}
