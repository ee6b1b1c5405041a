"""fuse: activations into the sparse layers before them, where the model's code shows that nothing else can notice."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from functools import partial
from typing import Any

from torch import fx, nn
from torch.nn import functional

from ..errors import ModelError
from ..nn import QuantizedSparseLinear, SparseLinear
from ..nn.fused import FusedActivation
from ..nn.swap import _HOOKS
from ..report import Column, Report, environment

_CONTAINERS = (nn.ModuleList, nn.ModuleDict)
"""Have no forward of their own: who holds them calls their modules."""


def fuse(model: nn.Module) -> Report:
    """Lets each SparseLinear, of any weights, that feeds nothing but an activation apply it in the same pass, in place.

    The activation's place is taken by an identity, so names and state dicts stay. What is fused is proven by tracing the
    forward of the module that holds both (torch.fx, everything below it as a leaf, in training and in evaluation, with
    and without optional arguments): the layer runs once, its output goes to the activation alone, and that takes no
    other input. Whatever is not proven stays, with its reason. A call from elsewhere, past that forward, is not seen.

    ReLU, GELU (by erf or tanh) and SiLU, of torch.nn and of transformers. Outputs change by rounding only: in bfloat16
    what precedes the activation is no longer rounded. While gradients are computed the layer runs the two steps apart.

    Fuse last: `compress`, `load` and `to_dense_modules` take fused activations out first, `unfuse` does nothing else.

    Args:
        model: with compressed layers.
    Returns:
        Report with a row per SparseLinear: layer, action ("fused" or "left"), activation, module, reason.
    Raises:
        ModelError: the model has no SparseLinear.

    >>> import torch, twofour
    >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 8))
    >>> reports = twofour.prune(model), twofour.compress(model, force=True)
    >>> [(row["layer"], row["action"]) for row in twofour.fuse(model).rows]
    [('0', 'fused'), ('2', 'left')]
    """
    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, SparseLinear)]
    if not layers:
        raise ModelError("there is nothing to fuse: the model has no SparseLinear. twofour.compress(model) makes them.")
    names = {module: name for name, module in model.named_modules()}
    graphs: dict[nn.Module, list[fx.Graph] | str] = {}
    rows: list[dict[str, Any]] = []
    for name, layer in layers:
        row: dict[str, Any] = {"layer": name, "action": "left", "activation": layer.activation}
        rows.append(row)
        found = _activation_after(model, names, graphs, layer)
        if isinstance(found, str):
            row["reason"] = found
            continue
        activation = activation_name(found)
        row.update(action="fused", activation=activation, module=names[found])
        layer.activation = activation
        _put(model, found, FusedActivation(found, layer))
        graphs.clear()
    columns = (
        Column("layer", "layer"),
        Column("action", "action"),
        Column("activation", "activation"),
        Column("module", "stood in"),
        Column("reason", "why not"),
    )
    fused = sum(row["action"] == "fused" for row in rows)
    return Report("fuse", columns, tuple(rows), {"layers fused": f"{fused} of {len(rows)}"}, (), environment())


def activation_name(module: nn.Module) -> str | None:
    """The kernels' name of an activation module of torch or transformers; None for what they do not have."""
    if isinstance(module, FusedActivation) or "forward" in vars(module):
        return None
    kind = f"{type(module).__module__}.{type(module).__qualname__}"
    if kind == "torch.nn.modules.activation.GELU":
        return "gelu_tanh" if module.approximate == "tanh" else "gelu"
    if kind == "transformers.activations.GELUActivation":  # or its twin in Python, the same function
        own = getattr(module, "_gelu_python", None)
        return "gelu" if module.act in (functional.gelu, own) else None
    if kind in ("transformers.activations.GELUTanh", "transformers.activations.PytorchGELUTanh"):
        act = module.act
        fast = isinstance(act, partial) and act.func is functional.gelu and act.keywords == {"approximate": "tanh"}
        return "gelu_tanh" if fast or act == getattr(module, "_gelu_tanh_python", None) else None
    return {
        "torch.nn.modules.activation.ReLU": "relu",
        "torch.nn.modules.activation.SiLU": "silu",
        "transformers.activations.NewGELUActivation": "gelu_tanh",
        "transformers.activations.FastGELUActivation": "gelu_tanh",
        "transformers.activations.SiLUActivation": "silu",
    }.get(kind)


