"""Uploads a folder with a model card to the Hugging Face hub.

  python -m clip_jax push --dir=exported --repo=org/name --dry_run
  python -m clip_jax push --dir=exported --repo=org/name --private

The repository is made where there is none; files of the same name are replaced, others stay. Log in
once with `hf auth login`, or set HF_TOKEN.
"""

import argparse
import pathlib
import re

import huggingface_hub

from clip_jax.common import commands
from clip_jax.errors import UserError
from clip_jax.export.terms import CARD
from clip_jax.storage import locations, remote

_REPO = re.compile(r"[\w.-]+/[\w.-]+")


def main(arguments: list[str]) -> None:
    """Runs the command; user errors end it with a paragraph and status 2."""
    args = _parser().parse_args(arguments)
    with commands.plain_errors():
        _push(args)


def _parser() -> argparse.ArgumentParser:
    parser = commands.parser("push", __doc__)
    add = parser.add_argument
    add("--dir", required=True, help="to upload, all that is in it")
    add("--repo", required=True, metavar="ORG/NAME", help="on the hub")
    add("--private", action="store_true", help="where the repository is made, only for its owners")
    add("--dry_run", action="store_true", help="say what would happen; needs no network")
    return parser


def _push(args: argparse.Namespace) -> None:
    directory = locations.parse(args.dir)
    if remote.is_remote(directory):
        raise UserError(f"{directory} is in a bucket: copy it to a local folder, and push that.")
    folder = pathlib.Path(directory)
    files = _files(folder)
    if not _REPO.fullmatch(args.repo):
        raise UserError(f"--repo={args.repo} is no repository: it is ORG/NAME, or your NAME/NAME.")
    licence = _licence(folder / CARD)
    if args.dry_run:
        _announce(files, folder, args, licence)
        return
    print(f"Uploaded: {_upload(folder, args.repo, args.private)}")


def _files(folder: pathlib.Path) -> list[pathlib.Path]:
    if not folder.is_dir():
        raise UserError(
            f"{folder} is no folder: give one that python -m clip_jax export or convert made."
        )
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    if folder / CARD not in files:
        raise UserError(
            f"{folder} has no model card: write one with python -m clip_jax card --model={folder} "
            f"--license=... --out={folder / CARD}."
        )
    return files


def _licence(card: pathlib.Path) -> str:
    """Returns the licence that a card names; UserError where the hub could not read it."""
    try:
        licence = huggingface_hub.ModelCard(card.read_text("utf-8")).data.to_dict().get("license")
    except Exception as error:  # an error of YAML, or of a field in it
        raise UserError(
            f"The header of {card} cannot be read ({_first_line(error)}): write the card anew with "
            "python -m clip_jax card."
        ) from error
    if not licence:
        raise UserError(
            f"{card} names no licence: add license: ID to its header, or write it anew with "
            "python -m clip_jax card --license=ID."
        )
    return licence


def _announce(
    files: list[pathlib.Path], folder: pathlib.Path, args: argparse.Namespace, licence: str
) -> None:
    sizes = [path.stat().st_size for path in files]
    for path, size in zip(files, sizes):
        print(f"  {path.relative_to(folder).as_posix():<40} {size / 2**20:10.2f} MiB")
    made = "private" if args.private else "public"
    print(
        f"{len(files)} files, {sum(sizes) / 2**20:,.2f} MiB, would go to {args.repo}, under the "
        f"licence {licence}; the repository would be made, {made}, if there is none. Nothing was "
        "sent."
    )


def _upload(folder: pathlib.Path, repo: str, private: bool) -> str:
    """Uploads everything in one commit; returns the address of the repository."""
    if huggingface_hub.get_token() is None:
        raise UserError("The hub does not know you: run `hf auth login`, or set HF_TOKEN.")
    api = huggingface_hub.HfApi()
    try:
        address = api.create_repo(repo, private=private, exist_ok=True)
        api.upload_folder(repo_id=repo, folder_path=folder, commit_message=f"Upload {folder.name}")
    except Exception as error:  # an error of the network, the hub or the token
        raise UserError(
            f"{repo} could not be uploaded: {_first_line(error)}. Check the name, that your token "
            "may write there, and the network; then run the command again."
        ) from error
    return str(address)


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:300]
