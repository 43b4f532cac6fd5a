"""Put the tables of docs/results/*/README.md into pages of docs, so that no figure is copied by hand.

python -m training.experiments.summary          # after an experiment was run again
python -m training.experiments.summary --check  # fails if a page does not hold what the experiments found

A table stands between the lines <!-- NAME --> and <!-- end of NAME -->, with the sentence about its scale.
"""

import argparse
import re
import sys
from pathlib import Path

from hub_cards.user_error import one_line_errors

REPOSITORY = Path(__file__).resolve().parents[2]
PAGES = ("results.md", "evaluation.md")


def filled(page: str, results: Path) -> str:
    """The page with the tables of all experiments that it names.

    Raises:
        ValueError: if the page names an experiment that has no results.
    """

    def replace(match: re.Match) -> str:
        name = match["name"]
        readme = results / name / "README.md"
        if not readme.is_file():
            raise ValueError(
                f"there is no {readme}: run python -m training.experiments.{name} first"
            )
        lines = readme.read_text().splitlines()
        table = [line for line in lines if line.startswith("|")]
        scale = [line for line in lines if line.startswith("Scale: ")]
        body = "\n".join([*table, "", *scale])
        return f"<!-- {name} -->\n{body}\n<!-- end of {name} -->"

    pattern = r"<!-- (?P<name>\w+) -->\n.*?<!-- end of (?P=name) -->"
    return re.sub(pattern, replace, page, flags=re.DOTALL)


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="change nothing, fail if it would")
    parser.add_argument("--docs", default=str(REPOSITORY / "docs"), help="folder of the pages")
    known = parser.parse_args(arguments)
    for path in (Path(known.docs) / page for page in PAGES):
        with one_line_errors():
            before = path.read_text()
            after = filled(before, path.with_name("results"))
        if known.check and before != after:
            sys.exit(f"error: {path} is out of date: python -m training.experiments.summary")
        path.write_text(after)
        print(f"{path} holds the tables of the experiments")


if __name__ == "__main__":
    main()
