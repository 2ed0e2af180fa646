"""Training a classifier: mixed images, crops, phases, resuming, several at a time."""

import contextlib

import numpy as np
import pytest
import torch
from classifier_trainings import (
    REAL,
    classifier_config,
    trained,
    training,
    weights,
    write_sets,
)

from diffult.data.config import DataConfig
from diffult.engine.cuda_graph import CUDAGraphRunner
from diffult.longtail.augment import mixed
from diffult.longtail.classification import (
    Training,
    batches_of,
    fit,
    fit_all,
    training_loader,
)
from diffult.longtail.methods import Mix
from ffcv_writers import (
    CenterCrop,
    ImageSet,
    RandomResizedCrop,
    open_set,
)


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> ImageSet:
    return write_sets(tmp_path_factory.mktemp("sets"))


def test_mixed_batches_of_a_set_ratio_train_on_after_a_break_as_without(both, tmp_path):
    for name in ("whole", "broken", "plain"):
        (tmp_path / name).mkdir()
    whole = trained(both, tmp_path / "whole", "mixup=0.2")
    with pytest.raises(KeyboardInterrupt):
        trained(both, tmp_path / "broken", "mixup=0.2", stop_at=6)
    assert torch.equal(trained(both, tmp_path / "broken", "mixup=0.2"), whole)
    assert not torch.equal(trained(both, tmp_path / "plain"), whole)


def test_cosine_decay_is_torchs_schedule_whatever_the_milestones(both, tmp_path, monkeypatch):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], 0.2)
    schedule, expected = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 8), []
    for _ in range(8):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()

    rates, step = [], torch.optim.SGD.step

    def recorded(optimizer: torch.optim.SGD) -> None:
        rates.append(float(optimizer.param_groups[0]["lr"]))
        step(optimizer)

    monkeypatch.setattr(torch.optim.SGD, "step", recorded)
    fit(training(both, tmp_path, "cosine_decay=true", "learning_rate=0.2", "warmup=0", "milestones=[0.5]"))
    assert rates == pytest.approx(expected)


