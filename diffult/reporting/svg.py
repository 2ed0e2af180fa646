"""Figures as SVG inside a page, coloured by the page's style sheet: one drawing serves light and dark."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable
from html import escape
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from diffult.reporting.text import readable

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SERIES = 8  # colours for lines that share a figure
_NAMES = ("ink", "quiet", "line", "real", "synthetic", *(f"series{i}" for i in range(SERIES)))
COLOURS = {name: f"#00{place:02x}fe" for place, name in enumerate(_NAMES)}  # stand-ins for var(--name)
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none", "font.size": 9, "text.color": COLOURS["ink"], "axes.labelcolor": COLOURS["quiet"],
    "xtick.color": COLOURS["quiet"], "ytick.color": COLOURS["quiet"], "xtick.labelcolor": COLOURS["ink"],
    "ytick.labelcolor": COLOURS["ink"], "axes.edgecolor": COLOURS["quiet"], "axes.spines.top": False,
    "axes.spines.right": False, "axes.titlesize": 9, "axes.titlecolor": COLOURS["ink"], "legend.frameon": False,
    "grid.color": COLOURS["line"], "grid.linewidth": 0.8, "axes.axisbelow": True,
}  # fmt: skip


WIDE, PANEL = 8.6, 4.3  # inches: the width of a page, and of a panel that a phone shows whole


def draw(name: str, alt: str, plot: Callable[[Figure], None], height: float = 3.2, width: float = WIDE) -> Markup:
    """What `plot` draws, as an <svg> element; the same drawing gives the same text.

    Args:
        name: unique on the page, for the identifiers inside.
        alt: says what is seen to those who do not see it.
        plot: draws on an empty figure, in colours of COLOURS.
        height, width: inches.
    """
    import matplotlib as mpl  # slow to import, and most commands need no figure
    from matplotlib.figure import Figure

    with mpl.rc_context(_STYLE | {"svg.hashsalt": name}), warnings.catch_warnings():
        # Text stays text in the file, so the reader's fonts draw what matplotlib's lacks.
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        figure = Figure((width, height), layout="constrained")
        plot(figure)
        buffer = io.BytesIO()
        empty = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(buffer, format="svg", metadata=empty, transparent=True)
    return Markup(_inline(buffer.getvalue().decode(), readable(alt)))


def side_by_side(*panels: Markup) -> Markup:
    """Panels beside each other, where the page is wide enough; else one above the other."""
    return Markup('<div class="panels">\n{}\n</div>').format(Markup("\n").join(panels))


def _inline(svg: str, alt: str) -> str:
    """As an element of an HTML page: no prolog, name spaces, style or needless identifiers, colours by name."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", svg, flags=re.S)
    svg = re.sub(r' id="[^"]*_[0-9]+"', "", svg).replace("xlink:href", "href")
    box = re.search(r'viewBox="0 0 ([0-9.]+) [^"]*"', svg)
    assert box is not None
    head = f'<svg role="img" aria-label="{escape(alt)}" style="--units: {box[1]}" {box[0]}>'
    svg = re.sub(r"<svg[^>]*>", lambda _: head, svg, count=1)
    for name, colour in COLOURS.items():
        svg = svg.replace(colour, f"var(--{name})")
    return re.sub(r">\s*\n\s*<", ">\n<", svg)
