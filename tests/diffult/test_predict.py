"""Predictions of image files: the pixels, classes and choices of evaluate, a run that is only read, bad files."""

import csv
import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from diffult.data.config import DataConfig
from diffult.data.packing import open_data, pack_images, read_packed
from diffult.data.pixels import as_packed
from diffult.errors import UserError
from diffult.longtail.classification import classify, evaluation_loader, evaluation_view, predict
from diffult.models.resnet import build_classifier
from diffult.predict import _pixels, choose_method, command, find_images, predict_files
from diffult.runs.files import load_tensors, write_json
from diffult.runs.run_dir import RunDir


@pytest.fixture(scope="module")
def files(tiny_run, tmp_path_factory) -> list[Path]:
    """The run's test images as PNG files, in order."""
    folder, test = tmp_path_factory.mktemp("images"), tiny_run.packed().test
    for i in range(len(test)):
        Image.fromarray(test.image(i)[:, :, 0]).save(folder / f"{i:04d}.png")
    return sorted(folder.iterdir())


@pytest.fixture
def run(tiny_run, tmp_path) -> RunDir:
    """A copy of the tiny run, to be changed."""
    return RunDir.open(Path(shutil.copytree(tiny_run.path, tmp_path / "run")))


@pytest.mark.parametrize("method", ["ce", "diffult"])
def test_files_are_predicted_as_evaluate_predicts_them(tiny_run, files, method):
    wanted = load_tensors(tiny_run.folder("evaluate") / "predictions.safetensors")[0][method]
    rows = list(predict_files(tiny_run, method, files))
    assert [row.file for row in rows] == files
    assert [row.name for row in rows] == [tiny_run.packed().classes[c] for c in wanted.tolist()]
    assert all(0.1 <= row.probability <= 1 for row in rows)  # the largest of ten


def write_photos(root: Path) -> list[Path]:
    """JPEG and PNG files of many sizes and modes, ROOT/SPLIT/CLASS."""
    random, photos = np.random.default_rng(0), []
    for split in ("train", "test"):
        for label in "ab":
            (root / split / label).mkdir(parents=True)
            for i, (width, height, mode, ending) in enumerate(
                [(70, 50, "RGB", "jpg"), (33, 90, "RGB", "png"), (200, 160, "RGB", "jpg"), (40, 40, "L", "jpg"),
                 (45, 41, "CMYK", "jpg"), (32, 32, "RGBA", "png"), (90, 61, "P", "png"), (20, 31, "L", "png")]
            ):  # fmt: skip
                small = Image.fromarray(random.integers(0, 256, (6, 8, 3), np.uint8))
                photo = small.resize((width, height), Image.Resampling.BICUBIC).convert(mode)
                photo.save(root / split / label / f"{i}.{ending}")
                photos += [root / split / label / f"{i}.{ending}"] * (split == "test")
    return photos


@pytest.mark.parametrize(
    "settings",
    [
        {"storage": "raw", "image_size": 32},
        {"storage": "raw", "image_size": 24, "channels": 1},
        {"storage": "jpg", "image_size": 32, "max_short_side": 64},
    ],
)
def test_a_file_has_the_pixels_that_it_has_once_packed(tmp_path, settings):
    photos = write_photos(tmp_path / "photos")
    data = DataConfig(source="folder", path=str(tmp_path / "photos"), **settings)
    pack_images(data, open_data(data), tmp_path / "pack")
    loader = evaluation_loader(read_packed(tmp_path / "pack").test, data, data.image_size, torch.device("cpu"))
    packed = torch.cat([batch.images for batch in loader.sequential()]).numpy()
    view = evaluation_view(data, data.image_size)
    assert np.array_equal(np.stack([as_packed(data, file.read_bytes(), view) for file in photos]), packed)
    model = build_classifier("convnet", 2, data.channels, data.image_size).eval()
    labels, _ = classify(model, torch.from_numpy(packed), torch.float32)
    assert labels.tolist() == predict(model, loader, torch.float32)[0].tolist()


