"""The page of results holds what the experiments found, and nothing older."""

from pathlib import Path

import pytest

from training.experiments import summary

REPOSITORY = Path(__file__).parents[3]


@pytest.fixture
def docs(tmp_path) -> Path:
    (tmp_path / "results" / "one").mkdir(parents=True)
    text = "# One\n\nText.\n\n| a | b |\n|---|---|\n| 1 | 2 |\n\n![](figure.png)\n\nScale: small.\n"
    (tmp_path / "results" / "one" / "README.md").write_text(text)
    (tmp_path / "results.md").write_text("before\n<!-- one -->\nold\n<!-- end of one -->\nafter\n")
    (tmp_path / "evaluation.md").write_text("no table\n")
    return tmp_path


def test_tables_replace_what_stood_between_the_marks(docs):
    with pytest.raises(SystemExit, match="out of date"):
        summary.main(["--check", "--docs", str(docs)])
    summary.main(["--docs", str(docs)])
    page = (docs / "results.md").read_text()
    assert "old" not in page and page.startswith("before\n") and page.endswith("after\n")
    assert "| 1 | 2 |\n\nScale: small.\n<!-- end of one -->" in page
    summary.main(["--check", "--docs", str(docs)])


def test_an_experiment_without_results_is_named(docs):
    (docs / "results.md").write_text("<!-- two -->\n<!-- end of two -->\n")
    with pytest.raises(SystemExit, match="training.experiments.two first"):
        summary.main(["--docs", str(docs)])


def test_the_committed_page_is_up_to_date():
    summary.main(["--check"])
