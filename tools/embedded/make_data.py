"""Make spectune-tiny's task: from a record to a sentence. Seeded; the committed files are exactly its output.

    python tools/embedded/make_data.py src/spectune/embedded/data

Four kinds of record, each with fields some of which may be missing, and for each kind ten sentence plans or more. A
row's completion follows one plan; `references` of validation and test rows follow others too.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable
from pathlib import Path

SEED = 20261124
SIZES = {"train": 1200, "valid": 200, "test": 200}
REFERENCES = 4

Record = dict[str, str]
Plan = Callable[[Record], str | None]

FIRST = [
    "Anna",
    "Peter",
    "Mary",
    "John",
    "Clara",
    "Henry",
    "Ruth",
    "Paul",
    "Alice",
    "Frank",
    "Helen",
    "George",
    "Emma",
    "Arthur",
    "Jane",
    "Robert",
    "Sarah",
    "Edward",
    "Laura",
    "Walter",
]
LAST = [
    "Hill",
    "Brown",
    "Stone",
    "Wood",
    "Fisher",
    "Cole",
    "Marsh",
    "Reed",
    "Long",
    "Field",
    "Parker",
    "West",
    "King",
    "Ford",
    "Lane",
    "Moore",
]
JOBS = [
    "teacher",
    "doctor",
    "baker",
    "painter",
    "sailor",
    "judge",
    "farmer",
    "writer",
    "lawyer",
    "engineer",
    "soldier",
    "singer",
    "merchant",
    "printer",
]
TOWNS = [
    "London",
    "Paris",
    "Boston",
    "Dublin",
    "Chicago",
    "Rome",
    "Oxford",
    "Berlin",
    "Toronto",
    "Vienna",
    "York",
    "Madrid",
]
YEARS = [str(year) for year in range(1850, 1990)]
LIKES = ["music", "horses", "old books", "long walks", "the sea", "gardens", "chess", "poetry", "good food", "history"]
BUILDINGS = [
    "church",
    "bridge",
    "library",
    "school",
    "theatre",
    "tower",
    "museum",
    "station",
    "hospital",
    "market hall",
]
BUILDING_NAMES = [
    "Saint Mary",
    "Queen Anne",
    "King Street",
    "Old River",
    "North Gate",
    "Green Park",
    "Victoria",
    "Castle Hill",
]
MATERIALS = ["stone", "brick", "wood", "iron", "glass", "marble"]
COLOURS = ["white", "red", "grey", "green", "black", "yellow"]
BOOKS = [
    "The Long Road",
    "A Winter Journey",
    "The Silent House",
    "Over the Hills",
    "The Last Ship",
    "Two Brothers",
    "The Garden Wall",
    "Night and Morning",
    "The Old Judge",
    "A Life at Sea",
]
GENRES = ["novel", "play", "poem", "history", "travel book", "biography"]
SUBJECTS = ["war", "love", "the sea", "country life", "a great voyage", "family life", "politics", "old age"]
ANIMALS = ["horse", "dog", "cat", "bird", "fox", "bear", "goat", "cow", "wolf", "owl"]
PLACES = ["in the forest", "near the river", "on the farm", "in the mountains", "by the lake", "in the valley"]
FOODS = ["grass", "fish", "fruit", "meat", "seeds", "small insects"]
SIZES_OF = ["small", "large", "young", "old", "quiet", "strong"]


def article(word: str) -> str:
    return f"an {word}" if word[0] in "aeiou" else f"a {word}"


def has(*fields: str) -> Callable[[Callable[[Record], str]], Plan]:
    """A plan that says exactly these fields: it fits records that have them and no other."""

    def wrap(say: Callable[[Record], str]) -> Plan:
        return lambda r: say(r) if set(r) == {"kind", *fields} else None

    return wrap


def person(rng: random.Random) -> Record:
    record = {
        "kind": "person",
        "name": f"{rng.choice(FIRST)} {rng.choice(LAST)}",
        "job": rng.choice(JOBS),
        "town": rng.choice(TOWNS),
    }
    if rng.random() < 0.5:
        record["born"] = rng.choice(YEARS)
    if rng.random() < 0.4:
        record["likes"] = rng.choice(LIKES)
    return record


def building(rng: random.Random) -> Record:
    what = rng.choice(BUILDINGS)
    record = {
        "kind": "building",
        "name": f"{rng.choice(BUILDING_NAMES)} {what.title()}",
        "type": what,
        "town": rng.choice(TOWNS),
    }
    if rng.random() < 0.6:
        record["built"] = rng.choice(YEARS)
    if rng.random() < 0.4:
        record["material"] = rng.choice(MATERIALS)
    return record


def book(rng: random.Random) -> Record:
    record = {
        "kind": "book",
        "title": rng.choice(BOOKS),
        "type": rng.choice(GENRES),
        "author": f"{rng.choice(FIRST)} {rng.choice(LAST)}",
    }
    if rng.random() < 0.6:
        record["year"] = rng.choice(YEARS)
    if rng.random() < 0.5:
        record["subject"] = rng.choice(SUBJECTS)
    return record


def animal(rng: random.Random) -> Record:
    record = {
        "kind": "animal",
        "animal": rng.choice(ANIMALS),
        "colour": rng.choice(COLOURS),
        "place": rng.choice(PLACES),
    }
    if rng.random() < 0.5:
        record["eats"] = rng.choice(FOODS)
    if rng.random() < 0.5:
        record["look"] = rng.choice(SIZES_OF)
    return record


PLANS: dict[str, list[Plan]] = {
    "person": [
        has("name", "job", "town")(lambda r: f"{r['name']} is {article(r['job'])} from {r['town']}."),
        has("name", "job", "town")(lambda r: f"{r['name']} lives in {r['town']} and works as {article(r['job'])}."),
        has("name", "job", "town")(lambda r: f"In {r['town']}, {r['name']} is known as {article(r['job'])}."),
        has("name", "job", "town")(lambda r: f"The {r['job']} {r['name']} has a home in {r['town']}."),
        has("name", "job", "town", "born")(
            lambda r: f"{r['name']} was born in {r['town']} in {r['born']} and became {article(r['job'])}."
        ),
        has("name", "job", "town", "born")(
            lambda r: f"Born in {r['born']}, {r['name']} is {article(r['job'])} from {r['town']}."
        ),
        has("name", "job", "town", "born")(
            lambda r: f"The {r['job']} {r['name']}, born in {r['born']}, lives in {r['town']}."
        ),
        has("name", "job", "town", "likes")(
            lambda r: f"{r['name']}, {article(r['job'])} from {r['town']}, likes {r['likes']}."
        ),
        has("name", "job", "town", "likes")(
            lambda r: f"{r['name']} works as {article(r['job'])} in {r['town']} and is fond of {r['likes']}."
        ),
        has("name", "job", "town", "likes")(
            lambda r: f"A lover of {r['likes']}, {r['name']} is {article(r['job'])} in {r['town']}."
        ),
        has("name", "job", "town", "born", "likes")(
            lambda r: f"{r['name']}, born in {r['town']} in {r['born']}, is {article(r['job'])} who likes {r['likes']}."
        ),
        has("name", "job", "town", "born", "likes")(
            lambda r: (
                f"Born in {r['born']}, the {r['job']} {r['name']} lives in {r['town']} and is fond of {r['likes']}."
            )
        ),
    ],
    "building": [
        has("name", "type", "town")(lambda r: f"{r['name']} is {article(r['type'])} in {r['town']}."),
        has("name", "type", "town")(lambda r: f"There is {article(r['type'])} in {r['town']} called {r['name']}."),
        has("name", "type", "town")(lambda r: f"The {r['type']} called {r['name']} stands in {r['town']}."),
        has("name", "type", "town", "built")(
            lambda r: f"{r['name']} is {article(r['type'])} in {r['town']} that was built in {r['built']}."
        ),
        has("name", "type", "town", "built")(
            lambda r: f"Built in {r['built']}, {r['name']} is {article(r['type'])} in {r['town']}."
        ),
        has("name", "type", "town", "built")(
            lambda r: f"In {r['built']}, {article(r['type'])} called {r['name']} was built in {r['town']}."
        ),
        has("name", "type", "town", "material")(
            lambda r: f"{r['name']} is {article(r['type'])} made of {r['material']} in {r['town']}."
        ),
        has("name", "type", "town", "material")(
            lambda r: f"The town of {r['town']} has {article(r['type'])} of {r['material']}, {r['name']}."
        ),
        has("name", "type", "town", "built", "material")(
            lambda r: f"{r['name']} in {r['town']} is {article(r['type'])} of {r['material']}, built in {r['built']}."
        ),
        has("name", "type", "town", "built", "material")(
            lambda r: f"Built of {r['material']} in {r['built']}, {r['name']} is {article(r['type'])} in {r['town']}."
        ),
    ],
    "book": [
        has("title", "type", "author")(lambda r: f"{r['title']} is {article(r['type'])} by {r['author']}."),
        has("title", "type", "author")(lambda r: f"{r['author']} wrote {article(r['type'])} called {r['title']}."),
        has("title", "type", "author")(lambda r: f"The {r['type']} {r['title']} was written by {r['author']}."),
        has("title", "type", "author", "year")(
            lambda r: f"{r['title']} is {article(r['type'])} by {r['author']}, published in {r['year']}."
        ),
        has("title", "type", "author", "year")(
            lambda r: f"In {r['year']}, {r['author']} published {article(r['type'])} called {r['title']}."
        ),
        has("title", "type", "author", "subject")(
            lambda r: f"{r['title']}, {article(r['type'])} by {r['author']}, is about {r['subject']}."
        ),
        has("title", "type", "author", "subject")(
            lambda r: f"{r['author']} wrote {article(r['type'])} about {r['subject']} called {r['title']}."
        ),
        has("title", "type", "author", "year", "subject")(
            lambda r: (
                f"{r['title']} is {article(r['type'])} about {r['subject']} that {r['author']} published in {r['year']}."
            )
        ),
        has("title", "type", "author", "year", "subject")(
            lambda r: (
                f"Published in {r['year']}, {r['title']} by {r['author']} is {article(r['type'])} about {r['subject']}."
            )
        ),
    ],
    "animal": [
        has("animal", "colour", "place")(lambda r: f"The {r['colour']} {r['animal']} lives {r['place']}."),
        has("animal", "colour", "place")(lambda r: f"There is {article(r['colour'])} {r['animal']} {r['place']}."),
        has("animal", "colour", "place", "eats")(
            lambda r: f"The {r['colour']} {r['animal']} lives {r['place']} and eats {r['eats']}."
        ),
        has("animal", "colour", "place", "eats")(
            lambda r: (
                f"{r['place'][0].upper() + r['place'][1:]} lives {article(r['colour'])} {r['animal']} that eats {r['eats']}."
            )
        ),
        has("animal", "colour", "place", "look")(
            lambda r: f"{article(r['look']).capitalize()} {r['colour']} {r['animal']} lives {r['place']}."
        ),
        has("animal", "colour", "place", "look")(
            lambda r: f"The {r['animal']} {r['place']} is {r['look']} and {r['colour']}."
        ),
        has("animal", "colour", "place", "eats", "look")(
            lambda r: f"The {r['look']} {r['colour']} {r['animal']} {r['place']} eats {r['eats']}."
        ),
        has("animal", "colour", "place", "eats", "look")(
            lambda r: (
                f"{article(r['look']).capitalize()} {r['colour']} {r['animal']} that eats {r['eats']} lives {r['place']}."
            )
        ),
    ],
}
KINDS = {"person": person, "building": building, "book": book, "animal": animal}


def prompt_of(record: Record) -> str:
    fields = [f"{key}: {value}" for key, value in record.items() if key != "kind"]
    return " | ".join(fields) + "\n"


def sentences(record: Record) -> list[str]:
    """All that the plans can say of a record."""
    return [said for plan in PLANS[record["kind"]] if (said := plan(record)) is not None]


def make() -> dict[str, list[dict[str, object]]]:
    rng = random.Random(SEED)
    seen: set[str] = set()
    parts: dict[str, list[dict[str, object]]] = {}
    for part, size in SIZES.items():
        rows: list[dict[str, object]] = []
        while len(rows) < size:
            record = KINDS[rng.choice(list(KINDS))](rng)
            prompt = prompt_of(record)
            if prompt in seen:
                continue
            seen.add(prompt)
            said = sentences(record)
            rng.shuffle(said)
            row: dict[str, object] = {"prompt": prompt, "completion": said[0]}
            if part != "train":
                row["references"] = said[:REFERENCES]
            rows.append(row)
        parts[part] = rows
    return parts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    for part, rows in make().items():
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / f"{part}_rows.jsonl").write_text(text, encoding="utf-8")
        print(f"{part}: {len(rows)} rows")


if __name__ == "__main__":
    main()
