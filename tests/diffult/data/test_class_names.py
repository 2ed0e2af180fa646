"""Names and numbers of classes, in --classes and in counts files, by one rule."""

from __future__ import annotations

import codecs
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mutations import mutated_bytes

from diffult.data.class_names import MOST_SAMPLES, ClassNames, parse_classes, read_counts
from diffult.errors import UserError

DIGITS = ClassNames(tuple("0123456789"))
ANIMALS = ClassNames(("ant", "bee", "polar bear"))
TWELVE = ClassNames(tuple(sorted(map(str, range(1, 13)))))  # 1, 10, 11, 12, 2, ...: as folders sort
ODD = ClassNames(("#1 fan", "a,b", "c #1", "caf\udce9", "seal,", "3-5", "été"))


@pytest.mark.parametrize(
    ("names", "text", "named"),
    [
        (DIGITS, "3,7-9", "3 7 8 9"),
        (DIGITS, " 3 , 3", "3"),
        (ANIMALS, "bee", "bee"),
        (ANIMALS, "0,polar bear", "ant|polar bear"),
        (ANIMALS, "1-2", "bee|polar bear"),
        (TWELVE, "2", "2"),  # not the label 2
        (TWELVE, "2-3,10-12", "10 11 12 2 3"),
        (ODD, "a,b", "a,b"),
        (ODD, '"a,b",c #1', "a,b|c #1"),
        (ODD, "3-5", "3-5"),
        (ODD, "caf\udce9", "caf\udce9"),
        (ODD, "e\u0301te\u0301", "été"),  # as macOS writes it
    ],
)
def test_classes_go_by_name_and_else_by_number(names: ClassNames, text: str, named: str) -> None:
    expected = named.split("|") if "|" in named or named in names.classes else named.split()
    assert [names.classes[c] for c in parse_classes(text, names)] == expected


@pytest.mark.parametrize(
    ("names", "text", "message"),
    [
        (DIGITS, "x", "no class 'x'"),
        (DIGITS, "3-", "no class '3-'"),
        (DIGITS, "10", "no class 10"),
        (DIGITS, "0-999999999999", "no class 999999999999"),  # nothing of that length is made
        (DIGITS, "5-3", "expected a range from the lower number to the higher"),
        (DIGITS, "", "expected names, numbers and ranges"),
        (DIGITS, "3,,4", "expected names, numbers and ranges"),
        (DIGITS, "٣", "no class '٣'"),
        (DIGITS, "9" * 5000, "no class 9999"),
        (ANIMALS, "bea", "no class 'bea'; did you mean 'bee'?"),
        (ANIMALS, "hen", "no class 'hen'; the classes are ant, bee, polar bear"),
        (TWELVE, "hen", "the classes are 1, 10, 11, 12, 2, 3, 4, 5, 6, 7 and 2 more"),
        (ClassNames(["a\nb", "c" * 999]), "hen", "the classes are 'a\\nb', 'cccccccccccccccccccc'"),
        (ANIMALS, "3", "no class 3, the set has 0 to 2"),
        (ANIMALS, '"bee', "in '\"bee'"),
        (TWELVE, "0", "no class 0; numbers are the names of classes here, such as 1"),
    ],
)
def test_other_classes_are_refused(names: ClassNames, text: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_classes(text, names)
    assert message in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 300


@pytest.mark.parametrize(
    ("names", "text", "counts"),
    [
        (DIGITS, b"\xef\xbb\xbf3 5\n4 2\n", {3: 5, 4: 2}),
        (DIGITS, b"3,5\r\n4;2\r\n", {3: 5, 4: 2}),
        (DIGITS, b"3\t5\n4  2\r7 , 1", {3: 5, 4: 2, 7: 1}),
        (DIGITS, b"class,count\n# class count\n  # 4 9\n\n3 5 # the rarest\n", {3: 5}),
        (DIGITS, codecs.BOM_UTF16_LE + "3 5\n".encode("utf-16-le"), {3: 5}),
        (ANIMALS, b'polar bear 4\n"ant",2', {0: 2, 2: 4}),
        (ANIMALS, b"2 4\nant 2", {0: 2, 2: 4}),
        (TWELVE, b"2 7", {4: 7}),
        (ODD, b"#1 fan 3\na,b 4\nc #1 5\ncaf\xe9 6\nseal, 7\n3-5 8\n#3 9", dict(enumerate(range(3, 9)))),
    ],
)
def test_counts_are_read_as_people_write_them(
    tmp_path: Path, names: ClassNames, text: bytes, counts: dict[int, int]
) -> None:
    (tmp_path / "counts.txt").write_bytes(text)
    read = read_counts(tmp_path / "counts.txt", names)
    assert read.dtype == np.int64 and {c: n for c, n in enumerate(read.tolist()) if n} == counts


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "names no class"),
        (b"# nothing\n", "names no class"),
        (b"3", "line 1: expected a class and a count"),
        (b"3 1\n10 2", "line 2: no class 10"),
        (b"3 1\n3 1", "line 2: class '3' is named twice"),
        (b"3 -1", "line 1: expected a class and a count"),
        (b"3 1.5", "line 1: expected a class and a count"),
        (b"3 1,000", "line 1: expected a class and a count"),  # not none of a class 3 1
        (b"3 \xd9\xa3", "line 1: expected a class and a count"),
        (b"3 99999999999999999999", "samples of a class are too many"),
        (b"caf\xe9 5\n", r"line 1: no class 'caf\udce9'"),
        (b"\xff\xfe3\x00 \x00x", "--counts"),
        (b"3\x00 \x005\x00", "line 1: "),
        (b"3" + b" " * 100_000 + b"x", "line 1: "),
        (b"1" * 100_000, "line 1: "),
    ],
)
def test_other_counts_are_refused_with_their_line(tmp_path: Path, text: bytes, message: str) -> None:
    (tmp_path / "counts.txt").write_bytes(text)
    with pytest.raises(UserError) as caught:
        read_counts(tmp_path / "counts.txt", DIGITS)
    assert message in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 400


