"""The README's examples of using a model, and a folder that has what they name."""

import pathlib
import re
import shlex
import shutil
import zipfile
from typing import Any

import tiny_run
import tiny_weights
from PIL import Image

from clip_jax import __main__, weights
from clip_jax.data.sources import digits

TEXT = (pathlib.Path(__file__).parents[2] / "README.md").read_text()
# OpenAI's archives hold code, by which they are told from bare tensors; it is never run.
_QUICK_GELU = "def forward(self, x):\n  return torch.mul(x, torch.sigmoid(torch.mul(x, 1.702)))\n"


def blocks(title: str) -> list[tuple[str, str]]:
    """Language and text of the code blocks in a section."""
    (section,) = re.findall(rf"^## {title}$(.*?)^## ", TEXT, re.MULTILINE | re.DOTALL)
    return re.findall(r"^```(\w+)\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)


def run(language: str, text: str, names: dict[str, Any]) -> None:
    """Runs a block as it stands; commands within this process, which is faster."""
    if language == "python":
        exec(compile(text, "README.md", "exec"), names)
        return
    for line in text.replace("\\\n", " ").splitlines():
        program, *arguments = shlex.split(line, comments=True)
        assert [program, *arguments[:2]] == ["python", "-m", "clip_jax"], line
        __main__.main(arguments[2:])


def prepare(folder: pathlib.Path) -> None:
    """Puts a finished run, an archive of OpenAI's kind and pictures there, all of them tiny."""
    shutil.copytree(tiny_run.finished(), folder / "runs" / "quickstart")
    archive = folder / "ViT-B-32.pt"
    weights.save(tiny_weights.make("vit"), archive, "openai")
    with zipfile.ZipFile(archive, "a") as file:
        file.writestr("archive/code/__torch__.py", _QUICK_GELU)
    scenes = digits.DigitScenes("test", image_size=32, seed=0)
    (folder / "pictures").mkdir()
    pictures = [Image.fromarray(scenes[index].image) for index in range(20)]
    for index, picture in enumerate(pictures):
        picture.save(folder / "pictures" / f"{index}.png")
    pictures[0].save(folder / "a.png")
    pictures[1].save(folder / "b.jpg")
