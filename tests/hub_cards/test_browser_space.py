"""The static Space: assembled, published, and used in a browser beside the models that it was made from."""

import functools
import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image

from hub_cards import browser_runtime, browser_space
from hub_cards.card_samples import SPEECH
from hub_cards.space.codes import colours_of_codes
from modeling_simvq import SimVQImageConfig, SimVQImageModel, SimVQImageProcessor
from modeling_simvq.command_model import load_tokenizer
from modeling_simvq.exported_files import Compared, other_codes
from tests.hub_cards.space_page import chromium
from tests.hub_cards.static_page import Tab, served, visited
from tests.modeling_simvq.tiny import IMAGE

SHIPPED = Path(browser_space.__file__).parent / "checkpoints"
MODELS = {kind: str(SHIPPED / f"simvq-{kind}-small") for kind in browser_space.KINDS}


@pytest.fixture
def runtime(tmp_path) -> Path:
    """Folder that looks like dist/ of onnxruntime-web."""
    folder = tmp_path / "dist"
    folder.mkdir()
    for source, _ in browser_runtime.FILES.values():
        (folder / source).write_text(source)
    return folder


@pytest.fixture
def quick_export(monkeypatch):
    """Graphs that are none, at once."""

    def write(tokenizer, format, output, weights):
        output.mkdir()
        for name in ("encoder.onnx", "decoder.onnx"):
            (output / name).write_text(f"{tokenizer.name} {weights}")
        return {name: Compared(1.0) for name in ("encoder.onnx", "decoder.onnx")}

    monkeypatch.setattr(browser_space, "export", write)


def test_the_files_of_a_space(runtime, quick_export, tmp_path, monkeypatch):
    files = browser_space.assemble(tmp_path / "new" / "space", MODELS, runtime)
    page = {path.name for path in browser_space.PAGE.iterdir()}
    graphs = {f"{kind}/{part}.onnx" for kind in MODELS for part in ("encoder", "decoder")}
    examples = {"image/example.jpg", "speech/example.flac"}
    assert set(files) == page | graphs | examples | {
        "runtime/ort.js",
        "runtime/ort.wasm",
        "models.json",
    }
    about = json.loads(files["models.json"].read_text())
    assert about["runtime"] == {
        "path": "runtime/ort.wasm",
        "bytes": files["runtime/ort.wasm"].stat().st_size,
    }
    assert about["image"]["downsample_factor"] == 8 and about["image"]["codebook_size"] == 8192
    assert about["speech"]["sampling_rate"] == 16_000 and about["speech"]["hop_length"] == 200
    assert about["speech"]["encoder"]["bytes"] == files["speech/encoder.onnx"].stat().st_size
    # Nothing tells where the models lay.
    assert about["image"]["name"] == "simvq-image-small"
    assert str(SHIPPED) not in files["models.json"].read_text()


def test_a_space_of_one_kind(runtime, quick_export, tmp_path):
    files = browser_space.assemble(tmp_path / "space", {"speech": MODELS["speech"]}, runtime)
    assert not any(name.startswith("image/") for name in files)
    assert "image" not in json.loads(files["models.json"].read_text())


@pytest.mark.parametrize(
    ("models", "told"),
    [
        ({}, "name a tokenizer"),
        ({"image": MODELS["speech"]}, "--image .*: this is a tokenizer of type simvq_audio"),
        ({"speech": MODELS["image"]}, "--speech .*: this is a tokenizer of type simvq_image"),
        ({"image": "gone/away"}, "gone/away"),
    ],
)
def test_what_is_no_tokenizer_leaves_nothing_behind(
    hub, models, told, runtime, quick_export, tmp_path
):
    with pytest.raises(ValueError, match=told):
        browser_space.assemble(tmp_path / "here" / "space", models, runtime)
    assert not (tmp_path / "here").exists() or not any((tmp_path / "here").iterdir())


def test_a_folder_with_files_is_not_touched(runtime, quick_export, tmp_path):
    (tmp_path / "space").mkdir()
    (tmp_path / "space" / "mine").write_text("")
    with pytest.raises(ValueError, match="is there already and not an empty folder"):
        browser_space.assemble(tmp_path / "space", MODELS, runtime)


