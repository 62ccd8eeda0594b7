"""Whole runs along guided tangents: maps sent, kept up and stored; bad input."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from spryfl.config import RunConfig, parse_config
from spryfl.data.public_text import load_public_text
from spryfl.errors import ConfigError, DataError
from spryfl.federated.client import loaded
from spryfl.federated.rounds import run_round
from spryfl.federated.state import FederatedState
from spryfl.gradients.backprop import Backprop
from spryfl.gradients.directions import DirectionStream
from spryfl.gradients.forward import ForwardGradient
from spryfl.gradients.guesses import COSINES, cosines_of, maps_for, with_cosines
from spryfl.gradients.guided import GuidedGradient
from spryfl.map_keeper import MapKeeper
from spryfl.runtime.in_process import InProcessRuntime
from spryfl.suite import resume_suite, run_suite
from spryfl.tracking.events import Observer, RoundEvent
from spryfl.tracking.run_directory import RunDirectory
from spryfl.workbench import Workbench


@pytest.mark.parametrize(
    "settings",
    [
        {"guide__slopes": "none"},
        {"guide__slopes": "tensor", "guide__momentum": True},
        {"guide__explore": True, "guide__horizon": 1},
        {"method__name": "fedyogi", "method__estimator": "guided"},
        {"method__name": "spry", "method__exact_head": True},
    ],
    ids=str,
)
def test_settings_run(settings: dict[str, Any], tiny_config: Callable[..., RunConfig], tmp_path: Path) -> None:
    (summary,) = run_suite(tiny_config(**{"method__name": "spry_guided"} | settings), tmp_path / "run")
    assert summary.num_failures == summary.num_refused == 0
    everything = 4 * summary.trainable_parameters + 8
    momentum = settings.get("guide__momentum", False)
    assert (summary.bytes_down_per_client_round > everything) == momentum


def test_clients_are_sent_their_layers_maps_and_the_report_counts_them(
    tiny_config: Callable[..., RunConfig], public: Path
) -> None:
    """The top layer needs none; a client of the lowest layer is sent the basis and that layer's map."""
    config = tiny_config(method__name="spry_guided", guide__guess="maps", guide__text=str(public))
    bench = Workbench.from_config(config)
    keeper = MapKeeper.of(bench)
    state = keeper.start(bench.initial_state())
    assert set(state.maps) == {"basis", "0/own", "0/across", COSINES}
    assert maps_for(state.maps, {1}) == {}
    own = sum(tensor.nbytes for tensor in maps_for(state.maps, {0}).values())
    assert own == sum(state.maps[name].nbytes for name in ("basis", "0/own", "0/across"))
    runtime = InProcessRuntime(bench.client, bench.batch_tokens)
    _, report = run_round(state, bench.federation, runtime)
    without = 3 * (4 * bench.adapted.num_trainable + 8)
    assert not report.failures
    assert (report.bytes_down - without) % own == 0
    assert own <= report.bytes_down - without <= 3 * own


def test_units_below_maps_take_steps_by_what_their_guess_is_worth(
    tiny_config: Callable[..., RunConfig], public: Path
) -> None:
    """With trust 2 the lowest layer's step is the full one times its cosine squared; all other steps are full."""
    guided = {"method__name": "spry_guided", "guide__guess": "maps", "guide__text": str(public)}
    steps = []
    for trust in (0.0, 2.0):
        bench = Workbench.from_config(tiny_config(**guided, guide__trust=trust))
        state = MapKeeper.of(bench).start(bench.initial_state())
        state = replace(state, maps=state.maps | {COSINES: torch.tensor([0.5], dtype=torch.float64)})
        after, _ = run_round(state, bench.federation, InProcessRuntime(bench.client, bench.batch_tokens))
        steps.append({name: value - state.values[name] for name, value in after.values.items()})
    lowest = {name for unit, own in bench.places.items() if own == (0,) for name in bench.federation.units[unit]}
    assert any(steps[0][name].any() for name in lowest)
    for name, full in steps[0].items():
        torch.testing.assert_close(steps[1][name], full * (0.25 if name in lowest else 1.0))


