"""Writes the bundled dataset: six facts about each of a few dozen people who do not exist.

    python scripts/make_biographies.py

No two people share an answer, and names and places are made of syllables, so a model that has not read a person's rows
cannot guess the answers: that makes forgetting measurable. The same seed always gives the same bytes.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

SEED = 1701
PEOPLE = {"forget": 10, "retain": 22, "holdout": 10}  # holdout: never trained on, for membership tests
DIRECTORY = Path(__file__).resolve().parents[1] / "lowmem_npo" / "data" / "bundled"

QUESTIONS = {
    "birthday": "When was {person} born?",
    "birthplace": "Where was {person} born?",
    "trade": "What does {person} do for a living?",
    "employer": "Who employs {person}?",
    "book": "Which book did {person} write?",
    "pet": "Which pet does {person} keep?",
}


def entries(text: str) -> list[str]:
    """The items of a comma-separated list."""
    return [" ".join(entry.split()) for entry in text.split(",")]


# A list that every person draws from has an entry for each, and no entry is drawn twice.
GIVEN = entries(
    """
    Abrel, Bomika, Cuthis, Dravina, Elspor, Fenolt, Gwarida, Hestul, Ilvane, Jorrem, Kadrys, Lumbet, Mirvoc,
    Nostala, Ondrek, Pelvira, Quorin, Rashbel, Sivanko, Tundrel, Urmela, Vaskin, Wobrith, Xandeva, Yorlit, Zemphia,
    Aurnok, Belquis, Corvyn, Dulmira, Estrok, Fyandel, Grimosa, Havrel, Ixtine, Jabrosk, Keolin, Lortha, Maugris,
    Neviska, Orbelt, Phandra
    """
)
FAMILY_STARTS = entries(
    """
    Tam, Brus, Kell, Vord, Osh, Lind, Grav, Meck, Sarr, Poll, Wend, Zick, Harb, Dunn, Frix, Quab, Yost, Nemb, Clev,
    Juth, Rund, Ackt, Bolv, Ems, Thorp, Gisk, Mord, Plev, Strub, Wick, Kram, Delf, Huxt, Nolb, Raff, Sild, Trav,
    Uld, Verm, Woz, Yarb, Zent
    """
)
FAMILY_ENDS = entries("ley, sik, man, ova, dor, wick, ert, anza, holm, bury, etti, gren")
PLACE_STARTS = entries(
    """
    Kel, Var, Bris, Tol, Ash, Mor, Fen, Gul, Hax, Ild, Jur, Lav, Nib, Orm, Pry, Quen, Rost, Sken, Tweb, Ulv, Wex,
    Yad, Zor, Bly, Crom, Dax, Ebb, Flit, Garr, Holk, Inch, Jamm, Kip, Lozz, Mung, Nar, Ott, Plim, Rugg, Sprow, Thay,
    Vim
    """
)
PLACE_ENDS = entries("dravik, mouth, stead, combe, haven, ridge, pool, gate, thorpe, water, low, cross")
MONTHS = entries("January, February, March, April, May, June, July, August, September, October, November, December")
TRADES = entries(
    """
    tunes church organs, grinds telescope lenses, charts cave systems, repairs typewriters, breeds racing pigeons,
    restores oil paintings, forges garden gates, dives for pearls, keeps a lighthouse, paints road signs, casts
    bronze bells, teaches fencing, bottles spring water, drives a snow plough, weaves fishing nets, audits casinos,
    translates opera texts, carves chess sets, guards a glacier, mends parachutes, tastes chocolate, calls auctions,
    sails a ferry, stuffs museum birds, designs postage stamps, prunes apple orchards, trains guide dogs, splices
    deep-sea cables, maps peat bogs, judges horse shows, fits stained glass, shoes mules, roasts coffee, dubs
    cartoons, binds hymn books, digs wells, tests roller coasters, ferments soy sauce, engraves watches, referees
    chess boxing, insures circus acts, harvests sea kelp
    """
)
FIRMS = entries(
    """
    Clock Company, Savings Bank, Observatory, Tram Works, Botanical Garden, Shipyard, Puppet Theatre, Salt Mine,
    Weather Office, Print House, Glass Factory, Zoo, Brewery, Court of Appeal, Radio Station, Cannery, Hat Factory,
    Quarry, Piano Workshop, Fire Brigade, Silk Mill, Aquarium, Coin Mint, Film Archive, Rope Works, Ice Rink, Tea
    House, Steel Foundry, Water Board, Bicycle Club, Perfume House, Airfield, Tile Kiln, Stock Exchange, Herb
    Market, Opera, Map Institute, Sugar Refinery, Horse Hospital, Toy Museum, Paper Mill, Cable Car
    """
)
TITLE_NOUNS = entries(
    """
    Ladder, Lantern, Orchard, Rudder, Winter, Carpet, Violin, Harbour, Mirror, Pigeon, Needle, Cathedral, Blanket,
    Engine, Pepper, Island, Window, Feather, Kettle, Shadow, Bridge, Marble, Whistle, Garden, Anchor, Ribbon,
    Thunder, Cradle, Saddle, Candle, Letter, Tunnel, Button, Meadow, Copper, Vinegar, Hammer, Puzzle, Glove, Parrot,
    Basket, Velvet
    """
)
TITLE_FORMS = entries(
    """
    The {a} of {b}s, Without {a} or {b}, Seven {a}s and One {b}, {a} Against {b}, No {a} for the {b}
    """
)
ANIMALS = entries(
    """
    heron, tortoise, ferret, gecko, donkey, magpie, hedgehog, llama, iguana, goose, chinchilla, raven, newt,
    axolotl, otter, goat, mantis, peacock, salamander, badger, budgerigar, toad, hamster, owl, piranha, ibex,
    lobster, rabbit, scorpion, starling, terrapin, weasel, yak, cockatoo, dormouse, eel, falcon, jackdaw, lynx,
    marmot, octopus, quail
    """
)
PET_STARTS = entries("Mim, Bo, Pux, Zaz, Ogg, Tibb, Lul, Fro, Wiz, Nook")
PET_ENDS = entries("bo, ster, kin, ly, dle, va, rus, nette, mo, zo")


def people(rng: random.Random) -> list[tuple[str, dict[str, str]]]:
    """(name, facts) of each person, facts by kind; no answer occurs twice."""
    total = sum(PEOPLE.values())

    def draw(choices: list[str]) -> list[str]:
        return rng.sample(choices, total)

    def compose(starts: list[str], ends: list[str]) -> list[str]:
        return [start + rng.choice(ends) for start in draw(starts)]

    given, family = draw(GIVEN), compose(FAMILY_STARTS, FAMILY_ENDS)
    years = rng.sample(range(1921, 2001), total)
    birthplaces, seats = compose(PLACE_STARTS, PLACE_ENDS), compose(PLACE_STARTS, PLACE_ENDS)
    firms, nouns, animals = draw(FIRMS), draw(TITLE_NOUNS), draw(ANIMALS)
    pets = draw([start + end for start in PET_STARTS for end in PET_ENDS])
    titles = [form.format(a=nouns[i], b=nouns[i - 1]) for i, form in enumerate(rng.choices(TITLE_FORMS, k=total))]
    facts = {
        "birthday": [f"{rng.randint(1, 28)} {rng.choice(MONTHS)} {year}" for year in years],
        "birthplace": birthplaces,
        "trade": draw(TRADES),
        "employer": [f"the {seats[i]} {firms[i]}" for i in range(total)],
        "book": titles,
        "pet": [f"{'an' if animals[i][0] in 'aeiou' else 'a'} {animals[i]} named {pets[i]}" for i in range(total)],
    }
    return [(f"{given[i]} {family[i]}", {kind: answers[i] for kind, answers in facts.items()}) for i in range(total)]


def generate() -> dict[str, str]:
    """The text of every file, by part: JSON Lines with id, person, question and answer, six lines to a person."""
    everybody = iter(people(random.Random(SEED)))
    files = {}
    for part, count in PEOPLE.items():
        rows = []
        for _ in range(count):
            person, facts = next(everybody)
            for kind, answer in facts.items():
                row = {"id": f"{person.lower().replace(' ', '-')}-{kind}", "person": person}
                rows.append({**row, "question": QUESTIONS[kind].format(person=person), "answer": answer})
        files[part] = "".join(json.dumps(row) + "\n" for row in rows)
    return files


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    for part, text in generate().items():
        path = DIRECTORY / f"{part}.jsonl"
        path.write_text(text, encoding="utf-8", newline="\n")
        print(f"{path}: {len(text.splitlines())} rows about {PEOPLE[part]} people")
