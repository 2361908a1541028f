"""Lists of queries, and their sources in the paper: words, bigrams, titles, WordNet."""

import io
import json
from collections.abc import Iterable, Iterator

import pyarrow as pa
from etils import epath

from clip_jax.curation.balancing import matching
from clip_jax.curation.balancing.matching import pc
from clip_jax.errors import UserError
from clip_jax.storage import ranges

WORDNET_FILES = ("data.noun", "data.verb", "data.adj", "data.adv")


def load(path: epath.Path) -> tuple[pa.Array, int]:
    """Reads a list of queries.

    Args:
      path: text, one query a line; or JSON, a list of them or an object with them as keys.

    Returns:
      The queries normalised, distinct and not empty, string, in their order; and the number of
      entries that were left out, because they had no word or were repetitions.

    Raises:
      UserError: there is no such file, or it has no usable query.
    """
    try:
        text = ranges.read(path).decode("utf-8-sig", "replace")
    except FileNotFoundError:
        raise UserError(
            f"There is no list of queries {path}. python -m clip_jax data curate queries builds "
            "one; any file with one query a line will do."
        ) from None
    try:
        listed = json.loads(text) if path.suffix == ".json" else text.splitlines()
        entries = [str(entry) for entry in listed]
    except (ValueError, TypeError) as error:
        raise UserError(f"The list of queries {path} is not a JSON list: {error}.") from None
    queries = distinct(entries)
    if not len(queries):
        raise UserError(f"The list of queries {path} has no query: it needs one a line.")
    return queries, len(entries) - len(queries)


def distinct(entries: Iterable[str]) -> pa.Array:
    """Normalises entries, with single spaces, each once, in order of first appearance; string."""
    texts = matching.normalise(pa.array(entries, pa.string()))
    texts = pc.unique(pc.replace_substring_regex(texts, " +", " "))
    return texts.filter(pc.not_equal(texts, ""))


def wordnet(directory: epath.Path) -> Iterator[str]:
    """Yields the first lemma of every synset of WordNet.

    Args:
      directory: directory with data.noun, data.verb, data.adj and data.adv: dict/ of Princeton's
        distribution, corpora/wordnet of NLTK's.

    Raises:
      UserError: a file is missing.
    """
    for name in WORDNET_FILES:
        path = directory / name
        try:
            text = ranges.read(path).decode("utf-8")
        except FileNotFoundError:
            raise UserError(
                f"There is no {path}: --wordnet takes the directory of WordNet's "
                f"{', '.join(WORDNET_FILES)}, such as nltk_data/corpora/wordnet after "
                "python -m nltk.downloader wordnet."
            ) from None
        for line in text.splitlines():
            if not line.startswith(" "):  # the licence
                # offset, file, type, number of lemmas, then a lemma such as ice_cream or afloat(p)
                yield line.split(" ", 5)[4].partition("(")[0]


def titles(path: epath.Path, min_views: int) -> list[str]:
    """Reads the titles of articles, most viewed first.

    Args:
      path: text, one title a line, or a title, a tab and its views; views of a title are added.
      min_views: least number of views; 0: lines need no views.

    Raises:
      UserError: there is no such file, or a line lacks the views.
    """
    try:
        lines = io.BytesIO(ranges.read(path))
    except FileNotFoundError:
        raise UserError(f"There is no file {path} of titles.") from None
    views: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        title, _, count = line.decode("utf-8", "replace").rstrip("\r\n").partition("\t")
        if min_views and not count.isdecimal():
            raise UserError(
                f"Line {number} of {path} has no number of views behind a tab: add them, or drop "
                "--min_views to take all titles."
            )
        views[title] = views.get(title, 0) + (int(count) if count.isdecimal() else 0)
    found = [title for title, count in views.items() if count >= min_views]
    return sorted(found, key=views.__getitem__, reverse=True)
