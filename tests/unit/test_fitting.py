"""Units to clients of unequal memory, by hand and in whole runs."""

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spryfl.client_memory import SMALLER_CHUNKS
from spryfl.config import RunConfig, parse_config
from spryfl.errors import ConfigError
from spryfl.federated.assignment import assign_units
from spryfl.federated.fitting import PassSettings, deal_within
from spryfl.federated.method import Assignment
from spryfl.memory.plan import PROCESS_BYTES
from spryfl.run import run
from spryfl.tracking.run_directory import create_run_directory
from spryfl.workbench import Workbench

UNITS = ["a", "b", "c", "d", "head"]


def at_most(counts: dict[int, int], heavy: str = "") -> Callable[[int, Sequence[str]], PassSettings | None]:
    """Clients that hold some number of units each, the heavy one twice as large."""

    def fit(client: int, units: Sequence[str]) -> PassSettings | None:
        size = sum(2 if unit == heavy else 1 for unit in units if unit != "head")
        return PassSettings(chunk_bytes=client) if size <= counts[client] else None

    return fit


def test_without_budgets_the_assignment_stands() -> None:
    deal = deal_within({3: ("a", "head"), 5: ("b", "c", "d", "head")}, UNITS, ["head"], None)
    assert deal.units == {3: ("a", "head"), 5: ("b", "c", "d", "head")}
    assert deal.settings == {3: PassSettings(), 5: PassSettings()}


def test_what_does_not_fit_goes_to_who_has_room() -> None:
    assigned = {3: ("a", "c", "head"), 5: ("b", "d", "head")}
    deal = deal_within(assigned, UNITS, ["head"], at_most({3: 1, 5: 3}))
    assert deal.units == {3: ("a", "head"), 5: ("b", "c", "d", "head")}
    assert deal.settings[5] == PassSettings(chunk_bytes=5)
    assert deal.unheld == ()


def test_units_that_nobody_can_hold_are_named() -> None:
    assigned = {3: ("a", "c", "head"), 5: ("b", "d", "head")}
    deal = deal_within(assigned, UNITS, ["head"], at_most({3: 1, 5: 1}, heavy="b"))
    assert deal.units == {3: ("a", "head"), 5: ("d", "head")}
    assert deal.unheld == ("b", "c")


def test_a_client_that_kept_nothing_helps_another_or_trains_the_head_or_is_left_out() -> None:
    assigned = {1: ("a", "head"), 2: ("b", "head"), 3: ("c", "d", "head")}
    deal = deal_within(assigned, UNITS, ["head"], at_most({1: 1, 2: 1, 3: 4}, heavy="a"))
    assert deal.units == {1: ("b", "head"), 2: ("b", "head"), 3: ("a", "c", "d", "head")}
    deal = deal_within(assigned, UNITS, ["head"], at_most({1: 0, 2: 1, 3: 4}))
    assert deal.units[1] == ("head",)
    deal = deal_within(assigned, UNITS, ["head"], at_most({1: -1, 2: 1, 3: 4}))
    assert set(deal.units) == {2, 3}
    assert "a" in deal.units[3]


def test_a_unit_that_only_one_client_can_hold_goes_to_it_first() -> None:
    """Client 5 has room for two; "a" is one of them, though it belongs to client 3."""

    def fit(client: int, units: Sequence[str]) -> PassSettings | None:
        dealt = [unit for unit in units if unit != "head"]
        return PassSettings() if len(dealt) <= 2 and (client == 5 or "a" not in dealt) else None

    deal = deal_within({3: ("a", "c", "head"), 5: ("b", "d", "head")}, UNITS, ["head"], fit)
    assert deal.units == {3: ("c", "d", "head"), 5: ("a", "b", "head")}
    assert deal.unheld == ()


