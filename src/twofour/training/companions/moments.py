"""The Hessians of layers' inputs, from running the whole model over calibration inputs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, cast

from torch import Tensor, nn

from ...errors import CalibrationError, ModelError
from ...nn import observe
from ...nn.inputs import Batch, batches, call, evaluating, mask_of, real_tokens
from ...solvers import Hessian
from .lora import AdaptedLinear, shape_of

_BYTES_AT_ONCE = 1 << 30


def hessians(
    model: nn.Module, layers: Mapping[str, nn.Module], calibration: Batch | Iterable[Batch]
) -> Iterator[tuple[str, Hessian]]:
    """(name, Hessian of its inputs) of each of the layers, in their order; without tokens where no input reaches one.

    The model must not change in between: it runs over all inputs once for every gigabyte of Hessians.

    Args:
        layers: name -> a linear layer, adapted or not, called with one tensor [..., in_features].
        calibration: as in `twofour.prune`. Tokens that an `attention_mask` marks as padding do not count.
    Raises:
        CalibrationError: nothing to run, NaN in a layer's inputs, or none of the layers reached.
    """
    try:
        given = batches(calibration)
    except ModelError as error:
        raise CalibrationError(str(error).replace("inputs", "calibration", 1)) from None
    reached = 0
    for part in _parts(layers):
        found = {name: _empty(layers[name]) for name in part}
        _look(model, {name: layers[name] for name in part}, given, found)
        reached += sum(hessian.tokens > 0 for hessian in found.values())
        yield from found.items()
    if layers and not reached:
        raise CalibrationError(
            f"the calibration inputs reach none of the {len(layers)} layers, such as '{next(iter(layers))}'."
        )


def _linear(module: nn.Module) -> nn.Module:
    return module.base if isinstance(module, AdaptedLinear) else module


def _empty(module: nn.Module) -> Hessian:
    linear = _linear(module)
    return Hessian(shape_of(linear)[1], cast(Tensor, linear.weight).device)


def _parts(layers: Mapping[str, nn.Module]) -> Iterator[list[str]]:
    part: list[str] = []
    size = 0
    for name, module in layers.items():
        own = 8 * shape_of(_linear(module))[1] ** 2
        if part and size + own > _BYTES_AT_ONCE:
            yield part
            part, size = [], 0
        part.append(name)
        size += own
    if part:
        yield part


def _look(model: nn.Module, layers: Mapping[str, nn.Module], given: list[Batch], found: Mapping[str, Hessian]) -> None:
    real: dict[str, Tensor] = {}

    def looking(name: str) -> Any:
        def look(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = args[0] if args else next(iter(kwargs.values()), None)
            if not isinstance(x, Tensor) or x.is_nested:
                raise CalibrationError(f"'{name}' was called with a {type(x).__name__}, not a plain tensor.")
            try:
                for tokens in observe.tokens(module, x, mask_of(real, name, x)):
                    found[name].add(tokens)
            except CalibrationError as error:
                raise CalibrationError(f"the inputs of '{name}': {error}") from None

        return look

    handles = [module.register_forward_pre_hook(looking(name), with_kwargs=True) for name, module in layers.items()]
    try:
        with evaluating(model):
            for batch in given:
                real.clear()
                real.update(real_tokens(batch))
                call(model, batch)
    finally:
        for handle in handles:
            handle.remove()
