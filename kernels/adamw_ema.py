"""AdamW (Loshchilov and Hutter 2019, algorithm 2) and the exponential moving average, in one pass over all parameters.

With gradient g, learning rate lr, weight decay d and step t, all elementwise but the norm:

    g   = g min(1, max_norm / (|g| + 1e-6))           as torch.nn.utils.clip_grad_norm_
    m   = beta1 m + (1 - beta1) g
    v   = beta2 v + (1 - beta2) g^2
    p   = p (1 - lr d) - lr (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + eps)
    ema = decay ema + (1 - decay) p

It must read p, g, m, v, ema and write p, m, v, ema: 36 bytes a parameter in float32, and also 36 with a bfloat16
working copy (2 for its gradient, 2 for the copy). The kernel moves just these. The norm must be known before: it reads
the gradient once more.

Several processes share the work: each keeps master, m, v and ema of its part of the parameters alone (`Shards`).
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import triton
import triton.language as tl
from torch import Tensor, nn

from kernels.dispatch import on_device, tile, use_triton
from kernels.shards import ROW, GradientExchange, Shards

_ALIGN = 16  # elements: every parameter starts on 64 bytes, 32 in the bfloat16 copy, for cuBLAS and cuDNN
_CPU_CHUNK = 1 << 17  # elements a thread: AdamW's part of a chunk is still in the cache when the average comes by


def reference_adamw_ema(
    master: Tensor,
    grad: Tensor,
    m: Tensor,
    v: Tensor,
    ema: Tensor,
    work: Tensor | None,
    norm: Tensor,
    step: Tensor,
    rates: Tensor,
    max_norm: float | None,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
) -> None:
    """One step, in place in `master`, `m`, `v`, `ema` and `work`, by torch's fused AdamW and a lerp.

    Args:
        master, m, v, ema: float32 [N], N a multiple of 4096.
        grad: float32 or bfloat16 [N], left as it is.
        work: bfloat16 [N], becomes master rounded; or None.
        norm: of the gradient, float32 [].
        step: which step this is, from 1 on, float32 [].
        rates: learning rate and 1 - decay, float32 [2].
    """
    clip = None if max_norm is None else (max_norm / (norm + 1e-6)).clamp(max=1)
    # A Python number makes the CPU's lerp faster; elsewhere taking it would wait for the device.
    weight = rates[1] if master.is_cuda else rates[1].item()
    chunk = len(master) if master.is_cuda else _CPU_CHUNK * torch.get_num_threads()
    for p, g, m_, v_, e in zip(*(x.split(chunk) for x in (master, grad, m, v, ema)), strict=True):
        g = g.float() if clip is None else g.float() * clip
        torch._fused_adamw_(  # called by torch.optim.AdamW(fused=True)
            [p], [g], [m_], [v_], [], [step], lr=rates[0], beta1=beta1, beta2=beta2, eps=eps,
            weight_decay=weight_decay, amsgrad=False, maximize=False,
        )  # fmt: skip
        e.lerp_(p, weight)
    if work is not None:
        work.copy_(master)


@triton.jit
def _one_minus_power(x):
    """1 - exp(x) for x <= 0, without cancellation near 0: there by the series, to float32 rounding."""
    series = 1.0 + x / 5.0 * (1.0 + x / 6.0)
    series = -x * (1.0 + x / 2.0 * (1.0 + x / 3.0 * (1.0 + x / 4.0 * series)))
    return tl.where(x > -0.25, series, 1.0 - tl.exp(x))


@triton.jit
def _lerp(a, b, share):
    """(1 - share) a + share b as in torch.lerp, from the nearer end: a small share keeps its digits, and
    a large one leaves no rounding of `a` in a small result.
    """
    return tl.where(share < 0.5, a + share * (b - a), b - (1.0 - share) * (b - a))


@triton.jit
def _adamw_ema_kernel(
    master_ptr, grad_ptr, m_ptr, v_ptr, ema_ptr, work_ptr, norm_ptr, step_ptr, rates_ptr,
    max_norm, log_beta1, log_beta2, share1, share2, eps, weight_decay,
    CLIP: tl.constexpr, WORK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One block of the flat buffers; share1 and share2 are 1 - beta1 and 1 - beta2, rounded after the subtraction."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    g = tl.load(grad_ptr + at).to(tl.float32)
    p = tl.load(master_ptr + at)
    m = tl.load(m_ptr + at)
    v = tl.load(v_ptr + at)
    ema = tl.load(ema_ptr + at)
    step = tl.load(step_ptr)
    learning_rate = tl.load(rates_ptr)
    average = tl.load(rates_ptr + 1)

    if CLIP:
        clip = max_norm / (tl.load(norm_ptr) + 1e-6)
        g *= tl.where(clip > 1.0, 1.0, clip)  # a norm that is no number stays one, as in torch
    m = _lerp(m, g, share1)
    v = _lerp(v, g * g, share2)
    rate = learning_rate / _one_minus_power(step * log_beta1)
    root = tl.sqrt(v) / tl.sqrt(_one_minus_power(step * log_beta2))
    p = p * (1.0 - learning_rate * weight_decay) - rate * m / (root + eps)
    ema = _lerp(ema, p, average)

    tl.store(m_ptr + at, m)
    tl.store(v_ptr + at, v)
    tl.store(master_ptr + at, p)
    tl.store(ema_ptr + at, ema)
    if WORK:
        tl.store(work_ptr + at, p.to(work_ptr.dtype.element_ty))


def _log(beta: float) -> float:
    return math.log(beta) if beta > 0 else -math.inf


@torch.library.custom_op("diffult::adamw_ema", mutates_args=("master", "m", "v", "ema", "work"))
def _adamw_ema(
    master: Tensor,
    grad: Tensor,
    m: Tensor,
    v: Tensor,
    ema: Tensor,
    work: Tensor | None,
    norm: Tensor,
    step: Tensor,
    rates: Tensor,
    max_norm: float | None,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
) -> None:
    """`reference_adamw_ema` in one kernel. It returns nothing, so it needs no fake; it is not to be differentiated."""
    sizes = tile("adamw_ema", _key(grad), master.device, block=1024, warps=4)
    if ROW % sizes["block"]:
        raise ValueError(f"adamw_ema: block = {sizes['block']} does not divide {ROW}, so the end would be left out")
    with on_device(master):
        _adamw_ema_kernel[(len(master) // sizes["block"],)](
            master, grad, m, v, ema, master if work is None else work, norm, step, rates,
            0.0 if max_norm is None else max_norm, _log(beta1), _log(beta2), 1 - beta1, 1 - beta2, eps, weight_decay,
            CLIP=max_norm is not None, WORK=work is not None, BLOCK=sizes["block"], num_warps=sizes["warps"],
        )  # fmt: skip


def _key(grad: Tensor) -> str:
    """The buffers' name in the tile table: one for all lengths between two powers of two, the upper included."""
    return f"N{triton.next_power_of_2(len(grad))}-{str(grad.dtype).removeprefix('torch.')}"


