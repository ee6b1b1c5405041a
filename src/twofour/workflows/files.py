"""save and load: a whole model in one safetensors file, compressed weights as values and metadata."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ModelError, UnsupportedError
from ..format import SparseMatrix, file
from ..kernels import KERNELS, SCALED, LinearSpec, choose
from ..kernels.ops import TRAINABLE
from ..masks import check_pattern
from ..nn import QuantizedSparseLinear, SparseLinear
from ..nn.fused import unfuse
from ..nn.survey import dtype_name, is_linear_like, survey
from ..nn.swap import replace_module, why_not_swappable
from ..pattern import Pattern
from ..report import Column, Report, environment
from .explain import decisions

_RUN_DENSE = "dense"
_RUN_SPARSE = "sparse"
_RUN_ONEDNN = "onednn"
_SCALES = ".scales"


def save(model: nn.Module, path: str | os.PathLike[str], *, pattern: Pattern | str = "2:4") -> Report:
    """Writes every parameter and persistent buffer of `model` to one safetensors file; see format/SPEC.md.

    SparseLinear weights, and Linear weights that hold `pattern`, are stored compressed; the file remembers which of them
    ran dense, and on which kernel. Shared weights are stored once. The file appears whole or not at all.

    Args:
        model: any nn.Module; not on the meta device.
        path: usually "….safetensors".
        pattern: what a Linear that runs dense is checked for.
    Returns:
        Report with a row per compressed weight (bytes dense and stored), and the file's size.
    Raises:
        ModelError: a tensor without storage. UnsupportedError: a module with extra state that is no tensor.
        TwofourError: the file cannot be written (says why; an existing file is left as it was).
    Cost: a pass over the Linear weights for the check, and the writing.
    """
    pattern = Pattern.parse(pattern)
    tensors, aliases = _own_tensors(model)
    matrices: dict[str, SparseMatrix] = {}
    notes: dict[str, dict[str, Any]] = {}
    stored: dict[int, str] = {}
    for layer in survey(model, pattern, skip_heads=False):
        if not is_linear_like(layer):
            continue
        name = _join(layer.names[0], "weight")
        for other in layer.names[1:]:
            aliases[_join(other, "weight")] = name
        if isinstance(layer.module, SparseLinear):
            key = layer.module.values.data_ptr()
            if key and key in stored:
                aliases[name] = stored[key]
                continue
            stored[key] = name
            is_dense = KERNELS[layer.module.backend].dense
            matrices[name], notes[name] = layer.module.matrix, {"run": _RUN_ONEDNN if is_dense else _RUN_SPARSE}
            if isinstance(layer.module, QuantizedSparseLinear):
                tensors[name + _SCALES] = layer.module.scales
                notes[name].update(scales=name + _SCALES, dtype=dtype_name(layer.module.dtype))
        elif layer.skip is None and name in tensors and check_pattern(layer.weight, pattern).holds:
            matrices[name] = SparseMatrix.from_dense(tensors.pop(name), pattern, name=name)
            notes[name] = {"run": _RUN_DENSE}
    aliases = {name: _final(name, aliases) for name in aliases}
    file.write(path, matrices, tensors, notes=notes, aliases=aliases)
    rows = tuple(
        {
            "weight": name,
            "shape": "x".join(map(str, matrix.shape)),
            "run": notes[name]["run"],
            "dense_bytes": matrix.out_features * matrix.in_features * matrix.dtype.itemsize,
            "bytes": matrix.nbytes,
        }
        for name, matrix in matrices.items()
    )
    dense_bytes = sum(row["dense_bytes"] for row in rows)
    summary = {
        "file": os.fspath(path),
        "file bytes": os.path.getsize(path),
        "compressed weights": len(rows),
        "their bytes dense": dense_bytes,
        "their bytes stored": sum(row["bytes"] for row in rows),
    }
    return Report("save", _COLUMNS, rows, summary, (), environment())


def load(model: nn.Module, path: str | os.PathLike[str], *, strict: bool = True) -> Report:
    """Fills `model`, in place, from a file that `save` wrote; every tensor takes the file's dtype.

    Fused activations are taken out first: fuse after loading.

    Parameter objects are replaced (their requires_grad stays): make optimizers after load, not before.

    Compressed weights become SparseLinear layers, except those that ran dense when they were saved. Tensors are mapped
    from the file and read when first used; a model on the meta device is filled without being allocated first.

    Args:
        model: the same architecture, dense or compressed, with any weights; each layer keeps its device (meta -> CPU).
        path: the file.
        strict: raise when the file and the model do not have the same tensors; False reports them instead.
    Returns:
        Report with a row per compressed weight.
    Raises:
        FormatError: a malformed file; names the fault.
        ModelError: tensors missing from the file or from the model, shapes that differ, matrices of 8 bits without
            scales for layers, tensors that would stay on the meta device, a model that is itself the layer to replace.
        UnsupportedError: no kernel runs a matrix of the file.
        The model is unchanged after every error.
    """
    contents = file.read(path)
    slots = _slots(model)
    plan: dict[str, str] = {name: name for name in (*contents.matrices, *contents.tensors)}
    plan.update(contents.aliases)
    for note in contents.notes.values():
        if isinstance(note.get("scales"), str) and note["scales"] not in slots:
            plan.pop(note["scales"], None)  # part of a matrix
    missing = sorted(set(slots) - set(plan))
    unexpected = sorted(set(plan) - set(slots))
    if strict and (missing or unexpected):
        raise ModelError(
            f"{os.fspath(path)} does not fit the model: {_some('missing from the file', missing)}"
            f"{'; ' if missing and unexpected else ''}{_some('not in the model', unexpected)}."
            " The model is unchanged; strict=False loads what fits."
        )
    plan = {name: source for name, source in plan.items() if name in slots}
    for name, source in plan.items():
        if source in contents.matrices:
            shape: tuple[int, ...] = contents.matrices[source].shape
        elif source in contents.tensors:
            shape = tuple(contents.tensors[source].shape)
        else:
            raise ModelError(f"'{name}' stands for '{source}' in {os.fspath(path)}, a part of a matrix and no weight.")
        if shape != slots[name].shape:
            raise ModelError(
                f"'{name}' is {list(shape)} in {os.fspath(path)} and {list(slots[name].shape)} in the model."
            )
    for name, source in plan.items():
        _require_fillable(model, name, slots[name], source, contents)
    left = [name for name, tensor in _meta_tensors(model) if name not in plan]
    if left:
        raise ModelError(
            f"{_some('would stay on the meta device', left)}: the file does not have them. Build the model on the CPU."
        )
    unfuse(model)
    rows = _fill(model, slots, plan, contents)
    notes = tuple(_some(what, names) for what, names in (("missing", missing), ("unexpected", unexpected)) if names)
    summary = {"file": os.fspath(path), "tensors": len(plan), "compressed weights": len(rows)}
    return Report("load", _COLUMNS, tuple(rows), summary, notes, environment())


_COLUMNS = (
    Column("weight", "weight"),
    Column("shape", "shape"),
    Column("run", "runs"),
    Column("kernel", "kernel"),
    Column("dense_bytes", "dense", "bytes"),
    Column("bytes", "stored", "bytes"),
    Column("reason", "why"),
)


@dataclass(frozen=True)
class _Slot:
    """A place in a model that a tensor of the file goes to."""

    module: nn.Module
    attribute: str
    shape: tuple[int, ...]
    device: torch.device


def _own_tensors(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Parameters and persistent buffers by name (without SparseLinear weights), and aliases of those that are shared."""
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    first: dict[int, str] = {}
    for module_name, module in model.named_modules(remove_duplicate=False):
        if type(module).get_extra_state is not nn.Module.get_extra_state:
            raise UnsupportedError(
                f"'{module_name}' ({type(module).__name__}) has extra state that is not a tensor: a safetensors file cannot"
                " hold it. Save it on its own."
            )
        for attribute, tensor in _persistent(module):
            name = _join(module_name, attribute)
            if tensor.is_meta:
                raise ModelError(f"'{name}' is on the meta device: there is nothing to save yet. Load the model first.")
            if id(tensor) in first:
                aliases[name] = first[id(tensor)]
            else:
                first[id(tensor)] = name
                tensors[name] = tensor.detach()
    return tensors, aliases


