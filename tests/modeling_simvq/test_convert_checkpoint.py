"""Conversion of the authors' checkpoints: the command, and what it says of files that are something else."""

import json
import os
import pickle
from pathlib import Path

import pytest
import torch
from transformers import AutoImageProcessor, AutoModel

from modeling_simvq.convert_simvq_checkpoint import convert_simvq_checkpoint, main
from tests.support.programs import REPOSITORY, run

CONFIG = {
    "ddconfig": {"resolution": 64, "ch": 32},
    "quantconfig": {"params": {"n_e": 64, "beta": 0.5}},
}


@pytest.fixture(scope="module")
def state(checkpoint) -> dict:
    """The checkpoint's state_dict. Copy it before changing it."""
    return torch.load(checkpoint, map_location="cpu", weights_only=True)["state_dict"]


@pytest.fixture(scope="module")
def tokenizer(state) -> dict:
    """Only the raw weights of encoder, decoder and quantizer."""
    kept = ("encoder.", "decoder.", "quantize.")
    return {name: tensor for name, tensor in state.items() if name.startswith(kept)}


def refuse(path: Path, tmp_path: Path, named: str, weights: str = "raw", **options) -> None:
    """Conversion must raise a ValueError that matches, and leave nothing behind."""
    output = tmp_path / "output"
    with pytest.raises(ValueError, match=named):
        convert_simvq_checkpoint(path, output, weights, **options)
    assert not output.exists() or not any(output.iterdir())


def refuse_state(content, tmp_path: Path, named: str, weights: str = "raw") -> None:
    path = tmp_path / "changed.ckpt"
    torch.save({"state_dict": content}, path)
    refuse(path, tmp_path, named, weights)


@pytest.mark.slow
def test_the_command_writes_a_folder_that_auto_model_loads(checkpoint, tmp_path, tiny_folder):
    output = tmp_path / "model"
    command = ["-m", "modeling_simvq.convert_simvq_checkpoint", checkpoint, output]
    done = run(*command, "--weights", "raw", cwd=REPOSITORY)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    summary = json.loads(done.stdout[done.stdout.index("{") :])
    assert summary["parameters"] == 498_435 and summary["codebook_size"] == 64
    ours, expected = (AutoModel.from_pretrained(p).state_dict() for p in (output, tiny_folder))
    assert all(torch.equal(ours[name], expected[name]) for name in expected)
    assert AutoImageProcessor.from_pretrained(output).size_divisor == 2


def test_ema_is_the_default_and_differs_from_raw(checkpoint, state, tmp_path):
    model = convert_simvq_checkpoint(checkpoint, tmp_path / "ema")
    weight = model.encoder.conv_in.weight
    assert torch.equal(weight, state["model_ema.encoderconv_inweight"])
    assert not torch.equal(weight, state["encoder.conv_in.weight"])
    assert torch.equal(model.quantizer.basis, state["quantize.embedding.weight"])
    assert not model.training and not model.quantizer.basis.requires_grad
    # Discriminator and perceptual network stay behind.
    assert model.num_parameters() == 498_435


def test_half_precision_checkpoints_become_float32(tokenizer, tmp_path):
    path = tmp_path / "half.ckpt"
    torch.save({name: tensor.half() for name, tensor in tokenizer.items()}, path)  # bare state_dict
    model = convert_simvq_checkpoint(path, tmp_path / "model", "raw")
    assert {p.dtype for p in model.parameters()} == {torch.float32}


@pytest.mark.parametrize("wrap", [True, False])
def test_the_original_config_gives_beta_and_resolution(checkpoint, tmp_path, wrap):
    yaml = pytest.importorskip("yaml")
    content = {"init_args": CONFIG}
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({"model": content} if wrap else content))
    output = tmp_path / "model"
    main([str(checkpoint), str(output), "--weights", "raw", "--original-config", str(path)])
    assert AutoModel.from_pretrained(output).config.commitment_cost == 0.5
    processor = AutoImageProcessor.from_pretrained(output)
    assert processor.size["shortest_edge"] == 64 and processor.crop_size["height"] == 64


def test_without_the_config_the_published_values_hold(tiny_folder):
    assert AutoModel.from_pretrained(tiny_folder).config.commitment_cost == 0.25
    assert AutoImageProcessor.from_pretrained(tiny_folder).size["shortest_edge"] == 128


@pytest.mark.parametrize(
    "text", ["", "just words", "[1, 2]", "model: {}", "a: [", "model: {init_args: {ddconfig: 3}}"]
)
def test_a_foreign_config_is_refused(text, checkpoint, tmp_path):
    path = tmp_path / "other.yaml"
    path.write_text(text)
    refuse(checkpoint, tmp_path, r"other\.yaml", original_config=path)
    refuse(checkpoint, tmp_path, "nowhere", original_config=tmp_path / "nowhere.yaml")


@pytest.mark.parametrize("kept", [1, 4, 1000, 0.3, 0.9, -1000, -30, -1])
def test_a_truncated_file_is_refused(kept, checkpoint, tmp_path):
    whole = checkpoint.read_bytes()
    size = int(kept * len(whole)) if isinstance(kept, float) else kept
    path = tmp_path / "cut.ckpt"
    path.write_bytes(whole[:size])
    refuse(path, tmp_path, r"cut\.ckpt.*(truncated|refused)")


