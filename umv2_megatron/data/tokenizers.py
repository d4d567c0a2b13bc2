"""Text to token ids and back, behind one small interface for the tools, the datasets and generation.

Megatron's names choose the kind. The classes are our own, each a thin layer over the library that does the work,
because those of megatron.core.tokenizers (0.16.1) do not serve here: their byte-level tokenizer puts the
end-of-document token on byte 0, reports 256 ids and strips trailing white space when decoding; the SentencePiece one
has no end-of-document id; the Hugging Face one cannot open a bare tokenizer.json; all identify themselves by path, so
a changed tokenizer behind the same path goes unnoticed; and importing them brings in torch, which every worker
process of the preprocessing would have to load.

None of these classes has a ``pad`` id: mcore's datasets then use -1, which never occurs in a corpus.
"""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Optional

from umv2_megatron.config.data_config import TOKENIZER_TYPES
from umv2_megatron.data.tiktoken_files import NO_SETTINGS, TikTokenSettings, read_vocabulary

# Names under which well-known tokenizers carry their end-of-document token, tried in this order when a tokenizer
# does not say which one it is.
_EOD_NAMES = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<eod>", "<EOD>")


class Tokenizer:
    """What the rest of the package needs from a tokenizer.

    Attributes: ``vocab_size`` (ids lie below it; --vocab-size may make it larger than needed), ``num_tokens`` (ids that
    the tokenizer itself has), ``eod`` (id of the end-of-document token), ``sha256`` (of the definition, so that two
    tokenizers with the same hash give the same ids).
    """

    def __init__(self, vocab_size: int, eod: int, sha256: str) -> None:
        self.vocab_size = vocab_size
        self.num_tokens = vocab_size
        self.eod = eod
        self.sha256 = sha256

    def tokenize(self, text: str) -> list[int]:
        """Token ids of ``text``, without an end-of-document token.

        Raises ``ValueError`` for a text that the tokenizer cannot encode: lone surrogates, words it does not know.
        """
        raise NotImplementedError

    def detokenize(self, ids: Iterable[int]) -> str:
        """The text of ``ids``; the end-of-document token has no text."""
        raise NotImplementedError

    def id_of(self, token: str) -> Optional[int]:
        """The id of a token of the vocabulary, special ones too; otherwise that of which ``token`` is the number. None
        where there is none."""
        found = self._id_of(token)
        if found is None and token.isdecimal() and int(token) < self.vocab_size:
            found = int(token)
        return found

    def _id_of(self, token: str) -> Optional[int]:
        return None

    @property
    def unique_identifiers(self) -> OrderedDict[str, Any]:
        """What mcore's datasets hash into the names of their cached indices."""
        return OrderedDict(
            {"class": type(self).__name__, "sha256": self.sha256, "vocab_size": self.vocab_size, "eod": self.eod}
        )

    def __repr__(self) -> str:
        return f"{type(self).__name__}(vocab_size={self.vocab_size}, eod={self.eod}, sha256={self.sha256[:12]})"


