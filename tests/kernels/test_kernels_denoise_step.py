"""One pass of the sampler's update against float64, written sample by sample."""

import math

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from plain_solver import solve

from diffult.diffusion import samplers
from diffult.diffusion.schedule import Schedule
from kernels import denoise_step as module
from kernels.denoise_step import COLUMNS, denoise_step, reference_denoise_step
from kernels.random import normal

SEED = 2**63 + 12345
LIMIT = COLUMNS.index("limit")
# Inputs are random anew at each call, so a failing shape cannot be shrunk, and trying to would take minutes.
BY_SHAPE = settings(deadline=None, phases=[Phase.generate], suppress_health_check=[HealthCheck.function_scoped_fixture])
SHAPES = st.tuples(st.integers(1, 4), *[st.integers(1, 6)] * 3) | st.sampled_from(
    [(2, 3, 16, 16), (3, 1, 28, 28), (1, 4, 37, 11), (1, 1, 1, 1)]
)


class Case:
    """Random inputs; limits below, at and above 1, and 0 for none."""

    def __init__(self, shape, guided=False, previous=True, dtype=torch.float32, device="cpu", layout="channels_last"):
        batch = shape[0]

        def random(rows, dtype=torch.float32):
            x = torch.randn(rows, *shape[1:], device=device).to(dtype)
            return x if layout == "contiguous" else x.contiguous(memory_format=torch.channels_last)

        self.x, self.out = random(batch), random(2 * batch if guided else batch, dtype)
        self.previous = random(batch) if previous else None
        self.coefficients = torch.randn(batch, 8, device=device)
        self.coefficients[:, LIMIT] = torch.tensor([0.0, 0.5, 1.0, 1.7])[torch.randint(4, (batch,))].to(device)
        self.labels, self.indices, self.steps = (torch.randint(0, 1000, (batch,), device=device) for _ in range(3))

    def arguments(self):
        names = (SEED, self.labels, self.indices, self.steps)
        return self.x, self.out, self.coefficients, self.previous, *names

    def exact(self, with_noise):
        """The module's formulas in float64, a sample at a time."""
        batch = len(self.x)
        noise = normal(SEED, self.labels, self.indices, self.steps, tuple(self.x.shape[1:])).cpu().double()
        x, out = self.x.cpu().double(), self.out.cpu().double()
        x_next, x0 = torch.empty_like(x), torch.empty_like(x)
        for i, row in enumerate(self.coefficients.tolist()):
            p_x, p_out, w, limit, c_x, c_x0, c_previous, c_noise = row
            guided = out[i] if len(out) == batch else (1 + w) * out[i] - w * out[batch + i]
            x0[i] = p_x * x[i] + p_out * guided
            if limit > 0:
                x0[i] = x0[i].clip(-limit, limit) / limit
            x_next[i] = c_x * x[i] + c_x0 * x0[i]
            if self.previous is not None:
                x_next[i] += c_previous * self.previous[i].cpu().double()
            if with_noise:
                x_next[i] += c_noise * noise[i]
        return x_next, x0


def assert_close(got, exact):
    for ours, theirs in zip(got, exact, strict=True):
        assert ours.dtype == torch.float32 and ours.is_contiguous(memory_format=torch.channels_last)
        # by norm, with room for a sum that cancels in a tensor of a single element
        assert float((ours.cpu().double() - theirs).norm()) <= 1e-6 * float(theirs.norm()) + 2e-6


def poison(monkeypatch):
    empty_like = torch.empty_like
    monkeypatch.setattr(module.torch, "empty_like", lambda *a, **k: empty_like(*a, **k).fill_(float("nan")))


@settings(BY_SHAPE, max_examples=20)
@given(
    shape=SHAPES,
    guided=st.booleans(),
    previous=st.booleans(),
    with_noise=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    layout=st.sampled_from(["channels_last", "contiguous"]),
)
def test_equals_float64(triton_kernels, monkeypatch, shape, guided, previous, with_noise, dtype, layout):
    case = Case(shape, guided, previous, dtype, triton_kernels, layout)
    exact = case.exact(with_noise)
    assert_close(reference_denoise_step(*case.arguments(), with_noise), exact)
    with monkeypatch.context() as patch:
        poison(patch)
        got = denoise_step(*case.arguments(), with_noise=with_noise)
    assert_close(got, exact)


@pytest.mark.parametrize("sampler", ["ddim", "ddpm", "dpm++", "dpm++sde"])
@pytest.mark.parametrize("prediction", ["epsilon", "x0", "v"])
def test_every_prediction_and_solver_is_such_coefficients(triton_kernels, prediction, sampler):
    """Whole trajectories of a made-up network, guided and clipped, against the textbook's way there in float64."""
    schedule, w, shape = Schedule("cosine", 1000), 1.5, (2, 3, 5, 4)
    grid = samplers.timestep_grid(1000, 6)
    rows = samplers.SAMPLERS[sampler](grid, schedule.alphas_cumprod, 0.4)
    labels, indices = (torch.tensor(v, device=triton_kernels) for v in ([3, 1], [0, 7]))

    def network(z, label_free):
        return torch.tanh(0.8 * z + 0.3) * (0.5 if label_free else 1.0)

    def denoise(z, t):
        abar = schedule.alphas_cumprod[t]
        outs = [network(z, label_free) for label_free in (False, True)]
        images = {
            "epsilon": [(z - (1 - abar).sqrt() * out) / abar.sqrt() for out in outs],
            "x0": outs,
            "v": [abar.sqrt() * z - (1 - abar).sqrt() * out for out in outs],
        }[prediction]
        return (images[0] + w * (images[0] - images[1])).clamp(-1, 1)

    def noise(step):
        return normal(SEED, labels, indices, step, shape[1:]).cpu().double()

    exact = solve(denoise, noise(0), grid, rows, noise)
    x, x0 = normal(SEED, labels, indices, 0, shape[1:]), None
    for i, t in enumerate(grid):
        out = torch.cat([network(x, False), network(x, True)])
        row = torch.tensor([*schedule.x0_coefficients(prediction, t), w, 1.0, *rows[i].tolist()])
        coefficients = row.repeat(2, 1).to(triton_kernels)
        x, x0 = denoise_step(x, out, coefficients, x0, SEED, labels, indices, i + 1, with_noise=bool(rows[i, 3]))
    assert (
        float((x.cpu().double() - exact).norm() / exact.norm()) < 1e-4
    )  # errors of six steps, 1 / a = 2e4 at the first
    assert torch.equal(x, x0)  # the last step returns x0 itself


