"""The entries of a model card that no run can know: above all, the licence."""

import argparse
import dataclasses
import re

from clip_jax.errors import UserError

CARD = "README.md"  # name of the card in a folder
_LICENSE = re.compile(r"[a-z0-9][a-z0-9.+-]*")


@dataclasses.dataclass(frozen=True)
class Terms:
    """The entries that the owner of a model gives.

    Attributes:
      license: an identifier of the hub, such as "apache-2.0"; "other" goes with the next two.
      license_name, license_link: name and address of another licence; "": none.
      datasets: names of the training data on the hub; (): they are not there.
      name: name of the model; "": its shape.
      hardware: training hardware; "": as recorded.

    Raises:
      UserError: there is no licence, or not all that belongs to it.
    """

    license: str
    license_name: str
    license_link: str
    datasets: tuple[str, ...]
    name: str
    hardware: str

    def __post_init__(self) -> None:
        if not _LICENSE.fullmatch(self.license):
            raise UserError(
                f"A card names the licence of the model, not {self.license!r}: give its "
                "identifier, as in --license=apache-2.0, --license=mit or --license=cc-by-4.0; or "
                "--license=other with --license_name and --license_link."
            )
        if self.license == "other" and not (self.license_name and self.license_link):
            raise UserError(
                "--license=other needs --license_name=NAME, in lower case with dashes, and "
                "--license_link=URL, or LICENSE for a file of that name beside the card."
            )


def add_to(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments that `parse` reads."""
    add = parser.add_argument
    add(
        "--license",
        default="",
        metavar="ID",
        help="license of the model, by its name on the hub; required",
    )
    add("--license_name", default="", metavar="NAME", help="where --license=other")
    add("--license_link", default="", metavar="URL", help="where --license=other")
    add("--dataset", action="append", default=[], metavar="ORG/NAME", help="on the hub; repeatable")
    add("--name", default="", help="name of the model on its card (default: its shape)")
    add("--hardware", default="", help="it was trained on (default: as recorded)")


def parse(args: argparse.Namespace) -> Terms:
    """Returns the terms on the command line; UserError where the licence is missing."""
    return Terms(
        license=args.license,
        license_name=args.license_name,
        license_link=args.license_link,
        datasets=tuple(args.dataset),
        name=args.name,
        hardware=args.hardware,
    )
