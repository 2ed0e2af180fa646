"""Results files of the benchmarks as Markdown tables."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from statistics import mean, median
from typing import Any

from bench.race import OURS, best_rival, our_best, ratios
from diffult.longtail.comparison import student_interval
from diffult.longtail.methods import find_method

Content = dict[str, Any]
_SHARES = (("tflop_per_s", "TFLOP/s", "share_of_compute"), ("gb_per_s", "GB/s", "share_of_copy"))
# Races against another library: what it does, and who else does it.
_RIVALS = {
    "training step": ("UNet training step", "diffusers"),
    "DPM-Solver++(2M), 10 steps": ("sampling, DPM-Solver++, 10 steps", "diffusers"),
    "generation end to end": ("sampling, judging and writing", "diffusers, sampling only"),
    "writer": ("writing .beton files", "ffcv"),
    "loader": ("loading, cropping, mirroring", "torch DataLoader"),
    "classifier step": ("ResNet-32 training step", "PyTorch"),
}


def _table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines).replace("|  |", "| |")


def number(value: float) -> str:
    """Three digits, thousands apart: 1,230, 45.6, 0.0789."""
    return f"{value:,.0f}" if value >= 1000 else f"{float(f'{value:.3g}'):g}"


def machine_line(content: Content) -> str:
    """What a table was measured on, and by which command."""
    versions = ", ".join(f"{name} {version}" for name, version in content["versions"].items())
    note = f" {content['note']}." if content["note"] else ""
    return (
        f"{content['machine']['device']}, {content['threads']} threads, {content['date']}; {versions}. "
        f"`{content['command']}`, {content['seconds']:.0f} s.{note}"
    )


def suite_table(content: Content) -> str:
    """One line a race: ours, the best rival, and the ratio of the medians' rounds with its spread."""
    lines = []
    for row in content["rows"]:
        contestants = row["contestants"]
        mine = contestants[our_best(contestants)]
        share = ""
        for rate, unit, part in _SHARES:
            if rate in mine:
                share = f"{number(mine[rate])} {unit} ({mine[part]:.0%})"
        rival = best_rival(contestants)
        ratio = ratio_with_spread(ratios(contestants, rival, our_best(contestants))) if rival else ""
        lines.append([row["race"], number(mine["images_per_s"]), share, rival or "", ratio])
    return _table(["", "images/s", "share of ceiling", "best rival", "ours / rival"], lines)


def speed_table(content: Content) -> str:
    """The races against other libraries, a line each: how many times as fast ours is as the rival with its defaults,
    which is the first contestant after ours, and in its fastest setting where that is another."""
    lines = []
    for row in content["rows"]:
        if row["race"] not in _RIVALS:
            continue
        task, library = _RIVALS[row["race"]]
        contestants = row["contestants"]
        mine, fastest = our_best(contestants), best_rival(contestants)
        default = next(name for name in contestants if name.split(",")[0] != OURS)
        settings = [default, fastest if fastest != default else None]
        cells = [ratio_with_spread(ratios(contestants, name, mine)) if name else "" for name in settings]
        lines.append([task, number(contestants[mine]["images_per_s"]), library, *cells])
    return _table(["", "ours, images/s", "rival", "over its defaults", "over its fastest setting"], lines)


def rivals_table(content: Content) -> str:
    """One line a contestant: images/s, seconds of the first call, and how many times as fast ours is."""
    lines = []
    for row in content["rows"]:
        contestants = row["contestants"]
        mine = our_best(contestants)
        for name, entry in contestants.items():
            ratio = "" if name == mine else ratio_with_spread(ratios(contestants, name, mine))
            lines.append([row["race"], name, number(entry["images_per_s"]), number(entry["first_s"]), ratio])
    return _table(["race", "contestant", "images/s", "first call, s", "ours / contestant"], lines)


def ratio_with_spread(values: list[float]) -> str:
    """Median with the lowest and highest round: 1.05 x (0.98 to 1.10)."""
    return f"{median(values):.2f} x ({min(values):.2f} to {max(values):.2f})"


