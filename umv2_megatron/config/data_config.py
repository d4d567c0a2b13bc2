"""What a run reads: corpora, how they are split and blended, and the tokenizer that made them.

Every field is also a flag of the same name (``data_path`` is ``--data-path``), named as in Megatron-LM. Paths of
corpora are written without extension: ``p_text_document`` stands for ``p_text_document.bin`` and ``.idx``.
"""

from __future__ import annotations

import json
import math
import os
import re
from dataclasses import dataclass
from typing import Any, Optional

from umv2_megatron.config.option import option

TOKENIZER_TYPES = (
    "SentencePieceTokenizer", "HuggingFaceTokenizer", "TikTokenizer", "ByteLevelTokenizer", "NullTokenizer"
)  # fmt: skip
PLAIN_TOKENIZER_TYPES = tuple(kind for kind in TOKENIZER_TYPES if kind != "TikTokenizer")
"""Those that no further flags belong to, for tools that have none."""

# name=path; a path of that form is meant with ./ before it
_SET = re.compile(r"(?P<name>[A-Za-z0-9][A-Za-z0-9_.-]*)=(?P<rest>.*)", re.DOTALL)

DATA_ORDERS = ("shuffled", "sequential")

# The prefixes of a blend and, when the user gave them, their weights.
Blend = tuple[list[str], Optional[list[float]]]


