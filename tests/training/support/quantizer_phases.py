"""Every quantizer through a phase without quantization into one with it; two_ranks.py runs it on two ranks."""

import warnings
from pathlib import Path

import torch

from modeling_simvq import SimVQImageConfig, SimVQImageModel
from modeling_simvq.quantizer_names import QUANTIZERS
from tests.training.support.tiny_recipe import TINY, build_tiny_recipe
from training.loop.trainer import Trainer
from training.recipes.run import make_accelerator
from training.recipes.tokenizer import TokenizerLoopSettings

OPTIONS = {"fsq": {"levels": [4, 4, 4]}, "fc": {"code_dim": 4}, "lc": {"basis_dim": 8}}


def change(quantizer: str, folder: Path, spoil: bool = False) -> dict[str, float]:
    """How far a quantizer's trained parameters move in the two phases, and what they are in the end.

    Args:
        spoil: let the quantizer's loss be infinite during the first phase, as that of huge latents is.
    """
    recipe = build_tiny_recipe(16, 2, validation=0, discriminator_start=2)
    config = TINY.to_dict() | {"quantizer": quantizer}
    config |= {"quantizer_options": OPTIONS.get(quantizer, {})}
    torch.manual_seed(0)
    recipe.model = SimVQImageModel(SimVQImageConfig.from_dict(config))
    loop = TokenizerLoopSettings(
        output_dir=str(folder), tracker="none", max_steps=4, autoencoder_steps=2
    )
    trainer = Trainer(recipe, loop, make_accelerator(loop))
    if spoil:
        forward = recipe.model.quantizer.forward

        def infinite(latents):
            quantized, codes, loss = forward(latents)
            return quantized, codes, loss + (float("inf") if trainer.progress.step < 2 else 0)

        recipe.model.quantizer.forward = infinite

    def parameters() -> torch.Tensor:
        trained = [p for p in recipe.model.quantizer.parameters() if p.requires_grad]
        return torch.cat([torch.zeros(1), *(p.detach().flatten() for p in trained)])

    states, steps = [parameters()], iter(trainer.batches)
    for _ in range(2):  # before the codes are matched to the latents
        trainer._train_batch(next(steps))
    states.append(parameters())
    for batch in steps:
        trainer._train_batch(batch)
    states.append(parameters())
    first, second = (float((b - a).norm()) for a, b in zip(states, states[1:], strict=False))
    everything = sum(float(p.detach().double().sum()) for p in recipe.model.parameters())
    bad = trainer.progress.bad_steps
    return {"first": first, "second": second, "bad_steps": bad, "weights": everything}


def changes(folder: Path) -> dict[str, dict[str, float]]:
    """The same of all quantizers."""
    # vector-quantize-pytorch has an older name for it.
    warnings.filterwarnings("ignore", message="torch.distributed.nn.functional.all_reduce")
    return {name: change(name, folder) for name in QUANTIZERS}
