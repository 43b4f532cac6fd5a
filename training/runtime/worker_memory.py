"""Shared memory of the data loaders' workers: too little of it kills them with a bus error in mid-run."""

import os
import shutil

from torch.utils.data import DataLoader

from training.runtime.settings import SettingsError

SHARED_MEMORY = "/dev/shm"  # noqa: S108  (only looked at)


def check_shared_memory(*loaders: DataLoader | None, folder: str = SHARED_MEMORY) -> None:
    """Compare what workers hold ready with what there is; containers often have 64 MB.

    Raises:
        SettingsError: with both numbers and the remedies.
    """
    need = sum(map(_bytes_ahead, (loader for loader in loaders if loader is not None)))
    if not need or not os.path.isdir(folder):
        return
    free = shutil.disk_usage(folder).free
    if need > free:
        raise SettingsError(
            f"num_workers: batches that are made ready take up to {need / 1e6:,.0f} MB of {folder}, which has "
            f"{free / 1e6:,.0f} MB left: start the container with --shm-size=8g (or --ipc=host), lower "
            "num_workers or batch_size, or set num_workers=0"
        )


def worker_error(error: RuntimeError) -> str | None:
    """One line for the death of a worker, which torch reports as a RuntimeError; None for other errors."""
    text = " ".join(str(error).split())
    if not text.startswith("DataLoader worker"):
        return None
    if "Bus error" in text or "shared memory" in text:
        return (
            f"num_workers: a worker ran out of shared memory ({SHARED_MEMORY}): start the container with "
            "--shm-size=8g (or --ipc=host), lower num_workers or batch_size, or set num_workers=0"
        )
    return (
        f"num_workers: a process that decodes has died ({text[:200]}): if the machine ran out of memory, lower "
        "num_workers or batch_size; num_workers=0 decodes in the training process and shows the cause"
    )


def _bytes_ahead(loader: DataLoader) -> int:
    """Bytes of the batches that the workers of a loader make ahead of time."""
    reader = getattr(loader.dataset, "reader", None)
    if not loader.num_workers or reader is None:
        return 0
    tensors = reader.decoder.blank().values()
    sample = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    ahead = loader.num_workers * (loader.prefetch_factor or 2)
    return ahead * (loader.batch_size or 1) * sample
