"""The search of timesteps on a distance whose best list is known."""

import itertools

import pytest
import torch

from diffult.diffusion.samplers import SigmaRange, log_snr_grid, sigma_grid
from diffult.diffusion.schedule import Schedule
from diffult.diffusion.timestep_search import search_timesteps

ABAR = Schedule("cosine", 1000).alphas_cumprod
LOG_SIGMA = ((1 - ABAR) / ABAR).sqrt().log()
BEST = [980, 950, 880, 500, 40]
STARTS = [log_snr_grid(ABAR, 5), sigma_grid(ABAR, 5, SigmaRange(80, 0.002, 7))]


class Bowl:
    """The squared distance in log sigma to the best list, in every list that it was asked for."""

    def __init__(self):
        self.asked = []

    def __call__(self, grid):
        assert len(grid) == 5 and grid[-1] >= 0 and grid[0] < 1000
        assert all(a > b for a, b in itertools.pairwise(grid))
        self.asked.append(tuple(grid))
        return float((LOG_SIGMA[list(grid)] - LOG_SIGMA[BEST]).square().sum())


def test_the_search_comes_near_the_best_list_and_tries_none_twice():
    bowl = Bowl()
    found = search_timesteps(ABAR, STARTS, bowl, 1000)
    assert float((LOG_SIGMA[found] - LOG_SIGMA[BEST]).abs().max()) < 0.11  # the last moves are 0.1 to 0.2 in log-SNR
    assert len(bowl.asked) == len(set(bowl.asked)) < 150
    assert bowl.asked[:2] == [tuple(start) for start in STARTS]


@pytest.mark.parametrize("tries", [1, 2, 3, 20])
def test_a_search_stops_after_its_tries_and_more_go_on_from_there(tries):
    short, long = Bowl(), Bowl()
    found = search_timesteps(ABAR, STARTS, short, tries)
    search_timesteps(ABAR, STARTS, long, 40)
    assert len(short.asked) == tries and short.asked == long.asked[:tries]
    assert found == list(min(short.asked, key=Bowl()))


def test_a_full_house_of_timesteps_has_nowhere_to_go():
    everywhere = list(range(9, -1, -1))
    abar = torch.linspace(0.95, 0.05, 10, dtype=torch.float64)
    assert search_timesteps(abar, [everywhere], lambda grid: 1.0, 10) == everywhere
