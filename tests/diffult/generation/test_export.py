"""Exports, read back by the tools that they are for: images, labels, their names and order survive in each."""

import io
import json
import os
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from ffcv_reader import read_by_ffcv
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import ffcv_writers.__main__
from diffult.errors import UserError
from diffult.generate import command
from diffult.generation import export as module
from diffult.generation.export import FORMATS, class_folders, class_texts, export, parse_formats
from diffult.longtail.filter import Verdict
from diffult.runs.files import lock_folder, save_tensors
from ffcv_writers import SourceError, open_set, write
from ffcv_writers.readers import Place, guess_format, open_place, open_source

TWELVE = tuple(map(str, range(12)))  # by name, 10 and 11 come before 2
BIRDS = ("auk", "bee eater", "crow", "dodo")
# No sample of the first, the last and one between.
LABELS = np.array([1, 1, 1, 2, 4, 4, 5, 6, 7, 8, 9, 10, 10])
INDEX = np.array([0, 2, 7, 1, 0, 3, 5, 0, 1, 0, 0, 0, 1])


def make_kept(folder: Path, labels: np.ndarray = LABELS, index: np.ndarray = INDEX, channels: int = 3) -> np.ndarray:
    """The files of a finished generation run that exports read; images, random, uint8 [N, 8, 8, C]."""
    images = np.random.default_rng(0).integers(0, 256, (len(labels), 8, 8, channels), np.uint8)
    write(folder / "synthetic.beton", images, labels=labels, synthetic=np.ones(len(labels), bool), index=index)
    rows = np.column_stack([labels, index, verdicts(labels)])
    dropped = [[0, 0, Verdict.OOD], [labels[0], index.max() + 1, Verdict.OOD]]
    table = np.array(sorted([*rows.tolist(), *dropped])).T
    names = ("labels", "indices", "verdict")
    columns = {name: torch.from_numpy(column.copy()) for name, column in zip(names, table, strict=True)}
    save_tensors(folder / "candidates.safetensors", columns | {"verdict": columns["verdict"].to(torch.uint8)}, {})
    return images


def verdicts(labels: np.ndarray) -> np.ndarray:
    return np.arange(len(labels)) % 2


WORDS = [Verdict(v).name.lower() for v in verdicts(LABELS)]


@pytest.mark.parametrize("channels", [1, 3])
def test_torchvision_reads_the_folders(tmp_path, channels):
    datasets = pytest.importorskip("torchvision.datasets")
    images = make_kept(tmp_path, channels=channels)
    read = datasets.ImageFolder(export("imagefolder", tmp_path, TWELVE), allow_empty=True)
    assert read.targets == LABELS.tolist()  # also where classes drew nothing
    assert [int(name) for name in read.classes] == list(range(12))
    assert [Path(path).stem for path, _ in read.samples] == [f"{i:06d}" for i in INDEX]
    pixels = np.stack([np.asarray(image) for image, _ in read])
    assert np.array_equal(pixels, images if channels == 3 else images.repeat(3, 3))
    assert Image.open(read.samples[0][0]).mode == ("RGB" if channels == 3 else "L")


def test_names_that_sort_as_their_labels_are_the_folders(tmp_path):
    datasets = pytest.importorskip("torchvision.datasets")
    make_kept(tmp_path, LABELS[:3], INDEX[:3])
    read = datasets.ImageFolder(export("imagefolder", tmp_path, BIRDS), allow_empty=True)
    assert tuple(read.classes) == BIRDS and read.targets == [1, 1, 1]
    assert json.loads((tmp_path / "classes.json").read_text()) == {"classes": list(BIRDS)}


def test_our_own_readers_give_the_labels_back(tmp_path):
    images = make_kept(tmp_path)
    for name in ("imagefolder", "npz", "wds"):
        path = export(name, tmp_path, TWELVE)
        split = open_place(guess_format(path), Place(path, allow_empty=True)).splits["train"]
        assert split.labels.tolist() == LABELS.tolist(), name
        first = split.samples[0]
        assert np.array_equal(first if name == "npz" else _decoded(first), images[0])
    with pytest.raises(SourceError, match=r"class 00 has no image in .*; 3 classes have none"):
        open_source("folder", tmp_path / "images")  # as a run would read it


