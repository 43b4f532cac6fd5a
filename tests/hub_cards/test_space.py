"""The Gradio Space: its functions, and the whole page in a browser with checkpoints that bring their code."""

import io
import json
import math
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile
from PIL import Image

from modeling_simvq import SimVQImageConfig, SimVQImageModel, SimVQImageProcessor

SPACE = Path(__file__).parents[2] / "hub_cards" / "space"
CHROMIUM_ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
REMOVE = re.compile("Remove|Clear")

pytest.importorskip("soxr", reason="the Space needs soxr")
from hub_cards.space import codes as codes_module  # noqa: E402
from hub_cards.space import tokenizer  # noqa: E402


@pytest.fixture(scope="module")
def checkpoints(converted, tmp_path_factory) -> dict[str, Path]:
    """K = 64, with their code: pictures, random weights, 2 x 2 pixels a code; sounds, 320 samples a code."""
    folder = tmp_path_factory.mktemp("checkpoints") / "pictures"
    made = {"pictures": folder, "sounds": converted["audio"]}
    image = SimVQImageConfig(
        base_channels=32,
        channel_multipliers=(1, 1),
        num_res_blocks=1,
        codebook_size=64,
        codebook_dim=8,
    )
    SimVQImageModel(image).save_pretrained(made["pictures"])
    SimVQImageProcessor(size_divisor=2).save_pretrained(made["pictures"])
    return made


@pytest.fixture
def app(monkeypatch):
    """The module app, imported as in the Space, where the folder is on the path."""
    pytest.importorskip("gradio", reason="gradio is not installed")
    monkeypatch.syspath_prepend(SPACE)
    import app

    yield app
    for name in ("app", "codes", "tokenizer"):
        sys.modules.pop(name)


def picture_of_size(width: int, height: int) -> Image.Image:
    y, x = np.mgrid[:height, :width]
    wave = np.stack([np.sin(x / 7), np.cos(y / 5), np.sin((x + y) / 9)], axis=-1)
    return Image.fromarray((wave * 100 + 128).astype(np.uint8))


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


def test_a_whole_picture_to_codes_and_back(checkpoints):
    model, processor = tokenizer.load(str(checkpoints["pictures"]))
    assert tokenizer.load(str(checkpoints["pictures"]))[0] is model and not model.training
    encoded = tokenizer.encode_picture(model, processor, picture_of_size(47, 32))
    assert encoded.codes.shape == (16, 24) and encoded.size == (32, 47)
    assert tokenizer.decode_picture(model, processor, encoded).size == (47, 32)
    assert tokenizer.whole_size(model.config, encoded.codes) == (32, 48)
    assert tokenizer.largest_grid(model.config) == (512, 512)
    with pytest.raises(ValueError, match="smaller than one token"):
        tokenizer.encode_picture(model, processor, picture_of_size(1, 9))


def test_pictures_as_uploaded(tmp_path):
    path = tmp_path / "picture.png"
    picture_of_size(2000, 500).save(path)
    picture, note = tokenizer.read_picture(path)
    assert picture.size == (1024, 256) and "from 2000 x 500 down to 1024 x 256" in note
    photograph = tmp_path / "photograph.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6  # lies on its side
    picture_of_size(60, 40).save(photograph, exif=exif)
    picture, note = tokenizer.read_picture(photograph)
    assert picture.size == (40, 60) and note == ""
    Image.fromarray(np.full((8, 8), 32768, np.uint16)).save(path)
    picture, _ = tokenizer.read_picture(path)
    assert picture.mode == "RGB" and np.asarray(picture)[0, 0].tolist() == [127, 127, 127]
    picture_of_size(64, 64).save(path)
    for content in (b"", b"no picture", path.read_bytes()[:300]):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="not a picture that can be read"):
            tokenizer.read_picture(path)


def test_enormous_pictures_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(tokenizer, "MOST_PIXELS", 99)
    picture_of_size(10, 10).save(tmp_path / "picture.png")
    with pytest.raises(ValueError, match="10 x 10 pixels, more than 99"):
        tokenizer.read_picture(tmp_path / "picture.png")


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
    with pytest.raises(ValueError, match="not a sound that can be read"):
        tokenizer.read_sound(path, 16_000)


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


def test_visitors_choose_among_the_listed_checkpoints_only(app):
    import gradio

    for call in (
        lambda: app.select(["a/b"], "c/d"),
        lambda: app.reconstruct(["a/b"], "c/d", None, None),
        lambda: app.decode(["a/b"], "c/d", "1", None),
    ):
        with pytest.raises(gradio.Error, match="Only the listed"):
            call()


