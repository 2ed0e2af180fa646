"""The summary over seeds."""

import numpy as np
import pytest

from bench.seeds import machine, markdown, summarise


def test_summary_is_mean_and_sample_deviation():
    rng = np.random.default_rng(0)
    few = {"ce": rng.uniform(0, 100, 5), "diffult": rng.uniform(0, 100, 5)}
    runs = [
        {method: {"top1": 90.0, "many": 95.0, "medium": 92.0, "few": few[method][i]} for method in few}
        for i in range(5)
    ]
    summary = summarise(runs)
    assert list(summary) == ["ce", "diffult"]
    gain = few["diffult"] - few["ce"]
    assert summary["diffult"]["few_gain"] == pytest.approx([gain.mean(), gain.std(ddof=1)])
    assert summary["ce"]["few"] == pytest.approx([few["ce"].mean(), few["ce"].std(ddof=1)])
    assert summary["ce"]["few_gain"] == [0, 0]
    row = markdown(summary).splitlines()[-1]
    assert row.startswith("| DiffuLT | 90.0 ± 0.0 | 95.0 ± 0.0 |") and f"{few['diffult'].mean():.1f} ±" in row


@pytest.mark.parametrize(("value", "shown"), [(48.251, "48.3"), (48.349, "48.3")])
def test_a_figure_is_rounded_once(value, shown):
    """Rounded to two places first, these would show as 48.2 and 48.4."""
    run = {"ce": dict.fromkeys(("top1", "many", "medium", "few"), value)}
    assert f"| {shown} ± 0.0 |" in markdown(summarise([run]))


def test_one_seed_has_no_deviation():
    run = {"ce": {"top1": 1.0, "many": 2.0, "medium": 3.0, "few": 4.0}}
    assert summarise([run])["ce"]["few"] == [4.0, 0.0]


def test_a_group_without_classes_is_left_out():
    run = {"ce": {"top1": 1.0, "many": 2.0, "medium": None, "few": None}}
    summary = summarise([run, run])
    assert summary["ce"]["many"] == [2.0, 0.0] and "medium" not in summary["ce"]
    assert markdown(summary).splitlines()[-1] == "| Cross-entropy | 1.0 ± 0.0 | 2.0 ± 0.0 | – | – | – |"


def test_machine_names_device_and_versions():
    assert {"device", "torch", "python"} <= set(machine())
