"""Weight normalisation: copies, pickles, folding, and weights that are stored in the other form."""

import copy
import io
import pickle

import pytest
import torch
from transformers import AutoModel

from modeling_simvq import SimVQAudioConfig, SimVQAudioModel
from tests.modeling_simvq.test_audio_batching import small_model

WAVEFORM = torch.randn(1, 1, 700, generator=torch.Generator().manual_seed(0)) * 0.1


@pytest.fixture
def model() -> SimVQAudioModel:
    """Lengths unlike those of the directions, as after training."""
    model = small_model()
    for name, parameter in model.named_parameters():
        if name.endswith("original0"):
            parameter.data.mul_(1.5)
    return model


def latents(model) -> torch.Tensor:
    with torch.no_grad():
        return model.encode(WAVEFORM).latents


def names(model) -> set[str]:
    return {name for name in model.state_dict() if name.endswith(("original1", "conv.weight"))}


def test_a_copy_and_its_original_are_folded_apart(model):
    expected = latents(model)
    for how in (copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))):
        for folded, other in ((how(model), model), (small := how(model), how(small))):
            folded.remove_weight_norm()
            torch.testing.assert_close(latents(folded), expected)
            assert torch.equal(latents(other), expected)
            assert folded.config.weight_norm is False and other.config.weight_norm is True
            assert not [name for name in folded.state_dict() if "parametrizations" in name]
            other.train()(WAVEFORM).commitment_loss.backward()
            assert other.encoder.conv_in.conv.parametrizations.weight.original0.grad is not None
            other.eval()


def test_models_of_one_configuration_are_folded_apart(tmp_path):
    config = small_model().config
    one, other = SimVQAudioModel(config), SimVQAudioModel(config)
    one.remove_weight_norm()
    one.fold_codebook()
    assert other.config.weight_norm is True and config.weight_norm is True
    other.save_pretrained(tmp_path)
    assert torch.equal(latents(AutoModel.from_pretrained(tmp_path)), latents(other.eval()))


def test_an_average_is_folded_while_training_continues(model):
    average = torch.optim.swa_utils.AveragedModel(model)
    average.module.remove_weight_norm()
    model.train()(WAVEFORM).commitment_loss.backward()


@pytest.mark.parametrize("folded", [False, True])
def test_whole_models_can_be_pickled(folded, model):
    if folded:
        model.remove_weight_norm()
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    again = torch.load(file, weights_only=False)
    assert torch.equal(latents(again), latents(model)) and names(again) == names(model)


@pytest.mark.parametrize("stored", [False, True])
@pytest.mark.parametrize("wanted", [False, True])
def test_either_form_is_loaded_from_either(stored, wanted, model, tmp_path):
    expected, both = latents(model), {True: copy.deepcopy(model), False: model}
    model.remove_weight_norm()
    both[stored].save_pretrained(tmp_path, max_shard_size="40KB" if wanted else "1GB")
    config = copy.deepcopy(both[stored].config)
    config.weight_norm = wanted
    loaded = {
        "auto": AutoModel.from_pretrained(tmp_path, weight_norm=wanted),
        "class": SimVQAudioModel.from_pretrained(tmp_path, weight_norm=wanted),
        "configuration": SimVQAudioModel.from_pretrained(tmp_path, config=config),
        "state": SimVQAudioModel.from_pretrained(
            None, config=config, state_dict=both[stored].state_dict()
        ),
    }
    # The file says what it holds, whatever config.json says.
    config.save_pretrained(tmp_path)
    loaded["edited"] = AutoModel.from_pretrained(tmp_path)
    plain = copy.deepcopy(both[wanted])
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.zero_()
    plain.load_state_dict(both[stored].state_dict())  # strict
    loaded["load_state_dict"] = plain
    for how, other in loaded.items():
        torch.testing.assert_close(latents(other), expected, msg=how)
        assert other.config.weight_norm is wanted and names(other) == names(both[wanted]), how
        assert not any(p.is_meta for p in other.parameters())


def test_a_form_that_is_none_is_refused(model, tmp_path):
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="weight_norm.*'no'"):
        SimVQAudioModel.from_pretrained(tmp_path, weight_norm="no")
    state = model.state_dict()
    del state["encoder.conv_in.conv.parametrizations.weight.original1"]
    model.remove_weight_norm()
    with pytest.raises(RuntimeError, match="conv_in.conv.weight"):
        model.load_state_dict(state)


def test_the_start_is_that_of_torch():
    """Same draws, same names, same order as torch's own parametrization, which checkpoints were made with."""
    torch.manual_seed(3)
    ours = small_model().encoder.conv_in.conv
    theirs = torch.nn.utils.parametrizations.weight_norm(torch.nn.Conv1d(1, 4, 7))
    assert [n for n, _ in ours.named_parameters()] == [n for n, _ in theirs.named_parameters()]
    theirs.load_state_dict(ours.state_dict())
    assert torch.equal(ours.weight, theirs.weight)
    assert isinstance(SimVQAudioConfig().weight_norm, bool)
