"""A Hugging Face model directory as a ``ScoringModel``: any causal language model that transformers can load."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from umv2_megatron.data.tokenizers import Tokenizer, build_tokenizer
from umv2_megatron.evaluation.scoring_model import TokenScores, rows_at_once, scores_of_logits

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class HuggingFaceScoringModel:
    """Scores rows with a transformers model on one device.

    Args:
        model: ``AutoModelForCausalLM`` or alike; put into evaluation mode.
        tokenizer: one of ours, over the same ids.
        micro_batch_size: rows per forward pass.
        first_token: that documents begin with; None: the tokenizer's end-of-document token.
    """

    def __init__(
        self, model: Any, tokenizer: Tokenizer, micro_batch_size: int = 8, first_token: int | None = None
    ) -> None:
        self.tokenizer = tokenizer
        config = model.config
        self.context: int = getattr(config, "max_position_embeddings", None) or 1024
        self.longest_context: int | None = longest_context(config)
        self.first_token: int = tokenizer.eod if first_token is None else first_token
        self._model = model.eval()
        self._micro_batch_size = micro_batch_size
        self._columns: int = config.vocab_size

    @torch.no_grad()
    def logprobs(self, tokens: torch.Tensor) -> TokenScores:
        """See ``ScoringModel``."""
        device = next(self._model.parameters()).device
        parts = []
        for rows in tokens.split(rows_at_once(self._micro_batch_size, tokens.shape[1], self._columns)):
            rows = rows.to(device)
            logits = self._model(input_ids=rows[:, :-1], use_cache=False).logits
            parts.append(scores_of_logits(logits, rows[:, 1:], self.tokenizer.num_tokens))
        likelihood, best = (torch.cat(part).cpu() for part in zip(*parts))
        return TokenScores(likelihood, best)


def longest_context(config: Any) -> int | None:
    """Tokens beyond which a model of the transformers ``config`` cannot read; None where nothing is known to stop it.

    Tables of positions have as many names as models (``wpe``, ``embed_positions``, buffers of sines, ...), and to read
    beyond one ends the program, on a GPU without a message. So every model but ours ends at its
    ``max_position_embeddings`` unless it rotates by position, which works at any.
    """
    if config.model_type == "umv2":
        limited = config.position_embedding_type == "learned_absolute"
    else:
        # rope_parameters in transformers 5, rope_theta and rope_scaling before
        limited = not any(value for name, value in config.to_dict().items() if name.startswith("rope"))
    return getattr(config, "max_position_embeddings", None) if limited else None


def load_hugging_face(
    directory: str,
    *,
    tokenizer_type: str | None = None,
    tokenizer_model: str | None = None,
    vocab_size: int | None = None,
    trust_remote_code: bool = False,
    dtype: str = "float32",
    micro_batch_size: int = 8,
    memory_tables: str | None = None,
) -> HuggingFaceScoringModel:
    """Load a local model directory and its tokenizer; nothing is downloaded.

    ``tokenizer_type`` (with ``tokenizer_model``, ``vocab_size``) replaces the tokenizer found in the directory.
    ``memory_tables`` is where the value tables of an export of ours stay, one of ``PLACES``.
    Exports of ours are loaded by the classes of this package, never by the copy of their code that they bring.
    Raises ``ValueError`` naming the flag for a directory without a model, for another model that brings code of its
    own without ``trust_remote_code``, and where no tokenizer is found.
    """
    path = Path(directory)
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
        kind = config.get("model_type")
    except (OSError, ValueError, AttributeError):
        raise ValueError(f"--hf-model is {directory!r}; expected a directory with a config.json in it") from None

    from umv2_megatron.hf import UMv2Config  # our classes are known from here on

    if "auto_map" in config and kind != UMv2Config.model_type and not trust_remote_code:
        raise ValueError(
            f"--hf-model is {directory!r}; it brings Python code of its own; give --trust-remote-code to run it"
        )
    if memory_tables is not None and kind != UMv2Config.model_type:
        raise ValueError(f"--memory-tables is {memory_tables}; leave it out: {directory} is of model_type {kind}")
    tokenizer = _tokenizer(path, tokenizer_type, tokenizer_model, vocab_size)

    options = {} if memory_tables is None else {"memory_tables": memory_tables}
    model = load_whole_model(
        directory,
        "--hf-model",
        dtype=DTYPES[dtype],
        trust_remote_code=trust_remote_code,
        local_files_only=True,
        **options,
    )
    if torch.cuda.is_available():
        model = model.cuda()  # without the tables that have another place
    rows = model.get_output_embeddings().weight.shape[0]
    if tokenizer.num_tokens > rows:
        raise ValueError(
            f"--hf-model is {directory!r}; its model has {rows} tokens, fewer than the {tokenizer.num_tokens} of the "
            "tokenizer; give the tokenizer that it was trained with by --tokenizer-type and --tokenizer-model"
        )
    # Many models have a token of their own before a document; with another tokenizer its id means nothing.
    begins = getattr(model.config, "bos_token_id", None) if tokenizer_type is None else None
    return HuggingFaceScoringModel(model, tokenizer, micro_batch_size, begins)


def load_whole_model(directory: str, flag: str, **options: Any) -> Any:
    """``AutoModelForCausalLM.from_pretrained``, which gives random weights to tensors that it does not find: here
    ``ValueError`` naming ``flag`` and the tensor, also for files that cannot be read or do not fit config.json."""
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    try:
        model, report = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True, **options)
    except SafetensorError as error:
        raise ValueError(f"{flag} is {directory!r}; its weights cannot be read: {error}") from error
    except RuntimeError as error:
        if "ignore_mismatched_sizes" not in str(error):
            raise
        raise ValueError(
            f"{flag} is {directory!r}; its weights have other shapes than its config.json says: export it again"
        ) from error
    missing = sorted(report["missing_keys"])
    if missing:
        raise ValueError(f"{flag} is {directory!r}; its files lack {missing[0]}, so the model is not whole")
    return model


def _tokenizer(path: Path, kind: str | None, model: str | None, vocab_size: int | None) -> Tokenizer:
    if kind is not None:
        return build_tokenizer(kind, model, vocab_size)
    if (path / "tokenizer.json").is_file():
        return build_tokenizer("HuggingFaceTokenizer", str(path))
    if (path / "tokenizer.model").is_file():
        return build_tokenizer("SentencePieceTokenizer", str(path / "tokenizer.model"))
    raise ValueError(f"--hf-model is {str(path)!r}; it holds no tokenizer; give --tokenizer-type")
