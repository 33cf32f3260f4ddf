"""The metrics against examples that were published or worked out by hand."""

import math
from pathlib import Path

import pytest

from mmpeft_fast.data.sets import TaskSample
from mmpeft_fast.study.metrics import METRICS, score
from mmpeft_fast.study.metrics.cider import cider, tokenize
from mmpeft_fast.study.metrics.objects import hallucination, objects_in
from mmpeft_fast.study.metrics.options import chosen
from mmpeft_fast.study.metrics.pope import pope, says_yes
from mmpeft_fast.study.metrics.vqa import CONTRACTIONS, exact_match, normalised, vqa_score


@pytest.mark.parametrize("equal, score", [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (9, 1.0), (10, 1.0)])
def test_vqa_score_by_the_number_of_people_who_agree(equal, score):
    answers = ["cat"] * equal + [f"dog {n}" for n in range(10 - equal)]
    assert vqa_score("cat", answers) == pytest.approx(score)


@pytest.mark.parametrize(
    "answer, form",
    [
        ("The Cat", "cat"),
        ("an apple, a pear", "apple pear"),  # the comma is beside a space and goes
        ("red,blue", "red blue"),  # it stands between words and becomes a space
        ("1,000", "1000"),  # between digits it goes
        ("1,000 red/blue", "1000 redblue"),  # and takes every other mark with it
        ("red/blue", "red blue"),
        ("t-shirt", "t shirt"),
        ("- shirt", "shirt"),
        ("3.5", "3.5"),
        ("end.", "end"),
        ("u.s.a.", "usa"),
        ("Two", "2"),
        ("none", "0"),
        ("twenty", "twenty"),
        ("dont", "don't"),
        ("couldntve", "couldntve"),  # two apostrophes are missing
        ("couldnt've", "couldn't've"),
        ("somebody'd", "somebodyd"),
        ("a\tb\nc ", "b c"),
        ("what?!", "what"),
        ("." * 40, "." * 8),  # 32 periods are the most that go
        ("", ""),
    ],
)
def test_official_normal_form(answer, form):
    assert normalised(answer) == form
    assert exact_match(answer, form) == float(normalised(answer) == normalised(form))


def test_contractions_hold_no_right_spelling_and_no_word():
    assert len(CONTRACTIONS) > 100
    assert CONTRACTIONS["youre"] == "you're" and CONTRACTIONS["'ows'at"] == "'ow's'at"
    assert all(key == "somebody'd" or len(word) == len(key) + 1 for key, word in CONTRACTIONS.items())


def test_nothing_is_normalised_where_all_ten_agree():
    assert vqa_score("Yes", ["yes"] * 10) == 0.0
    assert vqa_score("Yes", ["yes"] * 9 + ["yeah"]) == 1.0
    assert vqa_score(" yes\n", ["yes"] * 10) == 1.0
    with pytest.raises(ValueError, match="expected the answers of people"):
        vqa_score("yes", [])


@pytest.mark.parametrize(
    "said, index",
    [
        ("B", 1),
        ("B.", 1),
        ("(B) a fire", 1),
        ("B: because", 1),
        ("a fire", 1),
        (" A Fire. ", 1),
        ("The answer is C.", 2),
        ("The answer is A. No, the answer is B.", None),
        ("D", None),
        ("Because", None),
        ("", None),
        ("fire", None),
    ],
)
def test_which_choice_an_answer_means(said, index):
    assert chosen(said, ("ice", "a fire", "snow")) == index


def test_a_choice_that_is_a_letter_is_meant_itself():
    assert chosen("A", ("B", "A")) == 1


@pytest.mark.parametrize(
    "answer, yes",
    [
        ("No", False),
        ("no, there is", False),
        ("There is not. Yes", False),
        ("Yes. no", True),
        ("NO", True),
        ("nothing", True),
    ],
)
def test_popes_parser(answer, yes):
    assert says_yes(answer) == yes


def test_pope_by_hand():
    found = pope(["yes", "Yes", "no", "yes", "no"], ["yes", "no", "no", "yes", "yes"])
    assert found == pytest.approx(
        {"accuracy": 3 / 5, "precision": 2 / 3, "recall": 2 / 3, "f1": 2 / 3, "yes_ratio": 3 / 5}
    )
    assert pope(["no"], ["no"]) == {"accuracy": 1.0, "precision": 0.0, "recall": 0.0, "f1": 0.0, "yes_ratio": 0.0}


def test_cider_of_the_example_that_aac_metrics_publishes():
    captions = ["a man is speaking", "rain falls"]
    references = [
        ["a man speaks.", "someone speaks.", "a man is speaking while a bird is chirping in the background"],
        ["rain is falling hard on a surface"],
    ]
    scores = cider(captions, references)
    assert scores == pytest.approx([1.3641, 0.5587], abs=5e-5)
    assert sum(scores) / 2 == pytest.approx(0.9614, abs=5e-5)


