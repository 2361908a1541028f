"""The state of runs as text for a terminal."""

import itertools
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta

from clip_jax.common.formatting import aligned, format_seconds, percent, short
from clip_jax.common.goodput import KINDS
from clip_jax.common.starts import Event
from clip_jax.status import chart
from clip_jax.status import run as runs
from clip_jax.status.look import Look, plain
from clip_jax.status.run import LIVE, WELL, Run, State

COLUMNS = ("state", "step", "done", "loss", "score", "images/s", "MFU", "goodput", "left")
_STARTS, _EVENTS = 10, 8  # that are listed, the latest
_METRICS = 24  # that are listed
_WIDE, _GAP = 96, 4  # columns from which two plots stand side by side, and those between them
_FAR = 3e8  # seconds from which no date of the end is given
_BAR = 24  # columns of a full bar
_COLOURS = {State.STALLED: "warn", State.STOPPED: "warn", State.UNCLEAR: "warn"} | dict.fromkeys(
    WELL, "good"
)
_FIRST = ("train/loss", "train/images_per_second", "train/mfu")
_SCORES = ("top1", "mean", "recall@1")  # last parts of the names of scores worth a curve


def one(run: Run, look: Look) -> str:
    """Describes a run on a page of text."""
    sections = [_head(run, look)]
    if run.error is None:
        sections += [
            _remarks(run, look),
            _curves(run, look),
            _times(run, look),
            _starts(run, look),
            _events(run, look),
            _metrics(run, look),
            _checkpoints(run, look),
        ]
    return "\n\n".join("\n".join(lines) for lines in sections if lines)


def several(found: Sequence[Run], look: Look) -> str:
    """Compares runs: a line for each, their losses over one pair of axes, and what is wrong."""
    names = short_names([run.name for run in found])
    rows = [["", "run", *COLUMNS]]
    rows += [["", _end(name, look), *cells(run)] for name, run in zip(names, found)]
    used = [i for i, column in enumerate(zip(*rows)) if i == 0 or any(column[1:])]
    sides = ["<<<>>>>>>>>"[i] for i in used]
    table = aligned([[row[i] for i in used] for row in rows], "".join(sides)).splitlines()
    table = [_cut(line, look) for line in table]
    losses = [(i, series(run, "train/loss")) for i, run in enumerate(found)]
    losses = [(i, values) for i, values in losses if _drawable(values)]
    drawn = {i: position for position, (i, _) in enumerate(losses)}
    lines = [look.paint(table[0], "soft")]
    for i, (run, line) in enumerate(zip(found, table[1:])):
        word = runs.state(run)
        mark = " " if i not in drawn else chart.mark(drawn[i]) if _lettered(look) else _dot(look)
        key = look.paint(mark, drawn.get(i, 0))
        before, _, after = line[1:].rpartition(word)  # a name may have the word too
        lines.append(key + before + look.paint(word, _COLOURS.get(word, "bad")) + after)
    scores = dict.fromkeys(filter(None, map(score_name, found)))
    told = look.wrap(f"score: {', '.join(scores)}") if scores else []
    lines += [look.paint(line, "soft") for line in told]
    parts = [lines]
    if losses:
        parts.append(["loss", *chart.draw([values for _, values in losses], look, 12)])
    for run, name in zip(found, names):
        told = [runs.sentence(run), runs.advice(run), *run.remarks]
        if any(told):
            parts.append([look.paint(name, "strong"), *itertools.chain(*map(look.wrap, told))])
    return "\n\n".join("\n".join(part) for part in parts)


def _lettered(look: Look) -> bool:
    return not (look.unicode and look.colour)


def _dot(look: Look) -> str:
    return "●" if look.unicode else "*"


def cells(run: Run) -> list[str]:
    """Returns a run as a line of a table, under `COLUMNS`."""
    score = score_name(run)
    left = run.left if runs.state(run) is State.RUNNING else None
    return [
        runs.state(run).value,
        "" if run.step is None else f"{run.step:,}",
        "" if run.step is None or not run.total else percent(run.step / run.total),
        _number(last(run, "train/loss")),
        _share(last(run, score)) if score else "",
        _number(run.recent("train/images_per_second")),
        _share(run.recent("train/mfu")),
        _share(run.account.goodput),
        "" if left is None else format_seconds(left),
    ]


