"""Computes the plan of a run on Dataflow: machines, hours, cost, shuffle and storage of each stage.

Pure: input figures go in, a plan comes out. The arithmetic is on quantities, which carry unit, formula and sources, so
that every figure of the plan is either an input with its source or a formula over other figures.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from pipeline.dataflow.settings import GPUS, vcpus_of
from pipeline.estimate import formulas
from pipeline.estimate.plan import (
    COMPUTED,
    EXTRAPOLATED,
    CannotEstimate,
    Figure,
    FigureKind,
    Plan,
    Question,
)
from pipeline.estimate.quantity import Quantity, apply, total
from pipeline.estimate.units import UnitError
from pipeline.estimate.warnings import warnings_of
from transforms.core.catalogue import rules_of_stage
from transforms.core.recipe import CROSS_MODALITY, DISTRIBUTION_ALIGNMENT, SINGLE_MODALITY, STAGES

FP16 = Quantity.constant(2, "bytes/value")


def estimate(question: Question) -> Plan:
    """The plan. Raises CannotEstimate if a figure is missing or has a wrong unit."""
    try:
        return _Planner(question).plan()
    except UnitError as error:
        raise CannotEstimate(f"{error}; check the units in the file for --figures") from error


class _Planner:
    def __init__(self, question: Question) -> None:
        self.asked, self.recipe, self.machines = question, question.recipe, question.machines
        self.figures: dict[str, Figure] = {}

    # Figures: each method adds one to the plan and returns it as a quantity.

    def known(self, name: str, missing: str | None = None) -> Quantity:
        """An input figure by its name. Raises CannotEstimate with the message `missing` if there is none."""
        figure = self.asked.known.get(name)
        if figure is None:
            raise CannotEstimate(
                missing or f"{name}: no such figure; add it to a file for --figures (docs/dataflow.md, Cost)"
            )
        source = ", ".join(part for part in (figure.source, figure.region, figure.date) if part)
        return self.given(name, figure.value, figure.unit, source, figure.kind)

    def given(self, name: str, value: float, unit: str, source: str, kind: FigureKind = "given") -> Quantity:
        self.figures[name] = Figure(float(value), unit, kind, source)
        return Quantity.named(name, value, unit)

    def computed(self, name: str, quantity: Quantity, unit: str, kind: FigureKind = COMPUTED) -> Quantity:
        converted = quantity.to(unit)
        self.figures[name] = Figure(converted.value, unit, kind, converted.formula, converted.sources)
        return Quantity.named(name, converted.value, unit)

    def __getitem__(self, name: str) -> Quantity:
        """A figure that is in the plan already."""
        return Quantity.named(name, self.figures[name].value, self.figures[name].unit)

    # The plan

    def plan(self) -> Plan:
        asked = self.asked
        self.samples = self.given("samples", asked.samples, "samples", "--samples")
        per_shard = self.given("samples_per_shard", asked.samples_per_shard, "samples", "--samples-per-shard")
        self.shards = self.computed("shards", apply(math.ceil, self.samples / per_shard), "shards")
        if asked.bytes_per_sample is None:
            sample_bytes = self.known("bytes/pool")
        else:
            sample_bytes = self.given("bytes/pool", asked.bytes_per_sample, "bytes/sample", "--bytes-per-sample")
        self.computed("pool/storage", self.samples * sample_bytes, "GiB")
        self._funnel()
        for stage in STAGES:
            self._machine(stage)
        self._single_modality()
        self._cross_modality()
        self._distribution_alignment()
        self._totals()
        machines = {stage: self._machine_name(stage) for stage in STAGES}
        return Plan(self.figures, machines, tuple(warnings_of(asked, self.figures)))

    def _funnel(self) -> None:
        """The pairs that each model scores, and the candidates of stage 3."""
        left = self.samples * self._share(SINGLE_MODALITY)
        self.scored = self.computed("scored", left + self.samples * self._scored_duplicates(), "pairs")
        for rule in (rule.name for rule in rules_of_stage(CROSS_MODALITY)):
            if getattr(self.recipe.cross_modality, rule) is not None:
                left = self.computed(f"kept by {rule}", left * self._share(rule), "pairs")
        self.candidates = self.computed("candidates", left, "samples")

    def _share(self, rule: str) -> Quantity:
        """The share of its input that stage 1, or a rule of stage 2, keeps."""
        name, unit = f"share/{rule}", "of its input"
        settings = getattr(self.recipe.cross_modality, rule, None)
        if settings is not None and settings.keep_fraction is not None:
            return self.given(name, settings.keep_fraction, unit, "recipe: keep_fraction")
        if self.asked.funnel:
            path, funnel = self.asked.funnel
            return self.given(name, _kept_share(funnel, rule, path), unit, path, "measured")
        return self.known(name)

    def _scored_duplicates(self) -> Quantity:
        """The share of the pool that stage 2 scores only because another member of its group may fall."""
        name = "share/scored_duplicates"
        if not self.asked.funnel:
            return self.known(name)
        path, funnel = self.asked.funnel
        share = funnel.get("scored_duplicates", 0) / max(1, funnel.get("in", 0))
        return self.given(name, share, "of its input", path, "measured")

    # Machines

    def _gpu(self, stage: str) -> str | None:
        """Dataflow's name of the GPU that workers of this stage use."""
        gpu = self.machines.accelerator
        return gpu.type if gpu and stage == CROSS_MODALITY and self.recipe.cross_modality.device == "cuda" else None

    def _machine_name(self, stage: str) -> str:
        workers, gpu = self.machines.workers[stage], self._gpu(stage)
        return workers.machine_type + (f" + {gpu}" if gpu else "") + (" (FlexRS)" if workers.spot else "")

    def _machine(self, stage: str) -> None:
        """The resources of one worker, and its price per hour."""
        workers, gpu, source = self.machines.workers[stage], self._gpu(stage), f"{self.machines.source}: {stage}"
        if stage == CROSS_MODALITY and self.recipe.cross_modality.device == "cuda" and not gpu:
            raise CannotEstimate("the recipe has device: cuda, but the launch settings have no `accelerator`")
        machine_type = workers.machine_type
        self.given(f"{stage}/workers", workers.max_workers, "workers", f"{source}.max_workers")
        vcpus = self.given(f"{stage}/vcpus", vcpus_of(machine_type), "vCPUs/worker", f"{source}.machine_type")
        disk = self.given(f"{stage}/disk", workers.disk_gb, "GB/worker", f"{source}.disk_gb")
        gib = formulas.custom_memory_gib(machine_type)
        if gib is None:
            family = formulas.memory_family(machine_type)
            missing = f"{machine_type}: unknown memory; give `{family}` (GiB/vCPU) in a file for --figures"
            memory = self.computed(f"{stage}/memory", self.known(family, missing) * vcpus, "GiB/worker")
        else:
            memory = self.given(f"{stage}/memory", gib, "GiB/worker", f"{source}.machine_type")
        flexrs = "flexrs_" if workers.spot else ""
        price = (
            vcpus * self.known(f"price/{flexrs}vcpu_hour")
            + memory * self.known(f"price/{flexrs}memory_gib_hour")
            + disk * self.known("price/disk_gb_hour")
        )
        if gpu:
            price += self.known(f"price/{gpu}_hour")
        self.computed(f"{stage}/worker_hour", price, "USD/h")

    def _hours_and_cost(self, stage: str, hours_alone: Quantity | None = None) -> None:
        """The hours with all workers busy, and the cost. `hours_alone` are hours in which one worker runs alone."""
        worker_hours, price = self[f"{stage}/worker_hours"], self[f"{stage}/worker_hour"]
        hours, cost = worker_hours / self[f"{stage}/workers"], worker_hours * price
        if hours_alone:
            hours, cost = hours + hours_alone, cost + hours_alone * price
        self.computed(f"{stage}/hours", hours, "h")
        workers_cost = self.computed(f"{stage}/cost/workers", cost, "USD")
        shuffle_cost = self.computed(
            f"{stage}/cost/shuffle",
            self[f"{stage}/shuffle"] * self.known("shuffle_passes") * self.known("price/shuffle_gib"),
            "USD",
        )
        self.computed(f"{stage}/cost", workers_cost + shuffle_cost, "USD")

    # Stage 1

    def _single_modality(self) -> None:
        stage = SINGLE_MODALITY
        seconds = self.known("cpu/single_modality") + self.known("cpu/pool_wide")
        core_hours = self.computed(f"{stage}/core_hours", self.samples * seconds, "core h")
        self.computed(f"{stage}/worker_hours", core_hours / self[f"{stage}/vcpus"], "worker h")
        shuffles = [self.known(name) for name in self.asked.known if name.startswith(f"shuffle/{stage}/")]
        self.computed(f"{stage}/shuffle", total(self.samples * row_bytes for row_bytes in shuffles), "GiB")
        tables = [self.known("bytes/single_modality"), self.known("bytes/pool_wide")]
        self.computed(f"{stage}/storage", total(self.samples * row_bytes for row_bytes in tables), "GiB")
        self._hours_and_cost(stage)

    # Stage 2

    def _cross_modality(self) -> None:
        stage, on_gpu = CROSS_MODALITY, self._gpu(CROSS_MODALITY) is not None
        model_hours = total(
            self.computed(f"{stage}/model_hours/{rule}", pairs / self._rate(rule), "GPU h" if on_gpu else "core h")
            for rule, pairs in self._scored_by_model()
        )
        core_hours = self.computed(f"{stage}/core_hours", self.scored * self.known("cpu/cross_modality"), "core h")
        vcpus = self[f"{stage}/vcpus"]
        # A GPU works while the vCPUs prepare the next pairs; on a CPU the models and the preparation take turns.
        worker_hours = apply(max, model_hours, core_hours / vcpus) if on_gpu else (model_hours + core_hours) / vcpus
        self.computed(f"{stage}/worker_hours", worker_hours, "worker h")
        self.given(f"{stage}/shuffle", 0, "GiB", "stage 2 shuffles names of shards only, no samples", "counted")
        row_bytes = self.known("bytes/cross_modality") + FP16 * self._dimensions()
        self.computed(f"{stage}/storage", self.scored * row_bytes, "GiB")
        self._hours_and_cost(stage)

    def _scored_by_model(self) -> Iterator[tuple[str, Quantity]]:
        """Each model's rule and the pairs that it scores: those above every floor that is known beforehand, as in
        `transforms.models.cascade`."""
        models, pairs = self.recipe.cross_modality, self.scored
        yield "flipped_clip", pairs
        if models.flipped_clip.cascade_min_cosine is not None:
            pairs = self.computed("reach later models", pairs * self["share/flipped_clip"], "pairs")
        if models.image_text_matching:
            yield "image_text_matching", pairs
            if models.image_text_matching.min is not None:
                pairs = self.computed("reach digit", pairs * self["share/image_text_matching"], "pairs")
        if models.digit:
            yield "digit", pairs

    def _rate(self, rule: str) -> Quantity:
        """Pairs per second on a GPU or a core: measured, or else extrapolated from the device's peak."""
        settings = self.recipe.cross_modality
        model, device = self._model(getattr(settings, rule).model), self._gpu(CROSS_MODALITY) or "core"
        precision = self._precision()
        twice = rule == "flipped_clip" and settings.flipped_clip.score_unflipped
        prompts = len(settings.digit.prompts) if rule == "digit" and settings.digit else 1
        measured = f"rate/{model}/{precision}/{device}"
        if measured in self.asked.known and not twice and prompts == 1:
            return self.known(measured)
        flops = self.known(f"flops/{model}", _unknown_model(model, "flops"))
        peak = self.known(
            f"peak/{device}/{precision}",
            f"{device}: unknown speed in {precision}; give `peak/{device}/{precision}` (FLOP/s) in a file for "
            "--figures, or use --measured",
        )
        if prompts > 1:
            flops *= self.given(f"{CROSS_MODALITY}/prompts", prompts, "prompts", "recipe: digit.prompts")
        if twice:
            flops += self.known(f"flops/{model}/image")
        rate = peak * self._utilisation() / flops
        return self.computed(f"{CROSS_MODALITY}/rate/{rule}", rate, "pairs/s", EXTRAPOLATED)

    def _model(self, name: str) -> str:
        """The name of a recipe's model in the known figures: as --like says, or the known model that a folder's path
        ends with."""
        known = (key.removeprefix("flops/") for key in self.asked.known if key.startswith("flops/"))
        by_path = next((model for model in known if "/" in model and name.endswith(f"/{model}")), name)
        return self.asked.like.get(name, by_path)

    def _precision(self) -> str:
        settings, gpu = self.recipe.cross_modality, self._gpu(CROSS_MODALITY)
        if settings.precision != "auto":
            return settings.precision
        if gpu is None:
            return "fp32"
        return "bf16" if GPUS[gpu].has_bf16 else "fp16"

    def _utilisation(self) -> Quantity:
        if self.asked.utilisation is None:
            return self.known("utilisation")
        return self.given("utilisation", self.asked.utilisation, "of the peak", "--utilisation")

    def _dimensions(self) -> Quantity:
        """The number of values in a flipped-CLIP embedding."""
        model = self._model(self.recipe.cross_modality.flipped_clip.model)
        return self.known(f"dimensions/{model}", _unknown_model(model, "dimensions"))

    # Stage 3

    def _distribution_alignment(self) -> None:
        stage, count = DISTRIBUTION_ALIGNMENT, self.recipe.distribution_alignment.clusters.count
        clusters = self.given(f"{stage}/clusters", count, "clusters", "recipe: clusters.count")
        dimensions, candidates = self._dimensions(), self.candidates
        groups = self.computed(
            f"{stage}/groups", self.shards * apply(formulas.distinct, candidates / self.shards, clusters), "groups"
        )
        tiles_per_cluster = apply(max, 1, apply(math.ceil, candidates / clusters / formulas.TILE_ROWS))
        tiles = self.computed(f"{stage}/tiles", apply(min, candidates, clusters) * tiles_per_cluster, "tiles")
        seconds = (
            self.samples * self.known("cpu/decisions")
            + candidates * self.known("cpu/candidate")
            + groups * self.known("cpu/group")
            + clusters * self.known("cpu/cluster")
        )
        on_rows = self.computed(f"{stage}/core_hours/rows", seconds, "core h")
        on_products, hours_alone = self._matrix_products(clusters, dimensions)
        core_hours = self.computed(f"{stage}/core_hours", on_rows + on_products, "core h")
        self.computed(f"{stage}/worker_hours", core_hours / self[f"{stage}/vcpus"], "worker h")
        self._alignment_shuffle(clusters, groups, tiles, FP16 * dimensions)
        versions = self.given(f"{stage}/versions", self.asked.kept_versions, "versions", "--keep-versions")
        self.computed(f"{stage}/storage", self.samples * self.known("bytes/decisions") * versions, "GiB")
        # The work folder has each candidate twice: as read, and sorted by cluster.
        work_bytes = 2 * (self.known("bytes/work_folder") + FP16 * dimensions)
        self.computed(f"{stage}/temporary", candidates * work_bytes, "GiB")
        self._hours_and_cost(stage, hours_alone)

    def _matrix_products(self, clusters: Quantity, dimensions: Quantity) -> tuple[Quantity, Quantity]:
        """The core hours of all matrix products, and the hours of those that one worker runs alone."""
        stage, settings = DISTRIBUTION_ALIGNMENT, self.recipe.distribution_alignment
        peak, sizes = self.known("peak/core/fp32"), (self.candidates, clusters, dimensions)
        flops = apply(formulas.assignment_flops, *sizes, unit="FLOP")
        if settings.semantic_dedup:
            flops += apply(formulas.dedup_flops, *sizes, unit="FLOP")
        if settings.clusters.centroids is not None:
            hours_alone = self.given(f"{stage}/hours_alone", 0, "h", "recipe: clusters.centroids, so no training")
        else:
            trained = settings.clusters
            first_level = self.given(
                f"{stage}/first_level", trained.first_level, "clusters",
                "recipe: clusters." + ("count" if trained.coarse_count is None else "coarse_count"),
            )  # fmt: skip
            per_cluster = self.given(
                f"{stage}/samples_per_cluster", trained.samples_per_cluster, "samples",
                "recipe: clusters.samples_per_cluster",
            )  # fmt: skip
            iterations = self.given(
                f"{stage}/iterations", trained.iterations, "iterations", "recipe: clusters.iterations"
            )
            training = (self.candidates, clusters, first_level, per_cluster, iterations, dimensions)
            flops += apply(formulas.kmeans_flops, *training, unit="FLOP")
            serial_flops = apply(formulas.serial_kmeans_flops, *training, unit="FLOP")
            hours_alone = self.computed(f"{stage}/hours_alone", serial_flops / peak, "h")
        return self.computed(f"{stage}/core_hours/products", flops / peak, "core h"), hours_alone

    def _alignment_shuffle(
        self, clusters: Quantity, groups: Quantity, tiles: Quantity, embedding_bytes: Quantity
    ) -> None:
        """The bytes of each GroupByKey: a part per candidate and a part per element."""
        stage, candidates = DISTRIBUTION_ALIGNMENT, self.candidates
        ranges_per_tile = apply(formulas.distinct, candidates / apply(max, 1, tiles), formulas.SUBSET_RANGES)
        elements = {
            "Find ranges/Group keys": groups,
            "To tiles/Gather tile": groups,
            "Semantic dedup/Gather cluster": tiles,
            "Subset/Group range": tiles * ranges_per_tile,
            "Gather shard": groups + self.shards,
        }
        size = total(
            candidates * self.known(f"shuffle/{stage}/{step}/candidate")
            + count * self.known(f"shuffle/{stage}/{step}/element")
            for step, count in elements.items()
        )
        size += candidates * embedding_bytes  # on an object store embeddings pass through `Gather tile`
        if self.recipe.distribution_alignment.clusters.centroids is None:
            training_rows = apply(min, candidates, self[f"{stage}/samples_per_cluster"] * clusters)
            row_bytes = self.known(f"shuffle/{stage}/Train centroids/Gather coarse cluster/training_row")
            size += training_rows * (row_bytes + embedding_bytes)
        self.computed(f"{stage}/shuffle", size, "GiB")

    def _totals(self) -> None:
        for what, unit in (("hours", "h"), ("cost", "USD"), ("shuffle", "GiB"), ("storage", "GiB")):
            self.computed(f"total/{what}", total(self[f"{stage}/{what}"] for stage in STAGES), unit)
        price = self.known("price/storage_gib_month")
        self.computed("total/storage_month", self["total/storage"] * price, "USD/month")


def _kept_share(funnel: Mapping[str, Any], what: str, path: str) -> float:
    """The share of its input that stage 1, or a rule of stage 2, kept according to the funnel.json at `path`. Raises
    CannotEstimate where it does not say."""
    rules = funnel.get("rules")
    found = [rule for rule in rules if what in (rule["stage"], rule["name"])] if isinstance(rules, list) else []
    reached = funnel.get("in", 0) if what == SINGLE_MODALITY else (found[0]["in"] if found else 0)
    if not found or not reached:
        raise CannotEstimate(f"{path}: has no {what}; give the funnel.json of a run with that rule")
    return found[-1]["kept"] / reached


def _unknown_model(model: str, group: str) -> str:
    return (
        f"{model}: unknown {group}; say `--like {model}=MODEL` with a model of figures.yaml, or give `{group}/{model}` "
        "in a file for --figures (`python -m benchmarks.flops` counts operations)"
    )
