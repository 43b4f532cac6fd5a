"""The Space's functions: codes as text and pictures, uploads of every kind, checkpoints that do not load."""

import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from modeling_simvq import (
    SimVQAudioConfig,
    SimVQAudioFeatureExtractor,
    SimVQAudioModel,
    SimVQImageConfig,
    SimVQImageModel,
    SimVQImageProcessor,
)
from tests.modeling_simvq.tiny import AUDIO, IMAGE

SPACE = Path(__file__).parents[2] / "hub_cards" / "space"

pytest.importorskip("soxr", reason="the Space needs soxr")
from hub_cards.space import codes as codes_module  # noqa: E402
from hub_cards.space import tokenizer  # noqa: E402


@pytest.fixture
def app(monkeypatch):
    """The module app, imported as in the Space, where the folder is on the path."""
    pytest.importorskip("gradio", reason="gradio is not installed")
    monkeypatch.syspath_prepend(SPACE)
    import app

    yield app
    for name in ("app", "codes", "microphone", "microphone_tab", "tokenizer"):
        sys.modules.pop(name)


def test_statistics_of_codes():
    found = codes_module.code_statistics(np.array([[3, 3, 5, 5], [7, 7, 9, 9]]), 64)
    assert (found.tokens, found.distinct, found.codebook_size) == (8, 4, 64)
    assert found.perplexity == pytest.approx(4) and found.bits == 8 * 6
    assert codes_module.code_statistics(np.zeros((1, 5), int), 64).perplexity == pytest.approx(1)


def test_codes_as_text_and_back():
    codes = np.arange(12).reshape(3, 4)
    text = codes_module.write_codes(codes)
    assert text == "0 1 2 3\n4 5 6 7\n8 9 10 11"
    np.testing.assert_array_equal(codes_module.read_codes(text, 12, 3, 4), codes)
    commas = "\n 0, 1,2 3 \r\n\n4 5 6 7\n8 9 10 11\n\n"
    np.testing.assert_array_equal(codes_module.read_codes(commas, 12, 3, 4), codes)
    strip = codes.reshape(1, 12)
    text = codes_module.write_codes(strip, per_line=5)
    assert text.splitlines() == ["0 1 2 3 4", "5 6 7 8 9", "10 11"]
    np.testing.assert_array_equal(codes_module.read_codes(text, 12, 1, 12, one_row=True), strip)


@pytest.mark.parametrize(
    ("text", "one_row", "told"),
    [
        ("", False, "no codes.*0 to 63"),
        (" ,\n ", True, "no codes.*0 to 63"),
        ("1 2\n3 64", False, "row 2, code 2: 64 is not a code.*0 to 63"),
        ("-1", False, "row 1, code 1: -1 is not a code.*0 to 63"),
        ("1 2\n3 64", True, "code 4: 64 is not a code.*0 to 63"),
        ("1 2.5", False, "code 2: 2.5 is not an integer.*0 to 63"),
        ("1 1_0", False, "1_0 is not an integer"),
        ("1 ٣", False, "٣ is not an integer"),
        ("9" * 100_000, False, r"9{24}… is not a code"),
        ("x" * 100_000, False, r"x{24}… is not an integer"),
        ("1 2 3\n4 5", False, "row 1 has 3 codes, row 2 has 2"),
        ("1 2 3 4 5", False, "at most 3 rows of 4 codes.*1 rows of up to 5"),
        ("1\n" * 4, False, "at most 3 rows of 4 codes.*4 rows of up to 1"),
        ("1 " * 100_000, True, "at most 4 codes.*found 100000"),
    ],
)
def test_bad_codes_are_named(text, one_row, told):
    with pytest.raises(ValueError, match=told):
        codes_module.read_codes(text, 64, 1 if one_row else 3, 4, one_row=one_row)


def test_every_code_has_a_colour_of_its_own():
    colours = codes_module.colours_of_codes(np.arange(262_144))
    assert len(np.unique(colours, axis=0)) == 262_144
    np.testing.assert_array_equal(
        colours[[5, 77]], codes_module.colours_of_codes(np.array([5, 77]))
    )


