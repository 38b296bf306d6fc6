"""`reshard` finds in every layout of a pool what the run judged: the same samples, uids and files."""

from __future__ import annotations

import json
from pathlib import Path

from pipeline.sources.pool import list_shards
from pipeline.sources.webdataset import read_samples
from tests.helpers import BOUNDS, Members, jpeg, sample_members, uid, write_pool
from tests.pipeline.reshard.test_reshard import finished_run, members, run_reshard, tars
from transforms.core.records import Sample


def layouts() -> dict[str, Members]:
    """Return tars by name: members apart, dotted keys, other names, captions in the json, and img2dataset's."""
    whole = [file for n in range(4) for file in sample_members(f"k{n}", f"c{n}", n, {"uid": uid(n)})]
    captions = {"captions": ["a dog", "ein Häschen"], "uid": uid(90)}
    return {
        "a.tar": sorted(whole, key=lambda file: (file[0].rpartition(".")[2], file[0])),
        "b.tar": [file for key in ("22.05", "22.10") for file in sample_members(key, key, 5)],
        "c.tar": [("k.image.PNG", jpeg(seed=6)), ("k.caption.txt", b"c"), ("l.jpg", jpeg(seed=7)), ("l.cap", b"l")],
        "d.tar": [("k.jpg", jpeg(seed=8)), ("k.json", json.dumps(captions).encode())],
        "e.tar": sample_members("k", metadata={"uid": uid(91)}),
    }


def test_every_layout_is_written_as_image_txt_and_json(tmp_path: Path) -> None:
    write_pool(tmp_path / "pool", layouts())
    finished_run(tmp_path / "out", tmp_path / "pool", lambda uid_: 1)
    run_reshard(tmp_path / "out", tmp_path / "pool", tmp_path / "tars")
    written = {name: file for tar in tars(tmp_path / "tars") for name, file in members(tmp_path / "tars" / tar).items()}
    samples = [
        sample
        for shard in list_shards(str(tmp_path / "pool"))
        for sample in read_samples(shard, BOUNDS, "test")
        if isinstance(sample, Sample)
    ]
    assert len(samples) == 4 + 2 + 2 + 2 + 1
    for sample in samples:
        key, extension = f"{sample.annotation.uid}-0", "png" if sample.annotation.caption == "c" else "jpg"
        assert written.pop(f"{key}.{extension}") == sample.image_bytes
        assert written.pop(f"{key}.txt").decode() == sample.annotation.caption
        if sample.metadata.get("uid"):
            assert json.loads(written.pop(f"{key}.json"))["uid"] == sample.metadata["uid"]
    assert {name.partition(".")[2] for name in written} <= {"json"}  # of those that have one without a uid
