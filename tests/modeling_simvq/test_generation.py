"""The generators: loss, sampling, saving, errors. Tiny models."""

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModel, set_seed

from modeling_simvq import (
    SimVQAudioGenerationConfig,
    SimVQForAudioGeneration,
    SimVQForImageGeneration,
    SimVQImageGenerationConfig,
)

SIZES = {
    "codebook_size": 32,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
WAYS = [
    {"code_factors": None, "tie_word_embeddings": False},
    {"code_factors": None, "tie_word_embeddings": True},
    {"code_factors": (4, 8), "tie_word_embeddings": False},
    {"code_factors": (4, 8), "tie_word_embeddings": True},
]


def image_model(**settings) -> SimVQForImageGeneration:
    set_seed(0)
    settings = {"num_classes": 2, "grid_size": (3, 4)} | SIZES | settings
    return SimVQForImageGeneration(SimVQImageGenerationConfig(**settings)).eval()


def audio_model(**settings) -> SimVQForAudioGeneration:
    set_seed(0)
    config = SimVQAudioGenerationConfig(**({"max_codes": 30} | SIZES | settings))
    return SimVQForAudioGeneration(config).eval()


def codes_of(*shape: int) -> torch.Tensor:
    return torch.randint(0, 32, shape, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def trained():
    """Two classes: three of four codes are below 8 in the one, 8 to 15 in the other; a third without class."""
    model = image_model().train()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(100):
        labels = torch.randint(0, 2, (64,))
        upper = labels[:, None, None] ^ (torch.rand(64, 3, 4) < 0.25)
        codes = torch.randint(0, 8, (64, 3, 4)) + 8 * upper
        labels[torch.rand(64) < 0.3] = model.config.null_class
        optimizer.zero_grad()
        model(image_codes=codes, class_labels=labels).loss.backward()
        optimizer.step()
    return model.eval()


@pytest.mark.parametrize("way", WAYS)
def test_loss_sampling_and_saving(way, tmp_path):
    model = image_model(**way)
    codes, labels = codes_of(5, 3, 4), torch.tensor([0, 1, 2, 1, 0])
    output = model(image_codes=codes, class_labels=labels, return_logits=True)
    # The loss is that of the logits, which see the class and earlier codes alone.
    expected = F.cross_entropy(output.logits.flatten(0, 1), codes.flatten())
    torch.testing.assert_close(output.loss, expected)
    torch.testing.assert_close(output.logits.softmax(-1).sum(-1), torch.ones(5, 12))
    changed = codes.clone()
    changed[:, 1, 1:] = (changed[:, 1, 1:] + 1) % 32
    again = model(image_codes=changed.flatten(1), class_labels=labels, return_logits=True).logits
    torch.testing.assert_close(again[:, :6], output.logits[:, :6])
    assert not torch.allclose(again[:, 6:], output.logits[:, 6:])
    # Every parameter learns.
    output.loss.backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    # With and without the cache the same codes come, with guidance too.
    for scale in (1.0, 3.0):
        settings = {"class_labels": labels[:2], "guidance_scale": scale, "do_sample": False}
        made = model.generate_images(**settings)
        assert made.shape == (2, 3, 4) and made.dtype == torch.int64
        assert torch.equal(made, model.generate_images(**settings, use_cache=False))
    # safetensors, through AutoModel.
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").exists()
    loaded = AutoModel.from_pretrained(tmp_path)
    assert type(loaded) is SimVQForImageGeneration
    torch.testing.assert_close(loaded(image_codes=codes, class_labels=labels).loss, expected)
    for name, value in model.state_dict().items():
        assert torch.equal(value, loaded.state_dict()[name]), name


def test_no_labels_are_the_null_class():
    model, codes = image_model(), codes_of(2, 3, 4)
    null = torch.full((2,), model.config.null_class)
    losses = [model(image_codes=codes, class_labels=one).loss for one in (None, null)]
    assert losses[0] == losses[1]
    assert model.config.null_class == 2
    assert model(image_codes=codes.int()).loss == losses[0]


@pytest.mark.slow
def test_guidance_changes_samples(trained):
    def share(label: int, scale: float) -> float:
        """Of the first row's codes, how many are those of the class."""
        labels = torch.full((256,), label)
        generator = torch.Generator().manual_seed(0)
        codes = trained.generate_images(labels, guidance_scale=scale, generator=generator)
        return (codes[:, 0] // 8 == label).float().mean().item()

    for label in (0, 1):
        without, plain, strong = (share(label, scale) for scale in (0.0, 1.0, 5.0))
        assert 0.35 < without < 0.65  # of either class
        assert 0.65 < plain < 0.85  # as in the data
        assert strong > plain + 0.1  # more of its class than in the data


@pytest.mark.slow
def test_seeds_repeat_samples_and_leave_the_global_generator_alone(trained):
    def sample(generator=None, **how):
        return trained.generate_images(num_images=2, generator=generator, **how)

    first, second = torch.Generator().manual_seed(7), torch.Generator().manual_seed(7)
    state = torch.get_rng_state()
    one, two = sample(first), sample(second)
    assert torch.equal(one, two) and not torch.equal(sample(first), one)
    assert torch.equal(torch.get_rng_state(), state)
    set_seed(3)
    one = sample()
    set_seed(3)
    assert torch.equal(one, sample())
    greedy = sample(do_sample=False)
    assert torch.equal(sample(first, top_k=1), greedy)
    assert torch.equal(sample(first, temperature=1e-4), greedy)
    assert torch.equal(sample(first, top_p=1e-4), greedy)


def test_gradient_checkpointing_changes_no_gradient():
    model, codes = image_model().train(), codes_of(2, 3, 4)
    gradients = []
    for _ in range(2):
        model.zero_grad()
        model(image_codes=codes).loss.backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
        model.gradient_checkpointing_enable()
    torch.testing.assert_close(*gradients)


def test_only_codes_are_sampled():
    model = image_model(num_classes=50)
    codes = model.generate_images(num_images=64, temperature=100.0)
    assert codes.min() >= 0 and codes.max() < 32 and codes.unique().numel() == 32


def test_padding_of_clips_is_ignored():
    model, codes = audio_model(), codes_of(2, 1, 9)
    mask = torch.ones_like(codes)
    mask[1, :, 5:] = 0
    loss = model(audio_codes=codes, audio_codes_mask=mask).loss
    alone = [model(audio_codes=codes[:1]).loss, model(audio_codes=codes[1:, :, :5]).loss]
    torch.testing.assert_close(loss, (9 * alone[0] + 5 * alone[1]) / 14)
    codes[1, :, 5:] = 3
    assert model(audio_codes=codes, audio_codes_mask=mask).loss == loss


def test_prompts_of_unequal_length_go_on_as_they_do_alone():
    model, codes = audio_model(), codes_of(2, 1, 9)
    mask = torch.ones(2, 1, 9, dtype=torch.bool)
    mask[1, :, 5:] = False
    both = model.generate_audio(6, codes, mask, do_sample=False)
    assert both.audio_codes.shape == both.audio_codes_mask.shape == (2, 1, 15)
    assert both.audio_codes_mask[:, 0].sum(1).tolist() == [15, 11]
    for row, length in ((0, 9), (1, 5)):
        alone = model.generate_audio(6, codes[row : row + 1, :, :length], do_sample=False)
        assert alone.audio_codes_mask.all()
        assert torch.equal(alone.audio_codes[0], both.audio_codes[row, :, : length + 6])
        assert torch.equal(alone.audio_codes[0, :, :length], codes[row, :, :length])
    assert not both.audio_codes[1, :, 11:].any()
    assert model.generate_audio(30, num_clips=3).audio_codes.shape == (3, 1, 30)


def test_similar_codes_share_a_cell():
    centres = torch.randn(4, 6, generator=torch.Generator().manual_seed(0)) * 10
    cells = torch.arange(4).repeat(8)
    codebook = centres[cells] + torch.randn(32, 6, generator=torch.Generator().manual_seed(1)) / 10
    model = image_model(code_factors=(4, 8))
    model.arrange_codes(codebook)
    found = model.codes.rank // 8
    assert sorted(model.codes.rank.tolist()) == list(range(32))
    for cell in range(4):
        assert cells[found == cell].unique().numel() == 1
    codes = codes_of(2, 3, 4)
    output = model(image_codes=codes, return_logits=True)
    expected = F.cross_entropy(output.logits.flatten(0, 1), codes.flatten())
    torch.testing.assert_close(output.loss, expected)


@pytest.mark.parametrize("way", WAYS)
def test_codes_are_drawn_with_the_probabilities_of_the_logits(way):
    model = image_model(**way)
    model.arrange_codes(torch.randn(32, 6, generator=torch.Generator().manual_seed(0)))
    torch.manual_seed(1)
    for weights in model.codes.parameters():  # far from equal probabilities
        torch.nn.init.normal_(weights, std=0.5)
    hidden = torch.randn(1, 32)
    expected = model.codes.logits(hidden[None])[0, 0].softmax(-1)
    drawn = model.codes.draw(hidden.expand(20_000, -1), torch.Generator().manual_seed(2))
    found = drawn.bincount(minlength=32) / len(drawn)
    assert 0.5 * (found - expected).abs().sum() < 0.03


def test_class_names_are_kept(tmp_path):
    config = SimVQImageGenerationConfig(num_classes=2, id2label={0: "cat", 1: "dog"})
    config.save_pretrained(tmp_path)
    loaded = SimVQImageGenerationConfig.from_pretrained(tmp_path)
    assert loaded.id2label == {0: "cat", 1: "dog"} and loaded.label2id == {"cat": 0, "dog": 1}
    assert SimVQImageGenerationConfig(num_classes=0).null_class == 0


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"codebook_size": 0}, "codebook_size .* 0"),
        ({"num_classes": -1}, "num_classes .* -1"),
        ({"grid_size": 16}, "grid_size .* 16"),
        ({"grid_size": (4, 0)}, "grid_size .* 0"),
        ({"code_factors": (3, 8)}, "code_factors .*codebook_size = 32, got .3, 8"),
        ({"hidden_size": 30}, "hidden_size .* 30"),
        ({"num_key_value_heads": 3}, "num_key_value_heads .* 3"),
        ({"attention_dropout": 1.0}, "attention_dropout .* 1"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings .*'yes'"),
        ({"id2label": {0: "cat"}}, "id2label .* 1 names"),
        ({"id2label": {"cat": 0, "dog": 1}}, "id2label"),
    ],
)
def test_impossible_settings_are_named(settings, words):
    with pytest.raises(ValueError, match=words):
        SimVQImageGenerationConfig(**({"num_classes": 2} | SIZES | settings))


