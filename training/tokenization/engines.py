"""Tokenization by engines that spread work over many machines: each task is one file of codes.

With Ray Data, for which the folder of the codes has to be on a file system that all machines see:

    words = ["model=me/my-tokenizer", "dataset=/data/images", "output=/shared/codes", "splits=[train]"]
    tasks = ray.data.from_items(list_files(words), override_num_blocks=256)
    tasks.map(FileTokenizer, fn_constructor_args=(words,), concurrency=64, num_gpus=1).materialize()

The words are those of tokenize_dataset's command line. The same command afterwards finds all files there,
checks them against the source, and writes the card; it also completes a job that was cut off. The files are the
same to the byte, whoever writes them.
"""

import torch

from training.runtime.settings import parse_settings
from training.tokenization.job import Job, choose_groups, portion_count
from training.tokenization.manifest import check_manifest


def make_job(words: list[str]) -> Job:
    """Return the job that tokenize_dataset's words mean, on this process's GPU if it has one.

    Raises:
        SettingsError: as tokenize_dataset's.
    """
    groups, words = choose_groups(words)
    settings = parse_settings(groups, "", words)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return Job(settings["settings"], settings["data"], device)


def list_files(words: list[str]) -> list[dict]:
    """Return a task {"split", "index"} for each file of codes, and begin the folder.

    Raises:
        SettingsError: if the dataset is streamed, whose rows have no numbers, or the folder is of another job.
    """
    job = make_job(words)
    check_manifest(job.folder, job.plan)
    job.check_columns()
    return [
        {"split": split, "index": index}
        for split, source in job.sources.items()
        for index in range(portion_count(source, job.settings.rows_per_file))
    ]


class FileTokenizer:
    """Callable of a worker: a task of list_files to the same with "rows", when its file is there.

    Args:
        words: of tokenize_dataset's command line; model and dataset are opened once.
    """

    def __init__(self, words: list[str]):
        self.job = make_job(words)

    def __call__(self, task: dict) -> dict:
        split, index = str(task["split"]), int(task["index"])
        rows = self.job.write(split, self.job.portion(split, index))
        return {"split": split, "index": index, "rows": rows}
