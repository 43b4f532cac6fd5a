"""Faster ways on CUDA: set there and nowhere else, and the quantizer's products stay whole."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from modeling_simvq import SimVQ
from modeling_simvq.float32_product import whole_products
from modeling_simvq.nearest_code_cpu import _float32_rounding
from tests.support.pretended_gpu import CPU, CUDA, pretended_gpu
from tests.training.support.pretended_runs import trainer_of
from training.loop.optimizers import make_optimizer
from training.loop.settings import LoopSettings
from training.recipes.run import make_accelerator
from training.runtime import fast_math

MATMUL, CUDNN = torch.backends.cuda.matmul, torch.backends.cudnn
TF32 = {
    "matmul.allow_tf32": lambda: setattr(MATMUL, "allow_tf32", True),
    "set_float32_matmul_precision": lambda: torch.set_float32_matmul_precision("high"),
    "matmul.fp32_precision": lambda: setattr(MATMUL, "fp32_precision", "tf32"),
    "backends.fp32_precision": lambda: setattr(torch.backends, "fp32_precision", "tf32"),
}


def flags() -> tuple:
    return (MATMUL.fp32_precision, CUDNN.conv.fp32_precision, CUDNN.rnn.fp32_precision) + (
        CUDNN.benchmark,
        torch.backends.mkldnn.matmul.fp32_precision,
    )


@pytest.fixture(autouse=True)
def as_it_was():
    """Torch's flags are of the whole process."""
    yield
    torch.backends.fp32_precision = "none"
    torch.set_float32_matmul_precision("highest")
    MATMUL.fp32_precision = torch.backends.mkldnn.matmul.fp32_precision = "none"
    CUDNN.conv.fp32_precision = CUDNN.rnn.fp32_precision = "tf32"
    CUDNN.benchmark = False


def test_a_cpu_is_left_alone(tmp_path, one_process):
    before = flags()
    make_accelerator(LoopSettings(output_dir=str(tmp_path), tracker="none"))
    assert flags() == before
    images = torch.randn(2, 3, 8, 8)
    assert fast_math.laid_out(images) is images and fast_math.fuses(CPU) is None
    convolution = torch.nn.Conv2d(3, 4, 3)
    fast_math.lay_out(convolution, CPU)
    assert convolution.weight.is_contiguous()
    assert make_optimizer(convolution, LoopSettings()).defaults["fused"] is None


def test_an_accelerator_sets_the_flags_of_its_device(tmp_path, one_process, monkeypatch):
    devices = []
    monkeypatch.setattr(fast_math, "allow", devices.append)
    accelerator = make_accelerator(LoopSettings(output_dir=str(tmp_path), tracker="none"))
    assert devices == [accelerator.device]


def test_flags_on_cuda(monkeypatch):
    fast_math.allow(CUDA)
    assert flags()[:4] == ("tf32", "tf32", "tf32", True)
    assert torch.get_float32_matmul_precision() == "high"  # which torch.compile asks
    off = replace(fast_math.chosen, tf32=False, benchmark=False)
    monkeypatch.setattr(fast_math, "chosen", off)
    fast_math.allow(CUDA)
    assert flags()[:4] == ("ieee", "ieee", "ieee", False)


def test_no_measuring_where_the_same_bits_are_asked_for(monkeypatch):
    monkeypatch.setattr(CUDNN, "deterministic", True)
    fast_math.allow(CUDA)
    assert not CUDNN.benchmark


@pytest.mark.parametrize("way", TF32)
def test_codes_are_projected_whole(way, monkeypatch):
    seen, linear = [], F.linear

    def noting(*arguments):
        seen.append(MATMUL.fp32_precision)
        return linear(*arguments)

    with pretended_gpu():
        quantizer = SimVQ(32, 8).to("cuda").train()
        latents = torch.randn(2, 8, 4, 4, device="cuda")
        TF32[way]()
        monkeypatch.setattr(F, "linear", noting)
        quantizer(latents)
    assert seen and set(seen) == {"ieee"}
    assert MATMUL.fp32_precision == "tf32"


@pytest.mark.parametrize("way", TF32)
def test_the_search_without_kernels_knows_of_tf32(way):
    codes = torch.zeros(4, 16)
    exact = _float32_rounding(codes)
    TF32[way]()
    assert _float32_rounding(codes) >= exact + 2 * (2.0**-10 - 2.0**-24)
    with whole_products(CUDA):
        assert MATMUL.fp32_precision == "ieee"


@pytest.mark.parametrize("fast", (True, False))
def test_images_lie_channels_last_and_steps_are_fused(fast, tmp_path, monkeypatch):
    options = fast_math.FastMath(*[fast] * 4)
    monkeypatch.setattr(fast_math, "chosen", options)
    with pretended_gpu():
        trainer = trainer_of("image", tmp_path)
        batch = next(iter(trainer.batches))
        trainer._train_batch(batch)
        models = [*trainer.recipe.modules.values(), trainer.ema.module]
        kernels = [
            p for m in models for p in m.parameters() if p.ndim == 4 and 1 not in p.shape[1:]
        ]
        last = {p.is_contiguous(memory_format=torch.channels_last) for p in kernels}
        images = trainer.recipe.inputs(batch)
        assert kernels and last == {fast}
        assert images.is_contiguous(memory_format=torch.channels_last) is fast
        for optimizer in trainer.stepper.optimizers.values():
            assert {group["fused"] for group in optimizer.param_groups} == {fast or None}
            steps = {state["step"].device for state in optimizer.state.values()}
            assert steps == {CUDA if fast else CPU}


@pytest.mark.parametrize("there", (None, True))
def test_a_state_of_another_device_is_stepped_as_here(there):
    """Otherwise a run resumed on a CPU would step as CUDA does, or CUDA look for counts that lie on the CPU."""
    layer = torch.nn.Linear(3, 2)

    def stepped(fused: bool | None) -> torch.optim.AdamW:
        optimizer = make_optimizer(layer, LoopSettings(), fused)
        layer(torch.ones(1, 3)).sum().backward()
        optimizer.step()
        return optimizer

    here = None if there else True
    optimizer = make_optimizer(layer, LoopSettings(), here)
    optimizer.load_state_dict(stepped(there).state_dict())
    assert {group["fused"] for group in optimizer.param_groups} == {here}
    optimizer.step()
