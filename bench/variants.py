"""Variants of a preset's recipe side by side, on the validation images: how good the samples are, how fast they come
and what a classifier gains.

    python -m bench.variants bench/plans/fashion-samplers.toml

The file is a `Plan`. Every variant is a run of `diffult.run`, kept in runs/variants/ and resumed where it was
interrupted; a changed plan measures what it changes. Variants share the stages that read the same settings: those that
differ in generation alone share one diffusion model, and all share the classifiers without synthetic images.

    training, s       of the diffusion model
    samples/s         drawn and judged by the filter; evaluations of the network for each
    accepted          by the filter, of the first `per_class` candidates of every class; the next three are of these too
    copies            of training images, of those accepted, as `diffult.evaluate` counts them
    right labels      confirmed by a judge that was trained on the whole, balanced set
    Fréchet distance  to the validation images in the judge's features, mean over classes
    CAS               validation accuracy of a classifier trained on `cas_per_class` accepted samples of every class
    gain              validation accuracy of the best method with synthetic images less that of the best without, the
                      best by their mean over the seeds: the more methods, the more both are too high
"""

from __future__ import annotations

import json
import shutil
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import Field, ValidationError

from bench.quality import by_group, classification_accuracy_score, sample_quality, train_judge
from bench.tables import variants_table
from diffult.cli import main
from diffult.config import load_preset
from diffult.engine.device import machine, pick_device
from diffult.errors import UserError
from diffult.evaluate import accuracies_on
from diffult.longtail.extractor import load_extractor
from diffult.longtail.methods import SPECIFIC, in_waves
from diffult.pack import pack
from diffult.run import run_pipeline
from diffult.runs.files import metadata, read_json, write_json
from diffult.runs.run_dir import RunDir
from diffult.runs.stages import STAGES, Stage
from diffult.strict_model import StrictModel
from diffult.train_classifier import method_hash

BASE = "base"


class Plan(StrictModel):
    """What is compared. A variant without settings of its own, "base", is added where there is none."""

    preset: str
    seeds: tuple[int, ...] = Field((0,), min_length=1)
    settings: tuple[str, ...] = ()  # section.key=value, of all variants
    per_class: int = Field(200, ge=2)  # candidates of each class that samples are judged by
    cas_per_class: int = Field(500, ge=0)  # 0: no CAS
    classifiers: bool = True  # whether the preset's methods are trained, for the gain
    variants: dict[str, tuple[str, ...]]  # the settings of each


