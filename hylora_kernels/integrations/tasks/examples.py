"""The examples of the three small tasks, written by this file: the same on every machine, no
download.

They are for trying what compression costs which kind of work. A hundred examples have a standard
error of up to 5 points, so they tell a large loss from none, not two good models apart, and their
numbers are not those of any published benchmark.
"""

from __future__ import annotations

import random
from itertools import combinations, product
from typing import Any

from datasets import Dataset

COUNT = 100  # Examples of a task, beside those for few-shot prompts.
SHOTS = 8

THINGS = ("film", "meal", "hotel", "book", "concert", "trip", "lesson", "game")
GOOD = (
    *("wonderful", "brilliant", "delightful", "charming", "superb"),
    *("excellent", "lovely", "inspiring", "perfect", "fantastic"),
)
BAD = (
    *("terrible", "boring", "awful", "disappointing", "dreadful"),
    *("horrible", "miserable", "dull", "annoying", "unpleasant"),
)
# Verb and past tense; most are irregular.
PAST = """
ask asked, begin began, break broke, bring brought, build built, buy bought, call called, catch
caught, choose chose, clean cleaned, climb climbed, close closed, cook cooked, cry cried, dance
danced, draw drew, drink drank, drive drove, drop dropped, eat ate, fall fell, feel felt, fight
fought, find found, finish finished, fly flew, forget forgot, forgive forgave, freeze froze, give
gave, go went, grow grew, hear heard, help helped, hide hid, hold held, jump jumped, keep kept, know
knew, laugh laughed, learn learned, leave left, like liked, listen listened, lose lost, love loved,
make made, meet met, move moved, open opened, paint painted, pay paid, plan planned, play played,
promise promised, run ran, say said, see saw, sell sold, send sent, shake shook, shout shouted, sing
sang, sit sat, sleep slept, smile smiled, speak spoke, spend spent, stand stood, start started,
steal stole, stop stopped, study studied, swim swam, take took, talk talked, teach taught, tell
told, think thought, throw threw, touch touched, travel traveled, try tried, turn turned,
understand understood, visit visited, wait waited, wake woke, walk walked, want wanted, wash washed,
watch watched, wear wore, win won, wish wished, work worked, write wrote
"""
NAMES = ("Ann", "Ben", "Cara", "Dan", "Eve", "Finn", "Gina", "Hugo")


def classification(**_metadata: Any) -> dict[str, Dataset]:
    """Which feeling a sentence has: text, label 0 (negative) or 1 (positive)."""
    found = [
        {"text": f"The {thing} was {one} and {two}.", "label": label}
        for label, words in enumerate((BAD, GOOD))
        for thing, (one, two) in product(THINGS, combinations(words, 2))
    ]
    return _split(found)


def generation(**_metadata: Any) -> dict[str, Dataset]:
    """The past tense of a verb, to be written out: verb, past."""
    pairs = (pair.split() for pair in PAST.split(","))
    return _split([{"verb": verb, "past": past} for verb, past in pairs])


def reasoning(**_metadata: Any) -> dict[str, Dataset]:
    """The next number of a series, or the oldest of three people: question, choices, label."""
    draw = random.Random(0)
    found = []
    for start, step in product(range(1, 9), range(2, 11)):
        *series, answer = (start + step * place for place in range(5))
        wrong = draw.sample([answer + off for off in sorted({-2, -1, 1, 2, step})], 3)
        found.append(_question(draw, f"{', '.join(map(str, series))},", answer, wrong))
    for _ in range(40):
        old, middle, young = draw.sample(NAMES, 3)
        facts = [f"{old} is older than {middle}.", f"{middle} is older than {young}."]
        draw.shuffle(facts)
        found.append(_question(draw, f"{' '.join(facts)} The oldest is", old, [middle, young]))
    return _split(found)


def _question(
    draw: random.Random, question: str, answer: object, wrong: list[Any]
) -> dict[str, Any]:
    choices = [str(answer), *map(str, wrong)]
    draw.shuffle(choices)
    return {"question": question, "choices": choices, "label": choices.index(str(answer))}


def _split(found: list[dict[str, Any]]) -> dict[str, Dataset]:
    """COUNT examples to measure on and SHOTS others to show."""
    random.Random(0).shuffle(found)
    return {
        "test": Dataset.from_list(found[SHOTS : SHOTS + COUNT]),
        "train": Dataset.from_list(found[:SHOTS]),
    }
