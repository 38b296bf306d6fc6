"""Tests of `pairsift centroids`: embeddings identical to those of stage 2, reproducible bytes, and model checks."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from typer.testing import CliRunner, Result

from pipeline.centroids.command import write_tasks
from pipeline.cli import app
from pipeline.decoding.images import decode
from pipeline.output_folder.manifest import identities
from tests.helpers import DEMO_RECIPE, encode, jpeg, picture, recipe, settings, tar_bytes, whole_sample, write_pool
from tests.transforms.models import tiny_models
from transforms.core.recipe import Recipe, parse_recipe
from transforms.core.records import SampleBatch, Shard
from transforms.distribution_alignment.cids import load_tasks, load_tasks_model
from transforms.distribution_alignment.vectors import unit_rows
from transforms.models.clip import ClipHandler, LoadedClip
from transforms.models.embedding_identity import differences

MNIST = Path(__file__).parents[4] / "shared" / "data" / "tasks" / "mnist"


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.save_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture
def place(tmp_path: Path, clip_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a recipe of a tiny CLIP and the images of two tasks."""
    monkeypatch.chdir(tmp_path)
    write_recipe(tmp_path / "r.yaml", clip_folder)
    for seed in range(7):
        name = hashlib.sha256(f"name {seed}".encode()).hexdigest()[:8]
        for task, offset in (("pets", 0), ("cars", 50)):
            (tmp_path / task).mkdir(exist_ok=True)
            (tmp_path / task / f"{name}.jpg").write_bytes(jpeg(seed=seed + offset))
    return tmp_path


def with_clip(folder: Path, **changes: Any) -> dict[str, Any]:
    clip = {"model": str(folder), "min": 0.0, "batch_size": 4, "score_unflipped": True} | changes
    return settings(cross_modality__flipped_clip=clip)


def write_recipe(path: Path, clip_folder: Path, **changes: Any) -> Recipe:
    content = with_clip(clip_folder, **changes)
    path.write_text(yaml.safe_dump(content))
    return parse_recipe(content, "test")


def centroids(*arguments: Any, recipe: str = "r.yaml", output: str = "tasks.npz") -> Result:
    given = [str(argument) for argument in arguments]
    return CliRunner().invoke(app, ["centroids", *given, "--recipe", recipe, "--output", output])


def done(*arguments: Any, **options: str) -> list[str]:
    result = centroids(*arguments, **options)
    assert result.exit_code == 0, result.output
    return result.stdout.splitlines()


# Centroids --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("unflipped", [True, False])
def test_enough_centroids_equal_the_embeddings_of_stage_2(place: Path, clip_folder: Path, unflipped: bool) -> None:
    made = write_recipe(place / "r.yaml", clip_folder, score_unflipped=unflipped)
    done("pets=pets")
    whole = whole_sample(caption="some caption")
    samples = tuple(dataclasses.replace(whole, pixels=decode(jpeg(seed=seed), 9999)[0]) for seed in range(7))
    handler = ClipHandler(made.cross_modality.flipped_clip, "cpu")
    (scored,) = handler.run_inference(SampleBatch(Shard("s", "", ""), 0, True, samples), handler.load_model())
    rows = [np.frombuffer(sample.annotation.embedding or b"", "<f2") for sample in scored]
    expected = {row.tobytes() for row in unit_rows(np.stack(rows))}
    found = load_raw(place / "tasks.npz")["pets"]
    assert len(found) == 7
    assert {row.tobytes() for row in found} == expected
    identity = load_tasks_model("tasks.npz")
    assert identity and identity["image"] == ("unflipped" if unflipped else "flipped")


def load_raw(path: Path) -> dict[str, np.ndarray]:
    with np.load(path, allow_pickle=False) as file:
        return {name: file[name] for name in file.files}


def test_fewer_centroids_are_the_means_of_k_means(place: Path) -> None:
    lines = done("pets=pets", "cars=cars", "--centroids-per-task", "3", "--json")
    assert [json.loads(line) for line in lines] == [
        {"name": name, "images": 7, "unreadable": 0, "centroids": 3} for name in ("pets", "cars")
    ]
    tasks = load_tasks("tasks.npz")
    assert {name: array.shape for name, array in tasks.items()} == {"pets": (3, 16), "cars": (3, 16)}
    done("pets=pets", output="all.npz")
    every = load_tasks("all.npz")["pets"]
    nearest = (every @ tasks["pets"].T).argmax(axis=1)
    assert set(nearest) == {0, 1, 2}
    for cluster in range(3):
        mean = every[nearest == cluster].sum(axis=0)
        assert tasks["pets"][cluster] == pytest.approx(mean / np.linalg.norm(mean), abs=1e-5)


