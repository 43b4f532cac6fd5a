"""A GPU that is not there: tensors that lie on the CPU and pass for ones on "cuda".

Fake tensors of torch do not do for training: where torch is built for CUDA and finds no card, its backward pass
refuses them. These here have values, so that a whole run goes its usual way, while every operator is checked as
CUDA would: operands of two devices, random generators of another device and NumPy's view raise, and what makes
the host wait for the device is counted by the function that does it.
"""

import importlib
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from modeling_simvq import nearest_code_triton
from tests.support.cards import H100, described, launches_noted

# The package has a function of this name.
search = importlib.import_module("modeling_simvq.nearest_code")
CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")
REPOSITORY = Path(__file__).resolve().parents[2]
aten = torch.ops.aten
# Operators whose result has a size that only the device knows, and a number read from the device.
WAITING = {
    aten._local_scalar_dense,
    aten.nonzero,
    aten.masked_select,
    aten.bincount,
    aten.unique_consecutive,
    aten._unique2,
    aten.unique_dim,
    aten.equal,
    aten.is_nonzero,
}
# The devices may differ: a copy, or indices from the CPU.
FREE = {aten.copy_, aten._to_copy}
READING = (Tensor.tolist, Tensor.numpy, Tensor.__array__)
PROPERTIES = (Tensor.device.__get__, Tensor.is_cuda.__get__, Tensor.is_cpu.__get__)
INDEXING = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_}


class PretendedGPU:
    """Account of which tensor is where, by its memory, and of what waited.

    Attributes:
        waits: times that the host waited for the device, by file and function of this repository.
        uploads: the same of copies to the device.
    """

    def __init__(self) -> None:
        self.waits: Counter[str] = Counter()
        self.uploads: Counter[str] = Counter()
        self._where: dict[int, torch.device | None] = {}  # None: made inside an operator

    def device_of(self, tensor: Tensor) -> torch.device | None:
        """Return where a tensor is; None for one that only an operator has seen, which goes with any."""
        return self._where.get(tensor.untyped_storage()._cdata, CPU)

    def put(self, tree: object, device: torch.device | None) -> None:
        """Say where the tensors in a result are."""
        for tensor in tensors_in(tree):
            self._where[tensor.untyped_storage()._cdata] = device

    def wait(self) -> None:
        self.waits[_line()] += 1

    def moved(self, tensor: Tensor, device: torch.device) -> Tensor:
        """Return a tensor on a device: itself if it is there."""
        there = self.device_of(tensor)
        if there == device:
            return tensor
        new = tensor.clone()
        if there == CUDA:
            self.wait()
        elif device == CUDA:
            self.uploads[_line()] += 1
        self.put(new, device)
        return new


class Operators(TorchDispatchMode):
    """Every operator, of backward passes too: checks the devices of its operands and follows its results."""

    def __init__(self, gpu: PretendedGPU):
        super().__init__()
        self.gpu = gpu

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        packet = func.overloadpacket
        operands = tensors_in((args, kwargs))
        known = [(t, place) for t in operands if (place := self.gpu.device_of(t)) is not None]
        device = self._common(func, packet, known, args)
        if device == CUDA and (packet in WAITING or self._picks_by_mask(packet, args)):
            self.gpu.wait()
        if packet is aten.copy_ and len(known) == 2 and known[0][1] != known[1][1]:
            counted = self.gpu.uploads if known[0][1] == CUDA else self.gpu.waits
            counted[_line()] += 1
        generator = kwargs.get("generator")
        if generator is not None and device is not None and generator.device.type != device.type:
            raise RuntimeError(f"{func}: generator of {generator.device}, tensors of {device}")
        before = {t.untyped_storage()._cdata for t in operands}
        result = func(*args, **kwargs)
        for tensor in tensors_in(result):
            key = tensor.untyped_storage()._cdata
            if key not in before or self.gpu._where.get(key, CPU) is None:
                self.gpu.put(tensor, device)
        return result

    def _common(self, func, packet, known: list, args: tuple) -> torch.device | None:
        if packet in FREE:
            return known[0][1] if known else None
        if packet in INDEXING:  # indices may be on the CPU
            return self.gpu.device_of(args[0])
        # A number from the CPU goes with tensors of any device, element by element.
        pointwise = torch.Tag.pointwise in func.tags or "_foreach" in str(packet)
        places = {place for t, place in known if not (pointwise and t.ndim == 0 and place == CPU)}
        if len(places) > 1:
            shapes = [f"{tuple(t.shape)} on {place}" for t, place in known]
            raise RuntimeError(f"{func}: operands on two devices: {', '.join(shapes)}")
        return places.pop() if places else (CPU if known else None)

    @staticmethod
    def _picks_by_mask(packet, args: tuple) -> bool:
        return packet in INDEXING and any(
            t.dtype in (torch.bool, torch.uint8) for t in tensors_in(args[1])
        )


