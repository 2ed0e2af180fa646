"""The judge of samples against scipy, and variants of a preset at a tiny size."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
from scipy.linalg import sqrtm
from typer.testing import CliRunner

from bench import quality, variants
from diffult.engine.device import pick_device
from diffult.errors import UserError
from diffult.generate import open_sampler
from diffult.longtail.extractor import load_extractor
from diffult.runs.run_dir import RunDir
from diffult.runs.stages import STAGES
from tests.conftest import TINY


def test_frechet_distance_is_scipys() -> None:
    rng = np.random.default_rng(0)
    a = rng.normal(size=(200, 6)) @ rng.normal(size=(6, 6))
    b = rng.normal(size=(150, 6)) @ rng.normal(size=(6, 6)) + 1
    covariances = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    expected = np.square(a.mean(0) - b.mean(0)).sum() + np.trace(
        sum(covariances) - 2 * sqrtm(np.dot(*covariances)).real
    )
    assert quality.frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)


def test_fewer_samples_than_features_have_a_distance_that_a_shift_alone_explains() -> None:
    features = np.random.default_rng(1).normal(size=(5, 64))
    assert quality.frechet_distance(features, features + 2) == pytest.approx(4 * 64, rel=1e-6)


def test_quality_counts_what_the_judge_sees(tiny_run: RunDir) -> None:
    judge, real = load_extractor(tiny_run.folder("extractor"), pick_device()), tiny_run.packed().val
    assert real is not None
    seen = quality.quality(tiny_run, judge, real, per_class=8)
    sampler = open_sampler(tiny_run, tiny_run.config.generate, tiny_run.config.seed)
    for c in (0, 9):
        images = sampler.draw(torch.full((8,), c), torch.arange(8))
        logits = judge.network((images.float() / 127.5 - 1).permute(0, 3, 1, 2))
        assert seen["labelled"][c] == pytest.approx(float((logits.argmax(1) == c).float().mean()))
        assert seen["frechet"][c] > 0


@pytest.mark.parametrize(
    ("overrides", "shared"),
    [
        (["classifier.steps=5"], ["pack", "extractor", "diffusion", "generate"]),
        (["generate.steps=5"], ["pack", "extractor", "diffusion"]),
        (["diffusion.ema=0.9", "generate.steps=5"], ["pack", "extractor"]),
        (["unet.channels=16"], ["pack", "extractor"]),
        (["extractor.steps=5"], ["pack"]),
    ],
)
def test_a_variant_shares_the_stages_it_does_not_touch(
    tiny_run: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overrides: list[str], shared: list[str]
) -> None:
    class Begun(Exception):
        """The variant is about to run."""

    def begin(run: RunDir) -> None:
        assert [stage for stage in STAGES if run.done(stage)] == shared
        raise Begun

    monkeypatch.setattr(variants, "run_pipeline", begin)
    (tmp_path / "base-0").symlink_to(tiny_run.path)
    plan = {"preset": "digits-lt", "settings": TINY, "variants": {"variant": overrides}}
    with pytest.raises(Begun):
        variants.measure(plan, 0, "variant", tmp_path)


@pytest.mark.slow
def test_variants_are_measured_once_and_share_the_model(tmp_path: Path) -> None:
    plan = tmp_path / "plan.toml"
    plan.write_text(
        f'preset = "digits-lt"\nseeds = [0]\nper_class = 4\nsettings = {json.dumps(TINY)}\n'
        '[variants]\nshort = ["generate.steps=1"]\n'
    )
    typed = [str(plan), "--folder", str(tmp_path / "runs"), "--out", str(tmp_path)]
    app = typer.Typer()
    app.command()(variants.command)
    first = CliRunner().invoke(app, typed)
    assert first.exit_code == 0, first.output
    weights = [tmp_path / "runs" / "plan" / f"{name}-0/diffusion/ema.safetensors" for name in ("base", "short")]
    assert weights[0].samefile(weights[1])
    results = json.loads((tmp_path / "plan.json").read_text())["results"]
    assert results["base"][0]["nfe"] == 2 and results["short"][0]["nfe"] == 1
    assert "| short |" in first.output
    again = CliRunner().invoke(app, typed).output  # nothing is measured again
    assert again.strip() == first.output[first.output.index("| | training") :].strip()


def test_a_set_without_validation_images_is_refused(tmp_path: Path) -> None:
    plan = {
        "preset": "digits-lt",
        "per_class": 4,
        "settings": [*TINY, "data.val_per_class=0"],
        "variants": {"base": []},
    }
    with pytest.raises(UserError, match=r"no validation images.*val_per_class"):
        variants.measure(plan, 0, "base", tmp_path)
