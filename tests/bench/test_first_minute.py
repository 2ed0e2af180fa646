"""What a card may refuse, as far as a CPU can show it; and that a difference is noticed."""

import pytest
import torch

from bench import first_minute
from bench.first_minute import CHECKS
from diffult.errors import UserError


@pytest.mark.parametrize("name", CHECKS)
def test_each_runs_on_a_cpu(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    CHECKS[name](torch.device("cpu"))
    assert "relative difference" in capsys.readouterr().out


@pytest.mark.parametrize("wrong", [1.05, float("nan")])
@pytest.mark.parametrize("name", ["backward_in_graph", "checkpointing_in_graph", "graph_beside_nccl"])
def test_other_losses_in_the_graph_are_an_error(name: str, wrong: float, monkeypatch: pytest.MonkeyPatch) -> None:
    def losses(device: torch.device, *, graph: bool, **_: object) -> torch.Tensor:
        return torch.tensor([1.0, wrong if graph else 1.0])

    monkeypatch.setattr(first_minute, "losses", losses)
    with pytest.raises(UserError, match=r"losses.* differ by"):
        CHECKS[name](torch.device("cpu"))


def test_attention_that_is_another_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(first_minute, "attention", lambda q, k, v: 1.1 * v * q.mean() / k.mean())
    with pytest.raises(UserError, match="output and gradients differ"):
        CHECKS["attention_in_compile"](torch.device("cpu"))
