"""Histogram matching: the table itself, where it is fitted and found again, and that samples go through it."""

import json
import shutil

import numpy as np
import pytest
import torch

from diffult.generate import command, generate_stage, open_sampler
from diffult.generation import timesteps
from diffult.generation.levels import count_levels, match, matching_levels
from diffult.generation.shards import open_kept
from diffult.longtail.extractor import load_extractor
from diffult.longtail.frechet import class_frechet_distance
from diffult.runs import sampler as sampler_of_run
from diffult.runs.files import load_tensors
from diffult.runs.run_dir import RunDir
from kernels.augment import normalise

MATCHING = ["generate.match_histogram=true", "generate.balance_to=6", "generate.sampler=dpm++", "generate.steps=3"]


def images_of(levels, shares, size: tuple[int, int]) -> torch.Tensor:
    """uint8 [N, 8, 8, C], each pixel one of the levels, as often as the shares say."""
    rng = np.random.default_rng(sum(size))
    return torch.from_numpy(rng.choice(np.asarray(levels, np.uint8), (size[0], 8, 8, size[1]), p=shares))


def table_for(drawn, labels, real, real_labels) -> np.ndarray:
    counts = (count_levels(x, torch.from_numpy(y), 3) for x, y in ((drawn, labels), (real, real_labels)))
    return matching_levels(*(count.numpy() for count in counts))


def shares(images: torch.Tensor, labels: np.ndarray) -> np.ndarray:
    """Of the 256 levels of each channel, every class weighing the same."""
    images = images.numpy()
    classes = [images[labels == c] for c in np.unique(labels)]
    return np.array(
        [
            np.mean([np.bincount(x[..., c].ravel(), minlength=256) / x[..., c].size for x in classes], axis=0)
            for c in range(images.shape[-1])
        ]
    )


def test_a_haze_goes_where_real_images_are_black():
    """Half of the real pixels are 0, of the drawn ones a tenth, and levels 1 to 5 hold the rest of that half. Classes
    have other counts in either set; class 2 has samples alone."""
    bright, flat = np.arange(50, 250), np.full(200, 1 / 200)
    real = [images_of([0, *bright], [dark, *((1 - dark) * flat)], n) for dark, n in ((0.7, (40, 3)), (0.3, (10, 3)))]
    haze = [images_of([*range(6), *bright], [0.1, *[0.08] * 5, *(0.5 * flat)], n) for n in ((9, 3), (30, 3))]
    real, drawn = torch.cat(real), torch.cat([*haze, torch.full_like(haze[0], 255)])
    real_labels, labels = np.repeat([0, 1], [40, 10]), np.repeat([0, 1, 2], [9, 30, 9])
    table = table_for(drawn, labels, real, real_labels)
    matched, both = match(drawn, torch.from_numpy(table)), labels < 2
    before, after = (shares(x[both], labels[both]) for x in (drawn, matched))
    wanted = shares(real, real_labels)
    assert before[:, 0].max() < 0.15 and np.abs(wanted[:, 0] - 0.5).max() < 0.03
    # half the largest share of a level: no table can promise more
    assert np.abs(after.cumsum(1) - wanted.cumsum(1)).max() <= before.max() / 2 + 1e-12
    assert (np.diff(table.astype(int)) >= 0).all()
    assert len({tuple(row) for row in table}) == 3  # each channel has its own


def test_it_is_the_level_at_the_same_place_among_all_sorted_pixels():
    drawn = images_of(np.arange(20, 200), np.full(180, 1 / 180), (64, 1))
    real = torch.from_numpy((255 * np.random.default_rng(9).beta(0.5, 2, (64, 8, 8, 1))).astype(np.uint8))
    one = np.zeros(64, np.int64)
    table = table_for(drawn, one, real, one)[0]
    ours, theirs = (np.sort(x.numpy().ravel()) for x in (drawn, real))
    for level in np.unique(ours):
        first, after = np.searchsorted(ours, [level, level + 1])
        assert table[level] == theirs[int(np.ceil((first + after) / 2)) - 1]


def test_equal_histograms_change_nothing_and_only_real_levels_are_given():
    digits = np.round(np.arange(17) * 255 / 16).astype(np.uint8)
    real = images_of(digits, np.arange(17, 0, -1) / 153, (30, 1))
    one = np.ones(30, np.int64)
    assert torch.equal(match(real, torch.from_numpy(table_for(real.flip(1), one, real, one))), real)
    drawn = images_of(np.arange(256), np.full(256, 1 / 256), (30, 1))
    assert set(table_for(drawn, one, real, one).ravel()) == set(digits)
    lighter = images_of(digits[3:], np.full(14, 1 / 14), (30, 1))
    assert set(table_for(drawn, one, lighter, one).ravel()) == set(digits[3:])


@pytest.fixture
def matching(tiny_run, tmp_path) -> RunDir:
    """The tiny run before its generate stage, with histogram matching."""
    for stage in ("pack", "extractor", "diffusion"):
        shutil.copytree(tiny_run.path / stage, tmp_path / "run" / stage)
    shutil.copy(tiny_run.path / "config.toml", tmp_path / "run")
    return RunDir.open(tmp_path / "run", overrides=MATCHING)


