"""What the upcycling of a dense model takes as flags, beside its source; loads neither torch nor mcore."""

from __future__ import annotations

from umv2_megatron.config.memory_config import model_keys

STARTS = ("silent", "variance")
"""How new memory layers begin: without an effect, or as --memory-init says."""
OPTIONS = ("ffn_variant", "seq_length", *model_keys())
"""Settings that an upcycled model does not have from its source."""
