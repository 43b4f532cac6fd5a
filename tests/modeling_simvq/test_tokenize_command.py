"""Commands encode, decode, reconstruct and info: what they write, skip and refuse."""

import io
import shutil
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from huggingface_hub import HfApi
from PIL import Image

from modeling_simvq import SimVQImageModel, SimVQImageProcessor
from modeling_simvq.__main__ import main
from modeling_simvq.code_file import Codes, codes_from_bytes
from modeling_simvq.command_model import weights_digest
from modeling_simvq.wav_file import read_wav, write_wav


def picture(path: Path, width: int, height: int, seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).integers(0, 255, (height, width, 3), np.uint8)
    Image.fromarray(noise).save(path)
    return path


def call(name: str, *inputs, model: Path, output, **options) -> int:
    words = [str(word) for key, value in options.items() for word in (f"--{key}", value)]
    return main([name, *map(str, inputs), "--model", str(model), "--output", str(output), *words])


@pytest.mark.parametrize("form", ["npz", "safetensors"])
def test_a_folder_of_images_becomes_codes_and_images_again(form, tiny_folder, tmp_path, capsys):
    """Places are kept, sizes that fill no whole codes too, and the codes are the model's."""
    photos = tmp_path / "photos"
    sizes = {"a/1.png": (21, 16), "a/2.jpg": (21, 16), "b/c/3.PNG": (16, 9)}
    for seed, (name, size) in enumerate(sizes.items()):
        picture(photos / name, *size, seed)
    (photos / "notes.txt").write_text("no image")
    assert call("encode", photos, model=tiny_folder, output=tmp_path / "codes", format=form) == 0
    assert "3 written, 0 there already, 0 skipped" in capsys.readouterr().err
    model = SimVQImageModel.from_pretrained(tiny_folder).eval()
    processor = SimVQImageProcessor.from_pretrained(tiny_folder)
    for name, (width, height) in sizes.items():
        file = tmp_path / "codes" / Path(name).with_suffix(f".{form}")
        found = codes_from_bytes(file.read_bytes(), name)
        assert found.model == str(tiny_folder) and found.digest == weights_digest(model)
        assert found.sizes == {"height": height, "width": width}
        image = Image.open(photos / name)
        inputs = processor(image, return_tensors="pt", do_resize=False, do_center_crop=False)
        with torch.no_grad():
            assert np.array_equal(found.codes, model.encode(**inputs).image_codes[0])
    assert call("decode", tmp_path / "codes", model=tiny_folder, output=tmp_path / "out") == 0
    assert call("reconstruct", photos, model=tiny_folder, output=tmp_path / "both") == 0
    for name, size in sizes.items():
        ways = [Image.open((tmp_path / way / name).with_suffix(".png")) for way in ("out", "both")]
        assert ways[0].size == size and ways[0].tobytes() == ways[1].tobytes()


def test_recordings_of_any_lengths_share_a_batch(tiny_audio_folder, tmp_path):
    clips = {n: (torch.rand(n) - 0.5) * 0.2 for n in (5000, 321, 1)}
    for n, samples in clips.items():
        write_wav(tmp_path / f"in{n}.wav", samples, 24_000)
    call("encode", f"{tmp_path}/in*.wav", model=tiny_audio_folder, output=tmp_path / "codes")
    assert call("decode", tmp_path / "codes", model=tiny_audio_folder, output=tmp_path / "out") == 0
    for n in clips:
        alone = tmp_path / f"alone{n}"
        call("reconstruct", tmp_path / f"in{n}.wav", model=tiny_audio_folder, output=alone)
        found, rate, _ = read_wav(tmp_path / f"out/in{n}.wav")
        assert found.shape == (1, 1, n) and rate == 24_000
        torch.testing.assert_close(found, read_wav(alone / f"in{n}.wav")[0], rtol=0, atol=1e-4)


def test_other_rates_are_resampled(tiny_audio_folder, tmp_path):
    pytest.importorskip("soxr")
    write_wav(tmp_path / "in.wav", torch.rand(8000) * 0.1, 8000)
    call("encode", tmp_path / "in.wav", model=tiny_audio_folder, output=tmp_path)
    found = codes_from_bytes((tmp_path / "in.npz").read_bytes(), "in.npz")
    assert found.codes.shape == (75,) and found.sizes == {
        "samples": 24_000,
        "sampling_rate": 24_000,
    }


def test_what_is_there_is_left_and_what_cannot_be_read_is_named(tiny_folder, tmp_path, capsys):
    photos = tmp_path / "photos"
    picture(photos / "good.png", 8, 8)
    (photos / "bad.png").write_bytes(b"\x89PNG broken")
    arguments = {"model": tiny_folder, "output": tmp_path / "codes"}
    assert call("encode", photos, **arguments) == 1
    told = capsys.readouterr().err
    assert "bad.png: it is no image that Pillow knows" in told and "1 written" in told
    assert call("encode", photos, **arguments) == 1
    assert "0 written, 1 there already, 1 skipped" in capsys.readouterr().err
    (photos / "bad.png").unlink()
    assert call("encode", photos, **arguments) == 0
    assert sorted(path.name for path in (tmp_path / "codes").iterdir()) == ["good.npz"]


