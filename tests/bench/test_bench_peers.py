"""diffusers' network with our weights computes what ours computes, and its loops do the same work."""

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("diffusers", reason="the bench extra (diffusers) is not installed")

from bench.peers import SETTINGS, SOLVERS, build_peer, own_scheduler, sample, scheduler, training_step
from diffult.config import load_preset
from diffult.diffusion.schedule import Schedule
from diffult.errors import UserError
from diffult.models.config import UNetConfig
from diffult.models.unet import UNet

NETWORKS = {
    "DDPM": (UNetConfig(channels=16, multipliers=(1, 2, 2), num_res_blocks=2, attention_resolutions=(8,)), 16, 3),
    "ADM": (
        UNetConfig(channels=32, multipliers=(1, 2), num_res_blocks=1, attention_resolutions=(7,), head_width=16,
                   scale_shift=True, patch=2), 28, 1,
    ),
}  # fmt: skip


def build(name: str) -> tuple[UNet, int, list[torch.Tensor]]:
    """A network whose every weight matters (as initialised, branches end in zeros), and inputs."""
    config, size, channels = NETWORKS[name]
    torch.manual_seed(0)
    unet = UNet(config, size, channels, 10)
    for parameter in unet.parameters():
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    return unet, size, [torch.randn(4, channels, size, size), torch.randint(0, 1000, (4,)), torch.randint(0, 11, (4,))]


@pytest.mark.parametrize(("dtype", "allowed"), [(torch.float32, 1e-4), (torch.bfloat16, 5e-2)])
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("name", NETWORKS)
def test_the_peer_puts_out_what_ours_does(name, setting, dtype, allowed):
    """Also with float32 images for a network in bfloat16, as samplers call it."""
    unet, size, inputs = build(name)
    peer = build_peer(unet.to(dtype), size).in_setting(setting)
    with torch.no_grad():
        ours, theirs = unet(*inputs).float(), peer(*inputs)
    assert theirs.dtype == (torch.float32 if setting == "diffusers" else dtype)
    assert ours.std() > 0.05
    assert (ours - theirs).abs().max() < allowed * ours.abs().max()


def test_gradients_agree():
    unet, size, inputs = build("ADM")
    peer = build_peer(unet, size)
    target = torch.randn_like(inputs[0])
    for model in (unet, peer):
        F.mse_loss(model(*inputs), target).backward()
    ours, theirs = unet.conv_in.weight.grad, peer.network.conv_in.weight.grad
    assert (ours - theirs).norm() < 1e-4 * ours.norm()


def test_networks_without_a_peer_are_refused():
    config = NETWORKS["ADM"][0].model_copy(update={"resample_in_block": True})
    with pytest.raises(UserError, match="resample_in_block"):
        build_peer(UNet(config, 28, 1, 10), 28)


@pytest.mark.parametrize("fused", [False, True])
def test_the_peers_training_step_learns_one_batch(fused):
    torch.manual_seed(0)
    size, shape = 8, UNetConfig(channels=16, multipliers=(1,), num_res_blocks=1, attention_resolutions=())
    unet = UNet(shape, size, 3, 10)
    config = load_preset("cifar10-lt-100", ["diffusion.learning_rate=2e-3"]).diffusion
    images = torch.full((8, size, size, 3), 200, dtype=torch.uint8)
    labels = torch.arange(8) % 10
    step = training_step(
        build_peer(unet, size), config, Schedule("linear", 1000), images, labels, 10, torch.float32, fused
    )
    losses = [float(step()) for _ in range(60)]
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])


X0 = torch.full((2, 3, 4, 4), 0.5)


class Oracle(torch.nn.Module):
    """A network that knows the clean image."""

    def __init__(self, schedule):
        super().__init__()
        self.schedule = schedule

    def forward(self, x, t, labels):
        a, s = self.schedule.levels(t.long())
        return (x - a * X0) / s


def ends(schedule, made, more=None):
    torch.manual_seed(0)
    out = sample(Oracle(schedule), made, torch.randn(2, 3, 4, 4), torch.zeros(2, dtype=torch.int64), more=more)
    return out.shape == (2, 4, 4, 3) and (out.int() - 191).abs().max() <= 1


@pytest.mark.parametrize(  # ancestral steps at all timesteps
    ("name", "timesteps"), [("ddim", 1000), ("dpm++", 1000), ("dpm++sde", 1000), ("ddpm", 20)]
)
def test_the_peers_samplers_end_where_the_clean_image_is(name, timesteps):
    schedule = Schedule("linear", timesteps)
    config = load_preset("cifar10-lt-100").diffusion
    assert ends(schedule, *scheduler(config, schedule, name, 20, torch.device("cpu")))


@pytest.mark.parametrize("name", SOLVERS)
def test_the_peers_own_schedulers_end_where_the_clean_image_is_after_as_many_steps(name):
    schedule = Schedule("linear", 1000)
    made = own_scheduler(load_preset("cifar10-lt-100").diffusion, schedule, name, 8, torch.device("cpu"))
    assert len(made.timesteps) == 8 and ends(schedule, made)
