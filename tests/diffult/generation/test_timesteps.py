"""Timesteps searched by the samples they give: found again, resumed, shared, and none without a folder."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

from diffult.errors import UserError
from diffult.generate import command, generate_stage, open_sampler
from diffult.generation import timesteps
from diffult.longtail.extractor import load_extractor
from diffult.longtail.frechet import class_frechet_distance
from diffult.runs import sampler as sampler_of_run
from diffult.runs.run_dir import RunDir
from kernels.augment import normalise

SEARCH = ["generate.search=7", "generate.sampler=dpm++", "generate.steps=3", "generate.balance_to=6"]


@pytest.fixture
def searching(tiny_run, tmp_path, monkeypatch) -> RunDir:
    """The tiny run before its generate stage, with a search of seven lists by four samples a class."""
    monkeypatch.setattr(timesteps, "_PER_CLASS", 4)
    for stage in ("pack", "extractor", "diffusion"):
        shutil.copytree(tiny_run.path / stage, tmp_path / "run" / stage)
    shutil.copy(tiny_run.path / "config.toml", tmp_path / "run")
    return RunDir.open(tmp_path / "run", overrides=SEARCH)


def trials(folder) -> dict[tuple[int, ...], float]:
    return {tuple(t["timesteps"]): t["distance"] for t in json.loads((folder / "timesteps.json").read_text())["trials"]}


def no_more(*_, **__):
    def distance(listed):
        raise AssertionError(f"{listed} was tried again")

    return distance


def test_the_stage_draws_at_the_nearest_of_the_lists(searching, monkeypatch):
    with pytest.raises(UserError, match=r"has not searched its timesteps; run python -m diffult.generate --run"):
        open_sampler(searching, searching.config.generate, 0)
    generate_stage(searching)
    folder = searching.folder("generate")
    tried, manifest = trials(folder), json.loads((folder / "manifest.json").read_text())
    assert len(tried) == 7
    best = min(tried, key=tried.__getitem__)
    assert manifest["timesteps"] == list(best) and "spacing" not in manifest
    assert open_sampler(searching, searching.config.generate, 0).timesteps == list(best)

    # other quotas, other folders and fewer tries search no more
    monkeypatch.setattr(sampler_of_run, "trial_distance", no_more)
    generate_stage(RunDir.open(searching.path, overrides=["generate.balance_to=7"]))
    command(run=searching.path, per_class=1)
    assert json.loads((searching.path / "generated" / "manifest.json").read_text())["timesteps"] == list(best)
    fewer = searching.config.generate.model_copy(update={"search": 2})
    assert open_sampler(searching, fewer, 0).timesteps == list(min(list(tried)[:2], key=tried.__getitem__))
    # and another sampler does
    with pytest.raises(AssertionError, match="was tried again"):
        command(run=searching.path, per_class=1, sampler="ddim", out=searching.path / "other")


def test_an_interrupted_search_goes_on(searching, monkeypatch):
    generate_stage(searching)
    folder = searching.folder("generate")
    whole = trials(folder)
    content = json.loads((folder / "timesteps.json").read_text())
    content["trials"] = content["trials"][:4]
    for file in folder.iterdir():
        if file.name != "started.json":
            file.unlink()
    (folder / "timesteps.json").write_text(json.dumps(content))
    asked, real = [], timesteps._features
    monkeypatch.setattr(timesteps, "_features", lambda sampler, *rest: asked.append(sampler) or real(sampler, *rest))
    generate_stage(searching)
    assert trials(folder) == whole
    assert [tuple(sampler.timesteps) for sampler in asked] == list(whole)[4:]


def test_a_distance_is_that_of_the_samples_in_the_extractors_features(searching):
    generate_stage(searching)
    listed, distance = next(iter(trials(searching.folder("generate")).items()))
    settings = searching.config.generate.model_copy(update={"search": 0})
    extractor = load_extractor(searching.folder("extractor"), torch.device("cpu"))
    seed = int(np.random.SeedSequence((searching.config.seed, 0x57E9)).generate_state(1, np.uint64)[0])
    labels, indices = np.repeat(np.arange(10), 4), np.tile(np.arange(4), 10)
    sampler = open_sampler(searching, settings, seed)
    assert sampler.timesteps == list(listed)  # the first is the spacing's
    drawn = sampler.draw(torch.from_numpy(labels), torch.from_numpy(indices))
    val = searching.packed().val
    seen = torch.from_numpy(val.take(np.arange(len(val))))
    features = [extractor.features(normalise(images)).detach().numpy() for images in (drawn, seen)]
    assert distance == pytest.approx(class_frechet_distance(features[0], labels, features[1], val.labels), rel=0.02)


def test_classes_with_too_few_validation_images_are_not_judged(searching, monkeypatch):
    packed = searching.packed()
    labels = packed.val.labels.copy()
    labels[np.flatnonzero(labels == 3)[1:]] = 4  # one image of class 3, and none of class 9
    labels[labels == 9] = 8
    packed.val.labels = labels
    monkeypatch.setattr(RunDir, "packed", lambda run: packed)
    compared, real = [], timesteps.class_frechet_distance
    monkeypatch.setattr(
        timesteps, "class_frechet_distance", lambda *sets: compared.append((sets[1], sets[3])) or real(*sets)
    )
    generate_stage(searching)
    drawn, held_out = compared[0]
    enough = [0, 1, 2, 4, 5, 6, 7, 8]
    assert np.array_equal(drawn, np.repeat(enough, 4))
    assert np.array_equal(np.bincount(held_out), np.where(np.isin(np.arange(9), enough), np.bincount(labels), 0))

    # what was tried is for these classes alone: with none left, and with all, it is of no use
    packed.val.labels = np.arange(len(labels)) // 5
    monkeypatch.setattr(sampler_of_run, "trial_distance", no_more)
    settings = searching.config.generate
    with pytest.raises(AssertionError, match="was tried again"):
        open_sampler(searching, settings, 0, folder=searching.folder("generate"))
    for val in (None, packed.val):
        monkeypatch.setattr(sampler_of_run, "_ENOUGH", 6)
        monkeypatch.setattr(RunDir, "packed", lambda run, val=val: replace(packed, val=val))
        with pytest.raises(
            UserError, match=r"no class has 6 validation images .* set data\.val_per_class to 2 or more"
        ):
            open_sampler(searching, settings, 0, folder=searching.folder("generate"))


def test_a_refused_request_leaves_the_folder_as_it_was(searching, tmp_path, monkeypatch):
    run = {"run": searching.path, "set_": [*SEARCH, "generate.match_histogram=true"], "per_class": 1}
    out = tmp_path / "out"
    command(**run, out=out)
    files = contents(out)
    assert {"timesteps.json", "levels.safetensors", "manifest.json", "synthetic.beton"} <= files.keys()

    def refused(message, **options):
        with pytest.raises(UserError, match=rf"out: holds samples made otherwise \({message}"):
            command(**run | options, out=out)
        assert contents(out) == files

    with monkeypatch.context() as patch:  # refused before the search, and before the fit where there is none
        patch.setattr(sampler_of_run, "trial_distance", no_more)
        refused(r"sampler: dpm\+\+, now ddim", sampler="ddim")
        refused("seed: 0, now 5", seed=5)
        refused("steps: 3, now 2", set_=[*run["set_"], "generate.search=0"], steps=2)
        refused("levels: .*, now None", set_=SEARCH)

    # timesteps that only the search finds: the lists it tried are added, the levels stay
    found = tuple(json.loads(files["manifest.json"])["timesteps"])
    other = (found[0], found[1], found[2] + 1)
    monkeypatch.setattr(
        sampler_of_run, "search", lambda sampler, *_: sampler.at(list(other if sampler.settings.search == 9 else found))
    )
    refused("timesteps: ", set_=[*run["set_"], "generate.search=9"])

    (out / "summary.json").unlink()
    (out / "grid.png").unlink()
    command(**run, out=out)  # resumes: nothing is drawn again
    kept = ("synthetic.beton", "candidates.safetensors", "manifest.json", "levels.safetensors", "timesteps.json")
    assert [contents(out)[name] for name in kept] == [files[name] for name in kept]


def contents(folder) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}