def test_bytes_do_not_depend_on_the_names_of_images(place: Path) -> None:
    done("pets=pets", "cars=cars", "--centroids-per-task", "3")
    (place / "other").mkdir()
    images = sorted((place / "pets").iterdir(), key=lambda path: hashlib.sha256(path.read_bytes()).digest())
    for index, path in enumerate(images[:3]):
        shutil.copy(path, place / "other" / f"{9 - index}.jpg")
    tar = tar_bytes((f"k{index}.jpg", path.read_bytes()) for index, path in enumerate(images[3:]))
    (place / "other" / "0.tar").write_bytes(tar)
    done("cars=cars", "pets=other", "--centroids-per-task", "3", output="again.npz")
    assert (place / "again.npz").read_bytes() == (place / "tasks.npz").read_bytes()


def test_unreadable_image_is_named_and_counted(place: Path) -> None:
    (place / "pets" / "bad\x1b[1m.jpg").write_bytes(b"no jpeg")
    (place / "pets" / "readme.txt").write_bytes(b"hello")
    result = centroids("pets=pets", "cars=cars", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout.splitlines()[0]) == {"name": "pets", "images": 7, "unreadable": 1, "centroids": 7}
    (line,) = result.stderr.splitlines()
    assert line.startswith("pairsift: unreadable: pets/bad\\x1b[1m.jpg: the file is text; supported: JPEG")


def test_image_that_the_model_rejects_is_named_and_counted(place: Path) -> None:
    (place / "pets" / "thin.png").write_bytes(encode(picture(2000, 2), "PNG"))
    result = centroids("pets=pets")
    assert result.exit_code == 0, result.output
    assert "pets: 7 images, 1 unreadable, 7 centroids" in result.stdout
    assert "pets/thin.png: flipped_clip: ValueError: 2000 x 2 pixels" in result.stderr


