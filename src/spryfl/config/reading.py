"""From a TOML file or nested tables to a run's or a suite's configuration; every problem at once, with its remedy."""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError

from spryfl.config.part import Part, flattened
from spryfl.config.run import RunConfig
from spryfl.config.suite import SuiteConfig
from spryfl.errors import ConfigError, nearest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

AnyPart = TypeVar("AnyPart", bound=Part)


def load_config(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a run's TOML file and apply `part.key=value` overrides.

    Raises:
        ConfigError: the file is missing or no TOML, or holds unknown keys or impossible values.
    """
    table = _read_toml(path, f"Start one with: spry init {path.name}")
    chosen = flattened(dict(map(_parse_override, overrides)))
    if "method.name" in chosen:  # the file's label was for its own method
        chosen = {"label": None} | chosen
    config = parse_config(with_overrides(table, chosen))
    compared_configs(config)  # a mistake in a later run must show before the first one starts
    return config


def load_suite(path: Path, overrides: Sequence[str] = ()) -> SuiteConfig:
    """Read a suite's TOML file and apply `part.key=value` overrides to what all its runs share.

    Raises:
        ConfigError: the file is missing or no TOML, or has unknown keys or impossible values of its own; what its
            runs would say is not asked yet.
    """
    table = _read_toml(path, "Suites to start from are in benchmarks/suites")
    base = table.get("base", {})
    if overrides and isinstance(base, Mapping):  # if it is no table, that is said below
        table["base"] = with_overrides(base, flattened(dict(map(_parse_override, overrides))))
    return _parse(SuiteConfig, table)


def parse_config(table: Mapping[str, Any]) -> RunConfig:
    """Validate a configuration given as nested tables; all problems are reported at once."""
    return _parse(RunConfig, table)


def compared_configs(config: RunConfig) -> dict[str, RunConfig]:
    """The configuration of each `compare` entry, by its name."""
    base = config.model_dump(exclude_none=True, exclude={"compare", "label"})
    return {entry.name: parse_config(with_overrides(base, entry.set)) for entry in config.compare}


def with_overrides(table: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of nested tables in which each dotted key is set; a table takes the place of the one that was there."""
    result = {key: dict(value) if isinstance(value, Mapping) else value for key, value in table.items()}
    for dotted, value in overrides.items():
        target = result
        *parts, key = dotted.split(".")
        for part in parts:
            target = target.setdefault(part, {})
            if not isinstance(target, dict):
                raise ConfigError(f"{dotted}: '{part}' is a value, not a table of keys")
        target[key] = dict(value) if isinstance(value, Mapping) else value  # a later key may be set in it
    return result


def _read_toml(path: Path, remedy: str) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))  # some editors put a mark first
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file. {remedy}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid TOML: {error}") from None


def _parse(kind: type[AnyPart], table: Mapping[str, Any]) -> AnyPart:
    try:
        return kind.model_validate(table)
    except ValidationError as error:
        raise ConfigError("; ".join(_explain(dict(problem), kind) for problem in error.errors())) from None


def _parse_override(text: str) -> tuple[str, Any]:
    key, equals, raw = text.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"--set {text}: write it as part.key=value, such as server.num_rounds=10")
    try:
        value = tomllib.loads(f"value = {raw}")["value"]
    except tomllib.TOMLDecodeError:
        value = raw.strip()  # a bare word is a string: no quotes needed on the command line
    return key.strip(), value


def _explain(problem: Mapping[str, Any], root: type[Part]) -> str:
    """One line for one pydantic error, with the nearest known key where one is unknown."""
    path = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        *parents, key = (str(part) for part in problem["loc"])
        known = _fields(parents, root)
        home = [f"{part}.{key}" for part in root.model_fields if key in _fields([part], root)]
        hint = nearest(key, known) or (f" It belongs to {home[0]}." if home else "")
        return f"unknown key '{path}'." + (hint or f" Known here: {', '.join(known)}.")
    message = str(problem["msg"]).removeprefix("Value error, ")
    given = problem.get("input")
    shown = "" if isinstance(given, dict | BaseModel) else f" (got {given!r})"
    return f"{path}: {message}{shown}" if path else f"{message}{shown}"


def _fields(parents: Sequence[str], root: type[Part]) -> list[str]:
    """The keys known at a path of tables, of which some lie in lists or under names of their own."""
    part: type[BaseModel] = root
    for parent in parents:
        annotation = part.model_fields[parent].annotation if parent in part.model_fields else None
        for kind in (annotation, *get_args(annotation)):
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                part = kind
    return list(part.model_fields)
