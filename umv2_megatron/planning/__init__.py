"""What a model and a run of it cost, by arithmetic alone: parameters, floating-point operations, bytes and time.

    model_shape, parameters, flops, memory_access   the model, whatever it runs on
    layout, rank_parameters                         how it is spread over ranks, and what one of them holds
    state_bytes, activations                        bytes on a rank that stay, and that come and go
    exchange, traffic                               bytes that ranks send each other
    step_time, search                               what a step takes, and which layout is fastest
    tables                                          all of it as text

Nothing here needs torch, so the answers come at once and on any machine. ``model_fields`` is everywhere a mapping of
Megatron's flag names (with underscores) to values, as in ``config/preset_files``; ``memory_config`` is None for a model
without memory layers.
"""

from umv2_megatron.planning.flops import FlopsPerToken, flops_per_token, training_flops
from umv2_megatron.planning.memory_access import BytesTouched, bytes_touched_per_token
from umv2_megatron.planning.model_shape import FFN_VARIANTS, ModelShape, padded_vocab_size
from umv2_megatron.planning.parameters import BlockCount, ParameterCount, count_parameters

__all__ = [
    "FFN_VARIANTS",
    "BlockCount",
    "BytesTouched",
    "FlopsPerToken",
    "ModelShape",
    "ParameterCount",
    "bytes_touched_per_token",
    "count_parameters",
    "flops_per_token",
    "padded_vocab_size",
    "training_flops",
]
