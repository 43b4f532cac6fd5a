"""Training through torch.compile, as a launch with --dynamo_backend asks for: the same run, the same names."""

import pytest
import torch
from safetensors.torch import load_file

from tests.training.support.tiny_recipe import Pictures
from training.loop.checkpoints import list_checkpoints
from training.recipes.run import make_accelerator
from training.recipes.tokenizer import TokenizerLoopSettings
from training.runtime.settings import SettingsError


@pytest.fixture
def compiled(monkeypatch):
    """Graphs as a compiler sees them, forward and backward, without the minutes of the compiler itself."""
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "AOT_EAGER")
    yield
    torch.compiler.reset()


def end_of(make_trainer, folder, **settings) -> dict[str, torch.Tensor]:
    """Weights after a run, as published, and the modules as Accelerate has them."""
    trainer = make_trainer(
        max_steps=3, autoencoder_steps=1, validate_every=3, output_dir=str(folder), **settings
    )
    trainer.train()
    return load_file(folder / "model" / "model.safetensors"), trainer


@pytest.mark.soak
@pytest.mark.slow
def test_a_compiled_run_is_the_same_run(make_trainer, compiled, monkeypatch, tmp_path):
    ours, trainer = end_of(make_trainer, tmp_path / "compiled")
    assert type(trainer.model).__name__ == "OptimizedModule"
    assert isinstance(trainer.recipe.model(Pictures(2).pixels).pixel_values, torch.Tensor)
    monkeypatch.delenv("ACCELERATE_DYNAMO_BACKEND")
    plain, _ = end_of(make_trainer, tmp_path / "plain")
    assert ours.keys() == plain.keys() and not any("_orig_mod" in name for name in ours)
    for name, values in plain.items():
        torch.testing.assert_close(ours[name], values, atol=1e-4, rtol=1e-3, msg=name)
    # Its checkpoint is one of any run.
    options = {"output_dir": str(tmp_path / "compiled"), "resume": "latest", "save_every": 1}
    make_trainer(max_steps=4, autoencoder_steps=1, **options).train()
    names = [path.name for path in list_checkpoints(tmp_path / "compiled")]
    assert names == ["step-00000003", "step-00000004"]


def test_sharded_training_compiles_nothing(monkeypatch, compiled, one_process, tmp_path):
    from training.recipes import run

    monkeypatch.setattr(run.sharding, "is_sharding", lambda accelerator: True)
    monkeypatch.setattr(run.sharding, "check_plugin", lambda accelerator: None)
    settings = TokenizerLoopSettings(output_dir=str(tmp_path), tracker="none")
    with pytest.raises(SettingsError, match="aot_eager .* sharded training compiles nothing"):
        make_accelerator(settings, may_shard=True)
