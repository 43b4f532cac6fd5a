"""Command info: what a tokenizer is, and what its codes cost."""

import argparse
import math

from .command_model import load_tokenizer


def add_to(commands) -> None:
    """Add the command to those of a command line."""
    parser = commands.add_parser(
        "info",
        help="what a tokenizer is",
        description="Print what a tokenizer is and what its codes cost.",
    )
    parser.add_argument("model", help="folder or Hub id of an image or audio tokenizer")
    parser.add_argument("--revision", help="branch, tag or commit of the model on the Hub")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Print it."""
    tokenizer = load_tokenizer(options.model, options.revision)
    config, model = tokenizer.model.config, tokenizer.model
    each, bits = math.log2(config.codebook_size), config.code_bits
    several = (
        ""
        if config.num_quantizers == 1
        else f", {config.num_quantizers} at each position, {config.quantizer_arrangement}"
    )
    lines = {
        "type": config.model_type,
        "quantizer": config.quantizer,
        "codes": f"{config.codebook_size:,} of {each:.3g} bits, in {config.quantizer_dim} dimensions{several}",
        "parameters": f"{sum(p.numel() for p in model.parameters()):,}",
        "weights": tokenizer.digest,
    }
    if hasattr(config, "sampling_rate"):
        rate = config.frame_rate
        lines |= {
            "sampling rate": f"{config.sampling_rate:,} Hz, {config.hop_length} samples a code",
            "bitrate": f"{rate:g} codes a second, {rate * bits / 1000:.3g} kbit/s",
            "streaming": "yes" if config.streaming else "no, it sees the whole clip",
        }
    else:
        factor = config.downsample_factor
        lines |= {
            "a code": f"{factor} x {factor} pixels, {bits / factor**2:.3g} bits a pixel",
            "256 x 256 pixels": f"{(256 // factor) ** 2:,} codes, {(256 // factor) ** 2 * bits / 8:,.0f} bytes",
        }
    for name, value in lines.items():
        print(f"{name + ':':<18}{value}")
    return 0
