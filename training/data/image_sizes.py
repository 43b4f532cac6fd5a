"""The smallest images that the networks and figures of training and evaluation take."""

from training.runtime.settings import SettingsError

LPIPS = {"vgg": 16, "alex": 31}  # pixels a side that their poolings leave something of
SSIM = 7  # its window


def smallest_for_discriminator(num_layers: int) -> int:
    """Pixels a side of which PatchDiscriminator makes one patch: halvings, then two kernels of 4."""
    return 3 * 2**num_layers


def check_resolution(resolution: int, smallest: dict[str, int]) -> None:
    """Refuse images that a network would fail on with its first batch.

    Args:
        smallest: what needs so many pixels a side, in words.

    Raises:
        SettingsError: naming what needs the most.
    """
    name = max(smallest, key=smallest.get, default=None)
    if name is not None and resolution < smallest[name]:
        raise SettingsError(
            f"resolution is {resolution}, but {name} needs at least {smallest[name]} pixels a side"
        )


def trained_resolution(processor) -> int | None:
    """The side in pixels that a model's image processor crops to, which is that of its training."""
    side = getattr(processor, "crop_size", None)
    return int(side["height"]) if side else None
