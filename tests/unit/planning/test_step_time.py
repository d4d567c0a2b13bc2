"""Traffic, times and exchanges of the planner against sums done by hand."""

from __future__ import annotations

import dataclasses

import pytest

from umv2_megatron.config.presets import PRESETS
from umv2_megatron.planning import device_bytes
from umv2_megatron.planning.activations import micro_batches_in_flight
from umv2_megatron.planning.device import Device
from umv2_megatron.planning.exchange import exchange_bytes
from umv2_megatron.planning.layout import Layout
from umv2_megatron.planning.overlap import Sent, Work, slot_seconds
from umv2_megatron.planning.rank_parameters import Parameter
from umv2_megatron.planning.search import Model, evaluate, search
from umv2_megatron.planning.state_bytes import Bucket, StateBytes, buckets_of, owned_elements, state_bytes
from umv2_megatron.planning.step_time import ALL_TO_ALL
from umv2_megatron.planning.traffic import traffic

PRESET = PRESETS["umv2-1b-7b"]
MEMORY = PRESET.memory_config()
MODEL = Model(PRESET.model, MEMORY)
IDEAL = Device(peak_tflops=100.0, flops_efficiency=1.0, attention_efficiency=1.0, memory_bandwidth=1e9,
               row_bandwidth=1e9, update_bandwidth=1e9, cache_bandwidth=1e9,
               intra_node_bandwidth=1e9, inter_node_bandwidth=1e9, link_latency_us=0.0, launch_us=0.0)
TOKENS, HIDDEN = 4096, 2048


def test_exchange_by_dimension_by_hand() -> None:
    """M = 4, T = 10, P = K = 128, C = 2 (so that C' = 1), Dp = 384, Dv = 768, bf16."""
    sent = exchange_bytes(MEMORY, "dim", 4, 10, 552**2, 2)
    assert sent == {
        "rows": 3 * 10 * 128 * 4, "projected": 10 * 96 * 3 * 2, "pre_scores": 3 * 10 * 128 * 4,
        "weights": 3 * 10 * 128 * 4, "output": 3 * 10 * 192 * 2, "output_grad": 3 * 10 * 192 * 2,
        "weight_grads": 3 * 10 * 128 * 4, "rho_grads": 3 * 10 * 128 * 4, "projected_grad": 10 * 96 * 3 * 2,
    }
    wide = exchange_bytes(MEMORY, "dim", 4, 10, 2**31 + 1, 2)
    assert wide["rows"] == 2 * sent["rows"], "picks of a larger table take 8 bytes"
    assert exchange_bytes(MEMORY, "dim", 1, 10, 552**2, 2) == {}


def test_exchange_by_row_by_hand() -> None:
    sent = exchange_bytes(MEMORY, "row", 4, 10, 552**2, 2, sent_picks=900, received_picks=1000)
    assert sent == {
        "pick_counts": 3 * 10 * 4, "rows": 900 * 4, "scores": 900 * 2 * 4, "projected": 3 * 10 * 384 * 2,
        "output": 3 * 10 * 768 * 2, "output_grad": 3 * 10 * 768 * 2, "score_grads": 1000 * 2 * 4,
        "projected_grad": 3 * 10 * 384 * 2,
    }
    even = exchange_bytes(MEMORY, "row", 4, 10, 552**2, 2)
    assert even["rows"] == even["scores"] / 2 == 10 * 128 * 3 / 4 * 4


@pytest.mark.parametrize("keys, bytes_each", [(46340, 4), (46341, 8), (2**15, 4)])
def test_buffers_by_hand(keys: int, bytes_each: int) -> None:
    """A shuffle of N^2 numbers for each memory layer on the stage: 8 bytes each where 4 are too few; u and t."""
    memory = dataclasses.replace(MEMORY, num_keys=keys, layer_freq="[1,0,0,1,1,0,0,1]", sharing="none", sharing_size=1)
    shape = dataclasses.replace(MODEL.shape(1), num_layers=8)
    vectors = 2 * memory.num_heads * memory.tucker_rank * 4
    for stage, layers in ((0, 1), (1, 3)):
        held = state_bytes(shape, memory, Layout(world=2, pp=2, first_stage=3), stage)
        assert held.buffers == layers * (keys * keys * bytes_each + vectors)
    assert state_bytes(shape, None, Layout(world=2, pp=2, first_stage=3), 0).buffers == 0