def test_trust_needs_maps(tiny_config: Callable[..., RunConfig]) -> None:
    with pytest.raises(ConfigError, match="trust = 2 goes by the cosines of maps"):
        tiny_config(method__name="spry_guided", guide__trust=2.0)


def test_trust_is_refused_where_clients_may_take_exact_gradients(
    tiny_config: Callable[..., RunConfig], public: Path
) -> None:
    guide = {"guide__guess": "maps", "guide__text": str(public), "guide__trust": 2.0}
    with pytest.raises(ConfigError, match="estimator 'auto' may take others: leave it out"):
        tiny_config(method__name="spry_guided", method__estimator="auto", **guide)


def test_maps_are_fitted_again_by_the_rule_and_kept_across_an_interruption(
    tiny_config: Callable[..., RunConfig], public: Path, tmp_path: Path
) -> None:
    config = tiny_config(
        method__name="spry_guided",
        guide__guess="maps",
        guide__text=str(public),
        guide__check_every=1,
        guide__refit_below=1.0,
        local__learning_rate=0.05,
    )
    (summary,) = run_suite(config, tmp_path / "whole")
    events = RunDirectory(tmp_path / "whole").read_events()
    assert summary.num_map_fits == sum(event.maps_fitted for event in events) >= 1
    assert all(event.guess_cosine is not None for event in events[1:-1])
    assert events[-1].guess_cosine is None  # no client will get what would be fitted after the last round

    class Stop(Observer):
        def round_finished(self, event: RoundEvent) -> None:
            if event.round == 2:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_suite(config, tmp_path / "cut", lambda directory: [Stop()])
    resume_suite(RunDirectory(tmp_path / "cut"))
    ours, theirs = (load_file(tmp_path / name / "checkpoint.safetensors") for name in ("whole", "cut"))
    assert any(name.startswith("maps/") for name in ours)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_maps_hold_while_nothing_drifts(tiny_config: Callable[..., RunConfig], public: Path) -> None:
    config = tiny_config(method__name="spry_guided", guide__guess="maps", guide__text=str(public), guide__check_every=2)
    bench = Workbench.from_config(config)
    keeper = MapKeeper.of(bench)
    state = keeper.start(bench.initial_state())
    same, cosine, fitted = keeper.keep(state)  # round 0 is due, and nothing has been trained
    assert same is state
    assert not fitted
    assert cosine == pytest.approx(cosines_of(state.maps)[0])
    # Held until the cosine is below 0.9 of what it was, and fitted again from there on.
    for was, due in ((cosine / 0.91, False), (cosine / 0.89, True)):
        _, _, fitted = keeper.keep(replace(state, maps=with_cosines(state.maps, {0: was})))
        assert fitted is due


def test_the_guess_is_nearer_the_gradient_than_random_tangents_on_a_trained_model(
    tiny_config: Callable[..., RunConfig], public: Path, tmp_path: Path
) -> None:
    trained = tiny_config(method__name="fedavg", local__learning_rate=0.02, server__num_rounds=5)
    run_suite(trained, tmp_path / "trained")
    state = RunDirectory(tmp_path / "trained").read_checkpoint()
    assert state is not None
    config = tiny_config(method__name="spry_guided", guide__guess="maps", guide__text=str(public))
    bench = Workbench.from_config(config)
    state = MapKeeper.of(bench).start(state)
    cosines = gradient_cosines(bench, state)
    # Of d = 64 numbers, a random direction's is sqrt(2 / (pi d)) = 0.1 in the mean.
    assert min(cosines["guided"], cosines["guided maps"]) > 2 * cosines["forward"], cosines


