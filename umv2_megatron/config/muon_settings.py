"""The settings of Muon (``training/muon.py``), under the names that Megatron-LM's arguments have."""

from __future__ import annotations

from dataclasses import dataclass

from umv2_megatron.config.option import option

_MUON = ("optimizer!=adam",)


@dataclass
class MuonSettings:
    """Fields ``muon_*`` of the OptimizerConfig of mcore 0.16.1, with its defaults."""

    muon_momentum: float = option(0.95, "decay of the mean of gradients", at_least=0, below=1, needs=_MUON)
    muon_use_nesterov: bool = option(
        False, "orthogonalise the gradient mixed with the mean (Nesterov) instead of the mean", needs=_MUON
    )
    muon_split_qkv: bool = option(
        True,
        "orthogonalise the projections to queries, keys and values apart",
        flags=("muon-no-split-qkv",),
        needs=_MUON,
    )
    muon_num_ns_steps: int = option(5, "steps of the Newton-Schulz iteration", at_least=1, needs=_MUON)
    muon_scale_mode: str = option(
        "spectral",
        "factor of the update of a matrix [rows, columns]: root of the larger of both (spectral), of rows / columns "
        "(unit_rms_norm), or of that but at least 1 (shape_scaling)",
        choices=("spectral", "unit_rms_norm", "shape_scaling"),
        needs=_MUON,
    )
    muon_extra_scale_factor: float = option(
        1.0, "further factor of the update; 0.2 with spectral has the size of Adam's updates", above=0, needs=_MUON
    )
    muon_fp32_matmul_prec: str = option(
        "medium",
        "products of the iteration: in bfloat16 (medium), TensorFloat-32 on a GPU (high), or float32 (highest)",
        choices=("medium", "high", "highest"),
        needs=_MUON,
    )
    muon_tp_mode: str = option(
        "blockwise",
        "matrices split by tensor parallelism: each part for itself (blockwise), every rank the whole (duplicated), or "
        "all ranks together (distributed)",
        choices=("blockwise", "duplicated", "distributed"),
        needs=_MUON,
    )