def test_traffic_by_hand() -> None:
    layout = Layout(world=16, tp=2, pp=2, sequence_parallel=True, bf16=True, distributed_optimizer=True, memory_size=4)
    state = StateBytes(parameters=0, weights=1000, gradients=4000, optimizer=0, buffers=0, table_weights=400,
                       table_gradients=1600, table_optimizer=0)
    sent = traffic(MODEL.shape(2), MODEL.memory, layout, state)
    part = TOKENS * HIDDEN * 2 / 2
    assert (sent.tensor_forward, sent.tensor_backward, sent.tensor_hidden) == (4 * part, 6 * part, 2 * part)
    assert sent.pipeline == part and sent.context == 0
    assert sent.dense_gradients == 2400 * 3 / 4 and sent.dense_weights == 600 * 3 / 4
    assert sent.table_gradients == 1600 / 2 and sent.table_weights == 400 / 2
    whole = traffic(MODEL.shape(2), MODEL.memory, dataclasses.replace(layout, distributed_optimizer=False), state)
    assert whole.dense_gradients == 2 * sent.dense_gradients and whole.dense_weights == 0
    duplicated = traffic(MODEL.shape(2), MODEL.memory, dataclasses.replace(layout, sequence_parallel=False), state)
    assert duplicated.tensor_forward == 4 * part + part and duplicated.pipeline == 2 * part
    assert duplicated.tensor_reduced == 4 * part and sent.tensor_reduced == 0


def test_links() -> None:
    device = Device(intra_node_bandwidth=100.0, inter_node_bandwidth=10.0, gpus_per_node=4, link_latency_us=10.0)
    assert device.seconds(1e9, 1, 1) == 0.0
    assert device.seconds(1e9, 4, 1) == pytest.approx(1e-5 + 0.01)
    # 8 ranks on 2 nodes: 4 of 7 bytes leave the node, each through its own rank's link, or shared by the node's 4
    assert device.seconds(7e9, 8, 1, all_to_all=True) == pytest.approx(1e-5 + 0.4)
    assert device.seconds(7e9, 8, 1) == pytest.approx(1e-5 + 0.1)
    assert device.seconds(1e9, 2, 4) == pytest.approx(1e-5 + 0.1)


def test_all_reduces_have_a_rate_of_their_own() -> None:
    """Of gradients without the distributed optimizer, and of tensor parallelism without sequence parallelism."""
    slow = dataclasses.replace(IDEAL, intra_node_bandwidth=1.0)
    quick = dataclasses.replace(slow, all_reduce_gain=4.0)
    layout = Layout(world=2, bf16=True)
    for each, sums in ((layout, True), (dataclasses.replace(layout, distributed_optimizer=True), False)):
        before, after = (evaluate(MODEL, each, device).time.data_parallel for device in (slow, quick))
        assert after == pytest.approx(before / 4 if sums else before)
    tensor = dataclasses.replace(layout, tp=2, sequence_parallel=True)
    assert evaluate(MODEL, tensor, slow).time.collectives == evaluate(MODEL, tensor, quick).time.collectives
    tensor = dataclasses.replace(tensor, sequence_parallel=False)
    before, after = (evaluate(MODEL, tensor, device).time.collectives for device in (slow, quick))
    part = TOKENS * HIDDEN * 2 / 2
    assert before - after == pytest.approx(16 * 2 * 4 * part * (1 - 1 / 4) / 1e9)


def test_ideal_machine_reaches_full_utilisation() -> None:
    """Without memory traffic, links or a pipeline, only the products are left; recomputation costs a third."""
    layout = Layout(world=4, micro_batches=2, bf16=True)
    time = evaluate(MODEL, layout, IDEAL).time
    assert time.mfu == pytest.approx(1.0, rel=1e-3)
    assert time.step == pytest.approx(MODEL.flops.training * 2 * TOKENS / 1e14, rel=1e-3)
    again = evaluate(MODEL, dataclasses.replace(layout, recompute="full"), IDEAL).time
    logits = MODEL.flops.logits / MODEL.flops.forward
    assert again.mfu == pytest.approx(3 / (4 - logits), rel=1e-3)


def test_pipeline_bubble() -> None:
    layout = Layout(world=4, pp=4, micro_batches=8, bf16=True)
    time = evaluate(MODEL, layout, IDEAL).time
    both = time.forward + time.backward
    assert time.bubble == pytest.approx(3 * both) and time.step == pytest.approx(11 * both, rel=1e-3)
    turns = evaluate(MODEL, dataclasses.replace(layout, chunks=4), IDEAL).time
    assert turns.bubble == pytest.approx(3 * both / 4, rel=1e-3)


