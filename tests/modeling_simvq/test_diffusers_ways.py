"""What diffusers' own pipelines accept: components, device maps, generators, labels, kinds of output."""

import json

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from diffusers.utils import dynamic_modules_utils
from transformers import AutoImageProcessor, AutoModel
from transformers import dynamic_module_utils as transformers_modules

import modeling_simvq
from modeling_simvq import SimVQForImageGeneration, SimVQImageGenerationConfig


@pytest.fixture(scope="module")
def pipe(tiny_folder):
    tokenizer = AutoModel.from_pretrained(tiny_folder)
    torch.manual_seed(0)
    config = SimVQImageGenerationConfig(
        codebook_size=tokenizer.config.codebook_size,
        num_classes=3,
        grid_size=(3, 4),
        id2label={0: "tabby, tabby cat", 1: "crane", 2: "crane, machine"},
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
    )
    processor = AutoImageProcessor.from_pretrained(tiny_folder)
    pipe = modeling_simvq.SimVQImagePipeline(
        tokenizer, SimVQForImageGeneration(config).eval(), processor
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def folder(pipe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipeline") / "repository"
    pipe.save_pretrained(folder)
    return folder


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """Remote code is copied to a place of this test's own."""
    monkeypatch.setattr(dynamic_modules_utils, "HF_MODULES_CACHE", str(tmp_path))
    monkeypatch.setattr(transformers_modules, "HF_MODULES_CACHE", str(tmp_path))
    monkeypatch.syspath_prepend(str(tmp_path))


def sample(pipe, *classes, seed: int = 5, **how) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    how = {"output_type": "pt", "generator": torch.Generator().manual_seed(seed)} | how
    return pipe(list(classes) or [0, 1], guidance_scale=2.0, **how).images


def other_tokenizer(pipe):
    tokenizer = AutoModel.from_config(pipe.tokenizer.config).eval()
    tokenizer.load_state_dict(pipe.tokenizer.state_dict())
    return tokenizer


def remote(folder, **how):
    return DiffusionPipeline.from_pretrained(folder, trust_remote_code=True, **how)


@pytest.mark.slow
def test_components_of_ones_own(pipe, folder, cache, tmp_path):
    expected = sample(pipe)
    for load in (modeling_simvq.SimVQImagePipeline.from_pretrained, remote):
        for own in (
            {"tokenizer": other_tokenizer(pipe)},
            {"transformer": pipe.transformer, "processor": pipe.processor},
            dict(pipe.components),
        ):
            loaded = load(folder, **own)
            assert all(getattr(loaded, name) is part for name, part in own.items())
            torch.testing.assert_close(sample(loaded), expected)
        with pytest.raises(ValueError, match="tokenizer must be a model of type simvq_image"):
            load(folder, tokenizer=pipe.transformer)
    loaded.save_pretrained(tmp_path / "again")  # of both origins
    torch.testing.assert_close(sample(remote(tmp_path / "again")), expected)


@pytest.mark.slow
def test_device_maps_and_types(pipe, folder, cache):
    """Without a GPU diffusers' "balanced" leaves everything on the CPU."""
    expected = sample(pipe)
    for how in ({"device_map": "balanced"}, {"device_map": "cpu"}, {"dtype": torch.float32}):
        loaded = remote(folder, **how)
        assert {p.device.type for p in loaded.transformer.parameters()} == {"cpu"}
        torch.testing.assert_close(sample(loaded), expected)
    balanced = remote(folder, device_map="balanced", tokenizer=pipe.tokenizer)
    torch.testing.assert_close(sample(balanced), expected)
    for load in (modeling_simvq.SimVQImagePipeline.from_pretrained, remote):
        loaded = load(folder, dtype={"transformer": torch.bfloat16, "default": torch.float32})
        assert loaded.transformer.dtype == torch.bfloat16
        assert loaded.tokenizer.dtype == torch.float32
        assert sample(loaded).shape == expected.shape
    half = loaded.to(torch.bfloat16)
    assert sample(half).dtype == torch.bfloat16
    assert sample(half, output_type="np").dtype == np.float32


def test_what_decides_the_device_map(pipe, folder, cache, monkeypatch):
    """As if there were a GPU: diffusers makes models without memory to learn their sizes."""
    from diffusers.pipelines import pipeline_loading_utils

    monkeypatch.setattr(pipeline_loading_utils, "get_max_memory", lambda _: {"cpu": 1, 0: 10**9})
    seen = {}

    def assign(sizes, memory, device_mapping_strategy):
        seen.update(sizes)
        return {"cpu": list(sizes)}

    monkeypatch.setattr(pipeline_loading_utils, "_assign_components_to_devices", assign)
    monkeypatch.setattr(pipeline_loading_utils, "dispatch_model", lambda model, **_: model)
    remote(folder, device_map="balanced")
    for name in ("tokenizer", "transformer"):
        part = getattr(pipe, name)
        stored = sum(p.numel() * p.element_size() for p in part.parameters())
        assert 0.9 * stored < seen[name] < 1.1 * stored


def test_one_generator_for_each_image(pipe):
    """An image then does not depend on the others."""
    seeds = [3, 7, 3]
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    images = sample(pipe, 0, 1, 0, generator=generators)
    assert torch.equal(images[0], images[2])
    for image, label, seed in zip(images, [0, 1, 0], seeds, strict=True):
        torch.testing.assert_close(image[None], sample(pipe, label, seed=seed))
    for count in (2, 4):
        with pytest.raises(ValueError, match=f"{count} for 3 images"):
            sample(pipe, 0, 1, 0, generator=[torch.Generator() for _ in range(count)])
    with pytest.raises(TypeError, match="generator"):
        sample(pipe, 0, generator=["seed"])


@pytest.mark.slow
def test_labels_of_every_kind(pipe):
    expected = sample(pipe, 0, 1)
    for labels in (
        np.array([0, 1]),
        torch.tensor([0, 1]),
        torch.tensor([0, 1], dtype=torch.uint8),
        [np.int64(0), torch.tensor(1)],
        (0, "crane"),
        range(2),
        np.array(["tabby", "crane"]),
    ):
        generator = torch.Generator().manual_seed(5)
        images = pipe(labels, guidance_scale=2.0, generator=generator, output_type="pt").images
        assert torch.equal(images, expected)
    for single in (np.int64(1), np.array(1), torch.tensor(1), "crane", np.str_("Crane ")):
        assert len(pipe(single).images) == 1
    for bad, words in (
        (1.0, "whole number, got 1.0"),
        (np.float32(1), "whole number"),
        (torch.tensor([0.5]), "whole number, got 0.5"),
        (True, "True"),
        ([], "empty"),
        (torch.tensor([]), "empty"),
        (-1, "-1"),
        ({"a": 1}, "'a'"),
    ):
        with pytest.raises(ValueError, match=words):
            pipe(bad)


def test_names_that_there_are_not(pipe):
    assert pipe.class_label("crane") == 1 and pipe.class_label("machine") == 2
    with pytest.raises(ValueError, match="'tench': there are 'tabby, tabby cat', 'crane'"):
        pipe.class_label("tench")
    with pytest.raises(ValueError, match="'tabbi': did you mean 'tabby'.*'crane, machine'"):
        pipe.class_label("tabbi")
    config, names = pipe.transformer.config, modeling_simvq.class_names
    twice = type(config)(num_classes=3, id2label={0: "crane", 1: "crane", 2: "a, b"})
    with pytest.raises(ValueError, match="'Crane' is the name of classes 0, 1"):
        names.class_label(twice, "Crane")
    with pytest.raises(ValueError, match="no names here, give a number from 0 to 4"):
        names.class_label(type(config)(num_classes=5), "tench")
    with pytest.raises(ValueError, match="no classes"):
        names.class_label(type(config)(num_classes=0), "tench")
    many = type(config)(num_classes=100, id2label={i: f"kind {i}" for i in range(100)})
    with pytest.raises(ValueError, match=r"'kind 0', .*'kind 7' and 92 more \(0 to 99\)"):
        names.class_label(many, "tench")


def test_kinds_of_output(pipe):
    pt = sample(pipe)
    array = sample(pipe, output_type="np")
    assert array.shape == (2, *pt.shape[2:], 3) and array.min() >= 0 and array.max() <= 1
    pil = np.stack([np.asarray(image) for image in sample(pipe, output_type="pil")])
    assert np.abs(pil / 255 - array).max() < 0.51 / 255
    codes = sample(pipe, output_type="latent")
    assert codes.shape == (2, 3, 4) and codes.dtype == torch.int64
    with torch.no_grad():
        torch.testing.assert_close(pipe.tokenizer.decode(codes).pixel_values, pt)
    plain = pipe([0, 1], return_dict=False, output_type="latent")
    assert isinstance(plain, tuple) and plain[0].shape == (2, 3, 4)


def test_arguments_that_there_are_not(pipe, folder):
    for given, words in (
        ({"num_images_per_prompt": 2}, "'num_images_per_prompt'.*'num_images'"),
        ({"class_labels": [0]}, "'class_labels'.*'classes'"),
        ({"num_inference_steps": 5}, "'num_inference_steps'"),
        ({"callback_on_step_end": print}, "'callback_on_step_end'"),
    ):
        with pytest.raises(TypeError, match=words):
            pipe(**given)
    with pytest.raises(TypeError, match="offload_dir"):
        modeling_simvq.SimVQImagePipeline.from_pretrained(folder, offload_dir="x")
    with pytest.raises(TypeError, match="processor"):
        modeling_simvq.SimVQImagePipeline(pipe.tokenizer, pipe.transformer)


def test_an_incomplete_repository_is_refused(folder, cache, tmp_path):
    for path in folder.iterdir():
        (tmp_path / path.name).symlink_to(path)
    index = json.loads((folder / "model_index.json").read_text())
    del index["processor"]
    (tmp_path / "model_index.json").unlink()
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="processor"):
        remote(tmp_path)


def test_models_that_are_kept_elsewhere_until_they_are_used(pipe):
    """accelerate's hooks, which enable_model_cpu_offload makes, run before each part is used."""
    from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module

    seen = []

    class Hook(ModelHook):
        def pre_forward(self, module, *args, **kwargs):
            seen.append(type(module).__name__)
            return args, kwargs

    expected = sample(pipe)
    for part in (pipe.transformer, pipe.tokenizer):
        add_hook_to_module(part, Hook())
    try:
        assert torch.equal(sample(pipe), expected)
    finally:
        for part in (pipe.transformer, pipe.tokenizer):
            remove_hook_from_module(part)
    assert seen[0] == "SimVQForImageGeneration" and "SimVQImageModel" in seen
