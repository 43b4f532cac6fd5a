"""Parts of tokenizers for other engines: any number of images or clips of any size, and the same codes."""

import copy
import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import AutoModel

from modeling_simvq import SimVQAudioConfig, SimVQAudioModel, SimVQImageConfig, SimVQImageModel
from modeling_simvq.__main__ import main
from modeling_simvq.audio_decoder import InverseSTFT
from modeling_simvq.exportable import (
    PARTS,
    FixedCodebook,
    LoopedLSTM,
    RealInverseSTFT,
    example,
    exportable,
    input_and_output,
    is_audio,
)
from modeling_simvq.exported_files import (
    FORMATS,
    _convert_to_openvino,
    open_part,
    other_codes,
    write_part,
)
from modeling_simvq.exported_weights import store_as
from modeling_simvq.lstm import LSTM
from modeling_simvq.nearest_code import EXPORTED_BLOCK, _exported, nearest_code
from modeling_simvq.new_folder import new_folder
from tests.modeling_simvq.tiny import AUDIO, IMAGE

SIZES = [(1, 7), (3, 8), (1, 33)]
CODES = 61  # no other size is


@pytest.fixture(scope="module")
def models():
    torch.manual_seed(0)
    sizes = IMAGE | {"codebook_size": CODES, "num_mid_blocks": 1}
    image, ibq = SimVQImageConfig(**sizes), SimVQImageConfig(**sizes, quantizer="ibq")
    audio = AUDIO | {"codebook_size": CODES}
    streaming = SimVQAudioConfig(streaming=True, attention_window=4, **audio)
    made = {
        "image": SimVQImageModel(image),
        "ibq": SimVQImageModel(ibq),
        "audio": SimVQAudioModel(SimVQAudioConfig(**audio)),
        "streaming": SimVQAudioModel(streaming),
    }
    return {kind: model.eval() for kind, model in made.items()}


def check(model, part: str, run, sizes=SIZES) -> None:
    """Compare a part with the model on batches and sizes that it was not traced with."""
    for rows, tokens in sizes:
        values = example(model, part, rows, tokens)
        found = run(values)
        with torch.no_grad():
            if part == "encoder":
                counted, others = other_codes(model, values, found)
                assert counted == found.numel() and not others
                continue
            made = model.decode(values)
        made = made.audio_values if is_audio(model) else made.pixel_values
        assert found.shape == made.shape
        torch.testing.assert_close(found, made, rtol=0, atol=2e-5 * float(made.abs().max()))


def codebook_of(proto) -> dict[str, bytes]:
    """Return what a graph stores of the codebook, under whatever names."""
    return {
        tensor.name: tensor.raw_data
        for tensor in proto.graph.initializer
        if CODES in tensor.dims and len(tensor.dims) == 2
    }


@pytest.mark.slow
@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("kind", ["image", "ibq", "audio", "streaming"])
def test_torch_export_computes_what_the_model_does(models, kind, part, tmp_path):
    check(models[kind], part, open_part(write_part(models[kind], part, "torch", tmp_path)))


@pytest.mark.slow
@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("kind", ["image", "ibq", "audio"])
def test_onnx_and_openvino_compute_what_the_model_does(models, kind, part, tmp_path):
    """In one, because tracing takes the time. Also weights of fewer bytes."""
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("openvino")
    model = models[kind]
    path = write_part(model, part, "onnx", tmp_path)
    check(model, part, open_part(path))
    if kind == "ibq":  # what it has of its own is the search
        return
    as_openvino = tmp_path / f"{part}.xml"
    _convert_to_openvino(path, as_openvino)
    check(model, part, open_part(as_openvino))

    graph = onnx.load(path).graph
    assert (graph.input[0].name, graph.output[0].name) == input_and_output(model, part)
    sizes = [size.dim_param for size in graph.input[0].type.tensor_type.shape.dim]
    assert (
        sizes
        == {
            ("image", "encoder"): ["batch", "", "2*height", "2*width"],
            ("image", "decoder"): ["batch", "height", "width"],
            ("audio", "encoder"): ["batch", "", "samples"],
            ("audio", "decoder"): ["batch", "", "frames"],
        }[kind, part]
    )

    values = example(model, part)
    expected = open_part(path)(values)
    for weights, worst in (("float16", 2e-3), ("int8", 0.2)):
        proto = onnx.load(path)
        codebook = codebook_of(proto)
        assert codebook
        store_as(proto, weights)
        small = tmp_path / f"{weights}.onnx"
        onnx.save(proto, small)
        assert small.stat().st_size < path.stat().st_size
        assert codebook_of(proto) == codebook
        found = open_part(small)(values)
        assert found.shape == expected.shape
        if part == "decoder":
            assert 1e-7 < (found - expected).abs().max() / expected.abs().max() < worst


