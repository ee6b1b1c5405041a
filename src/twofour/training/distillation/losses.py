"""How far a student's tensor is from its teacher's: logits, hidden states, embeddings. Padding does not count.

Every loss takes (student, teacher, mask) and gives one number, a mean over what the mask calls real; sums are made in
float32 at least. So does any function of one's own that takes a loss's place.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ...errors import ShapeError

Loss = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""(student, teacher, mask or None) -> one number with the student's gradient."""

Axes = int | tuple[int, ...]


def kl_loss(
    student: Tensor, teacher: Tensor, mask: Tensor | None = None, *, temperature: float = 1.0, dim: int = -1
) -> Tensor:
    """T² · KL(softmax(teacher / T) ‖ softmax(student / T)), the mean over tokens.

    With T² the gradient keeps its size at any temperature. A class that the teacher's logits rule out (-inf) adds nothing.

    Args:
        student, teacher: logits of one shape, classes along `dim`; floating point.
        mask: bool, their shape without `dim`; False leaves a token out. None: all count.
        temperature: T, positive; above 1 the unlikely classes teach more.
    Raises:
        ShapeError: other shapes, a mask that does not fit, nothing that is real, or a temperature that is not positive.
    Cost: three copies of the logits in float32.
    Source: Hinton et al. 2015, arXiv:1503.02531, section 2.

    >>> import torch
    >>> logits = torch.tensor([[2.0, 0.0, -1.0]])
    >>> float(kl_loss(logits + 5, logits))
    0.0
    """
    if not temperature > 0:
        raise ShapeError(
            f"temperature={temperature}: it divides the logits, so it must be above 0; 1 leaves them alone."
        )
    student, teacher = _tokens(student, teacher, mask, dim)
    wanted = torch.log_softmax(teacher / temperature, -1)
    found = torch.log_softmax(student / temperature, -1)
    share = wanted.exp()
    each = torch.where(share == 0, 0.0, share * (wanted - found))  # NaN goes on
    return temperature**2 * each.sum(-1).mean()


def relative_loss(student: Tensor, teacher: Tensor, mask: Tensor | None = None, *, dim: Axes = -1) -> Tensor:
    """‖student − teacher‖² / ‖teacher‖² of each token, the mean over tokens: 0 is the same, 1 as far as nothing at all.

    Layers and tokens of any size count alike, also where a model has tokens that are a thousand times larger than others.
    Where the teacher's token is zero, the mean ‖teacher‖² divides (1 where all are zero).

    Args:
        student, teacher: [..., tokens, features], one shape; floating point.
        mask: bool, their shape without `dim`; False leaves a token out. None: all count.
        dim: the axes that make up a token.
    Raises:
        ShapeError: other shapes, a mask that does not fit, or nothing that is real.
    Source: Kurtic et al. 2023 (SquareHead), arXiv:2310.06927, equation 1, there over a whole batch.

    >>> import torch
    >>> float(relative_loss(torch.tensor([[0.0, 4.0]]), torch.tensor([[3.0, 4.0]])))
    0.36000001430511475
    """
    student, teacher = _tokens(student, teacher, mask, dim)
    error = (student - teacher).square().sum(-1)
    size = teacher.square().sum(-1)
    typical = torch.where(size.mean() > 0, size.mean(), 1.0)
    return (error / torch.where(size > 0, size, typical)).mean()


def cosine_loss(student: Tensor, teacher: Tensor, mask: Tensor | None = None, *, dim: int = -1) -> Tensor:
    """1 − cosine of the angle between student and teacher, the mean over tokens; lengths do not count.

    Args:
        student, teacher: [..., features], one shape; floating point. The cosine with a zero vector is 0.
        mask: bool, their shape without `dim`; False leaves a token out. None: all count.
    Raises:
        ShapeError: other shapes, a mask that does not fit, or nothing that is real.

    >>> import torch
    >>> float(cosine_loss(torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 3.0]])))
    1.0
    """
    student, teacher = _tokens(student, teacher, mask, dim)
    return (1 - F.cosine_similarity(student, teacher, dim=-1)).mean()


def mse_loss(student: Tensor, teacher: Tensor, mask: Tensor | None = None, *, dim: Axes = -1) -> Tensor:
    """(student − teacher)², the mean over features and tokens.

    Args:
        student, teacher: [..., features], one shape; floating point.
        mask: bool, their shape without `dim`; False leaves a token out. None: all count.
    Raises:
        ShapeError: other shapes, a mask that does not fit, or nothing that is real.

    >>> import torch
    >>> float(mse_loss(torch.tensor([[1.0, 3.0]]), torch.tensor([[1.0, 1.0]])))
    2.0
    """
    student, teacher = _tokens(student, teacher, mask, dim)
    return (student - teacher).square().mean()


NAMED: dict[str, Loss] = {"kl": kl_loss, "relative": relative_loss, "cosine": cosine_loss, "mse": mse_loss}


def _tokens(student: Tensor, teacher: Tensor, mask: Tensor | None, dim: Axes) -> tuple[Tensor, Tensor]:
    """Both as [real tokens, features], float32 or float64. What the mask leaves out gets no gradient, were it NaN."""
    if student.shape != teacher.shape:
        raise ShapeError(
            f"the student's tensor is {list(student.shape)}, the teacher's {list(teacher.shape)}: only tensors of one shape can"
            " be compared. Compare others, or give a loss of your own that brings them together."
        )
    axes = [axis % max(1, student.ndim) for axis in ((dim,) if isinstance(dim, int) else dim)]
    if not student.ndim or len(set(axes)) != len(axes):
        raise ShapeError(
            f"a tensor of {list(student.shape)} has no tokens along dim={dim}: at least one axis of features."
        )
    shape = [size for axis, size in enumerate(student.shape) if axis not in axes]
    if mask is not None and list(mask.shape) != shape:
        raise ShapeError(
            f"the mask is {list(mask.shape)} for {shape} tokens: it has one value for each. Leave it out (None) where all are"
            " real."
        )
    dtype = torch.promote_types(torch.promote_types(student.dtype, teacher.dtype), torch.float32)

    def picked(x: Tensor) -> Tensor:
        x = x.movedim(axes, list(range(-len(axes), 0))).flatten(-len(axes))
        x = x if mask is None else x[mask.to(x.device) != 0]
        return x.reshape(-1, x.shape[-1]).to(student.device, dtype)

    student, teacher = picked(student), picked(teacher)
    if not student.numel():
        what = "the tensors are empty" if mask is None else f"the mask leaves none of {mask.numel()} tokens"
        raise ShapeError(f"{what}, and of nothing there is no mean: leave such batches out.")
    return student, teacher
