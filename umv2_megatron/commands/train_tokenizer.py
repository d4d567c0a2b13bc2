"""Train a SentencePiece tokenizer that keeps every text exactly as it is.

    python tools/train_tokenizer.py --input corpus.jsonl --vocab-size 4096 --output-prefix demo/tokenizer

writes demo/tokenizer.model and demo/tokenizer.vocab. Nothing is normalised, spaces are kept, line feeds and tabs have
tokens of their own, and characters outside of the vocabulary become bytes, so decoding an encoded text gives that text
back. </s> (id 2) ends documents.

The corpus is read once, as a stream. Training sees lines: --input-sentence-size of them, drawn uniformly from the whole
corpus (reservoir sampling), so memory does not grow with the corpus. The same input and flags give the same file.
"""

import argparse
import io
import itertools
import math
import os
import random
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NoReturn

from umv2_megatron.data.corpus import (
    FORMATS,
    TEXT_SPLITS,
    CorpusError,
    CorpusOptions,
    LeftOut,
    expand_inputs,
    texts_of,
)
from umv2_megatron.data.readers import check_files, read_chunks
from umv2_megatron.training.tool_entry import run_tool

# Longer lines are cut: a line is a unit of training, and one of megabytes would dominate it.
_LINE_CHARACTERS = 4096
# How sums are divided among threads changes their last bits, so the number is fixed rather than the machine's.
_THREADS = 4


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    group = parser.add_argument_group("input")
    group.add_argument(
        "--input", action="append", nargs="+", required=True, metavar="FILE", help="files or globs; may be repeated"
    )
    group.add_argument("--input-format", choices=FORMATS, default="auto", help="see preprocess_data.py (default: auto)")
    group.add_argument("--json-keys", nargs="+", default=["text"], metavar="KEY", help="keys that hold the texts")
    group.add_argument("--filter", metavar="EXPRESSION", help="Parquet: rows to read; see preprocess_data.py")
    group.add_argument("--text-split", choices=TEXT_SPLITS, default="line", help="plain text: what is read at a time")
    group.add_argument(
        "--on-bad-line", choices=("fail", "skip"), default="fail", help="stop at a bad line, or leave it out"
    )
    group.add_argument(
        "--input-sentence-size",
        type=int,
        default=500_000,
        metavar="N",
        help="lines to train on, drawn from the corpus; 0 takes all (default: 500000)",
    )
    group = parser.add_argument_group("vocabulary")
    group.add_argument("--vocab-size", type=int, required=True, metavar="N", help="number of tokens, 300 or more")
    group.add_argument(
        "--model-type", choices=("bpe", "unigram"), default="bpe", help="unigram takes much longer (default: bpe)"
    )
    group.add_argument(
        "--character-coverage",
        type=float,
        default=0.9995,
        metavar="SHARE",
        help="share of characters that get tokens of their own; the others are spelled in bytes (default: 0.9995)",
    )
    group.add_argument("--split-digits", action="store_true", help="make every digit a token")
    group = parser.add_argument_group("output")
    group.add_argument("--output-prefix", required=True, metavar="PATH", help="writes PATH.model and PATH.vocab")
    group.add_argument("--seed", type=int, default=1234, help="seed of the drawing of lines (default: 1234)")
    return parser


def corpus_lines(
    paths: Sequence[str], options: CorpusOptions, keys: Sequence[str], on_bad_line: str, skipped: list[str]
) -> Iterator[str]:
    """Non-empty lines of all texts, in order. Bad records raise ``CorpusError`` or are added to ``skipped``."""
    left_out = LeftOut(sys.stderr)
    for chunk in read_chunks(paths, options):
        bad: list[tuple[int, str]] = []
        kept = 0
        for record in chunk.records:
            try:
                texts = texts_of(record, chunk.is_json, keys)
            except ValueError as error:
                fault = f"{chunk.path}:{record.line}: {error}"
                if on_bad_line == "fail":
                    raise CorpusError(fault) from None
                skipped.append(fault)
                bad.append((record.line, str(error)))
                continue
            kept += any(texts)
            for line in itertools.chain.from_iterable(text.split("\n") for text in texts):
                for start in range(0, len(line), _LINE_CHARACTERS):
                    yield line[start : start + _LINE_CHARACTERS]
        left_out.add(chunk.path, kept, bad)
    left_out.finish()


