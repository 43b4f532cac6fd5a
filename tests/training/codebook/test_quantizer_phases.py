"""Trainings that begin without quantization, of every quantizer; two_ranks.py has them on two ranks."""

import pytest

from modeling_simvq.quantizer_names import QUANTIZERS
from tests.training.support.quantizer_phases import change


@pytest.mark.slow
@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_a_quantizer_rests_until_it_takes_part(quantizer, tmp_path, one_process):
    """And an infinite loss of it does not count until then: latents have no bounds in the first phase."""
    if quantizer not in ("simvq", "lc"):
        pytest.importorskip("vector_quantize_pytorch")
    moved = change(quantizer, tmp_path, spoil=True)
    assert moved["first"] == 0 and moved["bad_steps"] == 0
    assert (moved["second"] > 0) == (quantizer != "vq_ema")
