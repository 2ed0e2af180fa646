"""What a change of settings redoes, what runs can share, and how packed images outlive their source."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import TINY
from PIL import Image

from diffult import evaluate, generate, report
from diffult.config import load_preset
from diffult.engine.distributed import World
from diffult.errors import UserError
from diffult.run import run_pipeline
from diffult.runs import run_dir
from diffult.runs.files import lock_folder
from diffult.runs.run_dir import RunDir
from diffult.runs.stages import STAGES, affected
from diffult.train_classifier import method_hash
from diffult.train_diffusion import train_diffusion


@pytest.fixture
def copied(tiny_run, tmp_path) -> RunDir:
    shutil.copytree(tiny_run.path, tmp_path / "copy")
    return RunDir.open(tmp_path / "copy")


UMASK = os.umask(0)
os.umask(UMASK)


def written(run: RunDir) -> dict[str, int]:
    """When each finished stage ended, by stage."""
    files = {stage: run.folder(stage) / "done.json" for stage in STAGES}
    return {stage: file.stat().st_mtime_ns for stage, file in files.items() if file.exists()}


@pytest.mark.parametrize(
    ("setting", "redone"),
    [
        ("classifier.omega=0.7", ["classifier"]),
        ("groups.few=4", []),
        ("generate.steps=1", ["generate", "classifier"]),
        ("unet.channels=4", ["diffusion", "generate", "classifier"]),
        ("extractor.steps=5", ["extractor", "diffusion", "generate", "classifier"]),  # TINY has L_AID
        ("generate.batch_size=7", []),
        ("diffusion.checkpoint_every=2", []),
    ],
)
def test_a_changed_setting_redoes_what_reads_it_and_nothing_else(copied, setting, redone, caplog):
    before = written(copied)
    caplog.set_level("INFO")
    run = RunDir.open(copied.path, overrides=[setting])
    assert written(run) == before  # nothing is lost before a stage starts
    if redone:
        assert f"will be redone: {', '.join(redone)}, evaluate, report; kept: pack" in caplog.text
    run_pipeline(run)
    after = written(run)
    assert [stage for stage in after if after[stage] != before[stage]] == redone
    assert RunDir.open(copied.path).config == run.config  # config.toml follows
    assert json.loads((run.path / "metrics.json").read_text())["hash"] == run.hash("evaluate")


def test_omega_keeps_the_weights_of_methods_that_do_not_read_it(copied):
    plain, ours = (copied.folder("classifier") / f"{name}.safetensors" for name in ("ce", "diffult"))
    before = plain.stat().st_mtime_ns, ours.stat().st_mtime_ns
    run_pipeline(RunDir.open(copied.path, overrides=["classifier.omega=0.7"]), "classifier")
    assert plain.stat().st_mtime_ns == before[0] and ours.stat().st_mtime_ns != before[1]


def test_what_a_stage_reads_is_its_settings_and_those_upstream():
    base = load_preset("digits-lt", ["generate.spacing=log_snr"])

    def changed(*settings: str) -> list[str]:
        return affected(base, load_preset("digits-lt", ["generate.spacing=log_snr", *settings]))

    assert changed("data.path=elsewhere") == []
    assert changed("data.seed=5") == list(STAGES)
    assert changed("extractor.steps=5") == ["extractor", "generate", "classifier", "evaluate", "report"]  # no L_AID
    assert changed("diffusion.steps=5") == ["diffusion", "generate", "classifier", "evaluate", "report"]
    assert changed("seed=5") == list(STAGES[1:])
    assert changed("generate.sigma_max=50") == []  # of spacing "sigma"
    assert changed("generate.spacing=sigma", "generate.sigma_max=50")[0] == "generate"


@pytest.mark.parametrize("setting", [None, "generate.search=2", "diffusion.early_stopping=true"])
def test_methods_read_the_validation_images_that_their_samples_were_chosen_by(copied, setting):
    run = RunDir.open(copied.path, overrides=[setting, "diffusion.check_every=2"] if setting else [])
    methods, file = ("ce", "diffult"), run.folder("pack") / "done.json"
    before, record = [method_hash(run, name) for name in methods], json.loads(file.read_text())
    record["held_out"]["val"] = "of other images"
    file.write_text(json.dumps(record))
    after = [method_hash(run, name) for name in methods]
    assert [a != b for a, b in zip(before, after, strict=True)] == [False, setting is not None]


def test_runs_share_the_stages_that_read_the_same(tiny_run, tmp_path):
    run = RunDir.open(tmp_path / "new", "digits-lt", [*TINY, "generate.steps=1"])
    run.share(tiny_run)
    shared = written(run)
    assert list(shared) == ["pack", "extractor", "diffusion"]
    run_pipeline(run)
    assert {stage: written(run)[stage] for stage in shared} == shared
    ema = "diffusion/ema.safetensors"
    assert (run.path / ema).read_bytes() == (tiny_run.path / ema).read_bytes()


def test_other_images_are_not_shared(tiny_run, tmp_path):
    run = RunDir.open(tmp_path / "new", "digits-lt", [*TINY, "data.seed=9"])
    with pytest.raises(UserError, match=r"--from .*tiny: its images may not be those of this run \(.*seed: 9 -> 0\)"):
        run.share(tiny_run)


def test_an_existing_run_keeps_its_preset(copied):
    with pytest.raises(UserError, match=r"holds a run of preset 'digits-lt', not 'fashion-mnist-lt'"):
        RunDir.open(copied.path, "fashion-mnist-lt")


def test_a_run_of_an_earlier_version_is_refused(copied):
    file = copied.path / "config.toml"
    file.write_text(file.read_text().replace("version = 3\n", ""))
    with pytest.raises(UserError, match=r"config.toml: a run of an earlier version, .*start a new one") as caught:
        RunDir.open(copied.path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("settings", [[], ["extractor.steps=5"], ["generate.batch_size=7"]])
def test_a_second_writer_is_refused_and_changes_nothing(copied, settings):
    (copied.folder("classifier") / "done.json").unlink()

    def content() -> dict[Path, bytes]:
        return {file: file.read_bytes() for file in copied.path.rglob("*") if file.is_file() and file.name != ".lock"}

    before = content()
    with lock_folder(copied.path), pytest.raises(UserError, match="another process writes to it"):
        run_pipeline(RunDir.open(copied.path, overrides=settings))
    assert content() == before


@pytest.mark.parametrize("setting", ["unet.attention_resolutions=[3]", "extractor.network=resnet33"])
def test_networks_that_do_not_fit_are_refused_before_a_finished_one_is_deleted(copied, setting):
    before = written(copied)
    with pytest.raises(UserError, match=r"resolution|resnet33"):
        RunDir.open(copied.path, overrides=[setting])
    assert written(copied) == before and RunDir.open(copied.path).config == copied.config


def test_a_batch_that_cannot_be_shared_is_refused_before_a_finished_model_is_deleted(copied):
    run = RunDir.open(copied.path, overrides=["diffusion.batch_size=7"])
    with pytest.raises(UserError, match=r"diffusion.batch_size = 7 cannot be shared by 2 processes"):
        train_diffusion(run, World(0, 2))
    assert copied.done("diffusion")


def test_sharing_that_is_killed_leaves_no_half_stage(tiny_run, tmp_path, monkeypatch):
    """done.json may be copied before the files that it lists."""
    run, link, copied = RunDir.open(tmp_path / "new", "digits-lt", TINY), run_dir._link, []

    def dying(source, target):
        copied.append(Path(source).name)
        if len(copied) > 1 and "done.json" in copied:
            raise KeyboardInterrupt
        link(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(run_dir, "_link", dying)
        with pytest.raises(KeyboardInterrupt):
            run.share(tiny_run)
    assert not run.folder("pack").exists()
    again = RunDir.open(tmp_path / "new", "digits-lt", TINY)
    again.share(tiny_run)
    assert list(written(again)) == ["pack", "extractor", "diffusion", "generate"]
    assert not list(again.path.glob(".*.tmp"))


def test_what_a_process_killed_at_its_start_left_is_no_run(tmp_path):
    for name in (".lock", ".config.toml.7.tmp"):
        (tmp_path / name).touch()
    assert RunDir.open(tmp_path, "digits-lt").config.name == "digits-lt"


def test_files_are_utf_8_whatever_the_locale(tmp_path):
    """An encoding left to the locale is an error here."""
    code = """
