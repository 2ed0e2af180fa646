"""Configuration: presets, overrides, and one-line errors."""

import re
import tomllib
from importlib import resources

import pytest

from diffult.config import Config, differences, load_preset, preset_names, read_config
from diffult.errors import UserError
from diffult.runs.run_dir import RunDir
from diffult.runs.stages import digest, reads


def test_a_new_setting_at_its_default_leaves_the_hash():
    class Later(Config):
        novelty: int = 0

    document = load_preset("digits-lt").model_dump()
    before = digest(reads(Config(**document), "generate"))
    assert digest(reads(Later(**document), "generate")) == before
    assert digest(reads(Later(**document | {"seed": 1}), "generate")) != before


def test_every_preset_loads_and_survives_a_round_trip(tmp_path):
    assert {"digits-lt", "fashion-mnist-lt", "imagenet-lt-64", "imagenet-lt-256"} <= set(preset_names())
    assert {f"cifar{c}-lt-{i}" for c in (10, 100) for i in (10, 50, 100)} <= set(preset_names())
    for name in preset_names():
        config = load_preset(name)
        assert config.name == name
        file = tmp_path / f"{name}.toml"
        file.write_text(config.to_toml())
        again = read_config(file)
        assert again == config


def test_published_recipes_in_the_comments_are_settings():
    """Kang et al., MiSLAS and RIDE on ImageNet-LT, as their configuration files have them."""
    text = (resources.files("diffult.presets") / "imagenet-lt-256.toml").read_text(encoding="utf-8")
    comments = " ".join(line for line in text.splitlines() if line.startswith("#"))
    recipes = [found.split() for found in re.findall(r"(?:[a-z_]+=[-.\w]+ ?){3,}", comments)]
    columns = ("epochs", "batch_size", "learning_rate", "weight_decay", "cosine_decay", "mixup", "warmup")
    rows = []
    for recipe in recipes:
        config = load_preset("imagenet-lt-64", [f"classifier.{setting}" for setting in recipe]).classifier
        rows.append(tuple(getattr(config, column) for column in columns))
    assert rows == [
        (90, 512, 0.2, 5e-4, True, 0, 0),
        (180, 256, 0.1, 5e-4, True, 0.2, 0),
        (100, 256, 0.1, 2e-4, False, 0, 0.05),
    ]


@pytest.mark.parametrize("imbalance", [10, 50, 100])
@pytest.mark.parametrize(("classes", "balance_to"), [(10, 5000), (100, 500)])
def test_cifar_presets_are_the_papers(classes, balance_to, imbalance):
    """shared hyper-parameters of DiffuLT's CIFAR rows: N_t, omega, alpha, 500k steps of 128, ResNet-32, 200 epochs."""
    c = load_preset(f"cifar{classes}-lt-{imbalance}")
    assert (c.data.source, c.data.imbalance, c.data.profile, c.data.seed) == (
        f"cifar{classes}",
        imbalance,
        "exponential",
        0,
    )
    assert (c.generate.balance_to, c.classifier.omega) == (balance_to, 0.3)
    d = c.diffusion
    assert (d.steps, d.batch_size, d.learning_rate, d.timesteps, d.warmup_steps) == (
        500_000,
        128,
        2e-4,
        1000,
        5000,
    )
    assert (d.schedule, d.prediction, d.ema, d.aid_alpha, d.cbdm_tau, d.cbdm_gamma) == (
        "linear",
        "epsilon",
        0.9999,
        0.1,
        1.0,
        0.25,
    )
    assert d.cbdm and d.aid and d.augment_probability == 0.12
    k = c.classifier
    assert (k.network, k.batch_size, k.learning_rate, k.momentum, k.weight_decay) == (
        "resnet32",
        128,
        0.1,
        0.9,
        2e-4,
    )
    assert k.steps == 200 * classes * balance_to // 128
    assert k.augment.pad == 4 and k.augment.flip


def test_override_and_differences():
    config = load_preset("digits-lt", ["diffusion.steps=7", "seed=3"])
    assert (config.diffusion.steps, config.seed) == (7, 3)
    base = load_preset("digits-lt")
    assert differences(base, config) == ["seed: 0 -> 3", f"diffusion.steps: {base.diffusion.steps} -> 7"]