@pytest.mark.parametrize(("heads", "scale"), [("linear", 1), ("two", 1), ("cosine", 30), ("experts", 30)])
def test_probabilities_are_those_that_the_loss_is_of(heads, scale):
    torch.manual_seed(0)
    model = build_classifier("convnet", 5, 1, 8, heads).eval()
    images = torch.randint(0, 256, (6, 8, 8, 1), dtype=torch.uint8)
    labels, probabilities = classify(model, images, torch.float32)
    with torch.no_grad():
        outputs = model.outputs(images.permute(0, 3, 1, 2) / 127.5 - 1).double().numpy()
    logits = scale * {"two": outputs[0], "experts": outputs.mean(0)}.get(heads, outputs)
    wanted = np.exp(logits - logits.max(1, keepdims=True))
    wanted /= wanted.sum(1, keepdims=True)
    assert labels.tolist() == wanted.argmax(1).tolist()
    assert probabilities == pytest.approx(wanted.max(1), rel=1e-3)


def test_the_classifier_is_the_one_that_the_report_names_first(run):
    file = run.path / "metrics.json"
    metrics = json.loads(file.read_text())
    for best in ("ce", "diffult"):
        for method in ("ce", "diffult"):
            metrics["validation"][method]["top1"] = 60.0 if method == best else 40.0
            metrics[method]["top1"] = 30.0 if method == best else 90.0  # the test images do not choose
        write_json(file, metrics)
        assert choose_method(run) == best
    del metrics["validation"]
    write_json(file, metrics)
    assert choose_method(run) == "ce"  # without validation images, as in the report
    assert choose_method(run, "diffult") == "diffult"
    with pytest.raises(UserError, match=r"--method: expected one of ce, diffult, got 'diffulter'; did you mean"):
        choose_method(run, "diffulter")
    write_json(file, {"hash": metrics["hash"], "validation": {"ce": {}, "diffult": {}}})
    with pytest.raises(UserError, match=r"metrics.json: damaged"):
        choose_method(run)
    file.unlink()
    with pytest.raises(UserError, match=r"no accuracies of the present settings .* give --method, one of ce, diffult"):
        choose_method(run)


def test_a_run_that_is_not_finished_is_refused_with_its_stage(run, files):
    (run.folder("generate") / "done.json").unlink()
    command(run=run.path, images=files[:1], method="ce")  # a finished classifier is enough
    (run.folder("classifier") / "done.json").unlink()
    expected = f"{run.path}: the run is not finished (at generate); python -m diffult.run --run {run.path} goes on"
    with pytest.raises(UserError) as caught:
        command(run=run.path, images=files[:1])
    assert str(caught.value) == expected


def test_the_run_is_only_read(run, files, capsys):
    def state() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in [run.path, *run.path.rglob("*")]}

    for path in run.path.rglob("*"):
        path.chmod(0o555 if path.is_dir() else 0o444)
    run.path.chmod(0o555)
    before = state()
    try:
        command(run=run.path, images=files[:3], method="ce")
        assert state() == before  # a new file would change its folder's time
    finally:
        for path in [run.path, *run.path.rglob("*")]:
            path.chmod(0o755)
    assert len(capsys.readouterr().out.splitlines()) == 3


def test_a_bad_file_is_named_and_the_others_are_predicted(tiny_run, files, tmp_path, capsys, caplog):
    (tmp_path / "bad.png").write_bytes(b"\x89PNG no more")
    (tmp_path / "b\nreak\t.png").write_bytes(files[1].read_bytes())
    os.mkfifo(tmp_path / "pipe.png")
    images = [files[0], *sorted(tmp_path.iterdir()), files[2]]
    with pytest.raises(UserError, match="2 of 5 images could not be read"):
        command(run=tiny_run.path, images=images, method="ce")
    rows = list(csv.reader(capsys.readouterr().out.splitlines(keepends=True), "excel-tab"))
    assert [row[0] for row in rows] == [str(file) for file in (images[0], images[1], images[4])]
    wanted = load_tensors(tiny_run.folder("evaluate") / "predictions.safetensors")[0]["ce"][:3]
    assert [int(name) for _, name, _ in rows] == wanted.tolist()
    assert "bad.png: cannot be read: " in caplog.text and "pipe.png: cannot be read: not a file" in caplog.text
    with pytest.raises(UserError, match="1 of 1 images could not be read"):
        command(run=tiny_run.path, images=[tmp_path / "bad.png"], method="ce")


