"""A plot and what the page says around it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup


@dataclass(frozen=True)
class Panel:
    """Shown by the macro `figure` of figures.html.jinja.

    Attributes:
      title: above the plot.
      svg: the plot.
      legend: of each line its name, last value and chance level; "": none.
      note: below it; "": nothing.
    """

    title: str
    svg: Markup
    legend: Sequence[Mapping[str, str]]
    note: str = ""