@pytest.mark.parametrize(
    ("preset", "overrides", "expected"),
    [
        ("digit-lt", [], r"unknown preset 'digit-lt'; did you mean 'digits-lt'\?"),
        ("digits-lt", ["diffusion.stps=3"], r"unknown key 'diffusion.stps'; did you mean 'steps'\?"),
        ("digits-lt", ["difusion.steps=3"], r"unknown key 'difusion'; did you mean 'diffusion'\?"),
        ("digits-lt", ["diffusion.steps=many"], r"diffusion.steps: .*a number, got 'many'"),
        ("digits-lt", ["diffusion.steps='7'"], r"diffusion.steps: expected a number, got '7'"),
        ("digits-lt", ["data.n_max=true"], r"data.n_max: expected a number, got True"),
        ("digits-lt", ["generate.guidance=1", "diffusion.label_dropout=0"], r"guidance needs diffusion.label_dropout"),
        ("digits-lt", ["diffusion.steps=0"], r"diffusion.steps: .*greater than or equal to 1, got 0"),
        ("digits-lt", ["diffusion.prediction=w"], r"diffusion.prediction: .*'epsilon'"),
        ("digits-lt", ["diffusion=3"], r"diffusion: .*got 3"),
        ("digits-lt", ["diffusion.steps"], r"expected section.key=value"),
        ("digits-lt", ["generate.steps=5000"], r"generate.steps = 5000 exceeds"),
        ("digits-lt", ["generate.sigma_max=0.001"], r"generate: sigma_min = 0.05 is not below sigma_max = 0.001"),
        (
            "digits-lt",
            ["generate.timesteps=[9, 5]", "generate.steps=10"],
            r"generate: 2 timesteps, but steps = 10: set steps to 2, or",
        ),
        ("digits-lt", ["generate.timesteps=[9, 9]", "generate.steps=2"], r"timesteps = \[9, 9\] do not fall"),
        ("digits-lt", ["generate.timesteps=[9, -1]", "generate.steps=2"], r"\[9, -1\] do not fall, or not to 0"),
        ("digits-lt", ["generate.timesteps=[1000, 9]", "generate.steps=2"], r"1000 is not below diffusion.timesteps"),
        (
            "digits-lt",
            ["generate.timesteps=[9, 5]", "generate.steps=2", "generate.search=9"],
            r"timesteps are listed, but search = 9: set search to 0",
        ),
        ("digits-lt", ["generate.timesteps=[9, x]", "generate.steps=2"], r"generate.timesteps: .*got '\[9, x\]'"),
        ("digits-lt", ["generate.max_draws=inf"], r"generate.max_draws: .*finite"),
        ("digits-lt", ["groups.few=50"], r"groups: few = 50 and many = 25 overlap"),
        ("digits-lt", ["classifier.image_size=16"], r"classifier.image_size = 16 exceeds the stored 8"),
        ("digits-lt", ["classifier.methods=[]"], r"classifier.methods: .*at least 1 item"),
    ],
)
def test_bad_settings_are_one_line(preset, overrides, expected):
    with pytest.raises(UserError, match=expected) as caught:
        load_preset(preset, overrides)
    assert "\n" not in str(caught.value)


def test_run_directory_refuses_what_is_no_run(tmp_path):
    with pytest.raises(UserError, match=r"config.toml: not found; start a run with python -m diffult.run --preset"):
        RunDir.open(tmp_path / "absent")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("mine")
    with pytest.raises(UserError, match="not empty"):
        RunDir.open(tmp_path / "full", "digits-lt")
    assert (tmp_path / "full" / "thesis.tex").read_text() == "mine"


def test_one_process_at_a_time_works_in_a_run(tmp_path):
    run = RunDir.open(tmp_path / "run", "digits-lt")
    with run.stage("extractor"), pytest.raises(UserError, match="another process writes to it"), run.stage("diffusion"):
        pytest.fail("the second stage began")
    with run.stage("diffusion") as note:
        assert note is not None


def test_damaged_config_is_named(tmp_path):
    (tmp_path / "config.toml").write_text("name = ")
    with pytest.raises(UserError, match=r"config.toml: not valid TOML"):
        read_config(tmp_path / "config.toml")


def test_config_toml_is_plain_toml(tmp_path):
    document = tomllib.loads(load_preset("digits-lt").to_toml())
    assert document["data"]["source"] == "digits"
    assert set(document) == set(Config.model_fields)