def draw(lines: Iterator[str], count: int, seed: int) -> list[str]:
    """``count`` lines drawn uniformly (all of them for 0 or when there are fewer), in one pass and seeded order.

    Algorithm L (Li 1994): it jumps over the lines that it will not keep, so the cost per line is that of reading it.
    """
    if count == 0:
        return list(lines)
    kept = list(itertools.islice(lines, count))
    if len(kept) < count:
        return kept
    generator = random.Random(seed)
    weight = generator.random() ** (1 / count)
    while True:
        skip = int(math.log(generator.random()) / math.log1p(-weight))
        line = next(itertools.islice(lines, skip, None), None)
        if line is None:
            return kept
        kept[generator.randrange(count)] = line
        weight *= generator.random() ** (1 / count)


def train(lines: Sequence[str], arguments: argparse.Namespace) -> bytes:
    """The SentencePiece model of ``lines`` as the bytes of a ``.model`` file."""
    import sentencepiece

    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=model,
            vocab_size=arguments.vocab_size,
            model_type=arguments.model_type,
            character_coverage=arguments.character_coverage,
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            allow_whitespace_only_pieces=True,
            user_defined_symbols=["\n", "\t"],
            split_digits=arguments.split_digits,
            max_sentence_length=8 * _LINE_CHARACTERS,
            num_threads=_THREADS,
            minloglevel=2,
        )
    except RuntimeError as error:
        # The trainer's message starts with the place and the condition in its own source.
        reason = str(error).split("] ")[-1].strip().replace("_coverage option", "-coverage") or "the trainer refused"
        raise ValueError(f"--vocab-size {arguments.vocab_size} does not suit {len(lines)} lines: {reason}") from None
    return model.getvalue()


def publish(prefix: str, model: bytes) -> None:
    """Write PREFIX.vocab and then PREFIX.model, each at once."""
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    pieces = range(processor.vocab_size())
    vocabulary = "".join(f"{_printable(processor.id_to_piece(i))}\t{processor.get_score(i):g}\n" for i in pieces)
    for path, data in ((prefix + ".vocab", vocabulary.encode()), (prefix + ".model", model)):
        temporary = path + ".incomplete"
        try:
            with open(temporary, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            Path(temporary).unlink(missing_ok=True)


def _printable(piece: str) -> str:
    return piece.replace("\n", "\\n").replace("\t", "\\t")


def main(arguments: argparse.Namespace) -> None:
    if arguments.vocab_size < 300:
        raise ValueError(f"--vocab-size is {arguments.vocab_size}: expected 300 or more (bytes alone take 256)")
    if arguments.input_sentence_size < 0:
        raise ValueError(f"--input-sentence-size is {arguments.input_sentence_size}: expected 0 or more")
    if not 0 < arguments.character_coverage <= 1:
        raise ValueError(f"--character-coverage is {arguments.character_coverage}: expected a share above 0, up to 1")
    directory = Path(arguments.output_prefix).parent
    if not directory.is_dir():
        raise ValueError(f"--output-prefix {arguments.output_prefix}: create the directory {directory} first")
    started = time.monotonic()
    paths = expand_inputs([path for group in arguments.input for path in group], arguments.input_format)
    skipped: list[str] = []
    columns = tuple(arguments.json_keys)
    options = CorpusOptions(arguments.input_format, arguments.text_split, columns=columns, row_filter=arguments.filter)
    check_files(paths, options)
    lines = corpus_lines(paths, options, arguments.json_keys, arguments.on_bad_line, skipped)
    drawn = draw(lines, arguments.input_sentence_size, arguments.seed)
    if not drawn:
        raise CorpusError(f"{paths[0]}: no usable text in {len(paths)} file(s)")
    read = time.monotonic() - started
    publish(arguments.output_prefix, train(drawn, arguments))
    size = sum(len(line) for line in drawn) / 1e6
    left_out = f", {len(skipped)} bad lines left out (the first: {skipped[0]})" if skipped else ""
    print(
        f"wrote {arguments.output_prefix}.model: {arguments.vocab_size} tokens from {len(drawn)} lines "
        f"({size:.2f} M characters){left_out}; read in {read:.1f} s, "
        f"trained in {time.monotonic() - started - read:.1f} s"
    )


def run() -> NoReturn:
    """The program."""
    run_tool(build_parser(), main)
