"""Tokenizer speed: clip_jax next to others, taking turns on the same captions.

    python benchmarks/tokenizer.py

Needs only clip_jax. Compares with open_clip_torch, tokenizers (needs open_clip_torch for its
vocabulary) and instant-clip-tokenizer, if installed. The last two get the raw text, without the
clean-up by ftfy and html; the column "equal" shows the consequence. Rates are per second of CPU
time, summed over threads, so that a busy machine disturbs them less.
"""

import argparse
import html
import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from clip_jax.data import bpe, tokenizer

Encode = Callable[[list[str]], np.ndarray]  # n captions -> ids [n, 77]

# Kinds of captions, in percent; 36 % need HTML or Unicode clean-up.
KINDS = {
    "plain ASCII": 64,
    "HTML entities": 14,
    "curly quotes, dashes": 9,
    "accents": 6,
    "other scripts": 4,
    "emoji": 2,
    "mojibake": 1,
}
ACCENTS = str.maketrans("eo", "éö")
SCRIPTS = ["кошка на окне", "一只猫坐在窗台上", "قطة في الحديقة", "東京の夜景", "Ένα καφέ"]


class Captions:
    """An endless supply of captions: words by Zipf's law from OpenAI's vocabulary, and rare codes.

    Captions never repeat, but words do, as in a real stream.
    """

    def __init__(self, seed: int):
        self.random = random.Random(seed)
        _, _, known = bpe._vocabulary()
        words = [word.decode()[:-1] for word in known[512:] if word.isascii() and word[-1:] == b" "]
        self.words = [word for word in words if word.isalpha()]
        self.weights = list(np.cumsum(1 / np.arange(5, 5 + len(self.words))))

    def draw(self, count: int, kind: str | None = None) -> list[str]:
        if kind:
            return [self.caption(kind) for _ in range(count)]
        kinds = self.random.choices(list(KINDS), list(KINDS.values()), k=count)
        return [self.caption(kind) for kind in kinds]

    def caption(self, kind: str) -> str:
        count = self.random.randint(5, 18)
        words = self.random.choices(self.words, cum_weights=self.weights, k=count)
        for i in range(count):
            if self.random.random() < 0.03:  # an article number, a name, a date
                letters = self.random.choices("abcdefghiklmnoprstuvwxyz", k=5)
                words[i] = "".join(letters) + str(self.random.randrange(100))
            elif self.random.random() < 0.1:
                words[i] += ","
        words[0] = words[0].capitalize()
        i = self.random.randrange(count)
        words[i] = self.spoilt(words[i], kind)
        return " ".join(words) + self.random.choice(["", ".", "!"])

    def spoilt(self, word: str, kind: str) -> str:
        accented = word.translate(ACCENTS) + "é"
        match kind:
            case "HTML entities":
                entity = self.random.choice([" & ", "'s ", '"', " <b>"])
                return html.escape(f"{word}{entity}{word}")
            case "curly quotes, dashes":
                return self.random.choice([f"“{word}”", f"{word}’s", f"{word} – {word}"])
            case "accents":
                return accented
            case "other scripts":
                return f"{word} {self.random.choice(SCRIPTS)}"
            case "emoji":
                return f"{word} {self.random.choice('🐱🐶🎉🔥❤🚗🌊')}"
            case "mojibake":
                return accented.encode().decode("latin-1")
        return word


def competitors() -> dict[str, Encode]:
    """Returns the installed competitors, clip_jax first."""
    ours = tokenizer.create("openai", 77)
    found: dict[str, Encode] = {"clip_jax": lambda texts: ours(texts, truncate=True)}
    try:
        from open_clip.tokenizer import SimpleTokenizer

        open_clip = SimpleTokenizer()
        found["open_clip"] = lambda texts: open_clip(texts).numpy()
        found["tokenizers, raw"] = rust(open_clip.encoder, list(open_clip.bpe_ranks))
    except ImportError as error:
        print(f"left out: {error}", file=sys.stderr)
    try:
        import instant_clip_tokenizer

        instant = instant_clip_tokenizer.Tokenizer()
        found["instant-clip, raw"] = lambda texts: instant.tokenize_batch(texts, context_length=77)
    except ImportError as error:
        print(f"left out: {error}", file=sys.stderr)
    return found


def rust(vocabulary: dict[str, int], merges: list[tuple[str, str]]) -> Encode:
    """Sets up the Rust library tokenizers for CLIP."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors

    words = Regex(r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+")
    model = Tokenizer(models.BPE(vocabulary, merges, end_of_word_suffix="</w>"))
    model.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    split = pre_tokenizers.Split(words, behavior="removed", invert=True)
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    model.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])
    start, end = list(vocabulary.items())[-2:]
    model.post_processor = processors.BertProcessing(end, start)
    model.enable_truncation(77)
    model.enable_padding(length=77, pad_id=0)
    return lambda texts: np.array([row.ids for row in model.encode_batch(texts)], np.int32)


def compare(encoders: dict[str, Encode], texts: list[list[str]]) -> None:
    """Prints captions/s (median of all lists, and of the first) and the rows equal to ours."""
    rates: dict[str, list[float]] = {name: [] for name in encoders}
    equal: dict[str, list[float]] = {name: [] for name in encoders}
    ids = []
    for captions in texts:
        rows = {}
        for name, encode in encoders.items():
            start = time.process_time()
            rows[name] = encode(captions)
            rates[name].append(len(captions) / (time.process_time() - start))
        ids.append((rows["clip_jax"] == bpe.END).argmax(-1).mean() + 1)
        for name in encoders:
            equal[name].append((rows[name] == rows["clip_jax"]).all(-1).mean())
    base = statistics.median(rates.get("open_clip", rates["clip_jax"]))
    print(f"{len(texts)} x {len(texts[0])} captions, {statistics.mean(ids):.1f} ids on average")
    print(f"{'':20} {'captions/s':>10} {'ratio':>6} {'first list':>10} {'equal':>7}")
    for name, measured in rates.items():
        rate = statistics.median(measured)
        print(
            f"{name:20} {rate:10,.0f} {rate / base:6.2f} {measured[0]:10,.0f} "
            f"{statistics.mean(equal[name]):7.1%}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=21, help="lists of captions")
    parser.add_argument("--captions", type=int, default=5000, help="captions per list, all new")
    parser.add_argument("--seed", type=int, default=0, help="seed of the captions")
    parser.add_argument("--kinds", action="store_true", help="also time each kind of caption alone")
    args = parser.parse_args()
    encoders, captions = competitors(), Captions(args.seed)
    compare(encoders, [captions.draw(args.captions) for _ in range(args.rounds)])
    for kind in KINDS if args.kinds else []:
        print(f"\n{kind}: ", end="")
        compare(encoders, [captions.draw(args.captions // 5, kind) for _ in range(args.rounds)])


if __name__ == "__main__":
    main()
