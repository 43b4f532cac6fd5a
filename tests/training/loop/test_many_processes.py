"""Two processes against one, in one launch of two_ranks.py; the configurations of launches that ship."""

import io
import json
from pathlib import Path

import datasets
import pytest
import torch
from accelerate import FullyShardedDataParallelPlugin
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils.launch import prepare_multi_gpu_env
from PIL import Image
from safetensors.torch import load_file

from modeling_simvq.quantizer_names import QUANTIZERS
from tests.support.programs import REPOSITORY, TWO_RANKS, free_port, launch
from tests.training.support import two_ranks

LAUNCHERS = REPOSITORY / "training" / "configs" / "accelerate"
PICTURES = 11


def one_process() -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def shade(level: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (12, 9), (level,) * 3).save(buffer, "PNG")
    return buffer.getvalue()


def write_shards(folder: Path, shards: list[range]) -> None:
    folder.mkdir()
    for number, levels in enumerate(shards):
        rows = [{"image": {"bytes": shade(level), "path": None}} for level in levels]
        name = f"train-{number:05}-of-{len(shards):05}.parquet"
        # One row group: the row groups of small sets of files count as shards.
        datasets.Dataset.from_list(rows).to_parquet(str(folder / name))


@pytest.fixture
def ranks(tmp_path, monkeypatch) -> tuple[Path, list[dict]]:
    """Runs two_ranks.py: the folder of its files, and what each rank says."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "own cache")
    (tmp_path / "pictures" / "train").mkdir(parents=True)
    for level in range(PICTURES):
        file = tmp_path / "pictures" / "train" / f"{level:02}.png"
        file.write_bytes(shade(level))
    (tmp_path / "table").mkdir()
    rows = [{"image": {"bytes": shade(n), "path": None}} for n in range(PICTURES)]
    datasets.Dataset.from_list(rows).to_parquet(str(tmp_path / "table" / "train.parquet"))
    write_shards(tmp_path / "shards", [range(shard, 12, 4) for shard in range(4)])
    write_shards(tmp_path / "five", [range(3 * shard, 3 * shard + 3) for shard in range(5)])
    script = str(Path(two_ranks.__file__))
    done = launch(script, tmp_path, launcher=TWO_RANKS)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Warning" not in done.stderr and "terminate called" not in done.stderr, done.stderr
    return tmp_path, [json.loads((tmp_path / f"rank-{r}.json").read_text()) for r in (0, 1)]


@pytest.mark.slow
def test_two_processes_do_what_one_does(ranks, subtests):
    folder, said = ranks
    for case in two_ranks.CASES:
        with subtests.test(case):
            one_process()
            parts = case != "sound"  # its discriminators have no batch norm
            batch_size = two_ranks.RANKS * two_ranks.BATCH
            expected, figures = two_ranks.trace(case, batch_size, folder, parts)
            found = [load_file(folder / f"{case}-{rank}.safetensors") for rank in (0, 1)]
            compare(case, expected, found)
            compare_figures(case, figures, said[0]["figures"][case])
    with subtests.test("communication"):
        check_communication(said[0]["communication"])
    with subtests.test("samples"):
        check_samples([rank["samples"] for rank in said], folder)
    with subtests.test("averages start from the first rank's weights"):
        assert said[0]["averages"] == said[1]["averages"]
    with subtests.test("a bad batch of one rank is skipped by all"):
        assert said[0]["bad batch"] == said[1]["bad batch"]
        assert said[0]["bad batch"]["bad_steps"] == 1
        assert all(value == value for value in said[0]["bad batch"]["weights"])
    with subtests.test("epochs end where the data do"):
        assert said[0]["epochs"]["total"] == 6 and said[0]["epochs"]["epochs"] == 3
        assert "1 batch(es) for 2 process(es)" in said[0]["epochs"]["too few"]
    with subtests.test("a code counts the same on whichever rank it comes"):
        for rank in said:
            assert rank["codes"]["gradient"] < 1e-6 and rank["codes"]["loss"] < 1e-6, rank["codes"]
    with subtests.test("every quantizer begins without quantization"):
        assert said[0]["quantizers"] == said[1]["quantizers"]
        assert set(said[0]["quantizers"]) == set(QUANTIZERS)
        assert all(moved["first"] == 0 for moved in said[0]["quantizers"].values())
    with subtests.test("no thread outlives the group"):
        for rank in said:
            assert rank["threads before"] > 0 and rank["threads after"] == 0


# In float64, and in float32, where gradients that ought to be zero are rounding.
PRECISION = {"pictures": 1e-6, "images, all options": 1e-6, "sound": 1e-3}
PRECISION |= {"images, whitened": 1e-6}
OWN = (
    "running_mean",
    "running_var",
    "num_batches_tracked",
)  # of batch norm; training never reads them


def compare(case: str, expected: dict, found: list[dict]) -> None:
    """Gradients, weights, averages and code counts; those of the ranks are equal to the bit."""
    first, second = found
    assert set(first) == set(second) == set(expected)
    differing = [name for name in first if not torch.equal(first[name], second[name])]
    assert all(name.endswith(OWN) for name in differing), differing
    assert bool(differing) == (case != "sound")
    groups: dict[str, list[str]] = {}
    for name in expected:
        if not name.endswith(OWN):
            parts = 3 if name.startswith("gradient.") else 1
            groups.setdefault(".".join(name.split(".")[:parts]), []).append(name)
    for group, names in groups.items():
        ours, theirs = (
            torch.cat([tensors[n].double().flatten() for n in names])
            for tensors in (expected, first)
        )
        if group == "codes":
            assert torch.equal(ours, theirs) and ours.sum() > 0
            continue
        scale = ours.norm()
        if group in ("model", "judge", "average"):  # Adam moves an entry by its rate in a step
            scale = two_ranks.STEPS * 1e-4 * len(ours) ** 0.5
        distance = float((ours - theirs).norm() / scale) if scale else 0.0
        print(f"{case}: {group}, {len(names)} tensors, {distance:.1e}")
        assert distance <= (10 if "gradient" in group else 100) * PRECISION[case], group
    steps = {name.split(".")[1] for name in groups if name.startswith("gradient.")}
    assert len(steps) == two_ranks.STEPS


def compare_figures(case: str, expected: list[dict], found: list[dict]) -> None:
    """Losses, gradient norms, rates and code statistics of every step."""
    own = (
        "run/steps_per_second",
        "run/data_wait",
        "codebook/scale_ratio",
        "codebook/latent_effective_rank",
    )
    for ours, theirs in zip(expected, found, strict=True):
        assert set(ours) == set(theirs)
        for name in set(ours).difference(own):
            assert theirs[name] == pytest.approx(ours[name], rel=PRECISION[case], abs=1e-6), name


def check_communication(sent: dict) -> None:
    """Gradients once, and next to nothing else: not the frozen basis, no buffer."""
    print(sent)
    assert sent["operations"] and not any("broadcast" in name for name in sent["operations"])
    total = sum(sent["bytes"].values())
    assert sent["trained"] <= total < 1.01 * sent["trained"] < sent["basis"], sent


def check_samples(ranks: list[dict], folder: Path) -> None:
    """Ranks get the batches of one process in turn, of a stream rows of their own; each is validated once."""
    rows = {"table": PICTURES, "shards": 12, "five": 15}
    for name, (source, *how) in two_ranks.SOURCES.items():
        if how[0]:  # streamed
            batches = [rank[name] for rank in ranks]
            if not how[2]:
                for found in batches:
                    assert sorted(sum(found, [])) == list(range(rows[source])), name
                continue
            first, second = (sum(found, []) for found in batches)
            assert len(first) == len(second) == rows[source] // 4 * 2, name  # batches of 2
            assert len(set(first + second)) == len(first + second), name
        elif how[2]:  # training
            one_process()
            alone = two_ranks.samples(folder / source, *how)
            rounds = len(alone) // two_ranks.RANKS
            assert rounds >= 2
            for number, rank in enumerate(ranks):
                assert rank[name] == alone[number :: two_ranks.RANKS][:rounds], name
            seen = [level for rank in ranks for batch in rank[name] for level in batch]
            assert len(set(seen)) == len(seen) == rounds * two_ranks.RANKS * two_ranks.BATCH, name
        else:
            for rank in ranks:
                assert [level for batch in rank[name] for level in batch] == list(
                    range(PICTURES)
                ), name
    assert ranks[0]["whole"] != ranks[0]["whole, next epoch"]
    assert ranks[0]["stream of one shard"] != ranks[0]["stream, next epoch"]


@pytest.mark.parametrize("name", ["one_gpu", "eight_gpus", "multi_node", "fsdp"])
def test_accelerate_reads_the_shipped_configurations(name, monkeypatch):
    """Through Accelerate's own parser, up to the environment that it would give the processes."""
    file = str(LAUNCHERS / f"{name}.yaml")
    config = load_config_from_file(file)
    arguments = ["--config_file", file, "--main_process_port", free_port(), "train.py"]
    arguments, _, _ = _validate_launch_command(launch_command_parser().parse_args(arguments))
    if name == "one_gpu":
        assert config.num_processes == 1 and not (arguments.multi_gpu or arguments.use_fsdp)
        return
    environment = prepare_multi_gpu_env(arguments)
    assert arguments.nproc_per_node == "8"
    assert arguments.multi_gpu == (name != "fsdp") and arguments.use_fsdp == (name == "fsdp")
    if name == "multi_node":
        assert (arguments.nnodes, arguments.num_processes) == ("2", 16)
        assert arguments.rdzv_endpoint.startswith("127.0.0.1:")
    if name == "fsdp":
        for key, value in environment.items():
            if key.startswith("FSDP_"):
                monkeypatch.setenv(key, value)
        plugin = FullyShardedDataParallelPlugin()
        assert plugin.fsdp_version == 2 and plugin.reshard_after_forward is True
        assert plugin.transformer_cls_names_to_wrap == ["LlamaDecoderLayer"]
