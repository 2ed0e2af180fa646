"""The report of a comparison, read back as HTML."""

from __future__ import annotations

from report_pages import CLASSES, Page, example_comparison

from diffult.reporting.comparison import render


def test_the_table_shows_means_deviations_and_paired_gains() -> None:
    page = Page(render(example_comparison()))
    means = ["81.5 ± 0.7"] * 4
    gains = ["+2.0|(−10.7 to +14.7)", "+5.0|(+4.5 to +5.5)"]
    assert page.row("DiffuLT") == ["DiffuLT|diffult", "+ synthetic", *means, *gains, "600", "1 min 05 s"]
    assert page.row("Cross-entropy")[:3] == ["Cross-entropy|ce", "real", "70.5 ± 0.7"]
    assert page.row("Cross-entropy")[6:8] == ["–", "–"]
    assert page.row("Logit adjustment")[6:8] == ["baseline", "–"]
    assert [row[0] for row in page.tables[0][1:]] == [  # the highest top-1 first
        "DiffuLT|diffult", "Logit adjustment|logit_adjust", "Duplicates of real images|duplicates", "Cross-entropy|ce",
    ]  # fmt: skip


def test_the_summary_gives_the_gains_with_their_intervals() -> None:
    answers = Page(render(example_comparison())).answers
    assert answers["Which method wins?"].endswith("Difference, seed by seed: +1.0, +3.0 points.")
    gain = answers["Do synthetic images add anything to the best method without them?"]
    assert gain.startswith("Inconclusive: the interval includes 0. DiffuLT, 81.5 ± 0.7\xa0%, against Logit adjustment")
    gain = answers["Do they beat simply repeating real images?"]
    assert gain.startswith("Yes: the interval lies above 0.") and "+5.0 (+4.5 to +5.5) points" in gain


def test_methods_are_ranked_on_the_validation_images() -> None:
    comparison = example_comparison()
    for row in comparison["rows"]:
        row["validation"] = 99.0 if row["name"] == "ce" else 90.0
    page = Page(render(comparison))
    assert page.tables[0][1][:4] == ["Cross-entropy|ce", "real", "99.0", "70.5 ± 0.7"]  # the table has the same order
    answer = page.answers["Which method wins?"]
    assert answer.startswith(
        "Highest on the validation images (99.0\xa0%): Cross-entropy, 70.5 ± 0.7\xa0% on the test images."
    )


def test_the_page_gives_budget_command_and_machine() -> None:
    text = " ".join(Page(render(example_comparison())).text.split())
    assert "4 methods, 2 seeds (0 and 1), 3 classes of 40 down to 3 real training images" in text
    assert "600 steps of 64 images" in text
    assert "python -m diffult.compare --preset digits-lt --seeds 2" in text
    assert "Run on a CPU, torch 9, python 4." in text


def test_one_seed_has_neither_deviation_nor_interval() -> None:
    page = Page(render(example_comparison(seeds=1)))
    assert page.row("DiffuLT")[2] == "81.0" and page.row("DiffuLT")[6] == "+2.0"
    answer = page.answers["Do synthetic images add anything to the best method without them?"]
    assert answer.startswith("No interval: one seed.")


def test_a_comparison_without_synthetic_images_or_control() -> None:
    comparison = example_comparison()
    comparison["rows"] = comparison["rows"][:2]
    page = Page(render(comparison))
    assert [term for term in page.terms if term.endswith("?")] == ["Which method wins?"]
    assert "gain in top-1" not in page.text
    comparison = example_comparison()
    del comparison["rows"][2]
    comparison["rows"][-1]["paired_duplicates"] = None
    answer = Page(render(comparison)).answers["Do they beat simply repeating real images?"]
    assert answer == "Not measured: add 'duplicates' to --methods."
    comparison["rows"][-1]["name"] = "diffult@generate.balance_to=40@classifier.omega=0.5"
    answer = Page(render(comparison)).answers["Do they beat simply repeating real images?"]
    assert answer == "Not measured: add 'duplicates@generate.balance_to=40' to --methods."


def test_duplicates_that_are_the_best_without_synthetic_images_answer_both_questions() -> None:
    comparison = example_comparison()
    comparison["rows"][-1]["paired"] = comparison["rows"][-1].pop("paired_duplicates")
    comparison["rows"][-1]["paired_duplicates"] = None
    answers = Page(render(comparison)).answers
    answer = answers["Do they beat simply repeating real images?"]
    assert "+5.0 (+4.5 to +5.5) points" in answer
    assert answer == answers["Do synthetic images add anything to the best method without them?"]


def test_few_test_images_are_warned_of() -> None:
    comparison = example_comparison() | {"test_counts": [60, 60, 2]}
    assert "few: 2 test images, of 50.0 points each." in Page(render(comparison)).text
    assert "Few test images" not in Page(render(example_comparison())).text


def test_every_class_and_method_has_its_accuracy() -> None:
    page = Page(render(example_comparison()))
    by_class = page.tables[1]
    assert [head.split("|")[1] for head in by_class[0][2:]] == ["diffult", "logit_adjust", "duplicates", "ce"]
    assert [row[:3] for row in by_class[1:]] == [
        [CLASSES[1], "40", "81.5"],
        ["cat", "12", "81.5"],
        ["tail", "3", "81.5"],
    ]


def test_a_comparison_without_accuracies_by_class_leaves_them_out() -> None:
    comparison = example_comparison()
    for row in comparison["rows"]:
        row["mean"]["by_class"] = [None] * 3
    page = Page(render(comparison))
    assert len(page.tables) == 1 and "Accuracy by class" not in page.text
