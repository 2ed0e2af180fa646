"""Heads of classifiers, the trunks that experts share, and the changes to a trained head."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from diffult.longtail.adapt import adjust_bias, tau_normalise
from diffult.longtail.losses import log_prior
from diffult.models.cost import forward_flops, parameters
from diffult.models.heads import HEADS, CosineLinear
from diffult.models.resnet import CLASSIFIERS, Classifier, build_classifier, load_classifier, save_classifier, split

SIZES = {name: 32 if entry.smallest_image > 8 else 8 for name, entry in CLASSIFIERS.items()}


def built(name: str, heads: str) -> tuple[Classifier, torch.Tensor]:
    """In evaluation mode, with batch norms that have seen something; and images for it."""
    if name in ("resnet10", "resnet50", "resnext50"):
        pytest.importorskip("torchvision")
    torch.manual_seed(0)
    model, images = build_classifier(name, 5, 1, SIZES[name], heads), torch.randn(4, 1, SIZES[name], SIZES[name])
    model.train()
    with torch.no_grad():
        model(images)
    return model.eval(), images


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("name", ["convnet", "resnet32", "resnet10"])
def test_a_classifier_classifies_by_its_heads_and_is_saved_with_them(name: str, heads: str, tmp_path) -> None:
    model, images = built(name, heads)
    outputs, logits = model.outputs(images), model(images)
    count = {"two": 2, "experts": 3}.get(heads)
    assert outputs.shape == ((4, 5) if count is None else (count, 4, 5))
    assert logits.shape == (4, 5) and model.features(images).shape == (4, model.feature_dim)
    expected = {"two": lambda: outputs[0], "experts": lambda: (outputs[0] + outputs[1] + outputs[2]) / 3}
    torch.testing.assert_close(logits, expected.get(heads, lambda: outputs)())
    save_classifier(tmp_path / "weights.safetensors", model, name, 1, SIZES[name], "hash")
    loaded = load_classifier(tmp_path / "weights.safetensors", torch.device("cpu"))
    assert loaded.heads == heads
    assert torch.equal(loaded.outputs(images), outputs)


def test_work_of_heads_is_counted() -> None:
    """A product of 128 features and 5 classes, 2 FLOP each; three experts cost less than three networks."""
    work = {heads: forward_flops(built("convnet", heads)[0], [torch.empty(1, 1, 8, 8)]) for heads in HEADS}
    assert work["cosine"] == work["linear"] == work["two"] - 2 * 128 * 5
    assert work["linear"] < work["experts"] < 3 * work["linear"]


def test_cosine_outputs_are_cosines() -> None:
    model, images = built("convnet", "cosine")
    features, weights = model.features(images).tolist(), model.head.weight.tolist()

    def cosine(a: list[float], b: list[float]) -> float:
        return sum(x * y for x, y in zip(a, b, strict=True)) / math.hypot(*a) / math.hypot(*b)

    expected = torch.tensor([[cosine(a, b) for b in weights] for a in features])
    torch.testing.assert_close(model(images), expected)


def test_cosines_keep_their_precision_in_mixed_precision() -> None:
    torch.manual_seed(0)
    head, x = CosineLinear(64, 10), torch.randn(8, 64)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = head(x)
    assert mixed.dtype == torch.float32 and torch.equal(mixed, head(x))


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_a_split_trunk_computes_the_same(name: str) -> None:
    model, images = built(name, "linear")
    shared, rest = split(model.trunk)
    torch.testing.assert_close(rest(shared(images)), model.trunk(images))
    assert parameters(shared) + parameters(rest) == parameters(model.trunk)
    assert parameters(shared) > 0


@pytest.mark.parametrize(
    ("name", "share"),
    [  # parameters of convolutions and their norms
        ("convnet", 9 * 32 + 64 + 9 * 32 * 64 + 128),
        ("resnet32", 9 * 16 + 32 + 5 * 2 * (9 * 16 * 16 + 32)),
    ],
)
def test_experts_share_the_first_stages_and_differ_in_the_rest(name: str, share: int) -> None:
    model, images = built(name, "experts")
    assert parameters(model.trunk.shared) == share
    alone = parameters(build_classifier(name, 5, 1, SIZES[name]).trunk)
    assert parameters(model.trunk) == share + 3 * (alone - share)
    first, second, third = model.outputs(images)
    assert not torch.allclose(first, second) and not torch.allclose(second, third)
    joined = model.features(images)
    parts = joined.split(joined.shape[1] // 3, dim=1)
    torch.testing.assert_close(model.head[1](parts[1]), second)
    gradient = torch.autograd.grad(second.sum(), model.trunk.experts[0].parameters(), allow_unused=True)
    assert not any(g is not None and g.any() for g in gradient)


def test_each_of_two_heads_is_its_own() -> None:
    model, images = built("resnet32", "two")
    features = model.features(images)
    for head, output in zip(model.head, model.outputs(images), strict=True):
        torch.testing.assert_close(output, features @ head.weight.T + head.bias)
    assert not torch.equal(model.head[0].weight, model.head[1].weight)


def test_tau_normalisation_is_that_of_the_published_code() -> None:
    """The numbers of pnorm(weights, 0.7) of facebookresearch/classifier-balancing, tau_norm.py, for
    3 sin(1.7 i + 2.3 c), float64 [4, 4]."""
    i, c = torch.meshgrid(torch.arange(4.0), torch.arange(4.0), indexing="ij")
    classifier = Classifier(nn.Identity(), 4, 4, 8).double()
    with torch.no_grad():
        classifier.head.weight.copy_(3 * torch.sin(1.7 * i.double() + 2.3 * c.double()))
    tau_normalise(classifier, 0.7)
    expected = [
        0.0, 0.831577564045675, -1.108120381515841, 0.6450505137452353, 1.0642188460780684, -0.8121730949574819,
        0.01804407051951531, 0.7881284319306116, -0.2819182508920205, -0.6075277273569428, 1.091480564893135,
        -0.846926928805563, -1.005295229988408, 0.9758615618407008, -0.2950910874978663, -0.5826373304542704,
    ]  # fmt: skip
    assert classifier.head.weight.flatten().tolist() == pytest.approx(expected, rel=1e-12)
    assert not classifier.head.bias.any()


@pytest.mark.parametrize("heads", ["linear", "two"])
def test_an_adjusted_bias_takes_the_prior_from_every_head(heads: str) -> None:
    model, images = built("convnet", heads)
    before, counts = model.outputs(images), [50, 20, 10, 5, 15]
    adjust_bias(model, log_prior(torch.tensor(counts)))
    expected = before - torch.tensor([math.log(n / 100) for n in counts])
    torch.testing.assert_close(model.outputs(images), expected)


@pytest.mark.parametrize("heads", ["cosine", "experts"])
def test_cosine_heads_cannot_be_adapted(heads: str) -> None:
    model, _ = built("convnet", heads)
    with pytest.raises(ValueError, match=f"heads '{heads}' have no linear layer"):
        tau_normalise(model, 1.0)