def test_no_runtime_says_what_to_do(monkeypatch, tmp_path):
    with pytest.raises(browser_runtime.RuntimeMissing, match="holds no ort.wasm.bundle.min.mjs"):
        browser_runtime.copy_runtime(tmp_path / "a", tmp_path)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(browser_runtime.RuntimeMissing, match="install Node.js, or give --runtime"):
        browser_runtime.copy_runtime(tmp_path / "b")


def test_published_as_a_static_space(hub, runtime, quick_export, tmp_path, capsys):
    arguments = ["--image", MODELS["image"], "--runtime", str(runtime), "--push", "org/demo"]
    for folder in ("one", "two"):
        browser_space.main([str(tmp_path / folder), *arguments])
    assert f"published: {hub.url}/spaces/org/demo" in capsys.readouterr().out
    space = hub.repository("org/demo", "space")
    # The empty one, and the first push.
    assert space.sdk == "static" and len(space.commits) == 2
    graph = hub.files("org/demo", repo_type="space")["image/encoder.onnx"]
    assert graph == f"{MODELS['image']} float16".encode()


@pytest.fixture
def browser():
    """Chromium with a microphone that beeps."""
    with chromium("--use-fake-device-for-media-stream") as browser:
        yield browser


@pytest.mark.slow
def test_tabs(browser, runtime, quick_export, tmp_path):
    """By mouse and keyboard; with a runtime that is none, which is told in words."""
    browser_space.assemble(tmp_path / "space", MODELS, runtime)
    with served(tmp_path / "space", {}) as address:
        page = browser.new_page()
        page.goto(address)
        image, speech = (Tab(page, kind) for kind in MODELS)
        buttons = [page.get_by_role("tab", name=name) for name in ("Image", "Speech")]
        buttons[0].wait_for()
        assert image.root.is_visible() and not speech.root.is_visible()
        buttons[1].click()
        assert speech.root.is_visible() and not image.root.is_visible()
        buttons[1].press("ArrowRight")
        assert image.root.is_visible() and buttons[0].get_attribute("aria-selected") == "true"
        image.root.get_by_role("button", name="Try an example").click()
        image.wait()
        assert image.told() == "This browser cannot run the tokenizer."
        page.route("**/models.json", lambda route: route.fulfill(status=404))
        page.reload()
        page.get_by_text("The list of models could not be loaded (404).").wait_for()


@pytest.mark.slow
def test_images_in_a_browser(browser, tmp_path):
    """A visitor's way: a photograph, its codes saved, changed and loaded, and what cannot be read."""
    with visited(browser, tmp_path, "image", MODELS["image"], isolated=True) as tab:
        use_images(tab, tmp_path)


@pytest.mark.soak
@pytest.mark.slow
def test_several_codes_a_position_in_a_browser(browser, tmp_path):
    torch.manual_seed(0)
    model = SimVQImageModel(SimVQImageConfig(**IMAGE, num_quantizers=3)).eval()
    folder = tmp_path / "three_quantizers"
    model.save_pretrained(folder)
    SimVQImageProcessor().save_pretrained(folder)
    photo = np.random.default_rng(0).integers(0, 256, (32, 48, 3), dtype=np.uint8)
    Image.fromarray(photo).save(tmp_path / "photo.png")
    with visited(browser, tmp_path, "image", str(folder), isolated=True) as tab:
        assert "3 codes, each of" in tab.root.locator(".about").inner_text()
        tab.give("file", tmp_path / "photo.png")
        assert not tab.told()
        shown, drawn = tab.picture("made"), tab.picture("drawn")
        file = json.loads(tab.saved("codes", tmp_path / "codes.json").read_text())
        codes = torch.tensor(file["codes"])
        pixels = torch.tensor(photo).permute(2, 0, 1)[None] / 127.5 - 1
        count, wrong = other_codes(model, pixels, codes[None])
        assert codes.shape[0] == 3 and count == codes[0].numel() and wrong == 0  # positions
        np.testing.assert_array_equal(drawn, colours_of_codes(codes.flatten(0, 1).numpy()))
        tab.give("codes", tmp_path / "codes.json")
        np.testing.assert_array_equal(tab.picture("made"), shown)
        for change, told in (
            (file["codes"][:2], "codes; this tokenizer has 3 codes a position"),
            (file["codes"][0], "codes; this tokenizer has 3 codes a position"),
            ([*file["codes"][:2], file["codes"][2][1:]], "rows differ in length"),
        ):
            (tmp_path / "bad.json").write_text(json.dumps(file | {"codes": change}))
            tab.give("codes", tmp_path / "bad.json")
            assert told in tab.told()


