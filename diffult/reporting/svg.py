"""Figures as SVG inside a page, coloured by the page's style sheet: one drawing serves light and dark."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable
from html import escape
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

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


def draw(name: str, alt: str, plot: Callable[[Figure], None], height: float = 3.2) -> Markup:
    """What `plot` draws, as an <svg> element; the same drawing gives the same text.

    Args:
        name: unique on the page, for the identifiers inside.
        alt: says what is seen to those who do not see it.
        plot: draws on an empty figure, in colours of COLOURS.
        height: inches, of a figure 8.6 inches wide.
    """
    import matplotlib as mpl  # slow to import, and most commands need no figure
    from matplotlib.figure import Figure

    with mpl.rc_context(_STYLE | {"svg.hashsalt": name}), warnings.catch_warnings():
        # Text stays text in the file, so the reader's fonts draw what matplotlib's lacks.
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        figure = Figure((8.6, height), layout="constrained")
        plot(figure)
        buffer = io.BytesIO()
        empty = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(buffer, format="svg", metadata=empty, transparent=True)
    return Markup(_inline(buffer.getvalue().decode(), alt))


def _inline(svg: str, alt: str) -> str:
    """As an element of an HTML page: no prolog, name spaces, style or needless identifiers, colours by name."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", svg, flags=re.S)
    svg = re.sub(r' id="[^"]*_[0-9]+"', "", svg).replace("xlink:href", "href")
    box = re.search(r'viewBox="[^"]*"', svg)
    assert box is not None
    svg = re.sub(r"<svg[^>]*>", lambda _: f'<svg role="img" aria-label="{escape(alt)}" {box[0]}>', svg, count=1)
    for name, colour in COLOURS.items():
        svg = svg.replace(colour, f"var(--{name})")
    return re.sub(r">\s*\n\s*<", ">\n<", svg)