def id_of_flag(flag: str, token: str, tokenizer: Tokenizer) -> int:
    """The id of ``token``, a token or a number. Raises ``ValueError`` naming ``flag`` where there is none."""
    number = tokenizer.id_of(token)
    if number is None:
        raise ValueError(
            f"{flag} is {token!r}: the tokenizer has no such token; expected one of its tokens, or a number below "
            f"{tokenizer.vocab_size} (--vocab-size can make room)"
        )
    return number


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece ``.model`` file."""

    # SentencePiece writes a space as this character, and so reads the character itself as a space.
    _SPACE = "\u2581"

    def __init__(self, path: str) -> None:
        import sentencepiece

        data = _read_file("SentencePieceTokenizer", path)
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=data)
        except RuntimeError:
            raise ValueError(f"--tokenizer-model {path} is not a SentencePiece model: expected a .model file") from None
        eod = self._processor.eos_id()
        if eod < 0:
            unknown = self._processor.unk_id()
            ids = [self._processor.piece_to_id(name) for name in _EOD_NAMES]
            eod = next((i for i in ids if i != unknown), -1)
        if eod < 0:
            raise ValueError(f"--tokenizer-model {path} has no end-of-document token: train it with an eos_id")
        super().__init__(self._processor.vocab_size(), eod, hashlib.sha256(data).hexdigest())
        self._space_ids = self._ids_of_space_character()

    def _ids_of_space_character(self) -> Optional[list[int]]:
        """Byte pieces that spell U+2581, or None when the model lacks them or does not keep spaces as they are."""
        ids = [self._processor.piece_to_id(f"<0x{byte:02X}>") for byte in self._SPACE.encode()]
        adds_space = self._processor.encode("a", out_type=str)[0].startswith(self._SPACE)
        keeps_spaces = not adds_space and self._processor.decode(self._processor.encode("  a ")) == "  a "
        return ids if keeps_spaces and all(self._processor.is_byte(i) for i in ids) else None

    def tokenize(self, text: str) -> list[int]:
        if self._space_ids is None or self._SPACE not in text:
            return self._encode(text)
        ids: list[int] = []
        for i, part in enumerate(text.split(self._SPACE)):
            ids += (self._space_ids if i else []) + self._encode(part)
        return ids

    def _encode(self, text: str) -> list[int]:
        try:
            return self._processor.encode(text)
        except RuntimeError as error:
            raise ValueError(f"the tokenizer cannot encode this text: {error}") from error

    def detokenize(self, ids: Iterable[int]) -> str:
        return self._processor.decode([int(i) for i in ids])

    def _id_of(self, token: str) -> Optional[int]:
        found = self._processor.piece_to_id(token)
        return found if self._processor.id_to_piece(found) == token else None


class HuggingFaceTokenizer(Tokenizer):
    """A ``tokenizer.json`` file, or a local directory that holds one. Nothing is downloaded and no code is run."""

    def __init__(self, path: str) -> None:
        import tokenizers

        given = Path(path)
        file = given / "tokenizer.json" if given.is_dir() else given
        if given.is_dir() and not file.is_file():
            raise ValueError(
                f"--tokenizer-model {path} holds no tokenizer.json: save the tokenizer in that form, or use "
                "--tokenizer-type SentencePieceTokenizer with its .model file"
            )
        data = _read_file("HuggingFaceTokenizer", str(file))
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(data.decode("utf-8"))
        except Exception as error:  # the library raises plain Exception for any fault in the file
            raise ValueError(f"--tokenizer-model {file} is not a Hugging Face tokenizer.json: {error}") from None
        # A file may ask for truncation, which would silently drop the ends of documents.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        # The text "<|endoftext|>" inside a document is text, not the end of the document.
        self._tokenizer.encode_special_tokens = True
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        eod = self._find_eod(file, vocabulary)
        digest = hashlib.sha256(data + f"\neod={eod}".encode()).hexdigest()
        super().__init__(max(vocabulary.values()) + 1, eod, digest)

    @staticmethod
    def _find_eod(file: Path, vocabulary: dict) -> int:
        """The id of ``eos_token`` in the files beside tokenizer.json, else of the first well-known name."""
        names: list[str] = []
        for companion in ("tokenizer_config.json", "special_tokens_map.json"):
            try:
                token = json.loads((file.parent / companion).read_text(encoding="utf-8")).get("eos_token")
            except (OSError, ValueError, AttributeError):
                continue
            token = token.get("content") if isinstance(token, dict) else token
            if isinstance(token, str):
                names.append(token)
        for name in [*names, *_EOD_NAMES]:
            if name in vocabulary:
                return vocabulary[name]
        raise ValueError(
            f"--tokenizer-model {file} has no end-of-document token: name it as eos_token in a tokenizer_config.json "
            "beside it"
        )

    def tokenize(self, text: str) -> list[int]:
        try:
            return self._tokenizer.encode(text, add_special_tokens=False).ids
        except Exception as error:  # the library raises plain Exception, for an unknown word for one
            raise ValueError(f"the tokenizer cannot encode this text: {error}") from error

    def detokenize(self, ids: Iterable[int]) -> str:
        kept = [i for i in map(int, ids) if i != self.eod]
        return self._tokenizer.decode(kept, skip_special_tokens=False)

    def _id_of(self, token: str) -> Optional[int]:
        return self._tokenizer.token_to_id(token)


class TikTokenizer(Tokenizer):
    """A vocabulary of tiktoken: Megatron-LM's ``.json`` or a ``.tiktoken`` file (``tiktoken_files.py``).

    ``vocabulary``: its bytes, special tokens and pattern.
    """

    def __init__(self, path: str, settings: TikTokenSettings, vocab_size: Optional[int] = None) -> None:
        try:
            import tiktoken
        except ImportError:
            raise ValueError(
                "--tokenizer-type TikTokenizer needs the module tiktoken, which is not installed: pip install -r "
                "requirements-inputs.txt, or umv2_megatron[inputs]"
            ) from None
        data = _read_file("TikTokenizer", path)
        found = self.vocabulary = read_vocabulary(path, data, settings, vocab_size)
        eod = next((found.special[name] for name in _EOD_NAMES if name in found.special), None)
        if eod is None:
            raise ValueError(
                f"--tokenizer-model {path} has no end-of-document token: name one by --tokenizer-special-tokens, such "
                "as '<|endoftext|>'"
            )
        try:
            self._encoding = tiktoken.Encoding(
                "vocabulary", pat_str=found.pattern, mergeable_ranks=found.ranks, special_tokens=found.special
            )
        except ValueError as error:
            raise ValueError(f"--tiktoken-pattern is no regular expression that tiktoken reads: {error}") from None
        self._known = {*found.ranks.values(), *found.special.values()}
        super().__init__(max(self._known) + 1, eod, found.sha256)

    def tokenize(self, text: str) -> list[int]:
        try:
            return self._encoding.encode_ordinary(text)
        except BaseException as error:
            # what Rust raises where its regular expressions run out of stack is no Exception
            if type(error).__name__ != "PanicException":
                raise
            raise ValueError("the tokenizer cannot encode this text: a word in it is too long for tiktoken") from None

    def detokenize(self, ids: Iterable[int]) -> str:
        kept = [i for i in map(int, ids) if i != self.eod and i in self._known]
        return self._encoding.decode(kept, errors="replace")

    def _id_of(self, token: str) -> Optional[int]:
        return self.vocabulary.special.get(token, self.vocabulary.ranks.get(token.encode()))


class ByteLevelTokenizer(Tokenizer):
    """UTF-8 bytes: ids 0 to 255 are the bytes, 256 is the end-of-document token."""

    def __init__(self) -> None:
        super().__init__(257, 256, hashlib.sha256(b"UTF-8 bytes, 256 = end of document").hexdigest())

    def tokenize(self, text: str) -> list[int]:
        return list(text.encode("utf-8"))

    def detokenize(self, ids: Iterable[int]) -> str:
        return bytes(i for i in map(int, ids) if i < 256).decode("utf-8", errors="replace")


class NullTokenizer(Tokenizer):
    """Numbers separated by white space, for --mock-data and for corpora that are token ids already.

    Ids below ``vocab_size`` are the numbers and ``vocab_size`` itself is the end-of-document token, as in
    Megatron-LM, so the vocabulary has one entry more.
    """

    def __init__(self, vocab_size: int) -> None:
        super().__init__(vocab_size + 1, vocab_size, hashlib.sha256(f"numbers below {vocab_size}".encode()).hexdigest())

    def tokenize(self, text: str) -> list[int]:
        try:
            return [int(word) for word in text.split()]
        except ValueError:
            raise ValueError("NullTokenizer reads numbers separated by white space, and this is other text") from None

    def detokenize(self, ids: Iterable[int]) -> str:
        return " ".join(str(i) for i in map(int, ids) if i != self.eod)


def build_tokenizer(
    tokenizer_type: str,
    tokenizer_model: Optional[str] = None,
    vocab_size: Optional[int] = None,
    tiktoken: TikTokenSettings = NO_SETTINGS,
) -> Tokenizer:
    """The tokenizer of --tokenizer-type, --tokenizer-model and --vocab-size, and of the flags of a TikTokenizer.

    Raises ``ValueError`` with one sentence that names the flag for an unknown type, a missing or broken file, and a
    vocabulary size below the tokenizer's own.
    """
    if tokenizer_type not in TOKENIZER_TYPES:
        raise ValueError(f"--tokenizer-type is {tokenizer_type!r}: expected one of {', '.join(TOKENIZER_TYPES)}")
    if tokenizer_type == "NullTokenizer":
        if vocab_size is None or vocab_size < 1:
            raise ValueError(f"--vocab-size is {vocab_size}: NullTokenizer needs a number of token ids above 0")
        return NullTokenizer(vocab_size)
    tokenizer: Tokenizer
    if tokenizer_type == "ByteLevelTokenizer":
        tokenizer = ByteLevelTokenizer()
    elif tokenizer_model is None:
        raise ValueError(f"--tokenizer-model is missing: {tokenizer_type} needs the file it loads")
    elif tokenizer_type == "TikTokenizer":
        tokenizer = TikTokenizer(tokenizer_model, tiktoken, vocab_size)
    elif tokenizer_type == "SentencePieceTokenizer":
        tokenizer = SentencePieceTokenizer(tokenizer_model)
    else:
        tokenizer = HuggingFaceTokenizer(tokenizer_model)
    if vocab_size is not None and vocab_size < tokenizer.vocab_size:
        raise ValueError(
            f"--vocab-size is {vocab_size}: the tokenizer has {tokenizer.vocab_size} ids; raise it or leave it out"
        )
    tokenizer.vocab_size = vocab_size or tokenizer.vocab_size
    return tokenizer


def tokenizer_of(values: Mapping[str, Any], tokenizer_model: Optional[str] = None) -> Tokenizer:
    """The tokenizer of a run's settings by key, or of a checkpoint's; ``tokenizer_model`` replaces its path."""
    special = values.get("tokenizer_special_tokens")
    settings = TikTokenSettings(
        values.get("tiktoken_pattern"),
        values.get("tiktoken_num_special_tokens"),
        None if special is None else tuple(special),
    )
    model = tokenizer_model or values["tokenizer_model"]
    return build_tokenizer(values["tokenizer_type"], model, values["vocab_size"], settings)


def _read_file(tokenizer_type: str, path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise ValueError(
            f"--tokenizer-model {path} cannot be read ({error.strerror}): {tokenizer_type} needs an existing file"
        ) from None
