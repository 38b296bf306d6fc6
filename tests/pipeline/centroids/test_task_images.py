"""Tests of reading the images of tasks: which files are images, and that a bad image affects no other."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.centroids.images import NoImages, Picture, Unreadable, list_images, read_images
from pipeline.decoding.tfio_decoder import NoTfio, TfioDecoder
from tests.helpers import BOUNDS, encode, jpeg, member, picture, tar_bytes
from tests.pipeline.decoding import fake_tfio

NO_TFIO = TfioDecoder(None, BOUNDS.max_image_pixels)


def write(folder: Path, **contents: bytes) -> Path:
    """Write files; in their names, `__` stands for `/` and `_` for a dot."""
    for name, content in contents.items():
        path = folder / name.replace("__", "/").replace("_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return folder


def read(path: Path, decoder: TfioDecoder = NO_TFIO, **bounds: int) -> dict[str, Picture | Unreadable]:
    """Return the pictures under a path, by their name relative to it."""
    found = list(read_images(list_images(str(path)), BOUNDS.model_copy(update=bounds), decoder))
    by_name = {one.name.removeprefix(f"{path}/"): one for one in found}
    assert len(by_name) == len(found)
    return by_name


def tiff(*pages: Image.Image, **options: str) -> bytes:
    out = io.BytesIO()
    pages[0].save(out, "TIFF", save_all=True, append_images=pages[1:], **options)
    return out.getvalue()


def jp2() -> bytes:
    return encode(picture(), "JPEG2000", irreversible=False)


def dicom(*words: str) -> bytes:
    return b"\0" * 128 + b"DICM" + " ".join(words).encode()


def test_images_are_recognized_by_name_or_content(tmp_path: Path) -> None:
    formats = {"a_jpg": "JPEG", "b_png": "PNG", "c_webp": "WEBP", "d_bmp": "BMP", "e_gif": "GIF", "f_ppm": "PPM"}
    contents = {name: encode(picture(seed=1), format_) for name, format_ in formats.items()}
    write(tmp_path, deep__er__g_tif=tiff(picture(seed=1)), noextension=jpeg(), wrong_txt=encode(picture(), "PNG"))
    write(tmp_path, **contents)
    write(tmp_path, labels_csv=b"name,class\n", README=b"P5 is no picture here", _hidden_jpg=jpeg(), empty=b"")
    found = read(tmp_path)
    assert list(found) == sorted(
        ["a.jpg", "b.png", "c.webp", "d.bmp", "e.gif", "f.ppm", "deep/er/g.tif", "noextension", "wrong.txt"]
    )
    for name in ("b.png", "d.bmp", "f.ppm", "deep/er/g.tif"):  # the lossless ones
        one = found[name]
        assert isinstance(one, Picture)
        assert (one.pixels == np.asarray(picture(seed=1))).all()


def test_bad_image_is_reported_and_affects_no_other(tmp_path: Path) -> None:
    write(tmp_path, a_jpg=jpeg(), b_jpg=jpeg()[:400], c_png=b"", d_avif=b"x", e_tif=tiff(picture(), picture())[:2000])
    write(tmp_path, f_jpg=jpeg(300, 200), g_jpg=jpeg() + b"\0" * 9000)
    write(tmp_path, h_bin=dicom("1") + b" " * 9000, i_csv=b" " * 9000)
    write(tmp_path, j_tif=encode(Image.fromarray(np.ones((9, 9), np.float32)), "TIFF"), z_jpg=jpeg(seed=2))
    (tmp_path / "k.jpg").symlink_to("nowhere")
    found = read(tmp_path, max_image_bytes=9000, max_image_pixels=96 * 64)
    messages = {name: one.message for name, one in found.items() if isinstance(one, Unreadable)}
    assert [name for name in found if name not in messages] == ["a.jpg", "z.jpg"]
    for name, message in {
        "b.jpg": "Truncated", "c.png": "the file is empty", "d.avif": "the file is text", "e.tif": "Missing dimensions",
        "f.jpg": "300x200 px; the recipe allows 6144", "g.jpg": "pool.max_image_bytes 9000",
        "h.bin": "pool.max_image_bytes 9000", "j.tif": "32-bit samples",
    }.items():  # fmt: skip
        assert message in messages.pop(name), name
    assert messages.keys() <= {"k.jpg"}  # a dangling link may be listed


def test_tars_are_streamed(tmp_path: Path) -> None:
    members: list[tuple[str, bytes] | tarfile.TarInfo] = [
        ("a.jpg", jpeg()), ("a.txt", b"a dog"), ("a.json", b"{}"), ("a.cls", b"3"),
        member("b.jpg", b"2", "a.jpg"), member("b.txt", b"2", "a.txt"),
        ("sub/c.png", b"no png"), ("._d.jpg", b"x"), ("e.dcm", dicom("5")),
    ]  # fmt: skip
    write(tmp_path, x__1_tar=tar_bytes(members), x__2_jpg=jpeg(seed=2))
    python, _ = fake_tfio.install(tmp_path)
    with TfioDecoder(python, 100) as decoder:
        folder, alone = read(tmp_path / "x", decoder), read(tmp_path / "x" / "1.tar", decoder)
    assert list(folder) == ["1.tar/a.jpg", "1.tar/b.jpg", "1.tar/sub/c.png", "1.tar/e.dcm", "2.jpg"]
    assert list(alone) == ["a.jpg", "b.jpg", "sub/c.png", "e.dcm"]
    assert isinstance(folder["1.tar/b.jpg"], Unreadable) and isinstance(folder["1.tar/sub/c.png"], Unreadable)
    assert isinstance(folder["1.tar/e.dcm"], Picture)


def test_damaged_tar_yields_the_pictures_before_the_damage(tmp_path: Path) -> None:
    content = tar_bytes([("a.jpg", jpeg()), ("b.jpg", jpeg(seed=1)), ("c.jpg", jpeg(seed=2))])
    second = content.index(b"b.jpg")
    write(tmp_path, a_tar=content[: second + 700], b_jpg=jpeg(seed=3))
    found = read(tmp_path)
    assert [type(one) for one in found.values()] == [Picture, Unreadable, Picture]
    broken = found["a.tar"]
    assert isinstance(broken, Unreadable)
    assert f"at byte {second}" in broken.message


def test_identity_depends_only_on_content(tmp_path: Path) -> None:
    write(tmp_path, a_jpg=jpeg(), b_jpg=jpeg(), c_jpg=jpeg(seed=1), d_tar=tar_bytes([("k.jpg", jpeg())]))
    found = [one.identity for one in read(tmp_path).values() if isinstance(one, Picture)]
    assert found[0] == found[1] == found[3] != found[2]


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (tiff(picture(), picture()), "a multi-page TIFF"), (jp2(), "a JPEG 2000 file"),
        (jp2()[jp2().index(b"\xff\x4f\xff\x51") :], "a JPEG 2000 file"), (dicom(), "a DICOM file"),
        (b"\x76\x2f\x31\x01", "an EXR file"),
    ],
)  # fmt: skip
def test_format_for_tensorflow_io_is_an_error_without_it(tmp_path: Path, content: bytes, kind: str) -> None:
    write(tmp_path, a_jpg=jpeg(), b_x=content)
    with pytest.raises(NoTfio, match=rf"b\.x: is {kind}, which Pillow cannot read; .*constraints-tfio\.txt"):
        read(tmp_path)


def test_every_page_is_a_picture_with_its_own_identity(tmp_path: Path) -> None:
    python, _ = fake_tfio.install(tmp_path)
    (tmp_path / "x").mkdir()
    pages = dicom("4", "refuse", "6", *["7"] * 9)
    write(tmp_path / "x", a_dcm=pages)
    with TfioDecoder(python, 100) as decoder:
        found = list(read_images(list_images(str(tmp_path / "x")), BOUNDS, decoder))
    pictures = [one for one in found if isinstance(one, Picture)]
    assert [int(one.pixels[0, 0, 0]) for one in pictures] == [4, 6] + [7] * 9
    identities = [one.identity for one in pictures]
    assert sorted(set(identities)) == identities
    (refused,) = (one for one in found if isinstance(one, Unreadable))
    assert refused.name.endswith("a.dcm, picture 1")


def test_files_are_sorted_and_folder_names_are_not_patterns(tmp_path: Path) -> None:
    write(tmp_path / "in [1]*", b_jpg=jpeg(), a_jpg=jpeg(seed=1), sub__c_jpg=jpeg(seed=2))
    write(tmp_path / "in 1x", other_jpg=jpeg())
    listed = [Path(file.path).name for file in list_images(f"{tmp_path}/in [1]*/")]
    assert listed == ["a.jpg", "b.jpg", "c.jpg"]


def test_no_images(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    write(tmp_path, note_txt=b"x")
    for name in ("nowhere", "nowhere.tar", "empty", "note.txt"):
        with pytest.raises(NoImages, match=f"{name}: contains no files"):
            list_images(str(tmp_path / name))


def test_unreadable_as_text_is_one_line_of_ascii() -> None:
    text = str(Unreadable("\x1b[31mü\udcff.jpg", "two\nlines"))
    assert text.isascii() and text.isprintable()


def test_missing_file_is_reported(tmp_path: Path) -> None:
    write(tmp_path, a_jpg=jpeg(), b_jpg=jpeg(seed=1))
    listed = list_images(str(tmp_path))
    (tmp_path / "a.jpg").unlink()
    gone, there = read_images(listed, BOUNDS, NO_TFIO)
    assert isinstance(gone, Unreadable) and "cannot be opened" in gone.message
    assert isinstance(there, Picture)
