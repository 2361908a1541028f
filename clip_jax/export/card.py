"""Writes a model card: README.md as the Hugging Face hub reads it, from what the run recorded.

  python -m clip_jax card --model=runs/mine --license=apache-2.0 --out=README.md
  python -m clip_jax card --model=runs/mine --license=mit --out=converted/README.md
  python -m clip_jax card --model=runs/mine --license=other --license_name=my-licence \\
      --license_link=https://example.org/licence --out=README.md

--model is the trained model; the files beside --out decide how the card says it is loaded.
Nothing in it is guessed: the card says what was not recorded or not measured. The licence is yours
to choose; data and weights that you started from may bind you.
"""

import argparse

from clip_jax import weights
from clip_jax.common import commands
from clip_jax.errors import UserError
from clip_jax.export import terms
from clip_jax.storage import locations, remote, writing


def main(arguments: list[str]) -> None:
    """Runs the command; user errors end it with a paragraph and status 2."""
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
    parsed = terms.parse(args)
    out = locations.parse(args.out)
    if not remote.is_remote(out) and not out.parent.is_dir():
        raise UserError(f"--out={out} cannot be written: there is no folder {out.parent}.")
    # Late, so that --help and user errors are answered at once.
    from clip_jax.export import card_text, record

    facts = record.read(weights.open(args.model))
    writing.write(out, card_text.render(facts, parsed, out.parent))
    print(f"Wrote {out}.")
