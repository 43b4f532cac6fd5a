"""Gradio Space of SimVQ tokenizers: see what is left of an image or a recording, and its codes.

    python app.py PATH_OR_REPO [...] [--port N]

Checkpoints are folders or repositories of the Hub. Without arguments they are read from checkpoints.json beside
this file, a JSON list, unless the environment variable SIMVQ_CHECKPOINTS names some, separated by commas. Their
code is run when modeling_simvq is not installed: list only those you trust.
"""

import argparse
import html
import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from pathlib import Path

# Before gradio is imported: nobody is told about visits, and no run is kept in a visitor's browser.
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
os.environ.setdefault("GRADIO_RUN_HISTORY", "False")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

import gradio as gr
import microphone
import numpy as np
import tokenizer
import transformers
from codes import code_statistics, picture_of_codes, read_codes, write_codes
from microphone_tab import microphone_parts

CHECKPOINTS = Path(__file__).resolve().parent / "checkpoints.json"
STYLE = CHECKPOINTS.with_name("style.css")
HEIGHT = 380
RESULT = {
    "format": "png",
    "interactive": False,
    "height": HEIGHT,
    "buttons": ["download", "fullscreen"],
}

EXPLANATION = """
# SimVQ tokenizers

A tokenizer turns an image or a recording into a few integers, its **codes**, and back. SimVQ
([arXiv 2411.02038](https://arxiv.org/abs/2411.02038)) learns its codebook through one linear layer, so that all
codes stay in use. Give an image or a recording, compare what comes back, then change its codes and decode
again.
"""


@contextmanager
def errors_shown():
    """Show what is wrong with an input or a checkpoint on the page, not in the log."""
    try:
        yield
    except ValueError as error:
        # The page takes messages for HTML.
        raise gr.Error(html.escape(str(error)), print_exception=False) from error


