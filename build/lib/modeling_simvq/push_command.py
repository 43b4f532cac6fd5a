"""Command push: a tokenizer's folder, with its card, to the Hub."""

import argparse
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError

from .command_model import load_tokenizer

# What loading and reading a model needs. Other files of a folder may be anybody's.
PATTERNS = ["*.json", "*.safetensors", "*.py", "README.md", "LICENSE*", "samples/*"]


def add_to(commands) -> None:
    """Add the command to those of a command line."""
    parser = commands.add_parser(
        "push",
        help="send a tokenizer to the Hub",
        description="Load a tokenizer's folder, and send it to the Hub in one commit: weights, settings, code, "
        "card (README.md) and samples. Log in once with `hf auth login`. The project's "
        "hub_cards/push_to_hub.py also writes the card.",
    )
    parser.add_argument("model", type=Path, help="folder of the tokenizer")
    parser.add_argument("repo_id", help="such as me/my-tokenizer")
    parser.add_argument("--private", action="store_true", help="for a repository that is new")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Send the folder.

    Raises:
        ValueError: if it is no tokenizer or has no card; if the Hub refuses.
    """
    if not options.model.is_dir():
        raise ValueError(f"there is no folder {options.model}")
    if not (options.model / "README.md").is_file():
        raise ValueError(
            f"{options.model} has no README.md: write a card, or push it with hub_cards/push_to_hub.py of the "
            "project, which makes one"
        )
    load_tokenizer(str(options.model))
    api = HfApi()
    try:
        name = api.create_repo(
            options.repo_id, private=options.private or None, exist_ok=True
        ).repo_id
        commit = api.upload_folder(
            repo_id=name,
            folder_path=options.model,
            allow_patterns=PATTERNS,
            commit_message="Upload tokenizer",
        )
    except (HfHubHTTPError, HFValidationError, LocalTokenNotFoundError) as error:
        raise ValueError(
            f"the Hub refused {options.repo_id}: {str(error).splitlines()[0]}"
        ) from error
    print(commit.commit_url)
    return 0
