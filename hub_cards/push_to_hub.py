"""Publish a tokenizer or a generator on the Hub: weights, card, samples and, if asked, code, in one commit.

  python hub_cards/push_to_hub.py runs/mine/model me/my-tokenizer
  python hub_cards/push_to_hub.py runs/mine/model me/my-tokenizer --with-code --space me/my-demo
  python hub_cards/push_to_hub.py runs/mine/model me/my-tokenizer --dry-run
  python hub_cards/push_to_hub.py runs/generator/pipeline me/my-generator

Log in once with `hf auth login` (a token with write access). The model is loaded back and tried before anything
is sent, and what arrived is compared with what was sent. Pushing the same folder again changes nothing.
"""

import argparse
import json
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

# As a command this file's folder is on the path, but hub_cards is imported from the one above.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import transformers

from hub_cards.contents import PushError, tokenizer_contents
from hub_cards.evaluation import FILE_NAME, EvaluationError, read_evaluations
from hub_cards.generator import generator_contents, is_generator
from hub_cards.hub_commit import HubError, commit_files, hub_errors
from hub_cards.model_card import TRAINING_SETTINGS, public_settings, read_settings
from hub_cards.samples import SamplesError
from hub_cards.space_files import space_files

# What a push owns in the repository: files of these names that it does not send are deleted.
OWNED = (
    "*.safetensors",
    "*.safetensors.index.json",
    "*.py",
    "samples/*",
    FILE_NAME,
    TRAINING_SETTINGS,
)


def push_to_hub(
    model_dir: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    with_code: bool = False,
    dry_run: bool = False,
    evaluation: str | Path | None = None,
    without_evaluation: bool = False,
    samples: str | Path | None = None,
    space: str | None = None,
    card_options: dict | None = None,
) -> str:
    """Publish the model in a folder.

    Args:
        model_dir: what save_pretrained, the trainers or the converter wrote.
        repo_id: "name" in your own account, or "organisation/name". Made if it is not there.
        private: visibility of a new repository; one that exists stays as it is.
        revision: branch, made if it is not there; main by default.
        with_code: add the model's code, for trust_remote_code.
        dry_run: do everything but talk to the Hub; card and samples are kept in a folder.
        evaluation: JSON file of figures; by default evaluation.json in model_dir.
        without_evaluation: publish although there are no figures.
        samples: pictures, or a recording, to show on the card.
        space: id of a Gradio Space to publish too, showing this model; needs with_code, because a Space
            does not have the package.
        card_options: license, base_model and origin, as of make_model_card.

    Returns:
        Address of the commit; on a dry run, of the folder that holds card and samples.

    Raises:
        PushError: if the folder holds no model that loads and works, or no evaluation.
        HubError: if the Hub refuses, or what arrived there is not what was sent.
    """
    model_dir = Path(model_dir)
    if space and is_generator(model_dir):
        raise PushError("a Space shows a tokenizer, and this is a generator: leave out --space")
    if space and not with_code:
        raise PushError("a Space runs the model's code from its repository: add --with-code")
    evaluation_file = Path(evaluation) if evaluation else model_dir / FILE_NAME
    if not evaluation_file.is_file() and (evaluation or not without_evaluation):
        raise PushError(
            f"there is no evaluation {evaluation_file}: evaluate the model first, name its figures with "
            "--evaluation FILE, or publish it all the same with --without-evaluation"
        )
    with _folder(keep=dry_run) as made:
        evaluations = read_evaluations(evaluation_file) if evaluation_file.is_file() else []
        make = generator_contents if is_generator(model_dir) else tokenizer_contents
        settings = read_settings(model_dir)
        contents = make(
            model_dir,
            repo_id,
            made,
            evaluations=evaluations,
            settings=settings,
            with_code=with_code,
            samples=Path(samples) if samples else None,
            card_options=card_options or {},
        )
        (made / "README.md").write_text(str(contents.card))
        files = contents.files | {"README.md": made / "README.md"}
        if evaluation_file.is_file():
            files[FILE_NAME] = evaluation_file
        if settings:
            files[TRAINING_SETTINGS] = made / TRAINING_SETTINGS
            files[TRAINING_SETTINGS].write_text(
                json.dumps(public_settings(settings), indent=2) + "\n"
            )
        if dry_run:
            for name, path in sorted(files.items()):
                print(f"{path.stat().st_size:>14,}  {name}")
            return str(made)
        address = commit_files(
            repo_id, files, owned=OWNED, card=contents.card, private=private, revision=revision,
            message=f"Upload {contents.name}",
        )  # fmt: skip
        if space:
            commit_files(
                space,
                space_files(space, [repo_id], made),
                repo_type="space",
                private=private,
                message=f"Space for {repo_id}",
            )
    return address


@contextmanager
def _folder(keep: bool):
    """A new folder, which goes at the end unless it is to be looked at."""
    if keep:
        yield Path(tempfile.mkdtemp(prefix="simvq-push-"))
        return
    with tempfile.TemporaryDirectory(prefix="simvq-push-") as folder:
        yield Path(folder)


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "model_dir", help="folder with config.json, *.safetensors and the processor"
    )
    parser.add_argument("repo_id", help="name, or organisation/name, on the Hub")
    parser.add_argument(
        "--private", action="store_true", default=None, help="make a new repository private"
    )
    parser.add_argument("--revision", help="branch (default: main); made if it is not there")
    parser.add_argument(
        "--with-code", action="store_true", help="add the code, for trust_remote_code"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="show what would be sent; send nothing"
    )
    parser.add_argument("--evaluation", help=f"JSON of figures (default: MODEL_DIR/{FILE_NAME})")
    parser.add_argument("--without-evaluation", action="store_true", help="publish without figures")
    parser.add_argument(
        "--samples", help="pictures or a recording for the card: a file or a folder"
    )
    parser.add_argument("--license", default="mit", help="of the weights (default: %(default)s)")
    parser.add_argument(
        "--space",
        metavar="ID",
        help="publish a Gradio Space too (needs --with-code)",
    )
    options = parser.parse_args(arguments)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        arguments = vars(options)
        card_options = {"license": arguments.pop("license")}
        with hub_errors():
            address = push_to_hub(**arguments, card_options=card_options)
    except (PushError, HubError, EvaluationError, SamplesError, ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    print(
        f"dry run: card and samples are in {address}"
        if options.dry_run
        else f"published: {address}"
    )


if __name__ == "__main__":
    main()
