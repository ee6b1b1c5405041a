"""Models on disk: a transformers folder or a .safetensors file, read into an nn.Module and written back."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..errors import FormatError, ModelError, TwofourError, UnsupportedError
from ..format import file
from ..nn.swap import to_dense_modules
from ..report import Report
from ..workflows import load, save

COMPRESSED_NAME = "model.twofour.safetensors"
"""The compressed weights inside a folder; not a name that transformers would try to load."""

_WEIGHT_FILES = ("*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin*", "*.h5", "*.msgpack", "*.onnx")
_EMBEDDING = re.compile(r"(^|\.)(wte|wpe|shared|relative_attention_bias)$|embed")
_INPUTS_FIRST = re.compile(r"(^|\.)(c_attn|q_attn|c_fc|c_proj)$")
"""Layers whose weight transformers holds as [in, out]: pruning them as Linears would take the wrong axis."""

_RESERVED = frozenset(vars(nn.Module()))


def open_model(path: Path, dtype: torch.dtype | None = None) -> nn.Module:
    """The model of a folder or file, on the CPU, in eval mode, in the file's dtype or in `dtype`.

    Raises:
        TwofourError: missing path, neither folder with config.json nor .safetensors, transformers not installed, an
            architecture transformers does not know, a damaged file.
    """
    require_model(path)
    model = _open_folder(path) if path.is_dir() else _open_file(path)
    return model.to(dtype).eval() if dtype is not None else model.eval()


def require_model(path: Path) -> None:
    """Checks that there is something at `path`, and that it looks like a model."""
    if not path.exists():
        raise ModelError(f"{path}: no such file or folder.")
    if not path.is_dir() and path.suffix != ".safetensors":
        raise ModelError(f"{path} is not a model: give a folder with config.json, or a .safetensors file.")


def require_folder(path: Path, why: str) -> None:
    """Checks that `path` is a folder: a .safetensors file has weights, and no model to run. `why` tells who runs it."""
    if not path.exists():
        raise ModelError(f"{path}: no such file or folder.")
    if not path.is_dir():
        raise ModelError(f"{path} is not a model folder: {why}. Give a folder with config.json.")


def with_guess(report: Report, path: Path) -> Report:
    """The report, with a note where the kinds of its layers are a guess: a bare file does not say what they are."""
    if path.is_dir():
        return report
    note = "layer kinds of a bare file are guessed from names and shapes: give the model's folder to be sure"
    return replace(report, notes=(*report.notes, note))


def write_dense(model: nn.Module, source: Path, target: Path, overwrite: bool) -> None:
    """Writes a pruned, dense model: a folder that transformers loads as it is, or a plain safetensors file.

    Layers that are compressed are written out dense: nobody but twofour could load them.

    Raises:
        TwofourError: it cannot be written, or a file's tensors would not all come back. Nothing is written then.
    """
    to_dense_modules(model)
    if source.is_dir():
        with _new_folder(source, target, overwrite) as folder:
            model.save_pretrained(folder)  # type: ignore[operator]
            for written in folder.glob("*.safetensors"):
                file.open_to_readers(written)
    else:
        with _new_file(target, overwrite) as temporary:
            # Copies, because safetensors refuses tensors that share memory; they are few megabytes or on their way out.
            tensors = {name: tensor.detach().clone().contiguous() for name, tensor in model.state_dict().items()}
            _require_same_names(source, set(tensors))
            save_file(tensors, temporary, {"format": "pt"})
            file.open_to_readers(temporary)


def write_compressed(model: nn.Module, source: Path, target: Path, overwrite: bool, pattern: str) -> Any:
    """Writes a compressed model and returns the report of `save`."""
    if source.is_dir():
        with _new_folder(source, target, overwrite) as folder:
            return save(model, folder / COMPRESSED_NAME, pattern=pattern)
    _require_free(target, overwrite)
    return save(model, target, pattern=pattern)


def require_target(source: Path, target: Path, overwrite: bool) -> None:
    """Checks, before any work is done, that `source` can be a model and that the result can go to `target`."""
    require_model(source)
    require_apart(source, target)
    _require_free(target, overwrite)
    if source.is_dir() and target.is_file():
        raise TwofourError(f"{target} is a file: the result of a folder is a folder. Give it another name.")
    if source.is_file() and target.is_dir():
        raise TwofourError(f"{target} is a folder: the result of a .safetensors file is a file. Name one in it.")
    if target.is_dir() and any(target.iterdir()) and not (target / "config.json").is_file():
        raise TwofourError(f"{target} holds other things than a model: --overwrite replaces model folders only.")
    if source.is_file() and target.suffix != ".safetensors":
        raise TwofourError(
            f"{target}: the result of a .safetensors file is one too. Name it {target.name}.safetensors."
        )


def require_apart(source: Path, target: Path) -> None:
    """Checks that `target` names a place in a folder that is there, and neither lies in the other."""
    here, there = source.resolve(), target.resolve()
    if here == there:
        raise TwofourError(f"{target} is the model itself: give the result another name.")
    if here in there.parents or there in here.parents:
        raise TwofourError(f"{target} and the model {source} lie inside each other: put the result elsewhere.")
    if target.name in ("", ".."):
        raise TwofourError(f"{target} does not name the result's folder: write its name out, as in {there}.")
    if not target.absolute().parent.is_dir():
        raise TwofourError(f"{target.absolute().parent}: no such folder. Make it first.")


def _open_folder(path: Path) -> nn.Module:
    config_path = path / "config.json"
    if not config_path.is_file():
        raise ModelError(f"{path} has no config.json: it is not a transformers model folder.")
    transformers = _transformers()
    try:
        architectures = json.loads(config_path.read_text(encoding="utf-8")).get("architectures") or []
    except (ValueError, AttributeError) as error:
        raise ModelError(f"{config_path} is not a JSON object: {error}.") from None
    builder = getattr(transformers, architectures[0], None) if architectures else transformers.AutoModel
    if builder is None:
        raise UnsupportedError(
            f"{config_path} asks for {architectures[0]}, which transformers {transformers.__version__} does not have."
        )
    compressed = path / COMPRESSED_NAME
    try:
        if compressed.is_file():
            model: nn.Module = builder(transformers.AutoConfig.from_pretrained(path, local_files_only=True))
            load(model, compressed)
        else:
            model, found = builder.from_pretrained(
                path,
                local_files_only=True,
                dtype="auto",
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they are told below, by name
            )
            _require_all_weights(path, type(model).__name__, found)
    except TwofourError:
        raise
    except Exception as error:  # transformers, safetensors and torch raise many kinds for a damaged folder
        reason = str(error).strip().splitlines()
        raise ModelError(f"{path} cannot be loaded: {reason[0] if reason else type(error).__name__}") from error
    return model


def _require_all_weights(path: Path, architecture: str, found: dict[str, Any]) -> None:
    """Refuses a model of which transformers made up weights at random; `found` is its loading info."""
    missing = sorted(map(str, found["missing_keys"]))
    mismatched = sorted((str(name), list(stored), list(needed)) for name, stored, needed in found["mismatched_keys"])
    if mismatched:
        name, stored, needed = mismatched[0]
        more = f" (and {len(mismatched) - 1} more)" if len(mismatched) > 1 else ""
        raise ModelError(
            f"{path} does not fit its config.json: {name} is {stored}, {architecture} needs {needed}{more}."
            " Put the config.json beside it that the weights were saved with."
        )
    if missing:
        names = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
        raise ModelError(
            f"{path} lacks weights that {architecture} needs: {names}."
            " Save the whole model again, or name in config.json the architecture that it was saved from."
        )


def _require_same_names(source: Path, written: set[str]) -> None:
    """Every tensor that was read goes back under its name, and no other."""
    with safe_open(source, framework="pt") as opened:
        names = set(opened.keys())
        compressed = "twofour" in (opened.metadata() or {})
    if compressed:
        contents = file.read(source)
        names = {*contents.tensors, *contents.matrices, *contents.aliases}
    if written != names:
        differing = ", ".join(sorted(written ^ names)[:3])
        raise FormatError(f"{source} has tensors whose names twofour cannot write back: {differing}. Rename them.")


def _open_file(path: Path) -> nn.Module:
    """A tree of modules with the file's names; it holds weights for the verbs to work on, and cannot be run."""
    try:
        with safe_open(path, framework="pt") as opened:
            metadata = opened.metadata() or {}
            if "twofour" not in metadata:
                return _tree({name: opened.get_tensor(name) for name in opened.keys()})  # noqa: SIM118
    except SafetensorError as error:
        raise FormatError(f"{path} is not a safetensors file, or is damaged: {error}.") from None
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror or error}.") from error
    contents = file.read(path)
    tensors: dict[str, Tensor] = dict(contents.tensors)
    for name, matrix in contents.matrices.items():
        tensors[name] = torch.empty(matrix.shape, dtype=matrix.dtype, device="meta")
    for alias, source in contents.aliases.items():
        tensors[alias] = tensors[source]
    model = _tree(tensors)
    load(model, path)
    return model


