"""Turn a corpus (JSONL, plain text, Parquet, or token ids of dolma) into the token files that --data-path reads.

    python tools/preprocess_data.py --input corpus.jsonl --output-prefix data/corpus \\
        --tokenizer-type SentencePieceTokenizer --tokenizer-model data/tokenizer.model --append-eod --workers 2

writes data/corpus_text_document.bin, .idx and .meta.json. On several hosts start it by mpirun -n N or srun -n N, with
the output on a disk that all of them share. The files do not depend on the number of ranks and workers. Work that was
interrupted is kept in PATH.parts, and the same command goes on with it.
"""

import argparse
import math
from pathlib import Path
from typing import NoReturn

from umv2_megatron.config.data_config import TOKENIZER_TYPES
from umv2_megatron.data.corpus import FORMATS, TEXT_SPLITS, TOKEN_DTYPES, CorpusOptions
from umv2_megatron.data.preprocessing import Job, preprocess
from umv2_megatron.data.tiktoken_files import NO_SETTINGS, TikTokenSettings
from umv2_megatron.training.tool_entry import run_tool


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    group = parser.add_argument_group("input")
    group.add_argument(
        "--input", action="append", nargs="+", required=True, metavar="FILE", help="files or globs; may be repeated"
    )
    group.add_argument(
        "--input-format",
        choices=FORMATS,
        default="auto",
        help="auto takes .jsonl, .ndjson and .json files for JSONL, .parquet files for Parquet, .npy files for token "
        "ids and all others for plain text (default: auto)",
    )
    group.add_argument(
        "--json-keys",
        nargs="+",
        default=["text"],
        metavar="KEY",
        help="keys or columns that hold the texts; data.text is the key text of the object under data (default: text)",
    )
    group.add_argument(
        "--filter",
        metavar="EXPRESSION",
        help="Parquet: read the rows for which this is true, such as 'language == \"en\" and score >= 0.5'",
    )
    group.add_argument(
        "--token-dtype",
        choices=TOKEN_DTYPES,
        default="auto",
        help="token ids: their type in files without a header; auto is uint16 for up to 65,536 ids (default: auto)",
    )
    group.add_argument(
        "--text-split",
        choices=TEXT_SPLITS,
        default="file",
        help="plain text: what becomes one document, the file, a line, or lines between blank ones (default: file)",
    )
    group.add_argument(
        "--max-line-mb", type=float, default=64, metavar="MB", help="longest line or document accepted (default: 64)"
    )
    group.add_argument(
        "--on-bad-line",
        choices=("fail", "quarantine"),
        default="fail",
        help="fail: stop at the first bad line, naming file and line, and write nothing; quarantine: leave bad lines "
        "out and list them in <output-prefix>_quarantine.jsonl (default: fail)",
    )
    group = parser.add_argument_group("tokenizer")
    group.add_argument("--tokenizer-type", required=True, choices=TOKENIZER_TYPES)
    group.add_argument(
        "--tokenizer-model",
        metavar="FILE",
        help="the .model file, tokenizer.json or its directory, or a vocabulary of tiktoken",
    )
    group.add_argument("--vocab-size", type=int, metavar="N", help="NullTokenizer: number of token ids")
    group.add_argument("--tiktoken-pattern", metavar="P", help="TikTokenizer: v1, v2 or a regular expression")
    group.add_argument("--tiktoken-num-special-tokens", type=int, metavar="N", help="TikTokenizer of a .json")
    group.add_argument("--tokenizer-special-tokens", nargs="+", metavar="TOKEN", help="TikTokenizer")
    group.add_argument(
        "--append-eod", action="store_true", help="end every document with the end-of-document token (recommended)"
    )
    group = parser.add_argument_group("output")
    group.add_argument(
        "--output-prefix", required=True, metavar="PATH", help="files are named PATH_<key>_document.bin and .idx"
    )
    group = parser.add_argument_group("run")
    group.add_argument("--workers", type=int, default=1, metavar="N", help="processes of each rank (default: 1)")
    group.add_argument(
        "--part-mb",
        type=float,
        metavar="MB",
        help="input that is done again when a process is killed (default: a 64th of the corpus, within 0.25 and 128)",
    )
    group.add_argument(
        "--rank-timeout",
        type=float,
        default=300,
        metavar="S",
        help="seconds without a sign of another rank after which a rank gives up (default: 300)",
    )
    group.add_argument(
        "--log-interval", type=int, default=1000, metavar="N", help="documents between progress lines (default: 1000)"
    )
    return parser


