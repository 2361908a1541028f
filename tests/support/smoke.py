"""Imports every module, asks every command for --help, then trains and uses what came out.

It needs what requirements-core.txt installs and no more: .ci/run calls it on every other Python
that it finds, and test_package.py without TensorFlow.

    python tests/support/smoke.py
"""

import contextlib
import importlib
import io
import os
import pathlib
import pkgutil
import sys
import tempfile

from xla_flags import QUICK

# The modules that are TensorFlow's.
NEED_TENSORFLOW = {
    "clip_jax.common.tensorflow_cpu",
    "clip_jax.data.sources.tfds",
    "clip_jax.data.sources.tfrecord_source",
}
RUN = "runs/vit_b32-smoke"
COMMANDS = (
    ("train", "--config=vit_b32:smoke"),
    ("evaluate", f"--checkpoint={RUN}", "--datasets=embedded", "--tasks=zeroshot"),
    ("embed", f"--model={RUN}", "digits:test_scenes", "--split=test", "--out=embeddings"),
    ("export", f"--model={RUN}", "--out=exported", "--license=apache-2.0"),
)


def import_all() -> int:
    """Imports every module; returns their number."""
    import clip_jax

    names = {info.name for info in pkgutil.walk_packages(clip_jax.__path__, "clip_jax.")}
    names -= {"clip_jax.__main__"}
    assert names > NEED_TENSORFLOW, NEED_TENSORFLOW - names
    for name in sorted(names):
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            if name not in NEED_TENSORFLOW or not (error.name or "").startswith("tensorflow"):
                raise
    return len(names)


def ask_for_help() -> int:
    """Asks every command for --help; returns their number."""
    from clip_jax import __main__
    from clip_jax.curation import balancing, cli

    tables = (
        ([], __main__.COMMANDS),
        (["data"], cli.COMMANDS),
        (["data", "curate"], balancing.COMMANDS),
    )
    commands = [[*words, name] for words, table in tables for name in table]
    for words in commands:
        shown = io.StringIO()
        with contextlib.redirect_stdout(shown), contextlib.suppress(SystemExit):
            __main__.main([*words, "--help"])
        assert f"python -m clip_jax {words[0]}" in shown.getvalue(), (words, shown.getvalue())
    return len(commands)


def main() -> None:
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {QUICK}"
    from clip_jax import __main__

    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        commands = ask_for_help()
        for arguments in COMMANDS:
            print("+ python -m clip_jax", *arguments, flush=True)
            __main__.main(list(arguments))
        for name in (
            "report.html",
            "tensorboard/events.out.tfevents.*",
            "evaluation-20/report.html",
        ):
            assert list(pathlib.Path(RUN).glob(name)), name
            assert list(pathlib.Path("embeddings").glob("part-*.parquet"))
        # Neither where it is installed.
        assert not {"tensorflow", "tensorflow_datasets"} & set(sys.modules)
        os.chdir("/")
    modules = import_all()
    version = ".".join(map(str, sys.version_info[:3]))
    print(f"Python {version}: {modules} modules, {commands} commands, a run and its use.")


if __name__ == "__main__":
    main()
