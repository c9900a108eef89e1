"""A device named "rehearsal", which computes on the CPU.

Like a GPU, it raises an error at an operation with tensors on two devices. It is a backend written
in Python (torch.utils.backend_registration, experimental)."""

import torch
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "rehearsal"
aten = torch.ops.aten
COPIES = [aten.copy_.default, aten._to_copy.default, aten._foreach_copy_.default]
INDEXING = [aten.index.Tensor, aten.index_put_.default, aten._index_put_impl_.default]
FACTORIES = [aten.arange.default, aten.arange.start, aten.arange.start_step, aten.eye.default]


class RehearsalTensor(torch.Tensor):
    """A tensor on the second device. Its numbers are in `on_cpu`."""

    @staticmethod
    def __new__(cls, on_cpu):
        self = torch.Tensor._make_wrapper_subclass(
            cls,
            on_cpu.size(),
            strides=on_cpu.stride(),
            storage_offset=on_cpu.storage_offset(),
            dtype=on_cpu.dtype,
            device=torch.device(NAME, 0),
        )
        self.on_cpu = on_cpu
        return self

    @classmethod
    def __torch_dispatch__(cls, operation, types, args=(), kwargs=None):
        return compute(operation, *args, **(kwargs or {}))

    # torch does not define these for such a class
    def __getitem__(self, index):
        return super().__getitem__(without_lists(index))

    def __setitem__(self, index, value):
        super().__setitem__(without_lists(index), value)

    def tolist(self):
        return self.on_cpu.tolist()

    def storage(self):
        return self.on_cpu.storage()

    def untyped_storage(self):
        return self.on_cpu.untyped_storage()

    def __format__(self, spec):
        return format(self.on_cpu, spec)


def without_lists(index):
    """Turn lists of numbers in an index into tensors."""
    if isinstance(index, tuple):
        return tuple(map(without_lists, index))
    return torch.tensor(index) if isinstance(index, list) else index


def compute(operation, *args, **kwargs):
    """Run an operation on the CPU. Returns the result on the right device."""
    values, tree = tree_flatten((args, kwargs))
    tensors = [value for value in values if isinstance(value, torch.Tensor)]
    ours = [tensor for tensor in tensors if isinstance(tensor, RehearsalTensor)]
    others = [tensor for tensor in tensors if tensor.device.type != NAME and tensor.dim() > 0]
    if operation in INDEXING and ours and args[0] is ours[0]:
        others = [tensor for tensor in others if tensor.is_floating_point()]  # no indices
    if ours and others and operation not in COPIES:
        raise RuntimeError(f"{operation}: tensors on two devices")

    device = kwargs.get("device")
    is_ours = bool(ours) if device is None else torch.device(device).type == NAME
    if is_ours and kwargs.get("generator") is not None:
        raise RuntimeError(f"{operation}: a generator on another device")

    values = [value.on_cpu if isinstance(value, RehearsalTensor) else value for value in values]
    args, kwargs = tree_unflatten(values, tree)
    if device is not None:
        kwargs["device"] = "cpu"
    result = operation(*args, **kwargs)
    if not is_ours:
        return result
    in_place = {id(tensor.on_cpu): tensor for tensor in ours}

    def as_ours(tensor):
        return in_place[id(tensor)] if id(tensor) in in_place else RehearsalTensor(tensor)

    result = tree_map_only(torch.Tensor, as_ours, result)
    for tensor in ours:
        assert tensor.shape == tensor.on_cpu.shape, f"{operation} resizes its output"
    return result


class Module:
    """The module torch.rehearsal."""

    def is_available():
        return True

    def current_device():
        return 0

    def device_count():
        return 1

    def _is_in_bad_fork():
        return False

    def get_amp_supported_dtype():
        return [torch.bfloat16]


def start():
    """Register the device in this process."""
    _setup_privateuseone_for_python_backend(NAME, backend_module=Module)
    start.libraries = torch.library.Library("_", "IMPL"), torch.library.Library("aten", "IMPL")
    everything, factories = start.libraries
    everything.fallback(compute, "PrivateUse1")
    for operation in FACTORIES:

        def implementation(*args, operation=operation, **kwargs):
            return compute(operation, *args, **kwargs)

        factories.impl(operation, implementation, "PrivateUse1")
    torch.utils._device._device_constructors()  # caches torch.tensor before it is replaced
    tensor = torch.tensor

    def tensor_on_any_device(*args, device=None, **kwargs):
        if device is None or torch.device(device).type != NAME:
            return tensor(*args, device=device, **kwargs)
        return tensor(*args, **kwargs).to(device)

    torch.tensor = tensor_on_any_device
