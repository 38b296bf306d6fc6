"""The figures of the committed sets of captions. A changed default that changes one of them fails here, and for the
rules on images in the other files of this folder.

To accept new figures, write what the failing test prints to benchmarks/rules/sets/expected.json, and the tables of the
docs anew.
"""

import json

import pytest

from benchmarks.rules import captions
from benchmarks.rules.__main__ import MEASUREMENTS, main, table
from benchmarks.rules.captions import cut, held_out
from benchmarks.rules.figures import SETS, Figure, Sources

EXPECTED = json.loads((SETS / "expected.json").read_text())


@pytest.mark.parametrize("rule", sorted(EXPECTED))
def test_figures_of_the_committed_sets(rule, tmp_path):
    found = MEASUREMENTS[rule](Sources(data=tmp_path))
    counts = {f"{f.set_name}: {f.question}": [f.count, f.of] for f in found if not f.missing}
    print(json.dumps({rule: counts}, indent=2))
    assert counts == EXPECTED[rule]


@pytest.mark.parametrize("rule", sorted(EXPECTED))
def test_an_absent_set_is_reported(rule, tmp_path):
    missing = [figure for figure in MEASUREMENTS[rule](Sources(data=tmp_path)) if figure.missing]
    assert all("not measured" in figure.cells()[3] for figure in missing)


def test_every_caption_is_labelled_once():
    for name, least in (("language_captions.tsv", 600), ("pattern_captions.tsv", 350)):
        header, *rows = (SETS / name).read_text("utf-8").splitlines()
        fields = [row.split("\t") for row in rows]
        assert {len(row) for row in fields} == {len(header.split("\t"))} == {3}
        assert len(set(rows)) == len(rows) >= least
    labels = {row.split("\t")[1] for row in (SETS / "pattern_captions.tsv").read_text("utf-8").splitlines()[1:]}
    assert labels == {"yes", "no"}


def test_labels_by_hash_meet_their_captions(monkeypatch):
    rows = [{"caption_sha256": captions.sha256("a dog")[:16], "label": "yes"}]
    monkeypatch.setattr(captions, "table", lambda name: rows)
    assert captions.by_hash(["a cat", "a dog"], "any", "label") == {"a dog": "yes"}


def test_halves_depend_on_the_caption_alone():
    captions = [f"caption {i}" for i in range(1000)]
    half = held_out(captions)
    assert 400 < len(half) < 600
    assert set(held_out(reversed(captions))) == set(half)
    assert held_out([half[0], half[0]]) == [half[0]]


def test_cut_keeps_the_first_words_of_longer_captions():
    assert cut(["a dog runs", "a dog sleeps", "a dog"], 2) == ["a dog"]


def test_table_and_json(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["rules", "--rule", "pos_pattern", "--data", str(tmp_path), "--json"])
    main()
    *lines, last = capsys.readouterr().out.splitlines()
    figures = [Figure(**row) for row in json.loads(last)]
    assert lines == table([figure.cells() for figure in figures]).splitlines()


def test_the_data_folder_may_hold_more_captions(tmp_path):
    folder = tmp_path / "captions"
    folder.mkdir()
    (folder / "de.mine.txt").write_text("\n".join(f"Ein Hund läuft durch den Garten {i}" for i in range(40)))
    found = {figure.set_name: figure for figure in MEASUREMENTS["language"](Sources(data=tmp_path))}
    assert found["mine (de)"].of > 5
    assert found["mine (de)"].count == 0
