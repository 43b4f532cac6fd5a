"""A generator in parts (FSDP2) on two ranks of the CPU, against one process, and through trouble."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.fsdp import StateDictType

from modeling_simvq import SimVQImageConfig, SimVQImageModel, SimVQImageProcessor
from tests.support.programs import REPOSITORY, launch
from tests.training.support.generator_runs import TINY, train_here, write_picture_codes
from training.loop.checkpoints import list_checkpoints
from training.runtime.settings import SettingsError
from training.runtime.sharding import check_plugin

FSDP = ("--config_file", str(REPOSITORY / "training/configs/accelerate/fsdp.yaml"))
FSDP += ("--num_processes", "2")
TRAINER = str(Path(__file__).parents[1] / "support" / "fsdp_trainer.py")
STEPS = {"max_steps": 4, "validate_every": 2, "save_every": 2}


@pytest.fixture
def codes(tmp_path):
    return write_picture_codes(tmp_path / "codes")


def train_in_parts(codes: Path, output_dir: Path, environment: dict | None = None, **settings):
    """Two ranks, whose batches together are one of the runs here."""
    values = TINY | {"dataset": codes, "output_dir": output_dir, "batch_size": 4} | settings
    words = [f"{name}={json.dumps(value, default=str)}" for name, value in values.items()]
    return launch(TRAINER, *words, launcher=FSDP, **(environment or {}))


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "model" / "model.safetensors")


def figures(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "figures.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_parts_train_what_a_whole_does(codes, tmp_path):
    """With tied factors, accumulated gradients and samples, all of which reach for weights in their own way."""
    torch.manual_seed(0)
    small = {"base_channels": 32, "channel_multipliers": [1, 2], "num_res_blocks": 1}
    config = SimVQImageConfig(codebook_size=40, codebook_dim=8, **small)
    SimVQImageModel(config).save_pretrained(tmp_path / "tokenizer")
    SimVQImageProcessor(size=8).save_pretrained(tmp_path / "tokenizer")
    settings = STEPS | {
        "tokenizer": str(tmp_path / "tokenizer"),
        "code_factors": [5, 8],
        "tie_word_embeddings": True,
        "gradient_accumulation_steps": 2,
        "samples": 1,
        "validate_every": 1,  # also where no checkpoint is saved, which shards the average again
    }
    train_here(codes, tmp_path / "whole", **settings)
    done = train_in_parts(codes, tmp_path / "parts", **settings)
    assert done.returncode == 0, done.stdout + done.stderr

    assert_alike(tmp_path)
    sheets = [tmp_path / run / "samples/step-00000004.png" for run in ("whole", "parts")]
    assert sheets[0].read_bytes() == sheets[1].read_bytes()
    assert (tmp_path / "parts/pipeline/model_index.json").is_file()


@pytest.mark.soak
def test_parts_of_a_model_of_several_codes_a_position(tmp_path):
    codes = write_picture_codes(tmp_path / "codes", num_quantizers=2)
    train_here(codes, tmp_path / "whole", **STEPS)
    done = train_in_parts(codes, tmp_path / "parts", **STEPS)
    assert done.returncode == 0, done.stdout + done.stderr
    assert_alike(tmp_path)


def assert_alike(tmp_path: Path) -> None:
    """Each rank has held half, and what came out is what one process made."""
    for rank in (0, 1):
        held = json.loads((tmp_path / "parts" / f"shares-{rank}.json").read_text())
        assert all(0.4 < share < 0.6 for share in held), held  # model, average, optimiser
    expected, found = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert set(expected) == set(found)
    for name, values in expected.items():
        assert torch.allclose(values, found[name], rtol=0, atol=1e-5), name
    for one, other in zip(figures(tmp_path / "whole"), figures(tmp_path / "parts"), strict=True):
        assert one == pytest.approx(other, rel=1e-4)


@pytest.mark.soak
def test_a_killed_rank_costs_nothing_but_time(codes, tmp_path):
    settings = {"max_steps": 6, "validate_every": 2, "save_every": 2}
    done = train_in_parts(codes, tmp_path / "calm", **settings)
    assert done.returncode == 0, done.stderr
    done = train_in_parts(codes, tmp_path / "killed", {"DIES_AT": "3"}, **settings)
    assert done.returncode != 0 and len(list_checkpoints(tmp_path / "killed")) == 1
    done = train_in_parts(codes, tmp_path / "killed", resume="latest", **settings)
    assert done.returncode == 0 and "at step 2" in done.stdout + done.stderr, done.stderr
    for name, values in weights(tmp_path / "calm").items():
        assert values.equal(weights(tmp_path / "killed")[name]), name
    assert figures(tmp_path / "calm") == figures(tmp_path / "killed")
    with pytest.raises(ValueError, match="of a launch with FSDP.*resume as it began"):
        train_here(codes, tmp_path / "killed", resume="latest", max_steps=7)


@pytest.mark.soak
def test_a_bad_loss_of_one_rank_skips_the_step_of_all(codes, tmp_path):
    done = train_in_parts(codes, tmp_path / "run", {"BAD_AT": "1"}, **STEPS)
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    assert "step 1 skipped, its values are not finite (terms: all finite)" in said
    assert all(values.isfinite().all() for values in weights(tmp_path / "run").values())
    done = train_in_parts(codes, tmp_path / "end", {"BAD_AT": "1"}, max_bad_steps=1, **STEPS)
    assert done.returncode == 1 and "error: 1 steps in a row were not finite" in done.stderr


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("fsdp_version", 1, "fsdp_version is 1: set it to 2"),
        ("state_dict_type", StateDictType.SHARDED_STATE_DICT, "SHARDED.*set it to FULL_STATE_DICT"),
        ("mixed_precision", "fp16", "fp16 does not go with FSDP here: take bf16"),
    ],
)
def test_launches_that_could_not_be_resumed_are_refused(option, value, message):
    plugin = SimpleNamespace(fsdp_version=2, state_dict_type=StateDictType.FULL_STATE_DICT)
    accelerator = SimpleNamespace(state=SimpleNamespace(fsdp_plugin=plugin), mixed_precision="bf16")
    check_plugin(accelerator)
    setattr(accelerator if option == "mixed_precision" else plugin, option, value)
    with pytest.raises(SettingsError, match=message):
        check_plugin(accelerator)
