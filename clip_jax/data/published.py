"""Tokenizers that come in a folder of transformers or open_clip, with the rules of that folder.

A vocabulary alone does not say how a caption becomes a row of ids. The other files of its folder
say how it is cleaned, which tokens begin and end it, and what fills the row.
"""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from clip_jax.data.published_tokenizer import (
    CANONICAL,
    CLEANERS,
    JSON,
    REMEDY,
    RULES,
    SPACES,
    Published,
    PublishedTokenizer,
    Rules,
    checksum,
    dump,
    load_json,
    sequence,
)
from clip_jax.data.tokenizer_base import sentencepiece_model
from clip_jax.errors import UserError
from clip_jax.storage import locations, ranges

_PIECES = ("spiece.model", "sentencepiece.model", "tokenizer.model")
_CONFIGS = ("tokenizer_config.json", "special_tokens_map.json", "config.json")
_OPEN_CLIP = "open_clip_config.json"
_PROBES = ("a", "A", "0", ".")
# What transformers takes where a folder does not say, by the class of the tokenizer.
_PADDING = {
    "SiglipTokenizer": "</s>",
    "CLIPTokenizer": "<|endoftext|>",
    "GemmaTokenizer": "<pad>",
    "Siglip2Tokenizer": "<pad>",
    "T5Tokenizer": "<pad>",
    "XLMRobertaTokenizer": "<pad>",
    "BertTokenizer": "[PAD]",
}
_GEMMA_ENDS = {"bos_token": "<bos>", "eos_token": "<eos>"}
_GEMMA = ("GemmaTokenizer", "Siglip2Tokenizer")


# ---- Folders -----------------------------------------------------------------------------------


def create(folder: epath.Path, context_length: int) -> PublishedTokenizer:
    """Makes the tokenizer of a folder; UserError where there is none, or it is damaged."""
    found = find(folder)
    if found is None:
        raise UserError(
            f"{folder} holds no tokenizer: it has neither {JSON} nor "
            f"{', '.join(_PIECES)}, nor vocab.json with merges.txt."
        )
    return PublishedTokenizer(found, context_length, folder / found.rules.file)


def find(folder: epath.Path) -> Published | None:
    """Returns the tokenizer in a folder; None: it has no file of one.

    Raises:
      UserError: a file is damaged, or asks for something that is not known here.
    """
    rules = _read_json(folder / RULES)
    if rules:
        return _from_rules(folder, rules)
    settings = _settings(folder)
    path = _vocabulary_path(folder, settings)
    if path is None:
        return None
    if settings.get("truncation_side", "right") != "right":
        raise UserError(
            f"The tokenizer in {folder} cuts long texts at their beginning (truncation_side); ours "
            f"are cut at the end. {REMEDY}"
        )
    clean = settings["clean"]
    if path.name in _PIECES:
        return _of_pieces(path, settings, clean)
    raw = _bpe_json(folder, settings) if path.name == "vocab.json" else _read_json(path)
    return _of_json(raw, settings, clean, path)


def _from_rules(folder: epath.Path, fields: Mapping[str, Any]) -> Published:
    """Returns the tokenizer of a folder that we wrote."""
    try:
        rules = Rules(
            file=fields["file"],
            clean=fields["clean"],
            start=tuple(map(int, fields["start"])),
            end=tuple(map(int, fields["end"])),
            pad=int(fields["pad"]),
            pad_side=fields["pad_side"],
        )
        if rules.clean not in CLEANERS or rules.file not in (JSON, *_PIECES):
            raise ValueError(f"clean is {rules.clean!r}, file {rules.file!r}")
        expected = fields["sha256"]
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{folder / RULES} is damaged ({type(error).__name__}: {error}). {REMEDY}"
        ) from error
    content = _read(folder / rules.file)
    if checksum(content) != expected:
        raise UserError(
            f"The tokenizer in {folder} is damaged or was replaced: {rules.file} is not the one "
            f"that {RULES} describes. Copy the folder again; or, if the new one is right, delete "
            f"{RULES}."
        )
    return Published(content, rules)


