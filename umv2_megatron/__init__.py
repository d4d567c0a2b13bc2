"""umv2_megatron: pretrain UltraMemV2 language models on Megatron-Core."""

__version__ = "0.1.0"
