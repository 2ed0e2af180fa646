"""AdamW and the moving average against torch.optim.AdamW and the average written out, in float64."""

import copy
import io
import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from kernels import adamw_ema, dispatch
from kernels.adamw_ema import AdamWEma

BETAS, EPS = (0.9, 0.999), 1e-8


@pytest.fixture(params=["reference", "triton"])
def device(request):
    """Both implementations, one after the other."""
    if request.param == "triton":
        return request.getfixturevalue("triton_kernels")
    before = dispatch.mode()
    dispatch.set_mode("torch")
    request.addfinalizer(lambda: dispatch.set_mode(before))
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


class Parts(nn.Module):
    """Parameters of the given shapes, one of them a channels-last convolution, one frozen, and a buffer."""

    def __init__(self, shapes):
        super().__init__()
        conv = torch.randn(6, 5, 3, 3).to(memory_format=torch.channels_last)
        self.conv = nn.Parameter(conv)
        self.rest = nn.ParameterList([nn.Parameter(torch.randn(shape)) for shape in shapes])
        self.frozen = nn.Parameter(torch.randn(3), requires_grad=False)
        self.register_buffer("count", torch.tensor(7))


SHAPES = [(), (17,), (3, 5), (4097,)]


def norm_error(got, want, start):
    """Relative error of what has changed since `start`: the values themselves would hide it."""
    got, want, start = (torch.cat([x.detach().cpu().double().flatten() for x in xs]) for xs in (got, want, start))
    return float((got - want).norm() / (want - start).norm())


def exact_training(parameters, gradients, rates, decays, max_norm, weight_decay, betas=BETAS):
    """(parameters, averages, norms) after torch.optim.AdamW's steps in float64."""
    exact = [nn.Parameter(p.detach().double()) for p in parameters]
    averages = [p.detach().clone() for p in exact]
    optimizer = torch.optim.AdamW(exact, 1.0, betas, EPS, weight_decay)
    norms = []
    for step, (rate, decay) in enumerate(zip(rates, decays, strict=True)):
        for p, g in zip(exact, gradients[step], strict=True):
            p.grad = g.double()
        limit = math.inf if max_norm is None else max_norm
        norms.append(float(nn.utils.clip_grad_norm_(exact, limit)))
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
        averages = [decay * a + (1 - decay) * p.detach() for a, p in zip(averages, exact, strict=True)]
    return exact, averages, norms


def is_rounded(work, master):
    """Whether `work` is `master` in its type; Triton's interpreter cuts the bits off where the compiler rounds."""
    interpreted = dispatch.mode() == "triton" and not work.is_cuda
    cut = (master.detach().view(torch.int32) & -65536).view(torch.float32)
    return torch.equal(work, (cut if interpreted and work.dtype == torch.bfloat16 else master).to(work.dtype))


def trained(model):
    return [p for p in model.parameters() if p.requires_grad]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("max_norm", "weight_decay"), [(None, 0.0), (1.0, 0.05), (1e4, 0.3)])
def test_equals_torch_optim_and_a_lerp_in_float64(device, dtype, max_norm, weight_decay):
    """Twenty steps with gradients of very different sizes, above and below `max_norm`, and changing rates."""
    steps = 20
    model = Parts(SHAPES).to(device, dtype)
    start = [p.detach().clone() for p in trained(model)]
    frozen = model.frozen.clone()
    # A tenth of an exponent a step: the moments must forget and remember.
    gradients = [[(torch.randn_like(p) * 10 ** (1 - 0.1 * i)) for p in start] for i in range(steps)]
    rates = [1e-2 * (1 + i % 3) for i in range(steps)]
    decays = [min(0.9999, (1 + i) / (10 + i)) for i in range(steps)]
    exact, averages, norms = exact_training(start, gradients, rates, decays, max_norm, weight_decay)

    optimizer = AdamWEma(model, BETAS, EPS, weight_decay)
    for i in range(steps):
        optimizer.zero_grad()
        for p, g in zip(trained(model), gradients[i], strict=True):
            p.grad.add_(g)
        before = optimizer.grad.clone()
        norm = optimizer.step(rates[i], decays[i], max_norm)
        assert norm.dtype == torch.float32 and float(norm) == pytest.approx(norms[i], rel=1e-6)
        assert torch.equal(optimizer.grad, before)
        if dtype == torch.bfloat16:
            assert is_rounded(optimizer.work, optimizer.master)
    state = optimizer.state_dict()
    assert state["step"] == steps
    assert norm_error(state["parameters"].values(), exact, start) < 1e-5
    assert norm_error(state["ema"].values(), averages, start) < 1e-5
    assert all(is_rounded(p, q.to(p.device)) for p, q in zip(trained(model), state["parameters"].values(), strict=True))
    assert torch.equal(model.frozen, frozen) and model.frozen.grad is None


