"""The launch settings: the Google Cloud project, storage and machines of a run. See templates/dataflow.yaml."""

from __future__ import annotations

import re
from typing import Annotated, Literal, NamedTuple

import pydantic
from pydantic import Field

from transforms.core.recipe import CROSS_MODALITY, DISTRIBUTION_ALIGNMENT, SINGLE_MODALITY, STAGES
from transforms.core.settings import Settings, load_settings

ALL_STAGES = "all_stages"
TEMPLATES = (*STAGES, ALL_STAGES)
"""The names of the flex templates: one per stage, and one that runs the three graphs as one job."""

ALL_WORKERS, RIGHT_FITTING = "all_workers", "right_fitting"
Gpus = Literal["all_workers", "right_fitting"]


class GpuModel(pydantic.BaseModel):
    """The properties of a GPU that the launcher needs: the machines that support it, and its native precision.

    They are listed here because the launcher itself runs without a GPU.
    """

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
"""The supported GPUs by Dataflow's name of the type (from its page "Dataflow support for GPUs")."""

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
    """Return the number of vCPUs of a Compute Engine machine type. Raises ValueError if it is not in the name."""
    found = _MACHINE_TYPE.fullmatch(machine_type)
    vcpus = 0
    if found:
        vcpus = int(found["vcpus"]) if found["vcpus"] else int(found["gpus"]) * _VCPUS_A_GPU[found["series"]]
    if not vcpus:
        raise ValueError(
            "unknown machine type, or one with shared vCPUs; allowed, for example: n2-standard-8, n2-custom-8-16384, "
            "g2-standard-8, a2-highgpu-1g"
        )
    return vcpus


def _machine_type(name: str) -> str:
    vcpus_of(name)
    return name


def _gpu_type(name: str) -> str:
    if name not in GPUS:
        raise ValueError(f"unknown GPU type; allowed: {', '.join(GPUS)}")
    return name


MachineType = Annotated[str, pydantic.AfterValidator(_machine_type)]
GpuType = Annotated[str, pydantic.AfterValidator(_gpu_type)]
ProjectId = Annotated[str, Field(pattern=r"^([a-z0-9.-]+:)?[a-z][a-z0-9-]{4,28}[a-z0-9]$")]
Region = Annotated[str, Field(pattern=r"^[a-z]+-[a-z]+[0-9]+$")]
LabelKey = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_-]{0,62}$")]
LabelValue = Annotated[str, Field(pattern=r"^[a-z0-9_-]{0,63}$")]
Folder = Annotated[str, Field(pattern=r"^gs://[a-z0-9][a-z0-9._-]+[a-z0-9](/.*)?$")]


class Workers(Settings):
    """The machines of one stage. `spot` requests FlexRS: cheaper, preemptible machines that start within six hours."""

    machine_type: MachineType
    max_workers: int = Field(ge=1, le=2000)  # Dataflow's limit of workers per job
    disk_gb: int = Field(50, ge=30)
    spot: bool = False


class Accelerator(Settings):
    """The GPU of a worker.

    A worker has one GPU, because its models share it; for more GPUs, use more workers. `driver` requests NVIDIA's
    drivers of series 5xx; by default, Dataflow chooses the driver.
    """

    type: GpuType
    count: Literal[1] = 1
    driver: Literal["5xx"] | None = None


class GpuWorker(NamedTuple):
    """A worker with one GPU, as given by the template parameter `accelerator` in Dataflow's syntax."""

    gpu_type: str
    machine_type: str
    driver: str | None = None

    @property
    def option(self) -> str:
        """The value of the parameter `accelerator` and of Beam's resource hint."""
        return f"type:{self.gpu_type};count:1;machine_type:{self.machine_type};{self._driver}"

    @property
    def service_option(self) -> str:
        """The value of the service option `worker_accelerator`, for which the job sets the machine type."""
        return f"type:{self.gpu_type};count:1;{self._driver}"

    @property
    def _driver(self) -> str:
        return f"{_DRIVER}:{self.driver}" if self.driver else _DRIVER

    @property
    def precision(self) -> str:
        """The precision that `precision: auto` selects on this GPU, as `transforms.models.precision.resolve` does."""
        return "bf16" if GPUS[self.gpu_type].has_bf16 else "fp16"

    @classmethod
    def parse(cls, option: str) -> GpuWorker:
        """Parse the value of the parameter `accelerator`. Raises ValueError."""
        found = _GPU_OPTION.fullmatch(option)
        if not found:
            raise ValueError(
                f"got {option}; allowed: type:TYPE;count:1;machine_type:MACHINE_TYPE;{_DRIVER}[:5xx], for example "
                f"{cls('nvidia-l4', 'g2-standard-8').option}"
            )
        worker = cls(_gpu_type(found["type"]), _machine_type(found["machine"]), found["driver"])
        prefix = GPUS[worker.gpu_type].machine_prefix
        if not worker.machine_type.startswith(prefix):
            raise ValueError(
                f"{worker.machine_type} does not support {worker.gpu_type}; use a machine type starting with {prefix}"
            )
        return worker


class DataflowSettings(Settings):
    """The Google Cloud project, storage and machines of a run.

    `gpus` selects the workers of stage 2 that have the accelerator. With `all_workers`, all have it, through the
    service option `worker_accelerator`. With `right_fitting`, only those that run the models have it, through Beam's
    resource hints. The two are never combined.
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
    labels: dict[LabelKey, LabelValue] = Field(default_factory=dict, max_length=60)  # of 64; pairsift adds its own
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
                raise ValueError("`cross_modality.spot` cannot be combined with an accelerator: FlexRS has no GPUs")
        return self

    @property
    def gpu_parameters(self) -> dict[str, str]:
        """The template parameters `gpus` and `accelerator`; empty without an accelerator.

        Stages without a GPU need them too, because the GPU determines the precision, which is part of the manifest.
        """
        if not self.accelerator:
            return {}
        wanted = GpuWorker(self.accelerator.type, self.cross_modality.machine_type, self.accelerator.driver)
        return {"gpus": self.gpus, "accelerator": wanted.option}

    def workers(self, template: str) -> Workers:
        """Return the default machines of a job of this template.

        With right fitting, the models run on the machines of `cross_modality` and the rest of the job on those of
        `single_modality`.
        """
        fitted = self.accelerator is not None and self.gpus == RIGHT_FITTING
        if template == ALL_STAGES or (template == CROSS_MODALITY and fitted):
            return self.single_modality.model_copy(update={"spot": False})  # FlexRS does not support right fitting
        return {
            SINGLE_MODALITY: self.single_modality,
            CROSS_MODALITY: self.cross_modality,
            DISTRIBUTION_ALIGNMENT: self.distribution_alignment,
        }[template]


def load_dataflow_settings(path: str) -> DataflowSettings:
    """Load the launch settings at `path` (local or `gs://`). Raises SettingsError with all faults."""
    return load_settings(path, DataflowSettings)