import pathlib, sys
from diffult.runs.files import read_json, write_text
file = pathlib.Path(sys.argv[1])
text = '{"name": "größer"}'
write_text(file, text)
assert file.read_bytes() == text.encode() and read_json(file) == {"name": "größer"}
"""
    command = [sys.executable, "-X", "warn_default_encoding", "-W", "error::EncodingWarning", "-c", code]
    out = subprocess.run([*command, str(tmp_path / "file")], capture_output=True, text=True, check=False)
    assert out.returncode == 0, out.stderr


# the source


def write_folder(root: Path, classes: tuple[str, ...] = ("cat", "dog"), size: int = 8) -> Path:
    generator = np.random.default_rng(0)
    for split, count in (("train", 6), ("test", 2)):
        for name in classes:
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = generator.integers(0, 256, (size, size, 3), np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{i}.png")
    return root


FOLDER = [
    "data.source=folder", "data.channels=3", "data.profile=natural", "data.val_per_class=0", "data.n_max=6",
    "generate.balance_to=8",
]  # fmt: skip


@pytest.fixture
def on_folder(tmp_path) -> tuple[RunDir, Path]:
    """A run that has packed the images of a folder, and the folder."""
    source = write_folder(tmp_path / "images")
    run = RunDir.open(tmp_path / "run", "digits-lt", [*TINY, *FOLDER, f"data.path={source}"])
    run_pipeline(run, "pack")
    return run, source


def test_after_pack_the_source_is_needed_no_more(on_folder):
    run, source = on_folder
    shutil.rmtree(source)
    run_pipeline(RunDir.open(run.path))
    assert (run.path / "report.html").exists()


def test_classes_named_by_any_bytes_reach_the_report(tmp_path):
    """Such as an archive made on an old system leaves them: no text in any encoding of this one."""
    classes = tuple(os.fsdecode(name) for name in (b"caf\xe9", b"caf\xe8", b"a\nb\x01"))
    source = write_folder(tmp_path / "images", classes)
    run = RunDir.open(tmp_path / "run", "digits-lt", [*TINY, *FOLDER, f"data.path={source}"])
    run_pipeline(run)
    assert run.packed().classes == tuple(sorted(classes))
    page = (run.path / "report.html").read_bytes().decode("utf-8")
    assert r"caf\udce9" in page and r"caf\udce8" in page


@pytest.fixture
def read_only(tiny_run, tmp_path):
    """The tiny run on a read-only file system, which stops even root."""
    place = tmp_path / "read-only"
    place.mkdir()
    mount = ["mount", "--bind", "-o", "ro", str(tiny_run.path), str(place)]
    if os.geteuid() or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting needs root")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def test_a_finished_run_that_cannot_be_written_to_is_drawn_from_and_reported(read_only, tmp_path, capsys):
    with pytest.raises(OSError, match="Read-only file system"):
        (read_only / "file").touch()
    generate.command(run=read_only, fast=True, steps=2, per_class=1, out=tmp_path / "drawn")
    assert json.loads(capsys.readouterr().out)["accepted"] == 10
    report.command(read_only, tmp_path / "report.html")
    assert (tmp_path / "report.html").stat().st_size > 10_000
    evaluate.command(read_only)
    assert "DiffuLT" in capsys.readouterr().out
    run_pipeline(RunDir.open(read_only), "evaluate")  # every stage is finished
    with pytest.raises(OSError, match="Read-only file system"):
        generate.command(run=read_only, fast=True, steps=2, per_class=1)
    new = RunDir.open(tmp_path / "new", "digits-lt", TINY)
    new.share(RunDir.open(read_only))
    assert list(written(new)) == ["pack", "extractor", "diffusion", "generate"]


def test_a_source_that_changed_after_pack_is_logged_and_the_packed_images_are_used(on_folder, caplog):
    run, source = on_folder
    shutil.move(source / "train" / "dog", source / "train" / "wolf")
    run_pipeline(RunDir.open(run.path), "extractor")
    assert "has changed since it was packed" in caplog.text and "dog" in caplog.text
    assert run.packed().classes == ("cat", "dog")


def test_each_file_is_decoded_once_in_a_whole_run(tmp_path, monkeypatch):
    source = write_folder(tmp_path / "images")
    opened: list[str] = []
    load = Image.open

    def counted(file, *rest, **named):
        opened.append(str(file))
        return load(file, *rest, **named)

    monkeypatch.setattr(Image, "open", counted)
    run_pipeline(RunDir.open(tmp_path / "run", "digits-lt", [*TINY, *FOLDER, f"data.path={source}"]))
    assert len(opened) == 2 * (6 + 2)


def test_a_moved_source_is_no_change(on_folder, tmp_path, caplog):
    run, source = on_folder
    source.rename(tmp_path / "elsewhere")
    moved = RunDir.open(run.path, overrides=[f"data.path={tmp_path / 'elsewhere'}"])
    run_pipeline(moved, "extractor")
    assert "has changed" not in caplog.text and "will be redone" not in caplog.text


def test_a_repack_of_other_images_deletes_nothing(on_folder):
    run, source = on_folder
    run_pipeline(run, "extractor")
    weights = run.folder("extractor") / "weights.safetensors"
    before = weights.read_bytes()
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(source / "train" / "cat" / "0.png")
    (run.folder("pack") / "test.beton").unlink()
    with pytest.raises(UserError, match=r"no longer gives the images that extractor were made from; restore it"):
        run_pipeline(RunDir.open(run.path))
    assert weights.read_bytes() == before


def test_other_test_images_leave_what_was_trained(on_folder):
    run, source = on_folder
    run_pipeline(run)
    before = written(run)
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(source / "test" / "cat" / "0.png")
    (run.folder("pack") / "test.beton").unlink()
    metrics = json.loads((run.path / "metrics.json").read_text())
    run_pipeline(RunDir.open(run.path))
    assert {stage for stage, time in written(run).items() if time != before[stage]} == {"pack"}
    assert json.loads((run.path / "metrics.json").read_text())["hash"] != metrics["hash"]


def test_another_place_with_other_images_is_refused(on_folder, tmp_path):
    run, _ = on_folder
    write_folder(tmp_path / "others", ("cat", "wolf"))
    with pytest.raises(UserError, match=r"does not hold the images that were packed \(class 'dog' is gone\)"):
        run_pipeline(RunDir.open(run.path, overrides=[f"data.path={tmp_path / 'others'}"]))


def test_files_follow_the_umask(tiny_run):
    modes = {file.name: file.stat().st_mode & 0o777 for file in tiny_run.path.rglob("*") if file.is_file()}
    del modes[".lock"]
    assert set(modes.values()) == {0o666 & ~UMASK}, modes
