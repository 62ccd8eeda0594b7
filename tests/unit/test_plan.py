"""What is recommended on hand-made budgets, what weights take, and a plan as a whole."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification, LlamaConfig

from families import FAMILIES
from spryfl.config import AdapterConfig
from spryfl.errors import ConfigError
from spryfl.memory.meter import weight_bytes
from spryfl.memory.plan import PassCost, Prediction, least, recommend
from spryfl.models.weights import Precision, count_weights
from spryfl.plan import Plan, PlanRequest, make_plan

PRECISIONS = ("float32", "bfloat16", "int8", "nf4")


def row(estimator: str, precision: str, peak: int, time: float, **more: Any) -> Prediction:
    """A row whose weights are all but 40 bytes of its peak."""
    row = Prediction(estimator, precision, False, peak - 40, 30, 6, 4, time, 0, 0, None, 0)
    return replace(row, **more)


ROWS = (
    row("inference", "nf4", 150, 1.0),
    row("backprop", "float32", 1000, 2.0),
    row("backprop", "nf4", 700, 2.0),
    row("backprop_checkpointed", "float32", 650, 3.0),
    row("backprop_checkpointed", "nf4", 400, 3.0),
    row("backprop_checkpointed", "nf4", 350, 3.0, streamed=True, read_bytes=9),
    row("forward", "float32", 330, 2.05),
    row("forward", "bfloat16", 300, 2.05),
    row("forward", "nf4", 250, 2.05),
    row("zeroth_order", "nf4", 200, 2.0),
)


@pytest.mark.parametrize(
    ("budget", "expected"),
    [
        (None, 1),  # the fastest exact gradient, in full precision
        (1000, 1),
        (999, 2),  # packed weights before checkpointing: less time
        (650, 3),
        (649, 4),
        (399, 5),  # exact, though streamed, before forward
        (349, 6),
        (329, 7),
        (299, 8),
        (249, 9),
        (199, None),  # inference does not train
    ],
)
def test_recommended(budget: int | None, expected: int | None) -> None:
    assert recommend(ROWS, budget, PRECISIONS) is (None if expected is None else ROWS[expected])
    assert recommend(ROWS[::-1], budget, PRECISIONS) is (None if expected is None else ROWS[expected])


def test_what_fits_nothing_is_told_the_least() -> None:
    config = LlamaConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64)
    request = PlanRequest(config, AdapterConfig(), 8, 16, budget_bytes=180)
    with pytest.raises(ConfigError, match=r"zeroth_order, nf4 with 200 bytes: raise .* or lower --batch or --tokens"):
        Plan(request, ROWS, None, 2).require_fit()
    with pytest.raises(ConfigError, match="alone take 170 bytes, whatever the batch"):
        Plan(replace(request, budget_bytes=99), ROWS, None, 2).require_fit()
    assert least(ROWS) is ROWS[-1]


def test_weights_that_are_to_be_written_first_are_told(plan: Plan) -> None:
    streamed = {row.precision: row for row in plan.rows if row.streamed and row.estimator == "forward"}

    def reason(precision: Precision, **others: Any) -> str:
        return replace(plan, request=replace(plan.request, **others), recommended=streamed[precision]).reason

    assert reason("nf4").endswith("first: spry quantize MODEL OUT_DIR --precision nf4.")
    assert reason("nf4", stored="nf4").endswith("at every step.")
    assert reason("float32").endswith("at every step.")
    assert reason("float32", mappable=False).endswith("first: model.save_pretrained(OUT_DIR).")


def test_costs_through_two_depths() -> None:
    cost = PassCost.through({2: (100, 30), 3: (110, 42)})
    assert (cost.peak_at(5), cost.flops_at(5), cost.flops_at(1)) == (130, 66, 18)
    alone = PassCost.through({7: (100, 70)})
    assert (alone.peak_at(5), alone.flops_at(5)) == (100, 50)


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_are_counted_as_they_are(family: str) -> None:
    config = FAMILIES[family]()
    model = AutoModelForSequenceClassification.from_config(config, dtype=torch.bfloat16)
    head = [name for name in ("classifier", "score", "pre_classifier") if hasattr(model, name)]
    trained = sum(p.numel() * 2 for name in head for p in model.get_submodule(name).parameters())
    model.requires_grad_(False)
    buffers = sum(buffer.nbytes for buffer in model.buffers())
    counted = count_weights(config, "bfloat16", torch.bfloat16, 10)
    assert counted.resident == weight_bytes(model) - buffers - trained
    assert counted.shared == (family == "albert")
    # All layers but two stay on disk, and at most ten rows of each embedding are looked up.
    assert counted.streamed <= counted.resident
    packed = count_weights(config, "nf4", torch.bfloat16, 10)
    assert sum(packed.layers) < 0.4 * sum(counted.layers)


@pytest.fixture(scope="module")
def plan() -> Plan:
    config = LlamaConfig(
        vocab_size=500,
        hidden_size=64,
        num_hidden_layers=6,
        num_attention_heads=4,
        intermediate_size=128,
        use_cache=False,
    )
    return make_plan(PlanRequest(config, AdapterConfig(rank=2), 2, 32, num_tangents=3, cohort_size=4))


def test_what_is_stored_otherwise_is_read_as_stored() -> None:
    config = FAMILIES["bert"]()
    config.dtype = torch.float32
    same, cast = (count_weights(config, p, getattr(torch, p), 10) for p in ("float32", "bfloat16"))
    assert cast.read_a_visit == same.read_a_visit == 2 * sum(cast.layers)
    assert cast.streamed - cast.touched == max(cast.layers) + max(same.layers)
    assert same.streamed - same.touched == 2 * max(same.layers)


def test_a_packed_model_leaves_its_tables_on_disk_if_it_can() -> None:
    config = FAMILIES["llama"]()
    config.vocab_size = 50_000
    mapped, whole = (count_weights(config, "nf4", torch.float32, 2, mappable=mappable) for mappable in (True, False))
    assert mapped.layers == whole.layers
    assert whole.resident - mapped.resident == whole.outside - whole.touched > 0


def test_a_model_that_is_stored_packed_is_planned_so(plan: Plan) -> None:
    packed = make_plan(replace(plan.request, stored="nf4"))
    assert {row.precision for row in packed.rows} == {"nf4"}


def test_a_client_trains_a_unit_at_least(plan: Plan) -> None:
    many = make_plan(replace(plan.request, cohort_size=1000))
    up = {row.bytes_up for row in many.rows if row.estimator == "forward"}
    num_units = 12  # query and value of six layers
    whole = {row.bytes_up for row in make_plan(replace(plan.request, cohort_size=num_units)).rows}
    assert up <= whole
    assert min(up) > 0


def test_a_plan_names_every_way(plan: Plan) -> None:
    ways = {(r.estimator, r.precision, r.streamed) for r in plan.rows}
    assert len(ways) == len(plan.rows) == 54
    assert ("backprop", "nf4", True) in ways
    assert ("zeroth_order", "bfloat16", False) not in ways
    assert plan.recommended is not None
    assert plan.recommended.name == "backprop, float32"
    assert "fastest exact gradient" in plan.reason


def test_traffic_is_what_messages_count(plan: Plan) -> None:
    """LoRA r 2 on query and value of 6 layers, 12 units over 4 clients, and a head of 2 x 64."""
    unit = 2 * (64 + 64)
    head = 2 * 64
    for r in plan.rows:
        if r.trains:
            assert r.bytes_down == 4 * (12 * unit + head) + 8
            assert r.bytes_up == 4 * (3 * unit + head)
        assert r.bytes_up_slopes == (12 if r.estimator in ("forward", "zeroth_order") else None)


def test_what_lies_below_a_clients_units_costs_inference(plan: Plan) -> None:
    alone = make_plan(replace(plan.request, cohort_size=1))
    for ours, theirs in zip(plan.rows, alone.rows, strict=True):
        # Tangents that begin above the first layer take a hidden state more: 2 rows, 32 tokens, 64 numbers.
        more = 2 * 32 * 64 * (2 if ours.precision == "bfloat16" else 4) if ours.estimator == "forward" else 0
        assert theirs.peak_bytes <= ours.peak_bytes <= theirs.peak_bytes + 2 * more
        if ours.estimator in ("forward", "backprop", "backprop_checkpointed"):
            assert 1 < ours.relative_time < theirs.relative_time
    times = {r.estimator: r.relative_time for r in alone.rows}
    assert times["zeroth_order"] == 6


def test_a_guess_takes_what_forward_mode_takes_and_is_recommended_where_nothing_exact_fits(plan: Plan) -> None:
    rows = {r.estimator: r for r in plan.rows if (r.precision, r.streamed) == ("float32", False)}
    guess, checkpointed = rows["guided"], rows["backprop_checkpointed"]
    assert rows["inference"].activation_bytes <= guess.activation_bytes < 0.9 * checkpointed.activation_bytes
    assert 1 < guess.relative_time < checkpointed.relative_time  # each of 4 clients has 2 of 6 layers at most
    alone = make_plan(replace(plan.request, cohort_size=1))
    whole = {r.estimator: r for r in alone.rows if (r.precision, r.streamed) == ("float32", False)}
    assert whole["guided"].relative_time == pytest.approx(whole["backprop_checkpointed"].relative_time, rel=0.15)
    others = [r for r in alone.rows if r.estimator in ("guided", "forward", "zeroth_order")]
    chosen = recommend(others, None, plan.request.precisions)
    assert chosen is not None
    assert chosen.estimator == "guided"
    words = replace(plan.request, task="language_model")
    assert "guided" not in {r.estimator for r in make_plan(words).rows}


def test_streaming_and_budgets_take_less(plan: Plan) -> None:
    rows = {(r.estimator, r.precision, r.streamed): r for r in plan.rows}
    for r in plan.rows:
        if r.streamed:
            assert r.weights_bytes < rows[r.estimator, r.precision, False].weights_bytes
            assert r.read_bytes > 0
    kept = rows["backprop_budgeted", "float32", False]
    assert kept.activation_bytes < rows["backprop_checkpointed", "float32", False].activation_bytes
    assert kept.relative_time > rows["backprop_checkpointed", "float32", False].relative_time
    assert "keeps 2 of 6" in kept.note