def test_real_digits_are_closest_to_their_own_centroid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the bundled CLIP, MNIST and a shipped recipe, which accepts the resulting file."""
    if not MNIST.is_dir():
        pytest.skip("MNIST is not at hand")
    monkeypatch.chdir(tmp_path)
    for digit in "01":
        (tmp_path / digit).mkdir()
        for path in sorted(MNIST.glob(f"{digit}_*.png")):
            shutil.copy(path, tmp_path / digit)
    lines = done("zero=0", "one=1", "--centroids-per-task", "1", recipe=str(DEMO_RECIPE))
    assert lines[:2] == ["zero: 50 images, 0 unreadable, 1 centroids", "one: 50 images, 0 unreadable, 1 centroids"]
    done("zero=0", "one=1", "--centroids-per-task", "99", recipe=str(DEMO_RECIPE), output="all.npz")
    means, every = load_tasks("tasks.npz"), load_tasks("all.npz")
    right = sum(((every[a] @ (means[a] - means[b]).T) > 0).sum() for a, b in (("zero", "one"), ("one", "zero")))
    assert right >= 90
    identities(recipe(distribution_alignment__cids__tasks="tasks.npz"))


# Wrong use and errors ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["pets"], "pets: allowed: NAME=IMAGES"),
        (["pets="], "pets=: allowed: NAME=IMAGES"),
        (["=pets"], "=pets: the name '': allowed"),
        (["__model__=pets"], "__model__=pets: the name '__model__': allowed"),
        (["a/b=pets"], "a/b=pets: the name 'a/b': allowed"),
        (["pets=pets", "pets=cars"], "pets=cars: the name pets is used twice"),
        (["pets=nowhere"], "nowhere: contains no files"),
        (["pets=foo://x"], "foo:// is not supported"),
        (["pets=pets", "--centroids-per-task", "0"], "Invalid value"),
        (["pets=pets", "--tfio-python", "nowhere/python"], "--tfio-python: nowhere/python: is not a program"),
        ([], "Missing argument"),
    ],
)
def test_wrong_use(place: Path, arguments: list[str], message: str) -> None:
    result = centroids(*arguments)
    assert result.exit_code == 2, result.output
    assert message in " ".join(result.output.split())
    assert not (place / "tasks.npz").exists()


def test_invalid_output_or_recipe(place: Path) -> None:
    assert centroids("pets=pets", output="pets").exit_code == 2
    assert centroids("pets=pets", output="").exit_code == 2
    assert centroids("pets=pets", recipe="nowhere.yaml").exit_code == 2
    write_recipe(place / "r.yaml", place / "nowhere")
    result = centroids("pets=pets")
    assert result.exit_code == 2
    assert "flipped_clip.model" in result.output


def test_missing_gpu(place: Path, clip_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    content = with_clip(clip_folder)
    content["cross_modality"]["device"] = "cuda"
    (place / "r.yaml").write_text(yaml.safe_dump(content))
    result = centroids("pets=pets")
    assert result.exit_code == 2
    assert "cross_modality.device is cuda" in result.output


def test_task_without_a_readable_image_is_an_error(place: Path) -> None:
    (place / "none").mkdir()
    (place / "none" / "a.jpg").write_bytes(b"x")
    result = centroids("pets=pets", "none=none")
    assert result.exit_code == 1
    assert "none: none of its 1 images can be read" in result.stderr
    assert not (place / "tasks.npz").exists()


def test_file_for_tensorflow_io_is_an_error_without_it(place: Path) -> None:
    (place / "pets" / "scan").write_bytes(b"\0" * 128 + b"DICM")
    result = centroids("pets=pets")
    assert result.exit_code == 1
    assert "pets/scan: is a DICOM file" in result.stderr
    assert "constraints-tfio.txt" in result.stderr
    assert not (place / "tasks.npz").exists()


def test_gpu_with_too_little_memory(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def too_much(*_: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(LoadedClip, "score", too_much)
    result = centroids("pets=pets")
    assert result.exit_code == 1
    assert "too small for flipped_clip.batch_size 4; reduce it in the recipe" in " ".join(result.stderr.split())


@pytest.mark.parametrize("name", ["file", "allow_pickle", "arr_0", "x-1"])
def test_every_allowed_name_can_be_read_back(tmp_path: Path, name: str) -> None:
    write_tasks(str(tmp_path / "t.npz"), {name: np.eye(2, dtype=np.float32)}, {})
    assert load_tasks(str(tmp_path / "t.npz"))[name].tolist() == [[1, 0], [0, 1]]


# Model checks -----------------------------------------------------------------------------------------------------


def other_weights(folder: Path) -> None:
    weights = folder / "open_clip_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)


def other_activation(folder: Path) -> None:
    path = folder / "open_clip_config.json"
    config = json.loads(path.read_text())
    config["model_cfg"]["quick_gelu"] = True
    path.write_text(json.dumps(config))


def other_mean(folder: Path) -> None:
    path = folder / "open_clip_config.json"
    config = json.loads(path.read_text())
    config["preprocess_cfg"]["mean"] = [0.4, 0.5, 0.5]
    path.write_text(json.dumps(config))


def nothing(folder: Path) -> None:
    """Return a copy of the model in another folder."""


@pytest.mark.parametrize(
    ("change", "options", "named"),
    [
        (other_weights, {}, "weights_sha256"), (other_activation, {}, "image_tower"), (other_mean, {}, "preprocessing"),
        (nothing, {"score_unflipped": False}, "image"), (nothing, {"batch_size": 64, "min": 0.3}, None),
    ],
)  # fmt: skip
def test_recipe_with_another_model_is_refused_at_start(
    place: Path, clip_folder: Path, change: Callable[[Path], None], options: dict[str, Any], named: str | None
) -> None:
    done("pets=pets", "cars=cars")
    shutil.copytree(clip_folder, place / "other")
    change(place / "other")
    content = with_clip(place / "other", **options)
    content["distribution_alignment"]["cids"]["tasks"] = "tasks.npz"
    if named is None:
        identities(parse_recipe(content, "test"))
        return
    (place / "run.yaml").write_text(yaml.safe_dump(content))
    write_pool(place / "pool", {"a.tar": []})
    result = CliRunner().invoke(app, ["run", "run.yaml", "--input", "pool", "--output", "out"])
    assert result.exit_code == 2, result.output
    said = " ".join(result.stderr.split())
    assert f"tasks.npz: its embeddings (model {json.dumps(str(clip_folder))}, {named} " in said
    assert f"are not those of the recipe (model {json.dumps(str(place / 'other'))}, {named} " in said
    assert "pairsift centroids cars=IMAGES pets=IMAGES --recipe RECIPE --output tasks.npz" in said
    assert not (place / "out").exists()


def test_bundled_tasks_require_the_bundled_model(clip_folder: Path) -> None:
    identities(recipe())
    with pytest.raises(ValueError, match="bundled:tasks: its embeddings"):
        identities(parse_recipe(with_clip(clip_folder), "test"))


def test_file_without_a_model_is_accepted_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    np.savez(tmp_path / "own.npz", digits=np.eye(128, dtype=np.float32)[:3])
    with caplog.at_level(logging.WARNING):
        identities(recipe(distribution_alignment__cids={"tasks": str(tmp_path / "own.npz")}))
    assert "own.npz: does not name its model" in caplog.text


@pytest.mark.parametrize("model", ["", "{", "[]", "{}", "3a98", "[" * 100_000])
def test_invalid_model_entry(tmp_path: Path, model: str) -> None:
    np.savez(tmp_path / "t.npz", a=np.eye(2, dtype=np.float32), __model__=np.array(model))
    with pytest.raises(ValueError, match=r"t\.npz: __model__: "):
        load_tasks_model(str(tmp_path / "t.npz"))


def test_weights_without_a_hash_are_distinguished_by_name() -> None:
    identity = load_tasks_model("bundled:tasks")
    assert identity
    remote = identity | {"weights_sha256": []}
    assert differences(identity, remote | {"precision": "bf16"}) == []
    assert differences(identity, remote | {"revision": "1234"}) == ["revision"]
    assert differences(identity, remote | {"model": "ViT-L-14", "weights": "openai"}) == ["model", "weights"]
    assert differences(identity, identity | {"model": "/models/clip"}) == []
