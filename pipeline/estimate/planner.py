"""What a run over so many samples takes on Dataflow: machines, hours, cost, shuffle and storage, stage by stage.

Pure: figures in, a plan out. Every figure of the plan is one that was put in, with its source, or is computed from
others of the plan, and says how.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any, Literal

from pipeline.dataflow.settings import GPUS, Accelerator, DataflowSettings, Workers, vcpus_of
from pipeline.estimate.figures import Kind, Known
from transforms.core.catalogue import rules_of_stage
from transforms.core.errors import UsageError
from transforms.core.recipe import CROSS_MODALITY, DISTRIBUTION_ALIGNMENT, SINGLE_MODALITY, STAGES, Recipe

GIB = 2**30
TILE_ROWS = 8192  # transforms.distribution_alignment.tiles, which would bring Beam along
SUBSET_RANGES = 256  # of pipeline.sinks.subset: two hex digits
HOURS_A_WEEK = 168
SHARDS_TO_LIST = 1_000_000
COMPUTED: Literal["computed"] = "computed"
EXTRAPOLATED: Literal["extrapolated"] = "extrapolated"

LEFT_OUT = (
    "starting machines and pulling the image (minutes a job); retries; side inputs and the few bytes a shard, a tile "
    "or a job that pass other shuffles; operations on objects; network to other regions; the pool's own storage; "
    "taxes, discounts and free tiers (Dataflow's volume adjustments of shuffled data among them)",
    "stage 2 reads the pool's tars once more; that they come as fast as the GPU takes pairs is not measured",
)


class CannotEstimate(UsageError):
    """What a plan needs and nothing says."""


@dataclasses.dataclass(frozen=True)
class Figure:
    """A number of the plan. `source` says where it comes from, or by which formula; `uses` names the figures of the
    plan that the formula takes."""

    value: float
    unit: str
    kind: Kind | Literal["computed", "extrapolated"]
    source: str
    uses: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Machines:
    """Where the plan's jobs run: of the launch settings in the file `source`, what matters here."""

    source: str
    region: str
    workers: Mapping[str, Workers]
    accelerator: Accelerator | None

    @classmethod
    def of(cls, settings: DataflowSettings, source: str) -> Machines:
        """Those of launch settings."""
        return cls(source, settings.region, {stage: getattr(settings, stage) for stage in STAGES}, settings.accelerator)


@dataclasses.dataclass(frozen=True)
class Plan:
    """Figures by name (`STAGE/WHAT`, `total/WHAT`, or as in figures.yaml), and what is to be said beside them."""

    figures: dict[str, Figure]
    machines: dict[str, str]
    warnings: tuple[str, ...]
    left_out: tuple[str, ...]

    def value(self, name: str) -> float:
        """The number of that name."""
        return self.figures[name].value

    @property
    def content(self) -> dict[str, Any]:
        """As `--json` prints it."""
        return {
            "figures": {name: dataclasses.asdict(figure) for name, figure in self.figures.items()},
            "machines": self.machines,
            "warnings": list(self.warnings),
            "left_out": list(self.left_out),
        }

    def roots(self, name: str) -> Iterator[str]:
        """The figures that were put in and that the one of this name comes from, each once."""
        seen, waiting = set(), [name]
        while waiting:
            one = waiting.pop()
            if one not in seen:
                seen.add(one)
                uses = self.figures[one].uses
                if not uses:
                    yield one
                waiting += reversed(uses)


# Formulas -------------------------------------------------------------------------------------------------------


def distinct(draws: float, kinds: float) -> float:
    """How many of `kinds` equally likely ones are expected among `draws`: kinds · (1 − (1 − 1/kinds)^draws)."""
    return draws if kinds <= 1 and draws < 1 else kinds * -math.expm1(draws * _log_of_others(kinds))


def _log_of_others(kinds: float) -> float:
    return math.log1p(-1 / kinds) if kinds > 1 else -math.inf


def kmeans_flops(candidates: float, clusters: int, first_level: int, a_cluster: int, rounds: int, dims: int) -> float:
    """Two levels of k-means: 2 · rounds · d · (rows · k) of the coarse one and of all fine ones."""
    rows, coarse_rows = (min(candidates, a_cluster * count) for count in (clusters, first_level))
    if first_level == 1:
        return 2.0 * rounds * dims * rows * clusters
    return 2.0 * rounds * dims * (coarse_rows * first_level + rows * clusters / first_level)


