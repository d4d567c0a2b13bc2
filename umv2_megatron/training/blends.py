"""The training blend over the starts of a run: what a checkpoint says of it, and what this start adds (phases.py)."""

from __future__ import annotations

import dataclasses
from typing import Any

from umv2_megatron.checkpoint import saved_config
from umv2_megatron.checkpoint.save_load import Candidate
from umv2_megatron.config.batch_rampup import BatchRampup
from umv2_megatron.config.run_config import RunConfig
from umv2_megatron.config.usage import UsageError
from umv2_megatron.data.phases import Corpus, Phase, current_corpora, saved_phases, with_new_blend
from umv2_megatron.observation.events import EventLog
from umv2_megatron.training.first_rank import on_rank_0
from umv2_megatron.training.initialize import Progress, print_rank_0
from umv2_megatron.training.resume import STREAMS, is_new_blend, recorded


@dataclasses.dataclass(frozen=True)
class BlendHistory:
    """The phases of the run's training blend, none with generated tokens; ``changed``: this start has begun the last
    one."""

    phases: list[Phase]
    changed: bool = False

    def as_json(self) -> list[dict[str, Any]]:
        """For config.json."""
        return [phase.as_json() for phase in self.phases]

    def tell(self, events: EventLog) -> None:
        """Print where the blend has changed, on rank 0; a change by this start is an event, too."""
        if len(self.phases) < 2:
            return
        before, now = self.phases[-2:]
        if not self.changed:
            print_rank_0(f" blend {len(self.phases)} of this run, since sample {now.from_sample}")
            return
        rows = _rows(before, now)
        print_rank_0("\n".join([f" new blend from sample {now.from_sample} on:", *(f"  {_line(row)}" for row in rows)]))
        events.tell("blend", from_sample=now.from_sample, corpora=rows)


def blend_history(
    run: RunConfig, identity: dict[str, Any], loaded: Candidate | None, progress: Progress, samples: int
) -> BlendHistory:
    """The history of the training blend with this start. A collective.

    identity: of the data that the run reads (``data_identity``). loaded: the checkpoint that the run goes on from,
    which stands at ``progress``. samples: of the whole run. Every rank raises ``UsageError`` where the blend of that
    checkpoint is another one, and no flag allows it, or where its corpora cannot be gone on in.
    """

    def find() -> BlendHistory:
        corpora = current_corpora(run.data, run.model.seq_length)
        anew = BlendHistory([Phase(0, samples, corpora, {})] if corpora else [])
        if loaded is None or not corpora:
            return anew
        config = saved_config.read_config(loaded.place.store, loaded.iteration)
        return _after(run, identity, config, corpora, progress, anew)

    return on_rank_0("finding the history of the blend", find)


def _after(
    run: RunConfig,
    identity: dict[str, Any],
    config: dict[str, Any],
    corpora: tuple[Corpus, ...],
    progress: Progress,
    anew: BlendHistory,
) -> BlendHistory:
    """``blend_history`` of a run that goes on from a checkpoint with this config.json."""
    data, training = config.get("data", {}), run.training
    same = not is_new_blend(data, identity)
    if not training.allow_new_blend:
        if not (same or training.allow_config_change):
            raise UsageError(
                f"the checkpoint of iteration {progress.iteration}, which was loaded in place of a newer one, is from "
                "before the change of the blend; give --allow-new-blend again"
            )
        before = recorded(data)
        if not same or any(name in before and before[name] != identity[name] for name in STREAMS):
            return anew  # --allow-config-change: at the run's place in the order of whatever the flags name
    planned = 0 if "training_blends" in data else _planned_samples(config, progress)
    phases = saved_phases(data, config["values"], planned, run.data, run.model.seq_length)
    if not same:
        samples = anew.phases[0].samples
        return BlendHistory(with_new_blend(phases, corpora, progress.consumed_samples, samples), changed=True)
    if len(phases) < 2:
        return anew
    return BlendHistory([*phases[:-1], dataclasses.replace(phases[-1], corpora=corpora)])  # files may have moved


def _planned_samples(config: dict[str, Any], progress: Progress) -> int:
    """For how many samples the training set was built of the run that left a checkpoint of an earlier version."""
    values = config["values"]
    batch = values.get("global_batch_size")
    if not batch:
        model_ranks = 1
        for key in ("tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size"):
            model_ranks *= values.get(key) or 1
        batch = values["micro_batch_size"] * config["world_size"] // model_ranks
    given = values.get("rampup_batch_size") or []
    rampup = BatchRampup(batch, *given) if len(given) == 3 and given[0] < batch else BatchRampup(batch, batch)
    if values.get("train_samples"):
        steps = rampup.steps_to(values["train_samples"], progress.consumed_samples)
    else:
        steps = max(0, values["train_iters"] - progress.iteration)
    return rampup.samples_after(steps, progress.consumed_samples)


# -- words -----------------------------------------------------------------------------------------------------------


def _rows(before: Phase, now: Phase) -> list[dict[str, Any]]:
    """Every corpus of either blend: ``prefix``, ``samples`` drawn so far, ``epochs`` these are (None: not known), and
    its ``share`` in the old and the new blend."""
    shares = [
        {corpus.fingerprint: share for corpus, share in zip(phase.corpora, phase.shares())} for phase in (before, now)
    ]
    corpora = {corpus.fingerprint: corpus for corpus in (*before.corpora, *now.corpora)}
    rows = []
    for known, corpus in corpora.items():
        samples, size = now.consumed.get(known, 0), corpus.samples_per_epoch
        epochs = round(samples / size, 3) if size else None
        share = [round(each.get(known, 0.0), 6) for each in shares]
        rows.append({"prefix": corpus.prefix, "samples": samples, "epochs": epochs, "share": share})
    return rows


def _line(row: dict[str, Any]) -> str:
    epochs = "" if row["epochs"] is None else f" ({row['epochs']:.2f} epochs)"
    old, new = (f"{100 * share:.2f}%" if share else "none" for share in row["share"])
    return f"{row['prefix']}: {row['samples']} samples used{epochs}, share {old} -> {new}"
