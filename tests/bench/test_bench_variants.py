"""The judge of samples, classifiers trained on samples alone, and variants of a preset at a tiny size."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
from scipy.stats import ttest_1samp
from typer.testing import CliRunner

from bench import quality, report, variants
from bench.tables import gains
from diffult.config import override
from diffult.engine.device import autocast, pick_device
from diffult.errors import UserError
from diffult.evaluate import measured_copies
from diffult.generate import open_sampler
from diffult.longtail.extractor import load_extractor
from diffult.longtail.filter import FILTERS
from diffult.runs.run_dir import RunDir
from diffult.runs.stages import STAGES
from ffcv_writers import open_set, write
from tests.conftest import TINY

PLANS = sorted((Path(__file__).parents[2] / "bench" / "plans").glob("*.toml"))


def test_quality_is_of_the_first_candidates_of_every_class(
    tiny_run: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each figure anew, from samples that are drawn a class at a time."""
    monkeypatch.setattr(quality, "FILTERS", {"distance": FILTERS["distance+label"]})  # one that drops some of them
    judge, packed = load_extractor(tiny_run.folder("extractor"), pick_device()), tiny_run.packed()
    seen = quality.sample_quality(tiny_run, judge, 8, tmp_path)
    assert seen["nfe"] == 2 and seen["images_per_s"] > 0 and (tmp_path / "grid.png").exists()
    copies = measured_copies(tiny_run, packed, open_set([tmp_path / "candidates.beton"]))["copy"].view(10, 8).numpy()
    sampler, kept = open_sampler(tiny_run, tiny_run.config.generate, tiny_run.config.seed), np.zeros((10, 8), bool)
    assert packed.val is not None
    for c in range(10):
        images = (
            sampler.draw(torch.full((8,), c), torch.arange(8)),
            torch.from_numpy(packed.val.take(np.flatnonzero(packed.val.labels == c))),
        )
        drawn, real = (image.float().permute(0, 3, 1, 2) / 127.5 - 1 for image in images)
        with torch.no_grad():
            features, of_real = judge.network.features(drawn), judge.network.features(real)
            labels = judge.network(drawn).argmax(1)
            with autocast(sampler.dtype, sampler.device):
                of_filter = judge.features(drawn)
                agreed = judge.network.head(of_filter).argmax(1) == c  # its loss has adjusted the logits
        distance = (of_filter.float() - judge.statistics.centres[c]).norm(dim=1)
        kept[c] = (agreed & (distance <= 2 * judge.statistics.radii[c])).numpy()
        assert seen["labelled"][c] == pytest.approx(100 * float((labels == c).float().mean()))
        assert seen["frechet"][c] == pytest.approx(
            quality.frechet_distance(features.numpy(), of_real.numpy()), rel=1e-3
        )
        assert seen["copies"][c] == (pytest.approx(100 * copies[c][kept[c]].mean()) if kept[c].any() else None)
    assert seen["accepted"] == pytest.approx(100 * kept.mean(1))
    assert kept.any() and not kept.all()