def short_names(names: Sequence[str]) -> list[str]:
    """Returns the names without the directories that all have in common."""
    parts = [name.rstrip("/").split("/") for name in names]
    depth = 0
    while all(len(p) > depth + 1 and p[depth] == parts[0][depth] for p in parts):
        depth += 1
    return ["/".join(p[depth:]) for p in parts]


# ---- Parts of the page -------------------------------------------------------------------------


def _head(run: Run, look: Look) -> list[str]:
    state = runs.state(run)
    lines = [look.paint(run.name, "strong") + _about(run), ""]
    word = look.paint(f"{_dot(look)} {state.upper()}", _COLOURS.get(state, "bad"))
    lines.append(f"{word}  {_progress(run, look)}".rstrip())
    if (text := runs.sentence(run)) and state is not State.FINISHED:
        code = run.last.code if run.last and state is State.STOPPED else None
        lines += look.wrap(text + ("" if code is None else f" (exit code {code})"))
    if state in (State.RUNNING, State.STALLED):
        lines += look.wrap(_speed(run, state))
    if since := _since(run):
        lines += look.wrap(since)
    if text := runs.advice(run):
        lines += look.wrap(text)
        if run.last and (command := run.last.facts.get("command")):
            lines.append(f"  $ {plain(str(command))}")
    return lines


def _about(run: Run) -> str:
    facts = run.last.facts if run.last else {}
    hosts = facts.get("hosts")
    mixed = {name.split(".")[2] for name in run.config if name.startswith("data.mixture.")}
    data = " + ".join(sorted(mixed)) or run.config.get("data.source.type")
    names = [run.config.get("model.name"), data, facts.get("hardware")]
    names += [f"{hosts} hosts" if isinstance(hosts, int) and hosts > 1 else ""]
    return "".join(f"  {plain(str(name))}" for name in names if name)


def _progress(run: Run, look: Look) -> str:
    if run.step is None:
        return "before its first step" if run.error is None else ""
    if not run.total:
        return f"step {run.step:,}"
    done = run.step / run.total
    bar = look.paint(chart.level(done, _bar(look), look), "soft")
    return f"step {run.step:,} of {run.total:,}, {percent(done)}  {bar}"


def _speed(run: Run, state: State) -> str:
    parts = []
    if math.isfinite(rate := run.recent("train/images_per_second")):
        parts.append(f"{rate:,.0f} images/s")
    if math.isfinite(mfu := run.recent("train/mfu")):
        parts.append(f"MFU {percent(mfu)}")
    if state is State.RUNNING and run.left is not None:
        until = run.now + timedelta(seconds=min(run.left, _FAR))
        parts.append(f"about {format_seconds(run.left)} left")
        parts += [f"until {clock_time(until, run.now)}"] if run.left < _FAR else []
    return ", ".join(parts)


def _since(run: Run) -> str:
    """Returns when and where the last start ran, and its last sign of life."""
    last, state = run.last, runs.state(run)
    where = f" on {run.holder.host}, process {run.holder.pid}" if run.holder else ""
    if last is None:
        return f"since {run.holder.since}{where}" if run.holder and state in LIVE else ""
    if state in LIVE and last.code is None:
        seen = format_seconds(max(0.0, run.silent or 0.0))
        phase = {"evaluation": "evaluating", "checkpoint": "saving", "compile": "compiling"}
        doing = f"{phase[last.phase]}; " if last.phase in phase else ""
        return (
            f"{doing}start {last.number} since {clock_time(last.began, run.now)}, "
            f"{format_seconds(last.duration)}{where}; last sign of life {seen} ago"
        )
    if state in LIVE:
        return f"starting again{where}"
    ago = format_seconds(max(0.0, run.silent or 0.0))
    return (
        f"start {last.number} ran {format_seconds(last.duration)}, until "
        f"{clock_time(last.seen, run.now)}, {ago} ago{where}"
    )


def _remarks(run: Run, look: Look) -> list[str]:
    return [line for text in run.remarks for line in look.wrap(f"! {text}", 0)]


