"""The systems that SimVQ is compared with: trained, saved, loaded by name, equal to their package."""

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from transformers import AutoModel

from modeling_simvq import (
    SimVQAudioConfig,
    SimVQAudioModel,
    SimVQImageConfig,
    SimVQImageModel,
    index_backpropagation,
)
from modeling_simvq.nearest_code import nearest_code
from modeling_simvq.quantization_baselines import (
    FSQ_LEVELS,
    CodebookQuantizer,
    make_quantizer,
)
from modeling_simvq.quantizer_names import QUANTIZERS
from tests.support.programs import run

vector_quantize_pytorch = pytest.importorskip("vector_quantize_pytorch")

SIZES = {"fsq": 240}


def image_config(name: str, **changes) -> SimVQImageConfig:
    values = {
        "base_channels": 32,
        "channel_multipliers": [1, 1],
        "num_res_blocks": 1,
        "codebook_size": SIZES.get(name, 256),
        "codebook_dim": 12,
        "quantizer": name,
        "quantizer_options": {"basis_dim": 20} if name == "lc" else {},
    }
    return SimVQImageConfig(**values | changes)


def pictures() -> torch.Tensor:
    return torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(3)) * 2 - 1


@pytest.mark.parametrize("name", QUANTIZERS)
def test_trained_saved_and_loaded_by_name(name, tmp_path):
    torch.manual_seed(0)
    model = SimVQImageModel(image_config(name)).train()
    start = {key: value.clone() for key, value in model.quantizer.state_dict().items()}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(trained, 1e-3)
    losses = []
    for _ in range(4):
        output = model(pictures())
        loss = (output.pixel_values - pictures()).abs().mean() + output.commitment_loss
        optimizer.zero_grad()
        loss.backward()
        assert model.encoder.conv_out.weight.grad.norm() > 0
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    changed = [
        key for key, value in model.quantizer.state_dict().items() if not value.equal(start[key])
    ]
    assert changed, f"nothing in {name} was trained"
    model.eval().save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path).eval()
    assert loaded.config.quantizer == name
    with torch.no_grad():
        encoded = loaded.encode(pictures())
        assert encoded.image_codes.equal(model.encode(pictures()).image_codes)
        assert encoded.image_codes.dtype == torch.int64
        vectors = loaded.quantizer.lookup(encoded.image_codes)
        assert torch.allclose(vectors, encoded.quantized_latents, atol=1e-6)
        decoded = loaded.decode(image_codes=encoded.image_codes).pixel_values
        assert torch.allclose(decoded, model(pictures()).pixel_values, atol=1e-5)
    codebook = loaded.quantizer.codebook()
    assert codebook.shape == (loaded.config.codebook_size, 12)
    assert torch.allclose(codebook[encoded.image_codes[0, 0, 0]], vectors[0, :, 0, 0], atol=1e-6)


@pytest.mark.parametrize("name", QUANTIZERS)
@pytest.mark.parametrize("training", [False, True])
def test_the_codebook_is_the_caller_s(name, training):
    """Writing to it writes to no weight."""
    quantizer = make_quantizer(image_config(name)).train(training)
    before = {key: value.clone() for key, value in quantizer.state_dict().items()}
    first = quantizer.codebook().clone()
    quantizer.codebook().data.mul_(3)
    with torch.inference_mode():
        quantizer.codebook().zero_()
    assert all(value.equal(before[key]) for key, value in quantizer.state_dict().items())
    assert torch.equal(quantizer.codebook(), first)


@pytest.mark.parametrize("name", ["vq_ema", "fsq", "lfq"])
def test_the_audio_model_takes_them_too(name):
    config = SimVQAudioConfig(
        num_filters=4,
        downsampling_ratios=[4, 4],
        num_lstm_layers=0,
        codebook_size=SIZES.get(name, 64),
        codebook_dim=32,
        hidden_size=32,
        intermediate_size=32,
        num_decoder_layers=1,
        n_fft=64,
        quantizer=name,
    )
    model = SimVQAudioModel(config).train()
    waveform = torch.randn(2, 1, 800, generator=torch.Generator().manual_seed(0))
    output = model(waveform)
    (output.audio_values.abs().mean() + output.commitment_loss).backward()
    encoded = model.eval().encode(waveform)
    assert encoded.audio_codes.shape == (2, 1, 50)
    decoded = model.decode(audio_codes=encoded.audio_codes).audio_values
    assert torch.allclose(decoded, model(waveform).audio_values, atol=1e-5)