@dataclass
class DataConfig:
    """Where the training, validation and test tokens come from.

    Errors are raised by ``validate`` as ``ValueError`` with one sentence that names the flag.
    """

    data_path: Optional[list[str]] = option(
        None,
        "corpora to split into train, validation and test by --split: one path without extension, several paths "
        "(drawn in proportion to their tokens), or 'weight path weight path ...'",
        read_by="config/data_config.py: what is read",
    )
    train_data_path: Optional[list[str]] = option(
        None, "corpora of the training set, in the form of --data-path", read_by="config/data_config.py: what is read"
    )
    valid_data_path: Optional[list[str]] = option(
        None,
        "corpora of the validation set, in the form of --data-path, or of several: 'name=path name=path', each path in "
        "that form",
        read_by="config/data_config.py: what is read",
    )
    test_data_path: Optional[list[str]] = option(
        None,
        "corpora of the test set or of several, in the form of --valid-data-path",
        read_by="config/data_config.py: what is read",
    )
    split: str = option(
        "969,30,1",
        "shares of the documents of --data-path that become train, validation and test, in this order",
    )
    data_order: str = option(
        DATA_ORDERS[0],
        "order of training documents: shuffled anew in each epoch, or sequential, as they lie in their corpus, for a "
        "curriculum or to read a prepared order again",
        choices=DATA_ORDERS,
    )
    data_cache_path: Optional[str] = option(
        None,
        "directory of the sample indices (default: '<first path>.cache' beside the corpus)",
        read_by="data/datasets.py: where indices lie",
    )
    mock_data: bool = option(
        False, "train on generated tokens instead of a corpus", read_by="data/datasets.py: where samples come from"
    )
    num_workers: int = option(
        2,
        "processes per rank that load samples; 0 loads them in the training process",
        at_least=0,
        read_by="training/pretrain.py: who loads samples",
    )
    num_dataset_builder_threads: int = option(
        1,
        "threads per rank that build the sample indices of a blend",
        at_least=1,
        read_by="data/datasets.py: who builds indices",
    )
    tokenizer_type: Optional[str] = option(
        None, "kind of tokenizer", choices=TOKENIZER_TYPES, read_by="data/tokenizers.py: who makes tokens"
    )
    tokenizer_model: Optional[str] = option(
        None,
        "SentencePieceTokenizer: the .model file; HuggingFaceTokenizer: a tokenizer.json file or the local directory "
        "that holds it; TikTokenizer: Megatron's .json or a .tiktoken file",
        read_by="data/tokenizers.py: who makes tokens",
    )
    vocab_size: Optional[int] = option(
        None,
        "NullTokenizer: number of token ids before the end-of-document token; other tokenizers: the size of a larger "
        "vocabulary to report (default: the tokenizer's own); a TikTokenizer of a .json is cut to it",
        at_least=1,
    )
    tiktoken_pattern: Optional[str] = option(
        None,
        "TikTokenizer: how texts are cut into words, v1, v2 or a regular expression (default: v2 for a .json)",
        needs=("tokenizer_type=TikTokenizer",),
        read_by="data/tokenizers.py: who makes tokens",
    )
    tiktoken_num_special_tokens: Optional[int] = option(
        None,
        "TikTokenizer of a .json: first ids that are special tokens (default: 1000)",
        at_least=0,
        needs=("tokenizer_type=TikTokenizer",),
        read_by="data/tokenizers.py: who makes tokens",
    )
    tokenizer_special_tokens: Optional[list[str]] = option(
        None,
        "TikTokenizer: special tokens; of a .json the first ids (default: Megatron's seven), of a .tiktoken file those "
        "after its ranks, or NAME=ID",
        needs=("tokenizer_type=TikTokenizer",),
        read_by="data/tokenizers.py: who makes tokens",
    )
    eod_mask_loss: bool = option(False, "leave the loss of positions that hold an end-of-document token out")
    loss_start_token: Optional[str] = option(
        None,
        "count the loss of what follows this token only, up to the next --loss-stop-token or the document's end: a "
        "token of the tokenizer, or its number",
    )
    loss_stop_token: Optional[str] = option(
        None,
        "the last token that counts behind --loss-start-token: a token of the tokenizer, or its number",
        needs=("loss_start_token",),
    )
    loss_mask_key: Optional[str] = option(
        None,
        "count the loss of the tokens that another corpus marks: beside P_text_document lies P_KEY_document, which "
        "has a 1 in the place of each token that counts",
    )
    reset_position_ids: bool = option(
        False,
        "count positions from 0 after each end-of-document token; with rotary positions --reset-attention-mask does so "
        "already, and without it this flag is refused",
        needs=(),  # config/checks.py says more
    )
    reset_attention_mask: bool = option(
        False,
        "keep documents apart: attention looks at no token before the last end-of-document token, and rotary positions "
        "count from 0 after it",
    )
    create_attention_mask_in_dataloader: bool = option(
        False,
        "let the data loader build attention masks [s, s]; without it none exist, and --reset-attention-mask packs "
        "documents instead",
        read_by="data/datasets.py: whether masks are made",
    )

    fim_rate: float = option(
        0.0,
        "share of the documents of a training sample that are rearranged to teach filling in the middle",
        at_least=0,
        at_most=1,
    )
    fim_spm_rate: float = option(
        0.5,
        "share of the rearranged documents whose suffix comes before the prefix (SPM); the others are PSM",
        at_least=0,
        at_most=1,
        needs=("fim_rate>0",),
    )
    fim_prefix_token: Optional[str] = option(
        None, "token before the prefix: a token of the tokenizer, or its number", needs=("fim_rate>0",)
    )
    fim_middle_token: Optional[str] = option(
        None, "token before the middle: a token of the tokenizer, or its number", needs=("fim_rate>0",)
    )
    fim_suffix_token: Optional[str] = option(
        None, "token before the suffix: a token of the tokenizer, or its number", needs=("fim_rate>0",)
    )

    @property
    def packs_documents(self) -> bool:
        """Whether the samples of a micro-batch are one row of documents, each attended to alone (``documents.py``)."""
        return self.reset_attention_mask and not self.create_attention_mask_in_dataloader

    @property
    def has_split_paths(self) -> bool:
        """Whether train, validation and test come from corpora of their own."""
        return any(paths is not None for paths in self.split_paths)

    @property
    def split_paths(self) -> tuple[Optional[list[str]], Optional[list[str]], Optional[list[str]]]:
        """The values of --train-data-path, --valid-data-path and --test-data-path."""
        return self.train_data_path, self.valid_data_path, self.test_data_path

    def blend(self) -> Optional[Blend]:
        """The corpora of --data-path, or None without it."""
        return None if self.data_path is None else parse_blend("--data-path", self.data_path)

    def split_blends(self) -> list[Optional[Blend]]:
        """The corpora of train, validation and test when each has its own flag; those of named sets one after the
        other, without weights."""
        train = self.train_data_path
        blends = [None if train is None else parse_blend("--train-data-path", train)]
        for split in ("validation", "test"):
            sets = self.set_blends(split)
            together = [prefix for prefixes, _ in sets.values() for prefix in prefixes], None
            blends.append(sets.get(None, together if sets else None))
        return blends

    def named_sets(self, split: str) -> dict[str, list[str]]:
        """The named sets of ``split``, "validation" or "test": name -> words in the form of --data-path. None of them
        where the flag has one set without a name, or is not given."""
        flag, words = self._of_split(split)
        return {name: group for name, group in parse_sets(flag, words or []).items() if name is not None}

    def set_blends(self, split: str) -> dict[Optional[str], Blend]:
        """The sets of ``split``, "validation" or "test", by name (None: the one without); empty without its flag."""
        flag, words = self._of_split(split)
        if words is None:
            return {}
        return {name: parse_blend(flag, group) for name, group in parse_sets(flag, words).items()}

    def _of_split(self, split: str) -> tuple[str, Optional[list[str]]]:
        paths = {"validation": self.valid_data_path, "test": self.test_data_path}
        return f"--{'valid' if split == 'validation' else split}-data-path", paths[split]

    def split_shares(self) -> list[float]:
        """Train, validation and test shares of --split, summing to 1."""
        return parse_split(self.split)

    def validate(self) -> None:
        """Raise ``ValueError`` naming the flag when the options contradict each other; opens no file."""
        sources = {
            "--data-path": self.data_path is not None,
            "--train-data-path, --valid-data-path or --test-data-path": self.has_split_paths,
            "--mock-data": self.mock_data,
        }
        given = [flag for flag, present in sources.items() if present]
        if not given:
            raise ValueError("no data is given: pass --data-path, --train-data-path or --mock-data")
        if len(given) > 1:
            raise ValueError(f"{given[0]} and {given[1]} exclude each other: keep one of them")
        if self.has_split_paths and self.train_data_path is None:
            raise ValueError("--train-data-path is missing: it is needed beside --valid-data-path or --test-data-path")
        self.blend(), self.split_blends(), self.split_shares()
        if self.mock_data and self.loss_start_token is not None:
            raise ValueError(
                f"--loss-start-token is {self.loss_start_token!r}: leave it out with --mock-data, which has no answers"
            )
        if self.loss_mask_key is not None:
            self._validate_loss_mask(self.loss_mask_key)
        if self.mock_data and self.data_order != DATA_ORDERS[0]:
            raise ValueError(
                f"--data-order is {self.data_order!r}: leave it out with --mock-data, which has no documents"
            )
        self._validate_infilling()
        self._validate_tokenizer()
        if self.num_workers < 0:
            raise ValueError(f"--num-workers is {self.num_workers}: expected 0 or more")
        if self.num_dataset_builder_threads < 1:
            raise ValueError(f"--num-dataset-builder-threads is {self.num_dataset_builder_threads}: expected 1 or more")

    def _validate_loss_mask(self, key: str) -> None:
        flag = f"--loss-mask-key is {key!r}"
        if not key.strip() or "/" in key:
            raise ValueError(f"{flag}: expected a key of --json-keys of preprocess_data.py, such as loss")
        if self.mock_data:
            raise ValueError(f"{flag}: leave it out with --mock-data, which has no corpus")
        if self.loss_start_token is not None:
            raise ValueError(f"{flag} and --loss-start-token is {self.loss_start_token!r}: keep one of them")
        if self.fim_rate:
            raise ValueError(f"{flag}: leave it out with --fim-rate, which moves tokens away from their marks")

    def _validate_infilling(self) -> None:
        if not self.fim_rate:
            return
        if self.mock_data:
            raise ValueError(f"--fim-rate is {self.fim_rate:g}: expected 0 with --mock-data, which has no documents")
        for part, token in (
            ("prefix", self.fim_prefix_token), ("middle", self.fim_middle_token), ("suffix", self.fim_suffix_token)
        ):  # fmt: skip
            if token is None:
                raise ValueError(f"--fim-{part}-token is missing: --fim-rate {self.fim_rate:g} needs it")

    def _validate_tokenizer(self) -> None:
        if self.tokenizer_type is None:
            raise ValueError(f"--tokenizer-type is missing: expected one of {', '.join(TOKENIZER_TYPES)}")
        if self.tokenizer_type not in TOKENIZER_TYPES:
            raise ValueError(
                f"--tokenizer-type is {self.tokenizer_type!r}: expected one of {', '.join(TOKENIZER_TYPES)}"
            )
        if self.tokenizer_type in TOKENIZER_TYPES[:3] and self.tokenizer_model is None:
            raise ValueError(f"--tokenizer-model is missing: {self.tokenizer_type} needs the file it loads")
        if self.tokenizer_type == "NullTokenizer" and self.vocab_size is None:
            raise ValueError("--vocab-size is missing: NullTokenizer needs the number of token ids")
        if self.vocab_size is not None and self.vocab_size < 1:
            raise ValueError(f"--vocab-size is {self.vocab_size}: expected 1 or more")


