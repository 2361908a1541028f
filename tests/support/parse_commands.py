"""Parses command lines of this project by the parsers that run them, and runs nothing.

Reads a JSON list of command lines (a list of words each, without "python"), writes a JSON list of
what is wrong with each, "" for nothing. Every one is parsed in a process of its own, forked from
this one, which has imported what they share.

    echo '[["main.py", "--config=configs/quickstart.py"]]' | python tests/support/parse_commands.py
"""

import argparse
import contextlib
import importlib
import io
import json
import os
import sys

from clip_jax import __main__
from clip_jax.common import config_file
from clip_jax.curation import cli as data
from clip_jax.plan import budget_cli
from clip_jax.plan import cli as plan
from clip_jax.sweep import cli as sweep
from clip_jax.training import cli as training
from clip_jax.training import validation

OPEN = "..."  # stands for arguments that a page leaves out


class Parsed(BaseException):
    """The arguments were understood. No error, so that nothing on the way takes it for one."""


def parse(words: list[str]) -> None:
    """Raises Parsed if it can be run, SystemExit or another exception if not."""
    complete = OPEN not in words
    words = [word for word in words if word != OPEN]
    if words[0] == "main.py":
        _parse_training(words[1:], complete)
    elif words[:3] == ["-m", "clip_jax", "train"]:
        _parse_training(words[3:], complete)
    elif words[:3] == ["-m", "clip_jax", "plan"] and budget_cli.is_meant(words[3:]):
        budget_cli._amounts(budget_cli._parser().parse_args(words[3:]))
    elif words[:3] == ["-m", "clip_jax", "plan"]:
        given = config_file.parse(words[3:], "python -m clip_jax plan", plan._define)
        plan._request(given, words[3:])
    elif words[:3] == ["-m", "clip_jax", "sweep"]:
        sweep.parse(words[3:])
    elif words[:2] == ["-m", "clip_jax"]:
        _parse_command(words[2:])
        raise AssertionError("no parser was asked")
    else:
        raise AssertionError("it is no command of this project")
    raise Parsed


def _parse_training(words: list[str], complete: bool) -> None:
    config = config_file.parse(words, "python main.py", training._define).config
    if complete:
        validation.validate(config)


def _parse_command(words: list[str]) -> None:
    really = argparse.ArgumentParser.parse_args

    def parse_args(self, args=None, namespace=None):
        really(self, args, namespace)
        raise Parsed

    argparse.ArgumentParser.parse_args = parse_args
    __main__.main(words)


def complaint(words: list[str]) -> str:
    """Returns the error of a command line, found by parsing it in a forked process."""
    reader, writer = os.pipe()
    if not (child := os.fork()):
        said = io.StringIO()
        answer = "it ended without being parsed"
        try:
            with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
                parse(words)
        except Parsed:
            answer = ""
        except BaseException as error:
            answer = f"{said.getvalue()[-500:]} {error!r}"
        os.write(writer, answer.encode())
        os._exit(0)
    os.close(writer)
    with open(reader, "rb") as file:
        answer = file.read().decode()
    os.waitpid(child, 0)
    return answer


if __name__ == "__main__":
    for module, _ in [*__main__.COMMANDS.values(), *data.COMMANDS.values()]:
        importlib.import_module(module)  # once, not in every fork
    json.dump([complaint(words) for words in json.load(sys.stdin)], sys.stdout)