def test_a_synthetic_set_is_written_of_the_exported_folder(tmp_path, monkeypatch):
    images = make_kept(tmp_path)
    words = ["write", str(export("imagefolder", tmp_path, TWELVE)), str(tmp_path / "again.beton"), "--synthetic"]
    monkeypatch.setattr("sys.argv", ["ffcv_writers", *words])
    with pytest.raises(SystemExit) as ended:
        ffcv_writers.__main__.main()
    again = open_set([tmp_path / "again.beton"])
    assert ended.value.code == 0 and again.labels.tolist() == LABELS.tolist() and again.synthetic.all()
    assert np.array_equal(again.take(np.arange(len(again))), images)


def test_metadata_names_each_file(tmp_path):
    make_kept(tmp_path)
    root = export("imagefolder", tmp_path, TWELVE)
    rows = [json.loads(line) for line in (root / "metadata.jsonl").read_text().splitlines()]
    assert [(row["label"], row["class"], row["index"], row["verdict"]) for row in rows] == [
        (c, TWELVE[c], i, word) for c, i, word in zip(LABELS, INDEX, WORDS, strict=True)
    ]
    assert {row["file_name"] for row in rows} == {str(file.relative_to(root)) for file in root.glob("*/*.png")}


def test_datasets_reads_folders_and_parquet(tmp_path):
    datasets = pytest.importorskip("datasets", reason="Hugging Face's datasets is not installed")
    pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    classes = ("crash test", *(f"val{i}" for i in range(10)), "train")  # which it would take for splits
    images = make_kept(tmp_path)
    folders, parquet = (export(name, tmp_path, classes) for name in ("imagefolder", "parquet"))
    cache = str(tmp_path / "cache")
    for read in (
        datasets.load_dataset(str(folders), cache_dir=cache),
        datasets.load_dataset("parquet", data_files=str(parquet), cache_dir=cache),
    ):
        assert list(read) == ["train"]
        rows = read["train"]
        assert rows["label"][:] == LABELS.tolist() and rows["verdict"][:] == WORDS
        assert rows["class"][:] == [classes[c] for c in LABELS] and rows["index"][:] == INDEX.tolist()
        assert np.array_equal(np.stack([np.asarray(image) for image in rows["image"]]), images)
    assert rows.features["label"].names == list(classes)


def test_parquet_is_read_by_pyarrow(tmp_path, monkeypatch):
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed")
    monkeypatch.setattr(module, "_ROW_GROUP", 4)
    images = make_kept(tmp_path)
    file = export("parquet", tmp_path, TWELVE)
    assert parquet.ParquetFile(file).num_row_groups == 4
    rows = parquet.read_table(file).to_pylist()
    assert [(row["label"], row["class"], row["index"], row["verdict"]) for row in rows] == [
        (c, TWELVE[c], i, word) for c, i, word in zip(LABELS, INDEX, WORDS, strict=True)
    ]
    assert all(np.array_equal(_decoded(row["image"]["bytes"]), image) for row, image in zip(rows, images, strict=True))
    features = json.loads(parquet.read_schema(file).metadata[b"huggingface"])["info"]["features"]
    assert features["label"] == {"_type": "ClassLabel", "names": list(TWELVE)} and list(features) == list(rows[0])
    monkeypatch.setattr(module, "_SHARD", 6)
    files = sorted(export("parquet", tmp_path, TWELVE).iterdir())
    assert [file.name for file in files] == [f"samples-{i:06d}.parquet" for i in range(3)]
    assert [parquet.ParquetFile(file).num_row_groups for file in files] == [2, 2, 1]
    assert [row for file in files for row in parquet.read_table(file).to_pylist()] == rows