def test_the_card_of_the_space():
    front = (SPACE / "README.md").read_text().split("---")[1]
    fields = dict(re.findall(r"^(\w+): *(.*)$", front, re.MULTILINE))
    assert fields["sdk"] == "gradio" and (SPACE / fields["app_file"]).is_file()
    assert fields["license"] == "mit" and len(fields["short_description"]) <= 60


@pytest.fixture
def page_address(checkpoints, tmp_path):
    """Address of the Space, running from a copy of its own files, with nothing of this repository to import."""
    pytest.importorskip("gradio", reason="gradio is not installed")
    copy = tmp_path / "space"
    shutil.copytree(SPACE, copy, ignore=shutil.ignore_patterns("__pycache__"))
    listed = [*map(str, checkpoints.values()), str(tmp_path / "gone")]
    (copy / "checkpoints.json").write_text(json.dumps(listed))
    blocked = tmp_path / "blocked"
    blocked.mkdir()
    for name in ("modeling_simvq", "hub_cards", "training"):
        (blocked / f"{name}.py").write_text("raise ImportError('blocked in this test')")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {
        "PYTHONPATH": str(blocked),
        "HF_HOME": str(tmp_path / "hf"),
        "HF_HUB_OFFLINE": "1",
        "GRADIO_TEMP_DIR": str(tmp_path / "gradio"),
    }
    log = tmp_path / "log.txt"
    command = [sys.executable, "app.py", "--port", str(port)]
    with log.open("w") as stream:
        server = subprocess.Popen(command, cwd=copy, env=environment, stdout=stream, stderr=stream)
    try:
        deadline = time.monotonic() + 120
        while "The page is at" not in log.read_text():
            assert server.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}/"
    finally:
        server.terminate()
        server.wait(20)
    # Bad input is told on the page: the log stays quiet.
    assert len(log.read_text().splitlines()) == 1, log.read_text()


