from dataclasses import dataclass

import pytest

from training.settings import LoopSettings, SettingsError, parse_settings, setting


@dataclass
class Data:
    """Data of a test."""

    dataset: str = setting("somewhere", "where the data are")
    widths: list[int] = setting([1, 2], "a list")


GROUPS = {"data": Data, "loop": LoopSettings}


def parse(*arguments: str) -> dict:
    return parse_settings(GROUPS, "A test.", list(arguments))


def test_defaults_are_the_published_optimiser():
    loop = parse()["loop"]
    assert (loop.learning_rate, loop.adam_betas, loop.ema_decay) == (1e-4, [0.5, 0.9], 0.999)


def test_overrides_in_all_three_spellings_win_over_the_file(tmp_path):
    file = tmp_path / "settings.yaml"
    file.write_text("learning_rate: 1e-3\ndataset: photos\nmax_steps: 7\n")
    arguments = ("max_steps=8", "--batch-size", "4", "--widths=[3, 5]", "lr_schedule=cosine")
    settings = parse("--config", str(file), *arguments)
    assert settings["loop"].learning_rate == 1e-3  # YAML reads 1e-3 as a string
    assert settings["data"].dataset == "photos"
    assert settings["loop"].max_steps == 8
    assert settings["loop"].batch_size == 4
    assert settings["data"].widths == [3, 5]
    assert settings["loop"].lr_schedule == "cosine"


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("learning_rat=1", ["learning_rat", "learning_rate"]),
        ("batch_size=0", ["batch_size", "0"]),
        ("batch_size=many", ["batch_size", "many"]),
        ("batch_size=null", ["batch_size"]),
        ("learning_rate=-1", ["learning_rate", "-1"]),
        ("ema_decay=1", ["ema_decay"]),
        ("mixed_precision=fp8", ["mixed_precision", "fp8"]),
        ("adam_betas=[0.5]", ["adam_betas"]),
        ("max_grad_norm=0", ["max_grad_norm", "0"]),
        ("gradient_checkpointing=3", ["gradient_checkpointing", "3"]),
        ("widths=[1, x]", ["widths", "x"]),
        ("stray", ["stray"]),
    ],
)
def test_a_wrong_setting_is_named(argument, words):
    with pytest.raises(SettingsError) as caught:
        parse(argument)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    "content", ["- a list", "a: [", "just words", "!!python/object:os.system {}"]
)
def test_a_broken_file_is_refused(tmp_path, content):
    file = tmp_path / "broken.yaml"
    file.write_text(content)
    with pytest.raises(SettingsError, match="broken.yaml"):
        parse("--config", str(file))
    with pytest.raises(SettingsError, match="missing.yaml"):
        parse("--config", str(tmp_path / "missing.yaml"))


def test_help_lists_every_setting(capsys):
    with pytest.raises(SystemExit) as caught:
        parse("--help")
    assert caught.value.code == 0
    text = capsys.readouterr().out
    for name in ("dataset", "widths", "learning_rate", "weight_decay", "resume"):
        assert name in text


def test_no_without_quotes_is_a_word():
    """YAML reads a bare no as False, and mixed_precision knows the word."""
    assert parse("mixed_precision=no")["loop"].mixed_precision == "no"
