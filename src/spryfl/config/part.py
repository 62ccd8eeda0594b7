"""What every part of a configuration is made of."""

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

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


Size = Annotated[int, BeforeValidator(_size)]


class Part(BaseModel):
    """One part of a configuration: frozen, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")
