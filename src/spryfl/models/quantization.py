"""Frozen linear maps in 4 bits (NF4) or 8, through bitsandbytes' formats.

NF4 (Dettmers et al. 2023, QLoRA): blocks of 64 weights share a scale, and the scales themselves are held in
8 bits (double quantization). int8: one scale a row. Only weights are quantized: a product unpacks its weight
(`unpackers`) and is otherwise PyTorch's own, so activations and tangents keep the model's dtype. Packed
bytes come from the weights as stored, so they do not depend on what the model computes in.
"""

import copy
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from spryfl.errors import ModelError
from spryfl.forward_mode.packed import UnpackRows
from spryfl.models.classes import output_head

KINDS = ("nf4", "int8")
_PIECE = 2**17
"""Values of a 4-bit weight that a processor unpacks at a time: they stay in its cache, and the C library keeps them."""


def bitsandbytes() -> Any:
    """The library, or a ModelError with the command that installs it."""
    try:
        import bitsandbytes
    except ImportError as error:
        remedy = "pip install 'spryfl[quantization]'"
        raise ModelError(f"4-bit and int8 weights need bitsandbytes: {remedy} ({error})") from error
    return bitsandbytes


def unpackers() -> dict[type, UnpackRows]:
    """How each of bitsandbytes' linear modules is unpacked, rounded once; empty while that has not been imported.

    They raise ModelError where the weight is not in memory, or was repacked by bitsandbytes' own forward.
    """
    library = sys.modules.get("bitsandbytes")
    return {} if library is None else {library.nn.Linear4bit: _unpack_4bit, library.nn.Linear8bitLt: _unpack_int8}


