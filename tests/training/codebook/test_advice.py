"""What a training says of its codebook: the cause, once, and again only when it has changed for good."""

import pytest
import torch

from training.codebook.advice import (
    ADVICE,
    PATIENCE,
    CodebookFigures,
    CollapseAdviser,
    diagnose_collapse,
)
from training.codebook.usage import CodeUsage


@pytest.mark.parametrize(
    ("ratio", "rank", "word"),
    [(30, 20, "commitment_weight"), (0.01, 20, "autoencoder_steps"), (1, 2, "codebook_dim")],
)
def test_a_collapse_is_explained(ratio, rank, word):
    collapsed = CodeUsage(0.03, perplexity=20.0, tokens=100_000, ceiling=1.0, codebook_size=8192)
    sentence = diagnose_collapse(collapsed, ratio, rank, codebook_dim=64)
    assert word in sentence and "3.00%" in sentence


def test_few_tokens_are_no_collapse():
    usage = CodeUsage.from_counts(torch.cat([torch.ones(100), torch.zeros(65436)]).long())
    assert usage.utilisation < 0.002
    assert diagnose_collapse(usage, 1.0, 30, codebook_dim=64) is None


def test_every_advice_names_what_helps_most():
    assert all("autoencoder_steps" in advice for advice in ADVICE.values())


def report(used: float = 0.03, ratio: float = 1.0, rank: float = 30.0) -> CodebookFigures:
    return CodebookFigures(CodeUsage(used, 20.0, 100_000, 1.0, 8192), ratio, rank, 64)


def advice(adviser: CollapseAdviser, *reports: CodebookFigures) -> list[str]:
    return [said for one in reports if (said := adviser.advise(one))]


def test_figures_about_a_threshold_give_one_advice_and_no_contradiction():
    """A scale ratio that wavers about 3, as in short trainings of images."""
    wavering = [report(ratio=ratio) for ratio in (3.7, 3.1, 3.4, 2.7, 3.3, 2.8, 3.6, 2.7, 3.2)]
    (said,) = advice(CollapseAdviser(), *wavering)
    assert "much larger" in said and "100,000 tokens could reach 100.0% of 8,192" in said
    # Whichever side it begins on.
    (said,) = advice(CollapseAdviser(), *wavering[3:], *wavering)
    assert "lower commitment_weight" not in said
    for low, high in ((0.09, 0.11), (0.05, 0.19)):
        assert len(advice(CollapseAdviser(), *[report(low), report(high)] * 9)) <= 1


def test_nothing_is_said_of_a_single_report_or_while_the_quantizer_rests():
    adviser = CollapseAdviser()
    assert not advice(adviser, *[report()] * (PATIENCE - 1), report(used=0.9))
    for _ in range(9):
        assert not advice(adviser, *[report()] * (PATIENCE - 1))
        adviser.rest()


def test_a_change_for_good_is_told_once_also_after_a_resume():
    adviser = CollapseAdviser()
    assert len(advice(adviser, *[report(ratio=30.0)] * 9)) == 1
    resumed = CollapseAdviser()
    resumed.load_state_dict(adviser.state_dict())
    assert not advice(resumed, *[report(ratio=30.0)] * 9)
    (said,) = advice(resumed, *[report(ratio=0.1)] * 9)
    assert "much smaller" in said
    (said,) = advice(resumed, *[report(used=0.6)] * 9)
    assert said == (
        "the codebook has recovered: 60.0% of 8,192 codes used (100,000 tokens could reach 100.0%)"
    )


@pytest.mark.slow
def test_a_training_advises_after_its_warm_up(make_trainer, monkeypatch, caplog):
    from training.codebook import watch as codebook_watch

    settings = {"log_every": 1, "warmup_steps": 3, "max_steps": 9, "epochs": 9}
    trainer = make_trainer({"validation": 0}, **settings)
    bad = {"scale_ratio": 9.0, "latent_effective_rank": 9.0}
    monkeypatch.setattr(codebook_watch, "latent_statistics", lambda *_: bad)
    monkeypatch.setattr(
        trainer.stepper.watch.counter, "read", lambda _: CodeUsage(0.02, 1.0, 64, 1.0, 64)
    )
    logged = []
    trainer.accelerator.log = lambda values, step: logged.append(values)
    with caplog.at_level("WARNING"):
        trainer.train()
    told = [line for line in caplog.messages if "of the codes are used" in line]
    assert len(told) == 1 and f"step {3 + PATIENCE}: " in told[0]
    assert logged[0]["codebook/reachable_utilisation"] == pytest.approx(1 - (63 / 64) ** 64)
