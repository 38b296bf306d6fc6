"""The gains of words in wordfreq's lists."""

import pytest

from transforms.single_modality import word_lists


@pytest.fixture(scope="module")
def lists():
    return word_lists.load()


def test_a_frequent_word_has_a_high_gain(lists):
    gains, words = lists.evidence("the")
    assert words == 1
    assert gains["en"] == pytest.approx(5.2, abs=0.1)  # once in 20 words, against 10^-6.5
    assert gains["en"] > gains["de"] + 1


def test_gains_add_up(lists):
    both, words = lists.evidence("the dog, the dog")
    the, dog = lists.evidence("the")[0], lists.evidence("dog")[0]
    assert words == 4
    assert both["en"] == pytest.approx(2 * (the["en"] + dog["en"]))


def test_unknown_words_and_numbers_tell_nothing(lists):
    gains, words = lists.evidence("xqzvkj 1984 _ !?")
    assert words == 1
    assert set(gains.values()) == {0.0}


@pytest.mark.parametrize(("word", "label"), [("người", "vi"), ("dívka", "cs"), ("straße", "de"), ("çocuk", "tr")])
def test_diacritics_may_be_missing(lists, word, label):
    plain = word.upper().casefold()
    bare = word_lists.without_marks(plain)
    assert bare != plain or word == "straße"
    assert lists.evidence(plain)[0][label] > 1
    assert lists.evidence(bare)[0][label] > 1


def test_marks_of_vietnamese_and_others_are_removed():
    assert word_lists.without_marks("đường phố, smørrebrød, żółw, kız") == "duong pho, smorrebrod, zolw, kiz"


def test_the_fingerprint_depends_on_what_is_taken_of_the_lists(monkeypatch):
    before = word_lists.fingerprint()
    monkeypatch.setattr(word_lists, "LEAST_FREQUENT", 400)
    assert word_lists.fingerprint() != before
