"""A configuration is typed; a mistake is one message that names the remedy."""

import json
import re
from pathlib import Path

import pytest

from spryfl.config import ADAPTER_KINDS, RunConfig, compared_configs, load_config, parse_config, with_overrides
from spryfl.config.reference import setting_rows
from spryfl.errors import ConfigError
from spryfl.estimators import ESTIMATORS
from spryfl.federated.method import METHODS
from spryfl.models.adapters import ADAPTERS
from spryfl.presets import find_preset


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"server": {"num_round": 3}}, "unknown key 'server.num_round'. Did you mean 'num_rounds'?"),
        ({"servers": {}}, "unknown key 'servers'. Did you mean 'server'?"),
        ({"num_rounds": 3}, "It belongs to server.num_rounds"),
        ({"method": {"name": "sprry"}}, "unknown method 'sprry'. Did you mean 'spry'?"),
        ({"method": {"name": "fedavg", "upload": "slopes"}}, "set upload = 'values'"),
        (
            {"method": {"estimator": "bottleneck", "upload": "slopes"}},
            "estimator 'bottleneck', whose gradient takes the client's hidden states too; set upload = 'values'",
        ),
        (
            {"method": {"estimator": "bottleneck", "distribution": "orthogonal"}},
            "set distribution = 'gaussian' or 'rademacher'",
        ),
        (
            {"method": {"name": "spry_bottleneck"}, "adapter": {"frozen": "a"}},
            "set adapter.kind = 'lora' with frozen = 'b'",
        ),
        (
            {"method": {"name": "spry_per_iteration", "upload": "values"}},
            "'spry_per_iteration' take no step of their own, so what they have to send is 'gradients'",
        ),
        (
            {"method": {"name": "spry", "upload": "gradients"}},
            "take local steps, so what they have to send is 'values'",
        ),
        (
            {"method": {"name": "spry_per_iteration", "exact_head": True}},
            "the head's gradient cannot be rebuilt from slopes; set upload = 'gradients'",
        ),
        ({"server": {"sampling": "size"}, "partition": {"kind": "own"}}, "how much each client holds is not known"),
        (
            {"model": {"dtype": "bfloat16"}, "method": {"name": "fedmezo"}},
            "finite differences drown in its rounding; set 'float32', or 'auto'",
        ),
        ({"method": {"checkpointing": "budgeted"}}, "needs a budget, such as budget = '64MiB'"),
        ({"method": {"budget": "64MiB"}}, "budget belongs to checkpointing = 'budgeted', not 'none'"),
        (
            {"method": {"checkpointing": "budgeted", "budget": "64 MiBs"}},
            "method.budget: a number of bytes, or text such as '64MiB' or '1.5GB' (got '64 MiBs')",
        ),
        ({"compare": [{"name": "spry"}]}, "plots would show runs of one name as one, got ['spry', 'spry']"),
        ({"data": {"name": "~nosuch-user/x.csv"}}, "data.name: no such user's home is known"),
        ({"server": {"num_rounds": 4, "warmup_rounds": 4}}, "warmup_rounds = 4 of 4 rounds: warm up for fewer"),
        ({"server": {"schedule": "linaer"}}, "server.schedule"),
        ({"server": {"num_rounds": 4, "schedule_rounds": 3}}, "schedule_rounds = 3 is less than num_rounds = 4: raise"),
        ({"server": {"cohort_size": 200}}, "exceeds partition.num_clients = 100"),
        ({"local": {"learning_rate": -1}}, "local.learning_rate: Input should be greater than 0 (got -1)"),
        ({"local": {"learning_rate": "fast"}}, "local.learning_rate"),
        ({"local": {"learning_rate": float("inf")}}, "local.learning_rate"),
        ({"partition": {"kind": "column"}}, "go together"),
        ({"data": {"text_columns": ["a", "b", "c", "d"]}}, "data.text_columns"),
        ({"compare": [{"name": "x"}, {"name": "x"}]}, "names must differ"),
        ({"compare": [{"name": "../x"}]}, "compare.0.name"),
        ({"compare": [{"nam": "x", "name": "x"}]}, "unknown key 'compare.0.nam'. Did you mean 'name'?"),
    ],
)
def test_mistakes(table: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config(table)
    assert message in str(caught.value)


def test_all_problems_are_reported_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config({"seed": -1, "local": {"batch_size": 0}})
    assert "seed" in str(caught.value)
    assert "local.batch_size" in str(caught.value)


def test_another_method_is_not_shown_under_the_files_label(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text("label = 'Mine'\n")
    assert load_config(file).label == load_config(file, ["seed=3"]).label == "Mine"
    assert load_config(file, ["method.name=fedavg"]).label is None
    assert load_config(file, ["method.name=fedavg", "label=FedAvg"]).label == "FedAvg"


def test_overrides(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text("[server]\nnum_rounds = 3\ncohort_size = 4\n")
    overrides = [
        "server.num_rounds=9",
        "method.name=fedavg",
        "local.learning_rate=1e-2",
        "adapter.target_modules=['q']",
    ]
    config = load_config(file, overrides)
    assert (config.server.num_rounds, config.server.cohort_size) == (9, 4)
    assert config.method.name == "fedavg"
    assert config.local.learning_rate == 0.01
    assert config.adapter.target_modules == ("q",)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("server.num_rounds", "--set server.num_rounds: write it as part.key=value"),
        ("=3", "--set =3: write it as part.key=value"),
        ("seed.x=3", "'seed' is a value, not a table of keys"),
        ("server.num_rounds.x=3", "'num_rounds' is a value, not a table of keys"),
    ],
)
def test_bad_overrides(tmp_path: Path, override: str, message: str) -> None:
    file = tmp_path / "run.toml"
    file.write_text("seed = 1\n[server]\nnum_rounds = 3\n")
    with pytest.raises(ConfigError, match=re.escape(message)):
        load_config(file, [override])


def test_a_mistake_in_a_compared_run_shows_before_anything_runs(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text("[[compare]]\nname = 'x'\nset = { 'method.name' = 'fedavgg' }\n")
    with pytest.raises(ConfigError, match="fedavgg"):
        load_config(file)


def test_files_that_are_no_configuration(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="spry init"):
        load_config(tmp_path / "none.toml")
    (tmp_path / "broken.toml").write_text("a = = 3")
    with pytest.raises(ConfigError, match="not valid TOML"):
        load_config(tmp_path / "broken.toml")


def test_tables_agree() -> None:
    assert set(ADAPTER_KINDS) == set(ADAPTERS)
    assert {method.estimator for method in METHODS.values()} == set(ESTIMATORS)


def test_the_demo_is_valid_and_fair() -> None:
    demo = load_config(find_preset("demo"))
    assert (demo.partition.num_clients, demo.server.cohort_size, demo.partition.alpha) == (100, 10, 1.0)
    assert demo.method.name == "fedyogi_guided"
    compared = compared_configs(demo)
    assert {"spry", "fedadam", "fedmezo"} <= {config.method.name for config in compared.values()}
    assert any(c.method.checkpointing == "per_layer" for c in compared.values())
    for config in compared.values():  # the same budget
        assert config.server.num_rounds == demo.server.num_rounds
        assert config.method.chunk == demo.method.chunk
        assert (config.data, config.partition, config.model, config.adapter) == (
            demo.data,
            demo.partition,
            demo.model,
            demo.adapter,
        )


def test_every_setting_is_told_and_its_default_is_the_one_it_has() -> None:
    rows = {row["name"]: row for row in setting_rows()}
    assert [name for name, row in rows.items() if not row["about"]] == []
    told = {name: json.loads(row["default"]) for name, row in rows.items() if row["default"]}
    assert parse_config(with_overrides({}, told)) == RunConfig()
    assert rows["method.budget"]["values"] == "size"
    assert rows["method.deal"]["values"] == '"unit" | "layer"'
    assert rows["server.trim"]["values"] == "number > 0 and < 0.5"
    assert rows["adapter.target_modules"]["values"] == "[string, ...]"