def test_codes_as_a_picture():
    five, seven, eight = codes_module.colours_of_codes(np.array([5, 7, 8])).tolist()
    drawn = codes_module.picture_of_codes(np.array([[5, 7], [8, 5]]))
    corners = [drawn.getpixel(at) for at in ((0, 0), (383, 383), (384, 0), (0, 384), (767, 767))]
    assert drawn.size == (768, 768)
    assert corners == [tuple(c) for c in (five, five, seven, eight, five)]
    wrapped = codes_module.picture_of_codes(np.array([[5, 7, 8]]), per_line=2)
    assert wrapped.getpixel((0, 767)) == tuple(eight)
    assert wrapped.getpixel((767, 767)) == (255, 255, 255)
    assert codes_module.picture_of_codes(np.array([[5, 7, 8]])).size == (768, 256)
    assert codes_module.picture_of_codes(np.arange(2250)[None]).size == (2250, 96)


def test_a_whole_picture_to_codes_and_back(checkpoints, waves):
    model, processor = tokenizer.load(str(checkpoints["pictures"]))
    assert tokenizer.load(str(checkpoints["pictures"]))[0] is model and not model.training
    encoded = tokenizer.encode_picture(model, processor, waves(47, 32))
    assert encoded.codes.shape == (16, 24) and encoded.size == (32, 47)
    assert tokenizer.decode_picture(model, processor, encoded).size == (47, 32)
    assert tokenizer.whole_size(model.config, encoded.codes) == (32, 48)
    assert tokenizer.largest_grid(model.config) == (256, 256)
    with pytest.raises(ValueError, match="smaller than one code"):
        tokenizer.encode_picture(model, processor, waves(1, 9))


def test_pictures_as_uploaded(tmp_path, waves):
    path = tmp_path / "picture.png"
    waves(2000, 500).save(path)
    picture, note = tokenizer.read_picture(path, SimVQImageProcessor())
    assert picture.size == (512, 128) and "from 2000 x 500 down to 512 x 128" in note
    photograph = tmp_path / "photograph.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6  # lies on its side
    waves(60, 40).save(photograph, exif=exif)
    picture, note = tokenizer.read_picture(photograph, SimVQImageProcessor())
    assert picture.size == (40, 60) and note == ""
    Image.fromarray(np.full((8, 8), 32768, np.uint16)).save(path)
    picture, _ = tokenizer.read_picture(path, SimVQImageProcessor())
    assert picture.mode == "RGB" and np.asarray(picture)[0, 0].tolist() == [127, 127, 127]
    waves(64, 64).save(path)
    for content in (b"", b"no image", path.read_bytes()[:300]):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="not an image that can be read"):
            tokenizer.read_picture(path, SimVQImageProcessor())