def test_webdataset_reads_the_shards(tmp_path, monkeypatch):
    webdataset = pytest.importorskip("webdataset", reason="webdataset is not installed")
    monkeypatch.setattr(module, "_SHARD", 6)
    images = make_kept(tmp_path)
    root = export("wds", tmp_path, TWELVE)
    shards = sorted(map(str, root.iterdir()))
    assert [Path(shard).name for shard in shards] == [f"samples-{i:06d}.tar" for i in range(3)]
    assert [len(list(webdataset.WebDataset(shard, shardshuffle=False))) for shard in shards] == [6, 6, 1]
    read = list(webdataset.WebDataset(shards, shardshuffle=False).decode("rgb8").to_tuple("png", "cls", "json"))
    assert np.array_equal(np.stack([image for image, _, _ in read]), images)
    assert [label for _, label, _ in read] == LABELS.tolist()
    assert [row for _, _, row in read] == [
        {"label": c, "class": TWELVE[c], "index": i, "verdict": word}
        for c, i, word in zip(LABELS.tolist(), INDEX.tolist(), WORDS, strict=True)
    ]


def test_edm_reads_the_zip(tmp_path):
    """As EDM's ImageFolderDataset: the images' names sorted, each looked up in dataset.json."""
    images = make_kept(tmp_path)
    with zipfile.ZipFile(export("zip", tmp_path, TWELVE)) as archive:
        content = json.loads(archive.read("dataset.json"))
        names = sorted(
            name for name in archive.namelist() if Path(name).suffix.lower() in Image.registered_extensions()
        )
        labels = dict(content["labels"])
        assert [labels[name] for name in names] == LABELS.tolist() and content["classes"] == list(TWELVE)
        assert np.array_equal(np.stack([_decoded(archive.read(name)) for name in names]), images)


@pytest.mark.parametrize("part", [4 * 8 * 8 * 3, 2**24])
def test_numpy_reads_the_arrays(tmp_path, monkeypatch, caplog, part):
    monkeypatch.setattr(module, "_PART", part)
    monkeypatch.setattr(module, "_LARGE", part)
    images = make_kept(tmp_path)
    with np.load(export("npz", tmp_path, TWELVE)) as arrays:
        read = dict(arrays)
    assert np.array_equal(read["images"], images) and read["images"].dtype == np.uint8
    assert read["labels"].tolist() == LABELS.tolist() and read["indices"].tolist() == INDEX.tolist()
    assert read["classes"].tolist() == list(TWELVE) and read["verdicts"].tolist() == WORDS
    assert ("needs 0 GB of memory" in caplog.text) == (part < images.nbytes)


def test_samples_in_several_files_are_exported_as_those_in_one(tmp_path):
    images = make_kept(tmp_path)
    (tmp_path / "synthetic.beton").unlink()
    for number, part in enumerate((slice(0, 5), slice(5, 6), slice(6, None))):
        columns = {"labels": LABELS[part], "synthetic": np.ones_like(LABELS[part]), "index": INDEX[part]}
        write(tmp_path / f"synthetic-{number:03d}.beton", images[part], **columns)
    with np.load(export("npz", tmp_path, TWELVE)) as arrays:
        assert np.array_equal(arrays["images"], images) and arrays["verdicts"].tolist() == WORDS
    folders = export("imagefolder", tmp_path, TWELVE)
    rows = [json.loads(line) for line in (folders / "metadata.jsonl").read_text().splitlines()]
    pixels = np.stack([_decoded((folders / row["file_name"]).read_bytes()) for row in rows])
    assert np.array_equal(pixels, images) and [row["index"] for row in rows] == INDEX.tolist()
    betons = sorted(export("beton", tmp_path, TWELVE).glob("*.beton"))
    assert np.array_equal(open_set(betons).take(np.arange(len(images))), images)


@pytest.mark.slow  # ffcv compiles for 10 s; test_writing reads such a file with it in every run
def test_ffcv_reads_the_beton(tmp_path):
    pytest.importorskip("ffcv", reason="ffcv is not installed")
    images = make_kept(tmp_path, channels=1)
    pixels, labels, synthetic, index = read_by_ffcv(export("beton", tmp_path, TWELVE), 4)
    assert np.array_equal(pixels, images) and synthetic.all()
    assert labels.ravel().tolist() == LABELS.tolist() and index.ravel().tolist() == INDEX.tolist()
    assert json.loads((tmp_path / "classes.json").read_text()) == {"classes": list(TWELVE)}


