"""The report of a selection, with the balance of the queries: as JSON and as a short table."""

from collections import Counter
from typing import Any

import numpy as np
import pyarrow as pa

from clip_jax.curation.balancing.passes import Choice

_TOTALS = ("read", "matched", "kept")  # counts of pairs; the other names are reasons
_LISTED = 20  # queries at either end
_CURVE = 50  # points


def make(
    choice: Choice,
    terms: pa.Array,
    dropped: int,
    counts: np.ndarray,
    kept: np.ndarray,
    others: Counter[str],
) -> dict[str, Any]:
    """Returns all figures, ready for JSON.

    Args:
      choice: the arguments of the selection.
      terms: the queries, string [n].
      dropped: number of entries of the list that were left out.
      counts: number of pairs that match each query, int64 [n].
      kept: number of these that were kept, int64 [n].
      others: numbers of pairs "read", "matched" and "kept"; and of pairs or shards that could not
        be used, by reason.
    """
    order = np.argsort(-counts, kind="stable")[: np.count_nonzero(counts)]
    rows = [
        {"query": terms[int(i)].as_py(), "count": int(counts[i]), "kept": int(kept[i])}
        for i in [*order[:_LISTED], *order[_LISTED:][-_LISTED:]]
    ]
    return {
        "per_query": choice.per_query,
        "seed": choice.seed,
        "pairs": {name: others[name] for name in _TOTALS},
        "skipped": {name: n for name, n in sorted(others.items()) if n and name not in _TOTALS},
        "queries": {
            "used": len(terms),
            "left_out": dropped,
            "matched": len(order),
            "over_per_query": int((counts > choice.per_query).sum()),
        },
        "matches": {"before": int(counts.sum()), "after": int(kept.sum())},
        "most_matched": rows[:_LISTED],
        "least_matched": rows[_LISTED:],
        "curve": _curve(counts[order], kept[order]),
    }


def _curve(counts: np.ndarray, kept: np.ndarray) -> list[dict[str, float]]:
    """Returns the fraction of all matches of the most matched queries, before and after.

    Args:
      counts: number of matches of each query, falling, int64 [n].
      kept: number of these that were kept, int64 [n].
    """
    points = np.unique(np.geomspace(1, len(counts), _CURVE).astype(int))
    before, after = np.cumsum(counts), np.cumsum(kept)
    return [
        {
            "queries": int(n),
            "count": int(counts[n - 1]),
            "before": float(before[n - 1] / before[-1]),
            "after": float(after[n - 1] / after[-1]),
        }
        for n in points
    ]


def format_report(report: dict[str, Any]) -> str:
    """Formats the main figures as text."""
    pairs, queries, matches = report["pairs"], report["queries"], report["matches"]
    lines = [
        f"pairs     {pairs['read']:,} read, {pairs['matched']:,} matched, {pairs['kept']:,} kept",
        f"queries   {queries['used']:,} used ({queries['left_out']:,} left out), "
        f"{queries['matched']:,} matched, {queries['over_per_query']:,} by more than "
        f"{report['per_query']:,} pairs",
        f"matches   {matches['before']:,} before, {matches['after']:,} after",
        *(f"skipped   {count:,} x {reason}" for reason, count in report["skipped"].items()),
        "",
        f"{'query':<32}{'pairs':>14}{'kept':>14}",
    ]
    head, tail = report["most_matched"][:8], report["least_matched"][-4:]
    lines += [f"{r['query'][:31]:<32}{r['count']:>14,}{r['kept']:>14,}" for r in [*head, *tail]]
    curve = report["curve"]
    lines += [
        "",
        f"{'most matched queries':<32}{'before':>14}{'after':>14}  of all matches",
    ]
    lines += [
        f"{point['queries']:<32,}{point['before']:>14.1%}{point['after']:>14.1%}"
        for point in [*curve[: -1 : _CURVE // 8], curve[-1]]
    ]
    return "\n".join(lines)
