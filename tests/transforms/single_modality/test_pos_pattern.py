"""The bundled tagger, and the predicate over its tags."""

import json

import nltk.data
import pytest
from nltk.tag.perceptron import PerceptronTagger

from transforms.single_modality import pos_pattern
from transforms.single_modality.pos_pattern import keeps, tag_caption, words_of


@pytest.fixture(scope="module")
def tagger():
    return pos_pattern.load_tagger("bundled")[0]


@pytest.fixture
def no_nltk_data(monkeypatch):
    monkeypatch.setattr(nltk.data, "path", [])


# keeps


@pytest.mark.parametrize(
    ("tags", "kept"),
    [
        ("DT NN", True),
        ("JJ NNS", True),
        ("NNP NNP NN", True),
        ("NNP NNP", False),
        ("NNPS", False),
        ("NNP , NNP CD", False),
        ("CD CD SYM", False),
        ("VB RB", False),  # neither a noun nor only names
        ("", False),
    ],
)
def test_default_pattern(tags, kept):
    assert keeps(tags) == kept


def test_any_of_needs_one_of_its_tags():
    assert keeps("VBG RB", any_of=["VB", "VBG"])
    assert not keeps("VBG RB", any_of=["VB"])
    assert keeps("VBG RB", any_of=[])  # no tag asked for


def test_only_of_drops_captions_with_only_these_tags():
    names = {"any_of": ["NN", "NNP"]}
    assert not keeps("NNP CD", **names)
    assert keeps("NNP CD VBZ", **names)
    assert keeps("NNP CD", **names, only_of=["NNP"])
    assert keeps("NNP CD", **names, only_of=[])
    assert not keeps("", any_of=[], only_of=[])


def test_default_tags_are_penn_tags():
    assert pos_pattern.PENN_TAGS.issuperset(pos_pattern.COMMON_NOUNS)
    assert pos_pattern.PENN_TAGS.issuperset(pos_pattern.NAMES_NUMBERS_SYMBOLS)
    assert not set(pos_pattern.COMMON_NOUNS) & set(pos_pattern.NAMES_NUMBERS_SYMBOLS)


# words_of


def test_tokens_are_penn_treebank_ones():
    assert words_of("A dog's ball (red), isn't it?", 99) == [
        "A", "dog", "'s", "ball", "(", "red", ")", ",", "is", "n't", "it", "?",
    ]  # fmt: skip
    assert words_of(" \n\t", 9) == []


def test_only_the_first_words_count(tagger):
    caption = "Maria Rossi 2004 beside a large dog"
    assert words_of(caption, 3) == ["Maria", "Rossi", "2004"]
    assert tag_caption(tagger, caption, 3).split() == tag_caption(tagger, caption, 99).split()[:3]
    assert not keeps(tag_caption(tagger, caption, 3))
    assert keeps(tag_caption(tagger, caption, 99))


def test_a_hostile_caption_costs_little(tagger):
    assert len(tag_caption(tagger, "(a) " * 500_000, 64).split()) == 64
    assert len(tag_caption(tagger, "(" * 100_000, 64).split()) == 64


# the bundled tagger


@pytest.mark.parametrize(
    "caption",
    [
        "a red car parked outside a house",
        "two dogs running on the beach",
        "Sunset over the ocean",
        "A Black Cat Sleeping on a Chair",
        "clip art of a teapot with flowers, kitchen",
        "photograph of Maria Rossi in 2004",
        "Map of Southeast Asia.",
        "Large Telescope Mirror.",
        "Statue of Liberty",
        "Crab Nebula",
        "Grilled Salmon & Asparagus",
        "Maine Coon Kitten",
        "Chinese President Xi Jinping speaks.",
    ],
)
def test_captions_that_name_things_are_kept(tagger, caption):
    assert keeps(tag_caption(tagger, caption, 64))


@pytest.mark.parametrize(
    "caption",
    [
        "Maria Rossi 2004",
        "John Smith, Anna Berg",
        "Abraham Lincoln",
        "Paris 1998",
        "George Bush",  # a noun that is also a name
        "George W. Bush & Tony Blair",
        "Galileo Galilei (1564–1642).",
        "12 34 56",
        "2004 - 2005 (11)",
        "!!! ... ???",
        "",
    ],
)
def test_captions_of_names_numbers_and_symbols_are_dropped(tagger, caption):
    assert not keeps(tag_caption(tagger, caption, 64))


@pytest.mark.parametrize("caption", ["brown leather sofa", "old man reading", "Maria Rossi 2004", "Abraham Lincoln"])
def test_letter_case_changes_nothing(tagger, caption):
    found = {tag_caption(tagger, variant(caption), 64) for variant in (str, str.lower, str.upper, str.title)}
    assert len(found) == 1


def test_html_and_marks_are_no_words(tagger):
    assert tag_caption(tagger, "\ufeff<p>a&nbsp;dog</p>", 9) == tag_caption(tagger, "a dog", 9) == "DT NN"


def test_tags_by_context(tagger):
    assert tag_caption(tagger, "a dog", 9) == "DT NN"
    assert tag_caption(tagger, "the dogs are running", 9) == "DT NNS VBP VBG"
    assert tag_caption(tagger, "three large houses", 9) == "CD JJ NNS"


def test_the_bundle_is_small_and_says_penn_tags_only(tagger):
    files = list(pos_pattern.BUNDLED.glob("*.json"))
    assert len(files) == 3
    assert sum(file.stat().st_size for file in files) <= 3_000_000
    assert pos_pattern.PENN_TAGS.issuperset(tagger.classes)


# load_tagger


def test_auto_is_the_bundled_tagger_without_nltk_data(no_nltk_data, tagger):
    found, source = pos_pattern.load_tagger("auto")
    assert source == "bundled"
    assert pos_pattern.fingerprint(found) == pos_pattern.fingerprint(tagger)


def test_nltk_without_data_is_an_error(no_nltk_data):
    with pytest.raises(LookupError):
        pos_pattern.load_tagger("nltk")


def test_an_unknown_source_is_named():
    with pytest.raises(ValueError, match=r"'spacy'.*auto, nltk, bundled"):
        pos_pattern.load_tagger("spacy")


def test_nltk_data_on_the_machine_are_preferred(tmp_path, monkeypatch, tagger):
    folder = tmp_path / "taggers" / "averaged_perceptron_tagger_eng"
    folder.mkdir(parents=True)
    names = PerceptronTagger(load=False).param_files("eng")
    for name, value in zip(names, ({}, {"dog": "UH"}, ["UH"]), strict=True):
        (folder / name).write_text(json.dumps(value))
    monkeypatch.setattr(nltk.data, "path", [str(tmp_path)])
    found, source = pos_pattern.load_tagger("auto")
    assert source == "nltk"
    assert tag_caption(found, "dog", 9) == "UH"
    assert pos_pattern.fingerprint(found) != pos_pattern.fingerprint(tagger)
    assert pos_pattern.load_tagger("nltk")[1] == "nltk"
    assert pos_pattern.load_tagger("bundled")[1] == "bundled"


def test_nltk_itself_can_read_the_bundle(tmp_path, monkeypatch, tagger):
    folder = tmp_path / "taggers" / "averaged_perceptron_tagger_eng"
    folder.mkdir(parents=True)
    for file in pos_pattern.BUNDLED.glob("*.json"):
        (folder / file.name).write_bytes(file.read_bytes())
    monkeypatch.setattr(nltk.data, "path", [str(tmp_path)])
    assert pos_pattern.fingerprint(PerceptronTagger()) == pos_pattern.fingerprint(tagger)