TEXTS = (b"3 5\n4 2\n", b'class,count\n"polar bear",5\nant,2\n', b"#1 fan 3\nc #1 5 # no\ncaf\xe9\t6\r\n")


@given(st.sampled_from(TEXTS).flatmap(mutated_bytes), st.sampled_from([DIGITS, ANIMALS, TWELVE, ODD]))
def test_any_counts_file_is_read_or_refused_in_a_line(tmp_path: Path, content: bytes, names: ClassNames) -> None:
    (tmp_path / "counts.txt").write_bytes(content)
    try:
        counts = read_counts(tmp_path / "counts.txt", names)
    except UserError as error:
        assert "\n" not in str(error)
    else:
        assert counts.shape == (len(names.classes),) and (counts >= 0).all() and (counts <= MOST_SAMPLES).all()


@given(
    st.lists(st.text(st.characters(codec="utf-8"), min_size=1, max_size=4), min_size=1, max_size=6, unique=True),
    st.data(),
)
def test_every_class_is_found_by_its_name(classes: list[str], data: st.DataObject) -> None:
    names, wanted = ClassNames(classes), data.draw(st.sampled_from(classes))
    assert names.labels(wanted) == [classes.index(wanted)]
    written = data.draw(st.sampled_from([" ", "\t", ",", " , "])).join([wanted, "7"])
    if wanted == wanted.strip().strip(",;").strip() and not set("\r\n#") & set(wanted):
        assert names.counts(written)[classes.index(wanted)] == 7


@given(st.text(max_size=12) | st.text('0123456789-, "a', max_size=12), st.sampled_from([DIGITS, ANIMALS, TWELVE, ODD]))
def test_any_text_is_classes_or_refused_in_a_line(text: str, names: ClassNames) -> None:
    try:
        found = parse_classes(text, names)
    except UserError as error:
        assert len(str(error).splitlines()) == 1
    else:
        assert found == sorted(set(found)) and set(found) <= set(range(len(names.classes)))
