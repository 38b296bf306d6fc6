"""The launch settings: where on Google Cloud a recipe runs, and on which machines. See templates/dataflow.yaml."""

from __future__ import annotations

import re
from typing import Annotated, Literal, NamedTuple

import pydantic
from pydantic import Field

from transforms.core.recipe import CROSS_MODALITY, DISTRIBUTION_ALIGNMENT, SINGLE_MODALITY, STAGES
from transforms.core.settings import Settings, load_settings

ALL_STAGES = "all_stages"
TEMPLATES = (*STAGES, ALL_STAGES)
"""The flex templates by name: one a stage, and one that runs the three graphs as one job."""

ALL_WORKERS, RIGHT_FITTING = "all_workers", "right_fitting"
Gpus = Literal["all_workers", "right_fitting"]


class GpuModel(pydantic.BaseModel):
    """What the launcher, which has no GPU, must know of one: the machines that carry it, and its native precision."""

    model_config = pydantic.ConfigDict(frozen=True)

    machine_prefix: str
    has_bf16: bool


GPUS = {
    "nvidia-tesla-p4": GpuModel(machine_prefix="n1-", has_bf16=False),
    "nvidia-tesla-p100": GpuModel(machine_prefix="n1-", has_bf16=False),
    "nvidia-tesla-v100": GpuModel(machine_prefix="n1-", has_bf16=False),
    "nvidia-tesla-t4": GpuModel(machine_prefix="n1-", has_bf16=False),
    "nvidia-l4": GpuModel(machine_prefix="g2-", has_bf16=True),
    "nvidia-tesla-a100": GpuModel(machine_prefix="a2-highgpu-", has_bf16=True),
    "nvidia-a100-80gb": GpuModel(machine_prefix="a2-ultragpu-", has_bf16=True),
    "nvidia-h100-80gb": GpuModel(machine_prefix="a3-highgpu-", has_bf16=True),
}
"""By Dataflow's name of the type (its page "Dataflow support for GPUs")."""

_DRIVER = "install-nvidia-driver"
_GPU_OPTION = re.compile(
    rf"type:(?P<type>[a-z0-9-]+);count:1;machine_type:(?P<machine>[a-z0-9-]+);{_DRIVER}(:(?P<driver>5xx))?"
)
_VCPUS_A_GPU = {"a2-highgpu": 12, "a2-ultragpu": 12, "a3-highgpu": 26}
_MACHINE_TYPE = re.compile(
    r"(?:[a-z][0-9][a-z]?-(?:standard|highmem|highcpu)-|(?:[a-z][0-9][a-z]?-)?custom-)(?P<vcpus>[0-9]+)(?:-[0-9]+)?"
    r"|(?P<series>a2-highgpu|a2-ultragpu|a3-highgpu)-(?P<gpus>[0-9]+)g"
)


def vcpus_of(machine_type: str) -> int:
    """How many vCPUs a Compute Engine machine type has. Raises ValueError where its name does not tell."""
    found = _MACHINE_TYPE.fullmatch(machine_type)
    vcpus = 0
    if found:
        vcpus = int(found["vcpus"]) if found["vcpus"] else int(found["gpus"]) * _VCPUS_A_GPU[found["series"]]
    if not vcpus:
        raise ValueError(
            "no machine type with vCPUs of its own; allowed, for example: n2-standard-8, n2-custom-8-16384, "
            "g2-standard-8, a2-highgpu-1g"
        )
    return vcpus


def _machine_type(name: str) -> str:
    vcpus_of(name)
    return name


def _gpu_type(name: str) -> str:
    if name not in GPUS:
        raise ValueError(f"no GPU of Dataflow's; allowed: {', '.join(GPUS)}")
    return name


MachineType = Annotated[str, pydantic.AfterValidator(_machine_type)]
GpuType = Annotated[str, pydantic.AfterValidator(_gpu_type)]
ProjectId = Annotated[str, Field(pattern=r"^([a-z0-9.-]+:)?[a-z][a-z0-9-]{4,28}[a-z0-9]$")]
Region = Annotated[str, Field(pattern=r"^[a-z]+-[a-z]+[0-9]+$")]
LabelKey = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_-]{0,62}$")]
LabelValue = Annotated[str, Field(pattern=r"^[a-z0-9_-]{0,63}$")]
Folder = Annotated[str, Field(pattern=r"^gs://[a-z0-9][a-z0-9._-]+[a-z0-9](/.*)?$")]


class Workers(Settings):
    """The machines of one stage. `spot` asks for FlexRS: preemptible machines, cheaper, started within six hours."""

    machine_type: MachineType
    max_workers: int = Field(ge=1, le=2000)  # Dataflow's quota page: workers a job
    disk_gb: int = Field(50, ge=30)
    spot: bool = False