def test_launches_count_where_the_device_would_be_faster() -> None:
    """Beside the device only what takes longer than it; where the host computes itself, all of them."""
    layout, operations = Layout(bf16=True, backend="triton"), 16 * (80 + 63) + 60
    alone = evaluate(MODEL, layout, IDEAL).time
    few, many = (dataclasses.replace(IDEAL, launch_us=each) for each in (1.0, 1e4))
    assert evaluate(MODEL, layout, few).time == alone
    time = evaluate(MODEL, layout, many).time
    assert time.forward + time.backward == pytest.approx(operations * 1e-2)
    itself = evaluate(MODEL, layout, dataclasses.replace(few, starts_ahead=0)).time
    assert itself.step == pytest.approx(alone.step + operations * 1e-6)
    captured = dataclasses.replace(layout, graphs=True)
    assert evaluate(MODEL, captured, many).time.step < 0.1 * time.step


def test_rows_and_streams_have_their_own_rates() -> None:
    layout = Layout(bf16=True, backend="triton")
    moved = device_bytes.memory_layer(MEMORY, layout, TOKENS)
    alone = evaluate(MODEL, layout, IDEAL).time
    rows = evaluate(MODEL, layout, dataclasses.replace(IDEAL, row_bandwidth=1.0)).time
    assert rows.forward - alone.forward == pytest.approx(16 * moved.rows_forward / 1e9, rel=1e-6)
    assert rows.backward - alone.backward == pytest.approx(16 * moved.rows_backward / 1e9, rel=1e-6)


def test_exchange_is_hidden_behind_the_ffn_only_where_it_runs_beside_it() -> None:
    slow = dataclasses.replace(IDEAL, intra_node_bandwidth=1e3)
    base = Layout(world=8, micro_batches=1, bf16=True, memory_size=8, memory_mode="row")
    sent = exchange_bytes(MEMORY, "row", 8, TOKENS, 552**2, 2)
    waited = sum(sent[name] for name in ("output", "output_grad"))
    beside = sum(sent.values()) - waited
    time = evaluate(MODEL, base, slow).time
    ffn = TOKENS * MODEL.flops.ffn / 16 / 1e14
    assert beside / 1e12 < ffn
    assert time.exchange == pytest.approx(16 * waited / 1e12)
    itself = evaluate(MODEL, base, dataclasses.replace(slow, starts_ahead=0)).time
    assert itself.exchange == pytest.approx(16 * (waited + beside) / 1e12), "a CPU that sends does not compute"


def test_order_of_a_slot() -> None:
    """Lookup 4 s, FFN 3 s, 2 s of search and projection; 1 s of picks and 6 s of sums are sent."""
    work, sent = Work(search=1.0, lookup=4.0, rest=1.0, ffn=3.0), Sent(beside=1.0, waited=6.0)
    usual = {"stream": False, "hides": True}
    assert slot_seconds(work, Sent(), 1, **usual) == slot_seconds(work, Sent(), 1, stream=True, hides=True) == 9
    assert slot_seconds(work, sent, 1, **usual) == 1 + 3 + (4 + 6) + 1, "picks hide behind the FFN, sums behind nothing"
    assert slot_seconds(work, sent, 2, **usual) == 1 + 3 + (2 + 6) + 1, "half of the lookup behind the other's sums"
    assert slot_seconds(work, dataclasses.replace(sent, waited=2.0), 2, **usual) == 1 + 3 + (4 + 1) + 1
    assert slot_seconds(work, sent, 1, stream=True, hides=True) == 1 + (1 + 4 + 6) + 1, "the FFN in what is left idle"
    assert slot_seconds(work, Sent(early=3.0, waited=6.0), 1, **usual) == 1 + 3 + (4 + 6) + 1
    assert slot_seconds(work, Sent(early=5.0, waited=6.0), 1, **usual) == 1 + (5 - 1) + (4 + 6) + 1
    assert slot_seconds(work, sent, 2, stream=True, hides=False) == 9 + 7


