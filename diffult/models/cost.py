"""What a network costs: parameters and counted work."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode


def parameters(model: nn.Module) -> int:
    """Number of parameters, trainable or not."""
    return sum(p.numel() for p in model.parameters())


def forward_flops(model: nn.Module, inputs: Sequence[Tensor], **named: Tensor) -> int:
    """Work of one forward per image at 2 FLOP per multiply-add: convolutions, products and attention.

    inputs, named: the arguments of `model`, batch first; only shapes and types matter, as it runs on the meta device.
    """
    state = _meta({**dict(model.named_parameters()), **dict(model.named_buffers())})
    training = model.training
    model.eval()  # batch norm refuses to train on one position
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        functional_call(model, state, tuple(tensor.to("meta") for tensor in inputs), _meta(named))
    model.train(training)
    return counter.get_total_flops() // inputs[0].shape[0]


def _meta(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.to("meta") for name, tensor in tensors.items()}


def summary(name: str, model: nn.Module, inputs: Sequence[Tensor]) -> str:
    """One line such as "UNet: 0.70 M parameters, 0.1012 GFLOP per image"; inputs as for `forward_flops`."""
    giga = forward_flops(model, inputs) / 1e9
    return f"{name}: {parameters(model) / 1e6:.2f} M parameters, {giga:.4g} GFLOP per image"
