"""The tables of docs/flags.md, made from the options, which ``python -m umv2_megatron.config.flags_page`` writes."""

from __future__ import annotations

from pathlib import Path

import yaml

from umv2_megatron.config.flags import REFUSED
from umv2_megatron.config.noted_flags import FILES, NOTED
from umv2_megatron.config.option import Option
from umv2_megatron.config.option_checks import in_words
from umv2_megatron.config.option_table import option_table

MARK = "<!-- from here on written by python -m umv2_megatron.config.flags_page -->"


def tables() -> str:
    """Every option by section, then the flags of Megatron-LM that are refused, as Markdown."""
    lines: list[str] = []
    section = None
    for made in option_table().values():
        if made.section != section:
            section = made.section
            lines += ["", f"## {section[0].upper()}{section[1:]}", "", "| flag | default | meaning |", "|---|---|---|"]
        lines.append(f"| `--{made.flag}` | {_default(made)} | {_meaning(made)} |")
    lines += [
        "", "## Flags of Megatron-LM that are noted or translated", "",
        "They may stand on a command line, not in a --config file. A run prints a line for each.", "",
        "| flags | what they mean here |", "|---|---|",
    ]  # fmt: skip
    for flag, file in FILES.items():
        lines.append(f"| `--{flag}` | {file} |")
    for entry in yaml.safe_load(NOTED.read_text(encoding="utf-8")):
        flags = ", ".join(f"`--{flag}{' ' + entry['only'] if 'only' in entry else ''}`" for flag in entry["flags"])
        lines.append(f"| {flags} | {'`' + ' '.join(entry['means']) + '`' if 'means' in entry else entry['note']} |")
    lines += [
        "", "## Flags of Megatron-LM that are refused", "",
        "Each ends the program with its reason, which names the nearest thing that there is.", "",
        "| flags | reason |", "|---|---|",
    ]  # fmt: skip
    for entry in yaml.safe_load(REFUSED.read_text(encoding="utf-8")):
        flags = ", ".join(f"`--{flag}`" for flag in entry["flags"])
        lines.append(f"| {flags} | {' '.join(entry['reason'].split())} |")
    return "\n".join(lines).strip() + "\n"


def _default(made: Option) -> str:
    if made.switches:
        return "auto" if made.default is None else "on" if made.default else "off"
    return "none" if made.default is None else str(made.default)


def _meaning(made: Option) -> str:
    parts = [made.help.replace("|", "\\|")]
    if made.choices:
        parts.append("one of " + ", ".join(map(str, made.choices)))
    if made.limits:
        parts.append(made.range())
    if made.needs:
        parts.append("no effect, and refused, " + " or ".join(in_words(needed) for needed in made.needs))
    others = [flag for flag in made.flags or made.switches if flag != made.flag and flag != f"no-{made.flag}"]
    others = [flag for flag in others if flag.removeprefix("no-") not in others or not flag.startswith("no-")]
    if others:
        parts.append("also " + ", ".join(f"`--{flag}`" for flag in others))
    return "; ".join(parts)


def main() -> None:
    """Write the tables into docs/flags.md of the checkout that this file lies in."""
    page = Path(__file__).parents[2] / "docs" / "flags.md"
    above = page.read_text(encoding="utf-8").split(MARK)[0]
    page.write_text(f"{above}{MARK}\n\n{tables()}", encoding="utf-8")


if __name__ == "__main__":
    main()
