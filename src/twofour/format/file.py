"""N:M matrices and dense tensors in one safetensors file; SPEC.md, section 5, has the layout.

Knows names, matrices and tensors, nothing of models. A file is written whole or not at all, and mapped when it is read.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import stat
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, BinaryIO, NoReturn

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import FormatError, PatternError, ShapeError, TwofourError, UnsupportedError
from ..pattern import Pattern
from . import pack as packing
from .matrix import SparseMatrix

VERSION = 1
KEY = "twofour"
"""Where the index sits in the `__metadata__` of the safetensors header."""

_ALIGNMENT = 64
_MAX_FEATURES = 2**31 - 1
_RESERVED_NOTES = ("pattern", "shape")
_WAY_OUT = "\n  The file is damaged or was not written by twofour: fetch it again, or save the model again."

_DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.bool: "BOOL",
    torch.complex64: "C64",
}


@dataclass(frozen=True, slots=True)
class Contents:
    """What a file holds, each dictionary in the order of its names.

    Args:
        matrices: the N:M matrices, by name.
        tensors: the dense tensors beside them, by name.
        notes: what the writer noted about each matrix; `{}` where it noted nothing.
        aliases: other names for what is stored: alias -> name of a matrix or a tensor.
        extra: the other entries of the header's `__metadata__`.
    """

    matrices: dict[str, SparseMatrix]
    tensors: dict[str, Tensor]
    notes: dict[str, dict[str, Any]]
    aliases: dict[str, str]
    extra: dict[str, str]


def save_matrices(path: str | os.PathLike[str], matrices: SparseMatrix | Mapping[str, SparseMatrix]) -> None:
    """Writes one matrix (under the name "weight") or several by name; see `write` for errors."""
    write(path, {"weight": matrices} if isinstance(matrices, SparseMatrix) else matrices)


def load_matrices(path: str | os.PathLike[str]) -> dict[str, SparseMatrix]:
    """The matrices of a file by name, mapped, on the CPU; see `read` for errors.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_matrices(f"{folder}/one.safetensors", SparseMatrix.from_dense(torch.eye(4)))
    ...     load_matrices(f"{folder}/one.safetensors")
    {'weight': SparseMatrix(2:4, [4, 4], float32, 36 bytes)}
    """
    return read(path).matrices


def write(
    path: str | os.PathLike[str],
    matrices: Mapping[str, SparseMatrix],
    tensors: Mapping[str, Tensor] = {},
    *,
    extra: Mapping[str, str] = {},
    notes: Mapping[str, Mapping[str, Any]] = {},
    aliases: Mapping[str, str] = {},
) -> None:
    """Writes matrices and dense tensors to one safetensors file. Equal contents give equal bytes.

    The file is written beside `path` under a temporary name, synced to the disk, and then renamed: whatever happens on
    the way, `path` holds either the old file or the new one, whole. A symbolic link is followed.

    Args:
        path: the file; its folder must exist. An existing file is replaced and keeps its permissions.
        matrices: by name; "encoder.0.weight" is stored as "encoder.0.weight.values" and "encoder.0.weight.metadata".
        tensors: dense tensors by name; any strides, any device. Tensors that share storage are written once per name.
        extra: further entries of the header's `__metadata__`; the key "twofour" is taken.
        notes: per matrix, JSON values to keep with it, such as {"backend": "cpu"}; "pattern" and "shape" are taken.
        aliases: other names for stored things: alias -> name of a matrix or a tensor.
    Raises:
        FormatError: names that clash, are empty or taken; notes that are not JSON; an alias of nothing.
        UnsupportedError: a tensor on the meta device or not strided, a dtype that safetensors does not know.
        TwofourError: the file cannot be written (no folder, no space, no permission). Nothing is changed then.
    Cost: one pass over the bytes; tensors of other devices pass through the CPU one at a time.
    """
    if sys.byteorder != "little":
        raise UnsupportedError("twofour files are little-endian, and this machine is not.")
    stored: dict[str, Tensor] = {}
    index: dict[str, Any] = {"version": VERSION, "matrices": {}, "aliases": dict(aliases)}
    for name, matrix in matrices.items():
        stored[f"{name}.values"] = matrix.values
        stored[f"{name}.metadata"] = matrix.metadata
        entry = dict(notes.get(name, {}))
        for key in _RESERVED_NOTES:
            if key in entry:
                raise FormatError(f"notes of {name!r} use the key {key!r}, which the file uses itself: rename it.")
        index["matrices"][name] = {**entry, "pattern": str(matrix.pattern), "shape": list(matrix.shape)}
    for name in notes:
        if name not in matrices:
            raise FormatError(f"notes are given for {name!r}, which is not among the matrices.")
    try:
        _require_names(matrices, tensors, aliases)
    except _Fault as fault:
        raise FormatError(f"{fault}. Nothing was written.") from None
    stored.update(tensors)
    for name, tensor in stored.items():
        _require_storable(name, tensor)
    for key, value in extra.items():
        if not isinstance(key, str) or not isinstance(value, str):
            raise FormatError(f"extra[{key!r}] is {value!r}: safetensors holds texts only. Write it as JSON.")
        if key == KEY:
            raise FormatError(f"extra uses the key {KEY!r}, which holds the index of the file: rename it.")
    # Widest elements first: with the data on a 64-byte boundary, every tensor is aligned to its own elements.
    order = sorted(stored, key=lambda name: (-stored[name].dtype.itemsize, name))
    header = _header(stored, order, {**extra, KEY: _json(index)})
    with _replacing(os.fspath(path)) as handle:
        handle.write(header)
        for name in order:
            handle.write(_bytes(stored[name]))


def read(path: str | os.PathLike[str], *, device: str | torch.device = "cpu") -> Contents:
    """What a file holds. On the CPU every tensor is a view of the mapped file, read from the disk when first used.

    Metadata are read and checked now, values are not read (but for a "2:4t" matrix with fillers). Changing a tensor
    changes memory only, never the file. `write` may replace the file while it is mapped. A program that truncates it in
    place makes later reads of the tensors end the process (SIGBUS), as with every mapped file: replace files, do not
    rewrite them.

    Args:
        path: a file that `write` made, or another program by SPEC.md.
        device: where the tensors go.
    Raises:
        FormatError: the file is malformed; says the file, the matrix, the fault and the way out. Sizes are
            compared before any memory is taken, so a hostile file cannot claim it.
        TwofourError: the file cannot be opened.
    Cost: the header and the metadata: 1/8 of a byte per dense weight.
    """
    path = os.fspath(path)
    with _opened(path) as file:
        try:
            return _read(file, torch.device(device))
        except _Fault as fault:
            text = str(fault).rstrip(".")
            raise FormatError(f"{path!r}: {text}.{_WAY_OUT if fault.damaged else ''}") from None


class _Fault(Exception):
    """What is wrong with the contents; `write` and `read` put it in their own words."""

    def __init__(self, text: str, *, damaged: bool = True) -> None:
        super().__init__(text)
        self.damaged = damaged


# --- reading


@contextmanager
def _opened(path: str) -> Iterator[Any]:
    if not os.path.isfile(path):
        what = "no such file"
        if os.path.exists(path):
            what = "it is a folder" if os.path.isdir(path) else "it is not a regular file"
        raise TwofourError(f"cannot read {path!r}: {what}. Give the path of a .safetensors file.")
    try:
        file = safe_open(path, framework="pt")
    except OSError as error:
        raise TwofourError(f"cannot read {path!r}: {error.strerror or error}.") from error
    except SafetensorError as error:
        reason = str(error).removeprefix("Error while deserializing header: ")
        raise FormatError(
            f"{path!r} is not a safetensors file, or is truncated: {reason}. Fetch it again, or save the model again."
        ) from None
    with file as opened:
        yield opened


def _read(file: Any, device: torch.device) -> Contents:
    extra = dict(file.metadata() or {})
    if KEY not in extra:
        raise _Fault(
            "was not written by twofour: the header has no 'twofour' entry."
            " For a dense file use safetensors.torch.load_file.",
            damaged=False,
        )
    entries, aliases = _parse_index(extra.pop(KEY))
    keys = set(file.keys())
    matrices: dict[str, SparseMatrix] = {}
    notes: dict[str, dict[str, Any]] = {}
    for name in sorted(entries):
        try:
            pattern, shape, notes[name] = _parse_entry(entries[name])
            matrix = _read_matrix(file, keys, name, pattern, shape)
        except (_Fault, FormatError) as fault:
            raise _Fault(f"matrix {name!r}: {fault}") from None
        matrices[name] = matrix if device == matrix.device else matrix.to(device)
    parts = {f"{name}{suffix}" for name in matrices for suffix in (".values", ".metadata")}
    tensors = {key: file.get_tensor(key).to(device) for key in sorted(keys - parts)}
    _require_names(matrices, tensors, aliases)
    return Contents(matrices, tensors, notes, dict(sorted(aliases.items())), dict(sorted(extra.items())))


def _parse_index(text: str) -> tuple[dict[str, Any], dict[str, str]]:
    try:
        index = json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise _Fault(f"the 'twofour' entry is not JSON ({error})") from None
    if not isinstance(index, dict):
        raise _Fault(f"the 'twofour' entry is {_brief(index)}, not an object")
    version = index.get("version")
    if type(version) is not int or version < 1:
        raise _Fault(f"the version is {_brief(version)}, not a whole number from 1")
    if version > VERSION:
        raise _Fault(
            f"has version {version} of the format, this twofour reads up to {VERSION}. Upgrade: pip install -U twofour",
            damaged=False,
        )
    entries, aliases = index.get("matrices"), index.get("aliases", {})
    if not isinstance(entries, dict):
        raise _Fault(f"'matrices' is {_brief(entries)}, not an object")
    if not isinstance(aliases, dict) or not all(isinstance(target, str) for target in aliases.values()):
        raise _Fault(f"'aliases' is {_brief(aliases)}, not an object of names")
    return entries, aliases


def _parse_entry(entry: Any) -> tuple[Pattern, tuple[int, int], dict[str, Any]]:
    if not isinstance(entry, dict):
        raise _Fault(f"its entry is {_brief(entry)}, not an object")
    text: Any = entry.get("pattern")
    shape: Any = entry.get("shape")
    try:
        pattern = Pattern.parse(text)
    except PatternError as error:
        raise _Fault(str(error)) from None
    if not isinstance(shape, list) or len(shape) != 2 or not all(type(n) is int for n in shape):
        raise _Fault(f"shape is {_brief(shape)}, not [out_features, in_features]")
    if not all(0 <= n <= _MAX_FEATURES for n in shape):
        raise _Fault(f"shape is {_brief(shape)}: each number must be from 0 to {_MAX_FEATURES}")
    out_features, in_features = shape
    try:
        packing.require_groups((out_features, in_features), pattern, "shape")
    except ShapeError as error:
        raise _Fault(str(error).partition("\n")[0]) from None
    return pattern, (out_features, in_features), {k: v for k, v in entry.items() if k not in _RESERVED_NOTES}


def _read_matrix(file: Any, keys: set[str], name: str, pattern: Pattern, shape: tuple[int, int]) -> SparseMatrix:
    value_dtypes = [_DTYPE_NAMES[dtype] for dtype in packing.VALUE_DTYPES]
    for part, dtypes in (("values", value_dtypes), ("metadata", ["U8"])):
        if f"{name}.{part}" not in keys:
            raise _Fault(f"the tensor '{name}.{part}' is missing")
        found = file.get_slice(f"{name}.{part}").get_dtype()
        if found not in dtypes:
            raise _Fault(f"{part} are {found}: they must be {' or '.join(dtypes)}")
    # Mapped, not read: SparseMatrix compares the shapes before it looks at a byte.
    return SparseMatrix(file.get_tensor(f"{name}.values"), file.get_tensor(f"{name}.metadata"), pattern, shape)


def _refuse_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is not a JSON number")


def _brief(value: Any) -> str:
    """`value` for an error message: JSON, shortened."""
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


# --- writing


def _require_names(matrices: Mapping[str, object], tensors: Mapping[str, object], aliases: Mapping[str, str]) -> None:
    """Raises _Fault unless every name, part and alias is a text of its own, and every alias names something stored."""
    taken: dict[str, str] = {"__metadata__": "the header"}
    for name in matrices:
        for part, what in (
            (f"{name}", f"matrix {name!r}"),
            (f"{name}.values", f"the values of {name!r}"),
            (f"{name}.metadata", f"the metadata of {name!r}"),
        ):
            _claim(taken, name, part, what)
    for name in tensors:
        _claim(taken, name, name, f"tensor {name!r}")
    stored = set(taken)
    for name, target in aliases.items():
        _claim(taken, name, name, f"alias {name!r}")
        if target not in stored:
            raise _Fault(f"alias {name!r} stands for {target!r}, which is not stored here")


def _claim(taken: dict[str, str], name: object, part: str, what: str) -> None:
    if not isinstance(name, str) or not name:
        raise _Fault(f"{name!r} cannot be a name: names are texts that are not empty")
    if part in taken:
        raise _Fault(f"the name {part!r} is used twice, by {taken[part]} and by {what}")
    taken[part] = what


def _require_storable(name: str, tensor: Tensor) -> None:
    if tensor.is_meta:
        raise UnsupportedError(f"{name!r} is on the meta device: it has no numbers to save. Load it first.")
    if tensor.layout != torch.strided:
        raise UnsupportedError(f"{name!r} has layout {tensor.layout}: a file holds strided tensors. Call .to_dense().")
    if tensor.dtype not in _DTYPE_NAMES:
        raise UnsupportedError(f"{name!r} is {tensor.dtype}, which safetensors cannot hold. Convert it.")


def _header(stored: Mapping[str, Tensor], order: list[str], entries: Mapping[str, str]) -> bytes:
    """Length and JSON, padded with spaces so that the data start on a 64-byte boundary."""
    header: dict[str, Any] = {"__metadata__": dict(sorted(entries.items()))}
    offset = 0
    for name in order:
        tensor = stored[name]
        end = offset + tensor.numel() * tensor.dtype.itemsize
        header[name] = {"dtype": _DTYPE_NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    try:
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    except UnicodeEncodeError as error:
        raise FormatError(
            f"a name or a text is not valid Unicode: {error.object[error.start : error.end]!r}."
        ) from None
    text += b" " * (-(8 + len(text)) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def _json(index: dict[str, Any]) -> str:
    try:
        return json.dumps(index, ensure_ascii=False, allow_nan=False, sort_keys=True, separators=(",", ":"))
    except (TypeError, ValueError, RecursionError) as error:
        raise FormatError(f"notes cannot be written as JSON: {error}.") from None


def _bytes(tensor: Tensor) -> memoryview:
    whole = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous()
    return whole.reshape(-1).view(torch.uint8).numpy().data


@contextmanager
def _replacing(path: str) -> Iterator[BinaryIO]:
    """A new file that takes the place of `path` when the block ends without an error, and is removed otherwise."""
    target = os.path.realpath(path)
    folder = os.path.dirname(target)
    temporary = os.path.join(folder, f".twofour-{secrets.token_hex(8)}.tmp")
    try:
        old = os.stat(target) if os.path.exists(target) else None
        if old is not None and not stat.S_ISREG(old.st_mode):
            raise TwofourError(f"cannot write {path!r}: it is not a regular file. Nothing was changed.")
        with open(temporary, "xb") as handle:
            yield handle
            handle.flush()
            os.fsync(handle.fileno())
        if old is not None:
            shutil.copymode(target, temporary)
        os.replace(temporary, target)
    except OSError as error:
        _remove(temporary)
        raise TwofourError(f"cannot write {path!r}: {error.strerror or error}. Nothing was changed.") from error
    except BaseException:
        _remove(temporary)
        raise
    _sync_folder(folder)


def open_to_readers(path: str | os.PathLike[str]) -> None:
    """Gives a file the permissions that `open` gives new ones: those that safetensors writes are for their owner alone."""
    probe = os.path.join(os.path.dirname(os.path.abspath(path)), f".twofour-{secrets.token_hex(8)}.tmp")
    try:
        with open(probe, "xb") as handle:
            mode = stat.S_IMODE(os.fstat(handle.fileno()).st_mode)
        os.chmod(path, mode)
    finally:
        _remove(probe)


def _remove(path: str) -> None:
    with suppress(OSError):
        os.unlink(path)


def _sync_folder(folder: str) -> None:
    """Makes the rename last through a power cut; some file systems refuse, and the file is whole without it."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
