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

from clip_jax.common import commands
from clip_jax.errors import UserError
from clip_jax.export import terms


def main(arguments: list[str]) -> None:
    """Runs the command; mistakes of the user end it with a paragraph and status 2."""
    args = _parser().parse_args(arguments)
    with commands.plain_errors():
        _write(args)


def _parser() -> argparse.ArgumentParser:
    parser = commands.parser("card", __doc__)
    parser.add_argument("--model", required=True, help="workdir, checkpoint or converted folder")
    parser.add_argument("--out", required=True, metavar="FILE", help="to write; replaced if there")
    terms.add_to(parser)
    return parser


def _write(args: argparse.Namespace) -> None:
    given = terms.parse(args)
    # Imported late: --help and mistakes are answered at once.
    from clip_jax.storage import locations, remote, writing

    out = locations.parse(args.out)
    if not remote.is_remote(out) and not out.parent.is_dir():
        raise UserError(f"--out={out} cannot be written: there is no folder {out.parent}.")
    from clip_jax.export import card_text, record
    from clip_jax.weights import convert

    found = record.read(convert.read(args.model))
    writing.write(out, card_text.render(found, given, out.parent))
    print(f"Wrote {out}.")