@pytest.mark.soak
@pytest.mark.slow
def test_speech_in_a_browser(browser, tmp_path):
    """A visitor's way: a recording, its codes saved and loaded, what cannot be read, and the microphone."""
    with visited(browser, tmp_path, "speech", MODELS["speech"], isolated=False) as tab:
        use_speech(tab, tmp_path)


def use_images(tab: Tab, folder: Path) -> None:
    from skimage import data

    model = load_tokenizer(MODELS["image"]).model
    photo = data.astronaut()[:195, 100:361]  # the page crops it to whole codes
    Image.fromarray(photo).save(folder / "photo.png")
    tab.give("file", folder / "photo.png")
    assert not tab.told()
    original, shown = tab.picture("original"), tab.picture("made")
    np.testing.assert_array_equal(original, photo[1:193, 2:258])

    # The same codes, and the same image, as the model's.
    file = json.loads(tab.saved("codes", folder / "codes.json").read_text())
    codes = torch.tensor(file["codes"])[None]
    pixels = torch.tensor(original).permute(2, 0, 1)[None] / 127.5 - 1
    assert other_codes(model, pixels, codes) == (24 * 32, 0)
    with torch.no_grad():
        decoded = model.decode(codes).pixel_values[0].permute(1, 2, 0)
        own = model(pixels).pixel_values[0].permute(1, 2, 0)
    decoded, own = (((x + 1) * 127.5).round().clamp(0, 255).numpy() for x in (decoded, own))
    np.testing.assert_allclose(shown.astype(float), decoded, atol=1)
    figures = tab.figures()
    psnr = 10 * np.log10(255**2 / np.square(own - original).mean())
    assert abs(float(figures["PSNR"].removesuffix(" dB")) - psnr) < 0.1
    assert figures["pixels"] == "256 × 192" and figures["codes, 32 × 24"] == "768"
    assert figures["of codes"] == "1.25 kB" and figures["bits per pixel"] == "0.203"
    saved = Image.open(tab.saved("made", folder / "made.png")).convert("RGB")
    np.testing.assert_array_equal(np.asarray(saved), shown)

    colours = colours_of_codes(codes[0].numpy())
    np.testing.assert_array_equal(tab.picture("drawn"), colours)
    assert tab.root.locator(".note").inner_text() == "Cropped from 261 × 195 pixels."

    # From the codes alone, some of them changed.
    file["codes"][0] = [0] * 32
    (folder / "changed.json").write_text(json.dumps(file))
    tab.give("codes", folder / "changed.json")
    assert (
        not tab.told() and tab.root.locator(".original").is_hidden() and "PSNR" not in tab.figures()
    )
    assert np.abs(tab.picture("made")[:8].astype(int) - shown[:8]).max() > 10
    tab.give("codes", folder / "codes.json")
    np.testing.assert_array_equal(tab.picture("made"), shown)

    # What cannot be read.
    dropped = (
        "const d = new DataTransfer(); d.items.add(new File(['no image'], 'text.png')); return d"
    )
    dropped = tab.page.evaluate_handle(f"() => {{ {dropped} }}")
    tab.root.dispatch_event("drop", {"dataTransfer": dropped})
    tab.wait()
    assert tab.told() == "text.png is not an image that this browser can read."
    Image.new("RGB", (1000, 10)).save(folder / "narrow.png")
    tab.give("file", folder / "narrow.png")
    assert "too small or too narrow: it has 512 × 5 pixels" in tab.told()
    for change, told in (
        ({"codes": [[8192, 0], [0, 0]]}, "8192 is not a code; codes are integers from 0 to 8191"),
        ({"codes": [[0, 1], [2]]}, "rows differ in length"),
        ({"codes": [[0, 1]]}, "holds 1 × 2 codes; from 2 to 256"),
        ({"codes": functools.reduce(lambda inner, _: [inner], range(500))}, "holds 1 × 1 × 1 × 1"),
        ({"codes": [0, 1]}, "holds 2 codes; this tokenizer has one code a position"),
        ({"digest": "0"}, "was made by another tokenizer"),
        ({"format": "x"}, "is not a file of codes"),
    ):
        (folder / "bad.json").write_text(json.dumps(file | change))
        tab.give("codes", folder / "bad.json")
        assert told in tab.told()
    tab.root.get_by_label("Long side").select_option("256")
    tab.wait()
    tab.root.get_by_role("button", name="Try an example").click()
    tab.wait()
    assert not tab.told() and tab.figures()["pixels"] == "256 × 256"