def read_plan(file: Path) -> Plan:
    """Raises UserError for what is no plan, or names settings that do not exist."""
    try:
        plan = Plan.model_validate(tomllib.loads(file.read_text(encoding="utf-8")))
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(f"{file}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise UserError(f"{file}: cannot be read as TOML ({error})") from None
    plan = plan.model_copy(update={"variants": {BASE: (), **plan.variants}})
    for own in plan.variants.values():
        load_preset(plan.preset, [*plan.settings, *own])
    return plan


def open_runs(plan: Plan, seed: int, folder: Path) -> dict[str, RunDir]:
    """The runs of a seed by variant. What a changed plan makes outdated is redone."""
    settings = [f"seed={seed}", f"data.seed={seed}", *plan.settings]
    return {
        name: RunDir(folder / f"{name}-{seed}", load_preset(plan.preset, [*settings, *own]))
        for name, own in plan.variants.items()
    }


def share(run: RunDir, other: RunDir) -> None:
    """Takes over what another run has finished with the same settings, single classifiers too."""
    if run is other or run.config.data != other.config.data:
        return
    run.share(other)
    if run.done("pack") is None:
        return
    for name in [name for wave in in_waves(run.config.classifier.methods) for name in wave]:
        theirs, ours = (part.folder("classifier") / f"{name}.safetensors" for part in (other, run))
        if metadata(ours).get("hash") != method_hash(run, name) == metadata(theirs).get("hash"):
            ours.parent.mkdir(exist_ok=True)
            ours.unlink(missing_ok=True)
            ours.hardlink_to(theirs)


def measure(plan: Plan, seed: int, name: str, folder: Path) -> dict[str, Any]:
    """One variant at one seed; accuracies and shares in percent, each piece measured once.

    Raises:
        UserError: there are no validation images, or see `run_pipeline`.
    """
    runs = open_runs(plan, seed, folder)
    run = runs[name]
    for other in runs.values():
        share(run, other)
    pack(run)
    packed = run.packed()
    if packed.val is None:
        raise UserError(f"{plan.preset}: there are no validation images to measure with; set data.val_per_class")
    until: Stage = "generate" if run.config.generate.search else "diffusion"  # whose first work is the search
    until = "classifier" if plan.classifiers else until
    if any(run.done(stage) is None for stage in STAGES[: STAGES.index(until) + 1]):
        run_pipeline(run, until)
    judge, held_out = train_judge(plan.preset, seed, folder.parent), packed.val

    def judged(place: Path) -> dict[str, Any]:
        extractor = load_extractor(judge.folder("extractor"), pick_device())
        seen = sample_quality(run, extractor, plan.per_class, place)
        return {key: by_group(value, packed, run) if isinstance(value, list) else value for key, value in seen.items()}

    def scored(place: Path) -> dict[str, Any]:
        return classification_accuracy_score(run, plan.cas_per_class, place)

    classifier = run.config.classifier.model_dump(mode="json", exclude={"methods", *SPECIFIC})
    reads = {
        "generate": run.hash("generate"),
        "held_out": run.require("pack")["held_out"]["val"],
        "groups": run.config.groups.model_dump(),
    }
    of_samples = reads | {"per_class": plan.per_class, "judge": judge.hash("extractor")}
    of_cas = reads | {"per_class": plan.cas_per_class, "classifier": classifier}
    of_methods = {"evaluate": run.hash("evaluate")}
    return {
        "seed": seed,
        "diffusion_seconds": _logged_seconds(run.folder("diffusion"), run.config.diffusion.batch_size),
        "samples": _once(run, "samples", of_samples, judged),
        "cas": _once(run, "cas", of_cas, scored) if plan.cas_per_class else None,
        "validation": _once(run, "methods", of_methods, lambda _: accuracies_on(run, packed, held_out))
        if plan.classifiers
        else None,
    }


def _once(run: RunDir, name: str, reads: dict[str, Any], measured: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
    """What `measured(folder)` returns, kept in RUN/NAME/measured.json; what other settings left there is deleted."""
    folder, digest = run.path / name, run.digest(reads)
    file, started = folder / "measured.json", folder / "started.json"
    with run.lock():
        if not started.exists() or read_json(started).get("hash") != digest:
            shutil.rmtree(folder, ignore_errors=True)
            write_json(started, {"hash": digest})
        if not file.exists():
            write_json(file, measured(folder))
    return read_json(file)


def _logged_seconds(folder: Path, batch_size: int) -> float:
    """Of a training with its checks, interruptions left out."""
    seconds, step = 0.0, 0
    for line in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()):
        seconds += (line["step"] - step) * batch_size / line["images_per_s"] + line.get("check_seconds", 0)
        step = line["step"]
    return seconds


def command(
    file: Annotated[Path, typer.Argument(help="TOML: preset, seeds, [variants], and see bench/variants.py.")],
    folder: Annotated[Path, typer.Option(help="Where the runs go.")] = Path("runs/variants"),
    out: Annotated[Path, typer.Option(help="Folder of the results file.")] = Path("bench/results"),
) -> None:
    """Measure variants of a preset's recipe: samples, speed, and the classifier's gain on the validation images."""
    plan = read_plan(file)
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in plan.variants}
    content = {"command": f"python -m bench.variants {file}", "machine": machine()} | plan.model_dump(mode="json")
    for seed in plan.seeds:
        for name, rows in results.items():
            rows.append(measure(plan, seed, name, folder / file.stem))
            write_json(out / f"{file.stem}.json", content | {"results": results})
    print(variants_table({"results": results}))
    print(json.dumps({"results": str(out / f"{file.stem}.json")}))


if __name__ == "__main__":
    main(command)
