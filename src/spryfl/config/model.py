"""The base model, and the adapter that is trained beside its head."""

from typing import Literal

from pydantic import Field, model_validator

from spryfl.config.part import Part, Positive, PositiveFloat, Source


class ModelConfig(Part):
    """The base model; its weights stay frozen."""

    name: Source = Field("builtin:minilm", description="builtin:NAME, a hub id, or a local folder")
    revision: str | None = Field(None, description="the hub revision; pin it for a reproducible run")
    dtype: Literal["auto", "float32", "bfloat16"] = Field("auto", description="what the model computes in")
    device: str = Field("auto", description="cpu, cuda, cuda:1, mps; auto takes an accelerator if there is one")
    trust_remote_code: bool = Field(False, description="run code from the hub repository")
    quantization: Literal["none", "nf4", "int8"] = Field(
        "none", description="pack the frozen linear maps while loading; a model stored packed stays so by itself"
    )
    streamed: bool = Field(False, description="leave the layers on disk and pass them through memory one by one")


ADAPTER_KINDS = {
    "lora": "low-rank pairs A, B beside frozen linear maps (any rank, any target modules, rsLoRA; one may be frozen)",
    "dora": "as lora, of the weight's direction; and the length of each of its rows",
    "lora_xs": "rank x rank numbers between frozen factors, the weight's own singular vectors",
    "vera": "two trained vectors scale one frozen random pair that all modules share",
    "tinylora": "num_values numbers, spread over LoRA-XS's rank x rank by frozen random matrices",
    "ia3": "factors that scale keys, values and the feed-forward's middle",
    "bitfit": "the layers' own biases",
    "head": "nothing: the head alone is trained",
}
"""What a module trains, of in x out, at rank r: lora r (in + out), with A frozen r out, with B frozen r in; lora_xs
r r; vera out + r; tinylora num_values; dora out more than lora; ia3 out, or in of a feed-forward's second map; bitfit
out."""
_WITH_RANK = ("lora", "dora", "lora_xs", "vera", "tinylora", "head")
_TAKEN_BY = {
    "alpha": ("lora", "dora"),
    "rslora": ("lora", "dora"),
    "frozen": ("lora", "dora"),
    "num_values": ("tinylora",),
    "rank": _WITH_RANK,
    "dropout": _WITH_RANK,
}
"""Which kinds a field belongs to; the others bear its default only."""
LARGEST_XS = 32
"""PEFT's layer that LoRA-XS is built on holds rank^4 numbers of each module."""


class AdapterConfig(Part):
    """What is trained beside the head."""

    kind: Literal["lora", "dora", "lora_xs", "vera", "tinylora", "ia3", "bitfit", "head"] = Field(
        "lora", description="see: spry list adapters"
    )
    rank: Positive = Field(1, description="of the update: LoRA r; VeRA needs more, such as 256")
    alpha: PositiveFloat = Field(1.0, description="lora, dora: the update is scaled by alpha / rank")
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout on the adapter's input while training")
    target_modules: tuple[str, ...] | None = Field(
        None,
        description="module names; by default query and value, of ia3 key, value and the feed-forward's second map, of "
        "bitfit all of a layer",
    )
    rslora: bool = Field(False, description="lora, dora: scale by alpha / sqrt(rank) instead")
    frozen: Literal["none", "a", "b"] = Field(
        "none", description="lora, dora: a trains B alone (LoRA-FA); b trains A alone, beside an orthonormal B"
    )
    num_values: Positive | None = Field(None, description="tinylora: numbers trained of a module, at most rank^2")

    @model_validator(mode="after")
    def _fields_belong_to_their_kind(self) -> "AdapterConfig":
        for name, kinds in _TAKEN_BY.items():
            if self.kind not in kinds and getattr(self, name) != type(self).model_fields[name].default:
                known = " or ".join(f"'{kind}'" for kind in kinds)
                raise ValueError(f"{name} belongs to kind = {known}, not '{self.kind}': leave it out")
        if self.kind == "lora_xs" and self.rank > LARGEST_XS:
            raise ValueError(f"kind = 'lora_xs' takes a rank of {LARGEST_XS} at most, not {self.rank}: lower it")
        if self.kind == "tinylora" and not 1 <= (self.num_values or 0) <= self.rank**2:
            raise ValueError(
                f"kind = 'tinylora' needs num_values from 1 to rank^2 = {self.rank**2}, got {self.num_values}: "
                "set it, or raise rank"
            )
        return self