def use_speech(tab: Tab, folder: Path) -> None:
    import soxr

    model = load_tokenizer(MODELS["speech"]).model
    samples, rate = soundfile.read(SPEECH)
    soundfile.write(folder / "speech.wav", soxr.resample(samples, rate, 16_000), 16_000)
    samples, _ = soundfile.read(folder / "speech.wav", dtype="float32")

    # A download that breaks is told, and tried again with the next file.
    tab.page.route("**/speech/encoder.onnx", lambda route: route.fulfill(status=503))
    (folder / "text.wav").write_text("no sound")
    tab.give("file", folder / "speech.wav")
    assert tab.told() == "speech/encoder.onnx could not be loaded (503)."
    tab.page.unroute("**/speech/encoder.onnx")
    tab.give("file", folder / "text.wav")
    assert tab.told() == "text.wav is not a recording that this browser can read."
    tab.give("file", folder / "speech.wav")
    assert not tab.told()

    # The same codes as the model's, and what it makes of them.
    file = json.loads(tab.saved("codes", folder / "speech.json").read_text())
    codes = torch.tensor(file["codes"])[None, None]
    frames = -(-len(samples) // 200)
    padded = np.pad(samples, (0, frames * 200 - len(samples)))
    assert other_codes(model, torch.from_numpy(padded)[None, None], codes) == (frames, 0)
    made, rate = soundfile.read(tab.saved("made", folder / "made.wav"))
    with torch.no_grad():
        decoded = model.decode(codes).audio_values[0, 0, : len(samples)].numpy()
    assert rate == 16_000 and made.shape == samples.shape and np.sqrt(np.square(made).mean()) > 0.01
    np.testing.assert_allclose(made, decoded, atol=1e-3)
    figures = tab.figures()
    assert figures["long"] == f"{len(samples) / 16_000:.2f} s" and figures["codes"] == str(frames)
    assert figures["kbit/s"] == "0.96"
    tab.give("codes", folder / "speech.json")
    assert not tab.told() and tab.root.locator(".hear-original").is_hidden()
    again, _ = soundfile.read(tab.saved("made", folder / "again.wav"))
    np.testing.assert_array_equal(again, made)

    # Shorter than the graphs take, of another rate, in stereo.
    soundfile.write(folder / "short.flac", np.full((441, 2), 0.1), 44_100)
    tab.give("file", folder / "short.flac")
    assert not tab.told() and tab.figures()["long"] == "0.01 s" and tab.figures()["codes"] == "7"

    # The microphone, first without leave.
    record = tab.root.locator(".record")
    record.click()
    tab.wait()
    assert "may not use the microphone" in tab.told()
    tab.page.context.grant_permissions(["microphone"])
    record.click()
    tab.page.wait_for_timeout(1200)
    assert record.inner_text() == "Stop" and "Recording" in tab.root.locator(".status").inner_text()
    record.click()
    tab.wait()
    assert not tab.told() and float(tab.figures()["long"].removesuffix(" s")) > 0.5
