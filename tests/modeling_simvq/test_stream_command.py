"""The command that streams a recording: what it writes and prints, and which files and models it refuses."""

import re
import struct
import wave
from pathlib import Path

import pytest
import torch
from huggingface_hub import HfApi

from modeling_simvq import SimVQAudioConfig, SimVQAudioModel, SimVQImageConfig, stream_command
from modeling_simvq.__main__ import main
from modeling_simvq.stream_command import read_wav, write_wav
from tests.support.programs import REPOSITORY, run

RATE = 8000
SMALL = {"num_filters": 4, "downsampling_ratios": [2, 4], "codebook_size": 300, "codebook_dim": 16}
SMALL |= {"hidden_size": 32, "intermediate_size": 64, "num_decoder_layers": 2, "n_fft": 32}
SMALL |= {"attention_window": 5, "sampling_rate": RATE}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A streaming tokenizer of random weights, 8 samples a code."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("streaming") / "model"
    SimVQAudioModel(SimVQAudioConfig(**SMALL, streaming=True)).save_pretrained(folder)
    return folder


def write_pcm(path: Path, samples: bytes, width: int = 2, channels: int = 1, rate=RATE) -> Path:
    with wave.open(str(path), "wb") as file:
        file.setparams((channels, width, rate, 0, "NONE", ""))
        file.writeframes(samples)
    return path


@pytest.fixture
def recording(tmp_path) -> Path:
    """A tone of 1,003 samples, whose last frame is not full."""
    values = (0.5 * torch.sin(torch.arange(1003) / 9) * 32767).round().short()
    return write_pcm(tmp_path / "in.wav", values.numpy().tobytes())


def call(*arguments) -> int:
    return main(["stream", *map(str, arguments)])


def told(capsys, *arguments) -> str:
    """Return the one line of error that the command must end with."""
    assert call(*arguments) == 1
    line = capsys.readouterr().err
    assert line.startswith("error: ") and line.count("\n") == 1
    return line


@pytest.mark.parametrize("milliseconds", [0.125, 7, 80, 5000])
def test_a_stream_equals_the_whole_clip_however_long_its_chunks(
    folder, recording, tmp_path, capsys, milliseconds
):
    output = tmp_path / "out.wav"
    if milliseconds < 1:  # chunks of single samples
        write_pcm(recording, read_bytes(recording)[:200])
    assert call(recording, output, "--model", folder, "--chunk-ms", milliseconds) == 0
    samples, rate, _ = read_wav(recording)
    model = SimVQAudioModel.from_pretrained(folder).eval()
    with torch.no_grad():
        codes = model.encode(samples).audio_codes
        expected = model.decode(codes).audio_values[..., : samples.shape[-1]].clamp(-1, 1)
    found, found_rate, channels = read_wav(output)
    assert (found.shape, found_rate, channels) == (samples.shape, rate, 1)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    printed = dict(re.findall(r"^(.+?): +(.+)$", capsys.readouterr().out, re.MULTILINE))
    assert (
        printed["codes"] == f"{codes.numel():,}" and printed["codes of the whole clip"] == "equal"
    )
    # A frame of 8 samples, and (32 - 8) / 2 of the window.
    assert printed["algorithmic latency"] == "2.5 ms"
    assert float(printed["real-time factor"]) > 0
    assert float(printed["samples of the whole clip"].split()[-1]) <= 1e-6
    assert re.fullmatch(
        r"median \d+\.\d ms, 95th percentile \d+\.\d ms", printed[f"chunk of {milliseconds} ms"]
    )


def read_bytes(path: Path) -> bytes:
    with wave.open(str(path), "rb") as file:
        return file.readframes(file.getnframes())


