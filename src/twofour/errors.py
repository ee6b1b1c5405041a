"""Every error a user can cause, by kind. A message says what was given, the rule, and the way out."""


class TwofourError(Exception):
    """Base of all errors that twofour raises on purpose."""


class PatternError(TwofourError, ValueError):
    """A pattern text that cannot be read, or a weight that does not hold its pattern."""


class ShapeError(TwofourError, ValueError):
    """A tensor whose shape does not fit: an axis without whole groups, a matrix where none is."""


class FormatError(TwofourError, ValueError):
    """A file or a record that is not a valid N:M matrix: truncated, out of range, unknown version."""


class UnsupportedError(TwofourError, NotImplementedError):
    """A dtype, device, layer kind or backend that this build, this machine or this version does not serve."""


class ModelError(TwofourError, ValueError):
    """A model that cannot be worked on as asked: no such layer, weights that are NaN, nothing to do."""


class CalibrationError(TwofourError, ValueError):
    """Calibration inputs that cannot tell a solver anything: none, NaN, or none that reach a layer."""


class TrainingError(TwofourError, RuntimeError):
    """Training that cannot begin, go on or be taken up: no data, a loss that is not finite, a checkpoint that is none."""


class DeviceError(TwofourError, RuntimeError):
    """A GPU, or its driver, that failed at what it can do: no memory, a launch that it refused."""