def _curves(run: Run, look: Look) -> list[str]:
    """Draws the loss and the score, side by side where there is room."""
    found = [(name, series(run, name)) for name in ("train/loss", score_name(run))]
    found = [(name, values) for name, values in found if len(values) > 1 and _drawable(values)]
    beside = len(found) == 2 and look.width >= _WIDE
    narrow = look.resized((look.width - _GAP) // 2) if beside else look
    plots = []
    for name, values in found:
        show = percent if is_score(name) else short
        title = f"{name.removeprefix('train/')} {show(values[max(values)])}"
        plots.append([look.paint(title, "strong"), *chart.draw([values], narrow, show=show)])
    if not beside:
        return [line for plot in plots for line in ["", *plot]][1:]
    return [f"{look.pad(left, narrow.width + _GAP)}{right}" for left, right in zip(*plots)]


def _times(run: Run, look: Look) -> list[str]:
    seconds, wall = run.account.seconds, run.account.wall
    if not wall:
        return []
    rows = [
        [f"  {KINDS[kind]}", format_seconds(value), _share(value / wall)]
        for kind, value in seconds.items()
        if value >= 0.5 or kind == "train"
    ]
    bars = [
        chart.level(value / wall, _bar(look), look) for value in seconds.values() if value >= 0.5
    ]
    bars = bars if seconds["train"] >= 0.5 else ["", *bars]
    table = aligned(rows, "<>>").splitlines()
    lost = run.account.lost_steps
    again = f", {lost:,} steps trained again" if lost else ""
    title = f"Where {format_seconds(wall)} went: goodput {_share(run.account.goodput)}{again}"
    return [
        look.paint(title, "strong"),
        *(f"{row}  {bar}".rstrip() for row, bar in zip(table, bars)),
    ]


def _starts(run: Run, look: Look) -> list[str]:
    if not run.starts:
        return []
    shown = run.starts[-_STARTS:]
    zone = shown[0].began.astimezone().strftime("%Z")
    rows = [["  #", f"began ({zone})", "ran", "steps", "lost", "ended"]]
    for start in shown:
        lost = run.account.lost.get(start.number, 0)
        row = [f"  {start.number}", clock_time(start.began, run.now)]
        row += [format_seconds(start.duration)]
        row += ["–" if start.step is None else f"{start.from_step:,} to {start.step:,}"]
        row += [f"{lost:,}" if lost else "", plain(start.ending(run.lives(start)))]
        rows.append(row)
    if not any(row[4] for row in rows[1:]):
        rows = [row[:4] + row[5:] for row in rows]
    lines = aligned(rows, "<<>>><"[: len(rows[0]) - 1] + "<").splitlines()
    lines = [_cut(line.replace("–", "–" if look.unicode else "-"), look) for line in lines]
    title = "1 start" if len(run.starts) == 1 else f"{len(run.starts):,} starts"
    if earlier := run.starts[:-_STARTS]:
        counts = Counter(start.outcome() for start in earlier)
        told = ", ".join(f"{count:,} x {name}" for name, count in counts.most_common())
        title += f"; the {len(earlier):,} before these ended so: {told}"
    return [*(look.paint(line, "strong") for line in look.wrap(title, 0)), *lines]


def _events(run: Run, look: Look) -> list[str]:
    events: list[Event] = [event for start in run.starts for event in start.events]
    if not events:
        return []
    more = f", the last {_EVENTS}" if len(events) > _EVENTS else ""
    lines = [look.paint(f"{len(events):,} events{more}" if events[1:] else "1 event", "strong")]
    for event in events[-_EVENTS:]:
        when = clock_time(event.time, run.now)
        body = look.wrap(f"{when}, step {event.step:,}: {event.text}", 4)
        lines += [body[0][2:], *body[1:]]
    return lines


def _metrics(run: Run, look: Look) -> list[str]:
    found = latest(run)
    if not found:
        return []
    step = max(step for step, _ in found.values())
    cells = [
        (_end(name.removeprefix("train/"), look), percent(v) if is_score(name) else short(v))
        + (() if at == step else (f"({at:,})",))
        for name, (at, v) in found.items()
    ]
    texts = [(cell[0], " ".join(cell[1:])) for cell in cells[:_METRICS]]
    names, values = max(len(name) for name, _ in texts), max(len(value) for _, value in texts)
    columns = max(1, (look.width - 2 + 4) // (names + values + 6))
    height = -(-len(texts) // columns)
    lines = []
    for y in range(height):
        row = texts[y::height]
        lines.append("  " + "    ".join(f"{n:<{names}}  {v:>{values}}" for n, v in row).rstrip())
    if more := len(cells) - len(texts):
        lines.append(f"  {more:,} more: --json")
    return [look.paint(f"Metrics at step {step:,}", "strong"), *lines]


def _checkpoints(run: Run, look: Look) -> list[str]:
    steps, best = run.checkpoints.steps, run.checkpoints
    if not steps:
        return ["No checkpoint yet."] if runs.state(run) is not State.FINISHED else []
    kept = ", ".join(f"{step:,}" for step in steps[-6:])
    text = f"Checkpoints: latest {steps[-1]:,}"
    if best.best is not None:
        text += f", best {best.best:,} with {best.metric} {percent(best.value)}"
    return look.wrap(f"{text}; kept: {'… ' if len(steps) > 6 else ''}{kept}.", 0)


# ---- Values ------------------------------------------------------------------------------------


def series(run: Run, name: str) -> dict[int, float]:
    """Returns a metric by step; the later row of a step counts."""
    return {int(row["step"]): float(row[name]) for row in run.rows if name in row}


def _drawable(values: Mapping[int, float]) -> bool:
    return any(map(math.isfinite, values.values()))


def last(run: Run, name: str) -> float:
    """Returns the last value of a metric; NaN: there is none."""
    return run.latest[name][1] if name in run.latest else math.nan


def latest(run: Run) -> dict[str, tuple[int, float]]:
    """Returns the last value of every metric with its step, without those that are always zero."""
    found = {name: value for name, value in run.latest.items() if "/" in name}
    hidden = {name for name, (_, value) in found.items() if not value and not is_score(name)}
    hidden |= {name for name in found if name.startswith("time/") or name == "eval/images_seen"}
    return {name: found[name] for name in sorted(found.keys() - hidden, key=_order)}


def _order(name: str) -> tuple[int, str]:
    """Returns the place of a metric in the list: what is looked at most often comes first."""
    leaf = name.rpartition("/")[2]
    if name in _FIRST:
        return _FIRST.index(name), name
    place = 0 if leaf in _SCORES else 1 if name.startswith("train/") else 2
    return len(_FIRST) + place, name


def is_score(name: str) -> bool:
    """Returns whether a metric is a fraction, shown in percent."""
    leaf = name.rpartition("/")[2]
    return leaf.startswith(("top", "recall@", "mean")) or leaf in ("mfu", "waiting")


def score_name(run: Run) -> str:
    """Returns the metric by which a run is judged: that of its best checkpoint, or the first."""
    names = run.latest
    best = run.config.get("checkpoint.best_metric")
    if isinstance(best, str) and best in names:
        return best
    return next((n for leaf in _SCORES for n in names if n.rpartition("/")[2] == leaf), "")


def clock_time(time: datetime, now: datetime) -> str:
    """Returns a time of this place's clock, with the year where it is another."""
    local = time.astimezone()
    year = "" if local.year == now.astimezone().year else " %Y"
    return local.strftime(f"%a %d %b{year} %H:%M")


def _number(value: float) -> str:
    return "" if math.isnan(value) else short(value)


def _share(value: float) -> str:
    return "" if math.isnan(value) else percent(value)


def _bar(look: Look) -> int:
    """Returns the columns of a full bar, behind some 50 of text."""
    return min(_BAR, look.width - 50)


def _end(name: str, look: Look) -> str:
    """Returns the end of a name that is too long for a table: names differ there."""
    most = look.width // 3
    return name if len(name) <= most else ("…" if look.unicode else "...") + name[3 - most :]


def _cut(line: str, look: Look) -> str:
    if len(line) <= look.width:
        return line
    return line[: look.width - 1].rstrip() + ("…" if look.unicode else ".")
