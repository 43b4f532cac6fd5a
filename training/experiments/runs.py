"""Train and evaluate many variants of one configuration; what the experiments have in common.

A run is known by the hash of its settings: one that was done, for whichever experiment, is not done again.
"""

import argparse
import hashlib
import json
import os
import shutil
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path

import torch
from tqdm.auto import tqdm

from training.experiments.tasks import TASKS
from training.runtime.folder_lock import clear_folder
from training.runtime.parent_process import end_with_parent
from training.runtime.setting_values import read_yaml
from training.runtime.settings import SettingsError, build_settings, convert_values, parse_overrides

REPOSITORY = Path(__file__).resolve().parents[2]
# Settings that came later: at these values runs are what they were before, and keep their hashes.
CAME_LATER = {"weight_decay": 0.0, "hub_license": None, "init_from": None, "train": "all"}
CAME_LATER |= {"norm_groups": 32, "whiten_latents": False, "codes_from_latents": False}
CAME_LATER |= {"attention": False, "norm_per_position": False, "colour_weight": 0.0}
CAME_LATER |= {"num_quantizers": 1, "quantizer_arrangement": "residual"}
CAME_LATER |= {"quantizer_dropout": 0.0, "share_basis": False, "decorrelation_weight": 0.0}
CAME_LATER |= {"gram_weight": 0.0, "drift_weight": 0.0, "replace_unused_every": 0}
CAME_LATER |= {"end_phase_early": False, "encoder_steps": None}
CAME_LATER |= {"sync_batch_norm": False, "streamable": False, "attention_window": 128}
# These do not change what a run finds.
NOT_HASHED = ("output_dir", "num_workers", "tracker", "save_every", "keep_checkpoints")


@dataclass
class Plan:
    """Arguments of an experiment.

    Attributes:
        base: settings that all runs share.
        seeds: every variant is run with each.
        output: folder of the table, the figure and results.json.
        work: folder of the runs themselves.
        jobs: runs at a time.
        task: name in TASKS of what is trained.
        start: whether to do what is not done yet; otherwise it is left out.
    """

    base: dict
    seeds: list[int]
    output: Path
    work: Path
    jobs: int
    sizes: list[int]
    task: str = "images"
    start: bool = True


def parse_plan(
    name: str,
    description: str,
    sizes: list[int],
    arguments: list[str] | None = None,
    task: str = "images",
    more: argparse.ArgumentParser | None = None,
) -> Plan:
    """Command line of an experiment; results go to docs/results/NAME unless told otherwise.

    Args:
        sizes: codebook sizes by default.
        task: name in TASKS of what is trained.
        more: parser of the experiment's own options, made with add_help=False, for --help.
    """
    groups, config = TASKS[task].groups, TASKS[task].config
    parser = argparse.ArgumentParser(
        parents=[more] if more else [],
        description=description,
        epilog="Settings of the trainer follow as key=value: dataset=PATH is needed.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--config",
        default=str(REPOSITORY / "training" / "configs" / config),
        help=f"trainer's configuration, the scale of the experiment (default: {config})",
    )
    parser.add_argument("--output", default=str(REPOSITORY / "docs/results" / name))
    parser.add_argument("--work", default="runs/experiments", help="folder of the runs")
    parser.add_argument(
        "--seeds", type=_numbers, default="0", help="0,1,2 runs everything three times"
    )
    parser.add_argument(
        "--sizes", type=_sizes, default=",".join(map(str, sizes)), help="codebook sizes K"
    )
    parser.add_argument(
        "--jobs",
        type=int,
        default=1,
        help="runs at a time; they share the cores, or take OMP_NUM_THREADS each",
    )
    parser.add_argument(
        "--finished", action="store_true", help="start nothing: show the runs that are done"
    )
    known, words = parser.parse_known_args(arguments)
    try:
        base = convert_values(groups, read_yaml(known.config) | parse_overrides(words))
        build_settings(groups, base)
        if "dataset" not in base:
            raise SettingsError(f"dataset: name the {task}, dataset=PATH or a Hub id")
    except (SettingsError, OSError) as error:
        parser.error(str(error))
    return Plan(
        base,
        known.seeds,
        Path(known.output),
        Path(known.work),
        known.jobs,
        known.sizes,
        task,
        not known.finished,
    )


