"""One side of benchmarks/decode.py: a process that holds one model with random weights and decodes when told to.

    python benchmarks/decode_side.py '{"side": "olmoe", "preset": "umv2-227m-1.2b", "dtype": "float32", ...}'

One JSON object per line comes in on stdin, one goes out on stdout for each:

    {"do": "prepare", "batch": 8, "context": 128}   cache of random keys and values; OLMoE: takes its fastest experts
    {"do": "time", "steps": 5}                      milliseconds of each step ("cold": true: files not in the cache)
    {"do": "read_files"}                            the model's files come into the system's cache
    {"do": "count", "steps": 5}                     bytes of weights that a step touches, mean over the steps, and
                                                    of the cache
    {"do": "prefill", "tokens": 2048}               milliseconds of a prompt, and by how many bytes memory rose
    {"do": "peak"}                                  highest memory use since "prepare", bytes

A step is a forward of one new token per sequence, logits included, after ``context`` tokens in a ``StaticCache`` (which
is written in place; a ``DynamicCache`` would be copied in every step, the same on both sides). Steps get random tokens,
so the picks of each step are new ones.

Weights touched are counted, not estimated: all dense weights once (the output matrix included, of the input embedding
the rows of the step's tokens where it is a matrix of its own), and of the sparse ones the distinct experts, or the
distinct rows, that a hook has seen picked in the step. Of the cache, the keys and values of ``context`` tokens of each
sequence, which attention has to read, whoever computes it; not the room for more.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import resource
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.measure import timed  # noqa: E402
from umv2_megatron.config.presets import find_preset  # noqa: E402
from umv2_megatron.planning.model_shape import padded_vocab_size  # noqa: E402
from umv2_megatron.planning.parameters import count_parameters  # noqa: E402

NUM_EXPERTS, ACTIVE_EXPERTS = 64, 8
# Tensors with more elements than this repeat a random block: drawing 7 billion numbers would take minutes.
DRAWN_ELEMENTS = 1 << 24


class Side:
    """A model in evaluation mode with random weights, and what its steps touch."""

    def __init__(self, model: nn.Module, dtype: torch.dtype, device: str) -> None:
        self.model, self.dtype, self.device = model, dtype, device
        self.config: Any = model.config
        self.generator = torch.Generator().manual_seed(1)
        self.batch = self.context = 0
        self.cache: Any = None
        self.folder = ""
        """Where the tables' files lie, with tables in files."""
        self.touched: list[tuple[int, int]] = []
        """(distinct sparse items, bytes of one) of each sparse layer in the step under way."""

    # -- what differs between the sides

    def sparse_parameters(self) -> list[Tensor]:
        """The parameters of which a step touches a part."""
        raise NotImplementedError

    def watch(self) -> list[Any]:
        """Hooks that append to ``touched``; returned so that they can be removed."""
        raise NotImplementedError

    def choose(self) -> dict[str, float]:
        """Take the fastest way to compute; milliseconds of each that was tried."""
        return {}

    # -- commands

    @torch.inference_mode()
    def prepare(self, batch: int, context: int) -> dict[str, Any]:
        """A cache with ``context`` random tokens of ``batch`` sequences."""
        from transformers import StaticCache

        config = self.config
        self.batch, self.context = batch, context
        self.cache = StaticCache(config=config, max_cache_len=context + 1)
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        shape = (batch, config.num_key_value_heads, context, head_dim)
        for layer in range(config.num_hidden_layers):
            keys, values = (torch.randn(shape, dtype=self.dtype, device=self.device) for _ in range(2))
            self.cache.update(keys, values, layer)
        tried = self.choose()
        forget_peak()
        return {"tried_ms": tried, "chosen": min(tried, key=lambda name: tried[name]) if tried else None}

    @torch.inference_mode()
    def step(self, tokens: Tensor) -> Tensor:
        """Logits [b, 1, vocabulary] of ``tokens`` [b, 1] after the cached context."""
        for layer in self.cache.layers:
            layer.cumulative_length.fill_(self.context)
        return self.model(input_ids=tokens, past_key_values=self.cache, use_cache=True, logits_to_keep=1).logits

    def time(self, steps: int, cold: bool = False, clock: str = "wall") -> list[float]:
        """Milliseconds of each of ``steps`` steps; ``cold``: with the model's files dropped from the system's cache."""
        found = []
        for tokens in self.draw_tokens(steps):
            if cold:
                self.drop_file_cache()
            found.append(timed(partial(self.step, tokens), clock, self.device) * 1e3)
        return found

    @torch.inference_mode()
    def prefill(self, tokens: int, clock: str = "wall") -> dict[str, Any]:
        """Time of a forward over a prompt of random tokens with a cache that is filled, after a short one."""
        from transformers import DynamicCache

        def forward(count: int) -> Any:
            ids = torch.randint(0, self.config.vocab_size, (1, count), generator=self.generator).to(self.device)
            cache = DynamicCache(config=self.config)
            return self.model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)

        self.choose_for_prompts(forward)
        forward(64)
        forget_peak()
        before = peak_bytes(self.device)
        seconds = timed(partial(forward, tokens), clock, self.device)
        return {"ms": seconds * 1e3, "grown_bytes": peak_bytes(self.device) - before}

    def choose_for_prompts(self, forward: Callable[[int], Any]) -> None:
        """Take the fastest way to compute a prompt."""

    def drop_file_cache(self) -> None:
        """Unmap the pages of the tables (the system drops none that is mapped), then let it forget the files."""
        libc = ctypes.CDLL(None)
        for line in Path("/proc/self/maps").read_text().splitlines():
            span, rights, *_, name = line.split(maxsplit=5)
            if rights == "r--s" and name.startswith(self.folder):
                start, end = (int(each, 16) for each in span.split("-"))
                libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), 4)  # MADV_DONTNEED
        for path in Path(self.folder).glob("*.safetensors"):
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    def read_files(self) -> dict[str, Any]:
        """Read the model's files, so that all of them lie in the system's cache if they fit."""
        buffer = bytearray(2**24)
        for path in Path(self.folder).glob("*.safetensors"):
            with path.open("rb", buffering=0) as file:
                while file.readinto(buffer):
                    pass
        return {}

    def draw_tokens(self, steps: int) -> list[Tensor]:
        """Random tokens [b, 1] for each step."""
        drawn = torch.randint(0, self.config.vocab_size, (steps, self.batch, 1), generator=self.generator)
        return list(drawn.to(self.device))

    def count(self, steps: int) -> dict[str, float]:
        """Bytes of weights touched by a step, mean of ``steps``."""
        sparse = items = 0
        embedded = 0
        separate = not self.config.tie_word_embeddings
        hooks = self.watch()
        for tokens in self.draw_tokens(steps):
            self.touched.clear()
            self.step(tokens)
            sparse += sum(count * size for count, size in self.touched)
            items += sum(count for count, _ in self.touched)
            embedded += tokens.unique().numel() if separate else 0
        for hook in hooks:
            hook.remove()
        table = self.model.get_input_embeddings().weight
        dense = self.bytes_of_dense() + embedded / steps * table.shape[1] * table.element_size()
        return {"dense": dense, "sparse": sparse / steps, "items": items / steps, "cache": self.bytes_of_cache()}

    def bytes_of_cache(self) -> int:
        """Keys and values of the cached tokens."""
        cached = [part[:, :, : self.context] for layer in self.cache.layers for part in (layer.keys, layer.values)]
        return sum(part.numel() * part.element_size() for part in cached)

    def bytes_of_dense(self) -> int:
        """All weights that every step reads, without an input embedding that is a matrix of its own."""
        left_out = {id(parameter) for parameter in self.sparse_parameters()}
        if not self.config.tie_word_embeddings:
            left_out.add(id(self.model.get_input_embeddings().weight))
        return sum(p.numel() * p.element_size() for p in self.model.parameters() if id(p) not in left_out)

    def describe(self) -> dict[str, Any]:
        """Sizes of the model, parameters counted from the built model."""
        sparse = sum(p.numel() for p in self.sparse_parameters())
        everything = sum(p.numel() for p in self.model.parameters())
        embeddings = self.model.get_input_embeddings().weight.numel() * (1 if self.config.tie_word_embeddings else 2)
        activated = everything - sparse + self.activated_sparse()
        return {
            "parameters": everything,
            "total": everything - embeddings,
            "activated": activated - (0 if self.config.tie_word_embeddings else embeddings),
            "bytes": sum(p.numel() * p.element_size() for p in self.model.parameters()),
            "sparse_bytes": sum(p.numel() * p.element_size() for p in self.sparse_parameters()),
        }

    def activated_sparse(self) -> int:
        """Sparse parameters that one token uses."""
        raise NotImplementedError