@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shapes=st.lists(st.lists(st.integers(1, 9), max_size=4).map(tuple), min_size=1, max_size=4),
    betas=st.tuples(st.sampled_from([0.0, 0.5, 0.9]), st.sampled_from([0.0, 0.95, 0.999, 0.9999])),
)
def test_any_shapes_and_betas(device, shapes, betas):
    model = nn.ParameterList([nn.Parameter(torch.randn(shape)) for shape in shapes]).to(device)
    start = [p.detach().clone() for p in model]
    gradients = [[torch.randn_like(p) for p in start] for _ in range(3)]
    exact, averages, _ = exact_training(start, gradients, [0.1] * 3, [0.5] * 3, 0.7, 0.01, betas)
    optimizer = AdamWEma(model, betas, EPS, 0.01)
    for step in gradients:
        for p, g in zip(model, step, strict=True):
            p.grad.copy_(g)
        optimizer.step(0.1, 0.5, 0.7)
    assert norm_error(model, exact, start) < 1e-5
    assert norm_error(optimizer.state_dict()["ema"].values(), averages, start) < 1e-5


def test_bias_correction_at_any_step(device):
    """At step t with constant gradient 1 the moments are the corrections, so the update is lr whatever t is."""
    model = nn.ParameterList([nn.Parameter(torch.zeros(1))]).to(device)
    optimizer = AdamWEma(model)
    for step in (1, 2, 3, 30, 249, 250, 251, 1000, 10_000, 1_000_000):
        moments = {k: {"0": torch.full((1,), 1 - beta ** (step - 1))} for k, beta in zip("mv", BETAS, strict=True)}
        zero = {"0": torch.zeros(1)}
        optimizer.load_state_dict({"step": step - 1, "parameters": zero, "ema": zero} | moments)
        optimizer.grad.zero_()
        model[0].grad.fill_(1)
        optimizer.step(1.0, 0.0)
        assert float(model[0].detach()) == pytest.approx(-1, rel=1e-6)
        assert optimizer.state_dict()["step"] == step


def test_rates_may_be_tensors_and_two_runs_have_the_same_bits(device):
    def run(as_tensor):
        torch.manual_seed(0)
        model = Parts(SHAPES).to(device)
        optimizer = AdamWEma(model, weight_decay=0.1)
        for i in range(3):
            optimizer.grad.copy_(torch.randn(len(optimizer.grad)))
            rates = (0.01 * (i + 1), 0.9)
            if as_tensor:
                rates = tuple(torch.tensor(x, device=device, dtype=torch.float64) for x in rates)
            optimizer.step(*rates, 1.0)
        return optimizer

    first, *others = (run(as_tensor) for as_tensor in (False, True, False))
    for other in others:
        for name in ("master", "m", "v", "ema"):
            assert torch.equal(getattr(first, name), getattr(other, name)), name


def test_a_norm_that_is_no_number_is_not_hidden(device):
    model = nn.ParameterList([nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(4))]).to(device)
    optimizer = AdamWEma(model)
    model[0].grad[1] = math.nan
    assert math.isnan(optimizer.step(0.1, 0.9, 1.0))
    assert all(p.isnan().all() for p in model)  # as clip_grad_norm_ has it: all are scaled by it


