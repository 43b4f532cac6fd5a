"""The three recipes on a GPU that is not there: one device, the right types, and no wait that is not known."""

import pytest
import torch

from tests.support.pretended_gpu import CUDA, pretended_gpu, search, waits_of
from tests.training.support.pretended_runs import RECIPES, trainer_of

# Waits of a training step by function. `_apply` asks once whether the gradients of all modules are finite,
# because a step with others must not be taken. In `_learn` transformers looks for packed sequences.
STEP = {
    "image": {"training/loop/steps.py:_apply": 1},
    "audio": {"training/loop/steps.py:_apply": 1},
    "image, all terms": {"training/loop/steps.py:_apply": 1},
    # Whether the mask is right, and how many codes it leaves.
    "audio generator": {
        "training/loop/steps.py:_apply": 1,
        "modeling_simvq/clip_lengths.py:clip_lengths": 1,
        "modeling_simvq/code_model.py:_learn": 2,
    },
    "generator": {
        "training/loop/steps.py:_apply": 1,
        "modeling_simvq/code_model.py:_learn": 1,
    },
}
# Waits of a validation of two batches. The generator's samples 16 codes of each image, one after another.
VALIDATION = {
    "image": 34,
    "audio": 37,
    "generator": 56,
    "image, all terms": 34,
    "audio generator": 42,
}
REPORT = 5


@pytest.fixture
def gpu():
    with pretended_gpu() as gpu:
        yield gpu


# The audio recipe's steps take seconds here, and bf16 has all that float32 has.
@pytest.mark.parametrize(
    ("recipe", "precision"), [(r, "bf16") for r in RECIPES] + [("image", "no"), ("generator", "no")]
)
def test_a_step_waits_for_nothing_new(recipe, precision, gpu, tmp_path):
    trainer = trainer_of(recipe, tmp_path, mixed_precision=precision)
    batches = iter(trainer.batches)
    trainer._train_batch(next(batches))  # makes the optimisers' states
    batch, uploads = next(batches), gpu.uploads.copy()
    assert waits_of(gpu, lambda: trainer._train_batch(batch)) == STEP[recipe]
    assert gpu.uploads == uploads
    assert trainer.progress.step == 2 and not trainer.progress.bad_steps
    for module, optimizer in zip(
        trainer.modules.values(), trainer.stepper.optimizers.values(), strict=True
    ):
        assert {p.device for p in module.parameters()} == {CUDA}
        moments = [state["exp_avg"] for state in optimizer.state.values()]
        assert moments and {m.device for m in moments} == {CUDA}
        assert {p.dtype for p in [*module.parameters(), *moments]} == {torch.float32}
    assert {p.device for p in trainer.ema.module.parameters()} == {CUDA}
    trainer.reports.start()
    assert sum(waits_of(gpu, trainer._log).values()) <= REPORT


@pytest.mark.parametrize("recipe", RECIPES)
def test_validation_and_samples_wait_for_nothing_new(recipe, gpu, tmp_path):
    trainer = trainer_of(recipe, tmp_path)
    model, found = trainer.ema.eval().module, []

    def validate() -> None:
        found.append(trainer.recipe.validate(model, trainer.validation_loader, trainer.accelerator))

    waited = waits_of(gpu, validate)
    assert sum(waited.values()) <= VALIDATION[recipe], waited
    (result,) = found
    assert result.figures and (result.pictures or result.sounds)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ("image", "generator"))
def test_a_whole_run(recipe, gpu, tmp_path):
    """With an autoencoder's phase, accumulated batches, a checkpoint, a validation and the final model."""
    options = {"max_steps": 3, "gradient_accumulation_steps": 2}
    if recipe != "generator":
        options |= {"autoencoder_steps": 1, "codes_from_latents": True}
    trainer_of(recipe, tmp_path, **options).train()
    assert (tmp_path / "model").is_dir() and list(tmp_path.glob("checkpoint*"))
    resumed = trainer_of(recipe, tmp_path, **options | {"max_steps": 4, "resume": "latest"})
    resumed.train()
    assert resumed.progress.step == 4 and not resumed.progress.bad_steps


def wrong(place: torch.device) -> dict:
    """Return what a card refuses, by name: a tensor there beside one that is elsewhere."""
    x = torch.randn(3, 4, device="cuda")
    return {
        "sum": lambda: x + torch.ones(3, 4, device=place),
        "product": lambda: x @ torch.ones(4, 2, device=place),
        "stack": lambda: torch.stack([x.sum(), torch.zeros((), device=place)]),
        "search": lambda: search.nearest_code(x, torch.ones(5, 4, device=place)),
        "draw": lambda: torch.multinomial(
            x.softmax(dim=1), 1, generator=torch.Generator() if place.type == "cpu" else None
        ),
        "numpy": lambda: x.to(place).sum() + float(x.numpy().sum()) if place.type == "cpu" else 0,
    }


@pytest.mark.parametrize("case", ("sum", "product", "stack", "search", "draw", "numpy"))
def test_two_devices_are_refused(case, gpu):
    wrong(CUDA)[case]()
    with pytest.raises((RuntimeError, TypeError)):
        wrong(torch.device("cpu"))[case]()


WAITS = {
    "item": lambda x: x.sum().item(),
    "bool": lambda x: bool((x > 0).all()),
    "float": lambda x: float(x[0, 0]),
    "tolist": lambda x: x.tolist(),
    "nonzero": lambda x: x.nonzero(),
    "mask": lambda x: x[x > 0],
    "cpu": lambda x: x.cpu(),
    "to": lambda x: x.to("cpu"),
    "copy": lambda x: torch.empty(3, 4).copy_(x),
}


@pytest.mark.parametrize("case", WAITS)
def test_a_wait_is_counted(case, gpu):
    x = torch.randn(3, 4, device="cuda")
    assert sum(waits_of(gpu, lambda: WAITS[case](x)).values()) == 1
    assert not waits_of(gpu, lambda: (x * 2 + x[torch.arange(2)].sum()).square())
    assert not waits_of(gpu, lambda: WAITS[case](torch.ones(3, 4)))
