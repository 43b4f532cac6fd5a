"""Convert a checkpoint of the SimVQ authors' trainer (Lightning .ckpt) to a model that AutoModel loads."""

import argparse
import json
import pickle
import re
import zipfile
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from . import convert_simvq_audio, convert_simvq_image
from .modeling_simvq_audio import SimVQAudioModel
from .modeling_simvq_image import SimVQImageModel

# A marker in the checkpoint, and the module that knows the modality's layout.
_MODALITIES = {
    "encoder.conv_in.weight": convert_simvq_image,
    "backbone.embed.weight": convert_simvq_audio,
}


def convert_simvq_checkpoint(
    checkpoint: str | Path,
    output_dir: str | Path,
    weights: str = "ema",
    original_config: str | Path | None = None,
) -> SimVQImageModel | SimVQAudioModel:
    """Convert one original checkpoint and write model, processor and code to a folder.

    Modality and sizes are read off the tensors. The file is opened with ``weights_only=True``: no code in
    it runs.

    Args:
        checkpoint: the .ckpt file.
        output_dir: where save_pretrained writes; made if missing.
        weights: "ema", the averaged weights that the authors evaluate, or "raw".
        original_config: the authors' config.yaml, for what tensors cannot tell: the commitment cost beta,
            for images the training resolution, for audio the sampling rate and whether the encoder pads
            causally. Without it the published values hold: 0.25; 128; 24,000 Hz, causal.

    Returns:
        The converted model, in evaluation mode.

    Raises:
        ValueError: if the file is damaged, holds anything but tensors and plain values, is no SimVQ
            checkpoint, or has no EMA weights when they are asked for; if output_dir is a file.
    """
    if weights not in ("ema", "raw"):
        raise ValueError(f'weights must be "ema" or "raw", got {weights!r}')
    if Path(output_dir).exists() and not Path(output_dir).is_dir():
        raise ValueError(f"output_dir {output_dir} exists and is not a folder")
    state = _read_state_dict(Path(checkpoint))
    modality = _modality(state, Path(checkpoint))
    tensors = _select(state, modality, weights, Path(checkpoint))
    settings = _read_original_config(original_config, modality)
    config = _infer_config(tensors, settings, modality)
    model = modality.MODEL(config)
    renamed = {modality.rename(name, config): tensor for name, tensor in tensors.items()}
    _check(renamed, model)
    model.load_state_dict(renamed)
    model.eval().save_pretrained(output_dir)
    modality.processor(config, settings).save_pretrained(output_dir)
    return model


