"""The device that a run is planned for: rates of its memory, its products and its links, assumed or measured
(``machine_file.py``)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Device:
    """Figures of a rank's device and links; bandwidths in GB/s (1e9 bytes), in one direction, as achieved.

    ``flops_efficiency``, ``attention_efficiency``: shares of the peak that products reach, and those inside attention;
    ``search_rate``: 1e9 keys and cells that a search for picks looks at in a second, so many where only its passes over
    the scores are known; ``memory_bandwidth``: of operations that read and write whole tensors; ``row_bandwidth``: of
    rows read at random places of a table; ``update_bandwidth``: of the optimizer, whose state is read and written;
    ``cache_bytes``: what the cache that all programs share keeps of data that any of them reads (an H100's L2 of 50 MB
    has two halves, each of which keeps what its own programs read); ``cache_bandwidth``: of rows that it has;
    ``all_reduce_gain``: bytes per second of an all-reduce over those of all-gathers and reduce-scatters (1 where it is
    one after the other, as in NCCL's rings; gloo does it otherwise, and faster);
    ``launch_us``: microseconds that the host takes to start an operation; ``starts_ahead``: 1 where the host starts
    operations while the device computes (a GPU), 0 where it computes itself.
    """

    peak_tflops: float = 989.0
    flops_efficiency: float = 0.6
    attention_efficiency: float = 0.6
    search_rate: float = 1e6
    memory_bandwidth: float = 2500.0
    row_bandwidth: float = 2000.0
    update_bandwidth: float = 2500.0
    cache_bytes: float = 25e6
    cache_bandwidth: float = 4000.0
    intra_node_bandwidth: float = 360.0
    inter_node_bandwidth: float = 40.0
    all_reduce_gain: float = 1.0
    gpus_per_node: int = 8
    link_latency_us: float = 20.0
    launch_us: float = 5.0
    starts_ahead: int = 1
    host_bandwidth: float = 20.0
    host_memory_bandwidth: float = 30.0

    def seconds(self, sent: float, ranks: int, stride: int, *, all_to_all: bool = False) -> float:
        """Time to send ``sent`` bytes in a group of ``ranks`` whose members are ``stride`` ranks apart; bytes of
        all-reduces as ``reduced`` has them."""
        if ranks == 1 or sent <= 0:
            return 0.0
        here = max(1, min(ranks, self.gpus_per_node // stride))
        crossing = sent * (ranks - here) / (ranks - 1)
        inside = sent - crossing
        if not all_to_all:
            crossing /= here
        longest = max(inside / self.intra_node_bandwidth, crossing / self.inter_node_bandwidth)
        return self.link_latency_us * 1e-6 + longest / 1e9

    def reduced(self, sent: float) -> float:
        """Bytes of an all-gather that take as long as ``sent`` bytes of an all-reduce."""
        return sent / self.all_reduce_gain

    def crosses_nodes(self, ranks: int, stride: int) -> bool:
        """Whether a group of ``ranks`` that are ``stride`` apart has members on several nodes."""
        return ranks > 1 and ranks * stride > self.gpus_per_node