def test_misspelt_settings_are_refused():
    with pytest.raises(TypeError, match="grid_sise.*grid_size"):
        SimVQImageGenerationConfig(grid_sise=(4, 4))
    with pytest.raises(ValueError, match="max_codes .* 0"):
        SimVQAudioGenerationConfig(max_codes=0)


def test_impossible_inputs_are_named():
    model, audio = image_model(), audio_model()
    ones = torch.ones(2, 3, 4, dtype=torch.int64)
    clip = torch.ones(1, 1, 9, dtype=torch.int64)
    gap = torch.tensor([[[1, 0, 1, 1, 1, 1, 1, 1, 1]]])
    cases = [
        (lambda: model(), "image_codes"),
        (lambda: model(image_codes=ones[:, :2]), r"\(B, 3, 4\).*\(2, 2, 4\)"),
        (lambda: model(image_codes=ones * 32), "found 32"),
        (lambda: model(image_codes=-ones), "found -1"),
        (lambda: model(image_codes=ones.float()), "float32"),
        (lambda: model(image_codes=ones, class_labels=torch.tensor([0, 3])), "found 3"),
        (lambda: model(image_codes=ones, class_labels=torch.tensor([0])), r"\(2,\).*\(1,\)"),
        (lambda: model.generate_images(torch.ones(0).long()), r"class_labels .*\(0,\)"),
        (lambda: model.generate_images(temperature=0), "temperature .* 0"),
        (lambda: model.generate_images(top_k=-2), "top_k .* -2"),
        (lambda: model.generate_images(top_p=1.5), "top_p .* 1.5"),
        (lambda: model.generate_images(guidance_scale=float("nan")), "guidance_scale .* nan"),
        (lambda: model.generate_images(num_images=0), "num_images .* 0"),
        (lambda: audio(), "audio_codes"),
        (lambda: audio(audio_codes=clip[0]), r"\(B, 1, T\).*\(1, 9\)"),
        (lambda: audio(audio_codes=clip.repeat(1, 1, 4)), "36 codes.*max_codes = 30"),
        (lambda: audio(audio_codes=clip, audio_codes_mask=gap), "audio_codes_mask"),
        (lambda: audio.generate_audio(0), "num_codes .* 0"),
        (lambda: audio.generate_audio(22, clip), "num_codes = 22 .*max_codes = 30"),
        (lambda: audio.generate_audio(2, clip * 40), "found 40"),
        (lambda: image_model(code_factors=(4, 8)).arrange_codes(torch.ones(31, 2)), "32, d.*31"),
    ]
    for call, words in cases:
        with pytest.raises(ValueError, match=words):
            call()
