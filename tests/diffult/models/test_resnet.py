"""Classifiers against published counts, torchvision and closed forms."""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffult.errors import UserError
from diffult.models.cost import forward_flops, parameters
from diffult.models.resnet import CifarBlock, build_classifier


@pytest.mark.parametrize(
    ("name", "classes", "size", "count"),
    [
        ("resnet32", 10, 32, 464_154),  # the 0.46 M of He et al., table 6
        ("resnet50", 1000, 224, 25_557_032),  # torchvision's documentation
        ("resnext50", 1000, 224, 25_028_904),  # torchvision's documentation
        ("resnet10", 1000, 224, 5_418_792),
        ("convnet", 10, 28, 897_130),
    ],
)
def test_classifier_counts(name: str, classes: int, size: int, count: int) -> None:
    with torch.device("meta"):
        model = build_classifier(name, classes, 1 if name == "convnet" else 3, size)
    assert parameters(model) == count


def test_classifier_work_against_published() -> None:
    with torch.device("meta"):
        resnet50, images = build_classifier("resnet50", 1000, 3, 224), torch.empty(1, 3, 224, 224)
        resnet32, small = build_classifier("resnet32", 10, 3, 32), torch.empty(1, 3, 32, 32)
    assert forward_flops(resnet50, (images,)) / 2e9 == pytest.approx(4.09, abs=0.01)  # torchvision's documentation
    assert forward_flops(resnet32, (small,)) / 2e6 == pytest.approx(69, abs=1)


@pytest.mark.parametrize(
    ("name", "channels", "size"),
    [("convnet", 1, 8), ("convnet", 1, 9), ("convnet", 3, 32), ("resnet32", 3, 32), ("resnet32", 1, 28)]
    + [(name, channels, 32) for name, channels in [("resnet10", 1), ("resnet50", 3), ("resnext50", 1)]],
)
def test_classifier_shapes(name: str, channels: int, size: int) -> None:
    torch.manual_seed(0)
    model = build_classifier(name, 7, channels, size).eval()
    x = torch.randn(2, channels, size, size)
    features = model.features(x)
    assert features.shape == (2, model.feature_dim)
    torch.testing.assert_close(model(x), features @ model.head.weight.T + model.head.bias)
    assert model(x).shape == (2, 7)


def test_torchvision_trunk_is_torchvisions() -> None:
    torchvision = pytest.importorskip("torchvision")
    torch.manual_seed(0)
    theirs = torchvision.models.resnet50(weights=None).eval()
    ours = build_classifier("resnet50", 1000, 3, 64).eval()
    state = theirs.state_dict()
    ours.head.load_state_dict({"weight": state.pop("fc.weight"), "bias": state.pop("fc.bias")})
    ours.trunk.load_state_dict(state)
    x = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-4)


def test_torchvision_is_asked_for_only_by_the_networks_that_it_builds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchvision.models", None)  # an import that fails
    with torch.device("meta"):
        for name in ("convnet", "resnet32"):
            assert build_classifier(name, 7, 3, 32)(torch.empty(2, 3, 32, 32)).shape == (2, 7)
        for name in ("resnet10", "resnet50", "resnext50"):
            with pytest.raises(UserError, match=r"torchvision, which does not import .*: install it, or take convnet"):
                build_classifier(name, 7, 3, 32)


@pytest.mark.parametrize(("name", "size"), [("convnet", 28), ("convnet", 9), ("resnet32", 32)])
def test_features_see_the_whole_image(name: str, size: int) -> None:
    model = build_classifier(name, 10, 1, size).eval()
    assert _interaction(model.features, size) > 1e-3


def test_pooled_convolutions_do_not_see_the_whole_image() -> None:
    convolutions = build_classifier("convnet", 10, 1, 28).eval().trunk.layers[:9]  # type: ignore[index]
    assert _interaction(lambda x: convolutions(x).mean(dim=(2, 3)), 28) < 1e-4


def _interaction(features: Callable[[Tensor], Tensor], size: int) -> float:
    """How far opposite corners are from acting apart, which is all that they do where no feature sees both: the second
    difference of the features, relative to the first."""
    torch.manual_seed(0)
    x = torch.randn(1, 1, size, size).repeat(4, 1, 1, 1)
    x[1::2, :, :2, :2] += 5
    x[2:, :, -2:, -2:] -= 5
    f = features(x)
    assert (f[1] - f[0]).norm() > 0 and (f[2] - f[0]).norm() > 0
    return ((f[3] - f[2] - f[1] + f[0]).norm() / (f[1] - f[0]).norm()).item()


def test_option_a_shortcut() -> None:
    block = CifarBlock(4, 8).eval()
    nn.init.zeros_(block.norm2.weight)  # leaves the shortcut
    x = torch.rand(2, 4, 6, 6)
    out = block(x)
    assert out.shape == (2, 8, 3, 3)
    assert torch.equal(out[:, 2:6], x[:, :, ::2, ::2])
    assert not out[:, :2].any() and not out[:, 6:].any()


def test_convnet_learns_digits() -> None:
    from sklearn.datasets import load_digits

    torch.manual_seed(0)
    digits = load_digits()
    images = torch.tensor(digits.images / 8 - 1, dtype=torch.float32)[:, None]
    labels = torch.tensor(digits.target)
    order = torch.randperm(len(labels))
    train, test = order[:1000], order[1000:]
    model = build_classifier("convnet", 10, 1, 8)
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    for _ in range(120):
        batch = train[torch.randint(len(train), (64,))]
        optimizer.zero_grad()
        F.cross_entropy(model(images[batch]), labels[batch]).backward()
        optimizer.step()
    accuracy = (model.eval()(images[test]).argmax(1) == labels[test]).float().mean().item()
    assert accuracy > 0.93


def test_bad_classifier_requests() -> None:
    with pytest.raises(UserError, match="did you mean 'resnet50'"):
        build_classifier("resnet-50", 10, 3, 224)
    with pytest.raises(UserError, match="32 pixels or more"):
        build_classifier("resnet10", 10, 3, 28)
