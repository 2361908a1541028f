"""Writes a model card: README.md as the Hugging Face hub reads it, from what the run recorded.

  python -m clip_jax card --model=runs/mine --license=apache-2.0 --out=README.md
  python -m clip_jax card --model=runs/mine --license=mit --out=converted/README.md
  python -m clip_jax card --model=runs/mine --license=other --license_name=my-licence \\
      --license_link=https://example.org/licence --out=README.md

--model is what was trained; the files beside --out decide how the card says it is loaded.
Nothing in it is guessed: what was not recorded, or not measured, it says is not. The licence is
yours to choose; data and weights that you started from may bind you.
"""

import argparse
import pathlib
import sys

from clip_jax.errors import UserError
from clip_jax.export import terms


def main(arguments: list[str]) -> None:
    """Runs the command; mistakes of the user end it with a paragraph and status 2."""
    args = _parser().parse_args(arguments)
    try:
        _write(args)
    except UserError as error:
        print(f"\n{error}", file=sys.stderr)
        sys.exit(2)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m clip_jax card",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--model", required=True, help="workdir, checkpoint or converted folder")
    parser.add_argument("--out", required=True, metavar="FILE", help="to write; replaced if there")
    terms.add_to(parser)
    return parser


def _write(args: argparse.Namespace) -> None:
    given, out = terms.parse(args), pathlib.Path(args.out)
    if not out.parent.is_dir():
        raise UserError(f"--out={out} cannot be written: there is no folder {out.parent}.")
    # Imported late: --help and mistakes are answered at once.
    from clip_jax import convert
    from clip_jax.export import card_text, record

    found = record.read(convert.read(args.model))
    out.write_text(card_text.render(found, given, out.parent), "utf-8")
    print(f"Wrote {out}.")
