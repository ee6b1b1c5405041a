"""CPU kernels (csrc/bindings.cpp). Addresses and sizes in, nothing checked that needs the tensors: use kernels.cpu."""

def isa() -> str:
    """Instruction set that runs by default: the best one here, or TWOFOUR_ISA (ValueError when that cannot run)."""

def isas() -> list[str]:
    """Instruction sets that are compiled in and run here, plainest first."""

def threads_source() -> str:
    """Whose threads run the kernels: "libgomp" (torch's own workers) or "pool"."""

def last_kernel() -> str:
    """What the calling thread ran last, as "isa/few" or "isa/many"; "" before its first call."""

def pack_linear(
    values: int,
    metadata: int,
    packed_values: int,
    packed_metadata: int,
    out_features: int,
    in_features: int,
    itemsize: int,
) -> None:
    """Canonical format -> CPU layout (csrc/nm/layout.h)."""

def unpack_linear(
    packed_values: int,
    packed_metadata: int,
    values: int,
    metadata: int,
    out_features: int,
    in_features: int,
    itemsize: int,
) -> None:
    """CPU layout -> canonical format."""

def linear(
    x: int,
    values: int,
    metadata: int,
    bias: int,
    y: int,
    tokens: int,
    out_features: int,
    in_features: int,
    x_stride: int,
    y_stride: int,
    dtype: int,
    threads: int,
    kernel: int = 0,
    isa: str | None = None,
    bias_dtype: int = 0,
) -> None:
    """y = x @ W.T + bias. Dtypes: 0 fp32, 1 bf16. bias 0: none. kernel: 0 automatic, 1 few, 2 many. Strides in elements."""

def int8_isa() -> str:
    """Instruction set that int8 kernels run on by default; ValueError as `isa`."""

def int8_isas() -> list[str]:
    """Instruction sets with int8 kernels that run here, plainest first."""

def pack_linear_int8(
    values: int, metadata: int, packed_values: int, packed_metadata: int, out_features: int, in_features: int
) -> None:
    """Canonical format -> int8 layout (csrc/cpu/linear_int8.h)."""

def unpack_linear_int8(
    packed_values: int, packed_metadata: int, values: int, metadata: int, out_features: int, in_features: int
) -> None:
    """int8 layout -> canonical format."""

def linear_int8(
    x: int,
    values: int,
    metadata: int,
    scales: int,
    bias: int,
    y: int,
    tokens: int,
    out_features: int,
    in_features: int,
    x_stride: int,
    y_stride: int,
    dtype: int,
    threads: int,
    kernel: int = 0,
    isa: str | None = None,
) -> None:
    """y = quantized(x) @ W.T * scales + bias. scales and bias fp32; the rest as in `linear`."""
