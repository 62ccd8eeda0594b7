"""Confidence intervals, time and bytes to a target, tables: all by hand-sized numbers."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pyarrow import parquet

from spryfl.compare.equal_score import equal_score_table
from spryfl.compare.plots import dataset_figure, overview_figure, plot_dataset, scores_seen
from spryfl.compare.results import Reached, Result, ResultRow, reached, write_parquet
from spryfl.compare.summary import summary_table
from spryfl.compare.tables import Table, metrics_table, overview_tables, results_table, search_table, target_table
from spryfl.report.intervals import interval
from spryfl.tracking.events import RoundEvent

COSTS = ("CPU", "bytes")


def event(round: int, score: float | None, **more: Any) -> RoundEvent:
    values: dict[str, Any] = {
        "round": round,
        "method": "spry",
        "loss": 1.0,
        "accuracy": score,
        "test_loss": 1.0,
        "bytes_up": 10 * (round > 0),
        "bytes_down": 100 * (round > 0),
        "seconds": 3.0,
        "client_seconds": 2.0 * (round > 0),
        "client_cpu_seconds": 1.0 * (round > 0),
        "peak_activation_bytes": 5,
        "num_updates": 2,
        "metrics": {} if score is None else {"accuracy": score},
    }
    return RoundEvent(**values | more)


def row(**more: Any) -> ResultRow:
    values: dict[str, Any] = {
        "dataset": "reviews",
        "model": "m",
        "method": "spry",
        "variant": "spry",
        "label": "Spry",
        "adapter": "lora",
        "alpha": 0.1,
        "seed": 0,
        "rounds": 3,
        "metric": "accuracy",
        "generalized": None,
        "personalized": None,
        "central_test": 0.5,
        "metrics": '{"accuracy": 0.5}',
        "loss": 1.0,
        "client_seconds": 20.0,
        "client_cpu_seconds": 10.0,
        "seconds": 30.0,
        "bytes_up": 10**6,
        "bytes_down": 2 * 10**6,
        "activation_peak_bytes": 3 * 10**6,
        "target": None,
        "rounds_to_target": None,
        "client_seconds_to_target": None,
        "client_cpu_seconds_to_target": None,
        "seconds_to_target": None,
        "bytes_to_target": None,
        "date": "2026-11-28",
        "search_trials": 0,
        "settings": "{}",
    }
    return ResultRow(**values | more)


def test_interval_by_hand() -> None:
    """1, 2, 3: mean 2, deviation 1, t(0.975, 2) = 4.30265, so 4.30265 / sqrt(3) = 2.48414."""
    found = interval([1.0, 2.0, 3.0])
    assert (found.mean, found.count) == (2.0, 3)
    assert found.half_width == pytest.approx(2.48414, abs=1e-5)
    assert found.shown() == "2.000 ± 2.484"
    assert interval([1.0, 2.0]).shown() == "1.500 (2)"  # whose interval would be 6.353 to either side
    assert interval([0.7]).shown() == "0.700"
    assert interval([math.inf, 5.0]).shown() == "inf"  # a perplexity; none of the three knows a spread
    assert interval([math.nan, 5.0]).shown() == "nan"


def test_cost_to_a_target_is_counted_to_the_first_round_that_was_good_enough() -> None:
    events = [event(0, 0.3), event(1, None), event(2, 0.6), event(3, 0.55), event(4, 0.7)]
    assert reached(events, 0.6, "accuracy") == Reached(2, 4.0, 2.0, 9.0, 220)
    assert reached(events, 0.65, "accuracy") == Reached(4, 8.0, 4.0, 15.0, 440)
    assert reached(events, 0.3, "accuracy") == Reached(0, 0.0, 0.0, 3.0, 0)
    assert reached(events, 0.8, "accuracy") is None


def test_less_perplexity_is_better() -> None:
    events = [event(r, None, metrics={"perplexity": p}) for r, p in ((0, 50.0), (1, 30.0), (2, 20.0))]
    found = reached(events, 30.0, "perplexity")
    assert found is not None
    assert found.round == 1
    assert reached(events, 10.0, "perplexity") is None


def test_parquet_has_a_column_of_each_field_even_where_all_are_empty(tmp_path: Path) -> None:
    rows = [row(), row(seed=1, central_test=0.75, search_trials=8, settings='{"server.learning_rate": 0.1}')]
    write_parquet(rows, tmp_path / "results.parquet")
    table = parquet.read_table(tmp_path / "results.parquet")
    assert table.num_rows == 2
    wanted = (
        "dataset model method adapter alpha seed rounds generalized personalized central_test client_seconds bytes_up "
        "bytes_down activation_peak_bytes"
    )
    assert set(wanted.split()) <= set(table.column_names)
    assert str(table.schema.field("generalized").type) == "double"
    assert table.to_pylist()[1]["central_test"] == 0.75


def test_results_table_by_hand() -> None:
    rows = [row(), row(seed=1, central_test=0.7, client_cpu_seconds=30.0), row(label="Other", variant="other")]
    assert results_table(rows).as_markdown().splitlines() == [
        "| method | seeds | central test | client CPU (s) | activation peak (MB) | up (MB) | down (MB) |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
        "| Spry | 2 | 0.600 (2) | 20 | 3 | 1 | 2 |",
        "| Other | 1 | 0.500 | 10 | 3 | 1 | 2 |",
    ]
    with_clients = results_table([replace(rows[0], generalized=0.61, personalized=0.72)])
    assert with_clients.lines[0][2:5] == ["0.500", "0.610", "0.720"]


def test_all_datasets_at_a_glance() -> None:
    rows = [
        row(),
        row(dataset="news", central_test=0.25, generalized=0.3),
        row(label="Other", variant="other", central_test=0.75),
    ]
    (first, central), (second, generalized) = overview_tables(rows)
    assert (first, second) == ("central test", "generalized")
    assert central.headings == ["method", "reviews", "news"]
    assert central.lines == [["Spry", "0.500", "0.250"], ["Other", "0.750", ""]]
    assert generalized.lines == [["Spry", "", "0.300"]]


def test_costs_at_an_equal_score() -> None:
    def run(label: str, seed: int, *scores: float | None) -> Result:
        return Result(row(label=label, seed=seed), tuple(event(round, score) for round, score in enumerate(scores)))

    slow = [run("Slow", seed, 0.25, 0.25, None, 0.5) for seed in (0, 1)]
    fast = [run("Fast", seed, 0.25, 0.5, 0.75, 0.75) for seed in (0, 1)]
    table = equal_score_table([*slow, *fast], ["Slow", "Fast"])
    assert table is not None
    assert table.headings[1:] == [
        "its best",
        "client CPU (s)",
        *(f"{a}: x {b}" for a in ("Slow", "Fast") for b in COSTS),
    ]
    assert table.lines == [
        ["Slow", "0.500 (2)", "3", "", "", "0.33", "0.33"],  # after one round what took three
        ["Fast", "0.750 (2)", "2", "never", "never", "", ""],
    ]
    untrained = equal_score_table([run("Lost", 0, 0.5, 0.25), *fast], ["Fast"])
    assert untrained is not None
    assert untrained.lines[0] == ["Lost", "0.500", "0", "", ""]  # best before training, which costs nothing
    apart = equal_score_table([run("Slow", 7, 0.25, 0.5), *fast], ["Fast"])
    assert apart is not None
    assert apart.lines[0][3:] == ["", ""]  # no seed that both have
    assert equal_score_table(slow, ["Fast"]) is None


def test_all_datasets_in_a_line_for_each_method() -> None:
    def runs(label: str, dataset: str, scores: tuple[float, ...], metric: str = "accuracy") -> list[Result]:
        events = tuple(event(round, score) for round, score in enumerate(scores))
        rows = [row(label=label, dataset=dataset, seed=s, central_test=scores[-1], metric=metric) for s in (0, 1)]
        return [Result(own, events) for own in rows]

    results = [
        *runs("Slow", "a", (0.25, 0.25, 0.5)),
        *runs("Fast", "a", (0.25, 0.5, 0.75)),
        *runs("Slow", "b", (0.25, 0.25, 0.25, 0.5)),
        *runs("Fast", "b", (0.25, 0.5, 0.5, 0.5)),
        *runs("Slow", "c", (0.25, 0.5)),
        *runs("Fast", "c", (0.25, 0.375)),
        *runs("Slow", "words", (9.0, 8.0, 7.0, 6.0), "perplexity"),
        *runs("Fast", "words", (9.0, 5.0), "perplexity"),
        *runs("Alone", "d", (0.25, 0.5)),
        *runs("Stuck", "a", (0.25, 0.0)),
    ]
    table = summary_table(results, ["Fast", "Absent"])
    assert table is not None
    assert list(table.headings) == ["method", "Fast: points higher", "Fast: x CPU"]
    assert list(map(list, table.lines)) == [
        ["Slow", "+0.0 (-12.5 to +25.0)", "0.33 (0.33 to 0.50), never in 1 of 4"],
        ["Fast", "", ""],
        ["Alone", "", ""],
        ["Stuck", "+75.0", ""],  # best before training, which costs nothing
    ]
    assert summary_table(results, ["Absent"]) is None


def test_less_is_better_in_costs_at_an_equal_score() -> None:
    events = tuple(event(round, score) for round, score in enumerate((9.0, 5.0, 4.0)))
    table = equal_score_table([Result(row(metric="perplexity"), events)], ["Spry"])
    assert table is not None
    assert table.lines == [["Spry", "4.000", "2", "", ""]]


def test_metrics_table_has_all_that_any_run_has() -> None:
    rows = [
        row(metrics='{"f1": 0.5, "best_f1": 0.75}'),
        row(seed=1, metrics='{"f1": 0.5, "best_f1": 0.75, "f1_answerable": 0.25}'),
        row(label="Other", metrics='{"f1": 0.25, "best_f1": 0.5}'),
    ]
    table = metrics_table(rows)
    assert table is not None
    assert list(table.headings) == ["method", "f1", "best f1", "f1 answerable"]
    assert list(map(list, table.lines)) == [
        ["Spry", "0.500 (2)", "0.750 (2)", "0.250"],
        ["Other", "0.250", "0.500", ""],
    ]
    assert metrics_table([row()]) is None


def test_target_table_compares_the_seeds_that_both_reached() -> None:
    def there(cpu: float, seed: int, label: str) -> ResultRow:
        return row(
            label=label,
            seed=seed,
            target=0.6,
            rounds_to_target=2,
            client_seconds_to_target=2 * cpu,
            client_cpu_seconds_to_target=cpu,
            bytes_to_target=int(cpu * 10**6),
        )

    rows = [
        there(4.0, 0, "Spry"),
        there(8.0, 1, "Spry"),
        there(10.0, 0, "Yogi"),
        row(label="Yogi", seed=1, target=0.6),  # not there in seed 1, so seed 0 alone is compared
        row(label="MeZO", target=0.6),
    ]
    table = target_table(rows, "Yogi")
    assert table is not None
    assert table.headings[-2:] == ["x Yogi's CPU", "x Yogi's bytes"]
    assert list(map(list, table.lines)) == [
        ["Spry", "2 of 2", "2", "6", "12", "6", "0.40", "0.40"],
        ["Yogi", "1 of 2", "2", "10", "20", "10", "1.00", "1.00"],
        ["MeZO", "0 of 1", "", "", "", "", "", ""],
    ]
    assert target_table([row()], "Yogi") is None


def test_search_table_tells_trials_and_settings() -> None:
    rows = [row(search_trials=8, settings='{"server.learning_rate": 0.123456, "adapter.rank": 4}'), row(label="Fixed")]
    table = search_table(rows)
    assert table is not None
    assert list(table.headings) == ["dataset, method", "trials", "adapter.rank", "server.learning_rate"]
    assert list(map(list, table.lines)) == [["reviews, Spry", "8", "4", "0.123"]]
    assert search_table([row()]) is None


def test_html_escapes_what_it_is_given() -> None:
    assert "<td>a &lt; b</td>" in Table(["x"], [["a < b"]]).as_html()
    assert "| a \\| b |" in Table(["x"], [["a | b"]]).as_markdown()


def test_curves_are_drawn_over_rounds_time_and_bytes(tmp_path: Path) -> None:
    results = [
        Result(row(label=label, seed=seed, target=0.6), tuple(event(r, 0.3 + 0.1 * r + 0.02 * seed) for r in range(5)))
        for label in ("Spry", "FedYogi")
        for seed in (0, 1, 2)
    ]
    methods = ["Spry", "FedYogi", "not run yet"]
    plot_dataset(results, methods, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    over_rounds, over_time, over_bytes = dataset_figure(results, methods, ["FedYogi"]).axes
    by_label = {str(line.get_label()): line for line in over_rounds.lines}
    assert [by_label.get(label) is None for label in methods] == [False, False, True]
    assert by_label["Spry"].get_xdata() == pytest.approx([0, 1, 2, 3, 4])
    assert by_label["Spry"].get_ydata() == pytest.approx([0.32, 0.42, 0.52, 0.62, 0.72])  # the mean of its seeds
    assert by_label["FedYogi"].get_linewidth() > by_label["Spry"].get_linewidth()
    assert len(over_rounds.collections) == 1  # the one interval
    assert over_time.lines[0].get_xdata()[1:] == pytest.approx([1, 2, 3, 4])
    assert over_bytes.lines[0].get_xdata()[1:] == pytest.approx([110e-6, 220e-6, 330e-6, 440e-6])


def test_the_overview_has_a_panel_a_dataset_and_a_line_a_method() -> None:
    rows = [
        *(row(dataset="a", label="Spry", seed=seed, central_test=0.5 + 0.1 * seed, target=0.9) for seed in (0, 1, 2)),
        row(dataset="a", label="FedYogi", central_test=0.8),
        row(dataset="b", label="FedYogi", central_test=math.inf),
        row(dataset="b", label="FedMeZO", central_test=None),
    ]
    methods = ["FedYogi", "Spry", "FedMeZO", "not run yet"]
    a, b = overview_figure(rows, methods, contenders=["Spry"]).axes
    assert (a.get_title(), b.get_title()) == ("a", "b")
    assert [text.get_text() for text in a.get_yticklabels()] == ["FedYogi", "Spry"]
    means = {float(line.get_ydata()[0]): line for line in a.lines if line.get_marker() == "o"}
    assert [means[place].get_xdata() for place in (0, 1)] == [pytest.approx([0.8]), pytest.approx([0.6])]
    assert [means[place].get_color() for place in (0, 1)] == ["0.45", "C0"]
    (seeds,) = (line for line in a.lines if line.get_marker() == "|")
    assert seeds.get_xdata() == pytest.approx([0.5, 0.6, 0.7])
    assert len(a.collections) == 1  # the one interval
    assert a.get_xlim() == pytest.approx((0.46, 0.94))  # every seed and the target
    assert not b.lines


def test_the_axis_of_scores_shows_every_seed_and_the_target() -> None:
    """Whatever the intervals; an infinite perplexity does not widen it."""

    def result(*scores: float | None, target: float | None = None) -> Result:
        return Result(row(target=target), tuple(event(r, score) for r, score in enumerate(scores)))

    assert scores_seen([result(0.3, None, 0.5), result(0.4, 0.7)]) == pytest.approx((0.26, 0.74))
    assert scores_seen([result(0.3, 0.5, target=0.8)]) == pytest.approx((0.25, 0.85))
    assert scores_seen([result(float("inf"), 20.0, 30.0)]) == pytest.approx((19.0, 31.0))
    assert scores_seen([result(0.5)]) == pytest.approx((0.45, 0.55))