def _tree(tensors: dict[str, Tensor]) -> nn.Module:
    root = nn.Module()
    for name, tensor in tensors.items():
        *path, attribute = name.split(".")
        if not _RESERVED.isdisjoint((*path, attribute)):
            raise FormatError(f"the file has a tensor {name!r}, a name that torch keeps for itself: rename it.")
        parent = root
        for part in path[:-1]:
            parent = _child(parent, part, nn.Module())
        if path:
            kind = _module_for(".".join(path), tensor) if attribute == "weight" else nn.Module()
            module = _child(parent, path[-1], kind)
        else:
            module = root
        if tensor.is_floating_point() or attribute == "weight":
            module._parameters[attribute] = nn.Parameter(tensor, requires_grad=False)
        else:
            module._buffers[attribute] = tensor  # register_buffer refuses an integer bias, files do not
    return root


def _child(parent: nn.Module, name: str, new: nn.Module) -> nn.Module:
    """The child of that name; a plain container that came first is turned into `new`, with what it has."""
    child = parent._modules.get(name)
    if child is None or (type(child) is nn.Module and type(new) is not nn.Module):
        if child is not None:
            new._parameters.update(child._parameters)
            new._buffers.update(child._buffers)
            new._modules.update(child._modules)
        parent._modules[name] = new
        return new
    return child


