"""What the commands say."""

import pytest
import torch
from torch.utils.data import DataLoader

from training.runtime.console import error_line


class Broken(torch.utils.data.Dataset):
    """Nothing in it can be read."""

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int):
        raise OSError("photo.png: broken")


@pytest.mark.parametrize("num_workers", [0, 1])
def test_an_error_of_a_worker_is_one_line_too(num_workers):
    with pytest.raises(OSError) as caught:
        next(iter(DataLoader(Broken(), num_workers=num_workers)))
    assert error_line(caught.value) == "error: photo.png: broken"