def test_padding_stays_zero(device):
    model = Parts(SHAPES).to(device)
    optimizer = AdamWEma(model, weight_decay=0.1)
    for p in trained(model):
        p.grad.normal_()
    optimizer.step(0.1, 0.9, 1.0)
    sizes = sum(p.numel() for p in trained(model))
    for name in ("master", "m", "v", "ema", "grad"):
        flat = getattr(optimizer, name)
        assert len(flat) % 4096 == 0 and flat.isfinite().all() and int((flat != 0).sum()) == sizes, name


def small_network(channels_last=True):
    torch.manual_seed(0)
    layers = (nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.SiLU(), nn.Conv2d(8, 8, 3), nn.AdaptiveAvgPool2d(1))
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(8, 5))
    return model.to(memory_format=torch.channels_last) if channels_last else model


def losses(model, update, zero, steps=12):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(16, 3, 8, 8, generator=generator).to(memory_format=torch.channels_last)
    y = torch.randint(5, (16,), generator=generator)
    p = next(model.parameters())
    x, y, out = x.to(p.device, p.dtype), y.to(p.device), []
    for _ in range(steps):
        for half in (slice(0, 8), slice(8, 16)):  # two backward passes: the second adds to the first
            loss = F.cross_entropy(model(x[half]).float(), y[half]) / 2
            loss.backward()
        out.append(loss.item())
        update()
        zero()
    return out


@pytest.mark.parametrize("channels_last", [True, False])
def test_a_network_trains_as_with_torch_optim(device, channels_last):
    ours, theirs = (small_network(channels_last).to(device) for _ in range(2))
    strides = [p.stride() for p in ours.parameters()]
    optimizer = AdamWEma(ours, weight_decay=0.01)
    assert [p.stride() for p in ours.parameters()] == strides
    assert [p.grad.stride() for p in ours.parameters()] == strides
    if channels_last:
        assert ours[3].weight.is_contiguous(memory_format=torch.channels_last)
        assert not ours[3].weight.is_contiguous()
    assert all(p.data_ptr() % 64 == 0 and p.is_leaf for p in ours.parameters())

    peer = torch.optim.AdamW(theirs.parameters(), 0.02, weight_decay=0.01)

    def peer_step():
        nn.utils.clip_grad_norm_(theirs.parameters(), 0.5)
        peer.step()

    got = losses(ours, lambda: optimizer.step(0.02, 0.9, 0.5), optimizer.zero_grad)
    want = losses(theirs, peer_step, peer.zero_grad)
    assert want[-1] < want[0] / 1.5
    assert got == pytest.approx(want, rel=1e-4)
    assert optimizer.state_dict()["step"] == 12


