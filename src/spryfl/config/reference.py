"""Every setting of a run, told as its configuration declares it."""

import json
from collections.abc import Iterator
from typing import Any

from spryfl.config.run import RunConfig

_BOUNDS = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}


def setting_rows() -> list[dict[str, str]]:
    """One row a setting, in the configuration's order: its name in `--set`, its default, its values and what it does.

    Defaults are written as in TOML; an empty one leaves the choice to what `about` tells.
    """
    schema = RunConfig.model_json_schema()
    return [
        {
            "name": name,
            "default": "" if setting["default"] is None else json.dumps(setting["default"]),
            "values": " | ".join(_values(setting)),
            "about": setting["description"],
        }
        for name, setting in _settings(schema, schema["$defs"])
    ]


def _settings(part: dict[str, Any], parts: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    for name, setting in part["properties"].items():
        if "$ref" in setting:
            yield from _settings(parts[setting["$ref"].rsplit("/", 1)[-1]], parts, f"{prefix}{name}.")
        else:
            yield prefix + name, setting


def _values(setting: dict[str, Any]) -> list[str]:
    if "anyOf" in setting:
        return [value for other in setting["anyOf"] for value in _values(other)]
    if "enum" in setting or "const" in setting:
        return [json.dumps(value) for value in setting.get("enum", [setting.get("const")])]
    if "$ref" in setting:
        return ["table"]
    if setting["type"] == "null":
        return []
    if setting["type"] == "array":
        return [f"[{' | '.join(_values(setting['items']))}, ...]"]
    bounds = [f"{sign} {setting[bound]:g}" for bound, sign in _BOUNDS.items() if bound in setting]
    return [" ".join([setting.get("format", setting["type"]), " and ".join(bounds)]).strip()]