@pytest.mark.parametrize("side_by_side", [False, True])
def test_several_trainings_end_as_each_alone(both, tmp_path, monkeypatch, side_by_side):
    """Side by side, with nothing in place of streams: the steps take turns."""
    monkeypatch.setattr("diffult.longtail.classification.side_by_side", lambda trainings: side_by_side)
    monkeypatch.setattr("diffult.longtail.classification._stream", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    methods = ("mix", "diffult+resample", "mix+logit_adjust")
    for folder in ("alone", "together"):
        (tmp_path / folder).mkdir()
    together = {t.title: t for t in fit_all([training(both, tmp_path / "together", method=m) for m in methods])}
    assert tuple(together) == methods and not any(t.model.training for t in together.values())
    for method in methods:
        assert torch.equal(trained(both, tmp_path / "alone", method=method), weights(together[method]))


def test_phases_change_the_images_and_resume_within_either(both, tmp_path):
    """Synthetic images in the first six of eight steps, none in the last two, after a break in one or the other too."""
    (tmp_path / "whole").mkdir()
    one = training(both, tmp_path / "whole", method="synthetic_first")
    assert [phase.steps for phase in one.phases] == [6, 2]
    drawn = [int(batch.synthetic.sum()) for _, batch in batches_of(one)]
    assert len(drawn) == 8 and min(drawn[:6]) > 0 and drawn[6:] == [0, 0]
    whole = trained(both, tmp_path / "whole", method="synthetic_first")
    for stop in (3, 7):
        (tmp_path / str(stop)).mkdir()
        with pytest.raises(KeyboardInterrupt):
            trained(both, tmp_path / str(stop), method="synthetic_first", stop_at=stop)
        assert torch.equal(trained(both, tmp_path / str(stop), method="synthetic_first"), whole)


def test_partners_of_their_own_order_follow_the_images(both, tmp_path):
    """CMO: each batch of the natural order is followed by one in which the classes are equally frequent."""
    one = training(open_set([both.paths[0]]), tmp_path, "steps=8", method="cmo")
    batches = [batch for _, batch in batches_of(one)]
    assert all(len(batch.labels) == 32 and len(set(batch.position.tolist())) == 32 for batch in batches)
    own, partners = (torch.cat([batch.labels.chunk(2)[i] for batch in batches]).bincount() for i in (0, 1))
    np.testing.assert_allclose(own / own.sum(), np.array(REAL) / sum(REAL), atol=0.02)
    np.testing.assert_allclose(partners / partners.sum(), 1 / 3, atol=0.02)
    fit(one)
    assert torch.isfinite(weights(one)).all()


@pytest.mark.parametrize("probability", [0.0, 1.0, 0.5])
def test_an_image_is_mixed_with_a_probability(probability):
    images, partners = torch.zeros(400, 1, 8, 8), torch.ones(400, 1, 8, 8)
    result, share = mixed(images, partners, 7, torch.arange(400), Mix("cutmix", 1.0, probability))
    torch.testing.assert_close(share, 1 - result.mean((1, 2, 3)))  # the area of the partner's rectangle
    touched = (share < 1).double().mean()
    assert (
        abs(
            float(touched)
            - probability
            * float((mixed(images, partners, 7, torch.arange(400), Mix("cutmix", 1.0))[1] < 1).double().mean())
        )
        < 0.08
    )


def test_a_head_trained_alone_leaves_the_trunk_as_it_was(both, tmp_path):
    one = training(both, tmp_path, method="crt")
    before = {name: value.clone() for name, value in one.model.state_dict().items()}
    fit(one)
    changed = {name for name, value in one.model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"head.weight", "head.bias"}


def test_crops_are_drawn_by_the_loader_in_training_and_fixed_in_evaluation(both):
    cpu, files = torch.device("cpu"), {"source": "folder", "path": "images"}
    raw, jpg = DataConfig(**files), DataConfig(**files, storage="jpg", image_size=8, max_short_side=9)
    plain, cropped = (classifier_config("image_size=6", f"augment.resized_crop={on}") for on in ("false", "true"))
    for data in (raw, jpg):
        crop = training_loader(both, data, cropped, (0, 9), cpu).crop
        assert isinstance(crop, RandomResizedCrop) and crop.size == 6
    assert training_loader(both, raw, plain, (0, 9), cpu).crop is None and raw.view(6, 0.9) is None
    assert jpg.view(6, 224 / 256) == CenterCrop(6, 224 / 256)


def test_a_network_trains_on_crops_smaller_than_the_images(both, tmp_path):
    assert torch.isfinite(trained(both, tmp_path, "image_size=6", "augment.resized_crop=true")).all()


@pytest.mark.gpu
def test_replayed_steps_side_by_side_train_as_plain_ones_in_turn(both, tmp_path, monkeypatch):
    """Eight steps: three of warm-up, one captured, the rest replayed. Float32 without TF32; convolutions may choose
    other algorithms, which round otherwise."""
    methods = ("mix", "diffult+resample", "mix+logit_adjust")
    for folder in ("plain", "replayed"):
        (tmp_path / folder).mkdir()

    def train(folder: str) -> list[Training]:
        trainings = [training(both, tmp_path / folder, "mixup=0.2", method=m, device="cuda") for m in methods]
        return list(fit_all(trainings))

    replayed = train("replayed")
    monkeypatch.setattr(CUDAGraphRunner, "__call__", lambda self, *tensors: self.function(*tensors))
    monkeypatch.setattr("diffult.longtail.classification._SMALL_STEP", 0.0)
    plain = train("plain")
    for a in replayed:
        (b,) = (b for b in plain if b.title == a.title)
        torch.testing.assert_close(weights(a), weights(b), rtol=1e-3, atol=1e-3)