def _persistent(module: nn.Module) -> list[tuple[str, Tensor]]:
    own = {"values"} if isinstance(module, SparseLinear) else set()  # its weight, also where it is trained
    parameters = [
        (name, tensor) for name, tensor in module._parameters.items() if tensor is not None and name not in own
    ]
    buffers = [
        (name, tensor)
        for name, tensor in module._buffers.items()
        if tensor is not None and name not in module._non_persistent_buffers_set
    ]
    return [*parameters, *buffers]


def _slots(model: nn.Module) -> dict[str, _Slot]:
    slots: dict[str, _Slot] = {}
    for module_name, module in model.named_modules(remove_duplicate=False):
        for attribute, tensor in _persistent(module):
            slots[_join(module_name, attribute)] = _Slot(module, attribute, tuple(tensor.shape), tensor.device)
        if isinstance(module, SparseLinear):
            shape = (module.out_features, module.in_features)
            slots[_join(module_name, "weight")] = _Slot(module, "weight", shape, module.values.device)
    return slots


def _runs_sparse(slot: _Slot, source: str, contents: file.Contents) -> bool:
    """True where a SparseLinear is to run what the file stores for the slot."""
    if source not in contents.matrices or _ran_dense(source, contents) or slot.attribute != "weight":
        return False
    module = slot.module
    return isinstance(module, SparseLinear) or (isinstance(module, nn.Linear) and why_not_swappable(module) is None)