def _unpack_4bit(module: Any, rows: slice, out: Tensor) -> None:
    state = module.weight.quant_state
    if state is None:
        raise ModelError("a 4-bit weight is not in memory: its layer's forward has not been called, or was")
    if getattr(state, "packing_format_for_cpu", False):
        raise ModelError("a 4-bit weight was repacked by bitsandbytes' own forward, which this project never calls")
    num_rows, width = state.shape
    start, stop, _ = rows.indices(num_rows)
    low, high, flat = start * width, stop * width, out.view(-1)
    # Whole blocks, as they share a scale: from the one that the first row begins in to the one the last ends in.
    first, last = low // state.blocksize, -(-high // state.blocksize)
    scales = _scales(state, first, last)
    begin, end = first * state.blocksize, min(last * state.blocksize, num_rows * width)
    step = _PIECE if out.device.type == "cpu" else end - begin
    for at in range(begin, end, step):
        values = _dequantized(
            module.weight.data, state, scales[(at - begin) // state.blocksize :], at, min(at + step, end), out.dtype
        )
        inside = slice(max(at, low), min(at + len(values), high))
        flat[inside.start - low : inside.stop - low] = values[inside.start - at : inside.stop - at]


def _dequantized(packed: Tensor, state: Any, scales: Tensor, at: int, end: int, dtype: torch.dtype) -> Tensor:
    """Values `at` to `end` of a packed weight, whole blocks whose scales come first."""
    library = bitsandbytes().functional
    part = library.QuantState(
        absmax=scales[: -(-(end - at) // state.blocksize)],
        # As one row: bitsandbytes 0.50's CPU kernel takes wrong scales where a block runs over the end of a row.
        shape=torch.Size((1, end - at)),
        code=state.code,
        blocksize=state.blocksize,
        quant_type=state.quant_type,
        dtype=dtype if dtype in (torch.float32, torch.bfloat16, torch.float16) else torch.float32,
    )
    values: Tensor = library.dequantize_4bit(packed.view(-1, 1)[at // 2 : -(-end // 2)], part)
    return values.view(-1)


def _scales(state: Any, first: int, last: int) -> Tensor:
    """The scales of some blocks; packed themselves where double quantization was used."""
    if not state.nested:
        scales: Tensor = state.absmax[first:last]
        return scales
    library, nested = bitsandbytes().functional, state.state2
    begin = first // nested.blocksize
    part = copy.copy(nested)
    part.absmax = nested.absmax[begin : -(-last // nested.blocksize)]
    start = begin * nested.blocksize
    scales = library.dequantize_blockwise(state.absmax[start:last], part) + state.offset
    return scales[first - start :]


def _unpack_int8(module: Any, rows: slice, out: Tensor) -> None:
    packed = module.weight.data[rows]  # (rows, in)
    scale = module.weight.SCB if module.weight.SCB is not None else module.state.SCB
    if scale is None or packed.dtype != torch.int8:
        raise ModelError("an int8 weight is not in memory: its layer's forward has not been called, or was")
    # A scale rounded to 16 bits would stretch whole rows, so the product is rounded instead.
    wide = torch.promote_types(out.dtype, torch.float32)
    torch.mul(packed.to(wide), (scale[rows] / 127).unsqueeze(1), out=out)


def quantize(weight: Tensor, kind: str) -> dict[str, Tensor]:
    """A weight (out, in) as the tensors that transformers writes for it, by what follows the module's path."""
    functional = bitsandbytes().functional
    weight = weight.detach().contiguous()
    if kind == "nf4":
        if weight.dtype == torch.float64:
            weight = weight.float()
        packed, state = functional.quantize_4bit(weight, compress_statistics=True, quant_type="nf4")
        return {"weight": packed, **{f"weight.{key}": value for key, value in state.as_dict(packed=True).items()}}
    packed, scale, _ = functional.int8_vectorwise_quant(weight.to(torch.float16))
    return {"weight": packed, "SCB": scale, "weight_format": torch.tensor(0, dtype=torch.uint8)}


def packed_parameter(parts: Mapping[str, Tensor], device: torch.device) -> nn.Parameter:
    """The parameter of a quantized module from tensors as `quantize` gives them; no copy on the same device."""
    library = bitsandbytes()
    packed = parts["weight"].to(device)
    if "SCB" in parts:
        return library.nn.Int8Params(packed, requires_grad=False, CB=packed, SCB=parts["SCB"].to(device))
    statistics = {key: value for key, value in parts.items() if key != "weight"}
    return library.nn.Params4bit.from_prequantized(packed, statistics, requires_grad=False, device=device)


def packed_bytes(shape: Sequence[int], kind: str) -> int:
    """Bytes of a quantized weight (out, in), its scales included (a hundred or so of metadata aside)."""
    numel = shape[0] * shape[1]
    if kind == "int8":
        return numel + 4 * shape[0]
    blocks = -(-numel // 64)
    return -(-numel // 2) + blocks + 4 * -(-blocks // 256)


def library_config(kind: str, skip: Sequence[str]) -> Any:
    """Transformers' configuration of a kind; `skip` are names of linear modules left as they are."""
    from transformers import BitsAndBytesConfig

    bitsandbytes()
    if kind == "nf4":
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            llm_int8_skip_modules=list(skip),
        )
    return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=list(skip))


def stored_config(config: Any, name: str) -> Any | None:
    """The quantization a checkpoint was saved with, or None.

    Raises:
        ModelError: it is not one of bitsandbytes'.
    """
    found = getattr(config, "quantization_config", None)
    if found is None:
        return None
    from transformers.quantizers.auto import AutoQuantizationConfig

    table = found if isinstance(found, dict) else found.to_dict()
    if not (table.get("load_in_4bit") or table.get("load_in_8bit")):
        method = table.get("quant_method", "an unnamed method")
        raise ModelError(f"{name}: quantized by {method}; only bitsandbytes' 4-bit and int8 weights are read")
    bitsandbytes()
    return AutoQuantizationConfig.from_dict(dict(table))


def kind_of(config: Any) -> str:
    """The kind of a library configuration: int8, nf4 or fp4."""
    return "int8" if config.load_in_8bit else str(config.bnb_4bit_quant_type)


def replace_linear(model: nn.Module, config: Any, *, packed: bool) -> None:
    """Put quantized modules, on the meta device, in the place of linear ones; `packed` if weights come so."""
    from transformers.integrations import replace_with_bnb_linear

    head = output_head(model)
    skip = [*(config.llm_int8_skip_modules or []), *([] if head is None else [head])]  # the library's own rule
    replace_with_bnb_linear(model, modules_to_not_convert=skip, quantization_config=config, pre_quantized=packed)
    kind = bitsandbytes().nn.Linear4bit
    for module in model.modules():
        if isinstance(module, kind):
            module.support_avx512bf16_for_cpu = False  # else its forward would repack the weight
    # PEFT looks at these to choose its layers.
    model.is_loaded_in_8bit, model.is_loaded_in_4bit = config.load_in_8bit, config.load_in_4bit
    model.config.quantization_config = config  # type: ignore[union-attr]
