"""CIDEr-D (Vedantam et al. 2015): how much a caption's n-grams agree with those of the references, rare ones counting
more; and words as the Penn Treebank's tokenizer splits them for it.
"""

import math
import re
from collections import Counter
from collections.abc import Sequence

MAX_N, SIGMA = 4, 6.0  # n-grams of 1 to 4 words; width of the Gaussian penalty on a difference of lengths

# Marks that the captioning evaluation drops. Brackets stay: it looks for them in capitals, after lower case.
_DROPPED = frozenset(("''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";", '"'))
_BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
_STRAIGHT = str.maketrans({"’": "'", "‘": "'", "“": '"', "”": '"', "–": "-", "—": "-", "…": "."})
# Words that the treebank takes apart.
_TWO_WORDS = {"cannot": "can not", "gonna": "gon na", "gotta": "got ta", "wanna": "wan na", "gimme": "gim me"}
_TWO_WORDS |= {"lemme": "lem me"}
_TOKEN = re.compile(
    r"""
    (?:[a-z]\.){2,}                              # u.s.
    | (?:mr|mrs|ms|dr|st|jr|sr|prof|vs|etc)\.    # titles keep their period
    | \d+(?:[.,:]\d+)+                           # 1,000  3.5  7:30
    | o'clock
    | n't\b | '(?:s|re|ve|ll|d|m)\b
    | [^\W_]+?(?=n't\b)                          # do|n't
    | [^\W_]+(?:-[^\W_]+)*                       # t-shirt
    | \.{3} | --+ | [^\w\s] | _+
    """,
    re.VERBOSE,
)


def tokenize(caption: str) -> list[str]:
    """Lower-case tokens as the treebank's rules split them, punctuation dropped.

    Stanford's tokenizer knows more abbreviations, addresses and fractions than these rules; captions rarely have any.
    """
    tokens = []
    for token in _TOKEN.findall(caption.translate(_STRAIGHT).lower()):
        if token not in _DROPPED and not token.startswith("--"):
            tokens += _TWO_WORDS.get(token, _BRACKETS.get(token, token)).split()
    return tokens


def cider(captions: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """CIDEr-D of each caption; their mean is the corpus's score. 10 is the most that one can have.

    references: those of each image. An n-gram's document frequency is the number of images, of those given here, with
    a reference that has it: scores depend on the whole set, and of a single image they are 0.
    """
    counts = [[_ngrams(text) for text in texts] for texts in references]
    frequency = Counter(ngram for texts in counts for ngram in set().union(*texts))
    log_images = math.log(len(counts))

    def weighted(ngrams: Counter) -> list[dict]:
        """The tf-idf vector of each n."""
        vectors: list[dict] = [{} for _ in range(MAX_N)]
        for ngram, number in ngrams.items():
            vectors[len(ngram) - 1][ngram] = number * (log_images - math.log(max(1, frequency[ngram])))
        return vectors

    scores = []
    for caption, texts in zip(captions, counts, strict=True):
        ngrams = _ngrams(caption)
        vectors = weighted(ngrams)
        similar = [_similarity(vectors, weighted(text), _length(ngrams) - _length(text)) for text in texts]
        scores.append(10 * sum(similar) / len(similar))
    return scores


def _ngrams(text: str) -> Counter:
    words = tokenize(text)
    return Counter(tuple(words[i : i + n]) for n in range(1, MAX_N + 1) for i in range(len(words) - n + 1))


def _length(ngrams: Counter) -> int:
    """The length of a text as the published code has it: its number of pairs of words."""
    return sum(number for ngram, number in ngrams.items() if len(ngram) == 2)


def _similarity(vectors: list[dict], reference: list[dict], difference: int) -> float:
    """The mean over n of the cosine, the caption's weights clipped at the reference's, times the length's penalty."""
    total = 0.0
    for ours, theirs in zip(vectors, reference):
        norms = math.hypot(*ours.values()) * math.hypot(*theirs.values())
        if norms:
            total += (
                sum(min(weight, theirs.get(ngram, 0.0)) * theirs.get(ngram, 0.0) for ngram, weight in ours.items())
                / norms
            )
    return total / MAX_N * math.exp(-(difference**2) / (2 * SIGMA**2))
