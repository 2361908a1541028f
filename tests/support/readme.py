"""The README's examples of using a model, and a folder that has what they name."""

import pathlib
import shutil
import zipfile
from typing import Any

import markdown_pages
import tiny_run
import tiny_weights
from markdown_pages import Block
from PIL import Image

from clip_jax import __main__, weights
from clip_jax.data.sources import digits

PAGE = markdown_pages.ROOT / "README.md"
# OpenAI's archives hold code, by which they are told from bare tensors; it is never run.
_QUICK_GELU = "def forward(self, x):\n  return torch.mul(x, torch.sigmoid(torch.mul(x, 1.702)))\n"


def blocks(title: str) -> list[Block]:
    """The code blocks of a section."""
    return markdown_pages.blocks(PAGE, title)


def run(block: Block, names: dict[str, Any]) -> None:
    """Runs a block as it stands; commands within this process, which is faster."""
    if block.language == "python":
        exec(compile(block.text, str(block), "exec"), names)
        return
    for command in markdown_pages.commands(block):
        program, *arguments = command.words
        assert [program, *arguments[:2]] == ["python", "-m", "clip_jax"], command
        __main__.main(arguments[2:])


def prepare(folder: pathlib.Path) -> None:
    """Puts a finished run, an archive of OpenAI's kind and pictures there, all of them tiny."""
    shutil.copytree(tiny_run.finished(), folder / "runs" / "quickstart")
    write_archive(folder / "ViT-B-32.pt")
    scenes = digits.DigitScenes("test", image_size=32, seed=0)
    (folder / "pictures").mkdir()
    pictures = [Image.fromarray(scenes[index].image) for index in range(20)]
    for index, picture in enumerate(pictures):
        picture.save(folder / "pictures" / f"{index}.png")
    pictures[0].save(folder / "a.png")
    pictures[1].save(folder / "b.jpg")


def write_archive(path: pathlib.Path) -> None:
    """Writes the weights `tiny_weights.make("vit")` as OpenAI publishes its own."""
    weights.save(tiny_weights.make("vit"), path, "openai")
    with zipfile.ZipFile(path, "a") as file:
        file.writestr("archive/code/__torch__.py", _QUICK_GELU)
