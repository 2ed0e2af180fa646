"""Training a classifier: the methods' orders and losses, mixed images, crops, resuming, several at a time."""

import contextlib
import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from diffult.config import ClassifierConfig, load_preset
from diffult.data.config import DataConfig
from diffult.engine.cuda_graph import CUDAGraphRunner
from diffult.errors import UserError
from diffult.longtail.augment import mixed
from diffult.longtail.classification import (
    Training,
    TrainingPhase,
    _batches,
    fit,
    fit_all,
    training_batches,
    training_loader,
)
from diffult.longtail.draws import ClassCounts, Drawing, TrainingSet, class_counts, natural, real_balanced, real_only
from diffult.longtail.losses import CrossEntropy, Targets, WeightedSum
from diffult.longtail.methods import METHODS, Method, Mix, Phase, find_method, in_waves, trained_share
from diffult.models.resnet import build_classifier
from ffcv_writers import (
    CenterCrop,
    ClassBalanced,
    ImageSet,
    Loader,
    Natural,
    RandomResizedCrop,
    Ratio,
    Weighted,
    open_set,
    write,
)

REAL, GENERATED = [30, 9, 3], [0, 21, 27]
DIGITS = load_preset("digits-lt").data


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> ImageSet:
    """Three classes, long-tailed, filled up to 30 each."""
    folder = tmp_path_factory.mktemp("sets")
    paths = []
    for kind, counts in enumerate((REAL, GENERATED)):
        labels = np.repeat(np.arange(3), counts)
        images = np.random.default_rng(kind).integers(0, 256, (len(labels), 8, 8, 1), dtype=np.uint8)
        paths.append(folder / f"{kind}.beton")
        write(paths[-1], images, labels=labels, synthetic=0 * labels + kind, index=np.arange(len(labels)))
    return open_set(paths)


def classifier_config(*overrides: str) -> ClassifierConfig:
    return load_preset("digits-lt", [f"classifier.{text}" for text in overrides]).classifier


def draw(method: str, config: ClassifierConfig, images: ImageSet, balance_to: int = 30) -> tuple[TrainingSet, Drawing]:
    train = TrainingSet(images.labels, images.synthetic, 3, config, balance_to)
    return train, find_method(method).phases[0].draw(train)


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
    ],
)
def test_a_modifier_that_does_not_fit_is_refused(name, message):
    with pytest.raises(UserError, match=message):
        classifier_config(f"methods=['{name}']")


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


@pytest.mark.parametrize("share", ["0.001", "0.999", "0", "1", "true", "'0.5'"])
def test_a_share_that_leaves_one_kind_out_is_refused(share):
    with pytest.raises(UserError, match=r"synthetic_share"):
        classifier_config(f"synthetic_share={share}", "methods=['ce', 'diffult', 'mix']")