def ceilings_table(content: Content) -> str:
    """The machine's measured ceilings."""
    ceilings = content["ceilings"]
    kinds = {
        "matrix product, float32": number(ceilings["product_float32"] / 1e12) + " TFLOP/s",
        f"matrix product, {ceilings['dtype']}": number(ceilings["product"] / 1e12) + " TFLOP/s",
        f"3x3 convolution, {ceilings['dtype']}": number(ceilings["convolution"] / 1e12) + " TFLOP/s",
        "copy, read and written": number(ceilings["copy"] / 1e9) + " GB/s",
    }
    return _table(["ceiling", "measured"], [[name, value] for name, value in kinds.items()])


def cost_table(content: Content) -> str:
    """Predicted hours and money of the large presets."""
    lines = [
        [row["preset"], str(row["cards"]), *(number(row[f"{stage}_h"]) for stage in
         ("extractor", "diffusion", "generate", "classifier")), number(row["hours"]), number(row["money"]),
         str(row["most_cards"])]
        for row in content["predicted"]
    ]  # fmt: skip
    header = ["preset", "cards", "extractor, h", "diffusion, h", "drawing, h", "classifiers, h", "all, h", "money"]
    header.append("more cards hardly help beyond")
    return _table(header, lines)


def check_table(content: Content) -> str:
    """Stages predicted beside those measured, a line for each preset and stage."""
    lines = []
    kinds = dict.fromkeys((row["preset"], row["stage"]) for row in content["checked"])
    for preset, stage in kinds:
        rows = [row for row in content["checked"] if (row["preset"], row["stage"]) == (preset, stage)]
        measured, predicted, ratio = ([row[key] for row in rows] for key in ("measured_s", "predicted_s", "ratio"))
        spans = [" to ".join(map(number, sorted({min(v), max(v)}))) for v in (measured, predicted, ratio)]
        lines.append([preset, stage, str(len(rows)), *spans])
    return _table(["preset", "stage", "runs", "measured, s", "predicted, s", "predicted / measured"], lines)


def equal_quality_table(content: Content) -> str:
    """Fréchet distances of ours and of each scheduler of diffusers by evaluations, then the race at equal distance."""
    distances, race = content["distances"], content["race"]
    steps = sorted({int(step) for row in distances["theirs"].values() for step in row})
    ours = [f"{distances['ours']:.2f}" if step == content["evaluations"] else "" for step in steps]
    at_ours = [f"{distances['at our timesteps']:.2f}" if step == content["evaluations"] else "" for step in steps]
    lines = [["ours, `generate --fast`", *ours], ["diffusers, DPM-Solver++, our timesteps", *at_ours]]
    for name, row in distances["theirs"].items():
        lines.append([f"diffusers, {name}", *(f"{row[str(step)]:.2f}" if str(step) in row else "" for step in steps)])
    header = ["Fréchet distance after so many evaluations", *map(str, steps)]
    images = content["images"]
    raced = [["ours", str(content["evaluations"]), number(images / median(race[OURS]["seconds"])), ""]]
    for name, values in content["ratios"].items():
        rate = number(images / median(race[name]["seconds"]))
        raced.append(
            [f"{name}, {content['rival']}", str(content["rival_evaluations"]), rate, ratio_with_spread(values)]
        )
    race_header = ["at equal distance", "evaluations", "samples/s", "ours / contestant"]
    return _table(header, lines) + "\n\n" + _table(race_header, raced)


def growth_table(content: Content) -> str:
    """Images/s and peak memory as the number of images grows."""
    lines = [
        [work, f"{row['images']:,}", number(row["images"] / row["seconds"]), number(row["peak_mb"])]
        for work, rows in content["rows"].items()
        for row in rows
    ]
    return _table(["work", "images", "images/s", "peak memory, MB"], lines)


def many_images_table(content: Content) -> str:
    """Packing and an epoch of crops: images/s, and the most memory that all processes held."""
    names = {"pack": "packing", "load": "an epoch of random crops of 224 pixels"}
    lines = [
        [names[work], f"{row['images']:,}", number(row["seconds"]), number(row["images"] / row["seconds"]),
         number(row["peak_mb"])]
        for work, row in content["rows"].items()
    ]  # fmt: skip
    return _table(["", "images", "seconds", "images/s", "peak memory, MB"], lines)