def _settings(folder: epath.Path) -> dict[str, Any]:
    """Returns what the files beside the vocabulary say, and the clean-up that follows from them."""
    tokenizer, special, model = (_read_json(folder / name) for name in _CONFIGS)
    settings = {**special, **{k: v for k, v in tokenizer.items() if v is not None}}
    name = settings.get("tokenizer_class") or ""
    kind = model.get("model_type")
    name = re.sub(r"Fast$", "", name) if isinstance(name, str) else ""
    if not name:
        name = {"siglip": "SiglipTokenizer", "siglip2": "Siglip2Tokenizer"}.get(str(kind), "")
    lower = settings.get("do_lower_case", True)
    clean = ("siglip" if lower else "siglip_cased") if name == "SiglipTokenizer" else ""
    text = (_read_json(folder / _OPEN_CLIP).get("model_cfg") or {}).get("text_cfg") or {}
    if text.get("hf_tokenizer_name"):
        extra = dict(text.get("tokenizer_kwargs") or {})
        clean = f"open_clip:{extra.pop('clean', 'whitespace')}"
        strip = bool(extra.pop("strip_sep_token", False))
        extra = {k: v for k, v in extra.items() if v} | (
            {"tokenizer_mode": text["tokenizer_mode"]} if text.get("tokenizer_mode") else {}
        )
        if extra or clean not in CLEANERS:
            raise UserError(
                f"The tokenizer in {folder}, {text['hf_tokenizer_name']}, is used with "
                f"{json.dumps(extra or clean)} by open_clip, which is not known here. {REMEDY}"
            )
        return settings | {"class": name, "clean": clean, "strip_sep": strip}
    return settings | {"class": name, "clean": clean, "strip_sep": False}


def _vocabulary_path(folder: epath.Path, settings: Mapping[str, Any]) -> epath.Path | None:
    first = _PIECES if settings["class"] == "SiglipTokenizer" else ()
    path = _first(folder, (*first, JSON, "vocab.json", *_PIECES, "vocab.txt"))
    known = settings["class"] in ("SiglipTokenizer", "T5Tokenizer", "")
    if path is not None and (
        path.name == "vocab.txt" or (path.name in _PIECES and not known and not first)
    ):
        raise UserError(
            f"The tokenizer in {folder} ({settings['class'] or 'BERT'}) comes as {path.name}, "
            f"which only transformers can turn into a tokenizer: save it there once, "
            f"AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER), which writes {JSON}."
        )
    return path


def _of_pieces(path: epath.Path, settings: Mapping[str, Any], clean: str) -> Published:
    """Returns a SentencePiece model as SigLIP and T5 use it: no start token, one end token."""
    content = _read(path)
    model = sentencepiece_model(content, path)
    end = _token(settings, "eos_token") or "</s>"
    pad = _token(settings, "pad_token") or _PADDING.get(settings["class"], "</s>")
    ids = {token: model.piece_to_id(token) for token in (end, pad)}
    for token, i in ids.items():
        if model.id_to_piece(i) != token:
            raise UserError(f"{path} has no piece {token!r}, which ends or fills a row. {REMEDY}")
    side = _side(settings, {})
    return Published(content, Rules(path.name, clean, (), (ids[end],), ids[pad], side))