@pytest.mark.parametrize("name", ["vq", "vq_ema", "fc", "lfq", "fsq"])
def test_half_precision_keeps_the_quantizer_exact(name):
    quantizer = make_quantizer(image_config(name)).eval()
    latents = torch.randn(2, 12, 5, 7)
    codes = quantizer(latents)[1]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert quantizer(latents)[1].equal(codes)
    assert quantizer(latents.bfloat16())[0].dtype == torch.bfloat16


def test_the_nearest_of_the_table_is_chosen():
    torch.manual_seed(0)
    for name in ("vq", "vq_ema"):
        quantizer = make_quantizer(image_config(name)).eval()
        latents = torch.randn(1, 12, 6)
        quantized, codes, _ = quantizer(latents)
        theirs, indices, _ = quantizer.inner.eval()(latents.mT)
        assert codes.equal(indices) and torch.allclose(quantized.mT, theirs, atol=1e-6)


def test_unit_length_compares_directions():
    torch.manual_seed(0)
    quantizer = make_quantizer(image_config("fc")).eval()
    latents = torch.randn(1, 12, 50)
    cosine = (
        F.normalize(quantizer.inner.project_in(latents.mT[0]), dim=1)
        @ F.normalize(quantizer.inner.codebook, dim=1).T
    )
    assert quantizer(latents)[1][0].equal(cosine.argmax(dim=1))
    assert quantizer.inner.codebook.shape == (256, 8)


def test_running_means_are_those_of_the_package():
    torch.manual_seed(0)
    ours = CodebookQuantizer(16, 4, 0.25, decay=0.9).train()
    theirs = CodebookQuantizer(16, 4, 0.25, decay=0.9).inner.train()
    theirs.load_state_dict(ours.inner.state_dict())
    for _ in range(5):
        rows = torch.randn(64, 4)
        codes = nearest_code(rows, ours.inner.codebook)
        ours(rows)
        theirs.update_indices(rows[None], codes[None])
        assert torch.allclose(ours.inner.codebook, theirs.codebook, atol=1e-6)


def test_losses_of_the_paper():
    torch.manual_seed(0)
    rows = torch.randn(32, 12, requires_grad=True)
    for name, codebook_weight in (("vq", 1.0), ("vq_ema", 0.0)):
        quantizer = make_quantizer(image_config(name, commitment_cost=0.5)).train()
        q = F.embedding(
            nearest_code(rows.detach(), quantizer.inner.codebook), quantizer.inner.codebook
        )
        expected = (0.5 + codebook_weight) * F.mse_loss(rows, q)
        quantized, _, loss = quantizer(rows)
        assert torch.allclose(loss, expected) and torch.equal(quantized, q)
        # Straight through: the gradient at the codes is that at the latents.
        upstream = torch.randn_like(q)
        (gradient,) = torch.autograd.grad(quantized, rows, upstream)
        assert torch.equal(gradient, upstream)


@pytest.mark.parametrize("size", [2, 32, 256])
def test_entropies_over_bits_are_those_over_codes(size):
    """Loss, vectors, codes and gradients are the package's, which holds all latents x codes."""
    torch.manual_seed(0)
    quantizer = make_quantizer(image_config("lfq", codebook_size=size)).train()
    assert quantizer.factorises
    rows, found = 0.05 * torch.randn(64, 12), []
    for quantizer.factorises in (True, False):
        z = rows.clone().requires_grad_()
        quantizer.zero_grad()
        quantized, codes, loss = quantizer(z)
        (loss + quantized.square().mean()).backward()
        found.append(
            (quantized, codes.float(), loss, z.grad, quantizer.inner.project_in.weight.grad)
        )
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_an_option_of_the_package_goes_through_it():
    options = {"spherical": True}
    quantizer = make_quantizer(image_config("lfq", quantizer_options=options)).train()
    assert not quantizer.factorises and quantizer(torch.randn(2, 12))[2].isfinite()