def test_cas_is_high_for_real_images_and_by_chance_for_noise(
    tiny_run: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    test = tiny_run.packed().test
    rows = np.concatenate([np.flatnonzero(test.labels == c)[:30] for c in range(10)])
    images = {"real": test.take(rows), "noise": np.random.default_rng(0).integers(0, 256, (300, 8, 8, 1), np.uint8)}
    monkeypatch.setattr(tiny_run, "config", override(tiny_run.config, ["classifier.steps=80"]))
    scores = {}
    for name, samples in images.items():

        def fill(folder: Path, *_: object, samples: np.ndarray = samples) -> None:
            columns = {"labels": test.labels[rows], "synthetic": np.ones_like(rows), "index": rows}
            write(folder / "synthetic.beton", samples, **columns)

        monkeypatch.setattr(quality, "fill_folder", fill)
        scores[name] = quality.classification_accuracy_score(tiny_run, 30, tmp_path / name)
    assert scores["real"]["top1"] > 80 and scores["noise"]["top1"] < 40
    assert scores["real"]["top1"] == pytest.approx(np.mean(scores["real"]["by_class"]))
    assert scores["real"]["images"] == [30] * 10


def test_cas_trains_on_accepted_samples_of_every_class(tiny_run: RunDir, tmp_path: Path) -> None:
    """Also of those that the run does not fill; the first samples of the others are the run's own."""
    score = quality.classification_accuracy_score(tiny_run, 12, tmp_path)
    kept, own = open_set([tmp_path / "synthetic.beton"]), open_set([tiny_run.folder("generate") / "synthetic.beton"])
    assert score["images"] == np.bincount(kept.labels, minlength=10).tolist()
    assert set(own.labels) < set(range(10)) == set(kept.labels)
    table = {(c, i): row for row, (c, i) in enumerate(zip(kept.labels.tolist(), kept.index.tolist(), strict=True))}
    names = zip(own.labels.tolist(), own.index.tolist(), strict=True)
    assert (kept.take(np.array([table[name] for name in names])) == own.take(np.arange(len(own)))).all()


def test_a_class_that_falls_short_is_warned_of(
    tiny_run: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(tiny_run, "config", override(tiny_run.config, ["generate.filter=ood"]))  # none is so far away
    score = quality.classification_accuracy_score(tiny_run, 2, tmp_path)
    assert score["images"] == [0] * 10 and score["top1"] == 0
    assert all(f"class {c}: only 0 of 2 samples" in caplog.text for c in range(5))
    assert "and 5 more classes lack 10 samples together" in caplog.text


def test_classes_without_a_value_are_left_out_of_the_groups(tiny_run: RunDir) -> None:
    values = [1.0, 2.0, None, 4.0, 5.0, 6.0, None, None, None, None]
    packed = tiny_run.packed()
    assert packed.counts.tolist() == [60, 43, 30, 22, 15, 11, 8, 5, 4, 3]
    expected = {"mean": 3.6, "many": 1.5, "medium": 5.0, "few": None, "by_class": values}
    assert quality.by_group(values, packed, tiny_run) == expected


@pytest.mark.parametrize(
    ("overrides", "shared"),
    [
        (["classifier.steps=5"], ["pack", "extractor", "diffusion", "generate"]),
        (["generate.steps=5"], ["pack", "extractor", "diffusion"]),
        (["diffusion.ema=0.9", "generate.steps=5"], ["pack", "extractor"]),
        (["unet.channels=16"], ["pack", "extractor"]),
        (["extractor.steps=5"], ["pack"]),
        (["data.n_max=30"], []),
    ],
)
def test_a_variant_shares_the_stages_it_does_not_touch(
    tiny_run: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overrides: list[str], shared: list[str]
) -> None:
    kept_classifier = not overrides[0].startswith(("classifier", "data"))  # the one without synthetic images

    class Begun(Exception):
        """The variant is about to run."""

    def begin(run: RunDir, *_: object) -> None:
        assert [stage for stage in STAGES if run.done(stage)] == shared
        assert (run.folder("classifier") / "ce.safetensors").exists() == kept_classifier
        assert not (run.folder("classifier") / "diffult.safetensors").exists()
        raise Begun

    monkeypatch.setattr(variants, "pack", begin)
    (tmp_path / "other-0").symlink_to(tiny_run.path)  # any variant will do, "base" has not begun
    every = {"base": ("diffusion.steps=7",), "other": (), "variant": tuple(overrides)}
    with pytest.raises(Begun):
        variants.measure(
            variants.Plan(preset="digits-lt", settings=tuple(TINY), variants=every), 0, "variant", tmp_path
        )


def invoke(*typed: str) -> str:
    app = typer.Typer()
    app.command()(variants.command)
    result = CliRunner().invoke(app, typed)
    assert result.exit_code == 0, result.output
    return result.output


@pytest.mark.slow
def test_variants_are_measured_once_and_share_the_model(tmp_path: Path) -> None:
    plan, preset = tmp_path / "plan.toml", tmp_path / "digits.toml"
    preset.write_text('extends = "digits-lt"\n[extractor]\nsteps = 12\n')  # of the judge too
    plan.write_text(
        f'preset = "{preset}"\nseeds = [0, 1]\nper_class = 4\ncas_per_class = 3\nsettings = {json.dumps(TINY)}\n'
        '[variants]\nshort = ["generate.steps=1"]\n'
    )
    typed = str(plan), "--folder", str(tmp_path / "runs"), "--out", str(tmp_path)
    first = invoke(*typed)
    runs = [tmp_path / "runs" / "plan" / f"{name}-0" for name in ("base", "short")]
    for file in ("diffusion/ema.safetensors", "classifier/ce.safetensors"):
        assert (runs[0] / file).samefile(runs[1] / file)
    results = json.loads((tmp_path / "plan.json").read_text())["results"]
    assert [row["seed"] for row in results["short"]] == [0, 1]
    assert results["base"][0]["samples"]["nfe"] == 2 and results["short"][0]["samples"]["nfe"] == 1
    assert results["base"][0]["validation"]["ce"] == results["short"][0]["validation"]["ce"]
    assert set(results["short"][1]["validation"]) == {"ce", "diffult"} and results["short"][1]["cas"]["top1"] >= 0
    assert "| short |" in first
    again = invoke(*typed)  # nothing is measured again
    assert again.strip() == first[first.index("| | training") :].strip()


def test_samples_are_measured_without_classifiers(
    tiny_run: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And again where the settings have changed, not otherwise."""
    monkeypatch.setattr(variants, "train_judge", lambda *_: tiny_run)
    plan = tmp_path / "plan.toml"
    shutil.copytree(tiny_run.path, tmp_path / "runs" / "plan" / "base-0")
    for steps in (1, 3, 3):
        plan.write_text(
            'preset = "digits-lt"\nper_class = 4\ncas_per_class = 0\nclassifiers = false\n'
            f'settings = {json.dumps(TINY)}\n[variants]\nshort = ["generate.steps={steps}"]\n'
        )
        output = invoke(str(plan), "--folder", str(tmp_path / "runs"), "--out", str(tmp_path))
        results = json.loads((tmp_path / "plan.json").read_text())["results"]
        assert results["short"][0]["samples"]["nfe"] == steps
        assert "CAS" not in output and "gain" not in output
        short = tmp_path / "runs" / "plan" / "short-0"
        assert not (short / "classifier/diffult.safetensors").exists()
    file = short / "samples/measured.json"
    content = json.loads(file.read_text()) | {"nfe": 99}
    file.write_text(json.dumps(content))
    invoke(str(plan), "--folder", str(tmp_path / "runs"), "--out", str(tmp_path))
    assert json.loads((tmp_path / "plan.json").read_text())["results"]["short"][0]["samples"]["nfe"] == 99


def measured(seed: int, frechet: float, cas: float | None, methods: dict[str, float] | None) -> dict[str, object]:
    by = {"mean": frechet, "many": 0.0, "medium": 0.0, "few": None, "by_class": []}
    shares = {"mean": 50.0, "few": 25.0}
    return {
        "seed": seed, "diffusion_seconds": 60.0 + seed,
        "samples": {
            "images_per_s": 100.0, "nfe": 10, "frechet": by, "labelled": shares, "accepted": shares,
            "copies": shares | {"mean": None},
        },
        "cas": None if cas is None else {"top1": cas, "few": cas - 10},
        "validation": methods and {name: {"top1": value} for name, value in methods.items()},
    }  # fmt: skip


def test_the_time_of_a_training_counts_its_checks(tmp_path: Path) -> None:
    lines = [{"step": 10, "images_per_s": 40.0}, {"step": 20, "images_per_s": 20.0, "check_seconds": 1.5}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert variants._logged_seconds(tmp_path, 8) == pytest.approx(2 + 4 + 1.5)


def test_the_table_pairs_seeds() -> None:
    base = [measured(s, 2.0, cas, None) for s, cas in enumerate((70.0, 72.0, 80.0))]
    better = [measured(s, 1.0 + s, cas, None) for s, cas in enumerate((73.0, 74.0, 87.0))]
    header, _, first, second = report.TABLES["variants"]({"results": {"base": base, "better": better}}).splitlines()
    low, high = ttest_1samp([3, 2, 7], 0).confidence_interval()
    assert f"| +4.0 ({low:+.1f} to {high:+.1f}) |" in second
    assert "| 61 | 100 (10) | 50 | 50 (25) | 2 (–) |" in first and header.count("|") <= 12
    assert "copies" not in header and "gain" not in header and "+" not in first


def test_the_gain_is_between_the_best_methods_by_their_mean() -> None:
    methods = [
        {"ce": 70.0, "resample": 75.0, "diffult": 79.0, "mix": 74.0},
        {"ce": 78.0, "resample": 74.0, "diffult": 70.0, "mix": 80.0},
    ]  # means 74, 74.5, 74.5, 77
    rows = [measured(seed, 1.0, None, values) for seed, values in enumerate(methods)]
    assert gains(rows) == {0: -1.0, 1: 6.0}
    assert gains([measured(0, 1.0, None, {"ce": 70.0})]) == {} == gains([measured(0, 1.0, None, None)])
    assert "| +2.5 (-42.0 to +47.0) |" in report.TABLES["variants"]({"results": {"base": rows}})


@pytest.mark.parametrize("file", PLANS, ids=lambda file: file.stem)
def test_plans_name_settings_that_exist(file: Path) -> None:
    assert next(iter(variants.read_plan(file).variants)) == "base"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('preset = "digits-lt"\n', "variants: Field required"),
        ('preset = "digits-lt"\nper_clas = 3\n[variants]\n', "per_clas: Extra inputs"),
        ('preset = "digits-lt"\n[variants]\na = ["generate.step=1"]\n', r"unknown key 'generate.step'"),
        ("preset", "cannot be read as TOML"),
    ],
)
def test_a_bad_plan_is_refused(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "plan.toml").write_text(text)
    with pytest.raises(UserError, match=words):
        variants.read_plan(tmp_path / "plan.toml")


def test_a_set_without_validation_images_is_refused(tmp_path: Path) -> None:
    plan = variants.Plan(preset="digits-lt", settings=(*TINY, "data.val_per_class=0"), variants={"base": ()})
    with pytest.raises(UserError, match=r"no validation images.*val_per_class"):
        variants.measure(plan, 0, "base", tmp_path)
