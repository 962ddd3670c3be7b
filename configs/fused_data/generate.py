"""Writes the JSONL files of debug.yaml; the same bytes on every machine.

    python configs/fused_data/generate.py [FOLDER]

Four kinds of records, from easy to hard for a small model: bbu (inspection answers that repeat
themselves), rru (the same with measured numbers), lang_chat (varied sentences), lvis (boxes that
nobody can guess).
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable
from pathlib import Path

NUM_TRAIN = 200
NUM_VAL = 20

SITES = ["Northgate", "Harbour East", "Mill Lane", "Airport T2", "Old Quarry", "Stadium South"]
VENDORS = ["Huawei", "ZTE", "Ericsson", "Nokia"]

OBJECTS = {
    "kitchen": ["kettle", "saucepan", "chopping board", "mug", "oven", "bottle", "spoon", "sink"],
    "street": ["bicycle", "traffic light", "bus", "pigeon", "awning", "scooter", "street sign"],
    "office": ["monitor", "keyboard", "swivel chair", "lamp", "notebook", "telephone", "poster"],
    "harbour": ["buoy", "fishing boat", "crane", "rope", "seagull", "lifebuoy", "barge"],
}

QUESTIONS = [
    "How do I {task}?",
    "What is the best way to {task}?",
    "Can you help me {task}? I have {time}.",
    "My neighbour says it is easy to {task}. Where do I start?",
    "I have {time} and want to {task}. What would you do?",
]
TASKS = {
    "repair a flat bicycle tyre": ("the inner tube", "the tyre levers", "check the rim for glass"),
    "bake sourdough bread": ("the starter", "a heavy pot", "let the dough rest overnight"),
    "learn to read sheet music": ("the treble clef", "a metronome", "clap the rhythm first"),
    "plan a hike in the hills": ("a paper map", "dry socks", "tell somebody your route"),
    "grow tomatoes on a balcony": ("a deep pot", "tomato feed", "pinch out the side shoots"),
    "write a cover letter": ("the job advert", "one good example", "read it aloud once"),
    "clean a film camera": ("a soft brush", "a blower", "leave the shutter curtain alone"),
    "set up a small home network": ("the router", "a spare cable", "change the default password"),
    "choose a second-hand piano": ("a tuning fork", "a torch", "look at the hammers inside"),
    "sharpen a kitchen knife": ("a whetstone", "a damp cloth", "keep the angle steady"),
    "prepare for a job interview": ("your notes", "a list of questions", "sleep well before it"),
    "mend a wool jumper": ("matching yarn", "a darning needle", "do not pull the thread tight"),
}
TIMES = ["an hour", "ten minutes", "a free weekend", "one quiet evening", "not much time"]
OPENERS = [
    "Gladly.",
    "It is easier than it looks.",
    "Good question!",
    "Let us go step by step.",
    "",
]
STEPS = [
    "Begin with {a}, and keep {b} within reach.",
    "First find {a}; you will also need {b}.",
    "Most people forget {b}, so get it ready before you touch {a}.",
    "Put {a} and {b} on the table and look at both.",
]
CLOSERS = [
    "After that, {c}, and you are nearly done.",
    "Above all, {c}: it saves trouble later.",
    "Then take your time; {c}.",
    "If it goes wrong, stop, {c}, and try again tomorrow.",
]


def bbu(rng: random.Random) -> tuple[str, str]:
    site, vendor = rng.choice(SITES), rng.choice(VENDORS)
    bad = rng.choice(["", "", "", "screw", "fibre", "label"])
    answer = {
        "BBU": f"{vendor}, installed, complete view",
        "screws": "loose" if bad == "screw" else "tightened, meets the standard",
        "fibre": "no protection" if bad == "fibre" else "protected by sleeve, radius in order",
        "label": "not readable" if bad == "label" else "present, readable",
        "verdict": "rework" if bad else "pass",
    }
    return f"Inspect the {vendor} BBU cabinet at {site}. Answer as JSON.", json.dumps(answer)


def rru(rng: random.Random) -> tuple[str, str]:
    site, sector = rng.choice(SITES), rng.randint(1, 3)
    answer = {
        "RRU": f"sector {sector}, fixed to the pole",
        "height_m": rng.randint(180, 459) / 10,
        "azimuth_deg": rng.randint(0, 359),
        "tilt_deg": rng.randint(0, 12),
        "torque_nm": rng.randint(38, 52),
        "vswr": rng.randint(105, 149) / 100,
        "rx_power_dbm": -rng.randint(500, 980) / 10,
        "serial": f"RRU{rng.randint(0, 999_999):06d}",
        "grounding": "connected, screws tightened",
        "verdict": "pass",
    }
    return f"Read the RRU report of {site}, sector {sector}. Answer as JSON.", json.dumps(answer)


def lvis(rng: random.Random) -> tuple[str, str]:
    scene = rng.choice(list(OBJECTS))
    objects = [
        {
            "label": rng.choice(OBJECTS[scene]),
            "bbox_2d": [
                left := rng.randint(0, 700),
                top := rng.randint(0, 700),
                left + rng.randint(20, 299),
                top + rng.randint(20, 299),
            ],
        }
        for _ in range(rng.randint(3, 5))
    ]
    return f"List the objects in this {scene} scene with their boxes.", json.dumps(objects)


def lang_chat(rng: random.Random) -> tuple[str, str]:
    task = rng.choice(list(TASKS))
    first, second, advice = TASKS[task]
    question = rng.choice(QUESTIONS).format(task=task, time=rng.choice(TIMES))
    parts = [
        rng.choice(OPENERS),
        rng.choice(STEPS).format(a=first, b=second),
        rng.choice(CLOSERS).format(c=advice),
    ]
    return question, " ".join(part for part in parts if part)


SOURCES: dict[str, Callable[[random.Random], tuple[str, str]]] = {
    "bbu": bbu,
    "rru": rru,
    "lvis": lvis,
    "lang_chat": lang_chat,
}


def lines(name: str, split: str, count: int) -> str:
    rng = random.Random(f"{name} {split}")
    records = []
    for number in range(count):
        question, answer = SOURCES[name](rng)
        records.append(
            {
                "messages": [
                    {"role": "user", "content": question},
                    {"role": "assistant", "content": answer},
                ],
                "metadata": {"record_id": f"{name}-{split}-{number:04d}"},
            }
        )
    return "".join(json.dumps(record) + "\n" for record in records)


def main(folder: Path) -> None:
    for name in SOURCES:
        for split, count, suffix in (("train", NUM_TRAIN, ""), ("val", NUM_VAL, "_val")):
            path = folder / f"{name}{suffix}.jsonl"
            path.write_text(lines(name, split, count), encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)
