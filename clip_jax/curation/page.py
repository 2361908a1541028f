"""Pages that show what a command found, in one file that needs no network to read."""

import base64
import io
from pathlib import Path
from typing import Any

from etils import epath
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image

_LARGEST = 160  # pixels along a side of a thumbnail


def write(path: epath.PathLike, template: str, **values: Any) -> None:
    """Writes a page; `template`: the name of a file beside this one."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": lambda value: f"{value:,}", "thumbnail": _thumbnail}
    text = environment.get_template(template).render(**values)
    # Captions come from the web: a lone surrogate must not lose the page.
    epath.Path(path).write_bytes(text.encode("utf-8", "replace"))


def _thumbnail(image: Image.Image) -> Markup:
    """The attributes src, width and height of <img>."""
    small, file = image.copy(), io.BytesIO()
    small.thumbnail((_LARGEST, _LARGEST))
    small.save(file, "JPEG", quality=80)
    data = base64.b64encode(file.getvalue()).decode()
    return Markup(
        f'src="data:image/jpeg;base64,{data}" width="{small.width}" height="{small.height}"'
    )
