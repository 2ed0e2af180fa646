"""The extractor: class frequencies are taken out of its logits once, by its loss or by what it reads of them."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from diffult import train_extractor
from diffult.errors import UserError
from diffult.longtail.extractor import Extractor, load_extractor
from diffult.longtail.losses import log_prior
from diffult.longtail.statistics import ClassStatistics
from diffult.runs.run_dir import RunDir


def test_classes_are_seen_without_their_frequency():
    """Equal evidence but for the prior: softmax(logits) / pi must decide; where the loss adjusted them, the logits."""
    network = nn.Module()
    network.head = nn.Identity()
    statistics, prior = ClassStatistics(torch.zeros(2, 2), torch.ones(2)), log_prior(torch.tensor([90, 10]))
    posterior = torch.tensor([[0.95, 0.05], [0.85, 0.15]])
    expected = (posterior / torch.tensor([0.9, 0.1])).argmax(1).tolist()
    assert expected == [0, 1]
    assert Extractor(network, 8, statistics, prior).classify(posterior.log()).tolist() == expected
    assert Extractor(network, 8, statistics, torch.zeros(2)).classify(posterior.log()).tolist() == [0, 0]


@pytest.mark.parametrize("loss", ["cross_entropy", "logit_adjust"])
def test_logits_are_adjusted_once(fresh, monkeypatch, loss):
    trained = []
    monkeypatch.setattr(train_extractor, "fit", lambda training: trained.append(training))
    run = RunDir.open(fresh.path, overrides=[f"extractor.loss={loss}", "extractor.steps=7"])
    train_extractor.train_extractor(run)
    counts = torch.tensor([60, 43, 30, 22, 15, 11, 8, 5, 4, 3], dtype=torch.float64)
    prior = (counts / counts.sum()).log().float()
    in_training, afterwards = (prior, 0 * prior) if loss == "logit_adjust" else (None, prior)
    torch.testing.assert_close(trained[0].phases[0].loss.prior, in_training, check_device=False)
    read = load_extractor(run.folder("extractor"), torch.device("cpu"))
    torch.testing.assert_close(read.prior, afterwards)


def test_an_extractor_without_prior_is_refused(tiny_run, tmp_path):
    shutil.copytree(tiny_run.folder("extractor"), tmp_path / "extractor")
    file = tmp_path / "extractor" / "statistics.safetensors"
    tensors = load_file(file)
    del tensors["prior"]
    save_file(tensors, file)
    with pytest.raises(UserError, match=r"extractor: an extractor of an earlier version; delete the folder"):
        load_extractor(file.parent, torch.device("cpu"))
