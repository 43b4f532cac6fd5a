"""Modules, optimisers and loaders of a recipe as Accelerate has them."""

from dataclasses import dataclass

from accelerate import Accelerator
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from training.data.loader import Loader
from training.loop.averaging import WeightAverage
from training.loop.optimizers import make_optimizers
from training.loop.recipe import Recipe
from training.loop.settings import LoopSettings
from training.runtime import fast_math, sharding
from training.runtime.unwrapped import unwrapped


@dataclass
class Prepared:
    """Prepared modules, and what they are trained on.

    Attributes:
        modules, optimizers: by the names of the recipe's modules; the first is the model.
        schedulers: of the optimisers, in the same order; not prepared, because Accelerate would step them once
            per process.
    """

    modules: dict[str, nn.Module]
    optimizers: dict[str, Optimizer]
    schedulers: list[LambdaLR]
    train_loader: Loader
    validation_loader: Loader | None


def set_modes(recipe: Recipe, settings: LoopSettings, accelerator: Accelerator) -> None:
    """Put all modules into the state to be trained in."""
    if settings.gradient_checkpointing:
        # The older name is deprecated, the newer one is not in transformers 5.0.
        enable = getattr(recipe.model, "activation_checkpointing_enable", None)
        (enable or recipe.model.gradient_checkpointing_enable)()
    for module in recipe.modules.values():
        module.train()
    if recipe.of_images:
        for module in (*recipe.modules.values(), *recipe.companions):
            fast_math.lay_out(module, accelerator.device)
    for module in recipe.frozen:  # neither gradients nor running statistics move them
        module.eval().requires_grad_(False)
    for module in recipe.companions:
        module.train().to(accelerator.device)


def prepare(
    recipe: Recipe,
    settings: LoopSettings,
    accelerator: Accelerator,
    average: WeightAverage,
    total_steps: int,
) -> Prepared:
    """Make the optimisers, and hand everything to Accelerate; the average begins where the model does."""
    # A sharded weight is not where its optimiser's step can fuse it with others.
    fused = None if average.sharded else fast_math.fuses(accelerator.device)
    optimizers, schedulers = make_optimizers(recipe.modules, settings, total_steps, fused)
    names, count = list(optimizers), len(optimizers)
    *prepared, train_loader = accelerator.prepare(
        *recipe.modules.values(), *optimizers.values(), recipe.train_loader
    )
    modules = dict(zip(names, prepared[:count], strict=True))
    model = prepared[0]
    if average.sharded:
        sharding.call_as_forward(model, *recipe.forward_methods)
        sharding.call_as_forward(average.module, *recipe.forward_methods)
    # Ranks begin with the weights of the first; so does the average, whatever another rank has drawn.
    average.module.load_state_dict(unwrapped(accelerator, model).state_dict())
    validation_loader = recipe.validation_loader
    if validation_loader is not None:
        validation_loader = accelerator.prepare(validation_loader)
    return Prepared(
        modules,
        dict(zip(names, prepared[count:], strict=True)),
        schedulers,
        train_loader,
        validation_loader,
    )