def test_a_second_export_replaces_the_first_and_a_failed_one_does_not(tmp_path, monkeypatch):
    make_kept(tmp_path)
    before = {name: export(name, tmp_path, TWELVE) for name in ("imagefolder", "wds")}
    make_kept(tmp_path, LABELS[:2], INDEX[:2])
    assert len(list(export("imagefolder", tmp_path, TWELVE).glob("*/*.png"))) == 2

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "_png", full)
    with pytest.raises(OSError, match="No space"):
        export("wds", tmp_path, TWELVE)
    assert len(open_source("tar", before["wds"]).splits["train"].labels) == len(LABELS)
    assert not list(tmp_path.glob("*partial*"))
    with lock_folder(tmp_path), pytest.raises(UserError, match="another process writes to it"):
        export("npz", tmp_path, TWELVE)


@pytest.mark.parametrize(("name", "place"), [("imagefolder", "images"), ("wds", "webdataset")])
def test_a_folder_that_is_no_export_is_kept(tmp_path, name, place):
    make_kept(tmp_path)
    (tmp_path / place).mkdir()
    (tmp_path / place / "photo.png").touch()
    with pytest.raises(UserError, match=f"{place}: is not an earlier export .* choose another --out"):
        export(name, tmp_path, TWELVE)
    assert [file.name for file in (tmp_path / place).iterdir()] == ["photo.png"]


def test_what_cannot_be_exported_is_refused_before_anything_is_drawn(monkeypatch, tmp_path):
    with pytest.raises(UserError, match=r"--export: expected one of imagefolder, npz.*did you mean 'parquet'"):
        parse_formats(["zip,parket"])
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install pyarrow"):
        parse_formats(["npz", "zip, parquet"])
    assert parse_formats(["npz,zip", "wds, npz"]) == ["npz", "zip", "wds"] and parse_formats([]) == []
    assert [export(name, tmp_path, TWELVE) for name in FORMATS] == [None] * len(FORMATS)


def test_generate_exports_what_it_keeps(tiny_run, tmp_path, caplog):
    options = {"steps": 2, "per_class": 2, "classes": "1-3", "out": tmp_path / "out"}
    with caplog.at_level("INFO"):
        command(run=tiny_run.path, fast=True, export_=["imagefolder,zip", "wds"], **options)
    kept = open_set([tmp_path / "out" / "synthetic.beton"])
    names = {(label, index) for label, index in zip(kept.labels.tolist(), kept.index.tolist(), strict=True)}
    rows = [json.loads(line) for line in (tmp_path / "out" / "images" / "metadata.jsonl").read_text().splitlines()]
    assert {(row["label"], row["index"]) for row in rows} == names and {row["verdict"] for row in rows} <= {"id", "aid"}
    for written in ("images", "samples.zip", "webdataset"):
        assert f"wrote {tmp_path / 'out' / written}" in caplog.text and (tmp_path / "out" / written).exists()
    assert len(names) == len(kept) > 0


def test_verdicts_of_other_samples_are_refused(tmp_path):
    make_kept(tmp_path / "one")
    make_kept(tmp_path / "other", LABELS[:-1], INDEX[:-1])
    (tmp_path / "other" / "candidates.safetensors").replace(tmp_path / "one" / "candidates.safetensors")
    with pytest.raises(UserError, match="are of different runs"):
        export("npz", tmp_path / "one", TWELVE)


def test_names_that_encodings_cannot_hold_are_escaped():
    caf = b"caf\xe9".decode("utf-8", "surrogateescape")
    assert class_texts((caf, "a", "a", "日本")) == [r"caf\udce9", "a (1)", "a (2)", "日本"]
    assert class_folders((caf, "a/b", "..", "Con", "\n")) == ["0", "1", "2", "3_Con", "4"]


NAMES = st.text(max_size=80) | st.sampled_from(["", ".", "..", "test", "VAL 2", "a/b", "Nul\0", "10", "9"])


@given(st.lists(NAMES, min_size=1, max_size=12))
def test_any_names_survive_the_folders(tmp_path, names):
    """Readers number folders in the order of their names, as `sorted` gives it."""
    root, folders = Path(tempfile.mkdtemp(dir=tmp_path)), class_folders(tuple(names))
    for name in folders:
        (root / name).mkdir()  # what the system refuses, or has already, raises here
    assert sorted(os.listdir(root)) == folders
    texts = class_texts(tuple(names))
    assert json.loads(json.dumps(texts, ensure_ascii=False).encode()) == texts


def _decoded(content: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(content)))