def test_exchanges_and_data_parallelism_share_the_links() -> None:
    """Weights and gradients travel while the exchanges of the same links do not."""
    between = dataclasses.replace(IDEAL, inter_node_bandwidth=1.0, gpus_per_node=4)
    layout = Layout(world=16, bf16=True, memory_size=8, memory_mode="row", distributed_optimizer=True,
                    overlap_grad_reduce=True, overlap_param_gather=True, backend="triton")
    time = evaluate(MODEL, layout, between).time
    sent = exchange_bytes(MEMORY, "row", 8, TOKENS, 552**2, 2)
    state = state_bytes(MODEL.shape(1), MEMORY, layout, 0)
    found = traffic(MODEL.shape(1), MEMORY, layout, state)
    links = 16 * sum(between.seconds(count, 8, 1, all_to_all=name in ALL_TO_ALL["row"]) for name, count in sent.items())
    links += sum(between.seconds(count, ranks, stride) for count, ranks, stride in (
        (found.dense_gradients + found.dense_weights, 16, 1), (found.table_gradients + found.table_weights, 2, 8)))
    compute = MODEL.flops.training * TOKENS / 1e14
    assert time.step == pytest.approx(links, rel=0.01) and time.step > 2 * compute
    inside = evaluate(MODEL, dataclasses.replace(layout, memory_size=4), between).time
    assert inside.exchange < 0.01 * time.exchange, "inside a node they use other links"


def test_micro_batches_in_flight() -> None:
    layout = Layout(world=4, pp=4, micro_batches=8)
    assert [micro_batches_in_flight(layout, stage) for stage in range(4)] == [4, 3, 2, 1]
    assert micro_batches_in_flight(dataclasses.replace(layout, micro_batches=2), 0) == 2
    turns = dataclasses.replace(layout, chunks=2)
    assert [micro_batches_in_flight(turns, stage) for stage in range(4)] == [11, 9, 7, 5]


def test_buckets_by_hand() -> None:
    """mcore fills a buffer from the last parameter to the first; shards start at 64ths and end at 128ths."""
    sizes = [Parameter("first", 100, "embedding", ends_bucket=True), Parameter("second", 10, "ffn"),
             Parameter("third", 70, "ffn")]
    assert buckets_of(sizes, 2, False, None) == [Bucket(0, 180, ((0, 70), (70, 80), (80, 180)))]
    sharded = buckets_of(sizes, 2, True, None)
    assert sharded == [Bucket(0, 256, ((0, 70), (128, 138))), Bucket(256, 384, ((256, 356),))]
    assert [owned_elements(sharded, 2, replica) for replica in (0, 1)] == [70 + 64, 10 + 36]
    assert owned_elements(sharded, 2, None) == 128 + 64
    assert [len(bucket.parameters) for bucket in buckets_of(sizes, 1, False, 75)] == [2, 1]


@pytest.mark.slow
def test_search_finds_the_fastest_that_fits() -> None:
    """Every layout that the search leaves out is slower or too large."""
    start = Layout(world=8, bf16=True, distributed_optimizer=True)
    memory_bytes = 15 * 2**30
    found = search(MODEL, start, 16, Device(), memory_bytes)
    assert found.fitting and all(each.worst.all <= memory_bytes for each in found.fitting)
    steps = [each.time.step for each in found.fitting]
    assert steps == sorted(steps) and len(found.fitting) < found.legal
    roomy = search(MODEL, start, 16, Device(), 1e15)
    assert len(roomy.fitting) == roomy.legal == found.legal
    assert roomy.fitting[0].time.step <= steps[0]
    tried = [each.layout for each in roomy.fitting]
    assert {each.grads_in_fp32 for each in tried} == {True, False}
    assert {(each.pp, each.chunks) for each in tried} >= {(1, 1), (2, 1), (2, 2), (2, 8), (4, 4)}
    assert all(each.micro_batches % each.pp == 0 for each in tried if each.chunks > 1)
    nothing = search(MODEL, start, 16, Device(), 2**20)
    assert not nothing.fitting and nothing.smallest is not None
    assert nothing.smallest.worst.all == min(each.worst.all for each in roomy.fitting)


def test_only_unfused_attention_holds_probabilities() -> None:
    """Activations of attention that writes its scores grow with the square of the sequence, others do not."""
    fields = {**PRESET.model, "seq_length": 8192, "max_position_embeddings": 8192}
    longer = Model(fields, PRESET.memory_config())
    for engine, scores, least, most in ((True, False, 1.9, 2.1), (False, False, 1.9, 2.1), (False, True, 2.5, 4.0)):
        layout = Layout(bf16=True, engine=engine, holds_scores=scores)
        peaks = [evaluate(model, layout, Device()).worst.activations.peak for model in (MODEL, longer)]
        assert least < peaks[1] / peaks[0] < most
