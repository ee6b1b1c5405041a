"""May a kernel be called without torch's dispatcher? Where nothing listens, its Python side costs 6 us a call for nothing.

Everything that must see an operation (autograd, forward-mode AD, vmap, tracers, fake tensors, functionalization, dispatch
modes, lazy negation) announces itself by a dispatch key, on the tensor or on the thread. So the sets of keys are compared
with those of plain tensors on a plain thread, as a whole: what is not known here takes the dispatcher. So do inputs of a
subclass, whose results are of it too; only a TorchFunctionMode does not see these calls.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

_keys_of = torch._C._dispatch_keys  # names of this file: to look them up in torch._C takes as long as to call them
_keys_of_thread = torch._C._dispatch_tls_local_include_set
_profiled = torch._C._autograd._profiler_enabled
_grad_enabled = torch.is_grad_enabled
_TYPES = (Tensor, nn.Parameter)


def _keys_on(device: str, inference: bool) -> int:
    """Of a plain tensor on "CPU" or "CUDA", by the names of its keys: no GPU is needed to know them."""
    keys = 0
    for name in (device, f"Autocast{device}", *(() if inference else (f"Autograd{device}", "ADInplaceOrView"))):
        keys |= torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, name)).raw_repr()
    return keys


def _plain_sets() -> tuple[frozenset[int], frozenset[int]]:
    tensors, threads = set(), set()
    for inference in (False, True):
        with torch.inference_mode(inference):
            tensors.add(_keys_of(torch.empty(0)).raw_repr())
            threads.add(_keys_of_thread().raw_repr())
    if tensors == {_keys_on("CPU", False), _keys_on("CPU", True)}:  # the names mean what they meant
        tensors |= {_keys_on("CUDA", False), _keys_on("CUDA", True)}
    return frozenset(tensors), frozenset(threads)


_PLAIN_TENSORS, _PLAIN_THREADS = _plain_sets()


def applies(x: Tensor, values: Tensor, bias: Tensor | None, other: Tensor | None = None) -> bool:
    """True where calling the kernel itself does all that calling the operation would.

    Args:
        other: one more tensor that the operation takes: a residual, or scales.
    """
    return (
        type(x) in _TYPES
        and _keys_of(x).raw_repr() in _PLAIN_TENSORS
        and _keys_of(values).raw_repr() in _PLAIN_TENSORS
        and (bias is None or _keys_of(bias).raw_repr() in _PLAIN_TENSORS)
        and (other is None or _keys_of(other).raw_repr() in _PLAIN_TENSORS)
        and _keys_of_thread().raw_repr() in _PLAIN_THREADS
        and not (
            _grad_enabled()
            and (
                x.requires_grad
                or values.requires_grad
                or (bias is not None and bias.requires_grad)
                or (other is not None and other.requires_grad)
            )
        )
        and forward_ad._current_level < 0
        and not _profiled()  # profilers show operations by name
    )


def require_tensors(*given: object) -> None:
    """Raises TypeError unless all that is given is a tensor or None."""
    others = [type(each).__name__ for each in given if each is not None and not isinstance(each, Tensor)]
    if others:
        raise TypeError(f"x, bias and residual are tensors, not {' and '.join(others)}.")
