"""Command export: a tokenizer or a code model as files for other engines."""

import argparse
import json
import sys
from pathlib import Path

from transformers import PreTrainedModel
from transformers import logging as transformers_logging

from .command_model import Tokenizer, load_tokenizer, stored_type
from .configuration_simvq_generation import SimVQAudioGenerationConfig, SimVQImageGenerationConfig
from .export_generator import export_generator
from .export_gguf import export_gguf
from .exportable import LEAST_FRAMES, PARTS, is_audio
from .exported_files import FORMATS, Compared, compare, write_part
from .exported_weights import STORED_AS
from .modeling_simvq_generation import SimVQForAudioGeneration, SimVQForImageGeneration
from .new_folder import new_folder

CODE_MODELS = {
    SimVQImageGenerationConfig.model_type: SimVQForImageGeneration,
    SimVQAudioGenerationConfig.model_type: SimVQForAudioGeneration,
}
CODE_MODEL_FORMATS = ("llama", "gguf")
WORST_ERROR = 1e-4  # of samples or pixels, where the model's largest is 1


def add_to(commands) -> None:
    """Add the command to those of a command line."""
    parser = commands.add_parser(
        "export",
        help="a tokenizer or code model for other engines",
        description="Of a tokenizer, write encoder and decoder as a file each that needs neither this package "
        "nor transformers, batch, height, width and length dynamic; run both on an example and compare them "
        "with the model. Of a code model, write a plain Llama, for transformers and vLLM, or a GGUF file, for "
        'llama.cpp. onnx, openvino and gguf need `pip install "modeling-simvq[export]"`; executorch, for one '
        "image or clip at a time of up to 64 x 64 tokens or 1,500 frames, needs "
        '`pip install "modeling-simvq[executorch]"`. Give exported audio encoders whole frames: a last one '
        "that is not full is filled with silence, which can make its code another than the model's.",
    )
    parser.add_argument(
        "model", help="folder or Hub id of an image or audio tokenizer, or code model"
    )
    parser.add_argument("--revision", help="branch, tag or commit of the model on the Hub")
    parser.add_argument(
        "--format",
        required=True,
        choices=[*FORMATS, *CODE_MODEL_FORMATS],
        help="llama and gguf are for code models",
    )
    parser.add_argument("--output", required=True, type=Path, help="folder, new or empty")
    parser.add_argument(
        "--weights",
        default="float32",
        choices=STORED_AS,
        help="how onnx, openvino and gguf (not int8) store them; computing and codebook stay float32",
    )
    parser.add_argument(
        "--tokenizer", help="of a code model: folder or Hub id of what decodes its codes"
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Export, and print what each file is worth."""
    kind, format = stored_type(options.model, options.revision), options.format
    if kind in CODE_MODELS:
        print(export_code_model(options, CODE_MODELS[kind]))
        return 0
    if format in CODE_MODEL_FORMATS:
        raise ValueError(f"{format} is a format of code models, and {options.model} is a {kind}")
    if options.tokenizer is not None:
        raise ValueError("--tokenizer is of code models: it names what decodes their codes")
    tokenizer = load_tokenizer(options.model, options.revision)
    for name, found in export(tokenizer, format, options.output, options.weights).items():
        print(f"{options.output / name}: {found}")
    return 0


def export_code_model(options: argparse.Namespace, model_class: type[PreTrainedModel]) -> Path:
    """Export a code model of a class as the options say; return the folder or file.

    Raises:
        ValueError: if the format is one of tokenizers, or cannot store weights so.
    """
    name, format = options.model, options.format
    if format not in CODE_MODEL_FORMATS:
        raise ValueError(
            f"{name} is a code model: export it as {' or '.join(CODE_MODEL_FORMATS)}, not as {format}"
        )
    if options.weights != "float32" and (format == "llama" or options.weights == "int8"):
        raise ValueError(f"the format {format} does not store weights as {options.weights}")
    transformers_logging.disable_progress_bar()
    model = model_class.from_pretrained(name, revision=options.revision).eval()
    if format == "llama":
        return export_generator(model, options.output, options.tokenizer)
    return export_gguf(model, options.output, options.tokenizer, options.weights)


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
    compared = {}
    with new_folder(output) as folder:
        for part in PARTS:
            print(f"writing the {part}", file=sys.stderr)
            path = write_part(tokenizer.model, part, format, folder, weights)
            found = compare(tokenizer.model, part, path)
            if weights == "float32" and (found.other_codes or found.worst_error > WORST_ERROR):
                raise ValueError(f"{path.name} does not compute what the model does: {found}")
            compared[path.name] = found
        for name, part in (
            ("config.json", tokenizer.model.config),
            ("preprocessor_config.json", tokenizer.processor),
        ):
            settings = json.loads(part.to_json_string())
            settings.pop("auto_map", None)  # code that does not come along
            (folder / name).write_text(json.dumps(settings, indent=2) + "\n")
        described = {
            "model": tokenizer.name,
            "weights_digest": tokenizer.digest,
            "format": format,
            "weights": weights,
            "sizes": _sizes_of(tokenizer.model),
            "files": {name: vars(found) for name, found in compared.items()},
        }
        (folder / "export.json").write_text(json.dumps(described, indent=2) + "\n")
    return compared


def _sizes_of(model: PreTrainedModel) -> str:
    if not is_audio(model):
        return f"Height and width are multiples of {model.config.downsample_factor} pixels."
    hop = model.config.hop_length
    return (
        f"Clips have at least {LEAST_FRAMES * hop:,} samples. The last frame of {hop} samples is filled with "
        "silence: give whole frames for the model's own codes."
    )