def test_the_loss_of_mixed_images_is_the_weighted_mean_of_both_labels_losses():
    """Against a loop in Python's floats, and with equal weights against torch's loss of soft labels."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(7, 3, dtype=torch.float64, generator=generator)
    labels, fake = torch.tensor([0, 1, 2, 0, 1, 2, 0]), torch.tensor([0, 1, 0, 0, 1, 1, 0]).bool()
    share = torch.rand(7, dtype=torch.float64, generator=generator)
    total = weights = 0.0
    for i in range(7):
        normaliser = math.log(sum(math.exp(v) for v in logits[i].tolist()))
        for part, j in ((float(share[i]), i), (1 - float(share[i]), (i - 1) % 7)):
            weight = part * (0.3 if fake[j] else 1.0)
            total += weight * (normaliser - float(logits[i, labels[j]]))
            weights += weight
    both_labels, both_fake = (torch.cat([x, x.roll(1)]) for x in (labels, fake))
    shares = torch.cat([share, 1 - share])
    loss = CrossEntropy(0.3)(logits, Targets(both_labels, both_fake, both_labels, shares))
    assert float(loss.mean) == pytest.approx(total / weights, rel=1e-6)
    one_hot = F.one_hot(labels, 3).double()
    soft = share[:, None] * one_hot + (1 - share[:, None]) * one_hot.roll(1, 0)
    ours = CrossEntropy()(logits, Targets(both_labels, both_fake, both_labels, shares))
    assert float(ours.mean) == pytest.approx(float(F.cross_entropy(logits, soft)), rel=1e-6)


def targets(labels: list[int], synthetic: list[bool]) -> Targets:
    return Targets(torch.tensor(labels), torch.tensor(synthetic), torch.arange(len(labels)))


def training(images, folder, *overrides: str, method: str = "mix", device: str = "cpu") -> Training:
    """Eight steps on batches of 16, in "mix" a quarter synthetic."""
    config = classifier_config("batch_size=16", "steps=8", "synthetic_share=0.25", *overrides)
    chosen = find_method(method)
    train = TrainingSet(images.labels, images.synthetic, 3, config, 30)
    phases = []
    partners = chosen.mix.partners(train).order if chosen.mix and chosen.mix.partners else None
    for phase in chosen.phases:
        drawing = phase.draw(train)
        loss = chosen.make_loss(phase, train, class_counts(train, drawing, device))
        phases.append(TrainingPhase(round(phase.share * 8), drawing.order, loss, partners))
    torch.manual_seed(0)
    model = build_classifier(config.network, 3, 1, config.image_size, chosen.heads).to(device)
    loader = training_loader(images, DIGITS, config, (0, 9), torch.device(device))
    return Training(
        method, model, loader, tuple(phases), config, folder / f"{method}.state.pt", (0, 9), "hash",
        torch.float32, mix=chosen.mix, head_only=chosen.trains != "all",
    )  # fmt: skip


def weights(training: Training) -> torch.Tensor:
    return torch.cat([value.detach().flatten().cpu() for value in training.model.state_dict().values()])


def trained(images, folder, *overrides: str, stop_at: int | None = None, method: str = "mix") -> torch.Tensor:
    """The weights; optionally cut off by an error before one of the steps."""
    one = training(images, folder, *overrides, method=method)
    if stop_at is not None:
        calls = iter(range(100))

        def break_off(*_: object) -> None:
            if next(calls) == stop_at:
                raise KeyboardInterrupt

        one.model.trunk.register_forward_pre_hook(break_off)
    fit(one)
    return weights(one)


def test_mixed_batches_of_a_set_ratio_train_on_after_a_break_as_without(both, tmp_path):
    for name in ("whole", "broken", "plain"):
        (tmp_path / name).mkdir()
    whole = trained(both, tmp_path / "whole", "mixup=0.2")
    with pytest.raises(KeyboardInterrupt):
        trained(both, tmp_path / "broken", "mixup=0.2", stop_at=6)
    assert torch.equal(trained(both, tmp_path / "broken", "mixup=0.2"), whole)
    assert not torch.equal(trained(both, tmp_path / "plain"), whole)


@pytest.mark.parametrize("side_by_side", [False, True])
def test_several_trainings_end_as_each_alone(both, tmp_path, monkeypatch, side_by_side):
    """Side by side, with nothing in place of streams: the steps take turns."""
    monkeypatch.setattr("diffult.longtail.classification._side_by_side", lambda trainings: side_by_side)
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
    drawn = [int(batch.synthetic.sum()) for _, batch in _batches(one, 3, 0)]
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
    batches = [batch for _, batch in _batches(one, 3, 0)]
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


@pytest.mark.parametrize(
    "method", ["focal", "class_balanced", "ldam_drw", "ride", "two_heads", "mix+logit_adjust_real", "mixup"]
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


def test_a_head_trained_alone_leaves_the_trunk_as_it_was(both, tmp_path):
    one = training(both, tmp_path, method="crt")
    before = {name: value.clone() for name, value in one.model.state_dict().items()}
    fit(one)
    changed = {name for name, value in one.model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"head.weight", "head.bias"}


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