class Experts(Side):
    """transformers' own OLMoE."""

    def sparse_parameters(self) -> list[Tensor]:
        return [p for layer in self.model.model.layers for p in layer.mlp.experts.parameters()]

    def activated_sparse(self) -> int:
        return sum(p.numel() for p in self.sparse_parameters()) * self.config.num_experts_per_tok // NUM_EXPERTS

    def watch(self) -> list[Any]:
        def router(layer: Any) -> Callable[..., None]:
            size = sum(p[0].numel() * p.element_size() for p in layer.mlp.experts.parameters())
            # the router returns logits, weights and the experts of each token [T, active experts]
            return lambda module, arguments, output: self.touched.append((output[2].unique().numel(), size))

        return [layer.mlp.gate.register_forward_hook(router(layer)) for layer in self.model.model.layers]

    def choose(self) -> dict[str, float]:
        tried = {}
        for name in ("eager", "batched_mm", "grouped_mm"):
            if name == "batched_mm" and self.batch * ACTIVE_EXPERTS > 2 * NUM_EXPERTS:
                continue  # it copies the experts of every token: gigabytes, and far slower
            self.model.set_experts_implementation(name)
            tried[name] = min(self.time(3))
        self.model.set_experts_implementation(min(tried, key=lambda name: tried[name]))
        return tried


    def choose_for_prompts(self, forward: Callable[[int], Any]) -> None:
        tried = {}
        for name in ("eager", "grouped_mm"):
            self.model.set_experts_implementation(name)
            forward(16)
            tried[name] = timed(partial(forward, 512))
        self.model.set_experts_implementation(min(tried, key=lambda name: tried[name]))