def plain(run: RunDir, seed: int):
    """The run's sampler without its table."""
    return open_sampler(run, run.config.generate.model_copy(update={"match_histogram": False, "search": 0}), seed)


def levels_in(folder) -> torch.Tensor:
    return load_tensors(folder / "levels.safetensors")[0]["levels"]


def own_seed(run: RunDir) -> int:
    return int(np.random.SeedSequence((run.config.seed, 0x57E9)).generate_state(1, np.uint64)[0])


def fitted(run: RunDir, per_class: int) -> tuple[torch.Tensor, np.ndarray, torch.Tensor]:
    """Samples of the fit's own noise, drawn here, their labels, and the table that matches them to the real images."""
    labels, indices = np.repeat(np.arange(10), per_class), np.tile(np.arange(per_class), 10)
    drawn = plain(run, own_seed(run)).draw(torch.from_numpy(labels), torch.from_numpy(indices))
    train = run.packed().train
    real = torch.from_numpy(train.take(np.arange(len(train))))
    counts = [count_levels(x, torch.from_numpy(y), 10).numpy() for x, y in ((drawn, labels), (real, train.labels))]
    return drawn, labels, torch.from_numpy(matching_levels(*counts))


def test_samples_of_every_folder_go_through_the_table_of_the_stage(matching, monkeypatch, tmp_path):
    drawn, _, expected = fitted(matching, 16)
    generate_stage(matching)
    folder = matching.folder("generate")
    levels = levels_in(folder)
    # batches of other shapes round elsewhere, and a pixel may fall to the next level
    assert (match(drawn, levels).int() - match(drawn, expected).int()).abs().float().mean() < 0.1
    assert not torch.equal(levels, torch.arange(256, dtype=torch.uint8)[None])

    def as_drawn_and_matched(folder, seed):
        kept = open_kept(folder)
        images = torch.from_numpy(kept.take(np.arange(len(kept)))).int()
        asked = (torch.from_numpy(np.array(part)) for part in (kept.labels, kept.index))
        raw = plain(matching, seed).draw(*asked)
        return len(kept) and (match(raw, levels).int() - images).abs().float().mean() < 0.1 < (raw - images).abs().max()

    assert as_drawn_and_matched(folder, matching.config.seed)

    # it is fitted once: other quotas, seeds, folders and batch sizes take it over
    def no_more(*_):
        raise AssertionError("fitted again")

    monkeypatch.setattr(sampler_of_run, "_fit", no_more)
    options = {"run": matching.path, "set_": MATCHING, "per_class": 2, "seed": 5}
    command(**options, out=tmp_path / "out", batch_size=5)
    assert torch.equal(levels_in(tmp_path / "out"), levels) and as_drawn_and_matched(tmp_path / "out", 5)
    manifests = [json.loads((place / "manifest.json").read_text()) for place in (folder, tmp_path / "out")]
    assert manifests[0]["levels"] == manifests[1]["levels"]
    generate_stage(RunDir.open(matching.path, overrides=[*MATCHING, "generate.balance_to=7"]))
    shutil.rmtree(folder)
    command(**options, out=tmp_path / "out")  # its own is enough
    # and other steps do not
    with pytest.raises(AssertionError, match="fitted again"):
        command(**options, steps=2, out=tmp_path / "other")


def test_without_a_folder_it_is_fitted_in_memory(matching):
    sampler = open_sampler(matching, matching.config.generate, 0)
    assert not matching.folder("generate").exists()
    generate_stage(matching)
    assert torch.equal(sampler.levels, levels_in(matching.folder("generate")))
    assert sampler.at(sampler.timesteps).levels is None


def test_without_it_nothing_is_fitted_or_written(matching):
    run = RunDir.open(matching.path, overrides=["generate.match_histogram=false"])
    generate_stage(run)
    assert not (run.folder("generate") / "levels.safetensors").exists()
    assert not {"levels", "match_histogram"} & json.loads((run.folder("generate") / "manifest.json").read_text()).keys()


def test_a_search_judges_matched_samples(matching, monkeypatch):
    monkeypatch.setattr(timesteps, "_PER_CLASS", 4)
    run = RunDir.open(matching.path, overrides=[*MATCHING, "generate.search=2"])
    generate_stage(run)
    trial = json.loads((run.folder("generate") / "timesteps.json").read_text())["trials"][0]
    drawn, labels, levels = fitted(run, 4)
    assert plain(run, 0).timesteps == trial["timesteps"]  # the first is the spacing's
    extractor, val = load_extractor(run.folder("extractor"), torch.device("cpu")), run.packed().val
    seen = torch.from_numpy(val.take(np.arange(len(val))))
    real, raw, matched = (
        extractor.features(normalise(x)).detach().numpy() for x in (seen, drawn, match(drawn, levels))
    )
    distances = [class_frechet_distance(x, labels, real, val.labels) for x in (raw, matched)]
    assert trial["distance"] == pytest.approx(distances[1], rel=0.02)
    assert trial["distance"] != pytest.approx(distances[0], rel=0.04)
