"""CPU kernels (csrc/bindings.cpp). Addresses and sizes in, nothing checked that needs the tensors: use kernels.cpu."""

def isa() -> str:
    """Instruction set that runs by default: the best one here, or TWOFOUR_ISA (ValueError when that cannot run)."""

def isas() -> list[str]:
    """Instruction sets that are compiled in and run here, plainest first."""

def threads_source() -> str:
    """Whose threads run the kernels: "libgomp" (torch's own workers) or "pool"."""

def last_kernel() -> str:
    """What the calling thread ran last: "isa/few", "isa/many", "isa/grad_input" or "isa/grad_values", or "" at first."""

def window_rows() -> int:
    """Rows inside which an order moves them: masks.rows.WINDOW_ROWS."""

def order_rows(metadata: int, out_features: int, in_features: int, shared: int, order: int) -> bool:
    """Writes an order in which `shared` neighbours have one mask, a byte for each row of the tiles; False without one."""

def pack_linear(
    values: int,
    metadata: int,
    packed_values: int,
    packed_metadata: int,
    out_features: int,
    in_features: int,
    itemsize: int,
    shared: int = 1,
    order: int = 0,
) -> None:
    """Canonical format -> CPU layout (csrc/nm/layout.h). order 0: none."""

def unpack_linear(
    packed_values: int,
    packed_metadata: int,
    values: int,
    metadata: int,
    out_features: int,
    in_features: int,
    itemsize: int,
    shared: int = 1,
    order: int = 0,
) -> None:
    """CPU layout -> canonical format."""

def ask_for_huge_pages(buffer: int, bytes: int) -> None:
    """Under a buffer that was not written to yet; does nothing where it cannot."""

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
    shared: int = 1,
    activation: int = 0,
    residual: int = 0,
    residual_stride: int = 0,
    order: int = 0,
    scales: int = 0,
) -> None:
    """y = activation(x @ W.T + bias) + residual. bias 0: none.

    Dtypes: 0 fp32, 1 bf16; bf16 weights and fp32 tokens 2; float8_e4m3fn weights and tokens of fp32 3, of bf16 4.
    Strides in elements.

    kernel: 0 automatic, 1 few, 2 many.
    shared: 1, 2 or 4 neighbouring rows have one mask, as in pack_linear; order as there.
    activation: 0 none, 1 relu, 2 gelu by erf, 3 gelu by tanh, 4 silu. residual 0: none; of y's dtype, not y itself.
    scales 0: none; float32 [out_features], what sums are multiplied with before the bias is added.
    """

def grad_input(
    grad: int,
    values: int,
    metadata: int,
    grad_x: int,
    tokens: int,
    out_features: int,
    in_features: int,
    grad_stride: int,
    x_stride: int,
    dtype: int,
    threads: int,
    isa: str | None = None,
) -> None:
    """grad_x = grad @ W, W in the CPU layout. Dtypes: 0 fp32, 1 bf16. Strides in elements."""

def grad_values(
    grad: int,
    x: int,
    metadata: int,
    grad_values: int,
    tokens: int,
    out_features: int,
    in_features: int,
    grad_stride: int,
    x_stride: int,
    dtype: int,
    threads: int,
    isa: str | None = None,
) -> None:
    """grad_values = (grad.T @ x) at the kept places, in the CPU layout. Dtypes and strides as in grad_input."""

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

def masks_isas() -> list[str]:
    """Instruction sets that choose masks and run here, plainest first."""

def transposable_2_4(
    scores: int, mask: int, rows: int, columns: int, stride: int, itemsize: int, threads: int, isa: str | None = None
) -> None:
    """The best mask with two of four in both axes (csrc/cpu/masks.h). Scores of 4 or 8 bytes, `stride` in elements."""

def best_of_groups(
    scores: int,
    mask: int,
    kept: int,
    rows: int,
    columns: int,
    stride: int,
    kept_stride: int,
    itemsize: int,
    keep: int,
    group: int,
    shared: int,
    magnitude: bool,
    threads: int,
    isa: str | None = None,
) -> None:
    """The best of each group (csrc/cpu/masks.h), as a mask and as the scores that are kept; mask or kept 0: not wanted."""

def transposable_blocks(
    scores: int,
    mask: int,
    rows: int,
    columns: int,
    stride: int,
    itemsize: int,
    keep: int,
    group: int,
    threads: int,
) -> None:
    """The best mask with `keep` of `group` in both axes (csrc/cpu/masks.h)."""

def permute(
    columns: int,
    order: int,
    channels: int,
    rows: int,
    keep: int,
    group: int,
    sweeps: int,
    seconds: float,
    seed: int,
    threads: int,
    isa: str | None = None,
) -> int:
    """Improves a permutation of channels for keep:group; returns how many swaps it took (csrc/cpu/permute.h).

    columns: [channels, rows] fp32, finite and not negative, rows a multiple of 16. order: [channels] int64, in and out.
    """
