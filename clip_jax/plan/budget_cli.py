"""python -m clip_jax plan --budget="256 v5e-days" --pairs=400M

Chooses model, batch and pairs to be seen for a budget, and predicts the zero-shot accuracy on
ImageNet from published results. Speeds are those of stored plans by the TPU compiler, or an
estimate from the operations. docs/budget.md says what a prediction is worth.

    python -m clip_jax plan --budget="256 v5e-days" --pairs=400M --price="1.20 dollars/chip-hour"
    python -m clip_jax plan --budget="6144 v5e-hours" --pairs=1.4B --data=DataComp-1B
"""

import argparse
import dataclasses
import json
from collections.abc import Sequence
from typing import Any

from clip_jax.common import commands, formatting
from clip_jax.errors import UserError
from clip_jax.plan import accuracy, budget, units
from clip_jax.plan.budget import Option
from clip_jax.plan.topology import Topology, parse_topology, prepare_environment
from clip_jax.storage import locations, writing

_OWN = ("--budget", "--pairs", "--price", "--data", "--mfu")


def is_meant(arguments: Sequence[str]) -> bool:
    """Tells from its arguments whether the command is to spend a budget."""
    return any(argument.partition("=")[0] in _OWN for argument in arguments)


def main(arguments: list[str]) -> None:
    """Runs the command; ends the process where it must."""
    parser = _parser()
    if {"-h", "--help"} & set(arguments):
        parser.print_help()
        return
    prepare_environment()
    with commands.plain_errors():
        _run(arguments, parser)


def _parser() -> argparse.ArgumentParser:
    parser = commands.parser("plan", __doc__ or "")
    parser.add_argument("--budget", help='number, chip and time: "256 v5e-days", "90 v5p-hours"')
    parser.add_argument("--pairs", help="image-text pairs that differ: 400M, 1.4B")
    parser.add_argument("--price", help='"1.20 dollars/chip-hour"')
    parser.add_argument(
        "--data",
        default=accuracy.UNKNOWN,
        help="published data that the pairs are like, such as LAION; default: unknown",
    )
    parser.add_argument("--topology", help="slice to train on, v5e:16x16; default: busy for a day")
    parser.add_argument("--slices", type=commands.at_least(1), default=1, help="TPU slices")
    parser.add_argument("--mfu", type=float, help="assumed in place of all plans and estimates")
    parser.add_argument("--json", help="file for all figures, or - to print them instead")
    return parser


def _run(arguments: list[str], parser: argparse.ArgumentParser) -> None:
    if "--search" in arguments or any(a.startswith("--config") for a in arguments):
        raise UserError(
            "--budget chooses a config for a number of chip-days, and takes neither --config nor "
            "--search. The minutes that a search may take are --search_minutes now."
        )
    given = parser.parse_args(arguments)
    spend, price, pairs = _amounts(given)
    law = accuracy.Law(accuracy.published())
    if given.mfu is not None and not 0 < given.mfu <= 1:
        raise UserError(
            f"--mfu={given.mfu} is no fraction of the peak: it is above 0 and at most 1."
        )
    request = budget.Request(spend, pairs, _collection(given.data, law), given.mfu)
    topology = _topology(given, spend)
    found = budget.options(request, law)
    if given.json:
        text = json.dumps(_fields(found, topology, price, law), indent=2)
        if given.json == "-":
            print(text)
            return
        writing.write(locations.parse(given.json), text + "\n")
    print(_text(request, found, topology, price, law))


def _amounts(given: argparse.Namespace) -> tuple[units.Budget, units.Price | None, float]:
    if given.budget is None:
        raise UserError('--budget is missing, as in --budget="256 v5e-days" --pairs=400M.')
    spend = units.parse_budget(given.budget)
    if given.pairs is None:
        raise UserError(
            "--pairs is missing: the number of different image-text pairs that there are, as in "
            "--pairs=400M. Fewer pairs are seen more often, which is worth less."
        )
    price = units.parse_price(given.price, spend.chip) if given.price is not None else None
    return spend, price, units.parse_pairs(given.pairs)


def _collection(name: str, law: accuracy.Law) -> str:
    known = {each.lower(): each for each in (*law.collections, accuracy.UNKNOWN)}
    if name.lower() not in known:
        raise UserError(
            f"--data={name} has no published results here: {', '.join(known.values())}."
        )
    return known[name.lower()]


def _topology(given: argparse.Namespace, spend: units.Budget) -> Topology:
    if given.topology is None:
        return dataclasses.replace(budget.whole_topology(spend), slices=given.slices)
    topology = parse_topology(given.topology, given.slices)
    if topology.chip != spend.chip:
        raise UserError(
            f"--topology={given.topology} is not of the {spend.chip.name} of the --budget."
        )
    return topology


