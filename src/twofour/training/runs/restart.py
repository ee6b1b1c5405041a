"""Where a training run is, and how it goes on from there: its place in the data, its last good weights, its file."""

from __future__ import annotations

import os
import re
import signal
import sys
import threading
import time
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from tqdm.auto import tqdm

from ...errors import ModelError, TrainingError, TwofourError
from ...nn.inputs import Batch


class Stream:
    """The batches of `data`, over and over; `taken` of pass `epoch`, which began with the state `random`."""

    def __init__(self, data: Any) -> None:
        if isinstance(data, (Tensor, tuple, Mapping)):
            data = [data]
        if isinstance(data, (str, bytes)) or not isinstance(data, Iterable):
            raise ModelError(
                f"data is a {type(data).__name__}: pass an iterable of batches, such as a list or a DataLoader."
            )
        self._data = data
        self._batches: Iterator[Any] | None = None
        self.epoch = self.taken = 0
        self.random: dict[str, Tensor] = {}

    def next(self, device: torch.device) -> Batch | None:
        """None: there are no more."""
        for _ in range(2):
            if self._batches is None:
                self.random = random_state(device)
                self._batches, self.taken = iter(self._data), 0
            for batch in self._batches:
                self.taken += 1
                batch = tuple(batch) if isinstance(batch, list) else batch
                if not isinstance(batch, (Tensor, tuple, Mapping)):
                    raise ModelError(f"data gave a {type(batch).__name__}: a batch is a tensor, a tuple or a mapping.")
                return batch
            if not self.taken or self._batches is self._data:
                return None
            self._batches = None
            self.epoch += 1
        return None

    def seek(self, epoch: int, taken: int, random: Mapping[str, Tensor], device: torch.device) -> None:
        """Goes to where `taken` batches were given of a pass that began with this random state.

        Raises:
            TrainingError: there are fewer.
        """
        if self._batches is self._data and self._batches is not None:  # one pass, of which some is gone
            missing = taken - self.taken
        else:
            set_random_state(random, device)
            self._batches, self.epoch, missing = None, epoch, taken
        for _ in range(missing):
            if self.next(device) is None or self.epoch != epoch:
                raise TrainingError(
                    f"the checkpoint was written after {taken} batches of pass {epoch + 1}, and data ends before: pass the same"
                    " data, from its beginning."
                )


class LastGood:
    """A copy of what training changes, made when its loss was known to be finite.

    Args:
        model: its buffers count, too.
        optimizer: whatever it trains, in the model or not.
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer) -> None:
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        self._trained = {names.get(id(p), f"(not of the model) {i}"): p.detach() for i, p in enumerate(trained)}
        self.of: dict[str, Tensor] = self._trained | dict(model.named_buffers())
        self._copies = {name: tensor.clone() for name, tensor in self.of.items()}

    def remember(self) -> None:
        """Makes the copy anew."""
        for name, tensor in self.of.items():
            self._copies[name].copy_(tensor)

    def restore(self) -> None:
        """Puts the copy back."""
        self.load(self._copies)

    def load(self, values: Mapping[str, Tensor]) -> None:
        """Takes values of the names and shapes of `of`."""
        for name, tensor in self.of.items():
            tensor.copy_(values[name])

    def is_finite(self) -> bool:
        """True where every trained number is."""
        return all(bool(tensor.isfinite().all()) for tensor in self._trained.values())


class Interruption:
    """Ctrl-C while a run lasts that can go on: the first is noted, so that the run saves where it is; the second ends it.

    Nothing is changed where another thread runs, or others handle it.
    """

    def __init__(self) -> None:
        self.asked = False

    def __enter__(self) -> Interruption:
        plain = signal.getsignal(signal.SIGINT) is signal.default_int_handler
        if plain and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, self._note)
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        if signal.getsignal(signal.SIGINT) == self._note:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.asked = True
        signal.signal(signal.SIGINT, signal.default_int_handler)
        tqdm.write("saving after this step; Ctrl-C once more ends without it", file=sys.stderr)


_FINGERPRINTED = ("model", "teacher", "text")
_FINGERPRINT = re.compile(r"\d{4,10}|[0-9a-f]{16}")
"""What stands for them in settings: `digest`, or the beginning of a hash; numbers that tell a reader nothing."""


class Checkpoint:
    """The file of a run, of the verb of that name, that goes on where it was."""

    def __init__(self, path: Path, every: float, verb: str) -> None:
        if not every >= 0:
            raise ModelError(f"save_seconds={every}: 0 or more.")
        if not path.absolute().parent.is_dir():
            raise TrainingError(f"the checkpoint {path} would lie in a folder that is not there: make it first.")
        self.path, self._every, self._verb, self._saved = path, every, verb, time.monotonic()

    @property
    def is_due(self) -> bool:
        """True once it is old."""
        return time.monotonic() - self._saved >= self._every

    def save(self, state: Mapping[str, Any]) -> None:
        """Writes it by way of a temporary file."""
        write_state(self.path, state)
        self._saved = time.monotonic()

    def load(self, settings: Mapping[str, Any]) -> dict[str, Any] | None:
        """What was saved; None where there is no file.

        Raises:
            ModelError: its settings are others.
            TrainingError: it cannot be read.
        """
        if not self.path.exists():
            return None
        way_out = "Give it another path, or delete it to begin anew."
        try:
            state: dict[str, Any] = torch.load(self.path, map_location="cpu", weights_only=True)
            theirs = state["settings"]
        except Exception as error:
            raise TrainingError(
                f"{self.path} is no checkpoint of {self._verb} ({type(error).__name__}). {way_out}"
            ) from error
        for key, value in settings.items():
            was = theirs.get(key)
            if was == value:
                continue
            told = f"{key}={was!r}, this run with {key}={value!r}"
            if key in _FINGERPRINTED and all(_FINGERPRINT.fullmatch(str(each)) for each in (was, value)):
                told = f"another {key}"
            raise ModelError(f"the checkpoint {self.path} was made with {told}. {way_out}")
        return state


def write_state(path: Path, state: Mapping[str, Any]) -> None:
    """Writes tensors, numbers and texts to `path` by way of a temporary file, for `torch.load(weights_only=True)`.

    Raises:
        TwofourError: it cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        torch.save(dict(state), temporary)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        temporary.unlink(missing_ok=True)
        raise TwofourError(f"cannot write the checkpoint {path}: {error}.") from error


def digest(model: nn.Module) -> int:
    """A checksum of the bytes of all parameters that are here, not on the meta device. Cost: one pass over them.

    >>> digest(nn.Linear(2, 2)) == digest(nn.Linear(2, 2))
    False
    """
    found = 0
    for parameter in model.parameters():
        if not parameter.is_meta:
            data = parameter.detach().cpu().flatten().view(torch.uint8).numpy().data
            found = zlib.crc32(data, found)
    return found


def random_state(device: torch.device) -> dict[str, Tensor]:
    """torch's, of the CPU and of `device`."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_random_state(state: Mapping[str, Tensor], device: torch.device) -> None:
    """The way back."""
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
