"""Models of other libraries: safetensors alone, and whole."""

from torch import nn

from training.runtime.errors import SettingsError


def load_pretrained(model_class: type, name: str, **options) -> nn.Module:
    """Load another library's model in float32, from safetensors alone.

    Args:
        model_class: of transformers or diffusers.
        name: folder, or name on the Hub.
        options: for from_pretrained.

    Raises:
        SettingsError: if weights are missing, which these libraries fill with random ones.
    """
    model, info = model_class.from_pretrained(
        name, use_safetensors=True, output_loading_info=True, **options
    )
    if missing := sorted(info["missing_keys"]):
        raise SettingsError(
            f"{name} lacks {len(missing)} tensors of {model_class.__name__}, such as {missing[0]}"
        )
    return model.eval()
