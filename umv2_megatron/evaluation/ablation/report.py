"""The report of an ablation: means, spreads and paired differences over seeds, as Markdown."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from umv2_megatron.evaluation.ablation.comparison import Results, mean_difference, seed_differences, task_results
from umv2_megatron.evaluation.ablation.paired import shown
from umv2_megatron.evaluation.ablation.plan import Plan
from umv2_megatron.evaluation.ablation.plots import plot_contexts, plot_differences, plot_facts, plot_losses
from umv2_megatron.evaluation.ablation.trend import trend_table
from umv2_megatron.evaluation.report import size_of


def write_report(plan: Plan, results: Results) -> Path:
    """Write ``report.md`` with ``losses.png`` (and ``differences.png`` with a baseline) into the plan's output.

    Of another baseline than the plan's, given by --baseline, it is ``report-RUN.md`` with ``differences-RUN.png``.
    It needs the results alone, not the data. Returns the report's path.
    Raises ``ValueError`` when no trial of that other baseline is finished.
    """
    suffix = ""
    if plan.other_baseline:
        suffix = f"-{plan.baseline}"
        if plan.baseline not in results:
            raise ValueError(
                f"--baseline is {plan.baseline}, of which no trial is finished in {plan.output}; expected one of "
                f"{', '.join(results)}"
            )
    plots = [plot_losses(plan, results)]
    if plan.baseline in results and len(results) > 1:
        plots.append(plot_differences(plan, results, f"differences{suffix}.png"))
    plots += plot_facts(plan, results)
    plots += plot_contexts(plan, results, "context_length", "contexts.png") + plot_contexts(
        plan, results, "items", "items.png"
    )
    alone = plan.baseline is not None and plan.baseline not in results
    done = sum(map(len, results.values()))
    counts = {r["tokens"] for group in results.values() for r in group}
    tokens = ("up to " if len(counts) > 1 else "") + f"{max(counts, default=0):,}"
    hours = sum(r["seconds"] for group in results.values() for r in group) / 3600
    beside = max((r.get("jobs", 1) for group in results.values() for r in group), default=1)
    lines = [
        f"# {plan.path.stem}",
        "",
        f"{done} of {len(plan.trials)} trials are done, {tokens} tokens each, {hours:.2f} hours in all (the last start "
        f"of a resumed trial counts alone{f', up to {beside} trials at a time' if beside > 1 else ''}), on "
        f"{_devices(results)}. Mean over seeds, in brackets lowest to highest. "
        "Differences: mean over the seeds that both runs have, ± half of its 95% confidence interval (Student's t). "
        "Loss: nats per token on the validation set. Bands of the plots: from the lowest seed to the highest."
        + (f" No trial of the baseline {plan.baseline} is finished: no differences." if alone else ""),
        "",
        *_main_table(plan, results),
        "",
        *trend_table(plan, results),
        *_task_tables(results, plan.baseline),
        *(f"![{plot.stem}]({plot.name})\n" for plot in plots),
        f"How it was made: `python tools/ablate.py {plan.path} --output {plan.output}"
        + (f" --baseline {plan.baseline}`." if suffix else "`."),
        "",
    ]
    report = plan.output / f"report{suffix}.md"
    report.write_text("\n".join(lines), encoding="utf-8")
    return report


def _devices(results: Results) -> str:
    """Where the trials were trained, and with which torch; of several devices, which runs on each.

    The same run differs between two kinds of CPU by more than rounding, so a reader has to know.
    """
    runs: dict[str, list[str]] = {}
    for label, group in results.items():
        for result in group:
            device = " and then ".join(result.get("devices") or ["a device that was not recorded"])
            runs.setdefault(device, []).append(label if len(group) == 1 else f"{label} seed {result['seed']}")
    versions = sorted({result["torch"] for group in results.values() for result in group if "torch" in result})
    told = "; ".join(f"{device} ({', '.join(labels)})" if len(runs) > 1 else device for device, labels in runs.items())
    return told + (f", torch {', '.join(versions)}" if versions else "")


def _bytes_per_token(plan: Plan, results: Results) -> float | None:
    """Of the one text that all runs of the plan are validated on; None where there are several."""
    blends = [trial.run.data.split_blends()[1] or trial.run.data.blend() for trial in plan.trials]
    if len({tuple(blend[0]) if blend is not None else () for blend in blends}) != 1:
        return None
    found = {result.get("bytes_per_token") for group in results.values() for result in group}
    return found.pop() if len(found) == 1 else None


def spread(values: Sequence[float], digits: int = 4) -> str:
    """ "mean (lowest to highest)", or the one value."""
    mean = f"{sum(values) / len(values):,.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):,.{digits}f} to {max(values):,.{digits}f})"


def _main_table(plan: Plan, results: Results) -> list[str]:
    bytes_per_token = _bytes_per_token(plan, results)
    head = ["run", "seeds", "activated", "total", "forward MFLOP/token", "validation loss"]
    if bytes_per_token:
        head.append("bits per byte")
    if plan.baseline in results:
        head += [f"minus {plan.baseline}", f"not above {plan.baseline} from iteration"]
    rows = [head + ["tokens/s"], ["---"] * (len(head) + 1)]
    for label, group in results.items():
        final = [result["curve"][-1][1] for result in group if result["curve"]]
        row = [
            label,
            str(len(group)),
            f"{group[0]['activated'] / 1e6:.2f}M",
            f"{group[0]['parameters'] / 1e6:.2f}M",
            f"{group[0]['flops'] / 1e6:.2f}",
            spread(final) if final else "-",
        ]
        if bytes_per_token:
            row.append(spread([loss / math.log(2) / bytes_per_token for loss in final]) if final else "-")
        if plan.baseline in results:
            row += _against(group, results[plan.baseline])
        speeds = [result["tokens_per_second"] for result in group if result["tokens_per_second"]]
        rows.append([*row, spread(speeds, 0) if speeds else "-"])
    return ["| " + " | ".join(row) + " |" for row in rows]


def _against(group: list[dict[str, Any]], baseline: list[dict[str, Any]]) -> list[str]:
    """The last difference of the mean curves, and the iteration from which on it is never above zero.

    The difference tells its iteration where that is not the last of every run, whose losses stand beside it. It is "-"
    where both diverged.
    """
    difference = mean_difference(group, baseline)
    if group is baseline or not difference:
        return ["-", "-"]
    behind = [iteration for iteration, value in difference if not value <= 0]  # nan included
    later = [iteration for iteration, _ in difference if not behind or iteration > behind[-1]]
    last, _ = difference[-1]
    ends = {result["curve"][-1][0] for result in [*group, *baseline] if result["curve"]}
    told = shown(seed_differences(group, baseline, last), 4)
    if told != "-" and ends != {last}:
        told += f" at iteration {last}"
    return [told, str(later[0]) if later else "never"]


def _task_tables(results: Results, baseline: str | None) -> list[str]:
    """Exact match and the answer's loss in every task, by form and size (context length, or times a fact was seen).

    Where there is more than one difficulty, by difficulty, too. With a ``baseline`` the differences from it follow.
    """
    lines = []
    several = len({task.get("difficulty") for _, _, task in task_results(results)} - {None}) > 1
    head = ["task", "form", "size", *(["difficulty"] if several else [])]
    for name, factor, digits, title in (
        ("exact_match", 100, 1, "Exact match in percent:"),
        ("answer_nats", 1, 3, "Loss of the right answer, in nats for the whole answer:"),
    ):
        # task, form, ... -> run -> seed -> score
        scores: dict[tuple[str, ...], dict[str, dict[int, float]]] = {}
        for label, seed, task in task_results(results):
            if task.get(name) is not None:
                difficulty = [str(task.get("difficulty") or "-")] if several else []
                place = scores.setdefault((task["task"], task["form"], size_of(task), *difficulty), {})
                place.setdefault(label, {})[seed] = factor * task[name]
        if not scores:
            continue
        labels = [label for label in results if any(label in by_label for by_label in scores.values())]
        rows = [[*head, *labels], ["---"] * (len(head) + len(labels))]
        for key, by_label in scores.items():
            told = [spread([*by_label[label].values()], digits) if label in by_label else "-" for label in labels]
            rows.append([*key, *told])
        lines += [title, "", *("| " + " | ".join(row) + " |" for row in rows), ""]
        others = [label for label in labels if label != baseline]
        if baseline in labels and others:
            rows = [[*head, *others], ["---"] * (len(head) + len(others))]
            for key, by_label in scores.items():
                rows.append([*key, *(shown(_paired(by_label, label, baseline), digits) for label in others)])
            lines += [f"The same minus that of {baseline}:", "", *("| " + " | ".join(row) + " |" for row in rows), ""]
    return lines


def _paired(by_label: dict[str, dict[int, float]], label: str, baseline: str) -> list[float]:
    other = by_label.get(baseline, {})
    return [score - other[seed] for seed, score in by_label.get(label, {}).items() if seed in other]