def _ran_dense(source: str, contents: file.Contents) -> bool:
    return contents.notes.get(source, {}).get("run") == _RUN_DENSE


def _backend(matrix: SparseMatrix, source: str, contents: file.Contents) -> str | None:
    """The dense kernel where the layer ran on it when it was saved and it runs here too; else None, for the best."""
    ran_on_it = contents.notes.get(source, {}).get("run") == _RUN_ONEDNN
    return "onednn" if ran_on_it and KERNELS["onednn"].why_not(LinearSpec.of(matrix)) is None else None


def _require_fillable(model: nn.Module, name: str, slot: _Slot, source: str, contents: file.Contents) -> None:
    """Raises for what `_fill` could not do, before it changes anything."""
    is_layer = slot.attribute == "weight" and isinstance(slot.module, (nn.Linear, SparseLinear))
    if not is_layer:
        return
    sparse = _runs_sparse(slot, source, contents)
    if sparse:
        matrix = contents.matrices[source]
        scales = _scales(source, contents)
        if matrix.dtype.itemsize == 1 and (matrix.dtype not in SCALED or scales is None):
            raise ModelError(
                f"'{name}' is stored as {dtype_name(matrix.dtype)}{'' if scales is not None else ' without scales'}, which no"
                " layer runs: read it with twofour.load_matrices(path). The model is unchanged."
            )
        if scales is None:
            choose(LinearSpec.of(matrix))  # refuses what no kernel runs
        elif scales.dtype != torch.float32 or tuple(scales.shape) != (matrix.out_features,):
            raise ModelError(
                f"the scales of '{name}' are {dtype_name(scales.dtype)} {list(scales.shape)}: they must be float32"
                f" [{matrix.out_features}]. The model is unchanged."
            )
        if slot.module is model and isinstance(model, QuantizedSparseLinear) != (scales is not None):
            raise ModelError(
                f"a bare {type(model).__name__} cannot take {dtype_name(matrix.dtype)} weights in place: load into a module"
                " that holds it."
            )
    if slot.module is model and sparse != isinstance(model, SparseLinear):
        if sparse:
            raise ModelError("a bare Linear cannot become a SparseLinear in place: load into a module that holds it.")
        if isinstance(model, SparseLinear):
            raise ModelError("a bare SparseLinear cannot become dense in place: load into a module that holds it.")


