"""The VQA score (Antol et al. 2015) with the answer normalisation of the official VQA v2 evaluation."""

import re
from collections.abc import Sequence

# Right spellings; an answer that leaves one of the apostrophes out means them.
_CONTRACTED = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've
    he's how'd how'll how's isn't it'd it'd've it'll ma'am might've mightn't mightn't've must've mustn't needn't not've
    o'clock 'ow's'at oughtn't shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's
    someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've
    there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's
    what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've
    wouldn't wouldn't've y'all y'all'd've y'all'll you'd you'd've you'll you're you've
"""
CONTRACTIONS = {
    word[:i] + word[i + 1 :]: word for word in _CONTRACTED.split() for i, letter in enumerate(word) if letter == "'"
}
CONTRACTIONS["somebody'd"] = "somebodyd"  # a slip of the official table that scores depend on
_NUMBER_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
NUMBERS = {word: str(number) for number, word in enumerate(_NUMBER_WORDS)} | {"none": "0"}
ARTICLES = frozenset(("a", "an", "the"))
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_DIGIT_COMMA_DIGIT = re.compile(r"\d,\d")
_PERIOD = re.compile(r"\.(?!\d)")
_MOST_PERIODS = 32  # the official script passes a flag of that value where the count of substitutions belongs


def cleaned(answer: str) -> str:
    """What is done to every answer: line breaks and tabs become spaces, outer spaces go."""
    return answer.replace("\n", " ").replace("\t", " ").strip()


def normalised(answer: str) -> str:
    """The official normal form: punctuation, then lower case, number words, articles and contractions.

    A mark goes where a space is beside it, or anywhere if the answer has a comma between digits; else it becomes a
    space. A period goes unless a digit follows.
    """
    answer = cleaned(answer)
    text, joined = answer, bool(_DIGIT_COMMA_DIGIT.search(answer))
    for mark in _PUNCTUATION:
        beside_space = f"{mark} " in answer or f" {mark}" in answer
        text = text.replace(mark, "" if beside_space or joined else " ")
    text = _PERIOD.sub("", text, count=_MOST_PERIODS)
    words = [NUMBERS.get(word, word) for word in text.lower().split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def vqa_score(prediction: str, answers: Sequence[str]) -> float:
    """The mean, over leaving out one person's answer each, of min(1, equal answers among the others / 3).

    answers: usually ten. As in the official script nothing is normalised where all of them are the same: "Yes" then
    does not equal "yes". Raises ValueError without answers.
    """
    if not answers:
        raise ValueError("vqa_score: expected the answers of people, got none")
    answers, prediction = [cleaned(answer) for answer in answers], cleaned(prediction)
    if len(set(answers)) > 1:
        answers, prediction = [normalised(answer) for answer in answers], normalised(prediction)
    equal = [answer == prediction for answer in answers]
    return sum(min(1.0, (sum(equal) - each) / 3) for each in equal) / len(equal)


def exact_match(prediction: str, answer: str) -> float:
    """1.0 where both have the same normal form."""
    return float(normalised(prediction) == normalised(answer))