class Memory(Side):
    """UltraMemV2 of this repository."""

    def sparse_parameters(self) -> list[Tensor]:
        return [p for table in self._tables() for p in table.parameters()]

    def activated_sparse(self) -> int:
        config = self.config
        picks = config.memory_num_heads * config.memory_topk
        return sum(config.memory_layers) * picks * (config.memory_value_dim + config.memory_pre_value_dim)

    def watch(self) -> list[Any]:
        config = self.config
        size = (config.memory_value_dim + config.memory_pre_value_dim) * self.dtype.itemsize
        return [Announcements(table, self.touched, size) for table in self._tables()]

    def _tables(self) -> list[Any]:
        tables = [layer.memory.find_table() for layer in self.model.model.layers if layer.memory is not None]
        return list({id(table): table for table in tables}.values())


class Announcements:
    """A hook on a table: notes the distinct rows of each pick."""

    def __init__(self, table: Any, touched: list[tuple[int, int]], size: int) -> None:
        self._table, announce = table, table.announce

        def noting(rows: Tensor) -> Any:
            touched.append((rows.unique().numel(), size))
            return announce(rows)

        table.announce = noting

    def remove(self) -> None:
        """Take the hook off."""
        del self._table.announce


def umv2_config(preset_name: str) -> Any:
    """The configuration of a preset for transformers."""
    from umv2_megatron.hf import UMv2Config

    preset = find_preset(preset_name)
    shape = preset.model
    return UMv2Config(
        vocab_size=padded_vocab_size(shape["vocab_size"], shape["make_vocab_size_divisible_by"]),
        hidden_size=shape["hidden_size"],
        intermediate_size=shape["ffn_hidden_size"],
        num_hidden_layers=shape["num_layers"],
        num_attention_heads=shape["num_attention_heads"],
        num_key_value_heads=shape["num_query_groups"],
        max_position_embeddings=shape["max_position_embeddings"],
        qk_norm=shape["qk_layernorm"],
        tie_word_embeddings=not shape["untie_embeddings_and_output_weights"],
        **{f"memory_{name}": value for name, value in preset.memory.items()},
    )


def olmoe_config(preset_name: str) -> Any:
    """OLMoE with the depth, width, heads, vocabulary and total parameters of a preset: 64 experts, 8 active.

    The experts' inner size, a multiple of 16, is the one whose total comes nearest to the preset's.
    """
    from transformers import OlmoeConfig

    preset = find_preset(preset_name)
    shape = preset.model
    layers, hidden = shape["num_layers"], shape["hidden_size"]
    vocabulary = padded_vocab_size(shape["vocab_size"], shape["make_vocab_size_divisible_by"])
    total = count_parameters(preset.model, preset.memory_config()).total
    outside = layers * (4 * hidden**2 + 4 * hidden + NUM_EXPERTS * hidden) + hidden
    inner = round((total - outside) / (layers * NUM_EXPERTS * 3 * hidden) / 16) * 16
    return OlmoeConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=max(inner, 16),
        num_hidden_layers=layers,
        num_attention_heads=shape["num_attention_heads"],
        num_key_value_heads=shape["num_query_groups"],
        max_position_embeddings=shape["max_position_embeddings"],
        num_experts=NUM_EXPERTS,
        num_experts_per_tok=ACTIVE_EXPERTS,
        tie_word_embeddings=not shape["untie_embeddings_and_output_weights"],
        eos_token_id=None,
        pad_token_id=None,
    )