def _module_for(name: str, weight: Tensor) -> nn.Module:
    """The kind of layer that a bare tensor called `weight` most likely belongs to."""
    module: nn.Module
    if weight.ndim == 2 and _EMBEDDING.search(name):
        module = nn.Embedding(1, 1, device="meta")
    elif weight.ndim == 2 and not _INPUTS_FIRST.search(name):
        module = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    elif weight.ndim in (4, 5):  # three axes may as well be a stack of experts
        convolution = {4: nn.Conv2d, 5: nn.Conv3d}[weight.ndim]
        module = convolution(1, 1, 1, bias=False, device="meta")
    else:
        module = UnknownLayer()
    return module


class UnknownLayer(nn.Module):
    """Stands for a layer of a bare file whose kind its name and shape do not tell; it is left alone."""


def _transformers() -> Any:
    try:
        import transformers
    except ImportError:
        raise UnsupportedError("a model folder needs transformers: pip install 'twofour[transformers]'.") from None
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers


def _require_free(target: Path, overwrite: bool) -> None:
    if target.exists() and not overwrite:
        raise TwofourError(f"{target} is there already: name another place, or pass --overwrite.")


@contextmanager
def _new_folder(source: Path, target: Path, overwrite: bool) -> Iterator[Path]:
    """A temporary folder with everything of `source` but weights; becomes `target` when the block succeeds."""
    with _temporary(target, overwrite) as temporary:
        shutil.copytree(source, temporary, ignore=shutil.ignore_patterns(*_WEIGHT_FILES))
        yield temporary
        old = temporary.with_suffix(".old")
        had_one = target.exists()
        if had_one:
            os.replace(target, old)  # aside, not away: a kill between the two renames loses neither
        try:
            os.replace(temporary, target)
        except BaseException:
            if had_one:
                os.replace(old, target)
            raise
        if old.is_dir() and not old.is_symlink():
            shutil.rmtree(old, ignore_errors=True)  # the result is in place: what is left of the old one harms nobody
        else:
            old.unlink(missing_ok=True)


@contextmanager
def _new_file(target: Path, overwrite: bool) -> Iterator[Path]:
    """A temporary file; becomes `target` when the block succeeds."""
    with _temporary(target, overwrite) as temporary:
        yield temporary
        os.replace(temporary, target)


@contextmanager
def _temporary(target: Path, overwrite: bool) -> Iterator[Path]:
    """A name beside `target` whose file or folder never outlives the block; failures to write become one line."""
    _require_free(target, overwrite)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        yield temporary
    except (OSError, SafetensorError) as error:
        raise TwofourError(f"cannot write {target}: {error}. Nothing was written.") from error
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            temporary.unlink(missing_ok=True)
