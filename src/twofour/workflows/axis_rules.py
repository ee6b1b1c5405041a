"""What each ATen operator does to the axes of its tensors. What has no rule pins what it touches."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves, tree_map

from .axes import AxisAlgebra, Labels

Rule = Callable[["Reader", fx.Node, Sequence[Any], dict[str, Any]], Any]
RULES: dict[str, Rule] = {}
"""By the operator's name without namespace and overload."""


def _rule(*names: str) -> Callable[[Rule], Rule]:
    def put(rule: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, rule))
        return rule

    return put


class Reader:
    """Reads a graph of torch.export, operator by operator, into an AxisAlgebra."""

    def __init__(self, algebra: AxisAlgebra) -> None:
        self.algebra = algebra

    def read(self, module: fx.GraphModule, inputs: Sequence[Any]) -> Any:
        """Labels of what the graph returns; `inputs` are those of its placeholders."""
        env: dict[fx.Node, Any] = {}
        waiting = iter(inputs)
        for node in module.graph.nodes:
            if node.op == "placeholder":
                env[node] = next(waiting)
            elif node.op == "get_attr":
                found: Any = module
                for part in str(node.target).split("."):
                    found = getattr(found, part)
                is_tensor = isinstance(found, Tensor)
                env[node] = self.algebra.new(found.shape, "a constant of the graph") if is_tensor else found
            elif node.op == "call_function":
                args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda arg: env[arg])
                env[node] = self._call(node, args, dict(kwargs))
            elif node.op == "output":
                return fx.node.map_arg(node.args[0], lambda arg: env[arg])
        raise AssertionError("a graph has an output")

    def _call(self, node: fx.Node, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        target = node.target
        if getattr(target, "__name__", "") == "getitem" and not isinstance(target, torch._ops.OpOverload):
            return args[0][args[1]]
        graphs = [arg for arg in args if isinstance(arg, fx.GraphModule)]
        if isinstance(target, torch._ops.HigherOrderOperator) and len(graphs) == 1 and "wrap" in str(target):
            return self.read(graphs[0], args[list(args).index(graphs[0]) + 1 :])  # no_grad, autocast
        name = operator_name(target)
        rule = RULES.get(name) if name is not None else None
        if rule is None and name is not None and torch.Tag.pointwise in getattr(target, "tags", ()):
            rule = elementwise
        if rule is not None and _is_static(node) and all(_is_static(n) for n in node.all_input_nodes):
            found = rule(self, node, args, kwargs)
            if found is not NotImplemented:
                return found
        return self.refuse(node, args, kwargs)

    def refuse(self, node: fx.Node, args: Any, kwargs: Any) -> Any:
        """Pins all that the operator reads and writes."""
        reason = self.place(node)
        for labels in _labels((args, kwargs)):
            self.algebra.pin(labels, reason)
        return self.pinned(node, reason)

    def pinned(self, node: fx.Node, reason: str) -> Any:
        """Pinned labels of what a node returns."""
        return tree_map(
            lambda value: self.algebra.new(map(int, value.shape), reason) if isinstance(value, Tensor) else value,
            node.meta.get("val"),
        )

    def place(self, node: fx.Node) -> str:
        """ "operator aten.sort at 'encoder.layer.0'"."""
        stack = node.meta.get("nn_module_stack") or {}
        paths = [str(entry[0]) for entry in stack.values()]
        path = paths[-1].replace("L['self'].", "").removeprefix("model.") if paths else ""
        target = str(node.target).removesuffix(".default")
        return f"operator {target}" + (f" at '{path}'" if path and path != "model" else "")


def operator_name(target: Any) -> str | None:
    """ "linear" for torch.ops.aten.linear.default; None for what is not of ATen."""
    if not isinstance(target, torch._ops.OpOverload) or target.namespace != "aten":
        return None
    return target._schema.name.partition("::")[2]


def _labels(tree: Any) -> list[Labels]:
    return [leaf for leaf in tree_leaves(tree, is_leaf=lambda x: isinstance(x, Labels)) if isinstance(leaf, Labels)]


def _is_static(node: fx.Node) -> bool:
    values = tree_leaves(node.meta.get("val"))
    return all(isinstance(size, int) for value in values if isinstance(value, Tensor) for size in value.shape)


def _shape(node: fx.Node) -> tuple[int, ...]:
    return tuple(node.meta["val"].shape)


def _axis(labels: Labels, dim: int) -> int:
    return dim % len(labels.shape) if labels.shape else 0


def _letters(labels: Labels, rank: int) -> list[int]:
    """Of broadcasting to `rank` axes."""
    return list(range(rank - len(labels.shape), rank))


def elementwise(reader: Reader, node: fx.Node, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """Broadcasts; every element on its own."""
    shape = _shape(node)
    operands = [(labels, _letters(labels, len(shape))) for labels in _labels((args, kwargs))]
    return reader.algebra.combine(operands, list(range(len(shape))), shape)


@_rule(
    *("contiguous", "clone", "to", "_to_copy", "alias", "detach", "detach_", "lift_fresh_copy", "lift", "dropout"),
    *(
        "type_as",
        "dropout_",
        "feature_dropout",
        "alpha_dropout",
        "masked_fill",
        "masked_fill_",
        "copy_",
        "native_dropout",
        "where",
    ),
)
def _same(reader: Reader, node: fx.Node, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    if isinstance(node.meta["val"], (tuple, list)):
        return [args[0]] * len(node.meta["val"])
    mixes = operator_name(node.target) in ("masked_fill", "masked_fill_", "copy_", "where")
    return elementwise(reader, node, args, kwargs) if mixes else args[0]


@_rule("_assert_tensor_metadata", "_assert_async", "_assert_scalar", "sym_size", "sym_numel", "sym_constrain_range")
def _no_tensor(reader: Reader, node: fx.Node, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    return node.meta.get("val")


@_rule("zeros", "ones", "full", "zeros_like", "ones_like", "full_like", "new_zeros", "new_ones", "new_full")
def _uniform(reader: Reader, node: fx.Node, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    return reader.algebra.new(_shape(node))


@_rule("linear")
def _linear(reader: Reader, node: fx.Node, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    x, weight, *bias = args
    rows = list(range(len(x.shape) - 1))
    operands: list[Any] = [(x, [*rows, "in"]), (weight, ["out", "in"][2 - len(weight.shape) :])]
    operands += [(b, ["out"]) for b in _labels(bias) + _labels(kwargs)]
    out = [*rows, "out"] if len(weight.shape) == 2 else rows
    return reader.algebra.combine(operands, out, _shape(node))


@_rule("mm", "bmm", "matmul", "mv", "dot")
def _matmul(reader: Reader, node: fx.Node, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    a, b = args
    shape = _shape(node)
    left: list[Any] = ["row", "sum"][2 - min(2, len(a.shape)) :]
    right: list[Any] = ["sum", "column"][: min(2, len(b.shape))]
    rank = max(len(a.shape), len(b.shape)) - 2
    batch = list(range(max(0, rank)))
    out = [*batch, *(letter for letter in ("row", "column") if letter in left + right)]
    operands = [
        (labels, [*batch[len(batch) - max(0, len(labels.shape) - 2) :], *own])
        for labels, own in ((a, left), (b, right))
    ]
    return reader.algebra.combine(operands, out, shape)


@_rule("addmm", "baddbmm")
def _addmm(reader: Reader, node: fx.Node, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    bias, a, b = args
    batch = list(range(len(a.shape) - 2))
    out = [*batch, "row", "column"]
    operands = [
        (a, [*batch, "row", "sum"]),
        (b, [*batch, "sum", "column"]),
        (bias, out[len(out) - len(bias.shape) :]),
    ]
    return reader.algebra.combine(operands, out, _shape(node))


@_rule("einsum")
def _einsum(reader: Reader, node: fx.Node, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    equation, operands = str(args[0]).replace(" ", ""), args[1]
    given, arrow, out = equation.partition("->")
    own: list[Sequence[Any]] = [list(letters) for letters in given.split(",")]
    if not arrow or "." in equation or any(len(set(letters)) < len(letters) for letters in own):
        return NotImplemented
    return reader.algebra.combine(list(zip(operands, own, strict=True)), list(out), _shape(node))


@_rule("outer", "ger")
def _outer(reader: Reader, node: fx.Node, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    return reader.algebra.combine([(args[0], [0]), (args[1], [1])], [0, 1], _shape(node))


@_rule("scaled_dot_product_attention")
def _attention(reader: Reader, node: fx.Node, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    query, key, value, mask = given["query"], given["key"], given["value"], given.get("attn_mask")
    if given.get("is_causal"):
        reader.algebra.pin(query, reader.place(node), [len(query.shape) - 2])
        reader.algebra.pin(key, reader.place(node), [len(key.shape) - 2])
    if given.get("enable_gqa") and query.shape[-3] != key.shape[-3]:
        times = query.shape[-3] // key.shape[-3]
        key, value = (reader.algebra.repeat(x, len(x.shape) - 3, times, reader.place(node)) for x in (key, value))
    shape = _shape(node)
    batch = list(range(len(shape) - 2))

    def named(labels: Labels, row: str, column: str) -> tuple[Labels, list[Any]]:
        letters = [*batch, row, column]
        return labels, letters[len(letters) - len(labels.shape) :]

    operands = [named(query, "query", "in"), named(key, "key", "in"), named(value, "key", "out")]
    if isinstance(mask, Labels):
        operands.append(named(mask, "query", "key"))
    return reader.algebra.combine(operands, [*batch, "query", "out"], shape)


@_rule("layer_norm", "rms_norm", "native_layer_norm", "_fused_rms_norm")
def _layer_norm(reader: Reader, node: fx.Node, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    x = args[0]
    letters = list(range(len(x.shape)))
    operands = [(x, letters)]
    operands += [(p, letters[len(letters) - len(p.shape) :]) for p in _labels((args[1:], kwargs))]
    y = reader.algebra.combine(operands, letters, x.shape)
    value = node.meta["val"]
    if isinstance(value, Tensor):
        return y
    kept = len(x.shape) - len(args[1])
    return [y, *(reader.algebra.combine([(x, letters)], _kept_dims(letters, kept), v.shape) for v in value[1:])]


def _kept_dims(letters: list[int], kept: int) -> list[Any]:
    return [letter if i < kept else ("one", i) for i, letter in enumerate(letters)]


@_rule("batch_norm", "native_batch_norm", "_native_batch_norm_legit_no_training", "instance_norm", "cudnn_batch_norm")
def _batch_norm(reader: Reader, node: fx.Node, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    x = args[0]
    letters = list(range(len(x.shape)))
    operands = [(x, letters)] + [(p, [1]) for p in _labels((args[1:], kwargs))]
    y = reader.algebra.combine(operands, letters, x.shape)
    value = node.meta["val"]
    return (
        y if isinstance(value, Tensor) else [y, *(reader.algebra.new(v.shape, reader.place(node)) for v in value[1:])]
    )


@_rule("group_norm")
def _group_norm(reader: Reader, node: fx.Node, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    x, groups = args[0], args[1]
    size = x.shape[1] // groups
    for group in range(groups):  # cuts: channels may move inside their group alone
        reader.algebra.part(x, 1, group * size, (group + 1) * size)
    return _batch_norm(reader, node, [x, *_labels(args[2:])], kwargs)


@_rule("conv1d", "conv2d", "conv3d", "convolution")
def _convolution(reader: Reader, node: fx.Node, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    whole = operator_name(node.target) == "convolution"
    names = ["input", "weight", "bias", "stride", "padding", "dilation"]
    names += ["transposed", "output_padding", "groups"] if whole else ["groups"]
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    x, weight, bias = given["input"], given["weight"], given.get("bias")
    groups, shape = given.get("groups", 1), _shape(node)
    space = len(weight.shape) - 2
    if given.get("transposed") or len(x.shape) != space + 2:
        return NotImplemented
    depthwise = groups == x.shape[1] == weight.shape[0] and weight.shape[1] == 1
    if groups != 1 and not depthwise:
        return NotImplemented
    reader.algebra.pin(x, reader.place(node), range(2, space + 2))
    reader.algebra.pin(weight, reader.place(node), range(2, space + 2))
    inside = "out" if depthwise else "in"
    operands = [
        (x, ["n", inside, *(("x", i) for i in range(space))]),
        (weight, ["out", "in", *(("k", i) for i in range(space))]),
    ]
    if isinstance(bias, Labels):
        operands.append((bias, ["out"]))
    y = reader.algebra.combine(operands, ["n", "out"], shape[:2])
    rest = reader.algebra.new(shape[2:], reader.place(node))
    return Labels(shape, y.axes + rest.axes)


@_rule(
    *("max_pool1d", "max_pool2d", "max_pool3d", "avg_pool1d", "avg_pool2d", "avg_pool3d", "adaptive_avg_pool1d"),
    *("adaptive_avg_pool2d", "adaptive_avg_pool3d", "_adaptive_avg_pool2d", "adaptive_max_pool2d"),
    *("upsample_nearest2d", "upsample_bilinear2d", "upsample_bicubic2d", "max_pool2d_with_indices"),
)
def _over_space(reader: Reader, node: fx.Node, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    x = args[0]
    values = node.meta["val"]
    first = values if isinstance(values, Tensor) else values[0]
    if len(x.shape) != len(first.shape) or len(x.shape) < 3:
        return NotImplemented
    reader.algebra.pin(x, reader.place(node), range(2, len(x.shape)))
    rest = reader.algebra.new(first.shape[2:], reader.place(node))
    y = Labels(tuple(first.shape), x.axes[:2] + rest.axes)
    return y if isinstance(values, Tensor) else [y] * len(values)


@_rule("pad", "constant_pad_nd", "reflection_pad2d", "replication_pad2d")
def _pad(reader: Reader, node: fx.Node, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    x, shape = args[0], _shape(node)
    changed = [i for i in range(len(shape)) if shape[i] != x.shape[i]]
    touched = sorted(
        {len(shape) - 1 - i for i in range(len(args[1]) // 2) if any(args[1][2 * i : 2 * i + 2])} | {*changed}
    )
    if any(position in axis.outer for axis in x.axes for position in touched):
        return NotImplemented
    reader.algebra.pin(x, reader.place(node), touched)
    new = reader.algebra.new(shape, reader.place(node))
    return Labels(shape, tuple(new.axes[i] if i in touched else x.axes[i] for i in range(len(shape))))


@_rule("softmax", "log_softmax", "_softmax", "_log_softmax", "_safe_softmax")
def _softmax(reader: Reader, node: fx.Node, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    return args[0]


@_rule("mean", "sum", "amax", "amin", "var", "std", "prod", "linalg_vector_norm", "norm", "logsumexp", "any", "all")
def _reduce(reader: Reader, node: fx.Node, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    x, shape = args[0], _shape(node)
    name = operator_name(node.target)
    at = 2 if name in ("linalg_vector_norm", "norm") else 1  # the order of the norm comes first
    dims = kwargs.get("dim", args[at] if len(args) > at else None)
    if isinstance(dims, bool):
        return NotImplemented
    gone = {_axis(x, dim) for dim in ([dims] if isinstance(dims, int) else dims)} if dims else set(range(len(x.shape)))
    if dims == 0:
        gone = {0}
    letters = list(range(len(x.shape)))
    kept: list[Any] = [letter for letter in letters if letter not in gone]
    if len(shape) == len(x.shape):
        kept = [("one", letter) if letter in gone else letter for letter in letters]
    if len(kept) != len(shape):
        return NotImplemented
    return reader.algebra.combine([(x, letters)], kept, shape)


@_rule(
    "transpose", "t", "permute", "movedim", "swapaxes", "numpy_T", "mT", "matrix_H", "adjoint", "swapdims", "transpose_"
)
def _transpose(reader: Reader, node: fx.Node, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    x = args[0]
    rank, name = len(x.shape), operator_name(node.target)
    order = list(range(rank))
    if name in ("transpose", "swapaxes", "swapdims", "transpose_"):
        a, b = _axis(x, args[1]), _axis(x, args[2])
        order[a], order[b] = b, a
    elif name == "permute":
        order = [_axis(x, dim) for dim in args[1]]
    elif name in ("t", "numpy_T"):
        order.reverse()
    elif name in ("mT", "matrix_H", "adjoint"):
        order[-2:] = [rank - 1, rank - 2]
    else:
        sources = [_axis(x, d) for d in ([args[1]] if isinstance(args[1], int) else args[1])]
        targets = [_axis(x, d) for d in ([args[2]] if isinstance(args[2], int) else args[2])]
        order = [dim for dim in order if dim not in sources]
        for target, source in sorted(zip(targets, sources, strict=True)):
            order.insert(target, source)
    return reader.algebra.combine([(x, list(range(rank)))], order, _shape(node))


@_rule("unsqueeze", "squeeze", "expand", "expand_as", "unsqueeze_", "squeeze_")
def _size_one(reader: Reader, node: fx.Node, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    x, shape = args[0], _shape(node)
    name = str(operator_name(node.target))
    if name.startswith("expand"):
        return reader.algebra.combine([(x, _letters(x, len(shape)))], list(range(len(shape))), shape)
    return reader.algebra.reshape(x, shape, reader.place(node))


@_rule("view", "reshape", "_unsafe_view", "flatten", "unflatten", "view_as", "reshape_as", "_reshape_alias")
def _view(reader: Reader, node: fx.Node, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    value = node.meta["val"]
    before = node.args[0].meta["val"] if isinstance(node.args[0], fx.Node) else None
    if before is None or before.dtype != value.dtype:  # a view of the bytes
        return NotImplemented
    return reader.algebra.reshape(args[0], _shape(node), reader.place(node))


@_rule("cat", "concat", "concatenate")
def _concatenate(reader: Reader, node: fx.Node, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    parts = [labels for labels in args[0] if labels.shape != (0,)]
    dim = args[1] if len(args) > 1 else kwargs.get("dim", 0)
    return reader.algebra.concatenate(parts, _axis(parts[0], dim), reader.place(node))


@_rule("stack")
def _stack(reader: Reader, node: fx.Node, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    shape = _shape(node)
    dim = (args[1] if len(args) > 1 else kwargs.get("dim", 0)) % len(shape)
    letters = list(range(len(shape)))
    own = letters[:dim] + letters[dim + 1 :]
    merged = reader.algebra.combine([(labels, own) for labels in args[0]], letters, shape)
    reader.algebra.pin(merged, reader.place(node), [dim])
    return merged


@_rule("split", "split_with_sizes", "chunk", "tensor_split", "unsafe_split", "unsafe_chunk")
def _split(reader: Reader, node: fx.Node, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    x = args[0]
    axis = _axis(x, args[2] if len(args) > 2 else kwargs.get("dim", 0))
    found, start = [], 0
    for value in node.meta["val"]:
        found.append(reader.algebra.part(x, axis, start, start + value.shape[axis]))
        start += value.shape[axis]
    return found if start == x.shape[axis] else NotImplemented


@_rule("slice", "narrow")
def _slice(reader: Reader, node: fx.Node, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    x, shape = args[0], _shape(node)
    axis = _axis(x, args[1] if len(args) > 1 else 0)
    start = args[2] if len(args) > 2 and args[2] is not None else 0
    if (len(args) > 4 and args[4] != 1) or not isinstance(start, int):
        return NotImplemented
    start = max(0, start + x.shape[axis] if start < 0 else start)
    return reader.algebra.part(x, axis, start, start + shape[axis]) if shape[axis] else NotImplemented


@_rule("select", "unbind")
def _select(reader: Reader, node: fx.Node, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    x = args[0]
    axis = _axis(x, args[1] if len(args) > 1 else 0)
    if operator_name(node.target) == "unbind":
        return [reader.algebra.select(x, axis, index, reader.place(node)) for index in range(x.shape[axis])]
    return reader.algebra.select(x, axis, args[2] % x.shape[axis], reader.place(node))


@_rule("repeat_interleave")
def _repeat_interleave(reader: Reader, node: fx.Node, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    dim = args[2] if len(args) > 2 else kwargs.get("dim")
    if not isinstance(args[1], int) or dim is None:
        return NotImplemented
    return reader.algebra.repeat(args[0], _axis(args[0], dim), args[1], reader.place(node))


@_rule("repeat")
def _repeat(reader: Reader, node: fx.Node, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    x, times = args
    if len(times) != len(x.shape):
        return NotImplemented
    for axis, count in enumerate(times):
        if count != 1:
            x = reader.algebra.concatenate([x] * count, axis, reader.place(node))
    return x


@_rule("embedding")
def _embedding(reader: Reader, node: fx.Node, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    weight, indices = args[:2]
    reader.algebra.pin(weight, reader.place(node), [0])
    return reader.algebra.combine(
        [(indices, list(range(len(indices.shape)))), (weight, ["row", "features"])],
        [*range(len(indices.shape)), "features"],
        _shape(node),
    )


@_rule("index", "index_select")
def _index(reader: Reader, node: fx.Node, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    x, shape = args[0], _shape(node)
    chosen = args[1]
    if operator_name(node.target) == "index_select":
        chosen = [None] * _axis(x, args[1]) + [args[2]]
    places = [i for i, index in enumerate(chosen) if index is not None]
    if not places or places != list(range(places[0], places[-1] + 1)):
        return NotImplemented
    indices = [chosen[i] for i in places]
    if any(position in axis.outer for axis in x.axes for position in places):
        return NotImplemented
    count = len(shape) - (len(x.shape) - len(places))
    if count < 0 or math.prod(x.shape[: places[0]]) != math.prod(shape[: places[0]]):
        return NotImplemented
    reason = reader.place(node)
    reader.algebra.pin(x, reason, places)
    for labels in _labels(indices):
        reader.algebra.pin(labels, reason)
    letters: list[Any] = list(range(len(x.shape)))
    out = [*letters[: places[0]], *(("index", i) for i in range(count)), *letters[places[-1] + 1 :]]
    found = reader.algebra.combine([(x, letters)], out, shape)
    reader.algebra.pin(found, reason, range(places[0], places[0] + count))
    return found


@_rule("cumsum", "cumprod", "flip", "roll")
def _along_one(reader: Reader, node: fx.Node, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    x = args[0]
    dims = args[-1] if len(args) > 1 else kwargs.get("dim")
    if dims is None:
        return NotImplemented
    axes = {_axis(x, dim) for dim in ([dims] if isinstance(dims, int) else dims)}
    if any(position in axis.outer for axis in x.axes for position in axes):
        return NotImplemented
    reader.algebra.pin(x, reader.place(node), axes)
    return x


@_rule("triu", "tril")
def _triangle(reader: Reader, node: fx.Node, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    reader.algebra.pin(args[0], reader.place(node), [len(args[0].shape) - 2, len(args[0].shape) - 1])
    return args[0]