def _read_state_dict(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise ValueError(f"{path} is not a file")
    try:
        _refuse_compressed(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        refused = re.search(r"Unsupported (?:global|class)[^\n]*|GLOBAL \S+[^\n]*", str(error))
        detail = refused.group(0) if refused else str(error).splitlines()[0]
        raise ValueError(
            f"{path} was refused: a checkpoint may hold only tensors and plain values, because anything "
            f"else could run code when it is opened. {detail}"
        ) from error
    except Exception as error:  # damaged bytes trip the reader in many ways, IndexError among them
        detail = (str(error) or repr(error)).splitlines()[0]
        raise ValueError(f"{path} is truncated or no PyTorch checkpoint: {detail}") from error
    state = content.get("state_dict", content) if isinstance(content, dict) else None
    if not isinstance(state, dict) or not state:
        raise ValueError(f"{path} holds no state_dict")
    wrong = [name for name, value in state.items() if not isinstance(value, Tensor)]
    if wrong:
        raise ValueError(f"{path}: entry {wrong[0]!r} of the state_dict is not a tensor")
    for name, tensor in state.items():
        # Strides of 0 let a few bytes stand for any number of values, for which a model would be made.
        dense = tensor.layout == torch.strided and tensor.device.type == "cpu"
        if not dense or tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise ValueError(f"{path}: {name!r} has more values than the file holds for it")
    return state


def _refuse_compressed(path: Path) -> None:
    """torch does not compress; a small file that does may hold any number of zeros."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if any(member.compress_type != zipfile.ZIP_STORED for member in archive.infolist()):
                raise ValueError("it is compressed")


def _modality(state: dict[str, Tensor], path: Path) -> ModuleType:
    found = [modality for marker, modality in _MODALITIES.items() if marker in state]
    quantizer = ("quantize.embedding.weight", "quantize.embedding_proj.weight")
    missing = [repr(name) for name in quantizer if name not in state]
    if not found:
        missing.append(" or ".join(map(repr, _MODALITIES)))
    if missing:
        raise ValueError(
            f"{path} is no SimVQ checkpoint: it has no {missing[0]} "
            f"(its first entries: {', '.join(list(state)[:3])})"
        )
    return found[0]


def _select(
    state: dict[str, Tensor], modality: ModuleType, weights: str, path: Path
) -> dict[str, Tensor]:
    """The tokenizer's tensors under their original names, raw or averaged."""
    known = (*modality.KEPT, *modality.DROPPED, "model_ema.")
    foreign = [name for name in state if not name.startswith(known)]
    if foreign:
        raise ValueError(
            f"{path} is no SimVQ {modality.NAME} checkpoint: unknown entry {foreign[0]!r}"
        )
    tensors = {
        name: value
        for name, value in state.items()
        if name.startswith(modality.KEPT) and not name.startswith(modality.DROPPED)
    }
    if weights == "ema":
        # The original removes the dots from a name to make the name of its average. That cannot be
        # undone by rule, so we go from the parameters' names to those of the averages.
        for name in tensors:
            if name == "quantize.embedding.weight":  # frozen, so it has no average
                continue
            average = "model_ema." + name.replace(".", "")
            if average not in state:
                raise ValueError(
                    f'{path} has no averaged weights ({average!r} is missing): use weights="raw"'
                )
            tensors[name] = state[average]
    return tensors


def _read_original_config(path: str | Path | None, modality: ModuleType) -> dict:
    """Settings that tensors cannot tell, from the authors' YAML."""
    if path is None:
        return {}
    import yaml

    try:
        content = yaml.safe_load(Path(path).read_text())
        arguments = content.get("model", content)["init_args"]
        quantizer = arguments["quantconfig"]["params"]
        settings = {"commitment_cost": float(quantizer.get("beta", 0.25))}
        return settings | modality.read_settings(arguments)
    except (OSError, yaml.YAMLError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} is not the authors' {modality.NAME} config.yaml "
            f"(model.init_args.ddconfig, .quantconfig): {error!r}"
        ) from error


def _infer_config(
    tensors: dict[str, Tensor], settings: dict, modality: ModuleType
) -> PreTrainedConfig:
    def shape(name: str, ndim: int) -> torch.Size:
        if name not in tensors:
            raise ValueError(f"the checkpoint has no {name!r}")
        found = tensors[name].shape
        if len(found) != ndim or 0 in found:
            raise ValueError(
                f"{name!r} has shape {tuple(found)} in the checkpoint, not {ndim} dimensions of at least 1"
            )
        return found

    def count(pattern: str) -> int:
        found = [int(m.group(1)) for name in tensors if (m := re.match(pattern, name))]
        return max(found, default=-1) + 1

    codebook_size, codebook_dim = shape("quantize.embedding.weight", 2)
    try:
        return modality.infer_config(
            shape,
            count,
            settings,
            codebook_size=codebook_size,
            codebook_dim=codebook_dim,
            commitment_cost=settings.get("commitment_cost", 0.25),
        )
    except ValueError as error:
        raise ValueError(
            f"the checkpoint's tensors describe no SimVQ {modality.NAME} model: {error}"
        ) from error


def _check(renamed: dict[str, Tensor], model: PreTrainedModel) -> None:
    expected = {name: tensor.shape for name, tensor in model.state_dict().items()}
    for name, shape in expected.items():
        if name not in renamed:
            raise ValueError(f"the checkpoint lacks the tensor that becomes {name!r}")
        if renamed[name].shape != shape:
            raise ValueError(
                f"{name!r} has shape {tuple(renamed[name].shape)} in the checkpoint, "
                f"but {tuple(shape)} follows from its other tensors"
            )
        if not renamed[name].is_floating_point():
            raise ValueError(
                f"{name!r} is {renamed[name].dtype} in the checkpoint, not floating point"
            )
        if not renamed[name].isfinite().all():
            raise ValueError(f"{name!r} holds NaN or infinite values in the checkpoint")
    extra = sorted(set(renamed) - set(expected))
    if extra:
        raise ValueError(
            f"the checkpoint has a tensor that the model has no place for: {extra[0]!r}"
        )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument("checkpoint", help="the original .ckpt file")
    parser.add_argument("output_dir", help="folder for the converted model")
    parser.add_argument(
        "--weights",
        choices=("ema", "raw"),
        default="ema",
        help="averaged weights, which the authors evaluate (default), or raw ones",
    )
    parser.add_argument(
        "--original-config", help="the authors' config.yaml, for what tensors cannot tell"
    )
    parser.set_defaults(run=run)


def add_to(commands) -> None:
    """Add the command to those of a command line."""
    text = "Convert a checkpoint of the authors to a folder that loads here."
    add_arguments(commands.add_parser("convert", help="the authors' checkpoints", description=text))


def run(options: argparse.Namespace) -> int:
    """Convert, and print what came of it."""
    model = convert_simvq_checkpoint(
        options.checkpoint, options.output_dir, options.weights, options.original_config
    )
    summary = {
        "output": options.output_dir,
        "weights": options.weights,
        "parameters": model.num_parameters(),
        "model_type": model.config.model_type,
        "codebook_size": model.config.codebook_size,
    }
    print(json.dumps(summary, indent=2))
    return 0


def main(arguments: list[str] | None = None) -> None:
    """Command line: see --help."""
    parser = argparse.ArgumentParser(
        prog="python -m modeling_simvq.convert_simvq_checkpoint", description=__doc__
    )
    add_arguments(parser)
    options = parser.parse_args(arguments)
    try:
        run(options)
    except ValueError as error:
        parser.exit(1, f"error: {error}\n")


if __name__ == "__main__":
    main()
