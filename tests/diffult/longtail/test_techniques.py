"""What the settings add to every method's training: augmentation, CutMix, sharpness-aware steps, averaged weights."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from diffult.config import load_preset
from diffult.longtail.augment import Policy, cutmix, cutout
from diffult.longtail.classification import Training, TrainingPhase, fit, training_batches, training_loader
from diffult.longtail.draws import TrainingSet, class_counts, natural
from diffult.longtail.methods import cross_entropy
from diffult.models.resnet import build_classifier
from diffult.runs.files import load_state
from ffcv_writers import ImageSet, Natural, open_set, write
from kernels.augment import augment

EVERYTHING = (
    "augment={pad=1, flip=true, policy='randaugment', cutout=4}",
    "cutmix=1.0",
    "sam=0.1",
    "ema=0.8",
    "label_smoothing=0.1",
)
STREAM = int(np.random.SeedSequence((0, 9)).generate_state(1)[0])


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> ImageSet:
    path = tmp_path_factory.mktemp("set") / "train.beton"
    pixels = np.random.default_rng(0).integers(0, 256, (42, 8, 8, 1), dtype=np.uint8)
    labels = np.repeat(np.arange(3), [30, 9, 3])
    write(path, pixels, labels=labels, synthetic=0 * labels, index=np.arange(42))
    return open_set([path])


def training(images: ImageSet, folder: Path, *overrides: str, steps: int = 8) -> Training:
    settings = ("batch_size=16", f"steps={steps}", *overrides)
    preset = load_preset("digits-lt", [f"classifier.{text}" for text in settings])
    config, cpu = preset.classifier, torch.device("cpu")
    torch.manual_seed(0)
    model = build_classifier(config.network, 3, 1, config.image_size)
    loader = training_loader(images, preset.data, config, (0, 9), cpu)
    train = TrainingSet(images.labels, images.synthetic, 3, config, 0)
    loss = cross_entropy(train, class_counts(train, natural(train)))
    folder.mkdir(exist_ok=True)
    return Training(
        "it", model, loader, (TrainingPhase(steps, Natural(42), loss),), config, folder / "state.pt", (0, 9), "hash",
        torch.float32,
    )  # fmt: skip


def seen(one: Training) -> list[torch.Tensor]:
    """Trains, and returns what the network saw in each pass."""
    inputs: list[torch.Tensor] = []
    one.model.trunk.register_forward_pre_hook(lambda _, given: inputs.append(given[0].clone()))
    fit(one)
    return inputs


def weights(one: Training) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in one.model.state_dict().items()}


def assert_equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert list(a) == list(b) and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("stop_at", [11, 12])  # in the first and in the second pass of a step
def test_with_everything_on_it_trains_on_after_a_break_as_without(images, tmp_path, stop_at):
    whole, broken = (training(images, tmp_path / name, *EVERYTHING) for name in ("whole", "broken"))
    fit(whole)
    passes = iter(range(100))

    def break_off(*_: object) -> None:
        if next(passes) == stop_at:
            raise KeyboardInterrupt

    broken.model.trunk.register_forward_pre_hook(break_off)
    with pytest.raises(KeyboardInterrupt):
        fit(broken)
    again = training(images, tmp_path / "broken", *EVERYTHING)
    fit(again)
    assert_equal(weights(again), weights(whole))
    done = training(images, tmp_path / "whole", *EVERYTHING)
    fit(done)
    assert_equal(weights(done), weights(whole))


def test_the_network_sees_policy_crop_cutout_and_cutmix_in_this_order(images, tmp_path):
    one = training(images, tmp_path, *EVERYTHING, "sam=0", steps=2)
    policy = Policy("randaugment", 8, STREAM)
    batches = training_batches(one.loader, Natural(42), STREAM, 16, 0, 2)
    for batch, x in zip(batches, seen(one), strict=True):
        y = policy(batch.images, batch.position.numpy())
        y = augment(y, STREAM, batch.position, size=8, pad=1, flip=True)
        y = cutout(y, STREAM, batch.position, 4)
        expected, _ = cutmix(y, y.roll(1, 0), STREAM, batch.position, 1.0)
        assert torch.equal(x, expected)


def test_labels_of_cut_images_count_by_area_and_are_smoothed(images, tmp_path):
    """The loss of the first step, from what the network saw, in a loop over images."""
    one = training(images, tmp_path, "cutmix=1.0", "label_smoothing=0.1", "augment.pad=0", steps=1)
    (batch,) = training_batches(one.loader, Natural(42), STREAM, 16, 0, 1)
    fresh = training(images, tmp_path, "augment.pad=0").model.train()
    (x,) = seen(one)
    y = augment(batch.images, STREAM, batch.position, size=8)
    _, share = cutmix(y, y.roll(1, 0), STREAM, batch.position, 1.0)
    target = F.one_hot(batch.labels, 3) * 0.9 + 0.1 / 3
    target = share[:, None] * target + (1 - share[:, None]) * target.roll(1, 0)
    expected = -(target * F.log_softmax(fresh(x), 1)).sum(1).mean()
    assert load_state(tmp_path / "state.pt")["first"] == pytest.approx(float(expected.detach()), rel=1e-5)


def test_a_sharpness_aware_step_descends_from_above_and_counts_the_batch_once(images, tmp_path):
    """One step without momentum's past, against two passes written out."""
    one = training(images, tmp_path / "sam", "sam=0.5", "augment.pad=0", "weight_decay=0.0", "warmup=0", steps=1)
    two = training(images, tmp_path / "plain", "augment.pad=0", "weight_decay=0.0", "warmup=0", steps=1)
    (batch,) = training_batches(one.loader, Natural(42), STREAM, 16, 0, 1)
    model = training(images, tmp_path / "by hand").model.train()
    x, parameters = augment(batch.images, STREAM, batch.position, size=8), list(model.parameters())
    rate, before = one.config.learning_rate, [p.detach().clone() for p in parameters]
    first = torch.autograd.grad(F.cross_entropy(model(x), batch.labels), parameters)
    norm = torch.cat([g.flatten() for g in first]).norm()
    with torch.no_grad():
        for p, g in zip(parameters, first, strict=True):
            p += 0.5 * g / norm
    second = torch.autograd.grad(F.cross_entropy(model(x), batch.labels), parameters)
    fit(one), fit(two)
    for p, w, g in zip(one.model.parameters(), before, second, strict=True):
        torch.testing.assert_close(p.detach(), w - rate * g, rtol=1e-5, atol=1e-6)
    for (name, a), b in zip(one.model.named_buffers(), two.model.buffers(), strict=True):
        assert torch.equal(a, b), name
    assert not torch.equal(next(one.model.parameters()), next(two.model.parameters()))


def test_predictions_come_from_the_average_and_the_training_goes_on_from_the_weights(images, tmp_path):
    one, plain = training(images, tmp_path / "average", "ema=0.3"), training(images, tmp_path / "plain")
    history: list[list[torch.Tensor]] = []
    plain.model.trunk.register_forward_pre_hook(
        lambda *_: history.append([p.detach().clone() for p in averaged(plain.model)])
    )
    fit(one), fit(plain)
    assert_equal(load_state(tmp_path / "average/state.pt")["model"], weights(plain))
    history.append([p.detach() for p in averaged(plain.model)])
    average = [p.double() for p in history[0]]
    for n, step in enumerate(history[1:]):
        decay = min(0.3, (1 + n) / (10 + n))
        average = [decay * a + (1 - decay) * p for a, p in zip(average, step, strict=True)]
    for p, a in zip(averaged(one.model), average, strict=True):
        torch.testing.assert_close(p.detach().double(), a, rtol=1e-5, atol=1e-7)


def averaged(model: torch.nn.Module) -> list[torch.Tensor]:
    """Its parameters and the statistics of its batch norms."""
    return [value for value in model.state_dict().values() if value.is_floating_point()]
