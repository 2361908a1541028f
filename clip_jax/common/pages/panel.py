"""A plot and what the page says around it."""

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup


@dataclass(frozen=True)
class Line:
    """A series in the legend of a plot, in the colour and dash of its position.

    Attributes:
      name: of it.
      last: its last value; "": not said.
      chance: what guessing reaches; "": not said.
      joined: drawn as a line, not as points.
      quiet: drawn in the colour of rules.
    """

    name: str
    last: str = ""
    chance: str = ""
    joined: bool = True
    quiet: bool = False


@dataclass(frozen=True)
class Panel:
    """Shown by the macro `figure` of figures.html.jinja.

    Attributes:
      title: above the plot.
      svg: the plot.
      legend: of the series; shown with swatches where there are several.
      note: below it; "": nothing.
    """

    title: str
    svg: Markup
    legend: Sequence[Line]
    note: str = ""