def test_a_batch_may_hold_different_steps(triton_kernels):
    case = Case((4, 3, 6, 6), True, True, torch.bfloat16, triton_kernels)
    whole = denoise_step(*case.arguments(), with_noise=True)
    for i in range(4):
        out = torch.stack([case.out[i], case.out[4 + i]])
        one = slice(i, i + 1)
        names = (SEED, case.labels[one], case.indices[one], int(case.steps[i]))
        alone = denoise_step(case.x[one], out, case.coefficients[one], case.previous[one], *names, with_noise=True)
        assert torch.equal(alone[0][0], whole[0][i]) and torch.equal(alone[1][0], whole[1][i])


def test_values_that_are_no_numbers_show(triton_kernels):
    """Clipping must not turn a broken network's NaN into a black pixel."""
    case = Case((1, 1, 4, 4), device=triton_kernels)
    case.coefficients[:] = 1.0
    case.out[0, 0, 1, 2] = math.nan
    case.out[0, 0, 2, 2] = math.inf
    for x_next, x0 in (
        denoise_step(*case.arguments(), with_noise=False),
        reference_denoise_step(*case.arguments(), False),
    ):
        assert torch.isnan(x0).sum() == 1 and torch.isnan(x0[0, 0, 1, 2])
        assert torch.isnan(x_next[0, 0, 1, 2])
        assert x0[0, 0, 2, 2] == 1


def test_no_noise_is_made_where_none_is_wanted(triton_kernels, monkeypatch):
    case = Case((2, 3, 4, 4), device=triton_kernels)
    before = denoise_step(*case.arguments(), with_noise=False)
    case.labels += 1
    assert all(
        torch.equal(a, b) for a, b in zip(before, denoise_step(*case.arguments(), with_noise=False), strict=True)
    )
    noisy = denoise_step(*case.arguments(), with_noise=True)
    assert torch.equal(noisy[1], before[1]) and not torch.equal(noisy[0], before[0])


@pytest.mark.parametrize(("guided", "previous"), [(False, True), (True, False)])
def test_is_an_operator(triton_kernels, guided, previous):
    case = Case((2, 3, 5, 4), guided, previous, torch.bfloat16, triton_kernels)
    x, out, coefficients, last, _, *names = case.arguments()
    torch.library.opcheck(torch.ops.diffult.denoise_step.default, (x, out, coefficients, last, 7, *names, True))
    contiguous = (x.contiguous(), out.contiguous(), coefficients, last, 7, *names, True)
    torch.library.opcheck(torch.ops.diffult.denoise_step.default, contiguous)

    def step(*arguments):
        return denoise_step(*arguments, with_noise=True)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for ours, eager in zip(compiled(*case.arguments()), step(*case.arguments()), strict=True):
        assert torch.equal(ours, eager)


def test_two_runs_give_the_same_bits(triton_kernels):
    case = Case((3, 3, 9, 9), True, True, torch.bfloat16, triton_kernels)
    first, second = (denoise_step(*case.arguments(), with_noise=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_gradients_of_the_reference_are_there_and_of_the_kernel_refused(triton_kernels):
    case = Case((2, 2, 3, 3), True, True)
    out = case.out.double().requires_grad_()
    x, _, coefficients, previous, *names = (
        value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value
        for value in case.arguments()
    )
    coefficients[:, LIMIT] = 0
    assert torch.autograd.gradcheck(
        lambda out: reference_denoise_step(x, out, coefficients, previous, *names, True)[0], out
    )
    case = Case((2, 2, 3, 3), device=triton_kernels)
    case.out.requires_grad_()
    with pytest.raises(RuntimeError, match="no autograd formula"):
        denoise_step(*case.arguments(), with_noise=False)[0].sum().backward()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 3, 4, 4, dtype=torch.float16)}, "x must be float32"),
        ({"out": torch.zeros(3, 3, 4, 4)}, r"out must be float \[2 or 4"),
        ({"out": torch.zeros(2, 3, 4, 5)}, "out must be float"),
        ({"coefficients": torch.zeros(2, 7)}, r"coefficients must be float32 \[2, 8\]"),
        ({"previous": torch.zeros(1, 3, 4, 4)}, "previous must be float32"),
        ({"labels": torch.zeros(3, dtype=torch.int64)}, "labels must be int64"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    case = Case((2, 3, 4, 4))
    for name, value in change.items():
        setattr(case, name, value)
    with pytest.raises(ValueError, match=message):
        denoise_step(*case.arguments(), with_noise=True)
