"""Every case of the original's image loss (fixture losses_image)."""

import functools
import json

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from tests.training.support.lpips_fixture import FIXTURES, narrow_lpips, value
from training.losses.image import ImageLoss, colours
from training.losses.patch_discriminator import PatchDiscriminator
from training.losses.perceptual import PerceptualDistance, load_lpips

FOLDER = FIXTURES / "losses_image"
CASES = json.loads((FOLDER / "cases.json").read_text())
SMALL = [n for n in CASES if n not in ("lr_schedule", "published_full_recipe")]


def part(state: dict, prefix: str) -> dict:
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}


@functools.cache
def small_perceptual() -> PerceptualDistance:
    """Frozen, so that all cases can share it."""
    state = part(load_file(FOLDER / "small_weights.safetensors"), "perceptual_loss.")
    return PerceptualDistance(
        narrow_lpips({k: v for k, v in state.items() if "scaling_layer" not in k})
    )


def build(name: str) -> tuple[ImageLoss, PatchDiscriminator, dict]:
    case = CASES[name]
    arguments = case["loss_args"]
    state = load_file(FOLDER / "small_weights.safetensors")
    discriminator = PatchDiscriminator(base_channels=arguments["disc_ndf"])
    discriminator.load_state_dict(part(state, "discriminator."))
    loss = ImageLoss(
        small_perceptual(),
        perceptual_weight=arguments.get("perceptual_weight", 1.0),
        commitment_weight=arguments["commit_weight"],
        adversarial_weight=arguments["gen_loss_weight"],
        adaptive_scale=arguments.get("disc_weight", 1.0),
        discriminator_start=arguments["disc_start"],
        lecam_weight=arguments.get("lecam_loss_weight", 0.0),
    )
    loss.train(case["train"])
    discriminator.train(case["train"])
    return loss, discriminator, case


def other_discriminator_loss(kind: str, discriminator, pixels, reconstruction):
    """What two cases use in place of the hinge; no published model did, so ImageLoss does not offer it."""
    real, fake = discriminator(pixels), discriminator(reconstruction.detach())
    hinge = 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())
    if kind == "vanilla":
        return 0.5 * (F.softplus(-real).mean() + F.softplus(fake).mean()) - hinge
    real, fake = real.mean(dim=(1, 2, 3)), fake.mean(dim=(1, 2, 3))
    return F.softplus(-real).mean() + F.softplus(fake).mean() - hinge


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
def test_case_equals_the_original(name):
    tensors = load_file(FOLDER / "tensors.safetensors")
    pixels, hidden = tensors["x"], tensors["h"]
    for index in range(len(CASES[name]["calls"])):
        # Each call of the fixture starts from the same weights; only LeCAM's means carry over.
        loss, discriminator, case = build(name)
        call = case["calls"][index]
        if index and call["lecam"]:
            previous = case["calls"][index - 1]["lecam"]
            loss.lecam_real.fill_(previous[0])
            loss.lecam_fake.fill_(previous[1])
        last_layer = tensors["last_weight"].clone().requires_grad_()
        reconstruction = F.conv2d(hidden, last_layer, padding=1) + 0.5 * pixels
        reconstruction.retain_grad()
        discriminator.requires_grad_(False)
        step = call["global_step"]
        commitment = torch.tensor(case["commit"])
        total, terms = loss.generator(
            pixels, reconstruction, commitment, discriminator, step, last_layer
        )
        total.backward()
        if case["train"] or case["loss_args"]["gen_loss_weight"] is not None:
            assert float(total.detach()) == pytest.approx(call["gen_total"], rel=1e-4)
        log = call["gen_log"]
        assert float(terms["reconstruction"]) == pytest.approx(log["t/reconstruct_loss"], rel=1e-4)
        if loss.perceptual_weight:
            expected = pytest.approx(log["t/perceptual_loss"], rel=1e-4)
            assert float(terms["perceptual"]) == expected
        # The original logs the weighted term in training, and the plain one in validation.
        factor = float(terms["adversarial_weight"]) if case["train"] else 1.0
        expected = pytest.approx(log["t/g_loss"], rel=1e-4)
        assert float(terms["adversarial"]) * factor == expected
        if "t/d_weight" in log:
            expected = pytest.approx(log["t/d_weight"], rel=1e-4)
            assert float(terms["adversarial_weight"]) == expected
        # The original computes an adaptive weight before it is used, and its gradients add up in this
        # probe; before the start the right one is that of the case with a fixed weight.
        early = name == "adaptive_start" and step == 50
        gradient = tensors[f"{'disc_start' if early else name}.step{step}.rec_grad"]
        assert (reconstruction.grad - gradient).norm() <= 1e-4 * gradient.norm()
        assert all(parameter.grad is None for parameter in discriminator.parameters())

        discriminator.requires_grad_(True)
        kind = case["loss_args"].get("disc_loss", "hinge")
        difference = torch.zeros(())
        if kind != "hinge":
            difference = other_discriminator_loss(kind, discriminator, pixels, reconstruction)
        total, terms = loss.discriminator(pixels, reconstruction, discriminator, step)
        total = total + difference
        total.backward()
        log = call["disc_log"]
        for ours, theirs in (("logits_real", "t/logits_real"), ("logits_fake", "t/logits_fake")):
            if log[theirs]:
                assert float(terms[ours]) == pytest.approx(log[theirs], rel=1e-4)
        assert float(terms["lecam"]) == pytest.approx(log["t/lecam_loss"], rel=1e-4)
        if call["lecam"]:
            means = [float(loss.lecam_real), float(loss.lecam_fake)]
            assert means == pytest.approx(call["lecam"], rel=1e-4)
        assert float(total.detach()) == pytest.approx(call["disc_total"], rel=1e-4, abs=1e-12)
        for parameter, norm in call["disc_grad_norms"].items():
            gradient = discriminator.get_parameter(parameter).grad
            assert float(gradient.norm()) == pytest.approx(norm, rel=1e-4, abs=1e-6), parameter


