"""Base models, their adapters, and the trainable units the server assigns."""

from spryfl.models.quiet import quiet_bitsandbytes

quiet_bitsandbytes()  # before PEFT, which imports bitsandbytes wherever it is installed
