"""Any bytes are read right or refused in a line: no other exception, no hang, no label that is another's.

A few examples each by default; `pytest --fuzz 2000` takes so many random ones.
"""

from __future__ import annotations

import csv
import gzip
import io
import os
import pickle
import re
import shutil
import struct
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from mutations import mutated_bytes
from PIL import Image
from torchvision.datasets import ImageFolder

from ffcv_writers import SourceError, open_set, write
from ffcv_writers.decoding import centre_square
from ffcv_writers.encoding import encode
from ffcv_writers.readers import Source, open_source
from ffcv_writers.readers.pickles import unpickle

IMAGES = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3), dtype=np.uint8)
LABELS = [0, 12, 3, 3, 1, 0]


def opened(format: str, path: Path, **lists: Path) -> Source | None:
    """The source; None if it is refused in a line."""
    try:
        source = open_source(format, path, **lists)
        _ = source.splits
    except SourceError as error:
        assert str(error) and "\n" not in str(error)
        return None
    return source


def fresh(folder: Path) -> Path:
    """The folder, empty."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    return folder


# Lists

NAME = st.text(
    st.characters(exclude_characters="/\0", exclude_categories=["Cs", "Cc", "Zl", "Zp"]), min_size=1, max_size=12
)


@given(
    names=st.lists(NAME.map(lambda name: name.strip() + ".png"), min_size=1, max_size=5, unique=True), data=st.data()
)
def test_a_list_of_files_that_are_there_is_read_whatever_their_names(
    names: list[str], data: st.DataObject, tmp_path: Path
) -> None:
    root = fresh(tmp_path / "list")
    labels = [data.draw(st.integers(0, 999_999)) for _ in names]
    for name in names:
        (root / name).touch()
    form = data.draw(st.sampled_from(["spaces", "tab", "csv", "quoted csv"]))
    text = io.StringIO()
    if "csv" in form:
        quoting = csv.QUOTE_ALL if form == "quoted csv" else csv.QUOTE_MINIMAL
        csv.writer(text, quoting=quoting, lineterminator="\n").writerows(zip(names, labels, strict=True))
    else:
        rows = zip(names, labels, strict=True)
        text.writelines(f"{name}{' ' if form == 'spaces' else chr(9)}{label}\n" for name, label in rows)
    (root / "list.txt").write_text(text.getvalue(), data.draw(st.sampled_from(["utf-8", "utf-8-sig", "utf-16"])))
    split = open_source("list", root, train_list=root / "list.txt").splits["train"]
    assert split.labels.tolist() == labels
    read = [split.samples.name(i).rpartition(", ")[0] for i in range(len(names))]  # type: ignore[attr-defined]
    assert [os.path.realpath(path) for path in read] == [os.path.realpath(root / name) for name in names]


LIST = b'path,label\n# c\nimg/a b.png 0\r\nimg\\c.png\t12\n"img/d,e.png",3\nimg/\xff.jpg, 44\n./x;7\n'


@given(content=mutated_bytes(LIST) | mutated_bytes(LIST.decode("latin1").encode("utf-16")) | st.binary(max_size=60))
def test_a_list_of_any_bytes(content: bytes, tmp_path: Path) -> None:
    """A label is the number at the end of its line, or that of the name there, where no line has a number."""
    (tmp_path / "list.txt").write_bytes(content)
    if source := opened("list", tmp_path, train_list=tmp_path / "list.txt"):
        wide = content[:2] in (b"\xff\xfe", b"\xfe\xff")
        text = content.decode("utf-16") if wide else content.decode("utf-8", "surrogateescape")
        lines = re.split("\r\n|\r|\n", text)
        split = source.splits["train"]
        for number, label in enumerate(split.labels.tolist()):
            line = lines[int(split.samples.name(number).rpartition(":")[2]) - 1]  # type: ignore[attr-defined]
            if source.classes[label] == str(label):
                found = re.search(r"[\s,;][\"']?(\d+)[\"']?\s*$", line)
                assert found and int(found[1]) == label
            else:
                assert line.strip().removesuffix('"').removesuffix("'").endswith(source.classes[label])


# Arrays


@given(labels=hnp.arrays(hnp.scalar_dtypes(), hnp.array_shapes(min_dims=0, max_dims=2, min_side=0, max_side=6)))
def test_npz_labels_of_any_type_and_value(labels: np.ndarray, tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", images=IMAGES, labels=labels)
    good = labels.dtype.kind in "biuf" and labels.shape in ((6,), (6, 1))
    good = good and all(
        value == int(value) and 0 <= value < 10**6 if np.isfinite(value) else False for value in labels.flat
    )
    source = opened("npz", tmp_path / "a.npz")
    assert (source is not None) == good
    if source is not None:
        assert source.splits["train"].labels.tolist() == [int(value) for value in labels.flat]


def npz(**options: Any) -> bytes:
    content = io.BytesIO()
    save = np.savez_compressed if options.get("compressed") else np.savez
    save(content, images=IMAGES, labels=np.array(LABELS))
    return content.getvalue()


@given(content=mutated_bytes(npz()) | mutated_bytes(npz(compressed=True)))
def test_an_npz_of_any_bytes(content: bytes, tmp_path: Path) -> None:
    """It has checksums: what is read is what was written."""
    (tmp_path / "a.npz").write_bytes(content)
    if source := opened("npz", tmp_path / "a.npz"):
        assert source.splits["train"].labels.tolist() == LABELS
        np.testing.assert_array_equal(np.asarray(source.splits["train"].samples), IMAGES)


@given(packed=st.booleans(), broken=st.booleans(), data=st.data())
def test_idx_of_any_bytes(packed: bool, broken: bool, data: st.DataObject, tmp_path: Path) -> None:
    arrays = {"images-idx3": IMAGES[..., 0], "labels-idx1": np.array(LABELS, np.uint8)}
    chosen = f"{'labels-idx1' if broken else 'images-idx3'}"
    fresh(tmp_path / "idx")
    for name, values in arrays.items():
        header = struct.pack(f">HBB{values.ndim}I", 0, 8, values.ndim, *values.shape)
        content = header + values.tobytes()
        if packed:
            content = gzip.compress(content)
            content = data.draw(mutated_bytes(content)) if name == chosen else content
        elif name == chosen:
            content = data.draw(mutated_bytes(header)) + values.tobytes()
        (tmp_path / "idx" / f"train-{name}-ubyte{'.gz' if packed else ''}").write_bytes(content)
    if source := opened("idx", tmp_path / "idx"):
        assert source.splits["train"].labels.tolist() == LABELS
        assert np.asarray(source.splits["train"].samples).size == IMAGES[..., 0].size


# Archives


def tar() -> tuple[bytes, list[int]]:
    """An archive, and where in it the labels lie."""
    content, places = io.BytesIO(), []
    with tarfile.open(fileobj=content, mode="w") as archive:
        for number, label in enumerate(LABELS):
            for ending, data in (("png", bytes([number]) * 300), ("cls", b"%d" % label)):
                member = tarfile.TarInfo(f"a/{number}.{ending}")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
                places += [archive.offset - 512] if ending == "cls" else []
    return content.getvalue(), places


TAR, PLACES = tar()


@given(content=mutated_bytes(TAR[:14000]) | mutated_bytes(TAR))
def test_a_tar_of_any_bytes(content: bytes, tmp_path: Path) -> None:
    """Headers have checksums: an image has the label that is written for it."""
    (tmp_path / "a.tar").write_bytes(content)
    if source := opened("tar", tmp_path / "a.tar"):
        split = source.splits["train"]
        for sample, label in enumerate(split.labels.tolist()):
            name = split.samples.name(sample)  # type: ignore[attr-defined]
            number = int(name.removesuffix(".png").removeprefix(f"{tmp_path / 'a.tar'}: a/"))
            written = content[PLACES[number] :].lstrip(b"0 \t\n\r\v\f")
            assert label in (LABELS[number], 0) or written.startswith(b"%d" % label)
            assert len(split.samples[sample]) == 300


BATCH = {"data": IMAGES.reshape(6, 192), "labels": [*LABELS, np.int64(3)], b"names": ["a", b"b", 1.5, None]}


@pytest.mark.timeout(600)
@given(content=st.sampled_from(range(6)).flatmap(lambda protocol: mutated_bytes(pickle.dumps(BATCH, protocol))))
def test_a_pickle_of_any_bytes(content: bytes) -> None:
    """Numbers, text, containers and arrays of numbers come out, nothing else."""
    try:
        value = unpickle(content, "file")
    except SourceError as error:
        assert str(error).startswith("file ") and "\n" not in str(error)
        return
    for item in value.values():
        assert not isinstance(item, np.ndarray) or item.dtype.kind in "biuf"


# Folders

PART = st.text(st.sampled_from("abAB1._ é"), min_size=1, max_size=4).filter(
    lambda text: text[0] != "." and text.strip(".")
)
TREE = st.lists(
    st.tuples(st.lists(PART, max_size=2), PART, st.sampled_from([".png", ".JPG", ".txt", "", ".webp", ".heic"])),
    max_size=4,
)


@given(tree=st.dictionaries(PART, TREE, min_size=1, max_size=4), linked=st.booleans())
def test_a_folder_is_read_as_torchvision_reads_it(tree: dict[str, Any], linked: bool, tmp_path: Path) -> None:
    root = fresh(tmp_path / "folder")
    for name, files in tree.items():
        (root / name).mkdir()
        for parts, stem, ending in files:
            try:
                (root / name).joinpath(*parts).mkdir(parents=True, exist_ok=True)
                (root / name).joinpath(*parts, stem + ending).touch()
            except OSError:  # a file and a folder of one name
                continue
        if linked:
            (root / name / "zz").symlink_to(root / next(iter(tree)) / "nowhere.png")
    try:
        theirs = ImageFolder(str(root))
    except FileNotFoundError:
        theirs = None
    source = opened("folder", root)
    assert (source is None) == (theirs is None)
    if source is not None and theirs is not None:
        split = source.splits["train"]
        assert source.classes == tuple(theirs.classes)
        ours = [(split.samples.name(i), label) for i, label in enumerate(split.labels.tolist())]  # type: ignore[attr-defined]
        assert ours == theirs.samples


# Images and image sets


def image_files() -> list[bytes]:
    picture = Image.fromarray(IMAGES[0]).resize((40, 24), Image.Resampling.BICUBIC)
    contents = []
    for kind, options in (
        ("JPEG", {}),
        ("JPEG", {"progressive": True}),
        ("PNG", {}),
        ("GIF", {}),
        ("BMP", {}),
        ("TIFF", {}),
    ):
        buffer = io.BytesIO()
        picture.save(buffer, kind, **options)
        contents.append(buffer.getvalue())
    return contents


@given(content=st.sampled_from(image_files()).flatmap(mutated_bytes), storage=st.sampled_from(["raw", "jpg"]))
def test_an_image_file_of_any_bytes(content: bytes, storage: Any) -> None:
    try:
        stored = encode(content, storage, lambda image: centre_square(image, 16))
    except ValueError as error:
        assert str(error) and "\n" not in str(error)
    else:
        assert stored.shape == (16, 16, 3) and (storage == "jpg" or stored.data.size == 768)


@pytest.fixture(scope="module")
def betons(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    columns = {"labels": np.array(LABELS), "synthetic": np.arange(6) % 2, "index": np.arange(6)}
    contents = {}
    for name, images, storage in (("raw", IMAGES, "raw"), ("grey", IMAGES[..., :1], "raw"), ("jpg", IMAGES, "jpg")):
        path = tmp_path_factory.mktemp("betons") / f"{name}.beton"
        write(path, images, **columns, storage=storage)  # type: ignore[arg-type]
        contents[name] = path.read_bytes()
    return contents


@given(kind=st.sampled_from(["raw", "grey", "jpg"]), data=st.data())
def test_an_image_set_of_any_bytes(kind: str, data: st.DataObject, betons: dict[str, bytes], tmp_path: Path) -> None:
    """Its tables have a checksum; pixels have none, but reading them ends."""
    path = tmp_path / f"{data.draw(st.integers(0, 2**62))}.beton"
    path.write_bytes(data.draw(mutated_bytes(betons[kind])))
    try:
        image_set = open_set([path], mixed_sizes=True)
    except ValueError as error:
        assert str(error).startswith(str(path)) and "\n" not in str(error)
    else:
        assert image_set.labels.tolist() == LABELS and image_set.index.tolist() == [*range(6)]
        assert image_set.sizes.tolist() == [[8, 8]] * 6 and image_set.synthetic.tolist() == [False, True] * 3
        out, box = np.empty((1, 4, 4, image_set.channels), np.uint8), np.array([[1, 2, 5, 6]])
        for sample in range(6):
            try:
                image_set.read(np.array([sample]), out, box)
                assert image_set.image(sample).shape == (8, 8, image_set.channels)
            except ValueError as error:
                assert f"sample {sample} " in str(error) and "\n" not in str(error)
    path.unlink()