@pytest.mark.slow
def test_full_size_equals_the_original():
    """Published sizes: PatchGAN and VGG with weights that recipe.py derives from names, real LPIPS heads."""
    shapes = json.loads((FOLDER / "full_keys.json").read_text())
    state = {
        name: torch.from_numpy(value(name, tuple(shape)))
        for name, shape, dtype in shapes
        if dtype == "float32" and (name.startswith("discriminator.") or ".net." in name)
    }
    discriminator = PatchDiscriminator()
    assert sum(p.numel() for p in discriminator.parameters()) == 2_765_633
    names = {name for name, _, _ in shapes if name.startswith("discriminator.")}
    assert {f"discriminator.{n}" for n in discriminator.state_dict()} == names
    # Not strict: recipe.py has no values for batch norm's counters.
    discriminator.load_state_dict(part(state, "discriminator."), strict=False)
    perceptual = load_lpips("vgg")
    perceptual.network.net.load_state_dict(part(state, "perceptual_loss.net."))
    tensors = load_file(FOLDER / "tensors.safetensors")
    distances = perceptual(tensors["x"], tensors["rec"])
    expected = tensors["lpips_full_recipe_vgg_real_lin"]
    assert (distances - expected).norm() <= 1e-4 * expected.norm()

    call = CASES["published_full_recipe"]["calls"][0]
    reconstruction = tensors["rec"].clone().requires_grad_()
    loss = ImageLoss(perceptual)
    total, _ = loss.generator(
        tensors["x"], reconstruction, torch.tensor(0.37), discriminator.requires_grad_(False), 0
    )
    total.backward()
    assert float(total.detach()) == pytest.approx(call["gen_total"], rel=1e-4)
    assert float(reconstruction.grad.norm()) == pytest.approx(call["rec_grad_norm"], rel=1e-4)
    discriminator.requires_grad_(True)
    total, _ = loss.discriminator(tensors["x"], reconstruction, discriminator, 0)
    total.backward()
    assert float(total.detach()) == pytest.approx(call["disc_total"], rel=1e-4)
    for name, norm in call["disc_grad_norms"].items():
        gradient = discriminator.get_parameter(name).grad
        assert float(gradient.norm()) == pytest.approx(norm, rel=1e-4, abs=1e-6), name


def test_adaptive_weight_needs_the_last_layer():
    loss = ImageLoss(None, adversarial_weight=None)
    pixels = torch.zeros(1, 3, 32, 32, requires_grad=True)
    with pytest.raises(ValueError, match="last_layer"):
        loss.generator(
            pixels, pixels * 0.5, torch.zeros(()), PatchDiscriminator(base_channels=8), 0
        )


