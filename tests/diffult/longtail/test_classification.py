"""Training a classifier: in which order it draws its images, mixed images and their loss, and resuming."""

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from diffult.config import load_preset
from diffult.errors import UserError
from diffult.longtail.classification import fit, mixed_cross_entropy, training_batches
from diffult.longtail.methods import RECIPES
from diffult.models.resnet import build_classifier
from diffult.train_classifier import training_order
from ffcv_writers import ClassBalanced, ImageSet, Loader, Natural, Ratio, Weighted, open_set, suffix, write

REAL, GENERATED = [30, 9, 3], [0, 21, 27]


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> ImageSet:
    """Three classes, long-tailed, filled up to 30 each."""
    folder = tmp_path_factory.mktemp("sets")
    paths = []
    for kind, counts in enumerate((REAL, GENERATED)):
        labels = np.repeat(np.arange(3), counts)
        images = np.random.default_rng(kind).integers(0, 256, (len(labels), 8, 8, 1), dtype=np.uint8)
        paths.append(folder / f"{kind}{suffix()}")
        write(paths[-1], images, labels=labels, synthetic=0 * labels + kind, index=np.arange(len(labels)))
    return open_set(paths)


def classifier_config(*overrides: str):
    return load_preset("digits-lt", [f"classifier.{text}" for text in overrides]).classifier


def test_synthetic_share_sets_every_batch_and_the_prior(both):
    config = classifier_config("batch_size=16", "synthetic_share=0.25")
    order, drawn = training_order(RECIPES["diffult+logit_adjust"], config, both)
    assert isinstance(order, Ratio)
    batches = list(training_batches(Loader(both, 16), order, 3, 0, 42 * 4))
    assert all(int(batch.synthetic.sum()) == 4 for batch in batches)
    # 168 steps show every real image 48 times and every synthetic one 14 times: `drawn` must say how often each comes.
    times = np.bincount(torch.cat([batch.sample for batch in batches]).numpy(), minlength=len(both))
    np.testing.assert_allclose(times / times.sum(), drawn / drawn.sum(), rtol=1e-12)


def test_resampling_by_the_square_root_draws_classes_so(both):
    config = classifier_config("resample_power=0.5")
    order, drawn = training_order(RECIPES["resample"], config, both)
    assert isinstance(order, Weighted)
    long_tail = open_set([both.paths[0]])
    order, drawn = training_order(RECIPES["resample"], config, long_tail)
    of_class = np.bincount(long_tail.labels[order.stream(0, 0, 42 * 200)]) / (42 * 200)
    roots = np.sqrt(REAL)
    np.testing.assert_allclose(of_class, roots / roots.sum(), atol=1 / 42)
    np.testing.assert_allclose(np.bincount(long_tail.labels, drawn), roots)


@pytest.mark.parametrize("method", ["ce", "diffult"])
def test_without_options_every_image_comes_once_an_epoch(both, method):
    order, drawn = training_order(RECIPES[method], classifier_config(), both)
    assert isinstance(order, Natural) and order.length == 90 and (drawn == 1).all()
    assert isinstance(training_order(RECIPES["resample"], classifier_config(), both)[0], ClassBalanced)


def test_a_share_without_synthetic_images_is_the_natural_order(both):
    config = classifier_config("synthetic_share=0.25")
    assert isinstance(training_order(RECIPES["diffult"], config, open_set([both.paths[0]]))[0], Natural)


@pytest.mark.parametrize("share", ["0.001", "0.999", "0", "1", "true", "'0.5'"])
def test_a_share_that_leaves_one_kind_out_is_refused(share):
    with pytest.raises(UserError, match=r"synthetic_share"):
        classifier_config(f"synthetic_share={share}")


def test_mixed_cross_entropy_is_the_weighted_mean_of_both_labels_losses():
    """Against a loop in Python's floats, and with equal weights against torch's loss of soft labels."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(7, 3, dtype=torch.float64, generator=generator)
    labels, weight = torch.tensor([0, 1, 2, 0, 1, 2, 0]), torch.tensor([1, 0.3, 1, 1, 0.3, 0.3, 1]).double()
    share = torch.rand(7, dtype=torch.float64, generator=generator)
    total = weights = 0.0
    for i in range(7):
        normaliser = math.log(sum(math.exp(v) for v in logits[i].tolist()))
        for part, j in ((float(share[i]), i), (1 - float(share[i]), (i - 1) % 7)):
            total += part * float(weight[j]) * (normaliser - float(logits[i, labels[j]]))
            weights += part * float(weight[j])
    assert float(mixed_cross_entropy(logits, labels, weight, share)) == pytest.approx(total / weights, rel=1e-6)
    one_hot = F.one_hot(labels, 3).double()
    soft = share[:, None] * one_hot + (1 - share[:, None]) * one_hot.roll(1, 0)
    ours = mixed_cross_entropy(logits, labels, torch.ones(7).double(), share)
    assert float(ours) == pytest.approx(float(F.cross_entropy(logits, soft)), rel=1e-6)


def trained(both, folder, stop_at=None, *overrides: str):
    """Eight steps; optionally cut off by an error before one of them. The weights."""
    config = classifier_config("batch_size=16", "steps=8", "synthetic_share=0.25", *overrides)
    torch.manual_seed(0)
    model = build_classifier(config.network, 3, 1, config.image_size)
    order, _ = training_order(RECIPES["diffult"], config, both)
    if stop_at is not None:
        calls = iter(range(100))

        def break_off(*_: object) -> None:
            if next(calls) == stop_at:
                raise KeyboardInterrupt

        model.register_forward_pre_hook(break_off)
    device = torch.device("cpu")
    state = folder / "state.pt"
    fit("t", model, Loader(both, 16), order, config, state, (0, 9), "hash", torch.float32, device, omega=0.5)
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_mixed_batches_of_a_set_ratio_train_on_after_a_break_as_without(both, tmp_path):
    for name in ("whole", "broken", "plain"):
        (tmp_path / name).mkdir()
    whole = trained(both, tmp_path / "whole", None, "mixup=0.2")
    with pytest.raises(KeyboardInterrupt):
        trained(both, tmp_path / "broken", 6, "mixup=0.2")
    assert torch.equal(trained(both, tmp_path / "broken", None, "mixup=0.2"), whole)
    assert not torch.equal(trained(both, tmp_path / "plain"), whole)