def parse_blend(flag: str, values: list[str]) -> Blend:
    """Read ``path``, ``path path ...`` or ``weight path weight path ...`` into prefixes and weights.

    Weights are None when none are given. Raises ``ValueError`` naming ``flag`` for an empty list, a weight without a
    path, a mixture of the forms, and a weight that is not a positive number.
    """
    values = [value.strip() for value in values]
    if not values or "" in values:
        raise ValueError(f"{flag} is empty: expected 'path' or 'weight path weight path ...'")
    numeric = [_as_number(value) is not None for value in values]
    if not any(numeric):
        return values, None
    if len(values) % 2 or not all(numeric[0::2]) or any(numeric[1::2]):
        raise ValueError(f"{flag} is '{' '.join(values)}': expected 'path' or 'weight path weight path ...'")
    weights = [float(value) for value in values[0::2]]
    for weight in weights:
        if not (weight > 0 and math.isfinite(weight)):
            raise ValueError(f"{flag} has the weight {weight:g}: expected a number above 0")
    if not math.isfinite(sum(weights)):
        raise ValueError(f"{flag} has the weights {', '.join(values[0::2])}: expected numbers with a finite sum")
    return values[1::2], weights


def parse_sets(flag: str, values: list[str]) -> dict[Optional[str], list[str]]:
    """Read ``name=path name=path ...`` into the words of each set by name; None is the name of a list without names.

    A word with a name begins a set, which goes on to the next one: ``web=0.7 a 0.3 b code=c``. Raises ``ValueError``
    naming ``flag`` for a name that comes twice, and for words before the first name.
    """
    found: dict[Optional[str], list[str]] = {}
    name: Optional[str] = None
    for value in values:
        named = _SET.fullmatch(value.strip())
        if named is not None:
            name = named["name"]
            if name in found:
                raise ValueError(f"{flag} has two sets named {name}: give each a name of its own")
            value = named["rest"]
        found.setdefault(name, []).append(value)
    if None in found and len(found) > 1:
        raise ValueError(f"{flag} is '{' '.join(values)}': expected a name before the first path too, 'name=path'")
    return found


