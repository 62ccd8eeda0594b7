"""`spry check`: is every module of a model supported in forward mode?"""

import json
from typing import Annotated

import typer

from spryfl.config import ModelConfig, TaskKind
from spryfl.errors import UnsupportedModuleError


def check(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="builtin:NAME, a hub id, or a local folder.")],
    task: Annotated[TaskKind, typer.Option(help="What it is to do; see: spry list tasks.")] = "classification",
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
) -> None:
    """Check a model from its configuration alone: no weights are loaded and nothing is computed."""
    from spryfl.forward_mode.support import check_support
    from spryfl.models.skeleton import skeleton

    report = check_support(skeleton(ModelConfig(name=model), task=task))
    if as_json:
        print(json.dumps([vars(problem) for problem in report.problems], indent=2))
    else:
        for problem in report.problems:
            print(f"{problem.module} ({problem.kind}): {problem.reason}. {problem.remedy}")
    if report.problems:
        raise UnsupportedModuleError(
            f"{model}: {len(report.problems)} of {report.num_modules} modules are not supported"
        )
    if not as_json:
        print(f"{model}: all {report.num_modules} modules are supported in forward mode")
