"""Speed of curation: captions are searched for 500,000 queries, balanced and written.

    python benchmarks/curate.py
    python benchmarks/curate.py --pairs=10_000_000

Needs only clip_jax. Compares the search with pyahocorasick and ahocorasick_rs, if installed, used
as in MetaCLIP (a query with spaces around it in a caption with spaces around it), and with
MetaCLIP's plain loop over all queries. All get the same normalised captions; "equal" says whether
they find the same. Words are made up and follow Zipf's law; captions have 9 words on average.
"""

import argparse
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from clip_jax.curation.balancing import matching

ROOT = Path(__file__).resolve().parent.parent
VOCABULARY = 400_000  # words; English has about as many
QUERIES = 500_000
WORDS = 9  # per caption, on average
SHARD = 250_000  # pairs
LOOPED = 100  # captions for the plain loop

Search = Callable[[list[str]], list[list[int]]]  # normalised captions -> queries, sorted


class Language:
    """Made-up words and sequences of them."""

    def __init__(self) -> None:
        rng = np.random.default_rng(0)
        letters = rng.choice(list(b"etaoinshrdlucmfwypvbgkjqxz"), (2 * VOCABULARY, 9))
        lengths = rng.integers(3, 10, len(letters))
        words = {bytes(row[:length]).decode() for row, length in zip(letters.astype("u1"), lengths)}
        self.words = np.array(sorted(words))
        rng.shuffle(self.words)
        self.words = self.words[:VOCABULARY]
        frequency = 1 / np.arange(3, 3 + VOCABULARY)
        self.bounds = np.cumsum(frequency) / frequency.sum()

    def phrases(self, rng: np.random.Generator, lengths: np.ndarray) -> pa.Array:
        """Draws sequences of words by frequency: string [n], each of the given number of words."""
        drawn = np.searchsorted(self.bounds, rng.random(lengths.sum()))
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
        words = pa.array(self.words).take(pa.array(drawn))
        return pc.binary_join(pa.ListArray.from_arrays(offsets, words), " ")

    def queries(self) -> list[str]:
        """Makes as many words as the paper's list may have, and phrases of up to 5 words."""
        rng = np.random.default_rng(1)
        lengths = rng.choice([2, 3, 4, 5], 2 * QUERIES, p=[0.7, 0.18, 0.08, 0.04])
        found = dict.fromkeys(self.words[: QUERIES // 2].tolist())
        found |= dict.fromkeys(self.phrases(rng, lengths).to_pylist())
        return list(found)[:QUERIES]

    def captions(self, seed: int, count: int) -> pa.Array:
        rng = np.random.default_rng([2, seed])
        texts = self.phrases(rng, np.maximum(rng.poisson(WORDS, count), 1))
        return pc.binary_join_element_wise(pc.utf8_capitalize(texts), ".", "")


def write(directory: Path, pairs: int) -> None:
    """Writes queries, and shards of captions."""
    language = Language()
    (directory / "queries.txt").write_text("\n".join(language.queries()))
    for number, first in enumerate(range(0, pairs, SHARD)):
        captions = language.captions(number, min(SHARD, pairs - first))
        urls = pa.array([f"https://example.com/{number}/{i}.jpg" for i in range(len(captions))])
        table = pa.table({"url": urls, "caption": captions})
        pq.write_table(table, directory / f"{number:05}.parquet")


def curate(directory: Path, pairs: int, workers: int, per_query: int) -> None:
    """Runs the whole command in a separate process."""
    command = [sys.executable, "-m", "clip_jax", "data", "curate", "pairs"]
    command += [f"{directory}/*.parquet", f"--queries={directory}/queries.txt", "--keep=url"]
    command += [f"--out={directory}/curated", f"--workers={workers}", f"--per_query={per_query}"]
    start = time.monotonic()
    _, status, used = os.wait4(subprocess.Popen(command, cwd=ROOT).pid, 0)
    wall = time.monotonic() - start
    if status:
        sys.exit("The command failed.")
    cpu = used.ru_utime + used.ru_stime
    print(
        f"\n{pairs:,} captions x {QUERIES:,} queries, {workers} workers: {wall:.0f} s, "
        f"{pairs / wall:,.0f} pairs/s; {cpu:.0f} s of CPU time, {pairs / cpu:,.0f} pairs/s per "
        f"core; largest process {used.ru_maxrss / 2**10:,.0f} MiB"
    )


def compare(count: int) -> None:
    """Prints speed and index memory of every search, each in a separate process."""
    print(f"\n{'search':20} {'captions/s':>10} {'build s':>8} {'MiB':>6} {'equal':>6}")
    expected: list[list[int]] = []
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context, max_tasks_per_child=1) as pool:
        for name in SEARCHES:
            try:
                found, rate, built, size = pool.submit(measure, name, count).result()
            except ImportError as error:
                print(f"left out: {error}", file=sys.stderr)
                continue
            expected = expected or found
            equal = str(found == expected[: len(found)])
            print(f"{name:20} {rate:10,.0f} {built:8.1f} {size:6,.0f} {equal:>6}")


def measure(name: str, count: int) -> tuple[list[list[int]], float, float, float]:
    """Measures a search: its results, captions/s, seconds and MiB of its index."""
    language = Language()
    queries = language.queries()
    texts = matching.normalise(language.captions(0, count)).to_pylist()
    before, start = memory(), time.process_time()
    search = SEARCHES[name](queries)
    built, size = time.process_time() - start, memory() - before
    texts = texts[:LOOPED] if name == "loop" else texts
    start = time.process_time()
    found = search(texts)
    return found, len(texts) / (time.process_time() - start), built, size


def clip_jax_search(queries: list[str]) -> Search:
    matcher = matching.Matcher(queries)
    return lambda texts: [
        row
        for first in range(0, len(texts), 65_536)
        for row in matcher(pa.array(texts[first : first + 65_536])).to_pylist()
    ]


def pyahocorasick(queries: list[str]) -> Search:
    import ahocorasick

    automaton = ahocorasick.Automaton()
    for number, query in enumerate(queries):
        automaton.add_word(f" {query} ", number)
    automaton.make_automaton()
    return lambda texts: [sorted({n for _, n in automaton.iter(f" {t} ")}) for t in texts]


def ahocorasick_rs(queries: list[str]) -> Search:
    import ahocorasick_rs

    automaton = ahocorasick_rs.AhoCorasick([f" {query} " for query in queries])
    find = automaton.find_matches_as_indexes
    return lambda texts: [
        sorted({n for n, _, _ in find(f" {t} ", overlapping=True)}) for t in texts
    ]


def loop(queries: list[str]) -> Search:
    spaced = [f" {query} " for query in queries]
    return lambda texts: [[n for n, q in enumerate(spaced) if q in f" {t} "] for t in texts]


SEARCHES: dict[str, Callable[[list[str]], Search]] = {
    "clip_jax": clip_jax_search,
    "pyahocorasick": pyahocorasick,
    "ahocorasick_rs": ahocorasick_rs,
    "loop": loop,
}


def memory() -> float:
    """Returns the memory of this process in MiB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--pairs", type=int, default=2_000_000, help="captions to curate")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes")
    parser.add_argument("--per_query", type=int, default=2000, help="pairs a query keeps")
    parser.add_argument("--compared", type=int, default=100_000, help="captions for each search")
    args = parser.parse_args()
    pa.set_cpu_count(1)
    with tempfile.TemporaryDirectory() as name:
        # In a separate process, so that its memory does not count.
        process = multiprocessing.Process(target=write, args=(Path(name), args.pairs))
        process.start()
        process.join()
        curate(Path(name), args.pairs, args.workers, args.per_query)
    compare(args.compared)


if __name__ == "__main__":
    main()