def _tiktoken(arguments: argparse.Namespace) -> TikTokenSettings:
    special = arguments.tokenizer_special_tokens
    settings = TikTokenSettings(
        arguments.tiktoken_pattern, arguments.tiktoken_num_special_tokens, None if special is None else tuple(special)
    )
    if settings != NO_SETTINGS and arguments.tokenizer_type != "TikTokenizer":
        raise ValueError(
            f"--tokenizer-type is {arguments.tokenizer_type}: --tiktoken-pattern, --tiktoken-num-special-tokens and "
            "--tokenizer-special-tokens are for TikTokenizer"
        )
    return settings


def main(arguments: argparse.Namespace) -> None:
    for flag, value in (
        ("--workers", arguments.workers),
        ("--log-interval", arguments.log_interval),
        ("--max-line-mb", arguments.max_line_mb),
        ("--part-mb", 1 if arguments.part_mb is None else arguments.part_mb),
        ("--rank-timeout", arguments.rank_timeout),
    ):
        if not 0 < value < math.inf:
            raise ValueError(f"{flag} is {value}: expected a number above 0")
    directory = Path(arguments.output_prefix).parent
    if not directory.is_dir():
        raise ValueError(f"--output-prefix {arguments.output_prefix}: create the directory {directory} first")
    job = Job(
        inputs=tuple(path for group in arguments.input for path in group),
        output_prefix=arguments.output_prefix,
        tokenizer_type=arguments.tokenizer_type,
        tokenizer_model=arguments.tokenizer_model,
        vocab_size=arguments.vocab_size,
        tiktoken=_tiktoken(arguments),
        json_keys=tuple(arguments.json_keys),
        append_eod=arguments.append_eod,
        workers=arguments.workers,
        on_bad_line=arguments.on_bad_line,
        log_interval=arguments.log_interval,
        corpus=CorpusOptions(
            arguments.input_format,
            arguments.text_split,
            int(arguments.max_line_mb * (1 << 20)),
            row_filter=arguments.filter,
        ),
        token_dtype=arguments.token_dtype,
        part_bytes=None if arguments.part_mb is None else max(1, int(arguments.part_mb * (1 << 20))),
        rank_timeout=arguments.rank_timeout,
    )
    done = preprocess(job)
    if done.rank:
        print(f"rank {done.rank}: {done.parts} parts, {done.seconds:.1f} s; rank 0 joins the parts of all ranks")
        return
    bad = f", {done.bad} bad lines in {arguments.output_prefix}_quarantine.jsonl" if done.bad else ""
    if done.files_left_out:
        bad += f", {done.files_left_out} files left out whole"
    if arguments.filter is not None:
        bad = f", {done.rows_left_out} rows left out by --filter" + bad
    text, rate = "", f"{done.tokens / 1e6 / done.seconds:.2f} M tokens/s"
    if done.text_bytes:  # none is known where token ids were read
        text = f"{done.text_bytes / 1e6:.2f} MB of text ({done.text_bytes / max(done.tokens, 1):.2f} bytes per token), "
        rate = f"{done.text_bytes / 1e6 / done.seconds:.2f} MB/s"
    print(
        f"wrote {', '.join(done.prefixes)}: {done.documents} documents, {done.tokens} tokens, {text}"
        f"{done.empty} empty texts left out{bad}, {done.seconds:.1f} s "
        f"({done.documents / done.seconds:.1f} documents/s, {rate})"
    )


def run() -> NoReturn:
    """The program."""
    run_tool(build_parser(), main)
