"""What the pages show can be typed: commands, options, settings and presets exist, code runs, links lead somewhere."""

import importlib
import itertools
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import typer

from diffult.config import load_preset, preset_names
from diffult.longtail.methods import METHODS, MODIFIERS
from ffcv_writers import write
from ffcv_writers.readers import READERS

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
README = PAGES[0].read_text(encoding="utf-8")


def commands() -> list[list[str]]:
    """Every `python -m` or torchrun command in the README's indented blocks, as (module, argument, ...)."""
    lines = README.replace("\\\n", " ").splitlines()
    words = [shlex.split(line, comments=True) for line in lines if line.startswith("    ") and " -m " in line]
    return [[word for word in line[line.index("-m") + 1 :] if word != "--"] for line in words]


def slug(heading: str) -> str:
    return re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize("typed", commands(), ids=lambda typed: " ".join(typed)[:60])
def test_commands_exist_and_take_these_options(typed):
    app = typer.Typer()
    app.command()(importlib.import_module(typed[0]).command)
    known = {option for parameter in typer.main.get_command(app).params for option in parameter.opts}
    assert {word for word in typed if word.startswith("--")} <= known


def test_settings_and_presets_exist():
    for typed in commands():
        preset = typed[typed.index("--preset") + 1] if "--preset" in typed else "digits-lt"
        load_preset(preset, [value for word, value in itertools.pairwise(typed) if word == "--set"])
    named = set()
    for name, variants in re.findall(r"`([a-z0-9-]+-lt[a-z0-9-]*)(?:\{([\d,]+)\})?`", README):
        named |= {name + variant for variant in variants.split(",")}
    assert named == set(preset_names())
    assert all(
        f"`{source}`" in README or f"data.source={source} " in README for source in READERS if source != "digits"
    )


def test_the_library_example_runs(tmp_path, monkeypatch):
    for file, synthetic in (("pack/train.beton", False), ("generate/synthetic.beton", True)):
        target = tmp_path / "RUN" / file
        target.parent.mkdir(parents=True)
        images, numbers = np.zeros((100, 8, 8, 1), np.uint8), np.arange(100)
        write(target, images, labels=numbers % 10, synthetic=np.full(100, synthetic), index=numbers)
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    names: dict = {}
    exec(code, names)
    assert names["batch"].images.shape == (64, 8, 8, 1) and names["batch"].synthetic.any()
    assert len([line for line in code.splitlines() if line]) == 6


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    text = page.read_text(encoding="utf-8")
    for link in re.findall(r"\]\((?!https?:)([^)\s]+)\)", text):
        path, _, anchor = link.partition("#")
        target = (page.parent / path) if path else page
        assert target.exists(), link
        if anchor:
            headings = re.findall(r"^#+ (.+)$", target.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in map(slug, headings), link


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 130


def test_every_method_is_explained():
    text = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    rows = [line.split("|")[1] for line in text.splitlines() if line.startswith("| `")]
    named = re.findall(r"`([a-z_]+)`", " ".join(rows))
    assert set(named) == {*METHODS, *MODIFIERS}