def serial_kmeans_flops(
    candidates: float, clusters: int, first_level: int, a_cluster: int, rounds: int, dims: int
) -> float:
    """The part of them that one worker does alone: the first level."""
    count = clusters if first_level == 1 else first_level
    return 2.0 * rounds * dims * min(candidates, a_cluster * count) * count


def assignment_flops(candidates: float, clusters: int, dims: int) -> float:
    """Every candidate with every centroid: 2 · n · k · d."""
    return 2.0 * candidates * clusters * dims


def dedup_flops(candidates: float, clusters: int, dims: int) -> float:
    """Every pair of a cluster, clusters of one size: 2 · d · n²/(2k). What the bound spares is not taken off."""
    return candidates * candidates / clusters * dims


def memory_gib_of(machine_type: str, figures: Mapping[str, Known]) -> tuple[str, float]:
    """The figure that tells a machine type's memory, and the memory in GiB. Raises CannotEstimate."""
    series, _, rest = machine_type.partition("-")
    kind = rest.partition("-")[0]
    if "custom" in machine_type:
        return "", int(machine_type.rpartition("-")[2]) / 1024
    name = f"memory/{series}-{kind}"
    if name not in figures:
        raise CannotEstimate(
            f"{machine_type}: its memory is not known; give `{name}` (GiB a vCPU) in a file for --figures"
        )
    return name, figures[name].value * vcpus_of(machine_type)


# The plan -------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Question:
    """What is to be estimated. `known`: figures by name, with what the user gave. `funnel`: funnel.json of an earlier
    run, and its path. `like`: by a model of the recipe, the one that it is in `known`."""

    recipe: Recipe
    samples: int
    machines: Machines
    known: Mapping[str, Known]
    samples_per_shard: int = 10_000
    bytes_per_sample: float | None = None
    utilisation: float | None = None
    funnel: tuple[str, Mapping[str, Any]] | None = None
    like: Mapping[str, str] = dataclasses.field(default_factory=dict)
    kept_versions: int = 1


def estimate(question: Question) -> Plan:
    """The plan. Raises CannotEstimate where a figure is missing."""
    return _Planner(question).plan()


