"""The plans of all configs on TPU pods, kept in clip_jax/plan/plans.json, and what became of them.

    python benchmarks/plans.py                    # plans what is not in the file, or was never done
    python benchmarks/plans.py vit_l14 vit_b16    # plans these again, on all their topologies
    python benchmarks/plans.py --table            # the table of docs/scale.md
    python benchmarks/plans.py --check            # two layers of one config, which changes daily

A plan takes 3 to 15 minutes and some GiB. Each is kept as soon as it is done; one that is broken
off begins again. --check compiles the first two layers of each tower, in a minute or two, and
ends with 1 if the step takes 5 % longer than in the file. Both need libtpu: pip install "jax[tpu]".
"""

import argparse
import dataclasses
import datetime
import json
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FILE = ROOT / "clip_jax" / "plan" / "plans.json"
SLOWER = 1.05  # than the stored plan, by the check
SOURCE = ("data.source.type=digits", "data.source.split=train")  # a plan does not look at them


@dataclasses.dataclass(frozen=True)
class Row:
    """A config, the topology that it is planned for, and settings on top of the config."""

    config: str
    topology: str
    settings: tuple[str, ...] = ()

    def __str__(self) -> str:
        return " ".join([self.config, "on", self.topology, *self.settings])


POD = "v5e:16x16"
FSDP = ("mesh.fsdp=16",)
ROWS = [
    Row("rn50", POD),
    Row("rn101", POD),
    Row("rn50x4", POD),
    Row("rn50x16", POD, ("accum_steps=2",)),
    Row("rn50x64", POD, ("accum_steps=8",)),
    Row("vit_b32", POD),
    Row("vit_b16", POD),
    Row("vit_l14", POD),
    Row("vit_l14_336", POD),
    Row("vit_h14", POD, FSDP),
    Row("vit_g14", POD, FSDP),
    Row("siglip_b16", POD),
    Row("siglip_so400m", POD, FSDP),
    Row("vit_l14", "v5p:4x8x8"),
    Row("vit_l14", "v6e:16x16"),
    Row("vit_l14", "tpu7x:4x4x8"),
]
# As many examples a chip as on the pod.
SHALLOW = ("model.size.image_layers=(2,)", "model.size.text_layers=2", "batch_size=512")
CHECKS = [
    Row(config, "v5e:2x2", SHALLOW)
    for config in ("vit_b32", "vit_b16", "vit_l14", "vit_h14", "siglip_b16", "siglip_so400m")
]


def plan(row: Row) -> dict:
    """Plans a row; returns what is kept of it."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "plan.json"
        settings = [f"--config.{setting}" for setting in (*SOURCE, *row.settings)]
        command = [sys.executable, "-m", "clip_jax", "plan", f"--config={row.config}"]
        command += [f"--topology={row.topology}", f"--json={file}", *settings]
        print(f"{row}:", flush=True)
        done = subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL)
        if not file.exists():
            sys.exit(f"{row}: the plan ended with {done.returncode}.")
        found = json.loads(file.read_text())
    if not found["fits"]:
        sys.exit(f"{row}: does not fit.")
    kept = keep(found)
    print(f"  {kept['ms']:.1f} ms, MFU {kept['mfu']:.3f}, {kept['gib']:.1f} GiB a chip", flush=True)
    return kept


def keep(found: dict) -> dict:
    """Returns what is kept of the figures of a plan."""
    return {
        "gib": found["memory"]["peak"] / 2**30,
        "ms": found["step"]["seconds"] * 1e3,
        "mfu": found["step"]["mfu"],
        "pairs_per_second": found["examples_per_second"],
        "days": found["days"],
        "duration": found["duration"],
        "compile_seconds": found["compile_seconds"],
        "libtpu": metadata.version("libtpu"),
        "date": datetime.date.today().isoformat(),
    }


def table(stored: dict[str, dict]) -> str:
    """Returns the stored plans of whole configs as Markdown."""
    lines = [
        "| config | topology | flags on top of the config | GiB per chip | ms per step | pairs/s | "
        "MFU | days for 32 epochs of 400 M |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in ROWS:
        if str(row) not in stored:
            continue
        kept = stored[str(row)]
        flags = ", ".join(f"`{setting}`" for setting in row.settings)
        days = f"{kept['days']:.1f}"
        if kept["duration"] != "32 epochs":
            days += f" ({kept['duration'].replace('1 epochs', '1 epoch')})"
        pairs = float(f"{kept['pairs_per_second']:.3g}")
        cells = [
            row.config, row.topology, flags, f"{kept['gib']:.1f}", f"{kept['ms']:,.0f}",
            f"{pairs:,.0f}", f"{kept['mfu']:.2f}", days,
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines).replace("|  |", "| |")


def renew(rows: list[Row], stored: dict[str, dict]) -> None:
    for row in rows:
        stored[str(row)] = plan(row)
        FILE.write_text(json.dumps(stored, indent=1) + "\n")


def check(rows: list[Row], stored: dict[str, dict]) -> None:
    slower = []
    for row in rows:
        before, now = stored[str(row)]["ms"], plan(row)["ms"]
        print(f"  {now / before - 1:+.1%} of {before:.1f} ms in {FILE.name}")
        if now > before * SLOWER:
            slower.append(str(row))
    if slower:
        sys.exit(f"More than {SLOWER - 1:.0%} slower than in {FILE.name}: {', '.join(slower)}.")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("configs", nargs="*", help="names to plan again; default: what is missing")
    parser.add_argument("--table", action="store_true", help="print the table, plan nothing")
    parser.add_argument("--check", action="store_true", help="compare two layers with the file")
    parser.add_argument("--all", action="store_true", help="with --check: of every config")
    options = parser.parse_args()
    stored = json.loads(FILE.read_text()) if FILE.exists() else {}
    rows = [row for row in ROWS + CHECKS if row.config in options.configs]
    if unknown := set(options.configs) - {row.config for row in rows}:
        sys.exit(f"No such config here: {', '.join(sorted(unknown))}.")
    if options.table:
        print(table(stored))
    elif options.check:
        today = [CHECKS[datetime.date.today().toordinal() % len(CHECKS)]]
        chosen = CHECKS if options.all else [row for row in rows if row in CHECKS] or today
        check(chosen, stored)
    else:
        renew(rows or [row for row in ROWS + CHECKS if str(row) not in stored], stored)


if __name__ == "__main__":
    main()
