import pytest

from mmpeft_fast.data import prompts

Q = "How many?"
CHOICES = ("cat", "dog", "cow")
FORMS = {
    "vqa": ((Q,), "How many? Answer the question using a single word or phrase."),
    "vizwiz": (
        (Q,),
        'How many? When the information is insufficient, respond with "Unanswerable". '
        "Answer the question using a single word or phrase.",
    ),
    "science_qa": ((Q, CHOICES), "How many? A.cat, B.dog, C.cow"),
    "iconqa_txt": (
        (Q, CHOICES),
        "How many? Choices: cat, dog, cow. Choose an option from the choices to answer the question.",
    ),
    "iconqa_blank": ((Q,), "How many? Fill in the blanks in () or answer this question."),
    "caption": ((0,), "Describe the image concisely."),
}


def test_every_form_is_the_studys():
    assert prompts.PROMPTS.keys() == FORMS.keys()
    for name, (fields, expected) in FORMS.items():
        assert prompts.PROMPTS[name](*fields) == expected


def test_captions_have_distinct_paraphrases():
    requests = [prompts.caption(index) for index in range(len(prompts.CAPTION_REQUESTS) + 1)]
    assert len(set(requests[:-1])) == len(prompts.CAPTION_REQUESTS)
    assert requests[-1] == requests[0]


def test_image_mark_comes_first():
    assert prompts.with_image("Why?") == "<image>\nWhy?"


@pytest.mark.parametrize(
    ("form", "choices", "bound"),
    [
        (prompts.science_qa, ["only"], "2 to 26"),
        (prompts.science_qa, [str(index) for index in range(27)], "2 to 26"),
        (prompts.iconqa_txt, "cat, dog", "at least 2"),
    ],
)
def test_wrong_number_of_choices(form, choices, bound):
    with pytest.raises(ValueError, match=f"{form.__name__}: expected {bound} choices"):
        form(Q, choices)
