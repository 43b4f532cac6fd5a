"""A page to try SimVQ tokenizers: encode a picture or a sound, look at its codes, edit them, decode.

python app.py CHECKPOINT [CHECKPOINT ...]    folders, or names on the Hub
python app.py                                the checkpoints listed in checkpoints.json
"""

import argparse
import json
import os
from collections.abc import Callable
from functools import wraps
from pathlib import Path

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")

import gradio as gr
import tokens
from tokens import InputError, load

LISTED = Path(__file__).resolve().parent / "checkpoints.json"
INTRODUCTION = """
# SimVQ tokenizers

A picture or a sound becomes a grid or a line of integers, and the integers become a picture or a sound again. The
codebook is a frozen random basis behind one trained linear layer, so that no code is left to die
([arXiv 2411.02038](https://arxiv.org/abs/2411.02038)).
"""


def _said(function: Callable) -> Callable:
    """Mistakes of visitors as messages on the page."""

    @wraps(function)
    def guarded(*arguments):
        try:
            return function(*arguments)
        except InputError as error:
            raise gr.Error(str(error), duration=None, print_exception=False) from error

    return guarded


@_said
def show_inputs(checkpoint: str) -> tuple:
    """Show the half of the page that fits a checkpoint, and empty the codes of another one."""
    kind = load(checkpoint).kind
    return gr.Group(visible=kind == "picture"), gr.Group(visible=kind == "sound"), "", None, ""


@_said
def reconstruct_picture(checkpoint: str, picture) -> tuple:
    """Picture to reconstruction, codes, figures and size."""
    if picture is None:
        raise InputError("drop a picture first")
    tokenizer = load(checkpoint)
    before = picture.size
    codes, picture = tokens.encode_picture(tokenizer, picture)
    if max(before) > tokens.LONGEST_SIDE:
        gr.Info(
            f"scaled from {before[0]} x {before[1]} to {picture.width} x {picture.height} pixels"
        )
    figures = tokens.describe(
        codes, tokenizer.codebook_size, picture.width * picture.height, tokenizer.kind
    )
    decoded = tokens.decode_picture(tokenizer, codes, picture.size)
    return decoded, tokens.write_codes(codes), tokens.draw_codes(codes), figures, picture.size


@_said
def reconstruct_sound(checkpoint: str, sound) -> tuple:
    """Sound to reconstruction, codes and figures."""
    if sound is None:
        raise InputError("drop a recording first, or make one")
    tokenizer = load(checkpoint)
    rate, samples = sound
    codes, seconds = tokens.encode_sound(tokenizer, rate, samples)
    if len(samples) > rate * tokens.LONGEST_SECONDS:
        gr.Info(f"only the first {tokens.LONGEST_SECONDS} seconds were encoded")
    figures = tokens.describe(codes, tokenizer.codebook_size, seconds, tokenizer.kind)
    decoded = tokens.decode_sound(tokenizer, codes)
    return decoded, tokens.write_codes(codes), tokens.draw_codes(codes), figures


@_said
def decode_edited(checkpoint: str, text: str, size) -> tuple:
    """Edited codes to picture or sound; what is not of the checkpoint's kind stays as it is."""
    tokenizer = load(checkpoint)
    codes = tokens.read_codes(text, tokenizer.codebook_size, tokenizer.kind)
    drawn = tokens.draw_codes(codes)
    if tokenizer.kind == "sound":
        return gr.skip(), tokens.decode_sound(tokenizer, codes), drawn
    # Rows that were added or taken away leave nothing to crop.
    factor = tokenizer.model.config.downsample_factor
    whole = size and (-(-size[1] // factor), -(-size[0] // factor)) == codes.shape
    return tokens.decode_picture(tokenizer, codes, size if whole else None), gr.skip(), drawn


def build(checkpoints: list[str]) -> gr.Blocks:
    """The page."""
    kind = load(checkpoints[0]).kind
    with gr.Blocks(title="SimVQ tokenizers") as page:
        gr.Markdown(INTRODUCTION)
        checkpoint = gr.Dropdown(checkpoints, value=checkpoints[0], label="Checkpoint")
        size = gr.State(None)
        with gr.Group(visible=kind == "picture") as pictures:
            with gr.Row():
                picture = gr.Image(type="pil", label="Picture", height=384)
                decoded_picture = gr.Image(
                    type="pil", label="Reconstruction", height=384, format="png", interactive=False
                )
            encode_picture = gr.Button("Encode and decode the picture", variant="primary")
        with gr.Group(visible=kind == "sound") as sounds:
            with gr.Row():
                sound = gr.Audio(type="numpy", label="Sound")
                decoded_sound = gr.Audio(
                    type="numpy", label="Reconstructed sound", interactive=False
                )
            encode_sound = gr.Button("Encode and decode the sound", variant="primary")
        figures = gr.Markdown()
        with gr.Row():
            drawn = gr.Image(
                label="Codes, a colour each", height=384, format="png", interactive=False
            )
            with gr.Column():
                codes = gr.Textbox(
                    label="Codes",
                    lines=12,
                    max_lines=12,
                    info="Edit them, and decode what you made.",
                )
                decode = gr.Button("Decode these codes")
        checkpoint.change(show_inputs, checkpoint, [pictures, sounds, codes, drawn, figures])
        encode_picture.click(
            reconstruct_picture,
            [checkpoint, picture],
            [decoded_picture, codes, drawn, figures, size],
        )
        encode_sound.click(
            reconstruct_sound, [checkpoint, sound], [decoded_sound, codes, drawn, figures]
        )
        decode.click(
            decode_edited, [checkpoint, codes, size], [decoded_picture, decoded_sound, drawn]
        )
    return page


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoints", nargs="*", help="folders, or names on the Hub")
    parser.add_argument(
        "--port", type=int, help="port of the page (default: the first free from 7860)"
    )
    options = parser.parse_args()
    checkpoints = options.checkpoints or _listed(parser)
    try:
        page = build(checkpoints)
    except InputError as error:
        parser.exit(1, f"error: {error}\n")
    page.launch(server_port=options.port, max_file_size="50mb")


def _listed(parser: argparse.ArgumentParser) -> list[str]:
    try:
        listed = json.loads(LISTED.read_text())
    except (OSError, ValueError):
        listed = None
    if not isinstance(listed, list) or not listed or not all(isinstance(c, str) for c in listed):
        parser.error(f"name a checkpoint, or list some in {LISTED.name}")
    return listed


if __name__ == "__main__":
    main()
