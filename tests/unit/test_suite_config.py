"""A suite's file: what it means, and every mistake in it with its remedy."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tomli_w

from spryfl.compare.cells import Suite, chosen_cells, in_order, relative_cost
from spryfl.compare.checking import check_cells
from spryfl.compare.search import search_config, spread_point
from spryfl.config import SearchRange, SuiteConfig, load_suite
from spryfl.errors import ConfigError, SpryError

SUITES = sorted((Path(__file__).parents[2] / "benchmarks/suites").glob("*.toml"))


def suite_table(**more: Any) -> dict[str, Any]:
    return {
        "seeds": [3, 1],
        "base": {"server": {"num_rounds": 4}, "partition": {"alpha": 0.1}},
        "dataset": [
            {"name": "reviews", "target": 0.6, "set": {"data.max_tokens": 16}},
            {"name": "long", "set": {"data.max_tokens": 32}},
        ],
        "method": [
            {"name": "fedmezo", "set": {"method.num_tangents": 4}},
            {"name": "spry", "label": "Spry"},
            {"name": "adam", "set": {"method.name": "fedyogi", "server.optimizer": "adam", "data.max_tokens": 8}},
        ],
    } | more


def read(tmp_path: Path, **more: Any) -> Suite:
    path = tmp_path / "suite.toml"
    path.write_text(tomli_w.dumps(suite_table(**more)))
    return Suite(load_suite(path), tmp_path / "out")


def test_a_cell_is_base_then_dataset_then_method_then_seed(tmp_path: Path) -> None:
    suite = read(tmp_path)
    cells = {cell.name: suite.run_config(cell) for cell in suite.cells()}
    assert len(cells) == 12
    spry, adam = cells["long/spry/1"], cells["long/adam/3"]
    assert (spry.method.name, spry.label, spry.seed) == ("spry", "Spry", 1)
    assert (spry.data.max_tokens, spry.server.num_rounds, spry.partition.alpha) == (32, 4, 0.1)
    assert (adam.method.name, adam.server.optimizer, adam.data.max_tokens) == ("fedyogi", "adam", 8)


def test_tables_of_a_set_are_as_dotted_keys(tmp_path: Path) -> None:
    """They leave the base's other keys, and other cells, as they are."""
    datasets = [{"name": "reviews", "set": {"server": {"num_rounds": 3}}}, {"name": "long"}]
    methods = [{"name": "spry", "set": {"server.cohort_size": 5}}, {"name": "fedyogi"}]
    suite = read(tmp_path, base={"server": {"learning_rate": 0.5}}, dataset=datasets, method=methods)
    found = {cell.name: suite.run_config(cell).server for cell in suite.cells()}
    assert {server.learning_rate for server in found.values()} == {0.5}
    assert (found["reviews/spry/1"].num_rounds, found["reviews/spry/1"].cohort_size) == (3, 5)
    assert found["reviews/fedyogi/1"].cohort_size == found["long/fedyogi/1"].cohort_size != 5
    assert found["long/spry/1"].num_rounds != 3


def test_a_datasets_name_may_be_that_of_its_data(tmp_path: Path) -> None:
    suite = read(tmp_path)
    (tmp_path / "data" / "reviews").mkdir(parents=True)
    below = replace(suite, data=tmp_path / "data")
    names = {cell.dataset.name: below.run_config(cell).data.name for cell in below.cells()}
    assert names == {"reviews": str(tmp_path / "data" / "reviews"), "long": "builtin:movie_reviews"}


def test_the_first_seed_of_everything_comes_first_and_the_cheapest_of_it(tmp_path: Path) -> None:
    suite = read(tmp_path)
    cells = in_order(suite, suite.cells())
    assert [cell.seed for cell in cells] == [3] * 6 + [1] * 6
    first = [cell.name for cell in cells[:6]]
    assert first.index("reviews/spry/3") < first.index("long/spry/3") < first.index("long/fedmezo/3")
    costs = [relative_cost(suite.run_config(cell)) for cell in cells[:6]]
    assert costs == sorted(costs)


def test_only_picks_by_dataset_method_or_pattern(tmp_path: Path) -> None:
    cells = read(tmp_path).cells()
    assert {cell.dataset.name for cell in chosen_cells(cells, ["long"])} == {"long"}
    assert [cell.name for cell in chosen_cells(cells, ["long/*/1", "reviews/spry/3"])] == [
        "reviews/spry/3",
        "long/fedmezo/1",
        "long/spry/1",
        "long/adam/1",
    ]
    assert chosen_cells(cells, []) == cells
    with pytest.raises(SpryError, match=r"--only spri: no such dataset.*Did you mean 'spry'"):
        chosen_cells(cells, ["spry", "spri"])