def test_bfloat16_network_learns_and_small_steps_are_not_lost(device):
    model = small_network().to(device, torch.bfloat16)
    optimizer = AdamWEma(model)
    assert all(p.dtype == p.grad.dtype == torch.bfloat16 for p in model.parameters())
    out = losses(model, lambda: optimizer.step(0.02, 0.9, 0.5), optimizer.zero_grad)
    assert out[-1] < out[0] / 1.5
    weight = nn.ParameterList([nn.Parameter(torch.ones(1, dtype=torch.bfloat16))]).to(device)
    optimizer = AdamWEma(weight)
    for _ in range(20):  # 20 times less than half of bfloat16's spacing below 1
        weight[0].grad.fill_(1)
        optimizer.step(1e-3, 0.9)
    assert float(weight[0].detach()) == pytest.approx(0.98, abs=2**-8)  # the spacing


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_checkpoint_goes_on_identically(device, dtype, monkeypatch):
    def gradient(i, p):
        return torch.randn(p.shape, generator=torch.Generator().manual_seed(i)).to(p)

    def steps(optimizer, first, last):
        for i in range(first, last):
            for p in trained(optimizer.model):
                p.grad.copy_(gradient(i, p))
            optimizer.step(0.01, 0.9, 1.0)

    straight = AdamWEma(Parts(SHAPES).to(device, dtype), weight_decay=0.1)
    steps(straight, 0, 3)
    file = io.BytesIO()
    torch.save(straight.state_dict(), file)
    steps(straight, 3, 6)

    file.seek(0)
    state = torch.load(file, weights_only=True)
    # by name: another padding, and conv weights that are contiguous here, take the same checkpoint
    monkeypatch.setattr(adamw_ema, "_ALIGN", 64)
    resumed = AdamWEma(Parts(SHAPES).to(device, dtype).to(memory_format=torch.contiguous_format), weight_decay=0.1)
    assert resumed.model.conv.is_contiguous()
    resumed.load_state_dict(state)
    for p, value in zip(trained(resumed.model), state["parameters"].values(), strict=True):
        assert torch.equal(p, value.to(p))  # the bfloat16 copy too
    steps(resumed, 3, 6)
    for key in ("parameters", "m", "v", "ema"):
        for name, value in straight.state_dict()[key].items():
            # The norm adds in another order where the padding differs.
            torch.testing.assert_close(resumed.state_dict()[key][name], value, rtol=1e-6, atol=1e-8)
    monkeypatch.undo()
    again = AdamWEma(Parts(SHAPES).to(device, dtype), weight_decay=0.1)
    again.load_state_dict(state)
    steps(again, 3, 6)
    for key in ("parameters", "m", "v", "ema"):
        assert all(torch.equal(again.state_dict()[key][n], x) for n, x in straight.state_dict()[key].items()), key


def test_a_state_that_does_not_fit_is_refused_by_name():
    optimizer = AdamWEma(Parts([(3,)]))
    good = copy.deepcopy(optimizer.state_dict())
    before = optimizer.master.clone()
    for change, message in (
        (lambda s: s["m"].pop("conv"), r"m lacks 'conv'"),
        (lambda s: s["ema"].update(stranger=torch.zeros(1)), r"ema has 'stranger' besides"),
        (lambda s: s["v"].update({"rest.0": torch.zeros(4)}), r"v 'rest.0' is \[4\], not \[3\]"),
        (lambda s: s.pop("step"), r"state lacks 'step'"),
        (lambda s: s["parameters"].clear(), r"parameters lacks 'conv', parameters lacks 'rest.0'"),
    ):
        bad = copy.deepcopy(good)
        bad["parameters"]["conv"].add_(1)
        change(bad)
        with pytest.raises(ValueError, match=message):
            optimizer.load_state_dict(bad)
        assert torch.equal(optimizer.master, before)
    optimizer.load_state_dict(good)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_averaged_network_loads_into_another(dtype):
    model = small_network().to(dtype)
    optimizer = AdamWEma(model)
    losses(model, lambda: optimizer.step(0.02, 0.5), optimizer.zero_grad, steps=2)
    state = optimizer.ema_state_dict()
    other = small_network()
    other.load_state_dict(state)  # strict
    for (name, p), q in zip(other.named_parameters(), optimizer.state_dict()["ema"].values(), strict=True):
        assert state[name].dtype == torch.float32 and torch.equal(p, q)
    assert all(torch.equal(state[name], buffer) for name, buffer in model.named_buffers())
    kept = copy.deepcopy(state)
    losses(model, lambda: optimizer.step(0.02, 0.5), optimizer.zero_grad, steps=1)
    assert all(torch.equal(state[k], kept[k]) for k in kept)  # copies


def test_shared_parameters_count_once():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    optimizer = AdamWEma(model)
    model(torch.ones(2, 4)).sum().backward()
    optimizer.step(0.1, 0.5)
    assert model[0].weight is model[1].weight and set(optimizer.state_dict()["m"]) == {"0.weight", "0.bias", "1.bias"}
    state = optimizer.ema_state_dict()
    assert set(state) == set(model.state_dict()) and torch.equal(state["0.weight"], state["1.weight"])


def test_gradients_there_before_are_kept():
    model = nn.Linear(3, 2)
    model(torch.ones(1, 3)).sum().backward()
    optimizer = AdamWEma(model)
    assert torch.equal(model.weight.grad, torch.ones(2, 3))
    assert float(optimizer.step(0.1, 0.9)) == pytest.approx(8**0.5)