@torch.no_grad()
def fill(model: nn.Module) -> None:
    """Random weights: gains of norms 1, everything else with standard deviation 0.02."""
    generator = torch.Generator().manual_seed(0)
    block = torch.randn(DRAWN_ELEMENTS // 4, generator=generator) * 0.02
    seen = set()
    for name, parameter in model.named_parameters():
        if id(parameter) in seen:
            continue
        seen.add(id(parameter))
        if "norm" in name.split(".")[-1] or "norm" in name.split(".")[-2]:
            parameter.fill_(1.0)
        elif parameter.numel() <= DRAWN_ELEMENTS or parameter.is_cuda:
            parameter.normal_(0.0, 0.02)
        else:
            flat = parameter.view(-1)
            for start in range(0, flat.numel(), block.numel()):
                part = flat[start : start + block.numel()]
                part.copy_(block[: part.numel()])


def build(kind: type, config: Any, dtype: torch.dtype, device: str) -> Any:
    """``kind(config)`` in evaluation mode, without the time and memory of an initialisation that is thrown away."""
    config.dtype = dtype
    with torch.device("meta"):
        model = kind(config).to(dtype)
    model.to_empty(device=device)
    model.tie_weights()
    fill(model)
    return model.eval()


def build_olmoe(options: dict[str, Any]) -> Experts:
    """The peer; buffers (the rotary frequencies) are made anew, because ``to_empty`` leaves them unset."""
    from transformers import OlmoeForCausalLM
    from transformers.models.olmoe.modeling_olmoe import OlmoeRotaryEmbedding

    config = olmoe_config(options["preset"])
    dtype = getattr(torch, options["dtype"])
    model = build(OlmoeForCausalLM, config, dtype, options["device"])
    model.model.rotary_emb = OlmoeRotaryEmbedding(config).to(options["device"])
    return Experts(model, dtype, options["device"])


def build_umv2(options: dict[str, Any]) -> Memory:
    """Our side, with random weights, or loaded from ``options["load"]`` with tables mapped from the files there.

    ``options["save"]`` writes it there instead of decoding.
    """
    from umv2_megatron.hf import UMv2ForCausalLM
    from umv2_megatron.hf.attention_umv2 import UMv2RotaryEmbedding

    dtype, device = getattr(torch, options["dtype"]), options["device"]
    if "load" in options:
        model = UMv2ForCausalLM.from_pretrained(options["load"], memory_tables="mmap", dtype=dtype).eval()
        side = Memory(model, dtype, device)
        side.folder = options["load"]
        return side
    config = umv2_config(options["preset"])
    model = build(UMv2ForCausalLM, config, dtype, device)
    model.model.rotary_emb = UMv2RotaryEmbedding(config).to(device)
    for layer in model.model.layers:
        layer.memory.perm.copy_(torch.randperm(layer.memory.perm.numel()))
        layer.memory.retrieval.u.zero_()
        layer.memory.retrieval.t.zero_()
        layer.memory.retrieval.refresh_singular_vectors()
    if "save" in options:
        model.save_pretrained(options["save"])
        os.sync()  # the system cannot drop pages that are not yet on the disk
    return Memory(model, dtype, device)


SIDES: dict[str, Callable[[dict[str, Any]], Side]] = {"olmoe": build_olmoe, "umv2": build_umv2}


# -- the process --------------------------------------------------------------------------------------------------


def forget_peak() -> None:
    """Start the measurement of ``peak_bytes`` anew, where the system allows it."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_bytes(device: str) -> int:
    """Highest memory use since ``forget_peak``: allocated on the GPU, or resident in this process."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    if Path("/proc/self/status").exists():
        return status_bytes("VmHWM")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def status_bytes(name: str) -> int:
    """A figure of /proc/self/status: VmHWM (highest resident), RssAnon (resident now, without files), VmSize ..."""
    return int(Path("/proc/self/status").read_text().split(f"{name}:")[1].split()[0]) * 1024


def answer(side: Side, request: dict[str, Any]) -> dict[str, Any]:
    """Do what ``request`` asks for, see the top of this file."""
    work = request.pop("do")
    if work == "prepare":
        return side.prepare(**request)
    if work == "time":
        return {"ms": side.time(**request)}
    if work == "prefill":
        return side.prefill(**request)
    if work == "count":
        return side.count(**request)
    if work == "read_files":
        return side.read_files()
    assert work == "peak", work
    private = status_bytes("RssAnon") if Path("/proc/self/status").exists() else None
    return {"bytes": peak_bytes(side.device), "private_bytes": private}


def main() -> None:
    """Build, describe, serve."""
    options = json.loads(sys.argv[1])
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not come between the answers
    if options.get("threads"):
        torch.set_num_threads(options["threads"])
    side = SIDES[options["side"]](options)
    # After loading: transformers keeps its files mapped as private memory, of which only dense weights become resident.
    if options.get("limit_bytes"):
        resource.setrlimit(resource.RLIMIT_AS, (status_bytes("VmSize") + options["limit_bytes"],) * 2)
    print(json.dumps({**side.describe(), "loading_peak_bytes": peak_bytes(side.device)}), file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(answer(side, json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    main()
