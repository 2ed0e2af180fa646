"""What people write into --set and config.toml: strings that look like numbers, other encodings, nonsense."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from hypothesis import example, given
from hypothesis import strategies as st
from mutations import VALUES, mutated_bytes, mutated_document

from diffult.config import Config, load_preset, override, parse_overrides, read_config
from diffult.errors import UserError
from diffult.runs.run_dir import RunDir

FOLDER = ["data.source=folder", "data.profile=natural", "data.val_per_class=0"]
CONFIG = load_preset("digits-lt")
TOML = CONFIG.to_toml({"diffusion.steps": "Because of that."})


def one_line(error: UserError) -> bool:
    return "\n" not in str(error) and len(str(error)) < 1000


@pytest.mark.parametrize(
    "text",
    ["2021", "1e3", "true", "inf", "nan", "2024-05-01", "07:32:00", "0x10", "[1]", "{a=1}", "a#b", "a = 1", " x "],
)
def test_a_string_is_what_is_written(text: str) -> None:
    config = load_preset("cifar10-lt-100", [*FOLDER, f"data.path={text}", f"name={text}"])
    assert config.data.path == config.name == text
    assert override(config, ["seed=1"]).data.path == text
    assert load_preset("digits-lt", [f"data.path={json.dumps(text)}"]).data.path == text  # quoted, as in TOML
    assert tomllib.loads(config.to_toml())["data"]["path"] == text


def test_spaces_around_the_equals_sign_are_no_part_of_a_string() -> None:
    assert load_preset("digits-lt", ["data.path = here"]).data.path == "here"


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("seed=1\nname=4", "seed: expected a number, got '1"),
        ("diffusion.steps=" + "9" * 30, "diffusion.steps: the number is too large"),
        ("diffusion.steps=" + "9" * 5000, "diffusion.steps: expected a number, got '999"),
        ("data.counts=[1, " + "9" * 30 + "]", "data.counts: the number is too large"),
        ("data.counts=" + "[" * 5000, "data.counts: "),
        ("data=" + "[" * 5000, "data: "),
        ("seed" + ".x" * 5000 + "=1", "unknown key"),
        ("x" * 5000 + "=1", "unknown key"),
        ("data.path=a\0b", "data.path: a text cannot hold a null character"),
        ("data.path=caf\udce9", r"data.path: 'caf\udce9' has bytes that are not UTF-8; rename it, or make a link"),
        ("=1", "expected section.key=value"),
    ],
)
def test_other_settings_are_refused_in_a_line(setting: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        load_preset("digits-lt", [setting])
    assert message in str(caught.value) and one_line(caught.value)


@pytest.mark.parametrize("extends", ["'own.toml'", "'other.toml'", "3", "['digits-lt']"])
def test_a_preset_extends_one_other_and_no_circle(tmp_path: Path, monkeypatch, extends: str) -> None:
    monkeypatch.chdir(tmp_path)
    Path("own.toml").write_text(f"extends = {extends}")
    Path("other.toml").write_text("extends = 'own.toml'")
    with pytest.raises(UserError, match="expected another preset's name"):
        load_preset("own.toml")


@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_a_config_that_an_editor_saved_again_is_read(tmp_path: Path, mark: bytes, line_end: str) -> None:
    (tmp_path / "config.toml").write_bytes(mark + TOML.replace("\n", line_end).encode())
    assert RunDir.open(tmp_path).config == CONFIG


@pytest.mark.parametrize(
    "content", ["# réglage\n".encode("latin-1"), "name = 'x'".encode("utf-16"), b"a = " + b"[" * 9999]
)
def test_other_files_are_refused_in_a_line(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "config.toml").write_bytes(content)
    with pytest.raises(UserError, match=r"config.toml: not valid TOML") as caught:
        RunDir.open(tmp_path)
    assert one_line(caught.value)


@given(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"])))
@example("line\u2028end\x85s")  # which str.splitlines would take for ends of lines
@example('"')
def test_any_path_survives_in_config_toml(tmp_path: Path, path: str) -> None:
    config = override(CONFIG, [f"data.path={json.dumps(path)}"] if path.isascii() else [f"data.path={path}"])
    (tmp_path / "config.toml").write_text(config.to_toml({"data.path": "Why."}), encoding="utf-8", newline="")
    assert read_config(tmp_path / "config.toml").data.path == config.data.path


def is_refused_or_works(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "config.toml").write_bytes(content)
    try:
        config = read_config(tmp_path / "config.toml")
    except UserError as error:
        assert one_line(error)
    else:
        (tmp_path / "config.toml").write_bytes(config.to_toml().encode())
        assert read_config(tmp_path / "config.toml") == config


@given(mutated_bytes(TOML.encode()))
def test_any_bytes_in_config_toml_are_read_or_refused_in_a_line(tmp_path: Path, content: bytes) -> None:
    is_refused_or_works(tmp_path, content)


def without_none(value: Any) -> Any:
    """TOML has none."""
    if isinstance(value, dict):
        return {key: without_none(part) for key, part in value.items() if part is not None}
    return [without_none(part) for part in value if part is not None] if isinstance(value, list) else value


@given(mutated_document(tomllib.loads(TOML)))
def test_any_values_in_config_toml_are_read_or_refused_in_a_line(tmp_path: Path, document: dict[str, Any]) -> None:
    is_refused_or_works(tmp_path, tomli_w.dumps(without_none(document)).encode("utf-8", "replace"))


KEYS = [
    f"{section}.{key}"
    for section, field in Config.model_fields.items()
    for key in getattr(field.annotation, "model_fields", {})
]


@given(st.sampled_from(KEYS) | st.text(max_size=8), st.text(max_size=12) | VALUES.map(str) | VALUES.map(repr))
def test_any_set_is_taken_or_refused_in_a_line(key: str, value: str) -> None:
    for take in (lambda text: override(CONFIG, [text]), lambda text: parse_overrides([text])):
        try:
            take(f"{key}={value}")
        except UserError as error:
            assert one_line(error)
