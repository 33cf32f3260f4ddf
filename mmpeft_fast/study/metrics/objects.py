"""Object hallucination in captions, as CHAIR counts it (Rohrbach et al. 2018).

CHAIR_i: objects that a caption names and the image does not have, over all that captions name. CHAIR_s: captions with
such an object, over all captions. What the image has is what its reference captions name, and its annotated objects
where they are given. The study counted by hand; this is not its count.
"""

from collections.abc import Iterable, Mapping, Sequence
from functools import cache

from mmpeft_fast.study.metrics.cider import tokenize

# The 80 objects of COCO and some of Flickr30k's: "object = other words for it; ...". Longer names win: a hot dog is no
# dog.
VOCABULARY = """
    person = man, woman, boy, girl, child, kid, baby, toddler, adult, lady, guy, gentleman, player, rider, worker,
    skier, surfer, skateboarder, snowboarder, pedestrian, student;
    bicycle = bike, cycle; car = automobile, sedan, taxi, suv; motorcycle = motorbike, scooter, moped;
    airplane = plane, aircraft, jet, aeroplane; bus = coach, minibus; train = locomotive, tram;
    truck = lorry, pickup truck, fire truck; boat = ship, canoe, kayak, sailboat, raft, ferry;
    traffic light = stoplight, stop light, traffic signal; fire hydrant = hydrant; stop sign; parking meter;
    bench; bird = duck, goose, seagull, pigeon, owl, parrot; cat = kitten; dog = puppy, hound, poodle;
    horse = pony, foal; sheep = lamb, ram; cow = cattle, bull, calf, ox; elephant; bear = polar bear, grizzly;
    zebra; giraffe; backpack = rucksack, knapsack; umbrella = parasol; handbag = purse;
    tie = necktie, bow tie; suitcase = luggage, briefcase; frisbee = flying disc; skis = ski; snowboard;
    sports ball = ball, football, basketball, baseball, soccer ball, tennis ball, volleyball; kite;
    baseball bat = bat; baseball glove = mitt; skateboard; surfboard; tennis racket = racket, racquet; bottle;
    wine glass = goblet; cup = mug; fork; knife; spoon; bowl; banana; apple; sandwich = burger, hamburger;
    orange; broccoli; carrot; hot dog = hotdog; pizza; donut = doughnut; cake = cupcake;
    chair = armchair, stool; couch = sofa; potted plant = houseplant; bed; dining table = table, desk; toilet;
    tv = television, tv set; laptop = notebook computer; mouse = computer mouse; remote = remote control;
    keyboard; cell phone = phone, mobile phone, smartphone, telephone; microwave; oven = stove; toaster;
    sink = basin; refrigerator = fridge; book; clock; vase; scissors; teddy bear = stuffed animal, teddy;
    hair drier = hair dryer, hairdryer; toothbrush; hat = cap, helmet; guitar; camera; microphone;
    drum = drums; flag; ladder;
"""
SHAPES = "circle; rectangle; triangle"  # of easy-vqa
_PLURALS = {
    **{"person": "people", "man": "men", "woman": "women", "gentleman": "gentlemen", "child": "children"},
    **{"knife": "knives", "calf": "calves", "mouse": "mice", "goose": "geese", "sheep": "sheep", "ox": "oxen"},
}
_ALREADY_PLURAL = ("skis", "drums", "scissors")


@cache
def object_names(vocabulary: str = VOCABULARY) -> Mapping[tuple[str, ...], str]:
    """Every name as its words, singular and plural, and the object that it means."""
    names = {}
    for entry in vocabulary.split(";"):
        thing, _, others = entry.partition("=")
        for name in filter(str.strip, (thing, *others.split(","))):
            *first, last = name.split()
            names[*first, last] = names[*first, _plural(last)] = " ".join(thing.split())
    return names


def objects_in(text: str, vocabulary: str = VOCABULARY) -> list[str]:
    """The objects that a text names, in order; what it names twice is there twice."""
    names, words, found, position = object_names(vocabulary), tokenize(text), [], 0
    longest = max(map(len, names))
    while position < len(words):
        for length in range(longest, 0, -1):
            thing = names.get(tuple(words[position : position + length]))
            if thing is not None:
                found.append(thing)
                position += length - 1
                break
        position += 1
    return found


def hallucination(
    captions: Sequence[str],
    references: Sequence[Sequence[str]],
    annotated: Sequence[Iterable[str]] | None = None,
    vocabulary: str = VOCABULARY,
) -> dict[str, float]:
    """`chair_s`, `chair_i` and `objects_per_caption`.

    references: other captions of each image. annotated: the vocabulary's names of the objects in each image.
    """
    annotated = [()] * len(captions) if annotated is None else annotated
    num_objects = num_wrong = num_wrong_captions = 0
    for caption, texts, things in zip(captions, references, annotated, strict=True):
        present = set(things).union(*(objects_in(text, vocabulary) for text in texts))
        named = objects_in(caption, vocabulary)
        wrong = [thing for thing in named if thing not in present]
        num_objects, num_wrong = num_objects + len(named), num_wrong + len(wrong)
        num_wrong_captions += bool(wrong)
    return {
        "chair_s": num_wrong_captions / len(captions),
        "chair_i": num_wrong / num_objects if num_objects else 0.0,
        "objects_per_caption": num_objects / len(captions),
    }


def _plural(word: str) -> str:
    if word in _PLURALS:
        return _PLURALS[word]
    if word.endswith(("s", "x", "ch", "sh")):
        return word if word in _ALREADY_PLURAL else f"{word}es"
    return f"{word[:-1]}ies" if word.endswith("y") and word[-2] not in "aeiou" else f"{word}s"