@pytest.mark.slow
def test_executorch_computes_what_the_model_does(models, tmp_path):
    pytest.importorskip("executorch")
    for kind, part in (("image", "encoder"), ("audio", "encoder"), ("audio", "decoder")):
        path = write_part(models[kind], part, "executorch", tmp_path)
        check(models[kind], part, open_part(path), [(1, 7), (1, 9)])


@pytest.mark.slow
def test_the_command_writes_a_folder_that_describes_itself(tiny_folder, tmp_path):
    command = [sys.executable, "-m", "modeling_simvq", "export", str(tiny_folder)]
    command += ["--format", "torch", "--output", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "0 of 624 codes differ" in done.stdout and "worst error" in done.stdout
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {
        *("encoder.pt2", "decoder.pt2", "config.json", "preprocessor_config.json"),
        "export.json",
    }
    described = json.loads((tmp_path / "out" / "export.json").read_text())
    assert "auto_map" not in (tmp_path / "out" / "config.json").read_text()
    assert described["sizes"] == "Height and width are multiples of 2 pixels."
    assert described["format"] == "torch" and len(described["weights_digest"]) == 16


@pytest.mark.parametrize(
    "options, said",
    [
        (["--format", "torch", "--weights", "int8"], "stores weights as float32"),
        (["--format", "gguf"], "is a format of code models"),
        (["--format", "onnx", "--tokenizer", "x"], "--tokenizer is of code models"),
        (["--format", "onnx", "--output", "full"], "is there already"),
    ],
)
def test_what_cannot_be_exported(tiny_folder, tmp_path, monkeypatch, capsys, options, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("kept")
    arguments = ["export", str(tiny_folder), "--output", "out", *options]
    assert main(arguments) == 1
    assert said in capsys.readouterr().err
    assert [path.name for path in tmp_path.rglob("*")] == ["full", "mine.txt"]


def test_a_file_that_computes_something_else_does_not_stay(
    tiny_folder, tmp_path, monkeypatch, capsys
):
    def wrong(model, part, format, folder, weights):
        other = AutoModel.from_pretrained(tiny_folder)
        with torch.no_grad():
            other.encoder.conv_in.weight.mul_(1.5)
        return write_part(other, part, format, folder, weights)

    monkeypatch.setattr("modeling_simvq.export_command.write_part", wrong)
    out = tmp_path / "out"
    assert main(["export", str(tiny_folder), "--format", "torch", "--output", str(out)]) == 1
    assert "encoder.pt2 does not compute what the model does" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 2**31),
    st.sampled_from([1, 3, 5, 64, EXPORTED_BLOCK - 1, EXPORTED_BLOCK + 2, 2 * EXPORTED_BLOCK]),
    st.sampled_from([4, 16]),
    st.sampled_from([1e-3, 1.0, 1e3]),
)
def test_the_exported_search_is_exact(seed, codebook_size, width, scale):
    """Also where codes lie within float32 rounding of each other, twice, or far from the origin."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randn(codebook_size, width, generator=generator) * scale + scale
    codes[codebook_size // 2] = codes[0]
    codes[-1] = codes[0] * (1 + 1e-7)
    queries = torch.cat([torch.randn(9, width, generator=generator) * scale, codes[:3]])
    expected = nearest_code(queries, codes)
    found = _exported(queries, codes)
    own, other = (
        (queries.double() - codes[index].double()).norm(dim=1) for index in (found, expected)
    )
    # Where they differ it is nearer: differences in float64 tell more than products.
    assert ((found == expected) | (own < other)).all()


def test_the_fixed_codebook_is_the_quantizer(tiny_model):
    latents = torch.randn(2, 16, 5, 3)
    fixed = FixedCodebook(tiny_model.quantizer.codebook())
    with torch.no_grad():
        quantized, codes, _ = tiny_model.quantizer(latents)
    found, its_codes, _ = fixed(latents)
    assert torch.equal(its_codes, codes) and torch.equal(found, quantized)
    assert torch.equal(fixed.lookup(codes), quantized)


@pytest.mark.parametrize("n_fft, hop", [(32, 8), (30, 10), (21, 7), (1280, 320), (16, 16)])
def test_the_real_inverse_stft_equals_the_complex_one(n_fft, hop):
    generator = torch.Generator().manual_seed(0)
    magnitude = torch.rand(2, n_fft // 2 + 1, 40, generator=generator) * 10
    phase = torch.randn(magnitude.shape, generator=generator) * 20
    expected = InverseSTFT(n_fft, hop)(magnitude, phase, None)
    found = RealInverseSTFT(n_fft, hop)(magnitude, phase, None)
    if (
        n_fft == hop
    ):  # between windows without overlap the sum is 0: as the model, but for its noise
        expected, found = expected[:, 1:], found[:, 1:]
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= 1e-6 * expected.abs().max()


def test_the_loop_is_the_lstm():
    torch.manual_seed(0)
    lstm = LSTM(5, 5, 2).eval()
    rows = torch.randn(3, 11, 5)
    torch.testing.assert_close(LoopedLSTM(lstm)(rows, None)[0], lstm(rows)[0])


def test_exporting_leaves_the_model_alone(tiny_audio_model):
    before = {name: value.clone() for name, value in tiny_audio_model.state_dict().items()}
    exportable(tiny_audio_model, "encoder")
    after = tiny_audio_model.state_dict()
    assert list(before) == list(after)
    assert all(torch.equal(before[name], after[name]) for name in before)
    with pytest.raises(ValueError, match="part must be one of encoder, decoder, got 'both'"):
        exportable(tiny_audio_model, "both")


def test_a_model_that_runs_in_pieces_or_in_half_precision_is_exported_whole(models):
    image, audio = models["image"], models["audio"]
    image.enable_tiling(16, 4)
    audio.enable_chunking()
    try:
        for model in (image, audio):
            half = copy.deepcopy(model).bfloat16()
            for one in (model, half):
                values = example(one, "decoder")
                made = exportable(one, "decoder")(values)
                assert made.dtype == torch.float32
        assert image._tiling is not None
    finally:
        image.disable_tiling()
        audio.disable_chunking()


def test_what_cannot_be_traced_is_told_in_a_line(tmp_path):
    config = SimVQAudioConfig(**AUDIO | {"codebook_dim": 1})
    with pytest.raises(ValueError, match="torch.export cannot trace this encoder for any size"):
        write_part(SimVQAudioModel(config).eval(), "encoder", "torch", tmp_path)


def test_folders_that_are_there(tmp_path, monkeypatch):
    """An empty one, a link to one and the present one are filled; a link to nothing is refused."""
    for name in ("empty", "real", "here"):
        (tmp_path / name).mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    (tmp_path / "gone").symlink_to(tmp_path / "nothing")
    monkeypatch.chdir(tmp_path / "here")
    for output in (tmp_path / "empty", tmp_path / "link", Path(".")):
        with new_folder(output) as folder:
            (folder / "file").write_text("x")
            assert not (output / "file").exists()
        assert [path.name for path in output.iterdir()] == ["file"]
    with (
        pytest.raises(ValueError, match="link to something that is not there"),
        new_folder(tmp_path / "gone"),
    ):
        pass
    with pytest.raises(RuntimeError), new_folder(tmp_path / "new"):
        raise RuntimeError
    assert not (tmp_path / "new").exists()
    assert not list(tmp_path.glob(".exporting-*"))


@pytest.mark.soak
@pytest.mark.slow
def test_a_stopped_export_leaves_nothing(tiny_folder, tmp_path):
    command = [sys.executable, "-m", "modeling_simvq", "export", str(tiny_folder), "--format"]
    process = subprocess.Popen(
        [*command, "torch", "--output", str(tmp_path / "out")], stderr=subprocess.PIPE, text=True
    )
    assert process.stderr.readline() == "writing the encoder\n"
    process.terminate()
    assert process.wait(60) == 128 + signal.SIGTERM
    assert not list(tmp_path.iterdir())


def test_every_format_has_a_name_and_an_ending():
    assert FORMATS == {
        "onnx": ".onnx",
        "openvino": ".xml",
        "torch": ".pt2",
        "executorch": ".pte",
    }


@pytest.mark.slow
def test_the_snippet_of_the_docs_runs(models, tmp_path, monkeypatch):
    pytest.importorskip("onnx")
    page = (Path(__file__).parents[2] / "docs" / "anywhere.md").read_text(encoding="utf-8")
    (snippet,) = [part for part in page.split("```")[1::2] if "InferenceSession" in part]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "exported").mkdir()
    for part in PARTS:
        write_part(models["image"], part, "onnx", tmp_path / "exported")
    Image.linear_gradient("L").save("photo.jpg")
    exec(compile(snippet.removeprefix("python\n"), "docs/anywhere.md", "exec"), {})
    assert Image.open("decoded.png").size == (256, 256)
