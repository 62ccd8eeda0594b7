"""`spry bench memory`: every estimator on a small model, resident and streamed, and going on after a stop."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from spryfl.bench import memory
from spryfl.bench.measure import measure
from spryfl.bench.memory_report import as_markdown, plot_growth
from spryfl.bench.memory_targets import targets_table
from spryfl.bench.works import EVERY, GROWTH_CASES, SPRY, WORKS
from spryfl.errors import SpryError

FIELDS = {
    "work", "model", "estimator", "precision", "streamed", "batch", "tokens", "layers", "k",
    "activation_peak_bytes", "resident_peak_bytes", "seconds_per_step",
}  # fmt: skip


@pytest.mark.parametrize("streamed", [False, True])
def test_every_estimator_on_a_packed_model(streamed: bool, tmp_path: Path) -> None:
    """All find the same slope, and checkpointing keeps less than plain backprop."""
    pytest.importorskip("bitsandbytes")
    work = replace(WORKS["llama2-7b"], shape="smollm2-135m", layers=3, tokens=24, streamed=streamed)
    rows = {}
    for case in (*EVERY, *SPRY):
        rows[case] = measure(work, case, tmp_path)
    assert all(set(row) >= FIELDS for row in rows.values())
    slopes = {case.estimator: row["slope"] for case, row in rows.items() if case.units == "all" and case.k == 1}
    exact = slopes["backprop_checkpointed"]
    for name in ("forward", "func_jvp", "backprop_budgeted", "backprop"):
        assert slopes[name] == pytest.approx(exact, rel=0.05), name  # bfloat16
    if streamed:
        assert rows[EVERY[1]]["weight_bytes"] < 3 * 49152 * 576  # embeddings and norms, no layer


def test_a_stopped_bench_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured = []

    def fake(arguments: list[str], cache: Path) -> list[dict[str, object]]:
        measured.append(tuple(arguments))
        if len(measured) == 4:
            raise KeyboardInterrupt
        case = WORKS[arguments[0]].cases[int(arguments[1])]
        row = {"work": arguments[0], "estimator": case.estimator, "k": case.k, "units": case.units}
        return [row | {"seconds_per_step": float(len(measured)), "activation_peak_bytes": len(measured)}]

    monkeypatch.setattr(memory, "_in_own_process", fake)
    partial = tmp_path / "partial.jsonl"
    monkeypatch.setitem(WORKS, "bert-large", replace(WORKS["bert-large"], cases=EVERY[:2], repeats=3))
    with pytest.raises(KeyboardInterrupt):
        memory.run_works(["bert-large"], [], partial, tmp_path)
    with partial.open("a") as handle:
        handle.write('{"key": "torn')
    rows = memory.run_works(["bert-large"], [], partial, tmp_path)
    assert len(measured) == 7  # the one that was stopped is repeated, no other
    assert [row["repeats"] for row in rows] == [3, 3]
    assert [row["seconds_per_step"] for row in rows] == [3.0, 5.0]  # medians of 1, 3, 6 and 2, 5, 7
    assert [row["activation_peak_bytes"] for row in rows] == [6, 7]
    with pytest.raises(SpryError, match=r"unknown work 'bert'. Did you mean 'bert-large'"):
        memory.run_works(["bert"], [], partial, tmp_path)
    with pytest.raises(SpryError, match=r"unknown estimator 'forwards'. Did you mean 'forward'"):
        memory.run_works(["bert-large"], ["forwards"], partial, tmp_path)


def test_cases_not_measured_anew_keep_their_rows() -> None:
    def row(work: str, estimator: str, peak: int, **more: Any) -> dict[str, Any]:
        return {"work": work, "estimator": estimator, "k": 1, "units": "all", "activation_peak_bytes": peak} | more

    kept = [row("growth", "forward", 1), row("llama2-7b", "backprop", 2), row("llama2-7b", "forward", 3, error="no")]
    new = [
        row("llama2-7b", "forward", 4, layers=32),
        row("bert-large", "inference", 5),
        row("llama2-7b", "forward", 6, k=8),
    ]
    merged = memory.with_kept(new, kept)
    assert [r["activation_peak_bytes"] for r in merged] == [5, 4, 2, 6, 1]


def test_a_repeat_that_failed_counts_for_nothing_beside_those_that_did_not() -> None:
    what = {"work": "bert-large", "estimator": "forward", "k": 1, "units": "all"}
    failed = what | {"error": "killed"}
    good = [what | {"activation_peak_bytes": size, "cpu_seconds_per_step": size / 10} for size in (10, 30)]
    for measured in ([[failed], [good[0]], [good[1]]], [[good[0]], [failed], [good[1]]]):
        (row,) = memory._merged(measured)
        assert (row["activation_peak_bytes"], row["cpu_seconds_per_step"], row["repeats"]) == (30, 2.0, 2)
        assert "error" not in row
    assert memory._merged([[failed], [failed]]) == [failed]


def test_damaged_files_of_an_earlier_bench(tmp_path: Path) -> None:
    (tmp_path / "memory.json").write_text('[{"work": ')
    (tmp_path / "partial.jsonl").write_text('{"key": \n')
    with pytest.raises(SpryError, match=r"memory.json: not JSON .*: mend or remove it"):
        memory.read_rows(tmp_path / "memory.json")
    with pytest.raises(SpryError, match=r"partial.jsonl: not JSON lines .*: mend or remove it"):
        memory.run_works(["llama2-7b"], ["inference"], tmp_path / "partial.jsonl", tmp_path)


def test_what_failed_is_told_in_the_table(tmp_path: Path) -> None:
    (tmp_path / "file").touch()  # no folder can be made below it
    partial = tmp_path / "partial.jsonl"
    rows = memory.run_works(["llama2-7b"], ["inference"], partial, tmp_path / "file" / "cache")
    assert "Not a directory" in rows[0]["error"]
    assert "Not a directory" in as_markdown(rows)
    memory.run_works(["llama2-7b"], ["inference"], partial, tmp_path / "file" / "cache")
    assert len(partial.read_text().splitlines()) == 2  # what failed is tried again


def test_targets_beside_what_was_measured() -> None:
    known = {"work": "bert-large", "k": 1, "units": "all"}
    rows = [
        {**known, "estimator": "inference", "activation_peak_bytes": 200, "cpu_seconds_per_step": 1.0},
        {**known, "estimator": "forward", "activation_peak_bytes": 100, "cpu_seconds_per_step": 2.5},
        {**known, "estimator": "backprop_checkpointed", "error": "killed"},
    ]
    assert targets_table(rows).splitlines()[2:] == [
        "| BERT-large, forward mode's activations, in stock inference's | 1.5 | 0.5 |",
        "| BERT-large, 24 layers: time of forward mode, in inferences | 2.2 | **missed**: 2.5 |",
    ]
    assert targets_table(rows[:1]) == ""


def test_growth_as_table_and_plot(tmp_path: Path) -> None:
    rows = [
        {"work": "growth", "estimator": case.estimator, "layers": layers, "tokens": tokens,
         "activation_peak_bytes": tokens * 10**6 * (layers if "back" in case.estimator else 1)}
        for case in GROWTH_CASES for layers in (6, 12) for tokens in (1, 2)
    ]  # fmt: skip
    table = as_markdown(rows)
    assert "| forward | 2 | 2.0 | 2.0 |" in table
    assert "| backprop_checkpointed | 2 | 12.0 | 24.0 |" in table
    plot_growth(rows, tmp_path / "growth.png")
    assert (tmp_path / "growth.png").stat().st_size > 10_000
    assert json.loads(json.dumps(rows)) == rows
