"""Microphone's tab of the page."""

import html
from collections.abc import Callable
from pathlib import Path

import gradio as gr
import microphone

SCRIPT = Path(__file__).with_name("microphone.js").read_text()
MOST_SPEAKERS = 4  # at once; more wait for their turn
EXPLANATION = f"""
Speak: codes are made while you do, and what they decode to plays a little later: the browser buffers it.
Wear headphones. At most {microphone.LONGEST_SECONDS} seconds.
"""
SILENT = "\n**Nothing plays here, because the server has no ffmpeg: codes are counted only.**"


def microphone_parts(
    hear: Callable, answer: Callable, name: gr.Dropdown
) -> tuple[gr.Audio, gr.Markdown]:
    """Add what the tab holds; return the sound that plays and the line about its codes.

    Args:
        hear: takes the visitor's Recording and its next piece.
        answer: generator of sounds and lines, of the checkpoint's name and the Recording.
        name: the checkpoint.
    """
    gr.Markdown(EXPLANATION if microphone.CAN_PLAY else EXPLANATION + SILENT)
    # A visitor's own: the components are everybody's.
    recording, piece = gr.State(), gr.Textbox(visible=False)
    timer = gr.Timer(microphone.EVERY_SECONDS, active=False)
    with gr.Row():
        start = gr.Button("Start speaking", variant="primary")
        stop = gr.Button("Stop", interactive=False)
    heard = gr.Audio(
        label="Decoded",
        elem_id="heard",
        streaming=True,
        autoplay=True,
        interactive=False,
        buttons=[],
    )
    line = gr.Markdown(elem_id="microphone_line")
    controls = [timer, start, stop]
    quiet = {"show_progress": "hidden", "api_visibility": "private"}
    began = start.click(
        _begin,
        piece,
        [recording, *controls],
        js=f"async () => {{ {SCRIPT}\n return [await window.microphone.start()]; }}",
        concurrency_limit=None,
        **quiet,
    )
    answered = began.success(
        answer, [name, recording], [heard, line], concurrency_limit=MOST_SPEAKERS, **quiet
    )
    # However it ended: the visitor's stop, the longest time, an error.
    answered.then(
        lambda: _controls(speaking=False),
        None,
        controls,
        js="() => { window.microphone.stop(); return []; }",
        queue=False,
        **quiet,
    )
    # One request at a time: what is spoken meanwhile waits in the page and goes with the next.
    timer.tick(
        hear,
        [recording, piece],
        None,
        js="(recording) => [recording, window.microphone.take(false)]",
        concurrency_limit=None,
        **quiet,
    )
    stop.click(
        hear,
        [recording, piece],
        None,
        js="(recording) => [recording, window.microphone.take(true)]",
        queue=False,
        **quiet,
    )
    return heard, line


def _begin(obstacle: str) -> tuple:
    """Make a visitor's recording, unless the browser told why there can be none."""
    if obstacle:
        raise gr.Error(
            f"The microphone cannot be used: {html.escape(obstacle)}", print_exception=False
        )
    return microphone.Recording(), *_controls(speaking=True)


def _controls(speaking: bool) -> tuple:
    """Updates of timer, start and stop."""
    return (
        gr.Timer(active=speaking),
        gr.Button(interactive=not speaking),
        gr.Button(interactive=speaking),
    )
