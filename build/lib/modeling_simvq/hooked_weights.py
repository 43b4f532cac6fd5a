"""Weights that other libraries bring or convert for forward alone, in methods besides forward.

accelerate (``cpu_offload``, or ``device_map`` with modules on the CPU or the disk) leaves weights on the meta
device, and brings them while the forward of their own module runs. diffusers' ``apply_layerwise_casting``
stores weights in one type and computes in another.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import chain

import torch
from torch import Tensor, nn


def brings_weights(method: Callable) -> Callable:
    """Decorate a method that uses its module's weights: those that accelerate offloads are brought for it."""

    @functools.wraps(method)
    def with_weights(self: nn.Module, *args, **kwargs):
        if not is_offloaded(self):
            return method(self, *args, **kwargs)
        with ExitStack() as stack:
            for module in self.modules():
                if _on_meta(module) and hasattr(module, "_hf_hook"):
                    device = stack.enter_context(_weights_of(module))
                    # As accelerate sends what a forward is given.
                    args = [a.to(device) if isinstance(a, Tensor) else a for a in args]
                    kwargs = {
                        k: v.to(device) if isinstance(v, Tensor) else v for k, v in kwargs.items()
                    }
            return method(self, *args, **kwargs)

    return with_weights


def is_offloaded(module: nn.Module) -> bool:
    """Return whether some weights of a module, or of the modules in it, are not there."""
    return any(map(_on_meta, module.modules()))


def running_device(model: nn.Module) -> torch.device:
    """Return the device on which a model takes its inputs, also if some of its weights are elsewhere."""
    device = next(model.parameters()).device
    if device.type != "meta":
        return device
    hooks = (getattr(module, "_hf_hook", None) for module in model.modules())
    found = (getattr(hook, "execution_device", None) for hook in hooks)
    return torch.device(next((device for device in found if device is not None), "cpu"))


def computing_type(layer: nn.Module) -> torch.dtype:
    """Return the type in which a layer's forward finds its weight."""
    registry = getattr(layer, "_diffusers_hook", None)
    hook = None if registry is None else registry.get_hook("layerwise_casting")
    return layer.weight.dtype if hook is None else hook.compute_dtype


def _on_meta(module: nn.Module) -> bool:
    # By hand: named_parameters would take as long as looking up a code.
    tensors = chain(module._parameters.values(), module._buffers.values())
    return any(tensor is not None and tensor.device.type == "meta" for tensor in tensors)


@contextmanager
def _weights_of(module: nn.Module) -> Iterator[torch.device]:
    """Bring the weights of one module while the block runs; gives their device."""
    module._hf_hook.pre_forward(module)
    try:
        yield next(chain(module.parameters(False), module.buffers(False))).device
    finally:
        module._hf_hook.post_forward(module, None)
