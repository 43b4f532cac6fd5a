import json
from pathlib import Path

import pytest
import torch

from training.loop.optimizers import make_scheduler, rate_factor

FIXTURE = Path(__file__).parents[2] / "fixtures" / "losses_image" / "cases.json"


@pytest.mark.parametrize(
    ("name", "total_steps", "floor"),
    [("linear_warmup_5", None, 0.0), ("warmup5_cosine_max20_min0p1", 20, 0.1)],
)
def test_factors_equal_the_original(name, total_steps, floor):
    expected = json.loads(FIXTURE.read_text())["lr_schedule"][name]
    if total_steps is not None:  # beyond its end the original's cosine rises again; ours stays
        expected = [v if i <= total_steps else floor for i, v in enumerate(expected)]
    ours = [
        rate_factor(step, warmup_steps=5, total_steps=total_steps, floor=floor)
        for step in range(len(expected))
    ]
    assert ours == pytest.approx(expected, abs=1e-12)


def test_scheduler_sets_the_rate():
    optimizer = torch.optim.Adam([torch.nn.Parameter(torch.zeros(1))], lr=0.5)
    scheduler = make_scheduler(
        optimizer, schedule="cosine", warmup_steps=2, total_steps=6, floor=0.0
    )
    rates = []
    for _ in range(8):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    assert rates == pytest.approx([0, 0.25, 0.5, 0.4267767, 0.25, 0.0732233, 0, 0], abs=1e-6)
