"""Each loss and its gradient against its formula, in loops over Python's floats, and against public code's numbers."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from diffult.longtail.expert_losses import Experts, PerHead, SoftLabels, diversity_temperature, ride
from diffult.longtail.losses import (
    LDAM,
    CrossEntropy,
    Focal,
    LabelAwareSmoothing,
    Loss,
    Targets,
    class_balanced_weights,
    label_aware_smoothing,
    ldam_margins,
    log_prior,
)

COUNTS = torch.tensor([40.0, 20.0, 10.0, 10.0], dtype=torch.float64)
LABELS = torch.tensor([0, 0, 0, 0, 1, 1, 2, 3])  # as frequent as COUNTS
FAKE = torch.tensor([0, 1, 0, 1, 1, 0, 0, 1]).bool()
NUMBERS = torch.tensor([5, 2, 7, 0, 4, 1, 6, 3])  # in the joined set
SHARE = torch.tensor([0.9, 0.2, 0.5, 1.0, 0.0, 0.7, 0.6, 0.1], dtype=torch.float64)
B, C = 8, 4
OMEGA = 0.25


def waves(heads: int = 1) -> torch.Tensor:
    """sin(1.7 i + 2.3 c + 0.4 h), float64 [H, B, C]."""
    h, i, c = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in (heads, B, C)), indexing="ij")
    return torch.sin(1.7 * i + 2.3 * c + 0.4 * h)


COSINES = waves()[0]
LOGITS = 3 * COSINES
PLAIN = Targets(LABELS, torch.zeros(B, dtype=torch.bool), NUMBERS)
BOTH = Targets(LABELS, FAKE, NUMBERS)
MIXED = Targets(*(torch.cat([x, x.roll(1)]) for x in BOTH[:3]), torch.cat([SHARE, 1 - SHARE]))

PRIOR = [math.log(n / 80) for n in COUNTS.tolist()]
WEIGHTS = [0.5, 0.75, 1.25, 1.5]
MARGINS = [0.5 * (10 / n) ** 0.25 for n in COUNTS.tolist()]
SMOOTHING = [0.3, 0.15, 0.0, 0.1]
TABLE = [[(n + 2 * c + 1) % 5 + 0.5 for c in range(C)] for n in range(B)]
TABLE = [[v / sum(row) for v in row] for row in TABLE]

Value = tuple[float, list[float]]  # a loss and its gradient


def softmax(row: list[float]) -> list[float]:
    powers = [math.exp(v - max(row)) for v in row]
    return [v / sum(powers) for v in powers]


def soft_cross_entropy(row: list[float], goal: list[float]) -> Value:
    p = softmax(row)
    return -sum(q * math.log(v) for q, v in zip(goal, p, strict=True)), [v - q for q, v in zip(goal, p, strict=True)]


def smoothed(y: int, epsilon: float) -> list[float]:
    return [1 - epsilon + epsilon / C if c == y else epsilon / C for c in range(C)]


def adjusted(row: list[float], y: int, fake: bool, n: int) -> Value:
    return soft_cross_entropy([v + b for v, b in zip(row, PRIOR, strict=True)], smoothed(y, 0.1))


def focal(gamma: float) -> Callable[..., Value]:
    def of(row: list[float], y: int, fake: bool, n: int) -> Value:
        p = softmax(row)
        q = 1 - p[y]
        slope = gamma * p[y] * q ** (gamma - 1) * math.log(p[y]) - q**gamma
        return -(q**gamma) * math.log(p[y]), [((c == y) - p[c]) * slope for c in range(C)]

    return of


def ldam(row: list[float], y: int, fake: bool, n: int) -> Value:
    value, slope = soft_cross_entropy([30 * (v - MARGINS[y] * (c == y)) for c, v in enumerate(row)], smoothed(y, 0))
    return value, [30 * v for v in slope]


def smoothed_by_class(row: list[float], y: int, fake: bool, n: int) -> Value:
    """As the paper has it, on K - 1 classes, whose epsilon is smaller by (K - 1) / K."""
    epsilon = SMOOTHING[y] * (C - 1) / C
    return soft_cross_entropy(row, [1 - epsilon if c == y else epsilon / (C - 1) for c in range(C)])


def soft(row: list[float], y: int, fake: bool, n: int) -> Value:
    return soft_cross_entropy([v + b for v, b in zip(row, PRIOR, strict=True)], TABLE[n] if fake else smoothed(y, 0))


def double(values: list) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


CASES: dict[str, tuple[Loss, Callable[..., Value]]] = {
    "ce": (CrossEntropy(OMEGA, double(PRIOR), 0.1, class_weights=double(WEIGHTS)), adjusted),
    "focal": (Focal(OMEGA, class_weights=double(WEIGHTS)), focal(1)),
    "focal 2": (Focal(OMEGA, 2.0, class_weights=double(WEIGHTS)), focal(2)),
    "ldam": (LDAM(OMEGA, margins=double(MARGINS), class_weights=double(WEIGHTS)), ldam),
    "smoothing": (
        LabelAwareSmoothing(OMEGA, smoothing=double(SMOOTHING), class_weights=double(WEIGHTS)),
        smoothed_by_class,
    ),
    "soft": (
        SoftLabels(OMEGA, table=double(TABLE), prior=double(PRIOR), class_weights=double(WEIGHTS)),
        soft,
    ),
}


def loop(value: Callable[..., Value], outputs: torch.Tensor, targets: Targets) -> tuple[float, float, torch.Tensor]:
    """Weighted sum of losses, sum of weights, and the gradient of their ratio [B, C], one label after the other."""
    total = weights = 0.0
    gradient = [[0.0] * C for _ in range(B)]
    share = [1.0] * B if targets.share is None else targets.share.tolist()
    for k, (y, fake, n) in enumerate(zip(*(x.tolist() for x in targets[:3]), strict=True)):
        w = share[k] * (OMEGA if fake else 1.0) * WEIGHTS[y]
        one, slope = value(outputs[k % B].tolist(), y, fake, n)
        total, weights = total + w * one, weights + w
        gradient[k % B] = [a + w * b for a, b in zip(gradient[k % B], slope, strict=True)]
    return total, weights, double(gradient) / weights


def evaluate(loss: Loss, outputs: torch.Tensor, targets: Targets) -> tuple[float, float, torch.Tensor]:
    leaf = outputs.clone().requires_grad_()
    result = loss(leaf, targets)
    result.mean.backward()
    return float(result.total.detach()), float(result.weight), leaf.grad


@pytest.mark.parametrize("targets", [BOTH, MIXED], ids=["single", "mixed"])
@pytest.mark.parametrize("name", CASES)
def test_loss_and_gradient_are_the_formulas(name: str, targets: Targets) -> None:
    loss, value = CASES[name]
    total, weight, gradient = evaluate(loss, COSINES, targets)
    expected = loop(value, COSINES, targets)
    assert (total, weight) == pytest.approx(expected[:2], rel=1e-12)
    torch.testing.assert_close(gradient, expected[2], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("targets", [BOTH, MIXED], ids=["single", "mixed"])
def test_each_head_learns_from_its_own_kind(targets: Targets) -> None:
    losses = CASES["ce"][0], CASES["ldam"][0]
    outputs = waves(2)
    total, weight, gradient = evaluate(PerHead(*losses), outputs, targets)
    share = torch.ones(B, dtype=torch.float64) if targets.share is None else targets.share
    parts = []
    for head, (value, kind) in enumerate([(adjusted, ~targets.synthetic), (ldam, targets.synthetic)]):
        parts.append(loop(value, outputs[head], targets._replace(share=share * kind)))
    assert total == pytest.approx(sum(part[0] for part in parts), rel=1e-12)
    assert weight == pytest.approx(sum(part[1] for part in parts), rel=1e-12)
    expected = torch.stack([part[2] * part[1] for part in parts]) / weight
    torch.testing.assert_close(gradient, expected, rtol=1e-10, atol=1e-12)


def test_experts_are_held_apart_by_their_divergence_from_the_mean() -> None:
    outputs, temperature, factor = waves(3), [1.0, 0.9, 0.8, 0.7], -0.45
    loss = Experts(OMEGA, base=CASES["ldam"][0], diversity=factor, temperature=double(temperature), mean_weight=0.8)
    total, weight, gradient = evaluate(loss, outputs, BOTH)
    parts = [loop(ldam, expert, BOTH) for expert in outputs]
    expected_total = sum(part[0] for part in parts)
    expected = torch.stack([part[2] for part in parts])
    square = (sum(temperature) / C) ** 2
    for i in range(B):
        logits = [[30 * v / t for v, t in zip(outputs[h, i].tolist(), temperature, strict=True)] for h in range(3)]
        mean = softmax([sum(column) / 3 for column in zip(*logits, strict=True)])
        w = factor * 0.8 * square * (OMEGA if FAKE[i] else 1.0)
        for h in range(3):
            p = softmax(logits[h])
            expected_total += w * sum(m * math.log(m / q) for m, q in zip(mean, p, strict=True))
            slope = [30 / t * (q - m) for m, q, t in zip(mean, p, temperature, strict=True)]
            expected[h, i] += w * double(slope) / parts[0][1]
    assert (total, weight) == pytest.approx((expected_total, parts[0][1]), rel=1e-12)
    torch.testing.assert_close(gradient, expected, rtol=1e-10, atol=1e-12)


# What the functions named give in float64 for COUNTS, LABELS and the waves above: the mean loss, the first elements of
# its gradient, the sum of the gradient's absolute values.
PUBLISHED = {
    "kaidic/LDAM-DRW: FocalLoss, gamma 1": (
        Focal(), LOGITS, (2.8403397784357, [-0.13018667697198752, 0.08081815859951866], 1.5946154805859907)
    ),
    "kaidic/LDAM-DRW: FocalLoss, gamma 2": (
        Focal(gamma=2.0), LOGITS, (2.748562449903742, [-0.14107955530705418, 0.0875803126798329], 1.6482264442051038)
    ),
    "kaidic/LDAM-DRW: cross-entropy with class-balanced weights": (
        CrossEntropy(class_weights=class_balanced_weights(COUNTS)), LOGITS,
        (2.60071761969469, [-0.0586736678638964, 0.036423833108976136], 1.3990977885507077),
    ),
    "kaidic/LDAM-DRW: LDAMLoss": (
        LDAM(margins=ldam_margins(COUNTS)), COSINES,
        (36.4831628774286, [-3.7499999999999822, 3.7253456958178175], 52.10476899312623),
    ),
    "kaidic/LDAM-DRW: LDAMLoss with class-balanced weights": (
        LDAM(margins=ldam_margins(COUNTS), class_weights=class_balanced_weights(COUNTS)), COSINES,
        (32.96361188660399, [-1.876874858732953, 1.864535380418537], 44.80995518193727),
    ),
    "dvlab-research/MiSLAS: LabelAwareSmoothing(0.3, 0)": (
        LabelAwareSmoothing(smoothing=label_aware_smoothing(COUNTS)), LOGITS,
        (2.8943170914533223, [-0.0891051144457476, 0.06339989680418494], 1.3787117006905079),
    ),
    "dvlab-research/MiSLAS: LabelAwareSmoothing(0.4, 0.1)": (
        LabelAwareSmoothing(smoothing=label_aware_smoothing(COUNTS, 0.4, 0.1)), LOGITS,
        (2.890252932610019, [-0.07973011444574761, 0.06027489680418495], 1.2967028511953327),
    ),
    "frank-xwang/RIDE-LongTailRecognition: RIDELoss before reweight_epoch": (
        ride(COUNTS, 1.0, False), waves(3), (110.46181228413457, [-3.7499984703715517], 163.41268730994943)
    ),
    "frank-xwang/RIDE-LongTailRecognition: RIDELoss after reweight_epoch": (
        ride(COUNTS, 1.0, True), waves(3), (100.58043836581606, [-1.8768746426120155], 159.82430308504252)
    ),
    "frank-xwang/RIDE-LongTailRecognition: RIDELoss, diversity -0.45": (
        ride(COUNTS, 1.0, True, -0.45), waves(3), (99.51629802853735, [-1.8768743724608434], 157.8713640987762)
    ),
}  # fmt: skip


@pytest.mark.parametrize("code", PUBLISHED)
def test_loss_is_that_of_the_published_code(code: str) -> None:
    """To the precision of the class tables, which are float32."""
    loss, outputs, (mean, slope, size) = PUBLISHED[code]
    total, weight, gradient = evaluate(loss, outputs, PLAIN)
    assert total / weight == pytest.approx(mean, rel=1e-6)
    assert gradient.flatten()[: len(slope)].tolist() == pytest.approx(slope, rel=1e-6)
    assert float(gradient.abs().sum()) == pytest.approx(size, rel=1e-6)


def test_tables_of_classes() -> None:
    """class_balanced_weights also as vandit15/Class-balanced-loss-pytorch computes them; the temperatures as RIDE."""
    weights = [0.3640992566510017, 0.727471006162372, 1.4542148685933134, 1.4542148685933134]
    assert class_balanced_weights(COUNTS).tolist() == pytest.approx(weights, rel=1e-6)
    assert ldam_margins(COUNTS).tolist() == pytest.approx(MARGINS, rel=1e-6)
    assert label_aware_smoothing(COUNTS).tolist() == pytest.approx([0.3, 0.3 * math.sin(math.pi / 6), 0.0, 0.0])
    temperatures = [1.0, 0.9523809523809523, 0.9285714285714284, 0.9285714285714284]
    assert diversity_temperature(COUNTS).tolist() == pytest.approx(temperatures, rel=1e-6)
    assert log_prior(COUNTS).tolist() == pytest.approx(PRIOR)


def test_tables_are_finite_for_an_empty_class_and_for_classes_of_one_size() -> None:
    for counts in (torch.tensor([0.0, 5.0]), torch.tensor([5.0, 5.0])):
        for table in (class_balanced_weights, ldam_margins, label_aware_smoothing, diversity_temperature):
            assert torch.isfinite(table(counts)).all(), table
    assert label_aware_smoothing(torch.tensor([5.0, 5.0])).tolist() == pytest.approx([0.3, 0.3])


def test_omega_zero_on_a_batch_without_real_samples_is_no_loss() -> None:
    fake = BOTH._replace(synthetic=torch.ones(B, dtype=torch.bool))
    assert float(CrossEntropy(omega=0.0)(LOGITS, fake).mean) == 0
    assert float(PerHead(CrossEntropy(), CrossEntropy(0.0))(waves(2), fake).mean) == 0


@pytest.mark.parametrize("outputs", [100 * COSINES, torch.zeros(B, C, dtype=torch.float64)], ids=["sure", "equal"])
def test_a_sure_network_has_a_finite_gradient(outputs: torch.Tensor) -> None:
    for name, (loss, _) in CASES.items():
        assert torch.isfinite(evaluate(loss, outputs, BOTH)[2]).all(), name
    experts = ride(COUNTS, OMEGA, True)
    assert torch.isfinite(evaluate(experts, outputs.expand(3, B, C), BOTH)[2]).all()