def _of_json(
    fields: dict[str, Any], settings: Mapping[str, Any], clean: str, path: epath.Path
) -> Published:
    """Returns the tokenizer of a tokenizer.json, its rules written into it."""
    padding = fields.get("padding") or {}
    fields = fields | {"padding": None, "truncation": None}
    _check_vocabulary(fields, path)
    model = load_json(dump(fields), path)
    if clean.startswith("siglip"):  # the class cleans, which a tokenizer.json can as well
        fields["normalizer"] = sequence(CANONICAL[clean], fields.get("normalizer"))
        clean = ""
    if settings["class"] in _GEMMA:  # as these classes set it, whatever the file says
        fields["model"] |= {"fuse_unk": True, "byte_fallback": True}
    if settings["class"] == "Siglip2Tokenizer" and "Lowercase" not in json.dumps(
        fields.get("normalizer")
    ):
        fields["normalizer"] = sequence([{"type": "Lowercase"}], fields.get("normalizer"))

    def id_of(token: str | None, purpose: str) -> int:
        i = None if token is None else model.token_to_id(token)
        if i is None:
            raise UserError(
                f"The tokenizer in {path.parent} names the token {token!r} as its {purpose}, which "
                f"{path.name} does not have. {REMEDY}"
            )
        return i

    start, end = _ends(model)
    if settings["strip_sep"]:  # open_clip then writes the id 0 in its place, as CLIPA does
        separator = id_of(_token(settings, "sep_token") or "[SEP]", "sep_token")
        end = tuple(0 if i == separator else i for i in end)
    if settings["class"] == "SiglipTokenizer" and not (start or end):
        end = (id_of(_token(settings, "eos_token") or "</s>", "eos_token"),)
    if "add_bos_token" in settings or "add_eos_token" in settings:
        flags = [(name, settings.get(f"add_{name}", False)) for name in ("bos_token", "eos_token")]
        start, end = (
            (id_of(_token(settings, name), name),) if wanted else () for name, wanted in flags
        )
    name = _token(settings, "pad_token") or padding.get("pad_token")
    pad = id_of(name or _PADDING.get(settings["class"]), "pad_token")
    fields["post_processor"] = _template(model, start, end)
    rules = Rules(JSON, clean, start, end, pad, _side(settings, padding))
    return Published(dump(fields), rules)


def _side(settings: Mapping[str, Any], padding: Mapping[str, Any]) -> str:
    side = settings.get("padding_side") or str(padding.get("direction", "")).lower()
    return side or ("left" if settings["class"] in _GEMMA else "right")


def _token(settings: Mapping[str, Any], name: str) -> str | None:
    """Returns a special token, which the files write as a string or as an object."""
    default = _GEMMA_ENDS.get(name) if settings["class"] in _GEMMA else None
    token = settings.get(name, default)
    return token.get("content") if isinstance(token, Mapping) else token


def _ends(model: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Returns the ids that the vocabulary's post-processor puts before and after a text."""
    whole: list[int] = model.encode("", add_special_tokens=True).ids
    for text in _PROBES:
        own = model.encode(text, add_special_tokens=False).ids
        row = model.encode(text, add_special_tokens=True).ids
        for i in range(len(row) - len(own) + 1):
            if own and row[i : i + len(own)] == own:
                return tuple(row[:i]), tuple(row[i + len(own) :])
    return tuple(whole[:-1]), tuple(whole[-1:])


# ---- tokenizer.json ----------------------------------------------------------------------------


def as_siglip(content: bytes, source: epath.Path) -> Published:
    """Returns a tokenizer.json that is used as SigLIP does, whatever it says itself."""
    fields = json.loads(content) | {"post_processor": None, "padding": None}
    settings = {"class": "SiglipTokenizer"}
    return _of_json(fields, settings, "siglip", source)


def _template(model: Any, start: tuple[int, ...], end: tuple[int, ...]) -> dict[str, Any] | None:
    """Returns the post-processor that puts these ids around a text."""
    if not (start or end):
        return None
    names = {i: model.id_to_token(i) for i in (*start, *end)}

    def special(ids: tuple[int, ...], type_id: int) -> list[dict[str, Any]]:
        return [{"SpecialToken": {"id": names[i], "type_id": type_id}} for i in ids]

    def one(text: str, type_id: int) -> list[dict[str, Any]]:
        sequence = [{"Sequence": {"id": text, "type_id": type_id}}]
        return [*special(start, type_id), *sequence, *special(end, type_id)]

    return {
        "type": "TemplateProcessing",
        "single": one("A", 0),
        "pair": [*one("A", 0), *one("B", 1)],
        "special_tokens": {
            name: {"id": name, "ids": [i], "tokens": [name]} for i, name in names.items()
        },
    }


def _bpe_json(folder: epath.Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the tokenizer.json of a vocab.json with merges.txt, which are CLIP's form."""
    if settings["class"] not in ("CLIPTokenizer", ""):
        raise UserError(
            f"The tokenizer in {folder} ({settings['class']}) comes as vocab.json, which is read "
            f"for CLIP only: save it with transformers once, which writes {JSON}."
        )
    vocabulary = _read_json(folder / "vocab.json")
    lines = _read(folder / "merges.txt").decode("utf-8", "replace").split("\n")
    merges = [line.split() for line in lines if line.strip() and not line.startswith("#version")]
    added = {**_read_json(folder / "added_tokens.json")}
    end = _token(settings, "eos_token") or "<|endoftext|>"
    start = _token(settings, "bos_token") or "<|startoftext|>"
    known = vocabulary | added
    for token in (start, end):
        if not isinstance(known.get(token), int):
            raise UserError(f"The tokenizer in {folder} has no token {token!r}. {REMEDY}")
        added.setdefault(token, known[token])
    words = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
    return {
        "version": "1.0",
        "added_tokens": [
            {"id": i, "content": token, "special": True, "normalized": False}
            | dict.fromkeys(("single_word", "lstrip", "rstrip"), False)
            for token, i in sorted(added.items(), key=lambda item: item[1])
        ],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [{"type": "NFC"}, SPACES[0], {"type": "Lowercase"}],
        },
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {
                    "type": "Split",
                    "pattern": {"Regex": rf"<\|startoftext\|>|<\|endoftext\|>|{words}"},
                    "behavior": "Removed",
                    "invert": True,
                },
                {
                    "type": "ByteLevel",
                    "add_prefix_space": False,
                    "trim_offsets": True,
                    "use_regex": True,
                },
            ],
        },
        "post_processor": {
            "type": "RobertaProcessing",
            "sep": [end, known[end]],
            "cls": [start, known[start]],
            "trim_offsets": False,
            "add_prefix_space": False,
        },
        "decoder": {
            "type": "ByteLevel",
            "add_prefix_space": True,
            "trim_offsets": True,
            "use_regex": True,
        },
        "model": {
            "type": "BPE",
            "unk_token": _token(settings, "unk_token") or end,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "</w>",
            "fuse_unk": False,
            "vocab": vocabulary,
            "merges": merges,
        },
    }