def test_lost_views_are_refused_by_name():
    model = nn.Linear(3, 2)
    optimizer = AdamWEma(model)
    model.zero_grad(set_to_none=True)
    model(torch.ones(1, 3)).sum().backward()
    with pytest.raises(RuntimeError, match=r"weight .*zero_grad"):
        optimizer.step(0.1, 0.9)
    optimizer = AdamWEma(model)
    model.bias.data = torch.zeros(2)
    with pytest.raises(RuntimeError, match=r"bias .*before"):
        optimizer.step(0.1, 0.9)


def test_what_cannot_be_trained_is_refused():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2).bfloat16())
    with pytest.raises(ValueError, match=r"torch.bfloat16 on cpu, torch.float32 on cpu"):
        AdamWEma(model)
    with pytest.raises(ValueError, match=r"float16"):
        AdamWEma(nn.Linear(2, 2).half())
    with pytest.raises(ValueError, match=r"none to train"):
        AdamWEma(nn.Linear(2, 2).requires_grad_(False))
    for wrong in ({"betas": (0.9, 1.0)}, {"eps": 0.0}, {"weight_decay": -1.0}):
        with pytest.raises(ValueError, match="needs betas"):
            AdamWEma(nn.Linear(2, 2), **wrong)


def operands(device, dtype, length=4096):
    buffers = [torch.randn(length, device=device) for _ in range(4)]
    buffers[2].abs_()
    grad = torch.randn(length, device=device, dtype=dtype)
    work = None if dtype == torch.float32 else torch.full_like(grad, math.nan)
    norm, step, rates = grad.float().norm(), torch.ones((), device=device), torch.tensor([0.1, 0.5], device=device)
    master, *moments = buffers
    return (master, grad, *moments, work, norm, step, rates, 1.0, 0.9, 0.999, 1e-8, 0.01)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_operator_is_sound_and_compiles_whole(triton_kernels, dtype):
    args = operands(triton_kernels, dtype)
    torch.library.opcheck(adamw_ema._adamw_ema, args)

    def update(*args):
        adamw_ema._adamw_ema(*args)
        return args[0] + 1

    eager, compiled, plain = copy.deepcopy(args), copy.deepcopy(args), copy.deepcopy(args)
    torch.testing.assert_close(
        torch.compile(update, fullgraph=True, backend="aot_eager")(*compiled), update(*eager), rtol=0, atol=0
    )
    adamw_ema.reference_adamw_ema(*plain)
    for a, b, c in list(zip(eager, compiled, plain, strict=True))[: 6 if dtype == torch.bfloat16 else 5]:
        assert torch.equal(a, b)
        torch.testing.assert_close(a, c, rtol=1e-2 if a.dtype == torch.bfloat16 else 1e-5, atol=1e-6)


@pytest.mark.gpu
def test_a_captured_step_replays():
    torch.manual_seed(0)
    model, twin = (Parts(SHAPES).cuda() for _ in range(2))
    twin.load_state_dict(model.state_dict())
    captured, eager = AdamWEma(model), AdamWEma(twin)
    rates = torch.tensor([0.01, 0.9], device="cuda", dtype=torch.float64)
    gradients = torch.randn(4, len(captured.grad), device="cuda")
    captured.grad.copy_(gradients[0])
    captured.step(rates[0], rates[1], 1.0)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        norm = captured.step(rates[0], rates[1], 1.0)
    eager.grad.copy_(gradients[0])
    eager.step(0.01, 0.9, 1.0)
    for i in range(1, 4):
        rates[0] = 0.01 * i
        captured.grad.copy_(gradients[i])
        graph.replay()
        eager.grad.copy_(gradients[i])
        torch.testing.assert_close(norm, eager.step(0.01 * i, 0.9, 1.0))
    assert captured.state_dict()["step"] == 4
    torch.testing.assert_close(captured.ema, eager.ema)