def figures(config, encoded: tokenizer.Encoded) -> str:
    """HTML of the statistics of codes."""
    found = code_statistics(encoded.codes, config.codebook_size)
    rows, columns = encoded.codes.shape
    levels, grid = encoded.levels, "codes"
    if config.model_type == "simvq_image":
        height, width = encoded.size
        sides = [rows // levels, columns] if levels == 1 else [levels, rows // levels, columns]
        grid = f"codes, {' × '.join(map(str, sides))}"
        rate = (f"{found.bits / (height * width):.4f}", "bits per pixel")
        size = (f"{width} × {height}", "pixels")
    else:
        seconds = encoded.size[0] / config.sampling_rate
        rate = (f"{found.bits / seconds / 1000:.3f}", "kbit/s")
        size = (f"{seconds:.2f}", "seconds")
    shown = [
        size,
        (f"{found.tokens:,}", grid),
        (f"{found.distinct:,} of {found.codebook_size:,}", "distinct codes in this input"),
        (f"{found.perplexity:.1f}", "perplexity of these codes"),
        rate,
    ]
    if (most := tokenizer.quantizers(config)) > 1:
        bits = levels * math.log2(config.codebook_size)
        shown.append((f"{bits:g}", f"bits at each position, {levels} of {most} codes"))
    boxes = "".join(f"<div><b>{value}</b><span>{name}</span></div>" for value, name in shown)
    return f'<div class="figures">{boxes}</div>'


def select(names: list[str], name: str) -> tuple:
    """Describe a checkpoint and show the inputs that fit it; results of another one are cleared."""
    with errors_shown():
        _listed(names, name)
        config = tokenizer.load_config(name)
    image = config.model_type == "simvq_image"
    size, levels = f"K = {config.codebook_size:,} codes", tokenizer.quantizers(config)
    number = "one code" if levels == 1 else f"{levels} codes"
    if image:
        side = config.downsample_factor
        about = f"Images: {number} for {side} × {side} pixels, {size}."
    else:
        each = f"{config.hop_length} samples at {config.sampling_rate:,} Hz"
        about = f"Audio: {number} for {each}, {size}."
        about += " Each line of codes is one second." if levels == 1 else ""
    if levels > 1:
        about += " The rows are those of the first quantizer, then those of the second, and so on."
    streaming = not image and getattr(config, "streaming", False)
    return (
        about,
        *(gr.Column(visible=shown) for shown in (image, image, image, not image, not image)),
        gr.Slider(visible=levels > 1, maximum=max(levels, 2), value=levels),
        *(None, None, None, "", "", "", None),
        *_tabs(streaming),
    )


def _tabs(microphone_shown: bool) -> tuple:
    """Updates of tabs, microphone's tab, its sound and line: the upload is in front."""
    return gr.Tabs(selected="upload"), gr.Tab(visible=microphone_shown), None, ""


def nothing_chosen() -> tuple:
    """The page without inputs and results, where `select` failed."""
    about = "This checkpoint cannot be shown: choose another one."
    return (
        about,
        *(gr.Column(visible=False) for _ in range(5)),
        gr.Slider(visible=False),
        *(None, None, None, "", "", "", None),
        *_tabs(False),
    )


def reconstruct(
    names: list[str], name: str, picture: str | None, sound: str | None, count: int | None = None
) -> tuple:
    """Encode the upload and decode its codes, those of the first quantizers if there are several."""
    with errors_shown():
        _listed(names, name)
        config = tokenizer.load_config(name)
        image = config.model_type == "simvq_image"
        if (picture if image else sound) is None:
            raise ValueError(f"First give {'an image' if image else 'a recording'}.")
        model, processor = tokenizer.load(name)
        if image:
            read, note = tokenizer.read_picture(picture, processor)
            encoded = tokenizer.encode_picture(model, processor, read)
        else:
            read, note = tokenizer.read_sound(sound, config.sampling_rate)
            encoded = tokenizer.encode_sound(model, processor, read)
        text = write_codes(encoded.codes, _line(config))
        return *_results(name, encoded, count), note, text, encoded


def decode(
    names: list[str],
    name: str,
    text: str,
    original: tokenizer.Encoded | None,
    count: int | None = None,
) -> tuple:
    """Decode the codes in the text field, which need not be those of an upload."""
    with errors_shown():
        _listed(names, name)
        config = tokenizer.load_config(name)
        one_row = _line(config) is not None
        limits = tokenizer.largest_grid(config)
        codes = read_codes(text or "", config.codebook_size, *limits, one_row=one_row)
        if original is not None and original.codes.shape == codes.shape:
            changed = int(np.count_nonzero(original.codes != codes))
            encoded = tokenizer.Encoded(codes, original.size, original.levels)
            note = f"Decoded from the text field: {changed:,} of {codes.size:,} codes changed."
        else:
            size, levels = tokenizer.whole_size(config, codes), tokenizer.quantizers(config)
            encoded = tokenizer.Encoded(codes, size, levels)
            note = "Decoded from the text field."
        return *_results(name, encoded, count), note


def decode_again(names: list[str], name: str, text: str, *rest) -> tuple:
    """Decode as `decode`, for a slider that may be moved before there is anything."""
    return decode(names, name, text, *rest) if text else (gr.skip(),) * 5


def hear(recording: microphone.Recording | None, piece: str) -> None:
    """Take a piece of the microphone."""
    with errors_shown():
        if recording is None:
            raise ValueError("Start a recording first.")
        recording.add(piece)


def answer(names: list[str], name: str, recording: microphone.Recording | None) -> Iterator[tuple]:
    """Code and decode what the microphone hears, while it hears."""
    with errors_shown():
        _listed(names, name)
        if recording is None or not getattr(tokenizer.load_config(name), "streaming", False):
            raise ValueError("A microphone needs a streaming audio tokenizer, and a recording.")
        model, _ = tokenizer.load(name)
        yield from microphone.answers(model, recording)


def _results(name: str, encoded: tokenizer.Encoded, count: int | None) -> tuple:
    """Reconstructed image, reconstructed audio, image of the codes, figures: of the first `count` levels."""
    model, processor = tokenizer.load(name)
    encoded = encoded.first(max(1, min(int(count or encoded.levels), encoded.levels)))
    picture = sound = None
    if model.config.model_type == "simvq_image":
        picture = tokenizer.decode_picture(model, processor, encoded)
    else:
        sound = (model.config.sampling_rate, tokenizer.decode_sound(model, encoded))
    drawn = picture_of_codes(encoded.codes, _line(model.config))
    return picture, sound, drawn, figures(model.config, encoded)


def _line(config) -> int | None:
    """Codes that are shown in a line: those of one second of audio; None for whole rows."""
    one_row = config.model_type == "simvq_audio" and tokenizer.quantizers(config) == 1
    return max(1, round(config.frame_rate)) if one_row else None


def _listed(names: list[str], name: str) -> None:
    if name not in names:
        raise ValueError("Only the listed checkpoints can be chosen.")


def example_pictures() -> list[str]:
    """Photographs that come with scikit-image, if it is installed."""
    package = find_spec("skimage")
    if package is None:
        return []
    folder = Path(package.origin).parent / "data"
    photographs = [
        folder / name for name in ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg")
    ]
    return [str(path) for path in photographs if path.is_file()]


def build_page(names: list[str]) -> gr.Blocks:
    """The page over these checkpoints; visitors can choose no others."""
    with gr.Blocks(
        title="SimVQ tokenizers", analytics_enabled=False, delete_cache=(3600, 3600)
    ) as page:
        gr.Markdown(EXPLANATION)
        name = gr.Dropdown(names, value=names[0], label="Checkpoint", filterable=False)
        about = gr.Markdown(elem_id="about")
        with gr.Tabs() as tabs:
            with gr.Tab("Upload", id="upload"):
                with gr.Row():
                    with gr.Column() as picture_in:
                        picture = gr.Image(
                            label="Original image",
                            elem_id="picture",
                            type="filepath",
                            image_mode=None,
                            sources=["upload", "clipboard", "webcam"],
                            height=HEIGHT,
                        )
                    with gr.Column(visible=False) as sound_in:
                        sound = gr.Audio(
                            label="Original recording",
                            elem_id="sound",
                            type="filepath",
                            buttons=["download"],
                        )
                    with gr.Column() as picture_out:
                        made_picture = gr.Image(
                            label="Reconstruction", elem_id="made_picture", **RESULT
                        )
                    with gr.Column(visible=False) as sound_out:
                        made_sound = gr.Audio(
                            label="Reconstruction",
                            elem_id="made_sound",
                            interactive=False,
                            buttons=["download"],
                        )
                # The file itself: a damaged one is then named by read_picture, in words.
                picture.preprocess = lambda upload: upload.path if upload else None
                with gr.Column() as photographs:
                    if paths := example_pictures():
                        gr.Examples(paths, picture, label="Photographs to try")
                count = gr.Slider(
                    1, 2, step=1, label="Codes of a position to decode", visible=False
                )
                run = gr.Button("Encode and reconstruct", variant="primary")
                note = gr.Markdown(elem_id="note")
                statistics = gr.HTML(elem_id="statistics", padding=False)
                with gr.Row():
                    drawn = gr.Image(
                        label="Codes, a colour for each", elem_id="code_picture", **RESULT
                    )
                    with gr.Column():
                        text = gr.Textbox(
                            label="Codes (rows of integers; change them)",
                            lines=12,
                            max_lines=12,
                            elem_id="codes",
                        )
                        run_decode = gr.Button("Decode these codes")
                original = gr.State()
            with gr.Tab("Microphone", id="microphone", visible=False) as microphone_tab:
                heard, line = microphone_parts(hear, partial(answer, names), name)

        results = [made_picture, made_sound, drawn, statistics, note]
        # One at a time, whoever asks: a model fills the machine. Progress, and the mark of an error, cover the
        # reconstruction only.
        alone = {
            "concurrency_id": "model",
            "concurrency_limit": 1,
            "show_progress_on": [made_picture, made_sound],
        }
        parts = [picture_in, picture_out, photographs, sound_in, sound_out, count]
        shown = [about, *parts, *results, text, original, tabs, microphone_tab, heard, line]
        chosen = gr.on(
            [page.load, name.change],
            partial(select, names),
            name,
            shown,
            api_name="select",
            **alone,
        )
        # Figures of the checkpoint before must not stand under the name of one that does not load.
        chosen.failure(nothing_chosen, None, shown, api_visibility="private")
        run.click(
            partial(reconstruct, names),
            [name, picture, sound, count],
            [*results, text, original],
            api_name="reconstruct",
            **alone,
        )
        given = [name, text, original, count]
        run_decode.click(partial(decode, names), given, results, api_name="decode", **alone)
        again = partial(decode_again, names)
        count.release(again, given, results, api_visibility="private", **alone)
    return page


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Checkpoints and port of the command line. Ends the program with a message if there is no checkpoint."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0],
        epilog="\n\n".join(__doc__.split("\n\n")[2:]) + "\nexamples:\n"
        "  python app.py runs/mine/model                 a folder that training wrote\n"
        "  python app.py you/simvq-pictures you/simvq-speech --port 7861\n",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "checkpoints",
        nargs="*",
        metavar="PATH_OR_REPO",
        help="SimVQ tokenizers to choose from (default: SIMVQ_CHECKPOINTS, or else checkpoints.json)",
    )
    parser.add_argument(
        "--port", type=int, help="port of the page (default: the first free from 7860)"
    )
    options = parser.parse_args(arguments)
    if not options.checkpoints:
        named = os.environ.get("SIMVQ_CHECKPOINTS", "").split(",")
        options.checkpoints = [name for part in named if (name := part.strip())]
    if not options.checkpoints:
        try:
            options.checkpoints = json.loads(CHECKPOINTS.read_text())
        except FileNotFoundError:
            parser.error(f"name a checkpoint (a folder or a Hub id), or list some in {CHECKPOINTS}")
        except ValueError as error:
            parser.error(f"{CHECKPOINTS} is not JSON: {error}")
        names = options.checkpoints
        if not (isinstance(names, list) and names and all(isinstance(n, str) for n in names)):
            parser.error(f"{CHECKPOINTS} must be a list of Hub ids, not {json.dumps(names)[:80]}")
    return options


def main(arguments: list[str] | None = None) -> None:
    """Serve the page until interrupted."""
    options = parse_arguments(arguments)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    page = build_page(list(dict.fromkeys(options.checkpoints)))
    _, url, _ = page.launch(
        server_port=options.port,
        quiet=True,
        ssr_mode=False,
        prevent_thread_lock=True,
        max_file_size="100mb",
        footer_links=["gradio"],
        theme=gr.themes.Soft(
            font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
        ),
        css_paths=STYLE,
    )
    print(f"The page is at {url}", flush=True)
    page.block_thread()


if __name__ == "__main__":
    main()
