"""The report of a run, read back as HTML."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from report_pages import CLASSES, COUNTS, Images, Page, enlarged, example_content, example_metrics, image_set, picture

from diffult.config import Config, load_preset
from diffult.errors import UserError
from diffult.longtail.quota import quotas_to
from diffult.pack import pack
from diffult.report import command, write_report
from diffult.reporting.accuracy import accuracy_rows, confusion_share, few_test_images, summary, verdict
from diffult.reporting.content import RunContent
from diffult.reporting.run import render, timing_rows
from diffult.reporting.samples import generation_rows
from diffult.reporting.text import duration
from diffult.runs.files import write_json
from diffult.runs.run_dir import RunDir
from ffcv_writers import write

SETTINGS = ["generate.balance_to=40", "generate.guidance=1.5", "groups.many=30"]


@pytest.fixture
def config() -> Config:
    return load_preset("digits-lt", SETTINGS)


@pytest.fixture(scope="module")
def html() -> str:
    """The report of a run that has everything."""
    return render(example_content(load_preset("digits-lt", SETTINGS)))


@pytest.fixture
def samples() -> Images:
    return image_set(np.array([28, 0, 20]), CLASSES, seed=1)


def test_report_shows_the_figures(config: Config, samples: Images) -> None:
    real = image_set(COUNTS, CLASSES)
    page = Page(render(RunContent(config, example_metrics(config), real, samples, "CPU of mine, torch 9")))
    assert page.row("Cross-entropy") == ["Cross-entropy|ce", "70.0", "91.0", "70.0", "48.1"]
    assert page.row("DiffuLT") == ["DiffuLT|diffult", "75.3|+5.3", "88.0|−3.0", "70.0|+0.0", "51.3|+3.2"]
    assert page.bold == ["91.0", "75.3", "51.3", *["62.5"] * 4]  # nothing is where all are equal
    _, validation, generation, time = page.tables
    assert validation[1] == ["Cross-entropy|ce", "61.5", "61.5", "61.5", "61.5"]
    assert generation[1][:8] == ["cat", "12", "28", "35", "28", "20.0", "60.0", "20.0"]
    assert generation[2][:8] == ["tail", "3", "37", "80", "20 (short)", "10.0", "15.0", "75.0"]
    assert generation[3][:8] == ["all", "15", "65", "115", "48", "13.0", "28.7", "58.3"]
    assert page.row("diffusion")[:3] == ["diffusion", "1 min 15 s", "75 %"]
    assert time[-1][:2] == ["all", "1 min 40 s"]
    machine, speed = "CPU of mine, torch 9", "guidance 1.5: 20 network evaluations a sample, 71 samples a second"
    for words in ("0123456789ab", machine, speed, "balance_to = 40"):
        assert words in page.text


def test_report_needs_nothing_beside_it(html: str) -> None:
    page = Page(html)
    assert page.references and all(reference.startswith(("data:", "#")) for reference in page.references)
    assert not page.tags & {"script", "iframe", "object", "base"}
    assert "://" not in html and "@import" not in html
    assert all(target.startswith("#") for target in re.findall(r"url\((.*?)\)", html))
    assert set(re.findall(r"var\((--\w+)\)", html)) <= set(re.findall(r"(--[\w-]+):", html))  # every colour is defined
    identifiers = re.findall(r' id="([^"]*)"', html)
    assert len(identifiers) == len(set(identifiers))


def test_class_names_are_escaped(html: str) -> None:
    page = Page(html)
    assert "b" not in page.tags
    assert page.headings.count(CLASSES[1] + "40 real, 0 generated") == 1
    assert any(image["alt"] == f"6 real images of class {CLASSES[1]}" for image in page.images)


def test_gallery_sets_samples_beside_real_images(config: Config, html: str) -> None:
    content = example_content(config)
    real, samples = content.packed.train, content.samples
    page = Page(html)
    assert [title.split("40")[0] for title in page.headings if "40 real" in title] == [CLASSES[1]]
    assert "none needed" in page.text
    tail = picture(next(image for image in page.images if image["alt"] == "3 real images of class tail"))
    assert tail.shape == (64, 3 * 66 - 2, 3)
    np.testing.assert_array_equal(tail[:, :64], enlarged(real.image(52), 8))  # after 12 + 40 others
    assert page.text.count("each above its nearest real image") == 2
    alt = "generated tail, beneath it the nearest real training image"
    shown = [picture(image) for image in page.images if image["alt"] == alt]
    assert len(shown) == 6 and shown[1].shape == (130, 64, 3)
    np.testing.assert_array_equal(shown[1][:64], enlarged(samples.image(29), 8))
    np.testing.assert_array_equal(shown[1][66:], enlarged(real.image(52), 8))
    verdicts = [text for text in page.captions if "ID " in text]  # of distances 1.5 and 3 with the radius 2
    assert verdicts[-6:-3] == ["ID 0.75 copy", "AID 1.50", "ID 0.75"]


def test_the_summary_answers_with_numbers(html: str) -> None:
    page = Page(html)
    assert page.answers["Which method wins?"].startswith(
        "Highest on the 26 validation images (90.0\xa0%): DiffuLT, 90.0\xa0%"
    )
    # 2 of 10 images of 3 classes more, and 3 of 10: 196 sqrt(p (1 - p) / 30) points to either side
    gain = page.answers["Do synthetic images add anything to the best method without them?"]
    assert gain == (
        "Yes: the interval lies above 0. DiffuLT, 90.0\xa0%, against Duplicates of real images, "
        "70.0\xa0%: +20.0 points (95 % interval +5.7 to +34.3)."
    )
    assert page.answers["Do they beat simply repeating real images?"] == gain
    content = example_content(load_preset("digits-lt", SETTINGS))
    del content.metrics["duplicates"]
    gain = summary(content)[1]["answer"]
    assert "against Cross-entropy, 60.0\xa0%: +30.0 points (95 % interval +13.6 to +46.4)" in gain


def test_a_gain_whose_interval_includes_0_is_inconclusive(config: Config) -> None:
    content = example_content(config)
    content.predictions = {**content.predictions, "duplicates": content.predictions["diffult"]}
    content.metrics["duplicates"]["top1"] = 90.0
    assert summary(content)[1]["answer"].startswith("Inconclusive: the interval includes 0.")
    content.predictions = {}
    assert summary(content)[1]["answer"].startswith("No interval: evaluate/predictions.safetensors is not there.")
    assert verdict(-2.0, -1.0) == "No: the interval lies below 0"


def test_what_is_missing_for_a_gain_is_named(config: Config) -> None:
    content = example_content(config)
    del content.metrics["duplicates"]
    assert summary(content)[2]["answer"] == "Not measured: add 'duplicates' to classifier.methods."
    del content.metrics["ce"]
    missing = "Not measured: add a method without synthetic images, such as 'ce', to classifier.methods."
    assert summary(content)[1]["answer"] == missing


def test_few_test_images_are_warned_of(html: str) -> None:
    groups = {"many": np.array([0, 1]), "medium": np.array([], int), "few": np.array([2])}
    note = few_test_images(np.array([40, 10, 1]), groups)
    assert note == "few: 1 test image, of 100.0 points each. Differences of a few test images may well be chance."
    assert few_test_images(np.array([50, 0, 50]), groups) is None
    assert "Few test images. top-1: 30 test images, of 3.3 points each; many: 10" in Page(html).text


def test_copies_are_warned_of(config: Config, html: str) -> None:
    page = Page(html)
    assert "More than half of the samples are copies of real training images in one class: tail." in page.text
    assert next(row for table in page.tables for row in table if "55.0 (mostly copies)" in row)[0] == "tail"
    content = example_content(config)
    content.metrics["copies"] |= {"share": None, "by_class": dict.fromkeys(CLASSES)}  # too few held-out images
    assert "Not known: there are too few held-out images" in Page(render(content)).text


def test_the_confusion_matrix_counts_test_images(config: Config, html: str) -> None:
    content = example_content(config)
    share = confusion_share(content, "diffult", np.array([1, 2, 0]))
    np.testing.assert_array_equal(share, [[90, 10, 0], [0, 90, 10], [10, 0, 90]])
    page = Page(html)
    assert "Confusion matrix: DiffuLT" in page.text and "Confusion matrix: Cross-entropy" in page.text


def test_every_picture_says_what_is_seen(html: str) -> None:
    page = Page(html)
    assert len(page.figures) == 11  # by class, 2 confusions, histogram, distances, 2 of each of 3 trainings
    assert all(len(label) > 40 for label in page.figures) and all(image["alt"] for image in page.images)


def test_report_without_samples_and_validation(config: Config) -> None:
    metrics = example_metrics(config)
    del metrics["validation"]
    metrics["generation"] = dict.fromkeys(("drawn", "accepted", "id", "aid", "ood"), 0)
    metrics["generation"] |= {"images_per_s": None, "nfe": 20, "by_class": {}}
    config = config.model_copy(update={"generate": config.generate.model_copy(update={"balance_to": 3})})
    nothing = image_set(np.zeros(3, int), CLASSES)
    page = Page(render(RunContent(config, metrics, image_set(COUNTS, CLASSES), nothing, "m")))
    assert len(page.tables) == 2  # accuracy, time
    assert "Copies" not in page.text and "Confusion" not in page.text and len(page.figures) == 1
    assert "validation" not in page.text.split("Settings")[-1].split("config.toml")[0]
    assert "No sample was drawn: no class has fewer than 3 real images." in page.text


@pytest.mark.parametrize(
    ("filter", "words"), [("none", "No sample was"), ("distance", "Samples out of distribution were")]
)
def test_the_report_says_whether_samples_were_dropped(samples: Images, filter: str, words: str) -> None:
    config = load_preset("digits-lt", [f"generate.filter={filter}"])
    page = Page(render(RunContent(config, example_metrics(config), image_set(COUNTS, CLASSES), samples, "m")))
    assert f"{words} dropped." in page.text


def test_a_group_without_test_images_is_a_dash() -> None:
    row = {"top1": 50.0, "many": None, "medium": None, "few": 50.0}
    rows = accuracy_rows({"diffult": row | {"top1": 49.96}, "ce": row}, ("ce", "diffult"))
    assert [r["title"] for r in rows] == ["Cross-entropy", "DiffuLT"]
    assert rows[1]["cells"][1] == {"value": None, "best": False, "delta": None}
    assert rows[1]["cells"][0] == {"value": 50.0, "best": False, "delta": 0.0}


def test_classes_that_drew_nothing_have_no_row() -> None:
    tally = {"drawn": 4, "accepted": 2, "id": 1, "aid": 1, "ood": 2}
    rows = generation_rows({"b": tally}, ("a", "b"), np.array([9, 2]), np.array([0, 2]))
    assert rows == [
        {"name": "b", "real": 2, "needed": 2, "drawn": 4, "accepted": 2, "id": 25.0, "aid": 25.0, "ood": 50.0}
    ]


def test_times() -> None:
    assert timing_rows({"a": 3.0, "b": 1.0})[0] == {"stage": "a", "seconds": 3.0, "share": 75.0}
    assert timing_rows({"a": 0.0})[0]["share"] == 0.0
    texts = [duration(seconds) for seconds in (0.04, 59.94, 59.96, 3599.4, 3599.6, 86400)]
    assert texts == ["0.0 s", "59.9 s", "1 min 00 s", "59 min 59 s", "1 h 00 min", "24 h 00 min"]


@pytest.fixture
def finished_run(tmp_path: Path) -> RunDir:
    """A run whose tail was filled up to five images with flat grey ones."""
    run = RunDir.open(tmp_path / "run", "digits-lt", ["generate.balance_to=5", "classifier.methods=['ce', 'diffult']"])
    pack(run)
    quotas = quotas_to(5, run.packed().counts)
    labels = np.repeat(np.arange(10), quotas)
    indices = np.concatenate([np.arange(quota) for quota in quotas])
    with run.stage("generate") as record:
        record["generation"] = example_metrics(run.config)["generation"]
        images = np.full((len(labels), 8, 8, 1), 77, np.uint8)
        file = run.folder("generate") / "synthetic.beton"
        write(file, images, labels=labels, synthetic=np.ones_like(labels), index=indices)
    return run


def test_write_report_reads_a_run_directory(finished_run: RunDir) -> None:
    metrics = example_metrics(finished_run.config)
    metrics["generation"]["by_class"] = {"9": metrics["generation"]["by_class"]["tail"]}
    write_json(finished_run.path / "metrics.json", metrics | {"hash": finished_run.hash("evaluate")})
    path = write_report(finished_run)
    assert path == finished_run.path / "report.html"
    page = Page(path.read_text())
    assert page.row("DiffuLT")[1] == "75.3|+5.3"
    shown = {image["alt"]: image for image in page.images}
    assert (picture(shown["generated 9"]) == 77).all()
    first = finished_run.packed().train
    expected = enlarged(first.image(int(np.flatnonzero(first.labels == 0)[0])), 8)
    np.testing.assert_array_equal(picture(shown["6 real images of class 0"])[:, :64], expected)


def test_the_report_of_a_run_that_cannot_be_written_to_goes_elsewhere(tiny_run: RunDir, tmp_path: Path) -> None:
    before = {file: file.stat().st_mtime_ns for file in tiny_run.path.rglob("*")}
    command(tiny_run.path, tmp_path / "out.html")
    assert Page((tmp_path / "out.html").read_text(encoding="utf-8")).row("DiffuLT")
    assert {file: file.stat().st_mtime_ns for file in tiny_run.path.rglob("*")} == before


@pytest.mark.parametrize("metrics", [None, {"hash": "another"}])
def test_a_run_that_is_not_evaluated_is_refused(finished_run: RunDir, metrics: dict[str, Any] | None) -> None:
    if metrics is not None:
        write_json(finished_run.path / "metrics.json", metrics)
    with pytest.raises(UserError, match=r"no metrics of the present settings; run python -m diffult\.evaluate --run"):
        write_report(finished_run)