def _text(
    request: budget.Request,
    found: Sequence[Option],
    topology: Topology,
    price: units.Price | None,
    law: accuracy.Law,
) -> str:
    best, chip = found[0], request.budget.chip.name
    error, inside = law.leave_one_out()
    mean = abs(accuracy.top1_errors(accuracy.published(), error)).mean()
    train, check = budget.commands(best, topology)
    data = "unknown data" if request.collection == accuracy.UNKNOWN else request.collection
    lines = [
        f"{request.budget.days:,.4g} {chip}-days, {units.count(request.pairs)} pairs, {data}; days "
        f"on {topology}. The best predicted first:",
        "",
        _table(found, topology, price),
        "",
        f"Top-1 is zero-shot on ImageNet, with an interval of {accuracy.COVERAGE:.0%}. Each of "
        f"{len(error)} published results, predicted from the others, is off by {100 * mean:.1f} "
        f"points in the mean, and {inside:.0%} lie within their interval.",
        f"Speed: {_speeds(found)}; predicted, not measured, and nothing is kept back for failures.",
    ]
    if request.collection == accuracy.UNKNOWN:
        lines.append(
            "Data: unknown, so the interval spans the differences between published data sets. "
            f"--data narrows it where yours are like one of {', '.join(law.collections)}."
        )
    if best.batch_source:
        lines.append(
            f"Batch: a power of two not above that of {best.batch_source}, the largest published "
            "for no more pairs. The learning rate is the config's."
        )
    if best.beyond:
        lines.append(f"Beyond the published results: {'; '.join(best.beyond)}. Do not rely on it.")
    if best.days < 0.99 * request.budget.days:
        lines.append(
            f"{request.budget.days - best.days:,.4g} {chip}-days are left over: no published run "
            "of its recipe saw more pairs."
        )
    lines += ["", "Does it fit?", f"  {check}", "Train:", f"  {train}"]
    return "\n".join(lines)


def _table(found: Sequence[Option], topology: Topology, price: units.Price | None) -> str:
    header = ["config", "batch", "image tokens", "text tokens", "pairs seen", "days"]
    header += [price.currency] if price else []
    rows = [[*header, "top-1", "interval", "speed"]]
    for option in found:
        top1 = option.prediction
        stages = option.stages
        cost = [f"{price.per_day * option.days:,.0f}"] if price else []
        rows.append(
            [
                option.config,
                _each(f"{stage.batch_size:,}" for stage in stages),
                _each(str(accuracy.image_tokens(stage.size)) for stage in stages),
                _each(str(stage.size.context_length) for stage in stages),
                units.count(option.seen),
                f"{_days(option, topology):.3g}",
                *cost,
                f"{100 * top1.top1:.1f}",
                f"{100 * top1.low:.1f} to {100 * top1.high:.1f}",
                option.rate + (" *" if option.beyond else ""),
            ]
        )
    return formatting.aligned(rows, "<" + ">" * (len(rows[0]) - 2) + "<")


def _each(values: Any) -> str:
    """Joins the values of the stages; one where all are the same."""
    different = list(dict.fromkeys(values))
    return ", ".join(different)


def _days(option: Option, topology: Topology) -> float:
    return option.days / (topology.size / topology.chip.devices)


def _speeds(found: Sequence[Option]) -> str:
    compiled = [option.config for option in found if option.rate == "compiled"]
    said = [f"a stored plan of the compiler ({', '.join(compiled)})"] if compiled else []
    if len(compiled) < len(found):
        said.append("operations over the peak at the MFU that the table states")
    return ", else ".join(said)


def _fields(
    found: Sequence[Option], topology: Topology, price: units.Price | None, law: accuracy.Law
) -> dict[str, Any]:
    error, inside = law.leave_one_out()
    mean = abs(accuracy.top1_errors(accuracy.published(), error)).mean()
    listed = []
    for option in found:
        train, check = budget.commands(option, topology)
        listed.append(
            {
                "config": option.config,
                "model": str(option.stages[-1].size),
                "batch_size": [stage.batch_size for stage in option.stages],
                "image_tokens": [accuracy.image_tokens(stage.size) for stage in option.stages],
                "text_tokens": [stage.size.context_length for stage in option.stages],
                "seen": option.seen,
                "chip_days": option.days,
                "days": _days(option, topology),
                "cost": price and price.per_day * option.days,
                "top1": dataclasses.asdict(option.prediction),
                "speed": option.rate,
                "beyond": option.beyond,
                "train": train,
                "check": check,
            }
        )
    test = {"mean_absolute_error": float(mean), "within_interval": inside}
    return {"topology": str(topology), "options": listed, "leave_one_out": test}