def test_codes_of_another_model_are_refused(tiny_folder, tmp_path, capsys):
    other = SimVQImageModel.from_pretrained(tiny_folder)
    other.decoder.conv_out.bias.data += 1
    other.save_pretrained(tmp_path / "other")
    SimVQImageProcessor.from_pretrained(tiny_folder).save_pretrained(tmp_path / "other")
    photo = picture(tmp_path / "photo.png", 8, 8)
    call("encode", photo, model=tiny_folder, output=tmp_path / "codes")
    arguments = {"model": tmp_path / "other", "output": tmp_path / "out"}
    assert call("decode", tmp_path / "codes", **arguments) == 1
    assert f"its codes are of {tiny_folder}" in capsys.readouterr().err
    assert call("encode", photo, model=tmp_path / "other", output=tmp_path / "codes") == 1
    assert "name another output folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("inputs", "told"),
    [
        (["nowhere.png"], "there is no file or folder nowhere.png"),
        (["empty"], "no files to take in empty"),
        (["a/x.png", "b/x.png"], "would both become"),
    ],
)
def test_inputs_that_cannot_be_meant(inputs, told, tiny_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    picture(Path("a/x.png"), 8, 8)
    picture(Path("b/x.png"), 8, 8)
    assert call("encode", *inputs, model=tiny_folder, output="out") == 1
    assert told in capsys.readouterr().err


def bomb() -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("codes.npy", bytes(1 << 20))
    return content.getvalue()


def with_objects() -> bytes:
    content = io.BytesIO()
    np.savez(content, codes=np.array([{"a": 1}]), metadata=np.array("{}"))
    return content.getvalue()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"PK",
        b"junk" * 9,
        bomb(),
        with_objects(),
        b"\xff" * 8 + b"{}",
        b"\x02" + b"\0" * 7 + b"[]",
    ],
)
def test_hostile_files_of_codes(content):
    with pytest.raises(ValueError, match=r"x\.npz is damaged or no file of codes"):
        codes_from_bytes(content, "x.npz")


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_files_of_codes_hold_what_was_put_in(suffix):
    codes = Codes(np.arange(6, dtype=np.int32).reshape(2, 3), "me/model", "ab12", {"height": 3})
    found = codes_from_bytes(codes.to_bytes(suffix), "x")
    assert np.array_equal(found.codes, codes.codes)
    assert (found.model, found.digest, found.sizes) == ("me/model", "ab12", {"height": 3})
    damaged = codes.to_bytes(suffix)[:-5]
    with pytest.raises(ValueError, match="damaged"):
        codes_from_bytes(damaged, "x")


def test_codes_beyond_the_codebook_are_skipped(tiny_folder, tmp_path, capsys):
    model = SimVQImageModel.from_pretrained(tiny_folder)
    codes = Codes(np.full((2, 2), 999), "x", weights_digest(model), {"height": 4, "width": 4})
    (tmp_path / "x.npz").write_bytes(codes.to_bytes(".npz"))
    assert call("decode", tmp_path / "x.npz", model=tiny_folder, output=tmp_path) == 1
    assert "999" in capsys.readouterr().err


def test_info_tells_what_codes_cost(tiny_folder, tiny_audio_folder, capsys):
    assert main(["info", str(tiny_folder)]) == main(["info", str(tiny_audio_folder)]) == 0
    told = capsys.readouterr().out
    assert "64 of 6 bits" in told and "2 x 2 pixels, 1.5 bits a pixel" in told
    assert "75 codes a second, 0.45 kbit/s" in told


def test_codes_go_through_pipes(tiny_folder, tmp_path, monkeypatch, capsysbinary):
    content = picture(tmp_path / "photo.png", 10, 8).read_bytes()
    for command in ("encode", "decode"):
        monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(content)))
        assert call(command, "-", model=tiny_folder, output="-") == 0
        content = capsysbinary.readouterr().out
    assert Image.open(io.BytesIO(content)).size == (10, 8)


def test_a_converted_checkpoint_is_pushed_and_used_from_the_hub(hub, checkpoint, tmp_path, capsys):
    folder = tmp_path / "model"
    assert main(["convert", str(checkpoint), str(folder), "--weights", "raw"]) == 0
    (folder / "notes.txt").write_text("mine")
    assert main(["push", str(folder), "maker/tiny"]) == 1
    assert "has no README.md" in capsys.readouterr().err
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# tiny\n")
    assert main(["push", str(folder), "maker/tiny"]) == 0
    assert "maker/tiny" in capsys.readouterr().out
    files = HfApi(endpoint=hub.url, token=hub.token).list_repo_files("maker/tiny")
    assert {"README.md", "config.json", "model.safetensors"} <= set(files)
    assert "notes.txt" not in files
    photo = picture(tmp_path / "photo.png", 8, 8)
    assert call("encode", photo, model="maker/tiny", output=tmp_path) == 0
    found = codes_from_bytes((tmp_path / "photo.npz").read_bytes(), "photo.npz")
    assert found.digest == weights_digest(SimVQImageModel.from_pretrained(folder))


def test_a_push_that_the_hub_refuses(hub, tiny_folder, tmp_path, capsys):
    folder = tmp_path / "model"
    shutil.copytree(tiny_folder, folder)
    (folder / "README.md").write_text("# tiny")
    for name, told in (("reader/tiny", "refused reader/tiny"), ("a//b", "refused a//b")):
        assert main(["push", str(folder), name]) == 1
        assert told in capsys.readouterr().err