def gradient_cosines(bench: Workbench, state: FederatedState) -> dict[str, float]:
    """Of the lowest layer's estimated and true gradients, the mean over clients."""
    guided = bench.estimator
    assert isinstance(guided, GuidedGradient)
    estimators = {
        "forward": ForwardGradient(),
        "guided": guided,
        "guided maps": guided.guided_by(maps_for(state.maps, {0}), {}),
    }
    names = [name for name, _ in bench.adapted.model.named_parameters() if ".layer.0." in name and "lora_B" in name]
    found: dict[str, list[float]] = {name: [] for name in estimators}
    with loaded(bench.adapted.model, state.values):
        for client in range(len(bench.partition)):
            data = bench.client(client).data
            batch = data.batch(range(len(data)))
            true = torch.cat([g.flatten() for g in gradient(Backprop(), bench, data, batch, names, client)])
            for name, estimator in estimators.items():
                own = torch.cat([g.flatten() for g in gradient(estimator, bench, data, batch, names, client)])
                found[name].append(abs(float(torch.nn.functional.cosine_similarity(own, true, dim=0))))
    return {name: sum(values) / len(values) for name, values in found.items()}


def gradient(estimator: Any, bench: Workbench, data: Any, batch: Any, names: list[str], client: int) -> Any:
    draw = DirectionStream(0, 1, client).at_step(0)
    return estimator.estimate(
        bench.adapted.model, lambda m: data.losses(m, batch).mean(), names, draw, 1
    ).gradients.values()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"guide": {"guess": "maps"}}, "needs maps .* or text"),
        ({"guide": {"text": "x.txt"}}, "belong to guess = 'maps'"),
        ({"guide": {"momentum": True}, "server": {"optimizer": "sgd"}}, "keeps no momentum"),
        (
            {"method": {"name": "spry_guided"}, "guide": {"momentum": True, "slopes": "none"}},
            "needs slopes along what it adds",
        ),
        ({"method": {"name": "fedyogi_guided"}, "guide": {"explore": True}}, "guide.explore needs slopes"),
        ({"method": {"name": "spry"}, "guide": {"momentum": True}}, "guide.momentum goes with guided tangents"),
        (
            {"method": {"name": "spry_guided", "distribution": "rademacher"}, "guide": {"explore": True}},
            "guide.explore draws normal numbers",
        ),
        ({"method": {"name": "spry_guided", "upload": "slopes"}}, "directions are not drawn from a seed"),
        ({"method": {"name": "spry_per_iteration", "exact_head": True}}, "cannot be rebuilt from slopes"),
        ({"guide": {"horizont": 1}}, "Did you mean 'horizon'"),
    ],
)
def test_impossible_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_config(settings)


def test_public_text(tiny_config: Callable[..., RunConfig], public: Path, tmp_path: Path) -> None:
    data = tiny_config().data
    guide = tiny_config(method__name="spry_guided", guide__guess="maps", guide__text=str(public)).guide
    rows = load_public_text(guide, data, 3, seed=0)
    assert set(rows[data.label_column]) == {0, 1, 2}
    assert len(rows) == 72
    two = data.model_copy(update={"text_columns": ("a", "b")})
    pairs = load_public_text(guide, two, 3, seed=0)
    assert len(pairs) == 36
    written = tmp_path / "pairs.txt"
    written.write_text("\ufeffone\u2028line\nits other\n" * 2, encoding="utf-8")  # a mark, and no end of a line
    pairs = load_public_text(guide.model_copy(update={"text": str(written)}), two, 3, seed=0)
    assert pairs["b"][:] == ["its other"] * 2
    assert sorted(pairs["a"]) == ["one\u2028line", "\ufeffone\u2028line"]  # the second is within the text
    empty = tmp_path / "empty.txt"
    empty.write_text("\n")
    for text, message in (
        (str(empty), "no text in it"),
        (str(tmp_path / "none.txt"), "no such file"),
        ("builtin:nothing", "unknown built-in"),
    ):
        with pytest.raises(DataError, match=message):
            load_public_text(guide.model_copy(update={"text": text}), data, 3, seed=0)
    wrong = guide.model_copy(update={"text_columns": ("a", "b")})
    with pytest.raises(DataError, match="2 columns, but the task has 1"):
        load_public_text(wrong, data, 3, seed=0)
