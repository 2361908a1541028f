"""Vocabularies of nine pieces, in the formats of SigLIP models."""

import pathlib
import struct


def sentencepiece_model() -> bytes:
    """A SentencePiece model of nine pieces, put together byte by byte (protobuf wire format)."""

    def field(number: int, content: bytes) -> bytes:
        return bytes([number << 3 | 2, len(content)]) + content

    def piece(text: str, score: float, kind: int = 1) -> bytes:
        score_and_kind = b"\x15" + struct.pack("<f", score) + bytes([3 << 3, kind])
        return field(1, field(1, text.encode()) + score_and_kind)

    special = piece("<unk>", 0, 2) + piece("</s>", 0, 3) + piece("<s>", 0, 3)
    words = piece("▁a", -1) + piece("▁cat", -2) + piece("▁ca", -1.5)
    return special + words + piece("t", -3) + piece("s", -3) + piece("▁", -4)


def write_tokenizer(path: pathlib.Path) -> None:
    if path.suffix == ".model":
        path.write_bytes(sentencepiece_model())
        return
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    pieces = [("<unk>", 0.0), ("</s>", 0.0), ("<s>", 0.0), ("▁a", -1.0), ("▁cat", -2.0)]
    pieces += [("▁ca", -1.5), ("t", -3.0), ("s", -3.0), ("▁", -4.0)]
    made = Tokenizer(models.Unigram(pieces, unk_id=0))
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Metaspace()
    made.save(str(path))
