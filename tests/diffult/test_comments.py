"""Comments of settings stand above their keys, survive a reading and a changed setting, and change no value."""

import tomllib

from diffult.comments import comments_in, with_comments
from diffult.config import load_preset
from diffult.runs.run_dir import RunDir

WHY = {"name": "the folder's", "generate.balance_to": "a long reason " * 20, "extractor.augment.pad": "an eighth",
       "classifier.methods": "an array"}  # fmt: skip
WHY = {key: why.strip() for key, why in WHY.items()}


def test_a_commented_document_reads_as_without():
    plain = load_preset("digits-lt").to_toml()
    text = with_comments(plain, WHY | {"no.such": "left out"})
    assert tomllib.loads(text) == tomllib.loads(plain)
    assert comments_in(text) == WHY
    lines = text.splitlines()
    assert lines[lines.index("# an eighth") + 1] == "pad = 1" and max(map(len, lines)) <= 120
    assert with_comments(plain, {}) == plain


def test_a_hash_in_a_value_is_no_comment():
    assert comments_in('# first\na = "# no"\n# lost\n\nb = 1\n') == {"a": "first"}


def test_a_run_keeps_the_comments_of_settings_that_do_not_change(tmp_path):
    run = RunDir.start(tmp_path, load_preset("digits-lt"), WHY)
    run.save_config()
    RunDir.open(tmp_path, overrides=["generate.balance_to=7"]).save_config()
    again = RunDir.open(tmp_path)
    assert again.config.generate.balance_to == 7
    assert again.comments == {key: why for key, why in WHY.items() if key != "generate.balance_to"}
    before = (tmp_path / "config.toml").stat().st_mtime_ns
    again.save_config()
    assert (tmp_path / "config.toml").stat().st_mtime_ns == before