def _check_vocabulary(fields: Mapping[str, Any], path: epath.Path) -> None:
    """Raises UserError unless the ids are 0, 1, 2, ..., each once."""
    try:
        vocab, added = fields["model"]["vocab"], fields.get("added_tokens") or []
        ids = set(vocab.values()) if isinstance(vocab, dict) else set(range(len(vocab)))
        ids |= {token["id"] for token in added}
        words = set(vocab) if isinstance(vocab, dict) else {piece[0] for piece in vocab}
        count = len(words | {token["content"] for token in added})
        whole = all(isinstance(i, int) for i in ids) and ids == set(range(count))
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        raise UserError(
            f"{path} is no tokenizer ({type(error).__name__}: {error}). {REMEDY}"
        ) from error
    if not whole:
        raise UserError(
            f"The tokenizer {path} is damaged: its {count:,} entries do not have the ids 0 to "
            f"{count - 1:,}, each once. {REMEDY}"
        )


# ---- Files -------------------------------------------------------------------------------------


def _first(folder: epath.Path, names: Sequence[str]) -> epath.Path | None:
    paths = [folder / name for name in names]
    return next((path for path, stat in zip(paths, locations.stats(paths)) if stat), None)


def _read(path: epath.Path) -> bytes:
    try:
        return ranges.read(locations.inside(path.parent, path.name))
    except OSError as error:
        raise UserError(f"The tokenizer {path} cannot be read ({error}). {REMEDY}") from error


def _read_json(path: epath.Path) -> dict[str, Any]:
    """Reads a JSON object; {}: there is no such file."""
    if locations.stat(path) is None:
        return {}
    try:
        fields = json.loads(_read(path))
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"The tokenizer in {path.parent} is damaged: {path.name} cannot be read as JSON "
            f"({error}). {REMEDY}"
        ) from error
    if not isinstance(fields, dict):
        raise UserError(
            f"The tokenizer in {path.parent} is damaged: {path.name} holds no JSON object but a "
            f"{type(fields).__name__}. {REMEDY}"
        )
    return fields
