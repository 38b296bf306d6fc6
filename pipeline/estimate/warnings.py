"""What a reader of a plan must know besides its figures."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from pipeline.estimate.figures import BENCHMARK_COMMAND
from pipeline.estimate.plan import EXTRAPOLATED, Figure, Question
from transforms.core.recipe import DISTRIBUTION_ALIGNMENT, STAGES

HOURS_PER_WEEK = 168
MAX_LISTED_SHARDS = 1_000_000


def warnings_of(question: Question, figures: Mapping[str, Figure]) -> Iterator[str]:
    """One line for each warning about the plan with these figures."""
    settings = question.recipe.cross_modality
    if settings.digit and settings.digit.clip_prompts:
        yield "digit.clip_prompts sends fewer pairs to BLIP-2 than the plan assumes; how many is not known"
    priced = {known.region for name, known in question.known.items() if name.startswith("price/") and known.region}
    if priced and question.machines.region not in priced:
        yield (
            f"the prices are for {', '.join(sorted(priced))}, but the jobs run in {question.machines.region}; give "
            "that region's prices in a file for --figures"
        )
    extrapolated = [name.rpartition("/")[2] for name, figure in figures.items() if figure.kind == EXTRAPOLATED]
    if extrapolated:
        gpu = question.machines.accelerator
        device = gpu.type if gpu and settings.device == "cuda" else "core"
        models = "; ".join(dict.fromkeys(f"{getattr(settings, rule).model} on {device}" for rule in extrapolated))
        yield (
            f"extrapolated, never measured: {models}. To measure, run `{BENCHMARK_COMMAND}` on such a machine and pass "
            "its output with --measured"
        )
    shards = figures["shards"].value
    for stage in STAGES:
        hours, workers = figures[f"{stage}/hours"].value, figures[f"{stage}/workers"].value
        if hours > HOURS_PER_WEEK:
            yield (
                f"{stage}: {hours:,.0f} hours with max_workers {workers:,.0f} are longer than a week, so a weekly "
                "schedule would start before the run ends; raise max_workers (and the quotas)"
            )
        if question.machines.workers[stage].spot:
            yield f"{stage}: FlexRS may start a job up to six hours after its submission"
        if stage != DISTRIBUTION_ALIGNMENT and shards < workers:
            yield (
                f"{stage}: {shards:,.0f} shards keep at most that many workers busy, but max_workers is "
                f"{workers:,.0f}; the hours assume that all of them are busy"
            )
    if shards > MAX_LISTED_SHARDS:
        yield (
            f"{shards:,.0f} shards: one worker reads their listing before each stage starts; make shards of 10,000 "
            "samples"
        )
    if settings.flipped_clip.digit_rescue and not question.funnel:
        yield "flipped_clip.digit_rescue sends more pairs to the later models than the plan assumes; give --funnel"
