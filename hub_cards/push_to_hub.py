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

from hub_cards.evaluation import FILE_NAME, read_evaluations
from hub_cards.generator_card import generator_contents, is_generator
from hub_cards.hub_commit import (
    check_may_push,
    check_name,
    commit_files,
    full_name,
    hub_errors,
    is_hidden,
    preview_commit,
)
from hub_cards.push_contents import (
    Contents,
    PushError,
    discriminator_files,
    tokenizer_contents,
)
from hub_cards.space_files import space_files
from hub_cards.tokenizer_card import TRAINING_SETTINGS, public_settings, read_settings
from hub_cards.user_error import one_line_errors


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
    with_discriminator: bool = False,
    card_options: dict | None = None,
) -> str:
    """Publish the model in a folder.

    Args:
        model_dir: what save_pretrained, the trainers or the converter wrote.
        repo_id: "name" in your own account, or "organisation/name". Made if it is not there.
        private: visibility of a new repository; one that exists stays as it is.
        revision: branch, made if it is not there; main by default.
        with_code: add the model's code, for trust_remote_code.
        dry_run: do everything but write to the Hub, print what would be sent and deleted, and refuse what the
            push would refuse, as far as reading tells; card, samples and the files of the Space are kept in
            a folder.
        evaluation: JSON file of figures; by default evaluation.json in model_dir.
        without_evaluation: publish although there are no figures.
        samples: images, or a recording, to show on the card.
        space: id of a Gradio Space to publish too, showing this model; needs with_code, because a Space
            does not have the package, and a public model on the main branch, because it reads that.
        with_discriminator: add discriminator/, so that a fine-tuning can go on with it.
        card_options: license, base_model and origin, as of make_model_card.

    Returns:
        Address of the commit; on a dry run, of the folder that holds card and samples.

    Raises:
        PushError: if the folder holds no model that loads and works, or no evaluation, or if a Space could
            not show it.
        HubError: if the Hub refuses, or what arrived there is not what was sent.
    """
    model_dir = Path(model_dir)
    if space:
        _check_space(model_dir, with_code=with_code, private=private, revision=revision)
    for one in (repo_id, space):
        if one is not None:
            check_name(one)
    # The card's program needs all of the name.
    name = _name_on_dry_run(repo_id, space) if dry_run else full_name(repo_id)
    with _folder(keep=dry_run) as made:
        contents = prepare_push(
            model_dir,
            name,
            made,
            with_code=with_code,
            evaluation=evaluation,
            without_evaluation=without_evaluation,
            samples=samples,
            with_discriminator=with_discriminator,
            card_options=card_options,
        )
        shown = space_files([name], made) if space else {}
        if dry_run:
            for title, files, options in (
                (name, contents.files, {"revision": revision}),
                (f"Space {space}", shown, {"repo_type": "space"}),
            ):
                if files:
                    print(f"{title}:")
                    print("\n".join(preview_commit(title.split()[-1], files, **options)))
            return str(made)
        if space and is_hidden(name):
            raise PushError(_hidden(name))
        address = commit_files(
            name, contents.files, card=contents.card, private=private, revision=revision,
            message=f"Upload {contents.name}",
        )  # fmt: skip
        if space:
            if is_hidden(name):  # an organisation may make all that is new private
                raise PushError(f"published {address}, but no Space: {_hidden(name)}")
            commit_files(
                space, shown, repo_type="space", private=private, message=f"Space for {name}"
            )
    return address


def prepare_push(
    model_dir: Path,
    repo_id: str,
    made: Path,
    *,
    with_code: bool = False,
    evaluation: str | Path | None = None,
    without_evaluation: bool = False,
    samples: str | Path | None = None,
    with_discriminator: bool = False,
    card_options: dict | None = None,
) -> Contents:
    """Load the model of a folder, and make card and samples, all without the Hub. Arguments as of push_to_hub.

    Args:
        made: folder that card, samples and other files that are made are written to.

    Raises:
        PushError: as push_to_hub.
    """
    evaluation_file = Path(evaluation) if evaluation else model_dir / FILE_NAME
    if not evaluation_file.is_file() and (evaluation or not without_evaluation):
        raise PushError(
            f"there is no evaluation {evaluation_file}: evaluate the model first, name its figures with "
            "--evaluation FILE, or publish it all the same with --without-evaluation"
        )
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
    if with_discriminator:
        contents.files |= discriminator_files(model_dir)
    (made / "README.md").write_text(str(contents.card))
    contents.files["README.md"] = made / "README.md"
    if evaluation_file.is_file():
        contents.files[FILE_NAME] = evaluation_file
    if settings:
        contents.files[TRAINING_SETTINGS] = made / TRAINING_SETTINGS
        content = json.dumps(public_settings(settings), indent=2)
        (made / TRAINING_SETTINGS).write_text(content + "\n")
    return contents


def _check_space(
    model_dir: Path, *, with_code: bool, private: bool | None, revision: str | None
) -> None:
    if is_generator(model_dir):
        raise PushError("a Space shows a tokenizer, and this is a generator: leave out --space")
    if not with_code:
        raise PushError("a Space runs the model's code from its repository: add --with-code")
    if private:
        raise PushError(_hidden("a private model"))
    if revision:
        raise PushError(f"a Space shows the main branch, not {revision}: leave out --space")


def _name_on_dry_run(repo_id: str, space: str | None) -> str:
    """Refuse what a push would refuse and reading can tell; returns the model's full name, if it can be had."""
    name = check_may_push(repo_id)
    if name is None:
        print("the Hub cannot be asked whether this account may push (hf auth login logs in)")
        return repo_id
    if space:
        check_may_push(space, "space")
        if is_hidden(name):
            raise PushError(_hidden(name))
    return name


def _hidden(name: str) -> str:
    return (
        f"a Space cannot read {name}, which is private or gated: leave out --space, or make the model public. "
        "By hand: upload hub_cards/space and give the Space a secret HF_TOKEN that may read the model"
    )


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
        "--with-discriminator",
        action="store_true",
        help="add discriminator/, which init_from goes on with",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="show what would be sent; send nothing"
    )
    parser.add_argument("--evaluation", help=f"JSON of figures (default: MODEL_DIR/{FILE_NAME})")
    parser.add_argument("--without-evaluation", action="store_true", help="publish without figures")
    parser.add_argument("--samples", help="images or a recording for the card: a file or a folder")
    parser.add_argument(
        "--license",
        help="of the weights, such as mit or cc-by-4.0 (default: other, for none named)",
    )
    parser.add_argument(
        "--space",
        metavar="ID",
        help="publish a Gradio Space too (needs --with-code)",
    )
    options = parser.parse_args(arguments)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    arguments = vars(options)
    license_name = arguments.pop("license")
    card_options = {"license": license_name} if license_name else {}
    with one_line_errors(), hub_errors():
        address = push_to_hub(**arguments, card_options=card_options)
    print(
        f"dry run: card and samples are in {address}"
        if options.dry_run
        else f"published: {address}"
    )


if __name__ == "__main__":
    main()