def _numbers(words: str) -> list[int]:
    try:
        return [int(word) for word in words.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"whole numbers with commas between, got {words!r}"
        ) from None


def _sizes(words: str) -> list[int]:
    sizes = _numbers(words)
    if min(sizes) < 1:
        raise argparse.ArgumentTypeError(f"at least 1 code, got {min(sizes)}")
    return sizes


def config_hash(settings: dict, task: str = "images") -> str:
    """Ten hexadecimal digits of the settings that matter, all of them and not only those that were given."""
    groups = build_settings(TASKS[task].groups, settings)
    flat = {k: v for group in groups.values() for k, v in asdict(group).items()}
    return hashlib.sha256(json.dumps(_shown(flat), sort_keys=True).encode()).hexdigest()[:10]


def _shown(settings: dict) -> dict:
    """Settings that matter to a run; of files and folders only the names, wherever they lie."""
    kept = {
        k: v for k, v in settings.items() if k not in NOT_HASHED and CAME_LATER.get(k, ...) != v
    }
    for name in ("dataset", "codebook_features"):
        if kept.get(name):
            kept[name] = Path(kept[name]).name
    if kept.get("tokenizer"):  # of a run: its folder's name is its hash
        kept["tokenizer"] = kept["tokenizer"].removesuffix("/model").rpartition("/")[2]
    return kept


def run_all(plan: Plan, variants: dict[str, dict], with_model: bool = False) -> list[dict]:
    """Train and evaluate every variant with every seed, all of them with one seed before the next.

    Args:
        variants: name to what it changes in the base.
        with_model: whether a run counts as done only if its model is still there.

    Returns:
        One dict a run, in order: variant, seed, hash, settings (what differs from the defaults), metrics,
        history (figures of every validation), seconds. A run that failed has "error" instead of metrics.
    """
    runs = []
    for seed in plan.seeds:
        for name, changes in variants.items():
            settings = plan.base | changes | {"seed": seed}
            key = config_hash(settings, plan.task)
            folder = plan.work / key
            runs.append((name, seed, key, settings | {"output_dir": str(folder)}, folder))
    found: dict[str, dict] = {}
    for _, _, key, _, folder in runs:
        has_model = (folder / "model").is_dir() or not with_model
        if (folder / "result.json").is_file() and has_model:
            found[key] = json.loads((folder / "result.json").read_text())
    todo = {key: settings for _, _, key, settings, _ in runs if key not in found and plan.start}
    # No more than OMP_NUM_THREADS, where it is set: threads that wait for each other waste a shared machine.
    threads = max(1, min(torch.get_num_threads(), (os.cpu_count() or 1) // plan.jobs))
    os.environ["TQDM_DISABLE"] = (
        "1"  # read by the processes that are to come, when they import tqdm
    )
    with ProcessPoolExecutor(plan.jobs, get_context("spawn"), _prepare, (threads,)) as pool:
        futures = {pool.submit(_run, settings, plan.task): key for key, settings in todo.items()}
        for future in tqdm(
            as_completed(futures),
            total=len(futures),
            desc=plan.output.name,
            unit="run",
            disable=not futures,
        ):
            found[futures[future]] = future.result()
    return [
        {"variant": name, "seed": seed, "hash": key, **found[key]}
        for name, seed, key, *_ in runs
        if key in found
    ]


def _prepare(threads: int) -> None:
    import logging

    import transformers

    end_with_parent()
    torch.set_num_threads(threads)
    logging.disable(logging.WARNING)
    transformers.utils.logging.disable_progress_bar()
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115  (validations print their figures)


def _run(settings: dict, task: str) -> dict:
    folder = Path(settings["output_dir"])
    start = time.perf_counter()
    result = {"settings": _shown(settings)}
    try:
        clear_folder(folder)
        metrics = TASKS[task].train_and_evaluate(settings)
    except Exception as error:  # one run that fails must not take the others with it
        return result | {"error": f"{type(error).__name__}: {error}"}
    lines = (folder / "figures.jsonl").read_text().splitlines()
    result |= {"metrics": metrics, "history": [json.loads(line) for line in lines]}
    result["seconds"] = round(time.perf_counter() - start)
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    (folder / "result.json").write_text(json.dumps(result, indent=1) + "\n")
    return result