def test_index_backpropagation_is_that_of_its_equations():
    """Through the matrix of latents x codes: loss and gradients (arXiv 2412.02692, equations 4 to 7)."""
    torch.manual_seed(0)
    quantizer = make_quantizer(image_config("ibq", commitment_cost=0.5)).train()
    rows, upstream = torch.randn(300, 12), torch.randn(300, 12)

    def gradients(quantized, loss, z):
        quantizer.zero_grad()
        ((quantized * upstream).mean() + loss).backward()
        return quantized.detach(), loss.detach(), z.grad, quantizer.table.grad.clone()

    z = rows.clone().requires_grad_()
    quantized, codes, loss = quantizer(z)
    ours = gradients(quantized, loss, z)
    z = rows.clone().requires_grad_()
    products = z @ quantizer.table.T
    assert codes.equal(products.argmax(dim=1))
    hard, soft = F.one_hot(codes, 256).float(), products.softmax(dim=1)
    q, chosen = hard @ quantizer.table, hard - soft.detach() + soft
    # The table as vectors is reached by the choice alone, as it is by index.
    out = chosen @ quantizer.table.detach() + q - q.detach()
    loss = F.mse_loss(out, z) + F.mse_loss(z, q.detach()) + 0.5 * F.mse_loss(q, z.detach())
    sharp = (products / 0.01).softmax(dim=1)
    each = -(sharp * (products / 0.01).log_softmax(dim=1)).sum(dim=1).mean()
    mean = sharp.mean(dim=0)
    loss = loss + 0.05 * (each + (mean * (mean + 1e-5).log()).sum())
    for found, expected in zip(ours, gradients(out, loss, z), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("length", [1.0, 100.0, 1e4])
def test_index_backpropagation_finds_the_largest_product_beside_a_very_long_code(
    length, monkeypatch
):
    """Its search makes all codes equally long: of the others' lengths float32 would keep nothing."""
    torch.manual_seed(0)
    quantizer = make_quantizer(image_config("ibq")).eval()
    monkeypatch.setattr(index_backpropagation, "EXPORTED_BLOCK", 100)
    with torch.no_grad():
        quantizer.table[17] *= length
    rows = torch.randn(4096, 12)
    products = rows.double() @ quantizer.table.double().T
    with torch.no_grad():
        assert quantizer(rows)[1].equal(products.argmax(dim=1))
        exported = quantizer._largest_exported(rows, quantizer.table)
        assert exported.equal((rows @ quantizer.table.T).argmax(dim=1))


def test_every_code_of_a_bridged_codebook_moves():
    torch.manual_seed(0)
    quantizer = make_quantizer(image_config("fvq", quantizer_options={"bridge_tokens": 32})).train()
    before = quantizer.codebook().clone()
    _, codes, loss = quantizer(torch.randn(8, 12))
    loss.backward()
    torch.optim.SGD(quantizer.parameters(), 1.0).step()
    moved = (quantizer.codebook() - before).abs().amax(dim=1)
    assert len(codes.unique()) <= 8 and moved.gt(0).all()


def test_the_error_of_diveq_keeps_its_length_and_carries_gradients():
    torch.manual_seed(0)
    quantizer = make_quantizer(image_config("diveq")).train()
    rows = torch.randn(64, 12, requires_grad=True)
    quantized, codes, loss = quantizer(rows)
    q = quantizer.codebook()[codes]
    assert loss == 0 and not torch.allclose(quantized, q)
    torch.testing.assert_close((quantized - rows).norm(dim=1), (q - rows).norm(dim=1))
    quantized.square().mean().backward()
    picked = quantizer.inner.codebook.shape[0]
    table = next(quantizer.parameters()).grad.view(picked, 12)
    assert rows.grad.norm() > 0 and table.norm(dim=1)[codes].gt(0).all()
    assert torch.equal(quantizer.eval()(rows.detach())[0], q)


def test_only_picked_codes_of_a_plain_codebook_move():
    torch.manual_seed(0)
    quantizer = make_quantizer(image_config("vq")).train()
    before = quantizer.codebook().clone()
    _, codes, loss = quantizer(torch.randn(8, 12))
    loss.backward()
    torch.optim.SGD(quantizer.parameters(), 0.1).step()
    moved = (quantizer.codebook() - before).abs().amax(dim=1) > 0
    assert set(moved.nonzero().flatten().tolist()) == set(codes.tolist())


@pytest.mark.parametrize("size, levels", FSQ_LEVELS.items())
def test_known_levels_multiply_to_the_size(size, levels):
    product = 1
    for level in levels:
        product *= level
    assert product == size


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"quantizer": "vqq"}, "quantizer must be one of"),
        ({"quantizer": "fsq", "codebook_size": 1024}, "codebook_size: fsq knows levels for"),
        ({"quantizer": "fsq", "quantizer_options": {"levels": [3, 5]}}, "not the product"),
        ({"quantizer": "lfq", "codebook_size": 100}, "power of two, got 100"),
        ({"quantizer": "vq", "quantizer_options": {"speed": 1}}, "quantizer_options of 'vq'"),
        ({"quantizer": "lfq", "quantizer_options": {"speed": 1}}, "quantizer_options of 'lfq'"),
        ({"quantizer": "fvq", "codebook_size": 1000}, "fvq joins 1000 codes to 512 tokens"),
        ({"quantizer": "fvq", "quantizer_options": {"bridge_tokens": 0}}, "bridge_tokens must be"),
        (
            {"quantizer": "fvq", "quantizer_options": {"bridge_dim": 30}},
            "multiple of bridge_heads = 4",
        ),
        ({"quantizer": "ibq", "quantizer_options": {"entropy_temperature": 0}}, "above 0, got 0"),
        (
            {"quantizer": "diveq", "quantizer_options": {"code_dim": 4}},
            "got code_dim=4 and decay=None",
        ),
        (
            {"quantizer": "diveq", "quantizer_options": {"decay": 0.9}},
            "code_dim=None and decay=0.9",
        ),
        ({"quantizer": "diveq", "quantizer_options": {"variance": -1}}, "at least 0, got -1"),
        *(
            ({"quantizer": name, "num_quantizers": 2}, f"num_quantizers = 2: {name} .* set it to 1")
            for name in ("diveq", "fc", "fsq", "lfq")
        ),
    ],
)
def test_impossible_choices_are_named(changes, words):
    with pytest.raises(ValueError, match=words):
        SimVQImageModel(image_config("vq", **changes))