@pytest.mark.parametrize("spoilt", ["codes", "samples"])
def test_the_status_is_1_when_the_whole_clip_differs(
    folder, recording, tmp_path, capsys, monkeypatch, spoilt
):
    real = stream_command.stream_recording

    def other(*arguments):
        made = real(*arguments)
        getattr(made, spoilt).view(-1)[5] += 1
        return made

    monkeypatch.setattr(stream_command, "stream_recording", other)
    assert call(recording, tmp_path / "out.wav", "--model", folder) == 1
    assert ("DIFFERENT" in capsys.readouterr().out) == (spoilt == "codes")


@pytest.mark.parametrize(
    ("width", "content"),
    [
        (1, bytes([0, 128, 192, 255])),
        (2, struct.pack("<4h", -32768, 0, 16384, 32767)),
        (3, bytes([0, 0, 128, 0, 0, 0, 0, 0, 64, 255, 255, 127])),
        (4, struct.pack("<4i", -(2**31), 0, 2**30, 2**31 - 1)),
    ],
)
def test_pcm_of_every_width(tmp_path, width, content):
    samples, rate, channels = read_wav(write_pcm(tmp_path / "in.wav", content, width))
    assert samples.dtype == torch.float32 and (rate, channels) == (RATE, 1)
    expected = torch.tensor([-1, 0, 0.5, 1 - 2.0 ** (1 - 8 * width)])
    torch.testing.assert_close(samples[0, 0], expected, rtol=0, atol=1e-7)


def test_what_is_written_is_read_again_and_loud_samples_are_clipped(tmp_path):
    write_wav(tmp_path / "out.wav", torch.tensor([-3.0, -0.25, 0.5, 7.0]), RATE)
    samples, *_ = read_wav(tmp_path / "out.wav")
    torch.testing.assert_close(samples[0, 0], torch.tensor([-1, -0.25, 0.5, 1]), rtol=0, atol=1e-4)


def test_channels_are_mixed_down_and_that_is_said(folder, tmp_path, capsys):
    stereo = write_pcm(tmp_path / "in.wav", struct.pack("<4h", 16384, 0, 0, -8192), channels=2)
    assert read_wav(stereo)[0].flatten().tolist() == [0.25, -0.125]
    assert call(stereo, tmp_path / "out.wav", "--model", folder) == 0
    assert f"the 2 channels of {stereo} are mixed down" in capsys.readouterr().out


def test_a_recording_whose_header_declares_more_than_there_is(tmp_path, recording):
    content = bytearray(recording.read_bytes())
    content[40:44] = b"\xff" * 4
    recording.write_bytes(content + b"\0")  # and half a sample at the end
    assert read_wav(recording)[0].shape == (1, 1, 1003)


def test_recordings_that_cannot_be_read(folder, tmp_path, capsys):
    path, out = tmp_path / "in.wav", tmp_path / "out.wav"
    assert f"{path} is not a file" in told(capsys, path, out, "--model", folder)
    path.write_bytes(b"no recording")
    line = told(capsys, path, out, "--model", folder)
    assert "no WAV file of PCM" in line and f'ffmpeg -i "{path}" -c:a pcm_s16le' in line
    path.write_bytes(b"")
    assert "ends too early" in told(capsys, path, out, "--model", folder)
    write_pcm(path, bytes(8), width=4)
    content = bytearray(path.read_bytes())
    content[20:22] = b"\3\0"  # floating point
    path.write_bytes(content)
    assert "unknown format: 3" in told(capsys, path, out, "--model", folder)
    write_pcm(path, b"")
    assert "holds no samples" in told(capsys, path, out, "--model", folder)
    write_pcm(path, bytes(8), rate=44_100)
    line = told(capsys, path, out, "--model", folder)
    assert "44,100 samples a second and the model takes 8,000" in line and "-ar 8000" in line
    assert not out.exists()


def test_places_where_the_output_cannot_go(folder, recording, tmp_path, capsys):
    before = recording.read_bytes()
    (tmp_path / "link.wav").symlink_to(recording)
    for same in (recording, tmp_path / "link.wav"):
        assert "is the input itself" in told(capsys, recording, same, "--model", folder)
    assert recording.read_bytes() == before
    assert "is a folder" in told(capsys, recording, tmp_path, "--model", folder)
    missing = tmp_path / "gone" / "out.wav"
    assert "there is no folder" in told(capsys, recording, missing, "--model", folder)


