"""The whole page of the Space in a browser, with checkpoints that bring their own code."""

import io
import math
import re
from pathlib import Path

import numpy as np
import pytest
import soundfile
from PIL import Image

from tests.hub_cards.artefacts import artefacts
from tests.hub_cards.space_page import chromium, running_space

REMOVE = re.compile("Remove|Clear")

pytest.importorskip("soxr", reason="the Space needs soxr")
from hub_cards.space import codes as codes_module  # noqa: E402
from hub_cards.space import tokenizer  # noqa: E402


@pytest.fixture
def page_address(checkpoints, tmp_path):
    """Address of the Space, over two checkpoints and one that is not there."""
    with running_space([*map(str, checkpoints.values()), str(tmp_path / "gone")], tmp_path) as url:
        yield url


@pytest.fixture
def browser():
    """Debian's Chromium, headless."""
    with chromium() as browser:
        yield browser


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


def test_the_page_in_a_browser(browser, page_address, checkpoints, tmp_path, waves):
    """A visitor's way: a picture, its codes changed, bad codes, damaged uploads, then a sound."""
    from playwright.sync_api import expect

    expect.set_options(timeout=20_000)
    kept = artefacts()
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

    # An image.
    picture = waves(95, 64)
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
    page.screenshot(path=kept / "space_picture.png", full_page=True)

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

    # What cannot be codes, and what is no image.
    field.fill("1 2\n3 999")
    decode.click()
    toast = page.get_by_test_id("toast-body")
    expect(toast).to_contain_text(
        "row 2, code 2: 999 is not a code; codes are integers from 0 to 63"
    )
    page.wait_for_timeout(500)  # it fades in
    page.screenshot(path=kept / "space_error.png")
    told("999 is not a code")
    field.fill("1 <b>2</b>")
    decode.click()
    told("<b>2</b> is not an integer")
    (tmp_path / "damaged.png").write_bytes(b"no image")
    upload("picture", tmp_path / "damaged.png")
    run.click()
    told("not an image that can be read")

    # A sound.
    def choose(name: str) -> None:
        page.get_by_label("Checkpoint").click()
        page.get_by_role("option", name=name).click()

    choose(str(checkpoints["sounds"]))
    expect(page.locator("#about")).to_contain_text("320 samples at 24,000 Hz, K = 64")
    expect(page.locator("#picture")).to_be_hidden()
    expect(field).to_have_value("")
    run.click()
    told("First give a recording")
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
    page.screenshot(path=kept / "space_sound.png", full_page=True)
    field.fill("0 1 2\n3")
    decode.click()
    expect(page.locator("#note")).to_contain_text("Decoded from the text field")
    assert figures_shown(page)["seconds"] == "0.05"
    (tmp_path / "damaged.wav").write_bytes(b"no sound")
    upload("sound", tmp_path / "damaged.wav")
    run.click()
    told("not an audio file that can be read")

    choose(str(tmp_path / "gone"))
    told("gone could not be loaded")
    expect(page.locator("#about")).to_contain_text("choose another one")
    expect(page.locator("#statistics .figures")).to_have_count(0)
    expect(page.locator("#sound")).to_be_hidden()
    outside = [u for u in requested if not u.startswith((page_address, "data:", "blob:"))]
    assert not outside