def test_wrong_inputs_are_named():
    quantizer = make_quantizer(image_config("vq")).eval()
    with pytest.raises(ValueError, match="takes latents"):
        quantizer(torch.randn(2, 5, 3))
    with pytest.raises(ValueError, match="NaN or infinity"):
        quantizer(torch.full((1, 12, 2), float("nan")))
    with pytest.raises(ValueError, match="code 256 is out of range"):
        quantizer.lookup(torch.tensor([256]))
    with pytest.raises(ValueError, match="must be integers"):
        quantizer.lookup(torch.tensor([1.0]))


@pytest.mark.slow
def test_without_the_package_the_others_work_and_these_say_what_to_install():
    code = """
import sys
sys.modules["vector_quantize_pytorch"] = None
from modeling_simvq import SimVQImageConfig, SimVQImageModel
SimVQImageModel(SimVQImageConfig(base_channels=32, channel_multipliers=[1], codebook_size=8))
try:
    SimVQImageModel(SimVQImageConfig(base_channels=32, channel_multipliers=[1], quantizer="vq"))
except ImportError as error:
    print(error)
"""
    done = run("-c", code)
    assert done.returncode == 0, done.stderr
    assert "modeling-simvq[baselines]" in done.stdout


def test_features_become_the_basis(tmp_path):
    from training.recipes.image import ImageModelSettings
    from training.runtime.settings import SettingsError

    path = tmp_path / "features.safetensors"
    save_file({"features": torch.randn(300, 20) * 5 + 3}, path)
    sizes = {
        "base_channels": 32,
        "channel_multipliers": [1],
        "codebook_size": 256,
        "codebook_dim": 12,
    }
    settings = ImageModelSettings(quantizer="lc", codebook_features=str(path), **sizes)
    model = SimVQImageModel(settings.config())
    settings.start(model)
    basis = model.quantizer.basis
    assert basis.shape == (256, 20) and not basis.requires_grad
    assert float(basis.mean()) == pytest.approx(0, abs=1e-6)
    assert float(basis.detach().square().mean()) == pytest.approx(1 / 20, rel=1e-4)
    with pytest.raises(SettingsError, match="needs a file of features"):
        ImageModelSettings(quantizer="lc", **sizes)
    with pytest.raises(SettingsError, match="has no frozen basis"):
        ImageModelSettings(quantizer="vq", codebook_features=str(path), **sizes)
    with pytest.raises(SettingsError, match="holds 300 features"):
        ImageModelSettings(codebook_features=str(path), **sizes | {"codebook_size": 400})
    (tmp_path / "broken").write_bytes(b"\x80\x04broken")
    with pytest.raises(SettingsError, match="cannot read"):
        ImageModelSettings(codebook_features=str(tmp_path / "broken"), **sizes)