@pytest.mark.parametrize("size", [0.005, 1.0, 1000.0])
def test_fp16_adapts_the_adversarial_weight_as_float32_does(size):
    """Pixel gradients as of many more pixels, which fp16 loses, and sums over pixels that overflow it."""
    random = torch.Generator().manual_seed(0)
    hidden, pixels = (torch.randn(2, n, 96, 96, generator=random) for n in (4, 3))
    start = torch.randn(3, 4, 3, 3, generator=random) * 0.1
    loss = ImageLoss(None, adversarial_weight=None, reconstruction_weight=size)

    def judge(reconstruction):
        return size * reconstruction.float().mean(dim=1, keepdim=True)

    weights = []
    for half in (False, True):
        last_layer = start.clone().requires_grad_()
        with torch.autocast("cpu", torch.float16, enabled=half):
            reconstruction = F.conv2d(hidden, last_layer, padding=1)
            _, terms = loss.generator(pixels, reconstruction, torch.zeros(()), judge, 0, last_layer)
        weights.append(float(terms["adversarial_weight"]))
    assert weights[1] == pytest.approx(weights[0], rel=0.02), weights


def test_lecam_means_are_saved_and_only_move_in_training():
    loss = ImageLoss(None, lecam_weight=0.1)
    discriminator = PatchDiscriminator(base_channels=8)
    pictures = torch.rand(2, 2, 3, 32, 32)
    loss.eval().discriminator(*pictures, discriminator, 0)
    assert loss.lecam_real == 0
    loss.train().discriminator(*pictures, discriminator, 0)
    assert loss.lecam_real != 0
    copy = ImageLoss(None, lecam_weight=0.1)
    copy.load_state_dict(loss.state_dict())
    assert copy.lecam_real == loss.lecam_real and copy.lecam_fake == loss.lecam_fake


def test_fixture_is_whole():
    assert len(SMALL) == 9


@pytest.mark.slow
def test_state_holds_the_running_means_only_and_misses_none():
    loss = ImageLoss(small_perceptual(), lecam_weight=0.1)
    assert set(loss.state_dict()) == {"lecam_real", "lecam_fake"}
    loss.load_state_dict({"lecam_real": torch.tensor(0.5), "lecam_fake": torch.tensor(-0.5)})
    assert loss.lecam_real == 0.5 and loss.lecam_fake == -0.5
    with pytest.raises(RuntimeError, match="lecam_fake"):
        loss.load_state_dict({"lecam_real": torch.tensor(0.5)})


def test_discriminator_starts_as_the_original_does():
    torch.manual_seed(0)
    main = PatchDiscriminator().requires_grad_(False).main
    assert float(main[5].weight.std()) == pytest.approx(0.02, rel=0.05)
    assert float(main[6].weight.mean()) == pytest.approx(1.0, abs=0.01)
    assert float(main[6].weight.std()) == pytest.approx(0.02, rel=0.3)
    assert not main[0].bias.any() and not main[6].bias.any() and not main[11].bias.any()


def test_the_colour_term_weighs_colours_and_leaves_grey_alone():
    image, grey = torch.rand(2, 3, 4, 4), torch.rand(2, 1, 4, 4).expand(-1, 3, -1, -1)
    assert colours(grey).abs().max() < 1e-6
    red = torch.tensor([1.0, 0.0, 0.0])[:, None, None].expand(1, 3, 2, 2)
    assert colours(red)[:, 0].eq(1).all() and colours(red)[:, 1].eq(-0.5).all()

    def total(weight: float, reconstruction: torch.Tensor) -> torch.Tensor:
        loss = ImageLoss(None, adversarial_weight=0.0, discriminator_start=1, colour_weight=weight)
        return loss.generator(image, reconstruction, torch.zeros(()), torch.nn.Identity(), 0)[0]

    brighter = image + 0.25
    torch.testing.assert_close(total(3.0, brighter), total(0.0, brighter))
    redder = image + 0.25 * red[..., :1, :1]
    torch.testing.assert_close(total(3.0, redder), total(0.0, redder) + 3 * 0.25 * 0.75)
