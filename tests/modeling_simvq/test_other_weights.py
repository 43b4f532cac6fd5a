"""Weights that do not fit the configuration are refused by name: a tokenizer with random weights is none."""

import copy
import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel

from modeling_simvq import (
    SimVQAudioGenerationConfig,
    SimVQForAudioGeneration,
    SimVQForImageGeneration,
    SimVQImageConfig,
    SimVQImageGenerationConfig,
    SimVQImageModel,
)
from tests.modeling_simvq.test_audio_batching import small_model

SIZES = dict(
    codebook_size=32,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
)
IMAGE = dict(base_channels=32, channel_multipliers=[1, 1], num_res_blocks=1, codebook_dim=8)
MODELS = {
    "image": (lambda: SimVQImageModel(SimVQImageConfig(**IMAGE, codebook_size=32)), "basis"),
    "audio": (small_model, "encoder.conv_in.conv.parametrizations.weight.original0"),
    "image generator": (
        lambda: SimVQForImageGeneration(
            SimVQImageGenerationConfig(num_classes=2, grid_size=(3, 4), **SIZES)
        ),
        "model.norm.weight",
    ),
    "audio generator": (
        lambda: SimVQForAudioGeneration(
            SimVQAudioGenerationConfig(max_codes=30, code_factors=(4, 8), **SIZES)
        ),
        "embed_tokens.rank",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", MODELS)
def test_missing_and_foreign_weights_are_refused_by_name(kind, tmp_path):
    make, dropped = MODELS[kind]
    make().save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    dropped = next(name for name in weights if name.endswith(dropped))
    AutoModel.from_pretrained(tmp_path)
    few = {name: value for name, value in weights.items() if name != dropped}
    for changed, named in (
        (few, f"1 missing.*random.*{re.escape(dropped)}"),
        (weights | {"extra.weight": torch.ones(2)}, r"1 that the model .*extra\.weight"),
        ({f"module.{name}": value for name, value in weights.items()}, r"missing.*module\."),
    ):
        save_file(changed, file, metadata={"format": "pt"})
        with pytest.raises(ValueError, match=named):
            AutoModel.from_pretrained(tmp_path)
        # Whoever asks for the report, or for new weights, gets them.
        _, report = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
        assert report["missing_keys"] or report["unexpected_keys"]
        assert AutoModel.from_pretrained(tmp_path, ignore_mismatched_sizes=True) is not None


def test_another_depth_is_refused(tmp_path):
    """Fewer layers than stored: nothing is missing, and the codes would be others all the same."""
    MODELS["image"][0]().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"has no place for.*levels\."):
        AutoModel.from_pretrained(tmp_path, channel_multipliers=[1])
    with pytest.raises(ValueError, match=r"missing.*blocks\.1"):
        AutoModel.from_pretrained(tmp_path, num_res_blocks=2)


@pytest.mark.parametrize("kind", MODELS)
def test_models_are_copied_and_pickled_whole(kind, tmp_path):
    model = MODELS[kind][0]().eval()
    torch.save(model, tmp_path / "model.pt")
    again = torch.load(tmp_path / "model.pt", weights_only=False)
    for other in (again, copy.deepcopy(model)):
        state = other.state_dict()
        assert state.keys() == model.state_dict().keys()
        assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
        frozen = [n for n, p in other.named_parameters() if not p.requires_grad]
        assert frozen == [n for n, p in model.named_parameters() if not p.requires_grad]