class _Slot(NamedTuple):
    """Where a parameter lies in the flat buffers."""

    name: str
    parameter: nn.Parameter
    start: int
    strides: tuple[int, ...]

    def view(self, flat: Tensor) -> Tensor:
        return flat.as_strided(self.parameter.shape, self.strides, self.start)


class AdamWEma:
    """The optimizer of a network and its moving average, over flat buffers.

    Building it re-lays all trainable parameters into one flat float32 `master` buffer: each parameter's data becomes a
    view of it, with the strides it had (channels-last stays channels-last), and each gradient a view of the flat
    `grad`. Where the parameters are bfloat16 they are views of a flat bfloat16 `work` instead, kept equal to `master`
    rounded, and `grad` is bfloat16.

    With a process group, each process keeps 1 / size of master, m, v and ema, its own pieces of each bucket (see
    `Shards`), and the parameters are views of a whole flat `work` of their type. `step` then averages the gradients
    over the processes, updates these pieces and exchanges the new weights. `bytes_per_parameter` has what that saves.
    Every process must call `step`, `state_dict` and `ema_state_dict`, in the same order; `load_state_dict` exchanges
    nothing, and a state is the same whatever the number of processes.

    As every `.grad` is there already, autograd adds to it in place, and the views stay; so clear gradients with this
    class's `zero_grad` (setting them to None takes the views away, which `step` refuses). Move the network to its
    device and load its weights before building this; a bfloat16 network's weights are loaded by `load_state_dict` here,
    since writing to the copy alone does not reach the master.

    Shared parameters count once; those that need no gradient are left alone.
    """

    def __init__(
        self,
        model: nn.Module,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        """
        Args:
            group: the processes that train the network, with the same weights; None: this one alone.

        Raises:
            ValueError: nothing to train; parameters of several devices or types, or of a type other than float32 and
                bfloat16; a setting out of range.
        """
        if not all(0 <= beta < 1 for beta in betas) or eps <= 0 or weight_decay < 0:
            raise ValueError(
                f"AdamWEma needs betas in [0, 1), eps > 0, weight_decay >= 0; got {betas}, {eps}, {weight_decay}"
            )
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        kinds = sorted({f"{p.dtype} on {p.device}" for _, p in named})
        if len(kinds) != 1 or named[0][1].dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(
                "AdamWEma needs parameters all float32 or all bfloat16 on one device, "
                f"got {', '.join(kinds) or 'none to train'}"
            )
        self.model, self.betas, self.eps, self.weight_decay = model, betas, eps, weight_decay
        device, dtype = named[0][1].device, named[0][1].dtype

        self._slots, start = [], 0
        for name, p in named:
            # Strides of a dense copy: the parameter's own, unless it has gaps or overlaps.
            self._slots.append(_Slot(name, p, start, torch.empty_like(p, device="meta").stride()))
            start += -(-p.numel() // _ALIGN) * _ALIGN
        shards = Shards(start, group)
        # Gradient, moments and master are 0 between the parameters, and a step leaves zeros 0.
        whole = torch.zeros(shards.length, device=device)
        for slot in self._slots:
            slot.view(whole).copy_(slot.parameter.detach())
        self.master = shards.own(whole)
        self.m, self.v, self.ema = torch.zeros_like(self.master), torch.zeros_like(self.master), self.master.clone()
        self.grad = torch.zeros(shards.length, device=device, dtype=dtype)
        self.work = None if self.master is whole and dtype == torch.float32 else whole.to(dtype)
        # What the kernel rounds to: this process's pieces of `work`, or all of it.
        rounded = None if dtype == torch.float32 else self.work
        self._rounded = None if rounded is None else shards.own(rounded)
        self._rates = torch.zeros(2, device=device)
        self._step = torch.zeros((), device=device)
        self._shards = shards
        self._views = []
        for slot in self._slots:
            data, grad = slot.view(whole if self.work is None else self.work), slot.view(self.grad)
            if slot.parameter.grad is not None:
                grad.copy_(slot.parameter.grad)
            slot.parameter.grad = None  # its strides may differ from those of the new data
            slot.parameter.data = data
            slot.parameter.grad = grad
            self._views.append((data.data_ptr(), grad))
        spans = [(slot.parameter, slot.start, slot.start + slot.parameter.numel()) for slot in self._slots]
        self._exchange = GradientExchange(shards, self.grad, spans) if shards.size > 1 else None

    def overlap_exchange(self) -> None:
        """Lets the exchange of gradients begin during the backward pass that follows, the last one of this step.
        Without this call `step` does all of it; nothing where the process is alone."""
        if self._exchange is not None:
            self._exchange.overlap()

    @torch.no_grad()
    def step(self, learning_rate: float | Tensor, ema_decay: float | Tensor, max_norm: float | None = None) -> Tensor:
        """One update with the gradients as they are; the gradients are left unscaled.

        A step can be captured in a CUDA graph. Captured floats are constants of the graph: give tensors there.

        Args:
            learning_rate, ema_decay: floats, or scalar tensors on the parameters' device.
            max_norm: gradients of a larger norm are scaled down to it; None: never.

        Returns:
            The norm of the whole gradient before clipping, float32 [], on the device: nothing waits for it.

        Raises:
            RuntimeError: a parameter or its gradient is no longer a view of the flat buffers.
        """
        for slot, (address, grad) in zip(self._slots, self._views, strict=True):
            if slot.parameter.grad is not grad or slot.parameter.data_ptr() != address:
                raise RuntimeError(
                    f"{slot.name} or its gradient no longer lies in AdamWEma's buffers: clear gradients with "
                    "AdamWEma.zero_grad(), and move or convert the network before AdamWEma is built"
                )
        grad = self.grad if self._exchange is None else self._exchange.finish()
        # By rows first: the CPU's one long float32 sum is off by 4e-4 at ten million elements. On a CPU in chunks, too:
        # it turns all that it is given to float32 before it sums.
        rows = grad.view(-1, ROW)
        parts = (rows,) if rows.is_cuda else rows.split(_CPU_CHUNK // ROW)
        norms = [torch.linalg.vector_norm(part, dim=1, dtype=torch.float32) for part in parts]
        norm = self._shards.norm(torch.linalg.vector_norm(torch.cat(norms)))
        self._step += 1
        # 1 - decay is taken before rounding to float32: after it, 1 - 0.9999 is off by 2e-4 of itself.
        for rate, value in zip(self._rates, (learning_rate, 1 - ema_decay), strict=True):
            rate.copy_(value) if isinstance(value, Tensor) else rate.fill_(value)
        triton_serves = use_triton("adamw_ema", _key(grad), self.master.device)
        (_adamw_ema if triton_serves else reference_adamw_ema)(
            self.master, grad, self.m, self.v, self.ema, self._rounded, norm, self._step, self._rates,
            max_norm, *self.betas, self.eps, self.weight_decay,
        )  # fmt: skip
        if self._exchange is not None and self.work is not None:
            self._shards.all_gather(self.master if self._rounded is None else self._rounded, self.work)
        return norm

    def zero_grad(self) -> None:
        """Zeroes all gradients in one pass, in place: the parameters' `.grad` stay views of the flat gradient."""
        self.grad.zero_()

    def ema_state_dict(self) -> dict[str, Tensor]:
        """The averaged network under the keys of `model.state_dict()`: copies, parameters float32, buffers as they are.

        Buffers, and parameters that are not trained, are not averaged.
        """
        whole = self.ema.new_empty(self._shards.length)
        self._shards.all_gather(self.ema, whole)
        slots = {id(slot.parameter): slot for slot in self._slots}
        state = {}
        for key, value in self.model.state_dict(keep_vars=True).items():
            if id(value) in slots:
                state[key] = slots[id(value)].view(whole)
            else:
                state[key] = (value.float() if isinstance(value, nn.Parameter) else value).detach().clone()
        return state

    def state_dict(self) -> dict[str, Any]:
        """{"step": int, "parameters" | "m" | "v" | "ema": {name: float32}}, independent of how the buffers are laid:
        copies in host memory. Of several processes the first gets it, the others an empty dict."""
        gathered = {key: self._shards.gather_on_host(flat) for key, flat in self._buffers().items()}
        state = {key: self._by_name(flat) for key, flat in gathered.items() if flat is not None}
        return {"step": int(self._step)} | state if state else {}

    def _by_name(self, flat: Tensor) -> dict[str, Tensor]:
        return {slot.name: slot.view(flat) for slot in self._slots}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes a `state_dict` over, in place, the network's parameters included.

        Raises:
            ValueError: something is missing, besides, or of another shape; nothing has been changed.
        """
        buffers = self._buffers()
        wrong = _misfits("state", {"step": None} | dict.fromkeys(buffers), dict.fromkeys(state))
        if not wrong:
            shapes = {s.name: list(s.parameter.shape) for s in self._slots}
            for key in buffers:
                wrong += _misfits(key, shapes, {name: list(value.shape) for name, value in state[key].items()})
        if wrong:
            more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
            raise ValueError(f"AdamWEma state does not fit: {', '.join(wrong[:5])}{more}")
        for key, flat in buffers.items():
            whole = torch.zeros(self._shards.length)
            for name, view in self._by_name(whole).items():
                view.copy_(state[key][name])
            flat.copy_(self._shards.own(whole))
            if key == "parameters" and self.work is not None:
                self.work.copy_(whole)
        self._step.fill_(state["step"])

    def _buffers(self) -> dict[str, Tensor]:
        return {"parameters": self.master, "m": self.m, "v": self.v, "ema": self.ema}


def bytes_per_parameter(dtype: torch.dtype, processes: int = 1) -> float:
    """What each process holds of a network of `dtype` in `AdamWEma`: weights, gradient, moments and average."""
    if processes == 1:
        return 20.0
    return 2 * dtype.itemsize + 20 / processes  # the network and its gradient are whole; pieces of both are beside them


def _misfits(where: str, want: dict[str, Any], got: dict[str, Any]) -> list[str]:
    """How `got`, shapes by name, differs from `want`."""
    missing = [f"{where} lacks {name!r}" for name in want if name not in got]
    extra = [f"{where} has {name!r} besides" for name in got if name not in want]
    shape = [f"{where} {k!r} is {got[k]}, not {want[k]}" for k in want if k in got and got[k] != want[k]]
    return missing + extra + shape
