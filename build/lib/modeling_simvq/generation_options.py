"""Options of generate_images and generate_audio: which of transformers' ``generate`` they pass on.

The others would change how many codes come, or what comes, behind the back of what puts the codes in order.
"""

import inspect
from collections.abc import Callable
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import GenerationConfig, GenerationMixin

from .configuration_checks import LARGEST_FLOAT32, refuse_unknown

PASSED_ON = frozenset(
    [
        "bad_words_ids",
        "begin_suppress_tokens",
        "cache_implementation",
        "compile_config",
        "disable_compile",
        "do_sample",
        "early_stopping",
        "epsilon_cutoff",
        "eta_cutoff",
        "length_penalty",
        "logits_processor",
        "min_p",
        "no_repeat_ngram_size",
        "num_beams",
        "num_return_sequences",
        "prefix_allowed_tokens_fn",
        "remove_invalid_values",
        "renormalize_logits",
        "repetition_penalty",
        "sequence_bias",
        "streamer",
        "suppress_tokens",
        "synced_gpus",
        "top_h",
        "typical_p",
        "use_cache",
    ]
)
_REASONS = {
    "it always makes {length} codes": (
        "eos_token_id exponential_decay_length_penalty forced_eos_token_id max_length max_new_tokens max_time "
        "min_length min_new_tokens stop_strings stopping_criteria"
    ),
    "it returns codes alone: call generate(...) for the rest": (
        "output_attentions output_hidden_states output_logits output_scores return_dict_in_generate"
    ),
    "it makes the input itself, from {source}": (
        "attention_mask input_ids inputs inputs_embeds negative_prompt_attention_mask negative_prompt_ids "
        "past_key_values position_ids"
    ),
    "pass its settings as arguments": "generation_config",
}
# A folder's generation_config.json must not end a sample early, or multiply it.
FIXED = {
    "eos_token_id": None,
    "forced_eos_token_id": None,
    "exponential_decay_length_penalty": None,
    "stop_strings": None,
    "max_time": None,
    "return_dict_in_generate": False,
}


def check_options(method: Callable, options: dict, length: str, source: str) -> None:
    """Refuse options of ``generate`` that do not go with fixed numbers of codes.

    Args:
        method: that got them, bound; its own arguments are known too.
        options: what it was given beside these.
        length, source: how many codes it makes, and from what, in words.

    Raises:
        ValueError: naming an option of ``generate`` that is not passed on, and why.
        TypeError: naming what is no option at all.
    """
    name, own = method.__name__, [*inspect.signature(method).parameters]
    known = {*inspect.signature(GenerationMixin.generate).parameters, *vars(GenerationConfig())}
    known |= {word for words in _REASONS.values() for word in words.split()}
    refuse_unknown(f"{name}()", options, [*own, *sorted(known | PASSED_ON)])
    for option in options:
        if option not in PASSED_ON:
            reasons = [reason for reason, words in _REASONS.items() if option in words.split()]
            reason = reasons[0].format(length=length, source=source) if reasons else ""
            raise ValueError(f"{name} does not take {option}" + (f": {reason}" if reason else ""))


def whole_number(name: str, value, low: int = 1) -> int:
    """Return an argument that is an integer of at least `low`; raise ValueError on another."""
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise ValueError(f"{name} must be a whole number of at least {low}, got {value!r}")
    return value


def number(name: str, value) -> float:
    """Return an argument that is a finite number of at least 0, as a float; raise ValueError on another."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"{name} must be a number, got {value!r}")
    if not 0 <= value < LARGEST_FLOAT32:
        raise ValueError(f"{name} must be finite and >= 0, got {value}")
    return float(value)


def sequences(options: dict, each: int, guided: bool) -> int:
    """Count the repetitions of each start before ``generate``, which with beams does the rest itself.

    Args:
        options: of ``generate``; they get num_beams and num_return_sequences.
        each: samples that are wanted of a start.
        guided: whether guidance is on.

    Raises:
        ValueError: if the options exclude each other.
    """
    beams = whole_number("num_beams", options.setdefault("num_beams", 1))
    returned = whole_number("num_return_sequences", options.setdefault("num_return_sequences", 1))
    if beams > 1:
        if guided:
            raise ValueError(
                f"guidance_scale does not go with num_beams = {beams}: sample, or set it to 1"
            )
        return each
    if returned > 1 and not options.get("do_sample", True):
        raise ValueError(
            f"num_return_sequences = {returned} with do_sample=False would be copies: sample, or use num_beams"
        )
    options["num_return_sequences"] = 1
    return each * returned


def check_forward(
    model: str, input_ids: Tensor | None, learnt: dict[str, Tensor | None], rest: dict
) -> None:
    """Refuse arguments of a generator's forward that would do nothing.

    Args:
        model: name of the class.
        input_ids: what ``generate`` passes; None in training.
        learnt: the arguments of training, by name.
        rest: further keyword arguments.

    Raises:
        TypeError: naming one that there is not, in training.
        ValueError: naming one of training beside input_ids.
    """
    if input_ids is None:
        given = [key for key, value in rest.items() if value is not None]
        refuse_unknown(model, given, [*learnt, "input_ids", "return_logits", "return_dict"])
        return
    for key, value in (learnt | {"labels": rest.get("labels")}).items():
        if value is not None:
            raise ValueError(
                f"{model} takes input_ids, or codes to learn from: {key} would do nothing beside input_ids"
            )


@contextmanager
def seeded(generator: torch.Generator | None, device: torch.device):
    """Seed torch's global generator, from which ``generate`` draws, from this one, for a while."""
    if generator is None:
        yield
        return
    if not isinstance(generator, torch.Generator):
        raise TypeError(f"generator must be one torch.Generator, or None, got {generator!r}")
    seed = torch.randint(2**63 - 1, (1,), generator=generator, device=generator.device)
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(int(seed))
        yield