def test_pictures_are_read_as_the_processor_reads_them(tmp_path):
    ramp = np.linspace(0, 65_535, 64).reshape(8, 8)
    processor = SimVQImageProcessor(do_resize=False, do_center_crop=False)
    for pixels, name in (
        (ramp.astype(np.int32), "32.tif"),
        (ramp.astype(np.uint16), "16.tif"),
        (ramp.astype(np.uint16), "16.png"),
        ((ramp // 257).astype(np.uint8), "8.bmp"),
    ):
        Image.fromarray(pixels).save(tmp_path / name)
        shown = np.asarray(tokenizer.read_picture(tmp_path / name, processor)[0])
        assert (shown[..., 0] == (ramp.astype(int) // 257)).all(), name
    for pixels, name in ((ramp.astype(np.float32), "f.tif"), (ramp.astype(np.int32) * 9, "i.tif")):
        Image.fromarray(pixels).save(tmp_path / name)
        with pytest.raises(ValueError, match="no known range"):
            tokenizer.read_picture(tmp_path / name, processor)


def test_enormous_pictures_are_refused(tmp_path, monkeypatch, waves):
    monkeypatch.setattr(tokenizer, "MOST_PIXELS", 99)
    waves(10, 10).save(tmp_path / "picture.png")
    with pytest.raises(ValueError, match="10 x 10 pixels, more than 99"):
        tokenizer.read_picture(tmp_path / "picture.png", SimVQImageProcessor())


def test_a_sound_to_codes_and_back(checkpoints, tmp_path):
    path = tmp_path / "sound.wav"
    stereo = np.stack([np.sin(np.arange(48_000) / 50), np.zeros(48_000)], axis=1) / 2
    soundfile.write(path, stereo, 48_000)
    sound, note = tokenizer.read_sound(path, 24_000)
    assert sound.shape == (24_000,) and sound.dtype == np.float32 and note == ""
    assert np.abs(sound).max() == pytest.approx(0.25, abs=0.01)  # the mean of both channels
    model, extractor = tokenizer.load(str(checkpoints["sounds"]))
    encoded = tokenizer.encode_sound(model, extractor, sound[:1000])
    assert encoded.codes.shape == (1, 4) and encoded.size == (1000,)
    made = tokenizer.decode_sound(model, encoded)
    assert made.shape == (1000,) and made.dtype == np.int16
    assert tokenizer.whole_size(model.config, encoded.codes) == (1280,)
    assert tokenizer.largest_grid(model.config) == (1, 2250)


def test_sounds_as_uploaded(tmp_path):
    path = tmp_path / "sound.wav"
    soundfile.write(path, np.zeros(31 * 8000), 8000)
    sound, note = tokenizer.read_sound(path, 16_000)
    assert len(sound) == 30 * 16_000 and "from 31.0 to its first 30 seconds" in note
    soundfile.write(path, np.zeros(1), 48_000)
    assert len(tokenizer.read_sound(path, 16_000)[0]) == 1
    soundfile.write(path, np.zeros(0), 8000)
    with pytest.raises(ValueError, match="is empty"):
        tokenizer.read_sound(path, 16_000)
    soundfile.write(path, np.full(9, np.nan), 8000, subtype="FLOAT")
    with pytest.raises(ValueError, match="not finite"):
        tokenizer.read_sound(path, 16_000)
    path.write_bytes(b"no sound")
    with pytest.raises(ValueError, match="not an audio file that can be read"):
        tokenizer.read_sound(path, 16_000)


def test_an_mp3_whose_length_is_guessed_is_said_to_be_one(tmp_path):
    path, noise = tmp_path / "sound.mp3", np.random.default_rng(0).uniform(-0.5, 0.5, 48_000)
    soundfile.write(path, noise, 24_000, format="MP3")
    assert tokenizer.read_sound(path, 24_000)[1] == ""
    content = path.read_bytes()
    mark = next(m for m in (b"Xing", b"Info") if m in content[:4096])
    path.write_bytes(content.replace(mark, b"\0" * 4, 1))
    assert "does not tell how long it is" in tokenizer.read_sound(path, 24_000)[1]


def test_checkpoints_that_do_not_load(checkpoints, tmp_path):
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(tokenizer.CheckpointError, match=f"{tmp_path} could not be loaded: "):
        tokenizer.load(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(tokenizer.CheckpointError, match="of type bert, not simvq_image"):
        tokenizer.load(str(tmp_path))
    shutil.copy(checkpoints["pictures"] / "config.json", tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(tokenizer.CheckpointError, match="could not be loaded: "):
        tokenizer.load(str(tmp_path))


@pytest.mark.slow
def test_command_line(app, tmp_path, monkeypatch, capsys):
    options = app.parse_arguments(["a/b", "folder", "--port", "7"])
    assert options.checkpoints == ["a/b", "folder"] and options.port == 7
    monkeypatch.setattr(app, "CHECKPOINTS", tmp_path / "checkpoints.json")
    for content, told in (
        (None, "name a checkpoint"),
        ("[", "not JSON"),
        ("[]", "list of Hub ids"),
    ):
        if content is not None:
            app.CHECKPOINTS.write_text(content)
        with pytest.raises(SystemExit):
            app.parse_arguments([])
        assert told in capsys.readouterr().err
    with pytest.raises(SystemExit):
        app.parse_arguments(["--help"])
    assert "checkpoints.json" in capsys.readouterr().out


@pytest.mark.slow
def test_visitors_choose_among_the_listed_checkpoints_only(app):
    import gradio

    for call in (
        lambda: app.select(["a/b"], "c/d"),
        lambda: app.reconstruct(["a/b"], "c/d", None, None),
        lambda: app.decode(["a/b"], "c/d", "1", None),
    ):
        with pytest.raises(gradio.Error, match="Only the listed"):
            call()


def test_a_checkpoint_that_lacks_weights(checkpoints, tmp_path):
    folder = shutil.copytree(checkpoints["pictures"], tmp_path / "lacking")
    weights = load_file(folder / "model.safetensors")
    del weights["decoder.conv_out.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(tokenizer.CheckpointError, match=r"lacks 1 weights: decoder\.conv_out"):
        tokenizer.load(str(folder))


def test_only_parsers_of_common_pictures_see_an_upload(tmp_path):
    path = tmp_path / "picture.eps"
    Image.new("RGB", (64, 64)).save(path)
    with pytest.raises(ValueError, match="not an image that can be read"):
        tokenizer.read_picture(str(path), SimVQImageProcessor())


@pytest.fixture
def several(tmp_path) -> dict[str, str]:
    """Tokenizers with three quantizers, random weights."""
    torch.manual_seed(0)
    made = {"image": str(tmp_path / "image"), "audio": str(tmp_path / "audio")}
    SimVQImageModel(SimVQImageConfig(**IMAGE, num_quantizers=3)).save_pretrained(made["image"])
    SimVQImageProcessor(size_divisor=2).save_pretrained(made["image"])
    audio = SimVQAudioConfig(**AUDIO, num_quantizers=3)
    SimVQAudioModel(audio).save_pretrained(made["audio"])
    SimVQAudioFeatureExtractor(
        sampling_rate=audio.sampling_rate, hop_length=audio.hop_length
    ).save_pretrained(made["audio"])
    return made


@pytest.mark.slow
def test_a_slider_for_several_codes_a_position(app, several, waves, tmp_path):
    names, (image, audio) = [*several.values()], several.values()
    about, *_ = app.select(names, image)
    assert "3 codes for 2 × 2 pixels" in about and "first quantizer" in about
    picture = tmp_path / "picture.png"
    waves(12, 8).save(picture)
    *whole, text, original = app.reconstruct(names, image, str(picture), None, 3)
    rows = text.splitlines()
    assert len(rows) == 3 * 4 and "18" in whole[3] and "3 of 3 codes" in whole[3]
    assert "codes, 3 × 4 × 6" in whole[3]
    # The first codes of all are those that are decoded, whichever button it is.
    coarse = app.decode(names, image, text, original, 1)
    assert "6</b><span>bits at each position, 1 of 3 codes" in coarse[3]
    assert np.any(np.asarray(coarse[0]) != np.asarray(whole[0]))
    again = app.reconstruct(names, image, str(picture), None, 1)
    np.testing.assert_array_equal(np.asarray(again[0]), np.asarray(coarse[0]))
    model, _ = app.tokenizer.load(image)
    assert app.tokenizer.whole_size(model.config, original.codes) == (8, 12)
    with pytest.raises(Exception, match="multiple of 3 rows of codes, found 2"):
        app.decode(names, image, "\n".join(rows[:2]), None)
    assert len(app.decode_again(names, image, "", None, 2)) == 5

    sound = tmp_path / "sound.wav"
    soundfile.write(sound, np.sin(np.arange(2000) / 9) / 2, 24_000)
    *whole, text, original = app.reconstruct(names, audio, None, str(sound), 3)
    assert len(text.splitlines()) == 3 and original.codes.shape == (3, 250)
    coarse = app.decode(names, audio, text, original, 2)
    assert coarse[1][1].shape == (2000,) and "2 of 3 codes" in coarse[3]


def test_checkpoints_named_by_the_environment(app, monkeypatch):
    monkeypatch.setenv("SIMVQ_CHECKPOINTS", "a/b, some folder/c,")
    assert app.parse_arguments([]).checkpoints == ["a/b", "some folder/c"]
    assert app.parse_arguments(["d"]).checkpoints == ["d"]


def test_the_card_of_the_space():
    front = (SPACE / "README.md").read_text().split("---")[1]
    fields = dict(re.findall(r"^(\w+): *(.*)$", front, re.MULTILINE))
    assert fields["sdk"] == "gradio" and (SPACE / fields["app_file"]).is_file()
    assert fields["license"] == "mit" and len(fields["short_description"]) <= 60
