"""What every part of a configuration is made of."""

from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema

from spryfl.errors import ConfigError
from spryfl.sizes import parse_size

Positive = Annotated[int, Field(ge=1)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(gt=0, lt=1)]


def _size(value: Any) -> int:
    try:
        return parse_size(value)
    except ConfigError as error:
        raise ValueError("a number of bytes, or text such as '64MiB' or '1.5GB'") from error


def _home_is_known(name: str) -> str:
    try:
        Path(name).expanduser()
    except RuntimeError:
        raise ValueError("no such user's home is known: write the whole path") from None
    return name


Source = Annotated[str, AfterValidator(_home_is_known)]
"""A file or folder by path, or what has a name elsewhere."""
Size = Annotated[int, BeforeValidator(_size), WithJsonSchema({"type": "string", "format": "size"})]
"""Bytes, or text such as '64MiB'."""


def flattened(table: Any, prefix: str = "") -> Any:
    """Nested tables as one, with dotted keys; what is no table stays, for a validator to refuse."""
    if not isinstance(table, dict):
        return table
    found: dict[str, Any] = {}
    for key, value in table.items():
        found |= flattened(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found


Overrides = Annotated[dict[str, Any], BeforeValidator(flattened)]
"""'part.key' = value, or tables of them, as TOML has `part.key = value` without quotes."""


class Part(BaseModel):
    """One part of a configuration: frozen, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")
