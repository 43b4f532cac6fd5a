"""Assemble a static Space whose page encodes and decodes in the visitor's browser, without a server.

  python hub_cards/browser_space.py build/browser --image hub_cards/checkpoints/simvq-image-small \\
      --speech hub_cards/checkpoints/simvq-speech-small
  python -m http.server --directory build/browser

Add --push me/my-browser-demo to publish it (log in once with `hf auth login`). The tokenizers are exported to
ONNX, which needs the extra `export`, and run by onnxruntime-web, which npm fetches and the Space carries.
"""

import argparse
import importlib.util
import json
import shutil
import sys
import tempfile
from pathlib import Path

# As a command this file's folder is on the path, but hub_cards is imported from the one above.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from PIL import Image

from hub_cards.browser_runtime import copy_runtime
from hub_cards.card_samples import SPEECH
from hub_cards.hub_commit import check_name, commit_files, hub_errors
from hub_cards.user_error import UserError, one_line_errors
from modeling_simvq.command_model import load_tokenizer
from modeling_simvq.export_command import export
from modeling_simvq.exportable import PARTS, is_audio
from modeling_simvq.exported_weights import STORED_AS
from modeling_simvq.new_folder import new_folder

PAGE = Path(__file__).resolve().parent / "browser"
KINDS = ("image", "speech")


def assemble(
    output: Path, models: dict[str, str], runtime: Path | None = None, weights: str = "float16"
) -> dict[str, Path]:
    """Write the Space to a folder that is new or empty; it appears when all is written.

    Args:
        models: "image" and "speech", or one of them, to the folder or Hub id of a tokenizer.
        runtime: as of copy_runtime.
        weights: how they are stored, "float32", "float16" or "int8".

    Returns:
        Path in the Space to file here.

    Raises:
        UserError: if a tokenizer is none of its kind, or the runtime cannot be had.
        ValueError: if the folder is not empty; if a tokenizer does not load, or cannot be exported.
    """
    if not models:
        raise UserError("name a tokenizer: --image MODEL, --speech MODEL or both")
    with new_folder(output) as made:
        for path in PAGE.iterdir():
            if path.is_file():
                shutil.copyfile(path, made / path.name)
        copy_runtime(made / "runtime", runtime)
        about = {"runtime": _file(made / "runtime" / "ort.wasm", made)}
        for kind, name in models.items():
            about[kind] = _write_model(kind, name, made, weights)
        (made / "models.json").write_text(json.dumps(about, indent=2) + "\n")
    files = sorted(path for path in output.rglob("*") if path.is_file())
    return {path.relative_to(output).as_posix(): path for path in files}


def _write_model(kind: str, name: str, made: Path, weights: str) -> dict:
    """Export a tokenizer with an example input into the Space; return what the page has to know."""
    tokenizer = load_tokenizer(name)
    config = tokenizer.model.config
    if is_audio(tokenizer.model) != (kind == "speech"):
        raise UserError(f"--{kind} {name}: this is a tokenizer of type {config.model_type}")
    folder = made / kind
    folder.mkdir()
    # Only the graphs: what else an export writes names folders of this machine.
    with tempfile.TemporaryDirectory(prefix="simvq-export-") as exported:
        for file, found in export(tokenizer, "onnx", Path(exported) / kind, weights).items():
            shutil.move(Path(exported) / kind / file, folder / file)
            print(f"{kind}/{file}: {found}")
    about = {
        "name": Path(name).resolve().name if Path(name).is_dir() else name,
        "digest": tokenizer.digest,
        "codebook_size": config.codebook_size,
        "num_quantizers": config.num_quantizers,
        **{part: _file(folder / f"{part}.onnx", made) for part in PARTS},
    }
    if example := _write_example(kind, folder):
        about["example"] = example.relative_to(made).as_posix()
    names = ("sampling_rate", "hop_length") if kind == "speech" else ("downsample_factor",)
    return about | {name: getattr(config, name) for name in names}


def _write_example(kind: str, folder: Path) -> Path | None:
    """A sentence, or a photograph if scikit-image, in which it comes, is installed."""
    if kind == "speech":
        return Path(shutil.copyfile(SPEECH, folder / "example.flac"))
    if importlib.util.find_spec("skimage") is None:
        return None
    from skimage import data

    path = folder / "example.jpg"
    Image.fromarray(data.astronaut()).save(path, quality=92)
    return path


def _file(path: Path, made: Path) -> dict:
    return {"path": path.relative_to(made).as_posix(), "bytes": path.stat().st_size}


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("output", type=Path, help="folder of the Space, new or empty")
    for kind in KINDS:
        parser.add_argument(f"--{kind}", metavar="MODEL", help="tokenizer: a folder or a Hub id")
    parser.add_argument(
        "--weights", default="float16", choices=STORED_AS, help="how they are stored (%(default)s)"
    )
    parser.add_argument(
        "--runtime", type=Path, metavar="FOLDER", help="dist/ of onnxruntime-web (default: npm's)"
    )
    parser.add_argument("--push", metavar="ID", help="publish the Space under this name")
    parser.add_argument("--private", action="store_true", default=None, help="make it private")
    options = parser.parse_args(arguments)
    models = {kind: name for kind in KINDS if (name := getattr(options, kind))}
    with one_line_errors(), hub_errors():
        if options.push:
            check_name(options.push)
        files = assemble(options.output, models, options.runtime, options.weights)
        total = sum(path.stat().st_size for path in files.values())
        print(f"{options.output}: {len(files)} files, {total / 1e6:.1f} MB")
        if options.push:
            address = commit_files(
                options.push, files, repo_type="space", space_sdk="static",
                private=options.private, message="Space that runs in the browser",
            )  # fmt: skip
            print(f"published: {address}")


if __name__ == "__main__":
    main()
