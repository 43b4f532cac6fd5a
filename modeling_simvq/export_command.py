"""Command export: a tokenizer as files for other engines, compared with the model before they stay."""

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path

from .command_model import Tokenizer, load_tokenizer
from .exportable import PARTS
from .exported_files import FORMATS, Compared, compare, write_part
from .exported_weights import STORED_AS

WORST_ERROR = 1e-4  # of samples or pixels, where the model's largest is 1


def add_to(commands) -> None:
    """Add the command to those of a command line."""
    parser = commands.add_parser(
        "export",
        help="a tokenizer for other engines",
        description="Write encoder and decoder as a file each that needs neither this package nor "
        "transformers, batch, height, width and length dynamic; run both on an example and compare them with "
        "the model. "
        'onnx and openvino need `pip install "modeling-simvq[export]"`; executorch, for one image or clip at a '
        'time of up to 64 x 64 tokens or 1,500 frames, needs `pip install "modeling-simvq[executorch]"`.',
    )
    parser.add_argument("model", help="folder or Hub id of an image or audio tokenizer")
    parser.add_argument("--revision", help="branch, tag or commit of the model on the Hub")
    parser.add_argument("--format", required=True, choices=FORMATS)
    parser.add_argument("--output", required=True, type=Path, help="folder, new or empty")
    parser.add_argument(
        "--weights",
        default="float32",
        choices=STORED_AS,
        help="how they are stored; computing and codebook stay float32",
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Export, and print what each part is worth."""
    tokenizer = load_tokenizer(options.model, options.revision)
    for part, found in export(tokenizer, options.format, options.output, options.weights).items():
        print(f"{options.output / part}: {found}")
    return 0


def export(
    tokenizer: Tokenizer, format: str, output: Path, weights: str = "float32"
) -> dict[str, Compared]:
    """Write encoder and decoder, the settings of model and processor, and export.json that describes all.

    Args:
        format: "onnx", "openvino", "torch" or "executorch".
        output: a folder that is new or empty. It appears when all is written.
        weights: how they are stored, "float32", "float16" or "int8".

    Returns:
        By the name of each file, how it compares with the model.

    Raises:
        ValueError: if the folder is not empty, a package is missing, or the files do not compute what the model
            does (with float32 weights).
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"{output} is there already: give a new or empty folder")
    output.parent.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(prefix=f".{output.name}-", dir=output.parent))
    try:
        compared = {}
        for part in PARTS:
            print(f"writing the {part}", file=sys.stderr)
            path = write_part(tokenizer.model, part, format, made, weights)
            found = compare(tokenizer.model, part, path)
            if weights == "float32" and (found.other_codes or found.worst_error > WORST_ERROR):
                raise ValueError(f"{path.name} does not compute what the model does: {found}")
            compared[path.name] = found
        tokenizer.model.config.to_json_file(made / "config.json")
        tokenizer.processor.to_json_file(made / "preprocessor_config.json")
        described = {
            "model": tokenizer.name,
            "weights_digest": tokenizer.digest,
            "format": format,
            "weights": weights,
            "files": {name: vars(found) for name, found in compared.items()},
        }
        (made / "export.json").write_text(json.dumps(described, indent=2) + "\n")
        made.chmod(0o755)
        if output.exists():
            output.rmdir()
        made.rename(output)
    finally:
        shutil.rmtree(made, ignore_errors=True)
    return compared