def kills_table(content: Content) -> str:
    """Each kill: whom and when; and what came of it, beside the run without."""
    kills, same = content["killed"]["kills"], [name for name, equal in content["same"].items() if equal]
    victims = Counter(kill["killed"] for kill in kills)
    when = ", ".join(number(kill["after_s"]) for kill in kills)
    rows = {
        "seconds, undisturbed": number(content["calm"]["seconds"]),
        f"seconds, killed {len(kills)} times": number(content["killed"]["seconds"]),
        "killed": ", ".join(f"{name}: {count} times" for name, count in sorted(victims.items())),
        "after seconds": when,
        "samples drawn, kept": f"{content['run']['drawn']:,}, {content['run']['accepted']:,}",
        "the same in both runs": f"{', '.join(same) or 'nothing'} ({len(same)} of {len(content['same'])})",
    }
    return _table(["", f"{content['run']['images']:,} training images"], [[name, text] for name, text in rows.items()])


def variants_table(content: Content) -> str:
    """One line a variant, means over its seeds (see `bench.variants`); differences to the first variant seed by seed,
    with their 95 % interval, where there are several seeds. What was not measured has no column."""
    results = {name: rows for name, rows in content["results"].items() if rows}
    base = next(iter(results.values()))
    columns: dict[str, Callable[[list[Content]], str]] = {
        "training, s": lambda rows: _mean(rows, "diffusion_seconds"),
        "samples/s (evaluations)": lambda rows: f"{_mean(rows, 'samples.images_per_s')} ({rows[0]['samples']['nfe']})",
        "accepted, %": lambda rows: _mean(rows, "samples.accepted.mean"),
        "copies, %": lambda rows: _mean(rows, "samples.copies.mean"),
        "right labels, % (few)": lambda rows: _with_few(rows, "samples.labelled.mean", "samples.labelled.few"),
        "Fréchet distance (few)": lambda rows: _with_few(rows, "samples.frechet.mean", "samples.frechet.few"),
        "difference in Fréchet distance": lambda rows: _to_base(rows, base, "samples.frechet.mean", 2),
        "CAS (few)": lambda rows: _with_few(rows, "cas.top1", "cas.few"),
        "difference in CAS": lambda rows: _to_base(rows, base, "cas.top1", 1),
        "gain": lambda rows: _signed(list(gains(rows).values()), 1),
    }
    cells = {title: [column(rows) for rows in results.values()] for title, column in columns.items()}
    shown = {title: column for title, column in cells.items() if any(column)}
    return _table(["", *shown], [list(row) for row in zip(results, *shown.values(), strict=True)])


def gains(rows: list[Content]) -> dict[int, float]:
    """By seed: top-1 of the best method with synthetic images less that of the best without, each the best by its mean
    over the seeds; empty where a kind was not measured."""
    top1 = {name: mean(_by_seed(rows, f"validation.{name}.top1").values()) for name in rows[0]["validation"] or {}}
    kinds = [[name for name in top1 if find_method(name).synthetic is synthetic] for synthetic in (True, False)]
    if not all(kinds):
        return {}
    best, control = (_by_seed(rows, f"validation.{max(kind, key=lambda name: top1[name])}.top1") for kind in kinds)
    return {seed: best[seed] - control[seed] for seed in best}


def _by_seed(rows: list[Content], path: str) -> dict[int, float]:
    """The values at a path such as cas.top1, without those that are None or not measured."""
    found = {}
    for row in rows:
        value: Any = row
        for key in path.split("."):
            value = None if value is None else value[key]
        if value is not None:
            found[row["seed"]] = value
    return found


def _mean(rows: list[Content], path: str) -> str:
    values = _by_seed(rows, path).values()
    return number(mean(values)) if values else ""


def _with_few(rows: list[Content], path: str, few: str) -> str:
    return f"{overall} ({_mean(rows, few) or '–'})" if (overall := _mean(rows, path)) else ""


def _to_base(rows: list[Content], base: list[Content], path: str, digits: int) -> str:
    """The difference in what both have measured at two seeds or more; empty for the base itself."""
    mine, theirs = _by_seed(rows, path), _by_seed(base, path)
    both = [mine[seed] - theirs[seed] for seed in mine if seed in theirs]
    return _signed(both, digits) if len(both) > 1 and rows is not base else ""


def _signed(differences: list[float], digits: int) -> str:
    """Mean and interval: +0.8 (-0.2 to +1.8)."""
    if not differences:
        return ""
    low_high = student_interval(differences)
    interval = " ({:+.{d}f} to {:+.{d}f})".format(*low_high, d=digits) if low_high else ""
    return f"{mean(differences):+.{digits}f}{interval}"
