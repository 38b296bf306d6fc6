"""Tests of the launch settings, whose faults are all reported before anything is launched."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipeline.dataflow.settings import (
    ALL_STAGES,
    TEMPLATES,
    DataflowSettings,
    GpuWorker,
    load_dataflow_settings,
    vcpus_of,
)
from tests.helpers import changed
from transforms.core.recipe import CROSS_MODALITY, DISTRIBUTION_ALIGNMENT, SINGLE_MODALITY
from transforms.core.settings import SettingsError, parse_settings

EXAMPLE = Path(__file__).parents[3] / "templates" / "dataflow.yaml"


def content(**changes: Any) -> dict[str, Any]:
    """Return the content of the example with `changes`."""
    return changed(EXAMPLE, changes)


def settings(**changes: Any) -> DataflowSettings:
    return parse_settings(content(**changes), "d.yaml", DataflowSettings)


def faults(**changes: Any) -> list[str]:
    with pytest.raises(SettingsError) as caught:
        settings(**changes)
    return caught.value.faults


def test_example_is_valid() -> None:
    loaded = load_dataflow_settings(str(EXAMPLE))
    assert loaded.cross_modality.machine_type == "g2-standard-8"
    assert loaded.accelerator is not None
    assert loaded.accelerator.type == "nvidia-l4"


def test_all_faults_are_reported_at_once() -> None:
    found = faults(project="My Project", region="Iowa", temp_location="/tmp/x", zones=3, single_modality__disk_gb=5)
    assert sorted(fault.split(":")[0] for fault in found) == [
        "project", "region", "single_modality.disk_gb", "temp_location", "zones",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "where", "message"),
    [
        ({"project": ...}, "project", "missing"),
        ({"image": "pairsift"}, "image", "pattern"),
        ({"image": "europe-docker.pkg.dev/p/r/pairsift"}, "image", "pattern"),  # without a tag, the image may change
        ({"templates": "s3://bucket"}, "templates", "pattern"),
        ({"service_account": "me@example.com"}, "service_account", "pattern"),
        ({"labels": {"team": "Vision"}}, "labels.team", "pattern"),
        ({"labels": {"Team": "vision"}}, "labels.Team.[key]", "pattern"),
        ({"labels": {"team": 3}}, "labels.team", "string"),
        ({"single_modality__machine_type": "e2-medium"}, "single_modality.machine_type", "n2-standard-8"),
        ({"single_modality__max_workers": 0}, "single_modality.max_workers", "greater than or equal to 1"),
        ({"single_modality__spot": "yes"}, "single_modality.spot", "boolean"),
        ({"single_modality__gpu": 1}, "single_modality.gpu", "machine_type, max_workers, disk_gb, spot"),
        ({"accelerator__type": "nvidia-l40"}, "accelerator.type", "nvidia-tesla-t4"),
        ({"accelerator__count": 2}, "accelerator.count", "1"),
        ({"gpus": "both"}, "gpus", "'all_workers' or 'right_fitting'"),
        ({"accelerator__type": "nvidia-tesla-t4"}, "settings", "use a machine type starting with n1-"),
        ({"cross_modality__spot": True}, "settings", "FlexRS has no GPUs"),
    ],
)
def test_fault_names_the_setting_and_what_is_allowed(changes: dict[str, Any], where: str, message: str) -> None:
    (fault,) = faults(**changes)
    assert fault.startswith(f"{where}: ")
    assert message in fault


@pytest.mark.parametrize(
    ("machine_type", "vcpus"),
    [
        ("n1-standard-4", 4), ("n2-highmem-16", 16), ("c3d-highcpu-8", 8), ("g2-standard-12", 12),
        ("n2-custom-6-8192", 6), ("custom-2-4096", 2), ("a2-highgpu-1g", 12), ("a2-ultragpu-1g", 12),
        ("a3-highgpu-1g", 26),
    ],
)  # fmt: skip
def test_vcpus_of_a_machine_type(machine_type: str, vcpus: int) -> None:
    assert vcpus_of(machine_type) == vcpus


@pytest.mark.parametrize("machine_type", ["e2-small", "n2-standard-0", "n2-standard", "g2-standard-8 ", "", "n2"])
def test_machine_type_without_a_known_number_of_vcpus_is_refused(machine_type: str) -> None:
    with pytest.raises(ValueError, match="for example"):
        vcpus_of(machine_type)


def test_each_stage_has_its_own_machines() -> None:
    found = settings()
    assert {name: found.workers(name).machine_type for name in TEMPLATES} == {
        SINGLE_MODALITY: "n2-standard-8",
        CROSS_MODALITY: "g2-standard-8",
        DISTRIBUTION_ALIGNMENT: "n2-highmem-8",
        ALL_STAGES: "n2-standard-8",
    }
    assert found.workers(SINGLE_MODALITY).spot
    assert not found.workers(ALL_STAGES).spot


def test_right_fitting_restricts_gpus_to_the_models() -> None:
    assert settings(gpus="right_fitting").workers(CROSS_MODALITY).machine_type == "n2-standard-8"
    without = settings(gpus="right_fitting", accelerator=..., cross_modality__machine_type="n2-standard-32")
    assert without.workers(CROSS_MODALITY).machine_type == "n2-standard-32"


def test_gpu_parameters_are_sufficient_for_the_launcher() -> None:
    found = settings(gpus="right_fitting").gpu_parameters
    assert found["gpus"] == "right_fitting"
    assert GpuWorker.parse(found["accelerator"]) == GpuWorker("nvidia-l4", "g2-standard-8", "5xx")
    assert GpuWorker("nvidia-l4", "g2-standard-8", "5xx").service_option.endswith(";install-nvidia-driver:5xx")
    assert settings(accelerator=..., cross_modality__machine_type="n2-standard-8").gpu_parameters == {}


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("nvidia-l4", "for example type:nvidia-l4;count:1;machine_type:g2-standard-8;install-nvidia-driver"),
        ("type:nvidia-l4;count:2;machine_type:g2-standard-24;install-nvidia-driver", "count:1"),
        ("type:nvidia-l5;count:1;machine_type:g2-standard-8;install-nvidia-driver", "nvidia-tesla-t4"),
        ("type:nvidia-l4;count:1;machine_type:n1-standard-8;install-nvidia-driver", "a machine type starting with g2-"),
        ("type:nvidia-l4;count:1;machine_type:g2-small;install-nvidia-driver", "for example: n2-standard-8"),
    ],
)
def test_invalid_accelerator_is_refused(option: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GpuWorker.parse(option)


@pytest.mark.parametrize(
    ("gpu", "precision"),
    [("nvidia-tesla-t4", "fp16"), ("nvidia-tesla-v100", "fp16"), ("nvidia-l4", "bf16"), ("nvidia-tesla-a100", "bf16"),
     ("nvidia-h100-80gb", "bf16")],
)  # fmt: skip
def test_precision_of_each_gpu(gpu: str, precision: str) -> None:
    """bf16 is native since Ampere (compute capability 8.0); T4 and V100 are older."""
    assert GpuWorker(gpu, "").precision == precision
