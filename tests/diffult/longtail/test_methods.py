"""The methods: which images they draw how often, their losses and heads, and which names stand for them."""

import math

import numpy as np
import pytest
import torch
from classifier_trainings import REAL, classifier_config, draw, targets, trained, training, write_sets
from torch.nn import functional as F

from diffult.errors import UserError
from diffult.longtail.classification import (
    fit,
    training_batches,
)
from diffult.longtail.draws import ClassCounts, TrainingSet, class_counts, natural, real_balanced, real_only
from diffult.longtail.losses import WeightedSum
from diffult.longtail.methods import METHODS, Method, Phase, find_method, in_waves, trained_share
from diffult.models.resnet import build_classifier
from ffcv_writers import (
    ClassBalanced,
    ImageSet,
    Loader,
    Natural,
    Ratio,
    Weighted,
    open_set,
)


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> ImageSet:
    return write_sets(tmp_path_factory.mktemp("sets"))


def test_synthetic_share_sets_every_batch_and_the_frequencies(both):
    config = classifier_config("batch_size=16", "synthetic_share=0.25")
    _, (order, frequency) = draw("mix+logit_adjust", config, both)
    assert isinstance(order, Ratio)
    batches = list(training_batches(Loader(both, 16), order, 3, 16, 0, 42 * 4))
    assert all(int(batch.synthetic.sum()) == 4 for batch in batches)
    # 168 steps show every real image 48 times and every synthetic one 14 times.
    times = np.bincount(torch.cat([batch.sample for batch in batches]).numpy(), minlength=len(both))
    np.testing.assert_allclose(times / times.sum(), frequency / frequency.sum(), rtol=1e-12)


def test_resampling_by_the_square_root_draws_classes_so(both):
    long_tail = open_set([both.paths[0]])
    _, (order, frequency) = draw("resample_sqrt", classifier_config(), long_tail)
    assert isinstance(order, Weighted)
    of_class = np.bincount(long_tail.labels[order.stream(0, 0, 42 * 200)]) / (42 * 200)
    roots = np.sqrt(REAL)
    np.testing.assert_allclose(of_class, roots / roots.sum(), atol=1 / 42)
    np.testing.assert_allclose(np.bincount(long_tail.labels, frequency), 42 * roots / roots.sum())


@pytest.mark.parametrize("method", ["ce", "diffult"])
def test_without_options_every_image_comes_once_an_epoch(both, method):
    _, (order, frequency) = draw(method, classifier_config(), both)
    assert isinstance(order, Natural) and order.length == 90 and (frequency == 1).all()
    assert isinstance(draw("resample", classifier_config(), both)[1].order, ClassBalanced)


def test_duplicates_fill_each_class_with_its_own_images(both):
    """12 draws of a class of 9 images show each of them once or twice, 3 of them twice; which three changes."""
    long_tail = open_set([both.paths[0]])
    train, drawing = draw("duplicates", classifier_config(), long_tail, balance_to=12)
    epochs = [np.bincount(drawing.order.epoch(5, epoch), minlength=42) for epoch in range(400)]
    for times in epochs[:3]:
        assert (times[:30] == 1).all() and (times[39:] == 4).all()
        assert sorted(times[30:39]) == [1] * 6 + [2] * 3
    assert any((times != epochs[0]).any() for times in epochs[1:])
    np.testing.assert_allclose(np.mean(epochs, axis=0), drawing.frequency, atol=0.1)
    counts = class_counts(train, drawing)
    assert counts.real.tolist() == REAL and counts.effective.tolist() == pytest.approx([30, 12, 12])


def test_duplicates_follow_the_dose_of_what_they_are_compared_with(both):
    """As many as synthetic images: half of what each class lacks, or twice."""
    long_tail = open_set([both.paths[0]])
    for dose, expected in ((0.5, [30, 19, 17]), (2.0, [30, 51, 57])):
        train = TrainingSet(long_tail.labels, long_tail.synthetic, 3, classifier_config(), 30, dose=dose)
        order, frequency = find_method("duplicates").phases[0].draw(train)
        epoch = long_tail.labels[order.epoch(0, 0)]
        assert np.bincount(epoch).tolist() == expected
        assert np.bincount(long_tail.labels, frequency).tolist() == pytest.approx(expected)


