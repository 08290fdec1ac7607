"""A device that is not the CPU, simulated on it: shows tensors that were left on the wrong device where no GPU is.

Tensors of it say that they lie on `DEVICE` and hold their values on the CPU. As on CUDA, operations on tensors of both
are refused, apart from copies, indices and a scalar that elementwise operations read; so are `numpy()` and a generator
of the wrong device. Numbers are the CPU's: this is about places, not kernels. It holds for the thread that enters it.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
import torch.optim.optimizer as torch_optimizer
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

from ddm_training import completion_data, matches

DEVICE = torch.device("meta")  # the one that autograd takes without a driver
COPIES = ("aten::copy_", "aten::_to_copy")
INDEXING = ("aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_", "aten::_unsafe_index")
NO_SCALARS = ("stack", "cat", "index_select", "gather", "scatter", "searchsorted", "bucketize", "mm", "bmm", "addmm")


class OtherTensor(Tensor):
    """A tensor of `DEVICE`; ``values`` has what it holds."""

    values: Tensor

    @staticmethod
    def __new__(cls, values: Tensor) -> "OtherTensor":
        made = Tensor._make_wrapper_subclass(
            cls,
            values.size(),
            strides=values.stride(),
            storage_offset=values.storage_offset(),
            dtype=values.dtype,
            layout=values.layout,
            device=DEVICE,
        )
        made.values = values
        return made

    def __repr__(self) -> str:
        return f"OtherTensor({self.values})"

    def numpy(self, *_: Any, **__: Any) -> Any:
        raise TypeError(f"a tensor of the other device, {tuple(self.shape)}, has no numpy(): copy it to the CPU first")

    def __array__(self, *_: Any, **__: Any) -> Any:
        return self.numpy()

    def tolist(self) -> Any:
        return self.values.tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _call(func, args, kwargs or {})


class OtherGenerator(torch.Generator):
    """A generator of either device, that draws on the CPU."""

    def __new__(cls, device: Any = "cpu") -> Any:
        return super().__new__(cls, "cpu")  # pyright: ignore[reportCallIssue]

    def __init__(self, device: Any = "cpu") -> None:
        self._device = torch.device(device)

    @property
    def device(self) -> torch.device:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Where it says that it lies."""
        return self._device


def _call(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """An operation of ATen on tensors of one device; its results lie there, or on the one that it is asked for."""
    name = func._schema.name
    tensors = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, Tensor)]
    others = [x for x in tensors if isinstance(x, OtherTensor)]
    wanted = None if kwargs.get("device") is None else torch.device(kwargs["device"])
    if others and name not in COPIES:
        free = {id(x) for x in tree_flatten(args[1])[0]} if name in INDEXING else set()
        takes_scalars = name.removeprefix("aten::").strip("_") not in NO_SCALARS
        written = [
            x for x, a in zip(args, func._schema.arguments) if a.alias_info is not None and a.alias_info.is_write
        ]
        here = [x for x in tensors if not isinstance(x, OtherTensor) and id(x) not in free]
        if wrong := [tuple(x.shape) for x in here if x.dim() > 0 or not takes_scalars or any(x is w for w in written)]:
            raise RuntimeError(f"{name}: tensors of two devices; of the CPU: {wrong}")
    if not others and wanted != DEVICE:
        return func(*args, **kwargs)
    if wanted is not None:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    args_here, kwargs_here = tree_map(lambda x: x.values if isinstance(x, OtherTensor) else x, (args, kwargs))
    out = func(*args_here, **kwargs_here)
    if wanted is not None and wanted != DEVICE:
        return out
    if name == "aten::copy_" and not isinstance(args[0], OtherTensor):
        return args[0]
    known = {id(x.values): x for x in others}  # what an operation in place gives back is its argument
    return tree_map(lambda x: _wrap(x, known), out)


def _wrap(value: Any, known: dict[int, OtherTensor]) -> Any:
    if not isinstance(value, Tensor):
        return value
    return known[id(value)] if id(value) in known else OtherTensor(value)


class _Operations(TorchDispatchMode):
    """Those that have no tensor to begin with."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _call(func, args, kwargs or {})


class _Functions(TorchFunctionMode):
    """What ATen does not see: generators by their device, and values that are given to a tensor on meta."""

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if (generator := kwargs.get("generator")) is not None:
            place = kwargs.get("device") or next((x.device for x in args if isinstance(x, Tensor)), "cpu")
            if torch.device(place).type != generator.device.type:
                raise RuntimeError(f"{func.__name__}: a generator on {generator.device} for a tensor on {place}")
        if func in (torch.tensor, torch.as_tensor, torch.asarray) and kwargs.get("device") is not None:
            device, requires_grad = kwargs.pop("device"), kwargs.pop("requires_grad", None)
            made = func(*args, **kwargs).to(device)
            return made if requires_grad is None else made.detach().requires_grad_(requires_grad)
        return func(*args, **kwargs)


@contextmanager
def other_device() -> Iterator[torch.device]:
    """`DEVICE` is a device that holds values, as long as this lasts; autocast and fused optimisers take it, too."""
    autocast, fused = torch.autocast, torch_optimizer._get_fused_kernels_supported_devices  # pyright: ignore[reportPrivateImportUsage]

    def autocast_here(device_type: str, *args: Any, **kwargs: Any) -> Any:
        return autocast("cpu" if device_type == DEVICE.type else device_type, *args, **kwargs)

    with (
        mock.patch.object(torch, "Generator", OtherGenerator),
        mock.patch.object(completion_data, "Generator", OtherGenerator),  # imported by name there
        mock.patch.object(matches, "Generator", OtherGenerator),
        mock.patch.object(torch, "autocast", autocast_here),
        mock.patch.object(torch_optimizer, fused.__name__, return_value=[*fused(), DEVICE.type]),
        _Functions(),
        _Operations(),
    ):
        yield DEVICE
