"""`spry list`: what there is to choose from."""

import json
from enum import Enum
from typing import Annotated

import typer

WIDE = 110  # columns


class Kind(str, Enum):
    """What can be listed."""

    methods = "methods"
    models = "models"
    datasets = "datasets"
    adapters = "adapters"
    tasks = "tasks"
    settings = "settings"


def list_(
    kind: Annotated[Kind, typer.Argument(help="What to list.")],
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
) -> None:
    """List the methods, built-in models, built-in datasets, adapters, tasks, or all settings of a run."""
    rows = _rows(kind)
    if as_json:
        print(json.dumps(rows, indent=2))
        return
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console()
    # A method's parts say what it is; a narrow terminal has no room for more.
    narrow = kind is Kind.methods and console.width < WIDE
    columns = [column for column in rows[0] if not (narrow and column == "about")]
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column.replace("_", " "), no_wrap=column == "name")
    for row in rows:
        table.add_row(*(escape(row[column]) for column in columns))
    console.print(table)


def _rows(kind: Kind) -> list[dict[str, str]]:
    if kind is Kind.methods:
        from spryfl.federated.method import METHODS

        return [
            {
                "name": name,
                "estimator": m.estimator,
                "assignment": m.assignment,
                "up": m.upload,
                "a_round": m.pace,
                "server": m.server,
                "about": m.summary,
            }
            for name, m in METHODS.items()
        ]
    if kind is Kind.models:
        from spryfl.models.builtin import BUILTIN_MODELS

        own = [{"name": f"builtin:{n}", "about": m.summary, "install": m.install} for n, m in BUILTIN_MODELS.items()]
        return [*own, {"name": "HUB_ID or ./FOLDER", "about": "any transformers model with safetensors", "install": ""}]
    if kind is Kind.datasets:
        from spryfl.data.builtin import BUILTIN_DATASETS

        own = [{"name": f"builtin:{n}", "about": d.summary} for n, d in BUILTIN_DATASETS.items()]
        return [*own, {"name": "HUB_ID or ./PATH", "about": "a hub dataset, or local Parquet, CSV or JSONL"}]
    if kind is Kind.settings:
        from spryfl.config.reference import setting_rows

        return setting_rows()
    from spryfl.config import ADAPTER_KINDS, TASK_KINDS

    if kind is Kind.tasks:
        return [{"name": name, "about": about} for name, about in TASK_KINDS.items()]
    return [{"name": name, "about": about} for name, about in ADAPTER_KINDS.items()]