@pytest.fixture
def browser():
    """Debian's Chromium, headless."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    program = shutil.which("chromium")
    if program is None:
        pytest.skip("there is no chromium")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=program, args=CHROMIUM_ARGUMENTS)
        yield browser
        browser.close()


def picture_shown(page, where: str) -> Image.Image:
    source = page.locator(f"#{where} img").get_attribute("src")
    return Image.open(io.BytesIO(page.request.get(source).body()))


def sound_shown(page) -> tuple[np.ndarray, int]:
    link = page.locator("#made_sound a[download]").get_attribute("href")
    return soundfile.read(io.BytesIO(page.request.get(link).body()), dtype="int16")


def figures_shown(page) -> dict[str, str]:
    boxes = page.locator("#statistics .figures div")
    pairs = [box.inner_text().splitlines() for box in boxes.all()]
    return {name: value for value, name in (filter(None, pair) for pair in pairs)}


def test_the_page_in_a_browser(browser, page_address, checkpoints, tmp_path):
    """A visitor's way: a picture, its codes changed, bad codes, damaged uploads, then a sound."""
    from playwright.sync_api import expect

    expect.set_options(timeout=20_000)
    artefacts = Path(os.environ.get("SIMVQ_ARTEFACTS") or tmp_path)
    artefacts.mkdir(parents=True, exist_ok=True)
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    requested = []
    page.on("request", lambda request: requested.append(request.url))
    page.goto(page_address)
    run = page.get_by_role("button", name="Encode and reconstruct")
    decode = page.get_by_role("button", name="Decode these codes")
    field = page.get_by_label("Codes (rows of integers; change them)")
    expect(page.locator("#about")).to_contain_text("2 × 2 pixels, K = 64")
    expect(page.locator("#sound")).to_be_hidden()

    def told(message: str) -> None:
        toast = page.get_by_test_id("toast-body").filter(has_text=message)
        expect(toast).to_be_visible()
        page.get_by_test_id("toast-close").last.click()
        expect(toast).to_have_count(0)

    def upload(where: str, path: Path) -> None:
        remove = page.locator(f"#{where}").get_by_role("button", name=REMOVE)
        if remove.count():
            remove.click()
        page.locator(f"#{where} input[type=file]").set_input_files(path)
        expect(remove).to_be_visible()

    # A picture.
    picture = picture_of_size(95, 64)
    picture.save(tmp_path / "picture.png")
    upload("picture", tmp_path / "picture.png")
    run.click()
    expect(page.locator("#made_picture img")).to_be_visible()
    model, processor = tokenizer.load(str(checkpoints["pictures"]))
    encoded = tokenizer.encode_picture(model, processor, picture)
    expected = tokenizer.decode_picture(model, processor, encoded)
    shown = picture_shown(page, "made_picture")
    assert shown.size == (95, 64)
    np.testing.assert_allclose(np.asarray(shown, int), np.asarray(expected, int), atol=1)
    expect(field).to_have_value(codes_module.write_codes(encoded.codes))
    found = figures_shown(page)
    distinct = len(np.unique(encoded.codes))
    assert found["bits per pixel"] == f"{math.log2(64) * 32 * 48 / (64 * 95):.4f}"
    assert found["codes, 32 × 48"] == "1,536" and found["pixels"] == "95 × 64"
    assert found["distinct codes in this input"] == f"{distinct} of 64"
    colour = picture_shown(page, "code_picture").convert("RGB").getpixel((0, 0))
    assert colour == tuple(codes_module.colours_of_codes(encoded.codes[0, 0]).tolist())
    page.screenshot(path=artefacts / "space_picture.png", full_page=True)

    # Its first row of codes changed.
    changed = encoded.codes.copy()
    changed[0] = (changed[0] + 1) % 64
    before = page.locator("#made_picture img").get_attribute("src")
    field.fill(codes_module.write_codes(changed))
    decode.click()
    expect(page.locator("#note")).to_contain_text("48 of 1,536 codes changed")
    expect(page.locator("#made_picture img")).not_to_have_attribute("src", before)
    again = picture_shown(page, "made_picture")
    assert np.abs(np.asarray(again, int) - np.asarray(shown, int)).max() > 1

    # What cannot be codes, and what is no picture.
    field.fill("1 2\n3 999")
    decode.click()
    toast = page.get_by_test_id("toast-body")
    expect(toast).to_contain_text(
        "row 2, code 2: 999 is not a code; codes are integers from 0 to 63"
    )
    page.wait_for_timeout(500)  # it fades in
    page.screenshot(path=artefacts / "space_error.png")
    told("999 is not a code")
    field.fill("1 <b>2</b>")
    decode.click()
    told("<b>2</b> is not an integer")
    (tmp_path / "damaged.png").write_bytes(b"no picture")
    upload("picture", tmp_path / "damaged.png")
    run.click()
    told("not a picture that can be read")

    # A sound.
    def choose(name: str) -> None:
        page.get_by_label("Checkpoint").click()
        page.get_by_role("option", name=name).click()

    choose(str(checkpoints["sounds"]))
    expect(page.locator("#about")).to_contain_text("320 samples at 24,000 Hz, K = 64")
    expect(page.locator("#picture")).to_be_hidden()
    expect(field).to_have_value("")
    run.click()
    told("First give a sound")
    seconds = np.arange(31 * 16_000) / 16_000
    voice = 0.3 * np.sin(2 * np.pi * (120 + 5 * seconds) * seconds) * np.sin(5 * seconds)
    soundfile.write(tmp_path / "sound.wav", np.stack([voice, voice / 2], axis=1), 16_000)
    upload("sound", tmp_path / "sound.wav")
    run.click()
    expect(page.locator("#note")).to_contain_text("cut from 31.0 to its first 30 seconds")
    assert figures_shown(page)["kbit/s"] == f"{6 * 2250 / 30 / 1000:.3f}"
    model, extractor = tokenizer.load(str(checkpoints["sounds"]))
    read, _ = tokenizer.read_sound(tmp_path / "sound.wav", 24_000)
    encoded = tokenizer.encode_sound(model, extractor, read)
    assert len(np.unique(encoded.codes)) > 1
    expect(field).to_have_value(codes_module.write_codes(encoded.codes, per_line=75))
    sound, rate = sound_shown(page)
    assert rate == 24_000 and sound.shape == (30 * 24_000,)
    expected = tokenizer.decode_sound(model, encoded)
    np.testing.assert_allclose(sound.astype(int), expected.astype(int), atol=2)
    page.screenshot(path=artefacts / "space_sound.png", full_page=True)
    field.fill("0 1 2\n3")
    decode.click()
    expect(page.locator("#note")).to_contain_text("Decoded from the text field")
    assert figures_shown(page)["seconds"] == "0.05"
    (tmp_path / "damaged.wav").write_bytes(b"no sound")
    upload("sound", tmp_path / "damaged.wav")
    run.click()
    told("not a sound that can be read")

    choose(str(tmp_path / "gone"))
    told("gone could not be loaded")
    outside = [u for u in requested if not u.startswith((page_address, "data:", "blob:"))]
    assert not outside