def parse_split(split: str) -> list[float]:
    """Read ``"969,30,1"`` into the three shares of train, validation and test, which sum to 1."""
    shares = [_as_number(part) for part in split.split(",")]
    numbers = [share for share in shares if share is not None and share >= 0]
    if len(numbers) != len(shares) or len(numbers) > 3 or not 0 < sum(numbers) < math.inf:
        raise ValueError(f"--split is {split!r}: expected up to three numbers, such as '969,30,1'")
    numbers += [0.0] * (3 - len(numbers))
    return [share / sum(numbers) for share in numbers]


def marks_prefix(prefix: str, key: str) -> str:
    """The corpus of the marks of ``prefix`` by --loss-mask-key, named as preprocess_data.py names it by its JSON key.

    Its .meta.json says which key a corpus is of. One without, or whose name says otherwise, is of the key behind the
    last ``_`` of P_key: the marks of P_my_text_document are P_my_KEY_document. Whether they are there is not looked at,
    and no other name is tried: P_KEY_document may hold the marks of P_text_document, another corpus.
    Raises ``ValueError`` naming the flag for a corpus whose name has no key, or this one.
    """
    stem = prefix.removesuffix("_document")
    folder, name = os.path.split(stem)
    own = (read_sidecar(prefix) or {}).get("json_key")
    if not (isinstance(own, str) and own and name.endswith(f"_{own}")):
        own = name.rpartition("_")[2]
    if stem == prefix or not own or own == name:
        raise ValueError(
            f"--loss-mask-key {key}: the corpus {prefix} has no key in its name; expected a name like P_text_document, "
            f"with P_{key}_document beside it"
        )
    if own == key:
        raise ValueError(
            f"--loss-mask-key {key}: {prefix} is the corpus of that key itself; give the key of its marks, such as loss"
        )
    return os.path.join(folder, f"{name.removesuffix(own)}{key}_document")


def read_sidecar(prefix: str) -> Optional[dict[str, Any]]:
    """The JSON object in the ``.meta.json`` of a corpus, its entries unchecked; None without a file that holds one."""
    try:
        with open(f"{prefix}.meta.json", encoding="utf-8") as file:
            found = json.load(file)
    except (OSError, ValueError, RecursionError):  # the last one: of lists in lists, thousands deep
        return None
    return found if isinstance(found, dict) else None


def _as_number(value: str) -> Optional[float]:
    try:
        return float(value)
    except ValueError:
        return None