def test_cider_by_hand():
    # Two images; every word is in one image only, so that all idf are log 2 and cosines are those of counts.
    # First: words (2, 1) and (1, 1), clipped (1, 1): 2 / (sqrt 5 sqrt 2). Pairs "x x", "x y" and "x y": 1 / sqrt 2.
    # 3- and 4-grams: none in the reference. Lengths are 2 and 1 pairs of words.
    scores = cider(["x x y", "p q"], [["x y"], ["p q"]])
    first = (2 / math.sqrt(10) + 1 / math.sqrt(2)) / 4 * math.exp(-1 / 72) * 10
    assert scores == pytest.approx([first, (1 + 1) / 4 * 10])
    # A word of every image weighs nothing.
    assert cider(["x", "x"], [["x"], ["x"]]) == [0.0, 0.0]
    assert cider(["a b c d", "e"], [["a b c d"], ["z"]]) == pytest.approx([10.0, 0.0])


@pytest.mark.parametrize(
    "caption, tokens",
    [
        ("A man's dog isn't here.", "a man 's dog is n't here"),
        ("They can't; they'll try!", "they ca n't they 'll try"),
        ("A t-shirt - white (new)...", "a t-shirt white -lrb- new -rrb-"),
        ('"Stop" at 7:30, 1,000 of 3.5', "stop at 7:30 1,000 of 3.5"),
        ("The U.S. flag, Mr. Smith", "the u.s. flag mr. smith"),
        ("you cannot -- 5 o'clock", "you can not 5 o'clock"),
        ("“Café”…the dogs’ bowl", "café the dogs bowl"),
        ("", ""),
    ],
)
def test_treebank_tokens(caption, tokens):
    assert tokenize(caption) == tokens.split()


def test_objects_by_their_longest_names():
    assert objects_in("Two men eat hot dogs by a fire hydrant.") == ["person", "hot dog", "fire hydrant"]
    assert objects_in("A puppy, a teddy bear and geese on skis") == ["dog", "teddy bear", "bird", "skis"]
    assert objects_in("a dress and glasses") == []


def test_hallucination_by_hand():
    captions = ["a dog and a cat", "a man on a bench", "nothing"]
    references = [["a puppy runs"], ["a person sits", "someone on benches"], ["rain"]]
    found = hallucination(captions, references)
    assert found == pytest.approx({"chair_s": 1 / 3, "chair_i": 1 / 4, "objects_per_caption": 4 / 3})
    assert hallucination(captions, references, [["cat"], [], []])["chair_s"] == 0.0
    assert hallucination(["rain"], [["rain"]])["chair_i"] == 0.0


def sample(answer: str, references=(), choices=()) -> TaskSample:
    return TaskSample(
        id="0",
        questions=("q",),
        answers=(answer,),
        image=Path("a.png"),
        references=references or (answer,),
        choices=choices,
    )


def test_every_metric_by_its_name():
    options = [sample("B", choices=("ice", "fire")), sample("ice", choices=("ice", "fire"))]
    assert score("option_accuracy", ["fire", "B"], options) == {"accuracy": 0.5, "no_option": 0.0}
    assert score("option_accuracy", ["what", "A"], options) == {"accuracy": 0.5, "no_option": 0.5}
    assert score("exact_match", ["The 2", "x"], [sample("two"), sample("y")]) == {"accuracy": 0.5}
    assert score("vqa_score", ["a"], [sample("a", ("a", *"bcdefghij"))]) == {"vqa_score": pytest.approx(0.3)}
    assert score("pope", ["yes"], [sample("yes")])["accuracy"] == 1.0
    captions = [sample("x y", ("x y",)), sample("z", ("z",))]
    assert score("cider", ["x y", "z"], captions) == {"cider": pytest.approx(3.75)}
    assert score("hallucination", ["a dog"], [sample("a cat")])["chair_s"] == 1.0
    shapes = score(
        "shape_hallucination", ["a red circle", "two Triangles"], [sample("a red circle"), sample("a blue circle")]
    )
    assert shapes == {"chair_s": 0.5, "chair_i": 0.5, "objects_per_caption": 1.0}
    assert score("shape_hallucination", ["a dog"], [sample("a circle")])["objects_per_caption"] == 0.0
    assert len(METRICS) == 7


@pytest.mark.parametrize(
    "metric, predictions, said", [("bleu", ["a"], "expected one of"), ("pope", [], "as many predictions")]
)
def test_what_cannot_be_scored(metric, predictions, said):
    with pytest.raises(ValueError, match=said):
        score(metric, predictions, [sample("yes")])