@pytest.mark.parametrize(
    "content",
    [b"", b"some text\n", b'{"a": 1}', b"\x80\x04", b"PK\x03\x04" + bytes(60), bytes(500)],
    ids=["empty", "text", "json", "pickle header", "zip header", "zeros"],
)
def test_a_file_of_another_kind_is_refused(content, tmp_path):
    path = tmp_path / "other.ckpt"
    path.write_bytes(content)
    refuse(path, tmp_path, r"other\.ckpt")


def test_a_missing_file_and_a_folder_are_refused(tmp_path):
    refuse(tmp_path / "nowhere.ckpt", tmp_path, r"nowhere\.ckpt")
    refuse(tmp_path, tmp_path, "not a file")


class Bomb:
    """Runs a command when it is unpickled."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return os.system, (f"touch {self.mark}",)


@pytest.mark.parametrize("form", ["zip", "legacy", "pickle"])
def test_code_in_a_checkpoint_is_refused_and_never_runs(form, tokenizer, tmp_path):
    mark, path = tmp_path / "it_ran", tmp_path / "bomb.ckpt"
    content = {"state_dict": tokenizer, "callbacks": Bomb(mark)}
    if form == "pickle":
        path.write_bytes(pickle.dumps({"state_dict": {}, "callbacks": Bomb(mark)}))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form == "zip")
    refuse(path, tmp_path, "(?s)refused.*system" if form != "pickle" else r"bomb\.ckpt")
    assert not mark.exists()


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ({}, "no state_dict"),
        ([1, 2], "no state_dict"),
        ({"conv1.weight": torch.zeros(2)}, r"quantize\.embedding\.weight.*conv1\.weight"),
        ({"conv1.weight": "words"}, r"conv1\.weight.*not a tensor"),
    ],
)
def test_a_foreign_state_dict_is_refused(content, named, tmp_path):
    refuse_state(content, tmp_path, named)


def test_unknown_tensors_are_named(tokenizer, tmp_path):
    refuse_state({**tokenizer, "head.weight": torch.zeros(2)}, tmp_path, r"head\.weight")
    refuse_state({**tokenizer, "encoder.attention.w": torch.zeros(2)}, tmp_path, r"attention\.w")


@pytest.mark.slow
def test_every_missing_tensor_is_noticed(tokenizer, tmp_path):
    for name in tokenizer:
        partial = {key: value for key, value in tokenizer.items() if key != name}
        # The message names the tensor, by its original or its new name, or the size that it decides.
        refuse_state(partial, tmp_path, r"lacks|has no|has shape|no place|multiplier")


@pytest.mark.slow
@pytest.mark.parametrize("change", ["scalar", "cut", "empty", "another axis"])
def test_every_wrong_shape_is_noticed(change, tokenizer, tmp_path):
    changes = {
        "scalar": lambda tensor: tensor.sum(),
        "cut": lambda tensor: tensor[:-1],
        "empty": lambda tensor: tensor[:0],
        "another axis": lambda tensor: tensor[None],
    }
    for name, tensor in tokenizer.items():
        if change == "cut" and name == "quantize.embedding.weight":
            continue  # that is a codebook of one code less
        wrong = {**tokenizer, name: changes[change](tensor)}
        refuse_state(wrong, tmp_path, r"shape|multiple of 32|channel_multipliers|no place|lacks")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_named(bad, state, tmp_path):
    damaged = state["decoder.conv_out.weight"].clone()
    damaged[1, 2, 0, 0] = bad
    changed = {**state, "decoder.conv_out.weight": damaged}
    refuse_state(changed, tmp_path, r"decoder\.conv_out\.weight.*NaN or infinite")


@pytest.mark.parametrize("dtype", [torch.int64, torch.complex64])
def test_other_types_are_named(dtype, tokenizer, tmp_path):
    changed = {**tokenizer, "encoder.conv_out.bias": torch.zeros(16, dtype=dtype)}
    refuse_state(changed, tmp_path, rf"encoder\.conv_out\.bias.*{dtype}")


def test_missing_averages_are_named(tokenizer, state, tmp_path):
    refuse_state(tokenizer, tmp_path, 'no averaged weights.*weights="raw"', weights="ema")
    partial = {k: v for k, v in state.items() if k != "model_ema.decoderconv_outbias"}
    refuse_state(partial, tmp_path, r"model_ema\.decoderconv_outbias", weights="ema")


def test_an_unknown_choice_of_weights_is_named(checkpoint, tmp_path):
    refuse(checkpoint, tmp_path, "'best'", weights="best")


def test_an_output_that_is_a_file_is_refused(checkpoint, tmp_path):
    output = tmp_path / "taken"
    output.write_text("mine")
    with pytest.raises(ValueError, match="taken"):
        convert_simvq_checkpoint(checkpoint, output, "raw")
    assert output.read_text() == "mine"


def test_the_command_ends_with_one_line_and_status_1(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        main([str(tmp_path / "nowhere.ckpt"), str(tmp_path / "output")])
    assert stop.value.code == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and "nowhere.ckpt" in error and error.count("\n") == 1