def test_the_table_is_a_csv_file_with_a_header(tiny_run, files, tmp_path, capsys):
    odd = tmp_path / os.fsdecode(b"caf\xe9, 1.png")
    shutil.copy(files[0], odd)
    command(run=tiny_run.path, images=[odd, files[1]], output=tmp_path / "new" / "table.csv")
    with (tmp_path / "new" / "table.csv").open(encoding="utf-8", newline="") as file:
        header, first, second = csv.reader(file)
    assert header == ["file", "class", "probability"] and capsys.readouterr().out == ""
    assert first[0] == str(tmp_path / r"caf\udce9, 1.png") and second[0] == str(files[1])
    assert first[1] in tiny_run.packed().classes and 0 < float(first[2]) <= 1


def test_images_are_found_below_folders(tmp_path, caplog):
    for name in ("a/1.png", "a/b/2.JPG", "a/.hidden.png", "a/.cache/3.png", "a/notes.txt", "c/4.webp", "5.bin"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "a" / "loop").symlink_to(tmp_path / "a")
    (tmp_path / "a" / "other").symlink_to(tmp_path / "c")
    found = find_images([tmp_path / "5.bin", tmp_path / "a"])
    assert [str(file.relative_to(tmp_path)) for file in found] == ["5.bin", "a/1.png", "a/b/2.JPG", "a/other/4.webp"]
    assert "skipped 3 files: " in caplog.text and "1 not named like an image (.txt)" in caplog.text
    (tmp_path / "empty").mkdir()
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere")
    for name, message in (
        ("empty", "holds no file that is named like an image"),
        ("gone.png", "a link that leads nowhere"),
        ("none.png", "does not exist"),
    ):
        with pytest.raises(UserError, match=f"{name}: {message}"):
            find_images([tmp_path / name])


def test_the_command_line(tiny_run, files):
    words = [sys.executable, "-m", "diffult.predict", "--run", str(tiny_run.path), str(files[0]), str(files[1].parent)]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    rows = [line.split("\t") for line in done.stdout.splitlines()]
    assert [row[0] for row in rows] == [str(file) for file in (files[0], *files)]
    assert f"{len(files) + 1} images by " in done.stderr


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::PIL.Image.DecompressionBombWarning")
@given(st.sampled_from(["png", "jpg", "gif", "bmp", "tiff", "webp"]), st.data())
def test_any_bytes_are_an_image_or_one_line(tmp_path, caplog, ending, data):
    file, config = tmp_path / f"image.{ending}", DataConfig(source="digits", storage="jpg", image_size=16)
    Image.fromarray(np.arange(300, dtype=np.uint8).reshape(10, 10, 3) * 7).save(file)
    content = bytearray(file.read_bytes())
    for _ in range(data.draw(st.integers(0, 4))):
        place = data.draw(st.integers(0, len(content) - 1))
        content[place : place + data.draw(st.integers(0, 2))] = data.draw(st.binary(max_size=4))
    file.write_bytes(content)
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        pixels = _pixels(config, evaluation_view(config, 16), file)
    ours = [record.getMessage() for record in caplog.records if record.name == "diffult.predict"]  # Pillow may log, too
    if pixels is None:
        assert len(ours) == 1 and len(ours[0].splitlines()) == 1
    else:
        assert pixels.shape == (16, 16, 3) and pixels.dtype == np.uint8