class _Tracer(fx.Tracer):
    """Sees what one forward does with the modules below it, not what they do."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


def _activation_after(
    model: nn.Module, names: dict[nn.Module, str], graphs: dict[nn.Module, list[fx.Graph] | str], layer: SparseLinear
) -> nn.Module | str:
    """The module to fuse into `layer`, or why there is none."""
    if layer.activation is not None:
        return f"it applies {layer.activation} already"
    if layer is model:
        return "the model is this layer itself"
    if type(layer) not in (SparseLinear, QuantizedSparseLinear) or "forward" in vars(layer) or _is_watched(layer):
        return "it has hooks, or a forward of its own"
    if _places(model, layer) != 1:
        return "it is used in several places"
    parent = _caller(model, names, layer)
    if isinstance(parent, str):
        return parent
    if parent not in graphs:
        graphs[parent] = _trace(parent)
    traced = graphs[parent]
    if isinstance(traced, str):
        return traced
    followers = {_follower(parent, graph, layer) for graph in traced}
    if len(followers) != 1:
        return "what follows it depends on the mode or on optional arguments"
    found = followers.pop()
    if isinstance(found, str):
        return found
    if activation_name(found) is None:
        return f"it is followed by {type(found).__name__}, which no kernel applies"
    if _is_watched(found):
        return f"the {type(found).__name__} after it has hooks"
    if _places(model, found) != 1:
        return f"the {type(found).__name__} after it is used in several places"
    return found


def _follower(parent: nn.Module, graph: fx.Graph, layer: SparseLinear) -> nn.Module | str:
    modules = {node: parent.get_submodule(str(node.target)) for node in graph.nodes if node.op == "call_module"}
    calls = [node for node, module in modules.items() if module is layer]
    if len(calls) != 1:
        return f"{type(parent).__name__}.forward calls it {len(calls)} times"
    users = list(calls[0].users)
    if len(users) != 1:
        return f"its output is used {len(users)} times"
    if users[0].op == "output":
        return f"its output is what {type(parent).__name__} returns"
    if users[0] not in modules:
        return f"it is followed by {getattr(users[0].target, '__name__', users[0].target)}, not by a module"
    after = modules[users[0]]
    if users[0].args != (calls[0],) or users[0].kwargs:
        return f"the {type(after).__name__} after it takes other inputs too"
    if sum(module is after for module in modules.values()) != 1:
        return f"the {type(after).__name__} after it is called more than once"
    return after


def _trace(parent: nn.Module) -> list[fx.Graph] | str:
    """What its forward does: in both modes, and with optional arguments given and left out."""
    kind = type(parent).__name__
    if "forward" in vars(parent):
        return f"the forward of {kind} was replaced on the object"
    graphs = []
    training = parent.training
    try:
        for mode in (False, True):
            parent.training = mode  # its own alone: what is below it does not run
            graphs.append(_Tracer().trace(parent))
            defaults = _defaults(parent)
            if defaults:
                graphs.append(_Tracer().trace(parent, concrete_args=defaults))
    except Exception as error:  # whatever the user's code does when it meets a proxy
        return f"{kind}.forward cannot be traced: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
    finally:
        parent.training = training
    return graphs


def _defaults(module: nn.Module) -> dict[str, Any]:
    parameters = inspect.signature(type(module).forward).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty}


def _caller(model: nn.Module, names: dict[nn.Module, str], layer: nn.Module) -> nn.Module | str:
    name = names[layer]
    while True:
        name = name.rpartition(".")[0]
        parent = model.get_submodule(name)
        if not isinstance(parent, _CONTAINERS):
            return parent
        if parent is model:
            return f"{type(parent).__name__} does not call it"


def _is_watched(module: nn.Module) -> bool:
    return any(getattr(module, hooks, None) for hooks in _HOOKS)


def _holders(model: nn.Module, module: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    for parent in model.modules():
        for name, child in parent._modules.items():
            if child is module:
                yield parent, name


def _places(model: nn.Module, module: nn.Module) -> int:
    return sum(1 for _ in _holders(model, module))


def _put(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    new.training = old.training
    for parent, name in list(_holders(model, old)):
        parent._modules[name] = new