def test_effective_counts_weigh_synthetic_images_by_omega(both):
    counts = class_counts(*draw("diffult", classifier_config("omega=0.25"), both))
    assert counts.real.tolist() == REAL
    assert counts.effective.tolist() == [30, 9 + 21 / 4, 3 + 27 / 4]


@pytest.mark.parametrize("method", ["logit_adjust", "diffult+logit_adjust"])
def test_adjusted_logits_carry_the_class_frequencies(both, method):
    train, _ = draw(method, classifier_config(), both)
    counts = ClassCounts(torch.tensor([8.0, 2.0]), torch.tensor([8.0, 2.0]), torch.tensor([3.0, 1.0]))
    loss = find_method(method).phases[0].loss(train, counts)
    logits = torch.tensor([[0.3, -0.2]])
    adjusted = [0.3 + math.log(0.75), -0.2 + math.log(0.25)]
    expected = math.log(sum(map(math.exp, adjusted))) - adjusted[1]
    assert float(loss(logits, targets([1], [False])).mean) == pytest.approx(expected, rel=1e-6)


def test_an_unknown_method_is_refused_with_the_nearest_name():
    with pytest.raises(UserError, match=r"got 'logit_adjst'; did you mean 'logit_adjust'\?"):
        classifier_config("methods=['ce', 'logit_adjst', 'diffult']")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("diffult+logit_adjst", "got 'logit_adjst'; did you mean 'logit_adjust'"),
        ("ldam_drw+focal", "ldam_drw has a loss of its own: focal loss cannot take its place"),
        ("focal+class_balanced", "focal has a loss of its own"),
        ("tau_norm+focal", "tau_norm has a loss of its own"),
        ("synthetic_first+resample", "synthetic_first has an order of its own: re-sampling cannot take its place"),
        ("duplicates+resample", "duplicates has an order of its own"),
        ("two_heads+soft", "two_heads does not train one head on synthetic images"),
        ("ce+soft", "ce does not train one head on synthetic images"),
        ("ride+crt", "ride has a head for each expert"),
        ("ldam_drw+mislas", "ldam_drw does not train a network with one linear head"),
        ("cmo+mixup", "cmo mixes images already"),
        ("mislas+cutmix", "mislas mixes images already or trains a head alone"),
    ],
)
def test_a_modifier_that_does_not_fit_is_refused(name, message):
    with pytest.raises(UserError, match=message):
        classifier_config(f"methods=['{name}']")


def test_mislas_is_its_second_stage_after_mixup():
    by_parts, whole = find_method("mixup+mislas"), METHODS["mislas"]
    assert (by_parts.phases, by_parts.start, by_parts.trains) == (whole.phases, whole.start, whole.trains)
    assert find_method("mix+mixup+mislas").phases[0].draw is real_balanced


def test_a_head_is_retrained_on_images_that_are_not_mixed():
    assert find_method("ce+cutmix").mix and not find_method("ce+cutmix+crt").mix


def test_a_method_is_a_row(monkeypatch, both, tmp_path):
    """Focal loss (Lin et al. 2017) in the table: the settings know it, and it trains."""

    def focal(train, counts):
        def loss(logits, targets):
            value = F.cross_entropy(logits, targets.labels, reduction="none")
            return WeightedSum(((1 - torch.exp(-value)) ** 2 * value).sum(), torch.tensor(float(len(value))))

        return loss

    monkeypatch.setitem(METHODS, "own", Method("Focal loss", (Phase(natural, focal),)))
    assert "own" in classifier_config("methods=['ce', 'diffult', 'own']").methods
    (tmp_path / "ce").mkdir(), (tmp_path / "own").mkdir()
    long_tail = open_set([both.paths[0]])
    weights = [trained(long_tail, tmp_path / name, method=name) for name in ("ce", "own")]
    assert torch.isfinite(weights[1]).all() and not torch.equal(*weights)


def test_a_share_without_synthetic_images_is_the_natural_order(both):
    config = classifier_config("synthetic_share=0.25")
    order = draw("mix", config, open_set([both.paths[0]]))[1].order
    assert np.array_equal(np.sort(order.epoch(0, 3)), np.arange(42))


