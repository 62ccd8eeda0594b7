"""What libraries print at import that no user can act on."""

import logging

# A faster kernel from the hub is optional, and this project never runs bitsandbytes' own products.
_OPTIONAL_KERNEL = "Failed to load CPU gemm_4bit_forward from kernels-community"


def quiet_bitsandbytes() -> None:
    """Drop bitsandbytes' one message about an optional kernel; whatever else it says is heard."""
    logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(_is_wanted)


def _is_wanted(record: logging.LogRecord) -> bool:
    return not str(record.msg).startswith(_OPTIONAL_KERNEL)