@given(st.integers(1, 12), st.lists(st.integers(0, 12), min_size=1, max_size=8), st.integers(0, 100), st.booleans())
def test_every_unit_that_somebody_can_hold_is_trained(
    num_units: int, lowest: list[int], start: int, everything: bool
) -> None:
    """As in reverse mode: client m holds the units from lowest[m] on, any number of them."""
    units = [f"u{i}" for i in range(num_units)]
    cohort = list(range(len(lowest)))

    def fit(client: int, wanted: Sequence[str]) -> PassSettings | None:
        return PassSettings() if all(units.index(unit) >= lowest[client] for unit in wanted) else None

    deal = deal_within(assign_units("all" if everything else "split", units, cohort, start), units, [], fit)
    assert deal.unheld == tuple(units[: min(lowest)])
    assert {unit for own in deal.units.values() for unit in own} == set(units) - set(deal.unheld)
    assert all(fit(client, own) is not None for client, own in deal.units.items())
    assert set(deal.units) == {client for client in cohort if lowest[client] < num_units}  # nobody able goes idle


@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 100), st.sampled_from(["split", "all"]), st.booleans())
def test_where_everything_fits_the_assignment_stands(
    num_units: int, num_clients: int, start: int, kind: Assignment, head: bool
) -> None:
    units, shared = [f"u{i}" for i in range(num_units)] + ["head"] * head, ["head"] * head
    assigned = assign_units(kind, units, list(range(num_clients)), start, shared)
    deal = deal_within(assigned, units, shared, lambda client, wanted: PassSettings(1, 2))
    assert deal.units == assigned
    assert set(deal.settings.values()) == {PassSettings(1, 2)}
    assert deal.unheld == ()


def budgets(config: RunConfig, *memory: int) -> RunConfig:
    return config.model_copy(update={"clients": config.clients.model_copy(update={"memory": memory})})


