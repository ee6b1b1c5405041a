"""Which weights NVIDIA's kernels can run, on which GPUs, and why not the others."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ..tracing import constant
from . import torch_operations

if TYPE_CHECKING:
    from ..registry import LinearSpec

LAYER_DTYPES = (torch.float16, torch.bfloat16)
"""Of layers: their inputs have the weight's dtype, and so have their results."""

DTYPES = (*LAYER_DTYPES, torch.int8, torch.float8_e4m3fn)

_FIRST_CUSPARSELT = 602
"""0.4.0, which torch built for CUDA 11.8 carries, sums products of 16 bits in 16 bits."""

_FIRST_OF_CAPABILITY = {(10, 0): 700, (12, 0): 700, (10, 1): 800, (11, 0): 800, (12, 1): 800}
"""As its release notes have it. 0.8.0 promises to run on what comes after it."""

_FIRST_FLOAT8_8_9 = 800

_FAULTY = {(800, torch.float16, 9)}
"""Version, dtype and major compute capability that end in an illegal instruction, after which every call of the process
fails: seen on an H200 with torch 2.11 for CUDA 13, the search or the product, which were not told apart. Other combinations
were not seen to fail. By the release notes 0.8.0 brought new float16 kernels for 9.0, and 0.8.1 (pytorch#177456) mended the
speed of Hopper's; they do not speak of this."""

_CUTLASS_DTYPES = (torch.float16, torch.bfloat16, torch.int8)


def why_not(spec: LinearSpec, inputs: torch.dtype | None = None) -> str | None:
    """None where cuSPARSELt or CUTLASS runs this weight; otherwise why neither does. No shape is refused: zeros pad it.

    Args:
        inputs: dtype of what the weight is multiplied with. None is a layer, whose inputs are floating point of 16 bits
            or more: an int8 or float8 weight is refused then. Ask for it with its own dtype, the only one that `products`
            takes.
    """
    if spec.device.type != "cuda":
        return f"the weight is on {spec.device}"
    if spec.out_features == 0 or spec.in_features == 0:
        return "the weight is empty"
    if (spec.pattern.keep, spec.pattern.group) != (2, 4):
        return f"pattern {spec.pattern} has no kernel of NVIDIA's, only 2:4"
    if spec.dtype not in DTYPES:
        return f"{_name(spec.dtype)} has no kernel of NVIDIA's for 2:4, only {', '.join(map(_name, DTYPES))}"
    if inputs is None and spec.dtype not in LAYER_DTYPES:
        return f"{_name(spec.dtype)} weights take {_name(spec.dtype)} inputs there, and a layer's have 16 bits or more"
    if inputs not in (None, spec.dtype):
        return f"{_name(spec.dtype)} weights take {_name(spec.dtype)} inputs there, not {_name(inputs)}"
    return device_why_not(spec.dtype, spec.device)


def library(dtype: torch.dtype, device: torch.device) -> str:
    """ "cuSPARSELt" or "CUTLASS", whichever is to hold a weight that one of them can."""
    return "cuSPARSELt" if cusparselt_why_not(dtype, device) is None else "CUTLASS"


def label() -> str:
    """ "cuSPARSELt 0.8.1", or "CUTLASS" where torch has no cuSPARSELt that is recent enough."""
    found = torch_operations.installed()
    if found.cusparselt is not None and found.cusparselt >= _FIRST_CUSPARSELT:
        return f"cuSPARSELt {version()}"
    return "CUTLASS"


def version() -> str | None:
    """cuSPARSELt's, that torch was built with, as "0.8.1"; None without."""
    found = torch_operations.installed().cusparselt
    return None if found is None else _version(found)


@constant
def device_why_not(dtype: torch.dtype, device: torch.device) -> str | None:
    """None where a weight of one of DTYPES can be multiplied on a GPU; otherwise why not."""
    if torch.version.hip:
        return "torch is built for ROCm, whose hipSPARSELt was not tried"
    capability = torch_operations.installed().capability(device)
    if capability < (8, 0):
        return f"compute capability {_dotted(capability)} has no sparse tensor cores: they came with 8.0"
    if dtype == torch.float8_e4m3fn and capability < (8, 9):
        return f"compute capability {_dotted(capability)} has no tensor cores for {_name(dtype)}: they came with 8.9"
    first = cusparselt_why_not(dtype, device)
    if first is None:
        return None
    second = _cutlass_why_not(dtype, capability)
    return None if second is None else f"cuSPARSELt: {first}, and CUTLASS: {second}"


def cusparselt_why_not(dtype: torch.dtype, device: torch.device) -> str | None:
    """None where cuSPARSELt multiplies a weight of one of DTYPES on a GPU with sparse tensor cores; otherwise why not."""
    found = torch_operations.installed().cusparselt
    if found is None:
        return "this build of torch has none"
    capability = torch_operations.installed().capability(device)
    needed = _FIRST_CUSPARSELT
    if capability >= (10, 0):
        needed = _FIRST_OF_CAPABILITY.get(capability, 800)
    elif dtype == torch.float8_e4m3fn and capability == (8, 9):
        needed = _FIRST_FLOAT8_8_9
    if found < needed:
        return (
            f"{_version(found)} is too old for {_name(dtype)} on {_dotted(capability)}, {_version(needed)} is the first"
        )
    if (found, dtype, capability[0]) in _FAULTY:
        return (
            f"{_version(found)} faults in {_name(dtype)} on {_dotted(capability)} (an illegal instruction, and the process"
            " has lost its GPU): use backend='cuda', bfloat16 or a torch built with a newer one"
        )
    return None


def _cutlass_why_not(dtype: torch.dtype, capability: tuple[int, int]) -> str | None:
    reason = torch_operations.installed().cutlass
    if reason is not None:
        return reason
    if dtype not in _CUTLASS_DTYPES:
        return f"torch has none for {_name(dtype)}"
    if capability[0] != 8:
        return f"torch has it for compute capability 8.x, not {_dotted(capability)}"
    return None


def _version(number: int) -> str:
    # 0.10.0 is 1000, as 1.0.0 would be: up to now all begin with 0.
    return f"0.{number // 100}.{number % 100}"


def _dotted(capability: tuple[int, int]) -> str:
    return f"{capability[0]}.{capability[1]}"


def _name(dtype: torch.dtype | None) -> str:
    return str(dtype).removeprefix("torch.")