def test_models_that_cannot_stream(recording, tmp_path, capsys):
    out = tmp_path / "out.wav"
    SimVQAudioConfig(**SMALL).save_pretrained(
        tmp_path / "whole"
    )  # told before weights are looked for
    assert "streaming=True" in told(capsys, recording, out, "--model", tmp_path / "whole")
    SimVQImageConfig().save_pretrained(tmp_path / "image")
    line = told(capsys, recording, out, "--model", tmp_path / "image")
    assert "of type simvq_image, not simvq_audio" in line
    assert "it has no config.json" in told(capsys, recording, out, "--model", tmp_path)
    assert call(recording, out, "--model", tmp_path / "gone") == 1
    assert f"{tmp_path / 'gone'} is neither a folder here nor" in capsys.readouterr().err


def test_pickled_weights_are_not_opened(folder, recording, tmp_path, capsys):
    model = SimVQAudioModel.from_pretrained(folder)
    model.config.save_pretrained(tmp_path / "pickled")
    torch.save(model.state_dict(), tmp_path / "pickled" / "pytorch_model.bin")
    assert call(recording, tmp_path / "out.wav", "--model", tmp_path / "pickled") == 1
    assert "model.safetensors" in capsys.readouterr().err


def test_weights_that_are_not_finite(folder, recording, tmp_path, capsys):
    model = SimVQAudioModel.from_pretrained(folder)
    torch.nn.init.constant_(model.decoder.head.bias, float("nan"))
    model.save_pretrained(tmp_path / "damaged")
    line = told(capsys, recording, tmp_path / "out.wav", "--model", tmp_path / "damaged")
    assert "not finite" in line and not (tmp_path / "out.wav").exists()


@pytest.mark.parametrize("value", ["0", "-3", "nan", "inf", "x"])
def test_chunks_of_no_length(capsys, value):
    with pytest.raises(SystemExit):
        call("in.wav", "out.wav", "--model", "m", f"--chunk-ms={value}")
    assert "--chunk-ms" in capsys.readouterr().err


def test_chunks_of_less_than_a_sample(folder, recording, tmp_path, capsys):
    line = told(capsys, recording, tmp_path / "out.wav", "--model", folder, "--chunk-ms", "0.01")
    assert "less than a sample at 8,000 Hz" in line


@pytest.mark.slow
def test_the_command_in_a_process_of_its_own(folder, recording, tmp_path):
    command = ["-m", "modeling_simvq", "stream", recording, tmp_path / "out.wav"]
    done = run(*command, "--model", folder, cwd=REPOSITORY)
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert "codes of the whole clip:   equal" in done.stdout
    assert read_wav(tmp_path / "out.wav")[0].shape == (1, 1, 1003)


@pytest.mark.slow
def test_a_model_of_the_hub_by_its_revision(hub, folder, recording, tmp_path):
    api = HfApi(endpoint=hub.url, token=hub.token)
    api.create_repo("maker/streaming")
    api.create_branch("maker/streaming", branch="first")
    api.upload_folder(repo_id="maker/streaming", folder_path=folder, revision="first")
    command = ["-m", "modeling_simvq", "stream", recording, tmp_path / "out.wav"]
    command += ["--model", "maker/streaming"]
    environment = hub.environment(tmp_path / "home")
    done = run(*command, cwd=REPOSITORY, env=environment)  # main holds nothing
    assert done.returncode == 1 and done.stderr.startswith("error: maker/streaming"), done.stderr
    done = run(*command, "--revision", "first", cwd=REPOSITORY, env=environment)
    assert done.returncode == 0, done.stderr
    assert "codes of the whole clip:   equal" in done.stdout