def test_settings_shrink_with_the_budget(tiny_config: Callable[..., RunConfig]) -> None:
    config = tiny_config(method__num_tangents=8)
    memory = Workbench.from_config(budgets(config, 10**12)).client_memory
    assert memory is not None
    unit = [next(iter(memory.values))]
    rich = memory.peak_bytes(unit, 8, SMALLER_CHUNKS[0])
    poor = memory.peak_bytes(unit, 1, SMALLER_CHUNKS[-1])
    assert PROCESS_BYTES < poor < rich
    assert memory.within(rich, unit) == PassSettings(8, SMALLER_CHUNKS[0])
    middle = memory.within((poor + rich) // 2, unit)
    assert middle is not None
    assert 1 <= middle.num_tangents < 8
    assert memory.within(poor - 1, unit) is None


def test_the_runs_own_chunk_is_the_largest(tiny_config: Callable[..., RunConfig]) -> None:
    memory = Workbench.from_config(
        tiny_config(clients__memory=["100GB"], method__name="spry", method__chunk="1MiB")
    ).client_memory
    assert memory is not None
    unit = [next(iter(memory.values))]
    assert memory.within(10**11, unit) == PassSettings(1, 2**20)
    assert memory.chunks == (2**20, 2**19)


def test_lower_units_cost_backprop_more(tiny_config: Callable[..., RunConfig]) -> None:
    memory = Workbench.from_config(budgets(tiny_config(method__name="fedyogi_split"), 10**12)).client_memory
    assert memory is not None
    lower, upper = [name for name in memory.values if "query" in name]
    assert memory.peak_bytes([lower], 1, SMALLER_CHUNKS[0]) > memory.peak_bytes([upper], 1, SMALLER_CHUNKS[0])


@pytest.mark.parametrize("upload", ["values", "slopes"])
def test_a_run_of_unequal_clients(tiny_config: Callable[..., RunConfig], tmp_path: Path, upload: str) -> None:
    """Poor clients take fewer tangents, rich ones all; their slopes' shapes are known to the server."""
    config = tiny_config(method__num_tangents=8, method__upload=upload, server__num_rounds=2)
    memory = Workbench.from_config(budgets(config, 10**12)).client_memory
    assert memory is not None
    unit = [*list(memory.values)[:2], "head"]
    poor = memory.peak_bytes(unit, 2, SMALLER_CHUNKS[-1])
    summary = run(budgets(config, poor, 10**12), create_run_directory(tmp_path / "run"), (), "unequal")
    assert summary.rounds == 2
    assert summary.num_failures == summary.num_refused == 0
    assert summary.unheld_units == ()
    # What the poorest was predicted to take beside weights, process and adapter was enough.
    assert 0 < summary.peak_activation_bytes < memory.peak_bytes(unit, 8, SMALLER_CHUNKS[0]) - PROCESS_BYTES


def test_a_budget_that_holds_nothing_is_one_line_before_the_run(tiny_config: Callable[..., RunConfig]) -> None:
    with pytest.raises(ConfigError, match=r"clients\.memory: 1,000,000 bytes hold no unit .*; the least is 57\d,"):
        Workbench.from_config(budgets(tiny_config(), 10**12, 10**6))
    with pytest.raises(ConfigError, match=r"clients\.memory"):
        parse_config({"clients": {"memory": ["lots"]}})


def test_tangents_of_each_unit_cost_as_many_times_k(tiny_config: Callable[..., RunConfig]) -> None:
    shared, each = (
        Workbench.from_config(budgets(tiny_config(method__tangents_per=per), 10**12)).client_memory
        for per in ("step", "unit")
    )
    assert shared is not None
    assert each is not None
    one, *_ = units = list(each.values)
    chunk = SMALLER_CHUNKS[0]
    assert each.peak_bytes([one], 1, chunk) == shared.peak_bytes([one], 1, chunk)
    assert each.peak_bytes(units[:3], 1, chunk) == shared.peak_bytes(units[:3], 3, chunk)


def test_bottlenecks_keep_their_inputs(tiny_config: Callable[..., RunConfig]) -> None:
    """Beside the forward gradient's: the inputs of a unit's A, tangents of its z, and K more directions if B's too."""
    config = tiny_config(method__num_tangents=4, method__exact_head=True, adapter__frozen="b")
    found = {}
    for method in ("spry", "spry_bottleneck"):
        own = config.model_copy(update={"method": config.method.model_copy(update={"name": method})})
        memory = Workbench.from_config(budgets(own, 10**12)).client_memory
        assert memory is not None
        found[method] = memory
    memory = found["spry_bottleneck"]
    unit = next(iter(memory.values))
    work, rank = memory.dry.work, config.adapter.rank
    kept = work.batch * work.tokens * 32 * work.dtype.itemsize
    tangents = 4 * work.batch * work.tokens * rank * (4 + work.dtype.itemsize)
    assert memory.kinds == 1
    assert memory.peak_bytes([unit], 4, 10**6) == found["spry"].peak_bytes([unit], 4, 10**6) + kept + tangents
    both = config.model_copy(update={"adapter": config.adapter.model_copy(update={"frozen": "none"})})
    both = both.model_copy(update={"method": both.method.model_copy(update={"name": "spry_bottleneck"})})
    memory = Workbench.from_config(budgets(both, 10**12)).client_memory
    assert memory is not None
    assert memory.kinds == 2


def test_a_run_with_bottleneck_tangents(tiny_config: Callable[..., RunConfig], tmp_path: Path) -> None:
    """A few rounds, the head exact; clients have memory enough for some of the K they are asked."""
    config = tiny_config(
        method__name="spry_bottleneck", method__num_tangents=2, method__exact_head=True, adapter__frozen="b"
    )
    summary = run(budgets(config, 10**12), create_run_directory(tmp_path / "run"), (), "bottleneck")
    assert summary.num_failures == summary.num_refused == 0


def test_a_unit_in_the_embeddings_lies_below_all_layers(tiny_config: Callable[..., RunConfig]) -> None:
    """Its gradient passes through both; that of the head, through none."""
    own = tiny_config(method__name="fedavg", adapter__target_modules=["word_embeddings", "query"])
    memory = Workbench.from_config(budgets(own, 10**12)).client_memory
    assert memory is not None
    (embeddings,) = (unit for unit in memory.layer if "embeddings" in unit)
    assert [memory.depth([unit]) for unit in (embeddings, "head")] == [2, 0]
