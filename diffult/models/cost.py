"""What a network costs: parameters and counted work, told before a long job starts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode


def parameters(model: nn.Module) -> int:
    """Number of trainable and frozen parameters; buffers are not counted."""
    return sum(p.numel() for p in model.parameters())


def forward_flops(model: nn.Module, inputs: Sequence[Tensor], **named: Tensor) -> int:
    """Work of one forward per image at 2 FLOP per multiply-add: convolutions, products and attention.

    inputs, named: the arguments of `model`, batch first; only shapes and types matter. Nothing is
    computed: the forward runs on the meta device, where attention too is an operator that the counter knows.
    """
    state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    state = {name: torch.empty_like(tensor, device="meta") for name, tensor in state.items()}
    meta_inputs = tuple(torch.empty_like(tensor, device="meta") for tensor in inputs)
    meta_named = {name: torch.empty_like(tensor, device="meta") for name, tensor in named.items()}
    training = model.training
    model.eval()  # batch norm refuses to train on one position
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        functional_call(model, state, meta_inputs, meta_named)
    model.train(training)
    return counter.get_total_flops() // inputs[0].shape[0]


def summary(name: str, model: nn.Module, inputs: Sequence[Tensor]) -> str:
    """One line, such as "UNet: 0.70 M parameters, 0.1012 GFLOP per image"; inputs as for `forward_flops`."""
    giga = forward_flops(model, inputs) / 1e9
    return f"{name}: {parameters(model) / 1e6:.2f} M parameters, {giga:.4g} GFLOP per image"