@pytest.mark.parametrize("share", ["0", "1", "true", "'0.5'"])
def test_a_share_that_leaves_one_kind_out_is_refused(share):
    with pytest.raises(UserError, match=r"synthetic_share"):
        classifier_config(f"synthetic_share={share}", "methods=['mix']")
    with pytest.raises(UserError, match=r"batch_size = 1: methods that mix by share need two images"):
        classifier_config("batch_size=1", "methods=['mix']")


@pytest.mark.parametrize(("batch", "share", "images"), [(64, 0.25, 16), (2, 0.25, 1), (64, 0.001, 1), (64, 0.999, 63)])
def test_a_batch_holds_images_of_either_kind(batch, share, images):
    assert classifier_config(f"batch_size={batch}", f"synthetic_share={share}").synthetic_images == images


@pytest.mark.parametrize(
    "method",
    [
        "focal",
        "class_balanced",
        "ldam_drw",
        "ride",
        "mix_ride",
        "two_heads",
        "mix+logit_adjust_real",
        "mixup",
        "mix+logit_adjust+mixup",
    ],
)
def test_methods_train(both, tmp_path, method):
    """On their heads, with their losses: every weight moves and stays finite."""
    one = training(
        both if find_method(method).synthetic else open_set([both.paths[0]]), tmp_path, "steps=8", method=method
    )
    before = [parameter.clone() for parameter in one.model.parameters()]
    fit(one)
    after = list(one.model.parameters())
    assert all(torch.isfinite(b).all() and not torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_tau_is_chosen_on_the_validation_images():
    """By a score that likes the norms of the classes' weights to differ as little as those at tau = 0.7 do."""
    model = build_classifier("convnet", 3, 1, 8)
    norms = model.head.weight.detach().norm(dim=1)
    tried = []

    def validate(model):
        tried.append(model.head.weight.detach().norm(dim=1))
        return -float((tried[-1] - norms**0.3).abs().sum())

    METHODS["tau_norm"].adapt(model, torch.zeros(3), validate)
    assert len(tried) == 11
    torch.testing.assert_close(model.head.weight.detach().norm(dim=1), norms**0.3)
    METHODS["tau_norm"].adapt(model, torch.zeros(3), None)
    torch.testing.assert_close(model.head.weight.detach().norm(dim=1), torch.ones(3))


@pytest.mark.parametrize(("make", "shares"), [(real_only, np.array(REAL) / 42), (real_balanced, np.full(3, 1 / 3))])
def test_real_images_alone_make_epochs_of_their_own(both, make, shares):
    train, _ = draw("diffult", classifier_config(), both)
    drawing = make(train)
    drawn = np.concatenate([drawing.order.epoch(0, epoch) for epoch in range(100)])
    assert len(drawn) == 4200 and not both.synthetic[drawn].any()
    np.testing.assert_allclose(np.bincount(both.labels[drawn]) / len(drawn), shares, atol=0.01)
    np.testing.assert_allclose(np.bincount(both.labels, drawing.frequency) / drawing.frequency.sum(), shares)


def test_counts_are_in_images_whatever_the_unit_of_the_frequencies(both):
    """A real image counts 1 on average: class-balanced weights and priors follow from numbers of images."""
    counts = class_counts(*draw("mix", classifier_config("batch_size=16", "synthetic_share=0.25", "omega=1"), both))
    assert counts.real_weight.tolist() == pytest.approx(REAL)
    # 12 of the 42 real images and 4 of the 48 synthetic ones a batch.
    assert counts.effective.tolist() == pytest.approx([30, 9 + 21 / 48 * 14, 3 + 27 / 48 * 14])


def test_what_a_method_starts_from_is_trained_before_it():
    assert in_waves(["diffult+logit_adjust+crt", "crt", "resample"]) == [
        ["diffult+logit_adjust", "ce", "resample"],
        ["diffult+logit_adjust+crt", "crt"],
    ]
    assert trained_share(["crt", "ce", "tau_norm"]) == 1.15
    title = find_method("diffult+logit_adjust+crt").title
    assert title == "DiffuLT + logit adjustment + cRT"