class Calls(TorchFunctionMode):
    """Calls from Python: devices that are asked for, and those that are asked about."""

    def __init__(self, gpu: PretendedGPU):
        super().__init__()
        self.gpu = gpu

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs, gpu = dict(kwargs or {}), self.gpu
        answer = self._property(func, args)
        if answer is not None:
            return answer
        name = getattr(func, "__name__", "")
        if func in (Tensor.cpu, Tensor.cuda):
            return gpu.moved(args[0], CPU if func is Tensor.cpu else CUDA)
        if func is Tensor.to:
            return self._to(args, kwargs)
        if func in READING and gpu.device_of(args[0]) == CUDA:
            if func is not Tensor.tolist:
                raise TypeError("can't convert cuda:0 device type tensor to numpy")
            gpu.wait()
        wanted = kwargs.get("device")
        operands = tensors_in((args, kwargs))
        if wanted is not None and torch.device(wanted).type == "cuda":
            kwargs["device"] = CPU
        result = func(*args, **kwargs)
        if not operands or (wanted is not None and name != "__get__"):
            place = CPU if wanted is None else _whole(wanted)
            gpu.put([t for t in tensors_in(result) if all(t is not o for o in operands)], place)
        return result

    def _property(self, func, args: tuple) -> torch.device | bool | None:
        if func not in PROPERTIES:
            return None
        device = self.gpu.device_of(args[0]) or CPU
        if func == Tensor.device.__get__:
            return device
        return device.type == ("cuda" if func == Tensor.is_cuda.__get__ else "cpu")

    def _to(self, args: tuple, kwargs: dict) -> Tensor:
        tensor, *rest = args
        device, others = kwargs.pop("device", None), []
        for value in rest:
            if isinstance(value, (str, torch.device, int)) and not isinstance(value, bool):
                device = value
            elif isinstance(value, Tensor):
                device = self.gpu.device_of(value)
                others.append(value.dtype)
            elif value is not None:
                others.append(value)
        result = tensor if device is None else self.gpu.moved(tensor, _whole(device))
        place = self.gpu.device_of(result)
        kept = {k: v for k, v in kwargs.items() if k != "non_blocking"}
        others = [value for value in others if not isinstance(value, bool)]
        result = result.to(*others, **kept) if others or kept else result
        if result is not tensor:
            self.gpu.put(result, place)
        return result


def tensors_in(tree: object) -> list[Tensor]:
    """Return the tensors in nested arguments or results."""
    return [leaf for leaf in tree_flatten(tree)[0] if isinstance(leaf, Tensor)]


@contextmanager
def pretended_gpu() -> Iterator[PretendedGPU]:
    """Let "cuda" be a device on which torch computes, and a card of which it can be asked."""
    gpu = PretendedGPU()

    make_autocast = torch.autocast.__init__

    def autocast(self: torch.autocast, device_type: str, *args, **kwargs) -> None:
        """Cast what is computed for "cuda" where it is computed."""
        make_autocast(self, "cpu" if device_type == "cuda" else device_type, *args, **kwargs)

    group = torch._C._group_tensors_by_device_and_dtype

    def grouped(lists: list[list[Tensor]], *args) -> dict:
        """Group as torch does, whose C++ sees the tensors where they lie."""
        return {
            (gpu.device_of(found[0][0]) or CPU, dtype): (found, numbers)
            for (_, dtype), (found, numbers) in group(lists, *args).items()
        }

    def search_gpu(queries: Tensor, codes: Tensor) -> Tensor:
        """Search as on a card up to the kernels' launches, and find without them."""
        with launches_noted() as launches:
            found = nearest_code_triton.search_gpu(queries, codes)
        assert len(launches) >= 2 or not len(queries)
        queries, codes = queries.double(), codes.double()
        return found.copy_((queries @ codes.T - codes.square().sum(dim=1) / 2).argmax(dim=1))

    with ExitStack() as stack:
        stack.enter_context(described(H100))
        stack.enter_context(mock.patch.object(search, "search_gpu", search_gpu))
        stack.enter_context(mock.patch.object(torch.autocast, "__init__", autocast))
        grouping = "_group_tensors_by_device_and_dtype"
        stack.enter_context(mock.patch.object(torch._C, grouping, grouped))
        state = torch.get_rng_state()
        stack.enter_context(mock.patch.object(torch.cuda, "get_rng_state", lambda device: state))
        stack.enter_context(mock.patch.object(torch.cuda, "set_rng_state", lambda state, device: 0))
        # Its weights are laid out by an operator that only CUDA has.
        stack.enter_context(
            mock.patch.object(torch.backends.cudnn, "is_acceptable", lambda t: False)
        )
        stack.enter_context(Operators(gpu))
        stack.enter_context(Calls(gpu))
        yield gpu


def waits_of(gpu: PretendedGPU, action: Callable[[], object]) -> Counter[str]:
    """Return what waits while something is done, by function."""
    before = gpu.waits.copy()
    action()
    return gpu.waits - before


def _whole(device: object) -> torch.device:
    return CUDA if isinstance(device, int) or torch.device(device).type == "cuda" else CPU


def _line() -> str:
    """File and function of this repository that is being run, outside the tests."""
    frame = sys._getframe(1)
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if path.is_relative_to(REPOSITORY):
            relative = path.relative_to(REPOSITORY)
            if relative.parts[0] in ("training", "modeling_simvq", "hub_cards"):
                return f"{relative}:{frame.f_code.co_name}"
        frame = frame.f_back
    return "a library"
