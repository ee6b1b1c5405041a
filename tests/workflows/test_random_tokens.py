"""Random ones among calibration's token ids: which are drawn, which stay, and that nothing else is touched."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import twofour
from twofour.errors import UnsupportedError
from twofour.solvers import Recipe
from twofour.workflows.random_tokens import with_random_tokens

VOCABULARY = 5000


class Reader(nn.Module):
    """Words, positions and types added up, and two layers."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words = nn.Embedding(VOCABULARY, width)
        self.positions = nn.Embedding(2048, width)
        self.types = nn.Embedding(2, width)
        self.up = nn.Linear(width, 64)
        self.down = nn.Linear(64, width)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
    ) -> Tensor:
        x = self.words(input_ids)
        if position_ids is not None:
            x = x + self.positions(position_ids)
        if token_type_ids is not None:
            x = x + self.types(token_type_ids)
        return self.down(self.up(x).relu())


def ids(rows: int = 8, tokens: int = 100, seed: int = 0) -> Tensor:
    return torch.randint(10, 60, (rows, tokens), generator=torch.Generator().manual_seed(seed))


def drawn(batch: Any, share: float = 0.5) -> Any:
    made, said = with_random_tokens(Reader(), [batch], share)
    assert said is not None
    assert len(made) == 2
    assert made[0] is batch
    return made[1]


@pytest.mark.parametrize("share", [0.1, 0.5, 1.0])
def test_the_share_is_drawn_from_the_whole_vocabulary(share: float) -> None:
    before = ids(40, 500)
    after = drawn(before, share)
    changed = after != before
    assert float(changed[:, 1:-1].float().mean()) == pytest.approx(share, abs=0.02)
    assert not bool(changed[:, [0, -1]].any())
    values = after[changed]
    assert 0 <= int(values.min()) < 50 * VOCABULARY // len(values)
    assert VOCABULARY - 50 * VOCABULARY // len(values) < int(values.max()) < VOCABULARY


@pytest.mark.parametrize("left", [False, True])
def test_padding_and_the_ends_of_what_is_real_stay(left: bool) -> None:
    before = ids()
    mask = torch.ones_like(before)
    if left:
        mask[:, :30] = 0
    else:
        mask[:, 70:] = 0
    after = drawn({"input_ids": before, "attention_mask": mask}, 1.0)
    same = after["input_ids"] == before
    first, last = (30, 99) if left else (0, 69)
    assert bool(same[mask == 0].all())
    assert bool(same[:, [first, last]].all())
    assert float(same[:, first + 1 : last].float().mean()) < 0.01
    assert after["attention_mask"] is mask


def test_types_and_positions_stay() -> None:
    before = {
        "input_ids": ids(),
        "token_type_ids": torch.randint(2, (8, 100)),
        "position_ids": torch.arange(100).expand(8, -1).contiguous(),
    }
    after = drawn(before)
    assert after["token_type_ids"] is before["token_type_ids"]
    assert after["position_ids"] is before["position_ids"]
    assert not torch.equal(after["input_ids"], before["input_ids"])
    assert list(after) == list(before)


def test_a_batch_is_drawn_alike_wherever_it_comes() -> None:
    one, two = ids(seed=1), ids(seed=2)
    forward, _ = with_random_tokens(Reader(), [one, two], 0.5)
    backward, _ = with_random_tokens(Reader(), [two, one], 0.5)
    assert torch.equal(forward[2], backward[3])
    assert torch.equal(forward[3], backward[2])
    assert not torch.equal(forward[2] == one, forward[3] == two)


def test_batches_keep_their_kind_and_the_caller_keeps_his() -> None:
    from transformers import BatchEncoding

    class Inside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.reader = Reader()

        def forward(self, features: Any) -> Tensor:
            return self.reader(features.input_ids)

    before = ids().to(torch.int32)
    original = before.clone()
    made, said = with_random_tokens(Inside(), [(BatchEncoding({"input_ids": before}),)], 0.5)
    assert said == "as given, and a copy with 50% of input_ids drawn at random"
    encoding = made[1][0]
    assert isinstance(encoding, BatchEncoding)
    assert encoding["input_ids"].dtype == torch.int32
    assert not torch.equal(encoding["input_ids"], before)
    assert torch.equal(before, original)


def test_without_token_ids_nothing_happens() -> None:
    floats = [torch.randn(4, 16)]
    assert with_random_tokens(nn.Linear(16, 4), floats, 0.5) == (floats, None)
    whole = [ids()]
    assert with_random_tokens(Reader(), whole, 0.0) == (whole, None)
    small = nn.Sequential(nn.Embedding(100, 8), nn.Linear(8, 8))
    assert with_random_tokens(small, whole, 0.5) == (whole, None)
    with pytest.raises(UnsupportedError, match=r"random_tokens=1.5: a share of the token ids, 0 up to 1"):
        with_random_tokens(Reader(), whole, 1.5)


def test_inputs_the_model_fails_on_are_told_by_prune() -> None:
    with pytest.raises(twofour.CalibrationError, match="the model fails on the calibration inputs: IndexError"):
        twofour.prune(Reader(), calibration=[ids() + VOCABULARY])


def test_without_calibration_there_is_nothing_to_draw_from() -> None:
    model = Reader()
    before = model.up.weight.detach().clone()
    with pytest.raises(UnsupportedError, match=r"random_tokens=0\.3 .* there is no calibration: pass calibration= too"):
        twofour.prune(model, random_tokens=0.3)
    assert torch.equal(model.up.weight, before)


def test_prune_draws_for_its_default_method_and_says_so() -> None:
    def report(**how: Any) -> dict[str, Any]:
        summary = twofour.prune(Reader(), calibration=[ids()], progress=False, **how).summary
        assert summary["calibration batches"] == 1
        return summary

    assert report()["calibration tokens"].endswith(" 50% of ids drawn at random")
    assert (
        report(method=Recipe("admm"), random_tokens=0.25)["calibration tokens"]
        == "as given, and a copy with 25% of ids drawn at random"
    )
    assert (
        report(method="wanda", random_tokens=1)["calibration tokens"]
        == "as given, and a copy with 100% of ids drawn at random"
    )
    assert "calibration tokens" not in report(method="sparsegpt")
    assert "calibration tokens" not in report(random_tokens=0)


def test_words_that_calibration_lacks_cost_less() -> None:
    """Half of the vocabulary lives in directions that the texts never show."""

    def loss(share: float) -> float:
        model = Reader(64)
        with torch.no_grad():
            model.words.weight[: VOCABULARY // 2, 32:] = 0
        other = torch.randint(VOCABULARY // 2, VOCABULARY, (16, 100), generator=torch.Generator().manual_seed(5))
        dense = model(other).detach()
        twofour.prune(model, calibration=[ids(64, 100)], random_tokens=share, progress=False)
        return float((model(other).detach() - dense).square().sum() / dense.square().sum())

    assert loss(0.5) < 0.75 * loss(0.0)