class Accelerator(Settings):
    """The GPU of a worker: one, because a worker's models share one. More GPUs are more workers. `driver` asks for
    NVIDIA's drivers of series 5xx; without it Dataflow brings its own choice."""

    type: GpuType
    count: Literal[1] = 1
    driver: Literal["5xx"] | None = None


class GpuWorker(NamedTuple):
    """A worker with its one GPU, as the template parameter `accelerator` has it: in Dataflow's own words."""

    gpu_type: str
    machine_type: str
    driver: str | None = None

    @property
    def option(self) -> str:
        """The value of the parameter, and of Beam's resource hint."""
        return f"type:{self.gpu_type};count:1;machine_type:{self.machine_type};{self._driver}"

    @property
    def service_option(self) -> str:
        """The value of the service option `worker_accelerator`; the machine type is then the whole job's."""
        return f"type:{self.gpu_type};count:1;{self._driver}"

    @property
    def _driver(self) -> str:
        return f"{_DRIVER}:{self.driver}" if self.driver else _DRIVER

    @property
    def precision(self) -> str:
        """What `precision: auto` comes to on it, as `transforms.models.precision.resolve` says on the worker."""
        return "bf16" if GPUS[self.gpu_type].has_bf16 else "fp16"

    @classmethod
    def parse(cls, option: str) -> GpuWorker:
        """Of the parameter's value. Raises ValueError."""
        found = _GPU_OPTION.fullmatch(option)
        if not found:
            raise ValueError(
                f"got {option}; allowed: type:TYPE;count:1;machine_type:MACHINE_TYPE;{_DRIVER}[:5xx], for example "
                f"{cls('nvidia-l4', 'g2-standard-8').option}"
            )
        worker = cls(_gpu_type(found["type"]), _machine_type(found["machine"]), found["driver"])
        prefix = GPUS[worker.gpu_type].machine_prefix
        if not worker.machine_type.startswith(prefix):
            raise ValueError(f"{worker.machine_type} carries no {worker.gpu_type}; allowed: what starts with {prefix}")
        return worker


class DataflowSettings(Settings):
    """Where a recipe runs on Google Cloud, and on which machines.

    `gpus` says who has the accelerator in a job of stage 2: `all_workers`, by the service option `worker_accelerator`,
    or with `right_fitting` only those that run the models, by Beam's resource hints. Never both.
    """

    project: ProjectId
    region: Region
    image: str = Field(pattern=r"^[a-z0-9.-]+(:[0-9]+)?(/[a-z0-9._-]+)+(:[A-Za-z0-9_.-]+|@sha256:[0-9a-f]{64})$")
    templates: Folder
    temp_location: Folder
    service_account: str | None = Field(None, pattern=r"^[^@\s]+@[^@\s]+\.gserviceaccount\.com$")
    network: str | None = None
    subnetwork: str | None = None
    use_public_ips: bool = True
    labels: dict[LabelKey, LabelValue] = Field(default_factory=dict, max_length=60)  # of 64; ours come to them
    single_modality: Workers
    cross_modality: Workers
    distribution_alignment: Workers
    accelerator: Accelerator | None = None
    gpus: Gpus = "all_workers"

    @pydantic.model_validator(mode="after")
    def _consistent(self) -> DataflowSettings:
        if self.accelerator:
            try:
                GpuWorker.parse(GpuWorker(self.accelerator.type, self.cross_modality.machine_type).option)
            except ValueError as error:
                raise ValueError(f"`cross_modality.machine_type`: {error}") from error
            if self.cross_modality.spot:
                raise ValueError("`cross_modality.spot` is for stages without GPUs: FlexRS has none")
        return self

    @property
    def gpu_parameters(self) -> dict[str, str]:
        """The parameters `gpus` and `accelerator` of every template; none where there is no accelerator. Stages without
        a GPU take them too: which GPU it is decides the precision, which the manifest names."""
        if not self.accelerator:
            return {}
        wanted = GpuWorker(self.accelerator.type, self.cross_modality.machine_type, self.accelerator.driver)
        return {"gpus": self.gpus, "accelerator": wanted.option}

    def workers(self, template: str) -> Workers:
        """The machines that a job of this template starts with. Where right fitting gives the models machines of their
        own (`cross_modality`), the rest of the job runs on those of stage 1."""
        fitted = self.accelerator is not None and self.gpus == RIGHT_FITTING
        if template == ALL_STAGES or (template == CROSS_MODALITY and fitted):
            return self.single_modality.model_copy(update={"spot": False})  # FlexRS knows no right fitting
        return {
            SINGLE_MODALITY: self.single_modality,
            CROSS_MODALITY: self.cross_modality,
            DISTRIBUTION_ALIGNMENT: self.distribution_alignment,
        }[template]


def load_dataflow_settings(path: str) -> DataflowSettings:
    """The launch settings at `path` (local or `gs://`). Raises SettingsError with every fault at once."""
    return load_settings(path, DataflowSettings)
