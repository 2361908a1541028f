"""Lists of queries: what is counted, and in which order it is taken."""

import itertools
import json
import math
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from etils import epath

from clip_jax.curation import balancing
from clip_jax.curation.balancing import phrases, queries
from clip_jax.errors import UserError

# As in Princeton's files: offset, lexicographer's file, type, lemmas in hexadecimal, lemma, ...
NOUNS = """  1 This software and database is being provided to you, the LICENSEE
00001740 03 n 01 entity 0 003 ~ 00001930 n 0000 | that which is perceived
07614500 13 n 02 ice_cream 0 icecream 0 001 @ 07609840 n 0000 | frozen dessert
"""
ADJECTIVES = (
    "00001740 00 a 02 afloat(p) 0 aflutter(p) 0 001 = 05200169 n 0000 | borne on the water\n"
)


def some_clauses(count: int) -> list[list[str]]:
    rng = random.Random(0)
    words = [f"w{i}" for i in range(60)]
    weights = [1 / (i + 1) for i in range(60)]
    return [rng.choices(words, weights, k=rng.randrange(1, 9)) for _ in range(count)]


def as_texts(clauses: list[list[str]]) -> list[str]:
    """Three clauses a text, in capitals here and there."""
    lines = [
        " ".join(clause).title() if len(clause) > 5 else " ".join(clause) for clause in clauses
    ]
    return [". ".join(lines[i : i + 3]) for i in range(0, len(lines), 3)]


@pytest.mark.parametrize("run", [50, 1000, 2**24])
def test_words_and_pairs_are_counted_exactly(run: int):
    clauses = some_clauses(3000)
    texts = as_texts(clauses)
    words = Counter(itertools.chain.from_iterable(clauses))
    pairs = Counter(pair for clause in clauses for pair in itertools.pairwise(clause))

    def batches():
        return (pa.array(texts[i : i + 70]) for i in range(0, len(texts), 70))

    assert phrases.count_words(batches) == words
    often = [word for word, count in words.most_common() if count >= 100]
    found = {}
    for pair, count in phrases.count_pairs(batches, often, min_count=5, run=run):
        for (first, second), times in zip(pair.tolist(), count.tolist()):
            assert (often[first], often[second]) not in found
            found[often[first], often[second]] = times
    known = set(often)
    assert found == {p: n for p, n in pairs.items() if n >= 5 and set(p) <= known}
    assert 100 < len(found) < len(pairs)


def test_mutual_information():
    bits = phrases.mutual_information(np.array([8, 1]), np.array([8, 16]), np.array([16, 16]), 256)
    np.testing.assert_allclose(bits, [math.log2(8 * 256 / (8 * 16)), 0], atol=1e-12)


def build(output: Path, *options: str) -> list[str]:
    balancing.main(["queries", f"--out={output}", *options])
    return output.read_text().splitlines()


def test_sources_in_order_up_to_the_limit(tmp_path: Path):
    text = ["New York is big, is it?"] * 40 + ["It is new."] * 60 + ["Is it? It is. Once."]
    pq.write_table(pa.table({"text": text}), tmp_path / "wiki.parquet")
    (tmp_path / "titles.txt").write_text(
        "Rare\t3\nÉté_(season)\t50\nBig\t70\nNew_York\t9\nRare\t2\n"
    )
    (tmp_path / "wordnet").mkdir()
    for name in queries.WORDNET_FILES:
        content = {"data.noun": NOUNS, "data.adj": ADJECTIVES}.get(name, "")
        (tmp_path / "wordnet" / name).write_text(content)
    (tmp_path / "also.json").write_text(json.dumps(["T-shirt", "t shirt", "?"]))
    options = [
        f"--text={tmp_path}/wiki.parquet",
        f"--titles={tmp_path}/titles.txt",
        f"--wordnet={tmp_path}/wordnet",
        f"--also={tmp_path}/also.json",
        "--min_count=40",
        "--min_views=5",
        "--min_information=2",
    ]
    found = build(tmp_path / "queries.txt", *options)
    # is 142, it 102, new 100, york 40, big 40 of 425 words; "new york" 40 times: 2.09 bits ...
    first = ["t shirt", "entity", "ice cream", "afloat", "is", "it", "new"]
    assert found[:7] == first
    assert sorted(found[7:9]) == ["big", "york"]
    assert found[9:] == ["new york", "été season", "rare"]
    assert build(tmp_path / "few.txt", *options, "--limit=3") == first[:3]
    loaded, left_out = queries.load(epath.Path(tmp_path / "queries.txt"))
    assert (loaded.to_pylist(), left_out) == (found, 0)


def test_load(tmp_path: Path):
    path = epath.Path(tmp_path / "queries.txt")
    path.write_bytes(b"\xef\xbb\xbfDog\r\n\n dog \nC++\nnew  york\n...\nbad \xff byte\n")
    loaded, left_out = queries.load(path)
    assert loaded.to_pylist() == ["dog", "c", "new york", "bad byte"]
    assert left_out == 3
    counts = epath.Path(tmp_path / "counts.json")
    counts.write_text(json.dumps({"Dog": 3, "cat": 0}))
    assert queries.load(counts)[0].to_pylist() == ["dog", "cat"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "No queries without --text"),
        (["--titles={0}/titles.txt", "--min_views=1"], "Line 2 of .* has no number of views"),
        (["--titles={0}/none.txt"], "no file .*none.txt"),
        (["--wordnet={0}"], "no .*data.noun: --wordnet takes the directory"),
        (["--text={0}/none/*.txt"], "nothing to read"),
        (["--text={0}/none.txt"], "no file .*none.txt"),
        (["--text={0}/empty.txt"], "No query was found"),
        (["--also={0}/broken.json"], "not a JSON list"),
        (["--also={0}/empty.txt"], "has no query"),
        (["--also={0}/titles.txt", "--out={0}/none/q.txt"], "no such directory"),
    ],
)
def test_mistakes_are_explained(tmp_path: Path, options: list[str], message: str):
    (tmp_path / "titles.txt").write_text("a\t3\nb\n")
    (tmp_path / "broken.json").write_text("[")
    (tmp_path / "empty.txt").write_text("?\n")
    with pytest.raises(UserError, match=message):
        build(tmp_path / "queries.txt", *(option.format(tmp_path) for option in options))
    assert not (tmp_path / "queries.txt").exists()