def _fill(
    model: nn.Module, slots: dict[str, _Slot], plan: dict[str, str], contents: file.Contents
) -> list[dict[str, Any]]:
    parameters: dict[str, nn.Parameter] = {}
    sparse: dict[str, SparseLinear] = {}
    dense: dict[str, nn.Parameter] = {}
    replaced: dict[nn.Module, nn.Module] = {}
    rows: list[dict[str, Any]] = []

    # Plain tensors first: a SparseLinear made below takes over the bias that its layer has then.
    for name, source in plan.items():
        slot = slots[name]
        if source in contents.matrices or (slot.attribute == "weight" and isinstance(slot.module, SparseLinear)):
            continue
        tensor = contents.tensors[source].to(_landing(slot))
        if slot.attribute in slot.module._buffers:
            slot.module._buffers[slot.attribute] = tensor
        else:
            if source not in parameters:
                old = slot.module._parameters[slot.attribute]
                wants = old is not None and old.requires_grad and tensor.is_floating_point()
                parameters[source] = nn.Parameter(tensor, requires_grad=wants)
            slot.module._parameters[slot.attribute] = parameters[source]

    for name, source in plan.items():
        slot = slots[name]
        if slot.module in replaced:
            continue
        if source not in contents.matrices:
            if slot.attribute == "weight" and isinstance(slot.module, SparseLinear):
                replaced[slot.module] = _densify(model, slot.module, contents.tensors[source].to(_landing(slot)))
            continue
        matrix = contents.matrices[source]
        landing = _landing(slot)
        if matrix.device != landing:
            matrix = matrix.to(landing)
        module = slot.module
        row: dict[str, Any] = {
            "weight": name,
            "shape": "x".join(map(str, matrix.shape)),
            "run": _RUN_SPARSE if _runs_sparse(slot, source, contents) else _RUN_DENSE,
            "dense_bytes": matrix.out_features * matrix.in_features * matrix.dtype.itemsize,
            "bytes": matrix.nbytes,
        }
        if row["run"] == _RUN_SPARSE:
            bias = getattr(module, "bias", None)
            new = sparse[source].twin(bias) if source in sparse else _layer(matrix, bias, source, contents)
            trained = isinstance(module, SparseLinear) and module.values.requires_grad
            if trained and source not in sparse and new.backend in TRAINABLE:
                new.requires_grad_values(not isinstance(new, QuantizedSparseLinear))
            sparse.setdefault(source, new)
            _put(model, module, new)
            replaced[module] = new
            choice = new.choice
            reason = "was faster than sparse where it was compressed" if choice.kernel.dense else choice.reason
            row.update(kernel=choice.kernel.label(), reason=reason)
            decisions[new] = reason
        else:
            if source not in dense:
                weight = _dense(matrix, source, contents)
                old = module._parameters.get(slot.attribute)
                wants = weight.is_floating_point() and (old is None or old.requires_grad)
                dense[source] = nn.Parameter(weight, requires_grad=wants)
            if isinstance(module, SparseLinear):
                replaced[module] = _densify(model, module, dense[source])
            elif slot.attribute in module._buffers:
                module._buffers[slot.attribute] = dense[source].detach()
            else:
                module._parameters[slot.attribute] = dense[source]
            reason = "ran dense when it was saved" if _ran_dense(source, contents) else "cannot be swapped"
            row.update(kernel="dense (torch)", reason=reason)
        rows.append(row)
    return rows


def _scales(source: str, contents: file.Contents) -> Tensor | None:
    """The scales of a matrix of the file; None where it has none."""
    return contents.tensors.get(str(contents.notes.get(source, {}).get("scales")))


def _dense(matrix: SparseMatrix, source: str, contents: file.Contents) -> Tensor:
    scales = _scales(source, contents)
    if scales is None:
        return matrix.to_dense()
    dtype = getattr(torch, str(contents.notes[source].get("dtype")), torch.float32)
    return (matrix.to_dense().to(torch.float32) * scales.to(matrix.device)[:, None]).to(dtype)


def _layer(matrix: SparseMatrix, bias: Tensor | None, source: str, contents: file.Contents) -> SparseLinear:
    scales = _scales(source, contents)
    if scales is None:
        return SparseLinear(matrix, bias, backend=_backend(matrix, source, contents))
    dtype = getattr(torch, str(contents.notes[source].get("dtype")), None)
    return QuantizedSparseLinear(
        matrix, scales.to(matrix.device), bias, dtype=dtype if isinstance(dtype, torch.dtype) else None
    )


def _put(model: nn.Module, old: nn.Module, new: SparseLinear) -> None:
    """Puts `new` in the place of `old`; if `old` is the model itself, it must be a SparseLinear and takes new's weight."""
    if old is model:
        assert isinstance(old, SparseLinear)
        old._wanted_backend = new._wanted_backend
        if isinstance(old, QuantizedSparseLinear):
            old.register_buffer("scales", new.get_buffer("scales"), persistent=False)
        old._set_matrix(new.matrix)
    else:
        replace_module(model, old, new)


def _densify(model: nn.Module, layer: SparseLinear, weight: Tensor) -> nn.Module:
    linear = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta", dtype=weight.dtype)
    if not isinstance(weight, nn.Parameter):
        weight = nn.Parameter(weight, requires_grad=weight.is_floating_point())
    linear.weight = weight
    linear.register_parameter("bias", layer.bias)
    replace_module(model, layer, linear)
    return linear


def _landing(slot: _Slot) -> torch.device:
    return torch.device("cpu") if slot.device.type == "meta" else slot.device


def _meta_tensors(model: nn.Module) -> list[tuple[str, Tensor]]:
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return [(name, tensor) for name, tensor in named if tensor.is_meta]


def _final(name: str, aliases: dict[str, str]) -> str:
    """What an alias stands for in the end."""
    while name in aliases:
        name = aliases[name]
    return name


def _join(module_name: str, attribute: str) -> str:
    return f"{module_name}.{attribute}" if module_name else attribute


def _some(what: str, names: list[str]) -> str:
    if not names:
        return ""
    return f"{what}: {', '.join(repr(name) for name in names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''}"
