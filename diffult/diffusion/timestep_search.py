"""The best few timesteps of a trained model: lists of them are tried, by what their samples are like."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch

from diffult.diffusion.samplers import log_snr, nearest_timesteps

_FIRST_MOVE, _LAST_MOVE = 2.0, 0.2  # of log-SNR: factors e and 1.1 of sigma


def search_timesteps(
    alphas_cumprod: torch.Tensor, starts: Sequence[list[int]], distance: Callable[[list[int]], float], tries: int
) -> list[int]:
    """Pattern search (Hooke & Jeeves 1961): from the best of the starts on, one timestep at a time moves up or down in
    log-SNR, and stays where that is better; when no move is, all moves become half as long.

    Args:
        alphas_cumprod: float64 [T].
        starts: falling timesteps, all of one length.
        distance: of a list of timesteps, the less the better; always the same for the same list.
        tries: how many lists are tried at the most, one or more; none is tried twice.

    Returns:
        The best list that was tried, the first of several. More tries go on where fewer stop.
    """
    tried: set[tuple[int, ...]] = set()
    best, least = starts[0], float("inf")

    def improves(grid: list[int]) -> bool:
        nonlocal best, least
        if tuple(grid) in tried or len(tried) == tries:
            return False
        tried.add(tuple(grid))
        value = distance(grid)
        if value >= least:
            return False
        best, least = grid, value
        return True

    for start in starts:
        improves(start)
    move = _FIRST_MOVE
    while move >= _LAST_MOVE and len(tried) < tries:
        moved = [any(map(improves, _moves(alphas_cumprod, best, place, move))) for place in range(len(best))]
        move = move if any(moved) else move / 2
    return best


def _moves(alphas_cumprod: torch.Tensor, grid: list[int], place: int, move: float) -> Iterator[list[int]]:
    """The grid with one timestep moved up or down in log-SNR, where it still falls."""
    above, below = [len(alphas_cumprod), *grid, -1][place], [*grid, -1][place + 1]
    here = log_snr(alphas_cumprod)[grid[place]]
    for wanted in (here + move, here - move):
        (t,) = nearest_timesteps(alphas_cumprod, wanted[None])
        if below < t < above:
            yield [*grid[:place], t, *grid[place + 1 :]]
