import dataclasses
from dataclasses import dataclass

import pytest

from modeling_simvq import SimVQAudioConfig, SimVQImageConfig, SimVQImageGenerationConfig
from modeling_simvq.configuration_checks import own_fields
from training.loop.settings import LoopSettings
from training.recipes.audio import AudioModelSettings
from training.recipes.generator import GeneratorModelSettings
from training.recipes.image import ImageLossSettings, ImageModelSettings
from training.runtime.settings import SettingsError, parse_settings, setting


@dataclass
class Data:
    """Data of a test."""

    dataset: str = setting("somewhere", "where the data are")
    widths: list[int] = setting([1, 2], "a list")
    config_name: str | None = setting(None, "a name")
    names: str | list[str] = setting("", "a name or several")
    options: dict = setting({}, "of any type")


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


# Names that YAML 1.1 takes for numbers, numbers to the base of 60, switches, dates, or its own signs.
NAMES = [
    "1.10", "001", "010", "2_000", "12:30", "off", "on", "yes", "n", "NO", "0123456", "1_2", "0x1F", "1e5",
    "+1", ".5", ".inf", "nan", "2024-01-01", "2024-01-01 12:30:00", "=", "<<", "true", "190:20:30", "-0",
]  # fmt: skip
SIGNS = [
    "a #1",
    "a: b",
    "@x",
    "*x",
    "&x",
    "!x",
    "%x",
    "{x}",
    "- x",
    "[v1]",
    "x]",
    "'",
    "`x`",
    "?",
    ">",
]


@pytest.mark.parametrize("name", NAMES)
def test_a_name_stays_what_was_written(tmp_path, name):
    file = tmp_path / "settings.yaml"
    file.write_text(f"config_name: {name}\nnames: [a, {name}]\noutput_dir: '{name}'\n")
    for words in (
        ("--config", str(file)),
        (f"config_name={name}", f"names=[a, {name}]", f"output_dir={name}"),
        ("--config-name", name, "--names", f"[a, '{name}']", "--output-dir", name),
    ):
        settings = parse(*words)
        data = settings["data"]
        assert (data.config_name, data.names) == (name, ["a", name])
        assert settings["loop"].output_dir == name and type(data.config_name) is str
    assert parse(f"names={name}")["data"].names == name


@pytest.mark.parametrize("name", SIGNS)
def test_signs_of_yaml_are_letters_of_a_name_on_the_command_line(name):
    settings = parse(f"config_name={name}", f"output_dir={name}")
    assert settings["data"].config_name == settings["loop"].output_dir == name


def test_nulls_and_quotes():
    for null in ("null", "~", "Null", ""):
        assert parse(f"config_name={null}")["data"].config_name is None
    assert parse("config_name='null'")["data"].config_name == "null"
    assert parse('config_name="off"')["data"].config_name == "off"
    assert parse("config_name=none")["data"].config_name == "none"
    with pytest.raises(SettingsError, match="output_dir must not be null"):
        parse("output_dir=null")


def test_numbers_and_switches_are_read_as_such(tmp_path):
    for words, value in (("010", 10), ("2_000", 2000), ("+7", 7)):
        assert parse(f"batch_size={words}")["loop"].batch_size == value
    for words, value in (("1e-3", 1e-3), ("1E-3", 1e-3), (".5", 0.5), ("0.1_0", 0.1)):
        assert parse(f"learning_rate={words}")["loop"].learning_rate == value
    for words, value in (("on", True), ("OFF", False), ("yes", True), ("False", False)):
        assert parse(f"gradient_checkpointing={words}")["loop"].gradient_checkpointing is value
    file = tmp_path / "settings.yaml"
    file.write_text("adam_betas: [.5, 9e-1]\nmax_steps:\nwidths:\n- 010\n- 2\n")
    settings = parse("--config", str(file))
    assert settings["loop"].adam_betas == [0.5, 0.9] and settings["loop"].max_steps is None
    assert settings["data"].widths == [10, 2]
    options = parse("options={a: 1, b: 1e-3, c: on, d: [x, 2], e: null, f: '1'}")["data"].options
    assert options == {"a": 1, "b": 1e-3, "c": True, "d": ["x", 2], "e": None, "f": "1"}
    assert type(options["a"]) is int and type(options["d"][0]) is str


@pytest.mark.parametrize(
    "argument",
    ["batch_size=12:30", "batch_size=1.0", "batch_size=0x10", "max_steps=1e3", "learning_rate=0:1",
     "gradient_checkpointing=1", "widths=3", "widths=[1.0]", "options=3", "batch_size=[", "batch_size=٣"],
)  # fmt: skip
def test_what_is_no_number_or_switch_is_refused(argument):
    with pytest.raises(SettingsError, match=argument.split("=")[0]):
        parse(argument)


def test_a_setting_that_stands_twice_in_a_file_is_refused(tmp_path):
    file = tmp_path / "settings.yaml"
    file.write_text("batch_size: 4\nseed: 1\nbatch_size: 8\n")
    with pytest.raises(SettingsError, match="batch_size stands there twice"):
        parse("--config", str(file))


@pytest.mark.parametrize(
    ("settings", "config"),
    [
        (ImageModelSettings, SimVQImageConfig),
        (AudioModelSettings, SimVQAudioConfig),
        (GeneratorModelSettings, SimVQImageGenerationConfig),
    ],
)
def test_settings_of_a_model_are_fields_of_its_configuration(settings, config):
    """The trainer's defaults build the default configuration, and its --help is the fields' own."""
    ours = {spec.name: spec for spec in dataclasses.fields(settings)}
    theirs = {spec.name: spec for spec in own_fields(config)}
    # Of these two the tokenizer, or the data, gives the default.
    shared = ours.keys() & theirs.keys() - {"num_classes"}
    if config is SimVQImageGenerationConfig:
        shared.remove("codebook_size")
    assert len(shared) >= 8
    built, chosen = config(), settings()
    for name in shared:
        assert ours[name].metadata["help"] == theirs[name].metadata["help"]
        default = getattr(chosen, name)
        if default is not None:
            assert type(default) is type(getattr(built, name)) and default == getattr(built, name)


@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf")])
def test_weights_are_finite_and_not_negative(value):
    with pytest.raises(SettingsError, match="colour_weight must be at least 0 and finite"):
        ImageLossSettings(colour_weight=value)
