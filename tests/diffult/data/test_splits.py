"""Long-tail profiles, the drawn subset and the splits."""

from __future__ import annotations

import hashlib
import logging

import numpy as np
import pytest
from pydantic import ValidationError

from diffult.data.config import DataConfig
from diffult.data.profiles import class_counts, draw, exponential, step
from diffult.data.splits import choose_splits
from diffult.errors import UserError
from ffcv_writers.readers import Source, Split


def mixed(counts: list[int], seed: int = 0) -> Split:
    """A split with so many images of each class, labels mixed."""
    labels = np.random.default_rng(seed).permutation(np.repeat(np.arange(len(counts)), counts))
    return Split(np.zeros((len(labels), 2, 2, 1), np.uint8), labels)


def source_of(train: list[int], val: list[int] | None = None) -> Source:
    """A source with these class sizes."""
    splits = {"train": mixed(train), "test": mixed([2] * len(train), 1)} | (
        {} if val is None else {"val": mixed(val, 2)}
    )
    return Source({}, lambda: (splits, tuple(f"c{i}" for i in range(len(train)))))


def counts_of(source: Source, numbers: np.ndarray) -> list[int]:
    return np.bincount(source.splits["train"].labels[numbers], minlength=len(source.classes)).tolist()


# Profiles


@pytest.mark.parametrize(
    ("classes", "imbalance", "total"),
    [
        (10, 100, 12406),
        (10, 50, 13996),
        (10, 10, 20431),
        (100, 100, 10847),
        (100, 50, 12608),
        (100, 10, 19573),
    ],
)
def test_cifar_lt_sizes_are_the_published_ones(classes: int, imbalance: float, total: int) -> None:
    counts = exponential(50000 // classes, imbalance, classes)
    assert sum(counts) == total
    # as imbalance_cifar.py writes it, with the reciprocal factor
    assert counts == [int(50000 / classes * ((1 / imbalance) ** (i / (classes - 1.0)))) for i in range(classes)]


def test_imbalance_factor_is_exact_at_the_last_class() -> None:
    for imbalance in range(1, 300):
        for n_min in (1, 3, 20):
            assert exponential(n_min * imbalance, imbalance, 10)[-1] == n_min


def test_step_profile() -> None:
    assert step(500, 10, 6) == [500, 500, 500, 50, 50, 50]
    assert step(500, 10, 5) == [500, 500, 500, 50, 50]


def test_class_counts_take_the_largest_class_unless_set() -> None:
    available = np.array([90, 120, 100])
    config = DataConfig(source="digits", profile="exponential", imbalance=4)
    assert class_counts(config, available) == [120, 60, 30]
    assert class_counts(config.model_copy(update={"n_max": 80}), available) == [80, 40, 20]
    assert class_counts(DataConfig(source="digits", profile="natural"), available) == [90, 120, 100]
    given = DataConfig(source="digits", profile="counts", counts=(5, 2, 7))
    assert class_counts(given, available) == [5, 2, 7]
    with pytest.raises(UserError, match="3 numbers for 4 classes"):
        class_counts(given, np.array([9, 9, 9, 9]))


def published_cifar_lt(labels: list[int], cls_num: int, imb_factor: float, rand_number: int) -> np.ndarray:
    """LDAM-DRW's gen_imbalanced_data written anew: numpy's global generator, classes by np.unique."""
    state = np.random.get_state()
    np.random.seed(rand_number)
    targets = np.array(labels, dtype=np.int64)
    selected: list[int] = []
    for rank, which in enumerate(np.unique(targets)):
        number = int((len(targets) / cls_num) * imb_factor ** (rank / (cls_num - 1.0)))
        index = np.where(targets == which)[0]
        np.random.shuffle(index)
        selected += list(index[:number])
    np.random.set_state(state)
    return np.array(selected)


@pytest.mark.parametrize("classes", [10, 100])
@pytest.mark.parametrize("imbalance", [100, 50, 10])
def test_drawn_indices_are_those_of_the_published_procedure(classes: int, imbalance: int) -> None:
    labels = np.random.default_rng(7).permutation(np.arange(50000) % classes)
    for seed in (0, 3):
        drawn = draw(labels, exponential(50000 // classes, imbalance, classes), seed)
        assert np.array_equal(drawn, published_cifar_lt(labels.tolist(), classes, 1 / imbalance, seed))


def test_drawn_indices_are_pinned() -> None:
    """Held as numbers too: CIFAR-LT must not move with a new numpy."""
    drawn = draw(np.arange(50000) % 10, exponential(5000, 100, 10), seed=0)
    assert drawn[:5].tolist() == [3980, 38330, 48360, 45720, 6360]
    assert drawn[-3:].tolist() == [15789, 4339, 11629]
    assert (
        hashlib.sha256(drawn.astype("<i8").tobytes()).hexdigest()
        == "563055e23a86ca16a1817853b5083e2cc07118f9307ecc8082d4fcdc922f6f6b"
    )


def test_a_count_that_the_set_cannot_give_is_refused() -> None:
    labels = np.repeat([0, 1, 2], [10, 4, 10])
    with pytest.raises(UserError, match="class 1 should get 5 training images but the source has 4"):
        draw(labels, [10, 5, 1], seed=0)
    with pytest.raises(UserError, match="class 2 would get 0 images"):
        draw(labels, [10, 4, 0], seed=0)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"source": "digits", "profile": "exponential"}, "needs imbalance"),
        ({"source": "digits", "profile": "step"}, "needs imbalance"),
        ({"source": "digits", "profile": "counts"}, "needs counts"),
        ({"source": "cifar10"}, "needs path"),
        ({"source": "cifar"}, "unknown source 'cifar': choose one of digits, idx, cifar10"),
        ({"source": "digits", "storage": "jpg", "channels": 1}, "needs channels = 3"),
        ({"source": "digits", "storage": "jpg", "image_size": 401}, "max_short_side of image_size or more"),
        ({"source": "list", "path": "x", "train_list": "a"}, "needs train_list, and test_list or test_share"),
        ({"source": "digits", "imbalance": 0.01}, "greater than or equal to 1"),
        ({"source": "digits", "imbalance": float("inf")}, "finite"),
        ({"source": "digits", "channels": 2}, "1 or 3"),
        ({"source": "digits", "seed": -1}, "greater than or equal to 0"),
        ({"source": "digits", "horizontal_flip": True}, "not permitted"),
    ],
)
def test_config_refuses(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        DataConfig(**fields)  # type: ignore[arg-type]


# Splits


def test_drawn_splits_are_disjoint_and_test_is_whole() -> None:
    source = source_of([60, 60, 60])
    config = DataConfig(source="digits", profile="exponential", imbalance=9, n_max=45, val_per_class=20, seed=4)
    numbers = choose_splits(config, source)
    train, val = numbers["train"], numbers["val"]
    assert counts_of(source, train) == [45, 15, 5]
    assert counts_of(source, val) == [15, 20, 20]  # class 0 has but 15 left
    assert len({*train, *val}) == len(train) + len(val)
    assert numbers["test"].tolist() == list(range(6))
    assert np.array_equal(train, draw(source.splits["train"].labels, [45, 15, 5], seed=4))  # the published order
    again = choose_splits(config, source)
    assert all(np.array_equal(again[name], numbers[name]) for name in ("train", "val", "test"))
    other = choose_splits(config.model_copy(update={"seed": 5}), source)
    assert {*other["train"]} != {*train} and {*other["val"]} != {*val}


def test_drawn_validation_images_are_pinned() -> None:
    """Held as numbers: runs that are compared must be chosen by the same images."""
    config = DataConfig(source="digits", profile="exponential", imbalance=9, n_max=45, val_per_class=3, seed=4)
    numbers = choose_splits(config, source_of([60, 60, 60]))
    assert numbers["val"].tolist() == [89, 5, 120, 28, 170, 113, 134, 144, 33]
    assert numbers["train"][:4].tolist() == [18, 83, 167, 91]


def test_no_remainder_means_no_validation_and_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    source = source_of([10, 10, 10])

    def chosen(*counts: int, val_per_class: int = 3) -> dict[str, np.ndarray]:
        config = DataConfig(source="digits", profile="counts", counts=counts, val_per_class=val_per_class)
        return choose_splits(config, source)

    with caplog.at_level(logging.WARNING):
        assert counts_of(source, chosen(10, 4, 10)["val"]) == [0, 3, 0]
    assert "no validation image is left for 2 of 3 classes: c0, c2" in caplog.text
    assert "val" not in chosen(10, 10, 10) and "val" not in chosen(5, 5, 5, val_per_class=0)


def test_natural_profile_holds_out_a_tenth_at_most() -> None:
    source = source_of([100, 35, 9])
    numbers = choose_splits(DataConfig(source="digits", profile="natural", val_per_class=5), source)
    assert counts_of(source, numbers["val"]) == [5, 3, 0]
    assert counts_of(source, numbers["train"]) == [95, 32, 9]
    assert sorted([*numbers["train"], *numbers["val"]]) == list(range(144))
    assert choose_splits(DataConfig(source="digits"), source)["train"].tolist() == list(range(144))


def test_a_validation_split_of_the_source_is_taken_as_it_is() -> None:
    numbers = choose_splits(DataConfig(source="digits", val_per_class=1), source_of([20, 20], val=[4, 4]))
    assert numbers["val"].tolist() == list(range(8)) and len(numbers["train"]) == 40


def test_a_source_without_a_test_split_gives_a_share_of_each_class(caplog: pytest.LogCaptureFixture) -> None:
    labels = np.repeat([0, 1, 2, 3], [100, 10, 3, 2])
    split = Split(np.zeros((len(labels), 2, 2, 1), np.uint8), labels)
    source = Source({}, lambda: ({"train": split}, ("a", "b", "c", "d")))
    config = DataConfig(source="digits", test_share=0.2, val_per_class=5)
    with caplog.at_level(logging.WARNING):
        numbers = choose_splits(config, source)
    assert [counts_of(source, numbers[name]) for name in ("test", "val", "train")] == [
        [20, 2, 1, 0], [5, 0, 0, 0], [75, 8, 2, 2],
    ]  # fmt: skip
    assert sorted(np.concatenate([*numbers.values()])) == list(range(len(labels)))
    assert "no test image is left for 1 of 4 classes: d" in caplog.text
    assert np.array_equal(choose_splits(config, source)["test"], numbers["test"])
    other = choose_splits(config.model_copy(update={"seed": 1}), source)
    assert np.array_equal(other["test"], numbers["test"])  # no seed trains on another's test images
    assert {*other["val"]} != {*numbers["val"]}
    assert {*choose_splits(config, source_of([20, 20]))["test"]} == set(range(4))  # its own, where it has one
    with pytest.raises(UserError, match="no class has 3 images"):
        one = Source({}, lambda: ({"train": mixed([2, 1])}, ("a", "b")))
        choose_splits(config, one)


def test_the_natural_profile_can_be_capped() -> None:
    source = source_of([100, 35, 9])
    numbers = choose_splits(DataConfig(source="digits", n_max=20), source)
    assert counts_of(source, numbers["train"]) == [20, 20, 9]