class _Planner:
    def __init__(self, question: Question) -> None:
        self.asked, self.recipe, self.machines = question, question.recipe, question.machines
        self.figures: dict[str, Figure] = {}
        self.warnings: list[str] = []
        self.extrapolated: list[str] = []

    # figures

    def take(self, name: str) -> str:
        """Put a known figure into the plan; its name."""
        known = self.asked.known.get(name)
        if known is None:
            raise CannotEstimate(f"nothing tells {name}; give it in a file for --figures (docs/dataflow.md, Cost)")
        source = ", ".join(part for part in (known.source, known.region, known.date) if part)
        return self.put(name, known.value, known.unit, known.kind, source)

    def put(self, name: str, value: float, unit: str, kind: Kind | Literal["extrapolated"], source: str) -> str:
        self.figures[name] = Figure(float(value), unit, kind, source)
        return name

    def compute(self, name: str, value: float, unit: str, formula: str, *uses: str) -> str:
        self.figures[name] = Figure(float(value), unit, COMPUTED, formula, tuple(dict.fromkeys(uses)))
        return name

    def v(self, name: str) -> float:
        return self.figures[name].value

    # the parts

    def plan(self) -> Plan:
        asked = self.asked
        self.put("samples", asked.samples, "samples", "given", "--samples")
        self.put("samples_per_shard", asked.samples_per_shard, "samples", "given", "--samples-per-shard")
        self.compute(
            "shards", math.ceil(asked.samples / asked.samples_per_shard), "shards", "samples / samples_per_shard",
            "samples", "samples_per_shard",
        )  # fmt: skip
        self._pool()
        self._funnel()
        for stage in STAGES:
            self._machine(stage)
        self._single_modality()
        self._cross_modality()
        self._distribution_alignment()
        self._totals()
        self._warn()
        names = {stage: self._machine_name(stage) for stage in STAGES}
        return Plan(self.figures, names, tuple(self.warnings), LEFT_OUT)

    def _pool(self) -> None:
        given = self.asked.bytes_per_sample
        if given is not None:
            a_sample = self.put("bytes/pool", given, "bytes/sample", "given", "--bytes-per-sample")
        else:
            a_sample = self.take("bytes/pool")
        self._gib("pool/storage", "samples × bytes/pool", ("samples", a_sample))

    def _gib(self, name: str, formula: str, *products: tuple[str, ...]) -> str:
        value = sum(math.prod(map(self.v, product)) for product in products) / GIB
        return self.compute(name, value, "GiB", formula, *(name for product in products for name in product))

    def _funnel(self) -> None:
        """How many pairs each model is asked about, and how many candidates stage 3 has."""
        rules, models = self._kept_shares(), self.recipe.cross_modality
        self.compute("scored", self.v("samples") * self.v(rules[SINGLE_MODALITY]), "pairs",
                     "samples × share/single_modality", "samples", rules[SINGLE_MODALITY])  # fmt: skip
        left = "scored"
        for rule in (rule.name for rule in rules_of_stage(CROSS_MODALITY)):
            if getattr(models, rule) is not None:
                share = rules[rule]
                left = self.compute(f"kept by {rule}", self.v(left) * self.v(share), "pairs", f"{left} × {share}",
                                    left, share)  # fmt: skip
        self.compute("candidates", self.v(left), "samples", left, left)

    def _kept_shares(self) -> dict[str, str]:
        """The name of the share that each rule of stage 2, and stage 1 as a whole, keeps of what reaches it."""
        models = self.recipe.cross_modality
        named = {SINGLE_MODALITY: f"share/{SINGLE_MODALITY}"}
        for rule in (rule.name for rule in rules_of_stage(CROSS_MODALITY)):
            settings = getattr(models, rule)
            if settings is None:
                continue
            named[rule] = f"share/{rule}"
            if settings.keep_fraction is not None:
                self.put(named[rule], settings.keep_fraction, "of what reaches it", "given", "recipe: keep_fraction")
        for what, name in named.items():
            if name not in self.figures:
                if self.asked.funnel:
                    path, funnel = self.asked.funnel
                    self.put(name, kept_share(funnel, what, path), "of what reaches it", "measured", path)
                else:
                    self.take(name)
        return named

    def _machine_name(self, stage: str) -> str:
        workers, gpu = self.machines.workers[stage], self._gpu(stage)
        return workers.machine_type + (f" + {gpu}" if gpu else "") + (" (FlexRS)" if workers.spot else "")

    def _gpu(self, stage: str) -> str | None:
        gpu = self.machines.accelerator
        return gpu.type if gpu and stage == CROSS_MODALITY and self.recipe.cross_modality.device == "cuda" else None

    def _machine(self, stage: str) -> None:
        """What a worker of this stage has, and what an hour of it costs."""
        workers, where = self.machines.workers[stage], f"{self.machines.source}: {stage}"
        if stage == CROSS_MODALITY and self.recipe.cross_modality.device == "cuda" and not self._gpu(stage):
            raise CannotEstimate("the recipe says device: cuda, the launch settings name no `accelerator`")
        self.put(f"{stage}/workers", workers.max_workers, "workers", "given", f"{where}.max_workers")
        vcpus = self.put(
            f"{stage}/vcpus", vcpus_of(workers.machine_type), "vCPUs/worker", "given", f"{where}.machine_type"
        )
        disk = self.put(f"{stage}/disk", workers.disk_gb, "GB/worker", "given", f"{where}.disk_gb")
        family, gib = memory_gib_of(workers.machine_type, self.asked.known)
        uses = [self.take(family), vcpus] if family else [vcpus]
        memory = self.compute(f"{stage}/memory", gib, "GiB/worker", f"of {workers.machine_type}", *uses)
        kind = "flexrs_" if workers.spot else ""
        parts = [
            (vcpus, self.take(f"price/{kind}vcpu_hour")),
            (memory, self.take(f"price/{kind}memory_gib_hour")),
            (disk, self.take("price/disk_gb_hour")),
        ]
        formula = "vCPUs, GiB and GB × their prices"
        price = sum(self.v(count) * self.v(each) for count, each in parts)
        gpu_uses = []
        if gpu := self._gpu(stage):
            gpu_uses = [self.take(f"price/{gpu}_hour")]
            price, formula = price + self.v(gpu_uses[0]), formula + " + one GPU"
        self.compute(f"{stage}/worker_hour", price, "USD/h", formula, *(n for part in parts for n in part), *gpu_uses)

    def _cost(self, stage: str, worker_hours: str, alone: str | None = None) -> None:
        """Hours with all workers, and cost, from the hours of one worker; `alone`: hours that only one worker works."""
        workers, price = f"{stage}/workers", f"{stage}/worker_hour"
        hours, formula, uses = self.v(worker_hours) / self.v(workers), "worker hours / workers", [worker_hours, workers]
        cost, cost_formula = self.v(worker_hours) * self.v(price), "worker hours × price of one"
        cost_uses = [worker_hours, price]
        if alone:
            hours, formula = hours + self.v(alone), f"{formula} + what one does alone"
            cost, cost_formula = cost + self.v(alone) * self.v(price), f"{cost_formula}, and one that works alone"
            uses.append(alone)
            cost_uses.append(alone)
        self.compute(f"{stage}/hours", hours, "h", formula, *uses)
        self.compute(f"{stage}/cost/workers", cost, "USD", cost_formula, *cost_uses)
        passes, per_gib = self.take("shuffle_passes"), self.take("price/shuffle_gib")
        self.compute(
            f"{stage}/cost/shuffle", self.v(f"{stage}/shuffle") * self.v(passes) * self.v(per_gib), "USD",
            "GiB × (written, read) × price", f"{stage}/shuffle", passes, per_gib,
        )  # fmt: skip
        parts = (f"{stage}/cost/workers", f"{stage}/cost/shuffle")
        self.compute(f"{stage}/cost", sum(map(self.v, parts)), "USD", "workers + shuffle", *parts)

    def _single_modality(self) -> None:
        stage, cpu = SINGLE_MODALITY, [self.take("cpu/single_modality"), self.take("cpu/pool_wide")]
        self.compute(f"{stage}/core_hours", self.v("samples") * sum(map(self.v, cpu)) / 3600, "core h",
                     "samples × seconds of a core", "samples", *cpu)  # fmt: skip
        self._worker_hours_of_cores(stage)
        prefix = f"shuffle/{stage}/"
        shuffles = [self.take(name) for name in self.asked.known if name.startswith(prefix)]
        self._gib(f"{stage}/shuffle", "samples × bytes of each GroupByKey", *(("samples", name) for name in shuffles))
        tables = [self.take("bytes/single_modality"), self.take("bytes/pool_wide")]
        self._gib(f"{stage}/storage", "samples × bytes of a row", *(("samples", name) for name in tables))
        self._cost(stage, f"{stage}/worker_hours")

    def _worker_hours_of_cores(self, stage: str) -> None:
        names = (f"{stage}/core_hours", f"{stage}/vcpus")
        self.compute(f"{stage}/worker_hours", self.v(names[0]) / self.v(names[1]), "worker h",
                     "core hours / vCPUs, a vCPU taken as a core", *names)  # fmt: skip

    def _cross_modality(self) -> None:
        stage, models = CROSS_MODALITY, self.recipe.cross_modality
        busy = []
        for rule, asked in self._asked():
            model = getattr(models, rule).model
            rate = self._rate(rule, model)
            busy.append(
                self.compute(f"{stage}/model_hours/{rule}", self.v(asked) / self.v(rate) / 3600,
                             "GPU h" if self._gpu(stage) else "core h", "pairs / rate", asked, rate)
            )  # fmt: skip
        prepare = self.take("cpu/cross_modality")
        self.compute(f"{stage}/core_hours", self.v("scored") * self.v(prepare) / 3600, "core h",
                     "scored × seconds of a core", "scored", prepare)  # fmt: skip
        vcpus, cores = f"{stage}/vcpus", f"{stage}/core_hours"
        on_models = sum(map(self.v, busy))
        if self._gpu(stage):
            on_cores = self.v(cores) / self.v(vcpus)
            hours, formula = max(on_models, on_cores), "the longer of: models on the GPU; preparing on all vCPUs"
        else:
            hours = (on_models + self.v(cores)) / self.v(vcpus)
            formula = "(models + preparing) / vCPUs, which take turns on a CPU"
        self.compute(f"{stage}/worker_hours", hours, "worker h", formula, *busy, cores, vcpus)
        self.compute(f"{stage}/shuffle", 0, "GiB", "shards × nothing but their names: no sample passes a shuffle",
                     "shards")  # fmt: skip
        dims, row = self._dimensions(), self.take("bytes/cross_modality")
        self.compute(f"{stage}/storage", self.v("scored") * (self.v(row) + 2 * self.v(dims)) / GIB, "GiB",
                     "scored × (bytes of a row + fp16 embedding)", "scored", row, dims)  # fmt: skip
        self._cost(stage, f"{stage}/worker_hours")

    def _asked(self) -> Iterator[tuple[str, str]]:
        """Each model's rule, and the figure that says how many pairs it is asked about: what reaches every floor that
        is known beforehand, as in `transforms.models.cascade`."""
        models = self.recipe.cross_modality
        yield "flipped_clip", "scored"
        floor = "scored" if models.flipped_clip.cascade_min_cosine is None else "kept by flipped_clip"
        if models.image_text_matching:
            yield "image_text_matching", floor
            if models.image_text_matching.min is not None:
                floor = self.compute(
                    "reach digit", self.v(floor) * self.v("share/image_text_matching"), "pairs",
                    f"{floor} × share/image_text_matching", floor, "share/image_text_matching",
                )  # fmt: skip
        if models.digit:
            if models.digit.clip_prompts:
                self.warnings.append(
                    "digit.clip_prompts asks BLIP-2 about fewer pairs than the plan has: how many is not known"
                )
            yield "digit", floor

    def _model(self, name: str) -> str:
        """The name under which a model is known: as the user says, or what a folder of the image ends in."""
        known = (key.removeprefix("flops/") for key in self.asked.known if key.startswith("flops/"))
        baked = next((model for model in known if "/" in model and name.endswith(f"/{model}")), name)
        return self.asked.like.get(name, baked)

    def _dimensions(self) -> str:
        name = self._model(self.recipe.cross_modality.flipped_clip.model)
        if f"dimensions/{name}" not in self.asked.known:
            raise CannotEstimate(_unknown_model(name, "dimensions"))
        return self.take(f"dimensions/{name}")

    def _rate(self, rule: str, given: str) -> str:
        """Pairs a second on a GPU, or on a core: measured, else extrapolated."""
        model, gpu, precision = self._model(given), self._gpu(CROSS_MODALITY), self._precision()
        device = gpu or "core"
        measured = f"rate/{model}/{precision}/{device}"
        settings = self.recipe.cross_modality
        twice = rule == "flipped_clip" and settings.flipped_clip.score_unflipped
        prompts = len(settings.digit.prompts) if rule == "digit" and settings.digit else 1
        if measured in self.asked.known and not twice and prompts == 1:
            return self.take(measured)
        if f"flops/{model}" not in self.asked.known:
            raise CannotEstimate(_unknown_model(model, "flops"))
        peak = f"peak/{device}/{precision}"
        if peak not in self.asked.known:
            raise CannotEstimate(
                f"nothing tells how fast {device} is in {precision}: give `{peak}` (FLOP/s) in a file for --figures, "
                "or --measured"
            )
        uses = [self.take(f"flops/{model}"), self.take(peak), self._utilisation()]
        flops = self.v(uses[0]) * prompts
        if twice:
            uses.append(self.take(f"flops/{model}/image"))
            flops += self.v(uses[-1])
        value = self.v(uses[1]) * self.v(uses[2]) / flops
        self.extrapolated.append(f"{model} on {device}")
        how = " (for each prompt)" if prompts > 1 else ""
        self.figures[f"{CROSS_MODALITY}/rate/{rule}"] = Figure(
            value, "pairs/s", EXTRAPOLATED,
            f"extrapolated, not measured: peak × utilisation / operations a pair{how} of {model}", tuple(uses),
        )  # fmt: skip
        return f"{CROSS_MODALITY}/rate/{rule}"

    def _utilisation(self) -> str:
        if self.asked.utilisation is not None:
            return self.put("utilisation", self.asked.utilisation, "of the peak", "given", "--utilisation")
        return self.take("utilisation")

    def _precision(self) -> str:
        settings, gpu = self.recipe.cross_modality, self._gpu(CROSS_MODALITY)
        if settings.precision != "auto":
            return settings.precision
        if gpu is None:
            return "fp32"
        return "bf16" if GPUS[gpu].has_bf16 else "fp16"

    def _distribution_alignment(self) -> None:
        stage, settings = DISTRIBUTION_ALIGNMENT, self.recipe.distribution_alignment
        clusters = self.put(f"{stage}/clusters", settings.clusters.count, "clusters", "given", "recipe: clusters.count")
        dims = self._dimensions()
        a_shard = self.v("candidates") / max(1.0, self.v("shards"))
        groups = self.compute(
            f"{stage}/groups", self.v("shards") * distinct(a_shard, self.v(clusters)), "groups",
            "shards × expected distinct clusters of a shard's candidates", "shards", "candidates", clusters,
        )  # fmt: skip
        a_cluster = self.v("candidates") / self.v(clusters)
        tiles = self.compute(
            f"{stage}/tiles", min(self.v("candidates"), self.v(clusters)) * max(1, math.ceil(a_cluster / TILE_ROWS)),
            "tiles", f"clusters × ⌈candidates of one / {TILE_ROWS}⌉", "candidates", clusters,
        )  # fmt: skip
        cpu = {
            self.take("cpu/decisions"): "samples", self.take("cpu/candidate"): "candidates",
            self.take("cpu/group"): groups, self.take("cpu/cluster"): clusters,
        }  # fmt: skip
        rows = self.compute(f"{stage}/core_hours/rows", sum(self.v(c) * self.v(n) for c, n in cpu.items()) / 3600,
                            "core h", "samples, candidates, groups and clusters × seconds of a core of each",
                            *(name for part in cpu.items() for name in part))  # fmt: skip
        peak = self.take("peak/core/fp32")
        products = self.compute(f"{stage}/core_hours/products", self._products() / self.v(peak) / 3600, "core h",
                                self._products_formula(), "candidates", clusters, dims, peak)  # fmt: skip
        self.compute(f"{stage}/core_hours", self.v(rows) + self.v(products), "core h", "rows + products", rows,
                     products)  # fmt: skip
        alone = self.compute(f"{stage}/hours_alone", self._serial() / self.v(peak) / 3600, "h",
                             "the first level of k-means, on one core", "candidates", clusters, dims, peak)  # fmt: skip
        self._worker_hours_of_cores(stage)
        self._alignment_shuffle(groups, tiles, dims)
        row = self.take("bytes/decisions")
        versions = self.put(f"{stage}/versions", self.asked.kept_versions, "versions", "given", "--keep-versions")
        self._gib(f"{stage}/storage", "samples × bytes of a row × versions kept", ("samples", row, versions))
        candidate = self.take("bytes/work_folder")
        self.compute(f"{stage}/temporary", self.v("candidates") * (2 * self.v(candidate) + 4 * self.v(dims)) / GIB,
                     "GiB", "candidates × (slim row + fp16 embedding) × two copies", "candidates", candidate,
                     dims)  # fmt: skip
        self._cost(stage, f"{stage}/worker_hours", alone)

    def _products(self) -> float:
        settings = self.recipe.distribution_alignment
        clusters, candidates, dims = settings.clusters, self.v("candidates"), int(self.v(self._dimensions()))
        flops = assignment_flops(candidates, clusters.count, dims)
        if settings.semantic_dedup:
            flops += dedup_flops(candidates, clusters.count, dims)
        if clusters.centroids is None:
            flops += kmeans_flops(candidates, clusters.count, clusters.first_level, clusters.samples_per_cluster,
                                  clusters.iterations, dims)  # fmt: skip
        return flops

    def _products_formula(self) -> str:
        settings = self.recipe.distribution_alignment
        parts = ["2·n·k·d to assign"]
        if settings.semantic_dedup:
            parts.append("n²/k·d for semantic dedup")
        if settings.clusters.centroids is None:
            parts.append("k-means")
        return f"({' + '.join(parts)}) / operations a second of a core"

    def _serial(self) -> float:
        clusters = self.recipe.distribution_alignment.clusters
        if clusters.centroids is not None:
            return 0.0
        return serial_kmeans_flops(
            self.v("candidates"), clusters.count, clusters.first_level, clusters.samples_per_cluster,
            clusters.iterations, int(self.v(self._dimensions())),
        )  # fmt: skip

    def _alignment_shuffle(self, groups: str, tiles: str, dims: str) -> None:
        """Bytes of each GroupByKey: so much a candidate and so much an element, of which each step has its own."""
        stage, size, uses = DISTRIBUTION_ALIGNMENT, 0.0, ["candidates", groups, tiles, dims]
        a_tile = self.v("candidates") / max(1.0, self.v(tiles))
        elements = {
            "Find ranges/Group keys": self.v(groups),
            "To tiles/Gather tile": self.v(groups),
            "Semantic dedup/Gather cluster": self.v(tiles),
            "Subset/Group range": self.v(tiles) * distinct(a_tile, SUBSET_RANGES),
            "Gather shard": self.v(groups) + self.v("shards"),
        }
        for step, count in elements.items():
            names = [self.take(f"shuffle/{stage}/{step}/{unit}") for unit in ("candidate", "element")]
            size += self.v("candidates") * self.v(names[0]) + count * self.v(names[1])
            uses += names
        size += self.v("candidates") * 2 * self.v(dims)  # on an object store the embeddings pass `Gather tile`
        clusters = self.recipe.distribution_alignment.clusters
        if clusters.centroids is None:
            row = self.take(f"shuffle/{stage}/Train centroids/Gather coarse cluster/training_row")
            uses.append(row)
            trained = min(self.v("candidates"), clusters.samples_per_cluster * clusters.count)
            size += trained * (self.v(row) + 2 * self.v(dims))
        self.compute(f"{stage}/shuffle", size / GIB, "GiB",
                     "candidates, and elements of each GroupByKey, × their bytes, + embeddings", *uses)  # fmt: skip

    def _totals(self) -> None:
        for what, unit in (("hours", "h"), ("cost", "USD"), ("shuffle", "GiB")):
            names = [f"{stage}/{what}" for stage in STAGES]
            self.compute(f"total/{what}", sum(map(self.v, names)), unit, "the three stages, one after another", *names)
        names = [f"{stage}/storage" for stage in STAGES]
        stored = self.compute("total/storage", sum(map(self.v, names)), "GiB", "tables of all stages", *names)
        price = self.take("price/storage_gib_month")
        self.compute("total/storage_month", self.v(stored) * self.v(price), "USD/month", "GiB × price", stored, price)

    def _warn(self) -> None:
        priced = {known.region for name, known in self.asked.known.items() if name.startswith("price/")} - {None}
        if priced and self.machines.region not in priced:
            self.warnings.append(
                f"prices are those of {', '.join(sorted(map(str, priced)))}, the jobs run in {self.machines.region}: "
                "give your region's in a file for --figures"
            )
        if self.extrapolated:
            told = "; ".join(dict.fromkeys(self.extrapolated))
            self.warnings.append(
                f"extrapolated, never measured: {told}. `python -m benchmarks.models --device cuda --json --no-peers` "
                "on such a machine measures them, --measured reads what it printed"
            )
        for stage in STAGES:
            hours, workers = self.v(f"{stage}/hours"), self.v(f"{stage}/workers")
            if hours > HOURS_A_WEEK:
                self.warnings.append(
                    f"{stage}: {hours:,.0f} hours with max_workers {workers:,.0f} are longer than a week, so that a "
                    "weekly schedule would find it running; raise max_workers (and the quotas)"
                )
            if self.machines.workers[stage].spot:
                self.warnings.append(f"{stage}: FlexRS may start up to six hours later than asked")
            if stage != DISTRIBUTION_ALIGNMENT and self.v("shards") < workers:
                self.warnings.append(
                    f"{stage}: {self.v('shards'):,.0f} shards keep no more workers than that busy, max_workers is "
                    f"{workers:,.0f}; the hours above take all of them as busy"
                )
        if self.v("shards") > SHARDS_TO_LIST:
            self.warnings.append(
                f"{self.v('shards'):,.0f} shards: one worker reads their listing before a stage starts; make shards of "
                "10,000 samples"
            )
        if self.recipe.cross_modality.flipped_clip.digit_rescue and not self.asked.funnel:
            self.warnings.append(
                "flipped_clip.digit_rescue lets more pairs through to the later models than the plan has: give --funnel"
            )


def kept_share(funnel: Mapping[str, Any], what: str, path: str) -> float:
    """What stage 1, or one rule of stage 2, kept of what reached it, by funnel.json. Raises CannotEstimate."""
    rules = funnel.get("rules")
    found = [r for r in rules if what in (r["stage"], r["name"])] if isinstance(rules, list) else []
    reached = funnel.get("in", 0) if what == SINGLE_MODALITY else (found[0]["in"] if found else 0)
    if not found or not reached:
        raise CannotEstimate(f"{path}: says nothing of {what}; give the funnel.json of a run with that rule")
    return found[-1]["kept"] / reached


def _unknown_model(model: str, group: str) -> str:
    return (
        f"{model}: its {group} are not known; say `--like {model}=MODEL` where it is one of figures.yaml, or give "
        f"`{group}/{model}` in a file for --figures (`python -m benchmarks.flops` counts operations)"
    )
