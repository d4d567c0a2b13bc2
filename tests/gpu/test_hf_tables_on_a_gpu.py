"""The Hugging Face model on a CUDA device, with its value tables beside it, in pinned host memory, or in their files,
and in int8: the logits are those of the CPU.

Run by `make test-gpu`; skipped where there is no CUDA device. tests/unit/hf/test_hf_tables.py compares bits on a CPU.
"""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "unit" / "hf"))
from tiny_model import VARIANTS, tiny_model, tokens  # noqa: E402

from umv2_megatron.hf import UMv2ForCausalLM  # noqa: E402
from umv2_megatron.hf.tables_umv2 import PLACES  # noqa: E402

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")]


def logits_of(model: UMv2ForCausalLM, device: str) -> torch.Tensor:
    """Of a prompt and of three single tokens after it, on the CPU: [2, 43, vocabulary]."""
    batch, found, cache = tokens(2, 43).to(device), [], None
    for part in (batch[:, :40], *batch[:, 40:].split(1, dim=1)):
        output = model(part, past_key_values=cache, use_cache=True)
        found.append(output.logits.cpu())
        cache = output.past_key_values
    return torch.cat(found, dim=1)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("variant", ["plain", "chunks", "ring", "v1", "memory-plus"])
def test_logits_are_those_of_the_cpu(variant, place, tmp_path):
    tiny_model(**VARIANTS[variant]).save_pretrained(tmp_path)
    model = UMv2ForCausalLM.from_pretrained(tmp_path, memory_tables=place).eval().to("cuda")
    chunks = [
        chunk for table in model.value_tables().values() for kind in table.widths for chunk in getattr(table, kind)
    ]
    assert {chunk.device.type for chunk in chunks} == {"cuda" if place.startswith("device") else "cpu"}
    assert all(chunk.is_pinned() == place.startswith("cpu") for chunk in chunks)
    with torch.inference_mode():
        held = place if place.endswith("int8") else "device"
        expected = logits_of(UMv2ForCausalLM.from_pretrained(tmp_path, memory_tables=held).eval(), "cpu")
        found = logits_of(model, "cuda")
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