def test_overrides_change_what_all_runs_share(tmp_path: Path) -> None:
    read(tmp_path)
    suite = Suite(load_suite(tmp_path / "suite.toml", ["server.num_rounds=2", "data.max_tokens=64"]), tmp_path)
    config = suite.run_config(suite.cells()[0])
    assert (config.server.num_rounds, config.data.max_tokens) == (2, 16)  # the dataset's own stays


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"sedes": [1]}, "unknown key 'sedes'. Did you mean 'seeds'?"),
        ({"dataset": [{"name": "a", "tagret": 1}]}, "unknown key 'dataset.0.tagret'. Did you mean 'target'?"),
        ({"search": {"trails": 3}}, "unknown key 'search.trails'. Did you mean 'trials'?"),
        ({"seeds": [1, 1]}, "seeds: must differ, but 1 stands there twice"),
        ({"seeds": [0, 1], "dataset": [{"name": "a", "seeds": [0, 2]}]}, "dataset 'a': seeds has 2, which the suite's"),
        ({"dataset": []}, "dataset: Tuple should have at least 1 item"),
        ({"method": [{"name": "spry"}, {"name": "fedyogi", "label": "spry"}]}, "method labels: must differ, but spry"),
        ({"base": {"seed": 1}}, r"base: seed stands there, but a suite has seeds = \[0, 1, 2\]: leave it out"),
        ({"dataset": [{"name": "a", "set": {"seed": 1}}]}, "dataset 'a': seed stands there, but a suite has seeds"),
        ({"method": [{"name": "spry", "set": {"label": "a"}}]}, "method 'spry': label stands there, but each"),
        ({"reference": "fedyogo"}, "reference: no such ..method.. 'fedyogo'."),
        ({"contenders": ["spry", "fedyogo"]}, "contenders: no such ..method.. 'fedyogo'."),
        ({"method": [{"name": "spry", "space": {"server.tau": {"low": 1, "high": 2}}}]}, "there is no .search.: add"),
        ({"dataset": [{"name": "a"}, {"name": "b", "tuned_on": "a"}]}, "has tuned_on, but there is no .search.: leave"),
        (
            {"search": {}, "dataset": [{"name": "aa"}, {"name": "b", "tuned_on": "ab"}]},
            "tuned_on = 'ab' is no ..dataset.. with a search of its own. Did you mean 'aa'",
        ),
        (
            {"search": {}, "dataset": [{"name": "a"}, *({"name": n, "tuned_on": o} for n, o in ("ba", "cb"))]},
            "dataset 'c': tuned_on = 'b' is no ..dataset.. with a search of its own",
        ),
        ({"dataset": [{"name": "a", "search_rounds": 3}]}, "no search of its own: leave that out, or add .search."),
        (
            {"search": {}, "dataset": [{"name": "a"}, {"name": "b", "tuned_on": "a", "search_rounds": 3}]},
            "dataset 'b' has search_rounds, but no search of its own: leave that out, or leave tuned_on out",
        ),
        ({"method": [{"name": "fedyogy"}]}, "'fedyogy' is no method's name. Did you mean 'fedyogi'"),
        (
            {"search": {"space": {"server.num_rounds": {"choices": [1, 2]}, "seed": {"choices": [7]}}}},
            "search.space has seed, server.num_rounds, which the suite sets itself",
        ),
        ({"search": {"space": {"server.tau": {"low": 2, "high": 1}}}}, "low = 2 is not below high = 1"),
        ({"search": {"space": {"server.tau": {"low": 0, "high": 1}}}}, "a log scale begins above 0"),
        ({"search": {"space": {"server.tau": {"low": 1}}}}, "give low and high, or choices"),
        (
            {"search": {}, "method": [{"name": "spry", "space": {"server.tau": {"low": 1, "high": 2}}}]},
            "space has server.tau, which search.space has not",
        ),
        (
            {
                "search": {"space": {"server.tau": {"low": 1, "high": 2}}},
                "method": [{"name": "spry", "set": {"server": {"tau": 1.5}}}],
            },
            "method 'spry': set has server.tau, which the search draws anew: leave it out, or give the method space",
        ),
    ],
)
def test_mistakes_in_the_suite_itself(tmp_path: Path, more: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read(tmp_path, **more)


def test_overrides_are_held_to_the_same(tmp_path: Path) -> None:
    path = tmp_path / "suite.toml"
    path.write_text(tomli_w.dumps(suite_table()))
    assert load_suite(path, ["server.num_rounds=9"]).base["server"] == {"num_rounds": 9}
    with pytest.raises(ConfigError, match="base: seed stands there"):
        load_suite(path, ["seed=4"])


def test_a_partition_or_model_that_cannot_be_shows_before_any_run(tmp_path: Path) -> None:
    datasets = [
        {"name": "column", "set": {"partition.kind": "column", "partition.column": "autor"}},
        {"name": "model", "set": {"model.name": "./gone"}},
    ]
    suite = read(tmp_path, dataset=datasets, method=[{"name": "spry"}], seeds=[0])
    with pytest.raises(ConfigError) as caught:
        check_cells(suite, suite.cells())
    assert "column/spry/0: partition.column: no column 'autor'" in str(caught.value)
    assert "model/spry/0: model.name = './gone'" in str(caught.value)


def test_problems_of_all_cells_show_at_once_and_each_once(tmp_path: Path) -> None:
    methods = [{"name": "spry"}, {"name": "fedyogi", "set": {"server.cohort_sise": 3}}]
    datasets = [
        {"name": "gone", "set": {"data.name": "./gone.csv"}},
        {"name": "columns", "set": {"data.text_columns": ["txt"]}},
    ]
    suite = read(tmp_path, method=methods, dataset=datasets, seeds=[0])
    with pytest.raises(ConfigError) as caught:
        check_cells(suite, suite.cells())
    text = str(caught.value)
    assert "gone/fedyogi/0, columns/fedyogi/0: unknown key 'server.cohort_sise'. Did you mean 'cohort_size'?" in text
    assert "gone/spry/0: data.name = './gone.csv': no such file" in text
    assert "columns/spry/0: data.text_columns: split train has no column 'txt'. Did you mean 'text'?" in text
    assert not suite.out.exists()


def test_public_text_is_looked_at_too(tmp_path: Path) -> None:
    guided = {"guide.guess": "maps", "guide.text": "builtin:product_reviews", "guide.text_columns": ["txet"]}
    suite = read(tmp_path, method=[{"name": "spry"}, {"name": "spry_guided", "set": guided}], seeds=[0])
    with pytest.raises(ConfigError, match=r"^reviews/spry_guided/0, long/spry_guided/0: guide.text_columns: .*'text'"):
        check_cells(suite, suite.cells())


def test_a_problem_of_every_cell_names_none(tmp_path: Path) -> None:
    suite = read(tmp_path, base={"server": {"num_rounds": 0}}, seeds=[0])
    with pytest.raises(ConfigError, match=r"^server.num_rounds: Input should be greater than or equal to 1 \(got 0\)$"):
        check_cells(suite, suite.cells())


def test_both_ends_of_a_range_must_be_possible(tmp_path: Path) -> None:
    search = {"space": {"server.beta1": {"low": 0.5, "high": 1.5}, "adapter.ranc": {"low": 1, "high": 4}}}
    suite = read(tmp_path, search=search, seeds=[0])
    with pytest.raises(ConfigError, match=r"unknown key 'adapter.ranc'. Did you mean 'rank'\?; server.beta1: Input"):
        check_cells(suite, suite.cells())


def test_spread_points_cover_their_ranges() -> None:
    space = {
        "a": SearchRange(low=1e-3, high=1.0),
        "b": SearchRange(low=1, high=4, scale="linear"),
        "c": SearchRange(choices=("x", "y")),
    }
    points = [spread_point(space, 5, number) for number in range(64)]
    assert points[3] == spread_point(space, 5, 3) != spread_point(space, 6, 3)
    decades = [sum(10.0 ** -(n + 1) <= p["a"] < 10.0**-n for p in points) for n in range(3)]
    assert all(19 <= count <= 24 for count in decades)
    assert {p["b"] for p in points} == {1, 2, 3, 4}
    assert [p["c"] for p in points].count("x") == 32


def test_keys_of_one_choice_leave_the_spread_to_the_others() -> None:
    fixed, free = SearchRange(choices=(0.1,)), SearchRange(low=1e-4, high=1.0)
    points = [spread_point({"fixed": fixed, "free": free}, 0, number) for number in range(4)]
    assert {p["fixed"] for p in points} == {0.1}
    assert sorted(int(np.log10(p["free"])) for p in points) == [-3, -2, -1, 0]  # one in each quarter
    assert spread_point({"fixed": fixed}, 0, 3) == {"fixed": 0.1}


def test_data_are_looked_up_in_the_folder_first(tmp_path: Path) -> None:
    (tmp_path / "data/sst2").mkdir(parents=True)
    config = read(tmp_path, dataset=[{"name": "a", "set": {"data.name": "sst2"}}, {"name": "b"}]).config
    suite = Suite(config, tmp_path, tmp_path / "data")
    names = {cell.dataset.name: suite.run_config(cell).data.name for cell in suite.cells()}
    assert names == {"a": str(tmp_path / "data/sst2"), "b": "builtin:movie_reviews"}
    with pytest.raises(SpryError, match=r"--data .*nowhere: no such folder"):
        check_cells(Suite(config, tmp_path, tmp_path / "nowhere"), suite.cells())


def test_a_trial_never_sees_the_test_split(tmp_path: Path) -> None:
    suite = read(tmp_path, search={"rounds": 2, "seed": 7, "validation_fraction": 0.3})
    config = search_config(suite, suite.cells()[0], {"local.learning_rate": 0.5})
    assert (config.data.validation_fraction, config.data.test_seed) == (0.3, 7)
    assert {suite.run_config(cell).data.test_seed for cell in suite.cells()} == {7}
    assert {suite.run_config(cell).data.validation_fraction for cell in suite.cells()} == {None}
    assert (config.seed, config.server.num_rounds, config.evaluation.every) == (7, 2, 2)
    assert config.local.learning_rate == 0.5


def test_trials_must_have_rows_for_all_clients(tmp_path: Path) -> None:
    """A part of train is cut off for them, which leaves less to share out than the run itself has."""
    for split in ("train", "test"):
        rows = "".join(f"words {row},{row % 2}\n" for row in range(20))
        (tmp_path / f"{split}.csv").write_text(f"text,label\n{rows}")
    partition = {"kind": "iid", "num_clients": 9}
    base = {"data": {"name": str(tmp_path)}, "partition": partition, "server": {"cohort_size": 3}}
    few: dict[str, Any] = {"base": base, "dataset": [{"name": "few"}], "method": [{"name": "spry"}], "seeds": [0]}
    suite = read(tmp_path, **few)
    check_cells(suite, suite.cells())
    searched = read(tmp_path, **few, search={"validation_fraction": 0.3})
    with pytest.raises(ConfigError, match="9 clients of at least 2 examples need 18 rows, there are 14"):
        check_cells(searched, searched.cells())


def test_a_datasets_trials_may_take_longer(tmp_path: Path) -> None:
    datasets = [{"name": "a"}, {"name": "b", "search_rounds": 3}, {"name": "c", "tuned_on": "b"}]
    suite = read(tmp_path, search={"rounds": 2}, dataset=datasets, seeds=[0])
    rounds = {cell.dataset.name: search_config(suite, cell, {}).server.num_rounds for cell in suite.cells()}
    assert rounds == {"a": 2, "b": 3, "c": 3}


@pytest.mark.parametrize(("rounds", "over"), [(2, 5), (9, 9), (None, 5)])
def test_a_trial_is_the_beginning_of_a_run(rounds: int | None, over: int, tmp_path: Path) -> None:
    """Its rates too: those of a short run fall at once, and hide what a high one does to a long run."""
    base = {"server": {"num_rounds": 5, "schedule": "linear"}}
    suite = read(tmp_path, base=base, search={"rounds": rounds} if rounds else {})
    server = search_config(suite, suite.cells()[0], {}).server
    assert (server.num_rounds, server.own_schedule_rounds) == (rounds or 5, over)
    assert suite.run_config(suite.cells()[0]).server.own_schedule_rounds == 5


def test_a_dataset_may_have_fewer_seeds(tmp_path: Path) -> None:
    suite = read(
        tmp_path, seeds=[3, 4], dataset=[{"name": "a"}, {"name": "b", "seeds": [4]}], method=[{"name": "spry"}]
    )
    assert [cell.name for cell in suite.cells()] == ["a/spry/3", "a/spry/4", "b/spry/4"]


@pytest.mark.parametrize("path", SUITES, ids=lambda path: path.stem)
def test_every_suite_that_comes_with_us_is_valid(path: Path, tmp_path: Path) -> None:
    suite = Suite(load_suite(path), tmp_path)
    for cell in suite.cells():
        suite.run_config(cell)


def test_there_are_suites() -> None:
    assert SUITES
    assert isinstance(load_suite(SUITES[0]), SuiteConfig)
