"""Fills the tables of README.md and docs/ and draws the roofline plot from results files: nothing is typed by hand.

    python -m bench.report      # rewrites every table, and docs/roofline.png from the first machine of a page

A table stands between `<!-- bench:KIND FILE -->` and `<!-- bench:end -->`; FILE is in bench/results. Kinds:
`comparison`, and its `best` rows beside the plain ones (`diffult.compare`), `variants` (`bench.variants`), `loaders`
(`bench.loaders`), `speed`, `suite`, `rivals`, `ceilings` and `machine` (`python -m bench`), `cost` and `check`
(`bench.cost`), `growth` (`bench.growth`), `many` and `kills` (`bench.kills`), `equal` (`bench.equal_quality`).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import matplotlib.pyplot as plt
import numpy as np
import typer

from bench import tables
from diffult.cli import main
from diffult.errors import UserError
from diffult.longtail.comparison import best_rows, table
from diffult.runs.files import atomic_write, read_json, write_text

PAGES = (Path("README.md"), Path("docs/benchmarks.md"), Path("docs/experiments.md"))
_MARKED = re.compile(r"(<!-- bench:(\w+) (\S+) -->\n)(.*?)(<!-- bench:end -->)", re.DOTALL)


def loaders(results: dict[str, Any]) -> str:
    """Epochs compared with torch's DataLoader at its best number of workers."""
    names = {
        "small": "10,000 CIFAR-10 images (JPEG copy), padded crop and mirror",
        "large": "400 ImageNet photographs, random resized crops of 224",
    }
    lines = ["| ready to train on | stored raw | stored as JPEG |", "|---|---|---|"]
    for part, name in names.items():
        rates = results[part]["rates"]
        cells = [f"{rates[f'{kind}, ready to train on']['times_torch']:.1f} x" for kind in ("raw", "jpg")]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


TABLES: dict[str, Callable[[dict[str, Any]], str]] = {
    "comparison": table,
    "best": lambda results: table(results, best_rows(results, 7, ("ce", "logit_adjust", "duplicates", "diffult"))),
    "variants": tables.variants_table,
    "loaders": loaders,
    "speed": tables.speed_table,
    "suite": tables.suite_table,
    "rivals": tables.rivals_table,
    "ceilings": tables.ceilings_table,
    "machine": tables.machine_line,
    "cost": tables.cost_table,
    "check": tables.check_table,
    "equal": tables.equal_quality_table,
    "growth": tables.growth_table,
    "many": tables.many_images_table,
    "kills": tables.kills_table,
}


def rewritten(text: str, results: Path) -> str:
    """`text` with every marked table filled from its results file.

    Raises:
        UserError: an unknown kind, or a results file that is not there.
    """

    def filled(found: re.Match[str]) -> str:
        begin, kind, name, _, end = found.groups()
        if kind not in TABLES:
            raise UserError(f"bench:{kind} {name}: no such kind of table; there are {', '.join(TABLES)}")
        if not (results / name).exists():
            raise UserError(f"bench:{kind} {name}: {results / name} is not there; run the benchmark that writes it")
        return f"{begin}{TABLES[kind](read_json(results / name))}\n{end}"

    return _MARKED.sub(filled, text)


def roofline(results: dict[str, Any], file: Path) -> None:
    """Races with known operations and bytes under the machine's measured roof (Williams et al. 2009). Bytes are those
    of every operator's inputs and outputs, so the true place of fused or cached ones is further right."""
    roof = results["ceilings"]
    compute, copy = max(roof["product"], roof["convolution"]), roof["copy"]
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    intensity = np.logspace(-1, 4, 200)
    axes.loglog(intensity, np.minimum(compute, copy * intensity) / 1e9, color="0.3", label="measured ceilings")
    for row in results["rows"]:
        if not (row.get("flops") and row.get("moved")):
            continue
        for name, contestant in row["contestants"].items():
            marker = "o" if name.split(",")[0] == "ours" else "x"
            where = row["flops"] / row["moved"], 1e3 * contestant["tflop_per_s"]
            axes.plot(*where, marker, label=f"{row['race']}: {name}")
    axes.set(xlabel="FLOP a byte", ylabel="GFLOP/s", title=results["machine"]["device"])
    axes.legend(fontsize=7)
    with atomic_write(file) as temporary:
        figure.savefig(temporary, dpi=130, format="png")
    plt.close(figure)


def command(
    pages: Annotated[list[Path] | None, typer.Argument(help="Files with marked tables.")] = None,
    results: Annotated[Path, typer.Option(help="Folder of the results files.")] = Path("bench/results"),
    plot: Annotated[Path, typer.Option(help="The roofline plot.")] = Path("docs/roofline.png"),
) -> None:
    """Fill the tables of README.md and docs/ and draw the roofline plot from the results files."""
    for page in pages or PAGES:
        text = page.read_text(encoding="utf-8")
        write_text(page, rewritten(text, results))
        machines = [name for _, kind, name, _, _ in _MARKED.findall(text) if kind == "machine"]
        if machines:
            roofline(read_json(results / machines[0]), plot)
        print(f"wrote {page}")


if __name__ == "__main__":
    main(command)
