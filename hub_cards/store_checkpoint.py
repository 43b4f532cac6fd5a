"""Store a small trained tokenizer in hub_cards/checkpoints, which `make demo` shows and fine-tunes.

  python hub_cards/store_checkpoint.py runs/mine/model simvq-image-small
  python training/evaluate_image.py model=hub_cards/checkpoints/simvq-image-small dataset=...
  python hub_cards/store_checkpoint.py --card simvq-image-small --license cc-by-4.0 --origin origin.md

Weights of encoder and decoder are stored in half precision and computed with in float32. Codes are those of the
stored weights, which the evaluation between the two steps measures.
"""

import argparse
import re
import shutil
import sys
import tempfile
from pathlib import Path

# As a command this file's folder is on the path, but hub_cards is imported from the one above.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import transformers
from safetensors import safe_open
from safetensors.torch import save_file

from hub_cards.push_contents import PROCESSOR_FILE, PushError, load_model
from hub_cards.push_to_hub import prepare_push
from hub_cards.pushed_files import SINGLE
from hub_cards.tokenizer_card import TRAINING_SETTINGS
from hub_cards.user_error import one_line_errors
from modeling_simvq import SimVQImageModel

CHECKPOINTS = Path(__file__).resolve().parent / "checkpoints"
# Rounded, they would be other codes.
PRECISE = tuple(f"{name}." for name in SimVQImageModel._keep_in_fp32_modules_strict)
MOST_BYTES = 12 << 20


def store(model_dir: Path, folder: Path) -> int:
    """Copy a tokenizer with its weights in half precision; returns the bytes of the weights.

    Raises:
        PushError: if it does not load, is too large, or half precision cannot hold a weight.
    """
    weights, tensors = model_dir / SINGLE, {}
    if not weights.is_file():
        raise PushError(f"{model_dir} holds no {SINGLE}: name the folder of a small tokenizer")
    with safe_open(weights, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118  (no mapping)
            tensor = file.get_tensor(name)
            half = tensor.dtype == torch.float32 and not name.startswith(PRECISE)
            tensors[name] = tensor.half() if half else tensor
    if wrong := [name for name, tensor in tensors.items() if not tensor.isfinite().all()]:
        raise PushError(f"half precision cannot hold {', '.join(wrong[:3])} of {model_dir}")
    size = sum(tensor.nbytes for tensor in tensors.values())
    if size > MOST_BYTES:
        raise PushError(
            f"{model_dir} has {size:,} bytes in half precision, more than {MOST_BYTES:,}"
        )
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / SINGLE, metadata={"format": "pt"})
    for name in ("config.json", PROCESSOR_FILE, TRAINING_SETTINGS):
        shutil.copy(model_dir / name, folder / name)
    load_model(folder, ("simvq_image", "simvq_audio"), "no SimVQ tokenizer")
    return size


def write_card(folder: Path, license_name: str, origin: str) -> None:
    """Write the card that a push would write, with its samples, and the settings as a push shows them.

    Raises:
        PushError: if the tokenizer has not been evaluated.
    """
    with tempfile.TemporaryDirectory() as made:
        options = {"license": license_name, "origin": origin}
        name = f"modeling_simvq/{folder.name}"
        contents = prepare_push(folder, name, Path(made), card_options=options)
        for name, path in contents.files.items():
            if path.is_relative_to(made):
                (folder / name).parent.mkdir(exist_ok=True)
                shutil.copy(path, folder / name)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model_dir", nargs="?", type=Path, help="a run's model/")
    parser.add_argument("name", help="folder in hub_cards/checkpoints")
    parser.add_argument("--card", action="store_true", help="write the card, after an evaluation")
    parser.add_argument("--license", default="other", help="of the weights (default: other)")
    parser.add_argument("--origin", type=Path, help="file with a paragraph on data and command")
    options = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    if not re.fullmatch(r"\w[\w.-]*", options.name):
        parser.error(f"name: {options.name!r} is no name of a folder in {CHECKPOINTS}")
    folder = CHECKPOINTS / options.name
    with one_line_errors():
        if options.card:
            origin = options.origin.read_text() if options.origin else ""
            write_card(folder, options.license, origin)
            print(f"the card is {folder / 'README.md'}")
        elif options.model_dir is None:
            parser.error("name the model's folder, or --card")
        else:
            size = store(options.model_dir, folder)
            print(
                f"{folder} holds {size:,} bytes of weights: evaluate it, then run this with --card"
            )


if __name__ == "__main__":
    main()
