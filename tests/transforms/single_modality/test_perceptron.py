"""The tagger on arrays gives the tags of NLTK's, its oracle."""

import importlib.resources
import tarfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from nltk.tag.perceptron import PerceptronTagger

from transforms.core.plain_text import plain_text
from transforms.single_modality import pos_pattern
from transforms.single_modality.perceptron import ArrayPerceptron

POOL = Path(str(importlib.resources.files("pipeline") / "demo" / "pool"))
NLTK_TAGGER = pos_pattern.load_tagger("bundled")[0]
TAGGER = ArrayPerceptron(NLTK_TAGGER)


def demo_captions() -> list[str]:
    found = []
    for path in sorted(POOL.glob("*.tar")):
        with tarfile.open(path) as tar:
            texts = (tar.extractfile(member) for member in tar if member.name.endswith(".txt"))
            found += [text.read().decode("utf-8", "replace") for text in texts if text]
    return found


def test_the_demos_captions_have_nltks_tags() -> None:
    captions = demo_captions()
    assert len(captions) > 1000
    for caption in captions:
        words = pos_pattern.words_of(plain_text(caption), 64)
        assert TAGGER.tag(words) == NLTK_TAGGER.tag(words), caption


# Words that NLTK treats specially, words of the model, and any others.
WORDS = st.one_of(
    st.sampled_from(["2004", "17", "3d", "-", "-x", "well-known", "the", "dog", "running", "!YEAR", "", " ", "''"]),
    st.text(max_size=8),
)


@given(st.lists(WORDS, max_size=12))
def test_any_words_have_nltks_tags(words: list[str]) -> None:
    assert TAGGER.tag(words) == NLTK_TAGGER.tag(words)


def test_equal_scores_go_to_the_last_tag_of_the_alphabet() -> None:
    tagger = PerceptronTagger(load=False)
    tagger.model.weights = {"bias": {"NN": 0.5, "VB": 0.5, "DT": 0.25}}
    tagger.classes = tagger.model.classes = {"NN", "VB", "DT"}
    assert ArrayPerceptron(tagger).tag(["x"]) == tagger.tag(["x"]) == [("x", "VB")]


@pytest.mark.parametrize("weights", [{}, {"bias": {}}])
def test_words_without_weights(weights: dict[str, dict[str, float]]) -> None:
    tagger = PerceptronTagger(load=False)
    tagger.model.weights = weights
    tagger.classes = tagger.model.classes = {"NN", "VB"}
    assert ArrayPerceptron(tagger).tag(["x"]) == tagger.tag(["x"])
