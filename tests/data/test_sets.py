"""Every published layout in miniature, written here by hand: what a record becomes, and what is said of a bad one."""

import json
from pathlib import Path

import pytest
from PIL import Image

from mmpeft_fast import cli
from mmpeft_fast.data import Collator, prompts
from mmpeft_fast.data.sets import SETS, BadRecords, decodable, fitting, load_set
from mmpeft_fast.study import metrics


def write_json(path: Path, value) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def draw(path: Path, color: str = "red") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (48, 48), color).save(path)


def ten(*answers: str) -> list[dict]:
    """Ten people's answers: the last one fills up."""
    words = [*answers, *[answers[-1]] * (10 - len(answers))]
    return [{"answer": word, "answer_confidence": "yes", "answer_id": index} for index, word in enumerate(words)]


def coco_vqa(root: Path, folder: str, prefix: str) -> None:
    asked = [
        {"image_id": 7, "question": "What does the dog hold?", "question_id": 70},
        {"image_id": 7, "question": "How many dogs?", "question_id": 71},
    ]
    answered = [
        {"question_id": 71, "image_id": 7, "answers": ten("2", "two", "2")},
        {"question_id": 70, "image_id": 7, "answers": ten("stick", "ball", "ball", "stick", "stick", "a toy")},
    ]
    write_json(root / folder / f"{prefix}OpenEnded_mscoco_train2014_questions.json", {"questions": asked})
    write_json(root / folder / f"{prefix}mscoco_train2014_annotations.json", {"annotations": answered})
    draw(root / "coco/train2014/COCO_train2014_000000000007.jpg")


def scienceqa(root: Path) -> None:
    problem = {"question": "Which is warm?", "choices": ["ice", "a fire", "snow"], "answer": 1, "split": "train"}
    problems = {"3": {**problem, "image": "image.png"}, "4": {**problem, "image": None}}
    write_json(root / "scienceqa/problems.json", problems)
    write_json(root / "scienceqa/pid_splits.json", {"train": ["4", "3"], "val": [], "test": []})
    draw(root / "scienceqa/images/train/3/image.png")


def vizwiz(root: Path) -> None:
    record = {"image": "VizWiz_train_00000000.jpg", "question": "What is this?", "answerable": 0}
    write_json(root / "vizwiz/Annotations/train.json", [{**record, "answers": ten("soup", "unanswerable")}])
    draw(root / "vizwiz/train/VizWiz_train_00000000.jpg")


def iconqa(root: Path, task: str, problem: dict) -> None:
    folder = root / f"iconqa_data/iconqa/train/{task}/12"
    write_json(folder / "data.json", problem)
    draw(folder / "image.png")


def flickr30k(root: Path) -> None:
    images = [
        {"filename": f"{index}.jpg", "split": split, "sentences": [{"raw": f"Dog {n} runs."} for n in range(5)]}
        for index, split in enumerate(("train", "train", "train", "train", "test", "val"))
    ]
    write_json(root / "flickr30k/dataset_flickr30k.json", {"images": images, "dataset": "flickr30k"})
    for image in images:
        draw(root / "flickr30k/flickr30k-images" / image["filename"])


def ocrvqa(root: Path) -> None:
    book = {"imageURL": "http://covers.example/1.gif", "questions": ["Who wrote it?", "What title?"], "split": 1}
    books = {"111": {**book, "answers": ["A. Writer", "On Rain"]}, "222": {**book, "answers": ["B", "C"], "split": 3}}
    books["333"] = {**books["222"], "split": 2}
    write_json(root / "ocrvqa/dataset.json", books)
    for name in ("111.jpg", "222.gif", "333.gif"):
        draw(root / "ocrvqa/images" / name)


def pope(root: Path) -> None:
    record = {"question_id": 1, "image": "COCO_val2014_000000000009.jpg", "text": "Is there a cup?", "label": "no"}
    path = root / "pope/coco_pope_random.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(record) + "\n" + json.dumps({**record, "question_id": 2, "label": "yes"}) + "\n")
    draw(root / "coco/val2014/COCO_val2014_000000000009.jpg")


def llava(root: Path) -> None:
    turns = [{"from": "human", "value": "<image>\nWhere?"}, {"from": "gpt", "value": "Here."}]
    entries = [
        {"id": "a", "image": "coco/1.jpg", "conversations": turns},
        {"id": "b", "conversations": [{"from": "human", "value": "Hello?"}, {"from": "gpt", "value": "Yes."}]},
    ]
    write_json(root / "llava/llava_v1_5_mix665k.json", entries)
    draw(root / "llava/images/coco/1.jpg")


LAYOUTS = {
    "scienceqa": scienceqa,
    "vizwiz": vizwiz,
    "iconqa-txt": lambda root: iconqa(
        root, "choose_txt", {"question": "Which shape?", "choices": ["oval", "star"], "answer": 1}
    ),
    "iconqa-blank": lambda root: iconqa(root, "fill_in_blank", {"question": "It is (_) long.", "answer": "4"}),
    "flickr30k": flickr30k,
    "okvqa": lambda root: coco_vqa(root, "okvqa", ""),
    "ocrvqa": ocrvqa,
    "vqav2": lambda root: coco_vqa(root, "vqav2", "v2_"),
    "pope": pope,
    "llava": llava,
}
# Of each set's first split: how many samples, the first one's prompt, its answer and its references.
EXPECTED = {
    "scienceqa": (1, "Which is warm? A.ice, B.a fire, C.snow", "B", ("B",)),
    "vizwiz": (1, prompts.vizwiz("What is this?"), "unanswerable", ("soup", *["unanswerable"] * 9)),
    "iconqa-txt": (1, prompts.iconqa_txt("Which shape?", ("oval", "star")), "star", ("star",)),
    "iconqa-blank": (1, prompts.iconqa_blank("It is (_) long."), "4", ("4",)),
    "okvqa": (
        2,
        prompts.vqa("What does the dog hold?"),
        "a toy",
        ("stick", "ball", "ball", "stick", "stick", *["a toy"] * 5),
    ),
    "ocrvqa": (2, prompts.vqa("Who wrote it?"), "A. Writer", ("A. Writer",)),
    "pope": (2, prompts.vqa("Is there a cup?"), "no", ("no",)),
    "llava": (2, "Where?", "Here.", ("Here.",)),
}
EXPECTED["vqav2"] = EXPECTED["okvqa"]


@pytest.fixture
def root(tmp_path) -> Path:
    for write in LAYOUTS.values():
        write(tmp_path)
    return tmp_path


def test_every_set_has_a_layout_and_a_known_metric():
    assert set(LAYOUTS) == set(SETS)
    assert {each.metric for each in SETS.values()} <= set(metrics.METRICS)
    assert all(each.published.startswith("https://") for each in SETS.values())


@pytest.mark.parametrize("name", EXPECTED)
def test_a_record_becomes_a_sample_of_the_study(root, name):
    number, prompt, answer, references = EXPECTED[name]
    samples = load_set(SETS[name], root, SETS[name].splits[0])
    assert len(samples) == number
    assert samples[0].questions == (prompts.with_image(prompt),)
    assert samples[0].answers == (answer,)
    assert samples[0].references == references
    assert samples[0].load_image().size == (48, 48)


def test_flickr30k_draws_captions_and_requests_for_training_only(root):
    drawn = {seed: load_set(SETS["flickr30k"], root, "train", seed=seed) for seed in (1, 1, 2)}
    assert [len(samples) for samples in drawn.values()] == [4, 4]
    asked = [[(sample.questions, sample.answers) for sample in samples] for samples in drawn.values()]
    assert asked[0] != asked[1]
    assert {sample.answers[0] for samples in drawn.values() for sample in samples} <= set(drawn[1][0].references)
    again = load_set(SETS["flickr30k"], root, "train", seed=1)
    assert again == drawn[1]
    (test,) = load_set(SETS["flickr30k"], root, "test", seed=5)
    assert test.questions == (prompts.with_image(prompts.caption()),)
    assert len(test.references) == 5


def test_what_is_drawn_does_not_depend_on_where_the_files_are(root, tmp_path_factory):
    other = tmp_path_factory.mktemp("moved")
    flickr30k(other)
    first, second = (load_set(SETS["flickr30k"], each, "train", limit=3) for each in (root, other))
    assert [(s.image.name, s.questions, s.answers) for s in first] == [
        (s.image.name, s.questions, s.answers) for s in second
    ]


def test_subsets_of_one_seed_are_nested(root):
    ids = {
        (limit, seed): [sample.id for sample in load_set(SETS["flickr30k"], root, "train", limit=limit, seed=seed)]
        for limit in (1, 2, 4)
        for seed in range(4)
    }
    assert all(ids[1, seed] == ids[2, seed][:1] and ids[2, seed] == ids[4, seed][:2] for seed in range(4))
    assert len({tuple(ids[4, seed]) for seed in range(4)}) > 1
    with pytest.raises(ValueError, match=r"expected 5 usable records in .*, found 4 among 4"):
        load_set(SETS["flickr30k"], root, "train", limit=5)
    with pytest.raises(ValueError, match="limit: expected an integer of at least 1"):
        load_set(SETS["flickr30k"], root, "train", limit=0)


def spoil(path: Path, change) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


BROKEN = {
    "an answer that is no choice": (
        "scienceqa",
        lambda root: spoil(root / "scienceqa/problems.json", lambda value: value["3"].update(answer=3)),
        "problems.json problem 3: answer: expected the index of one of 3 choices, got 3",
    ),
    "a problem that is not there": (
        "scienceqa",
        lambda root: spoil(root / "scienceqa/pid_splits.json", lambda value: value["train"].append("99")),
        "problems.json problem 99: expected an object with 'choices', got None",
    ),
    "a question that nobody answered": (
        "okvqa",
        lambda root: spoil(root / "okvqa/mscoco_train2014_annotations.json", lambda value: value["annotations"].pop()),
        "entry 0 (question_id 70): expected a field 'answers'",
    ),
    "an answer that is no text": (
        "vizwiz",
        lambda root: spoil(
            root / "vizwiz/Annotations/train.json", lambda value: value[0]["answers"][3].update(answer=3)
        ),
        "train.json entry 0: answer: expected a text, got 3",
    ),
    "a missing image": (
        "vqav2",
        lambda root: (root / "coco/train2014/COCO_train2014_000000000007.jpg").unlink(),
        "COCO_train2014_000000000007.jpg, found none",
    ),
    "no image at all": (
        "iconqa-txt",
        lambda root: (root / "iconqa_data/iconqa/train/choose_txt/12/image.png").write_text("not an image"),
        "choose_txt/12/data.json: expected a readable image",
    ),
    "no JSON": (
        "iconqa-blank",
        lambda root: (root / "iconqa_data/iconqa/train/fill_in_blank/12/data.json").write_text("{"),
        "fill_in_blank/12/data.json: expected valid JSON",
    ),
    "no caption": (
        "flickr30k",
        lambda root: spoil(
            root / "flickr30k/dataset_flickr30k.json", lambda value: value["images"][0].update(sentences=[])
        ),
        "image 0: sentences: expected at least one caption, got none",
    ),
    "fewer answers than questions": (
        "ocrvqa",
        lambda root: spoil(root / "ocrvqa/dataset.json", lambda value: value["111"]["answers"].pop()),
        "book 111 question 0: answers: expected one for each of 2 questions, got 1",
    ),
    "an empty answer": (
        "ocrvqa",
        lambda root: spoil(root / "ocrvqa/dataset.json", lambda value: value["111"].update(answers=["", "On Rain"])),
        "book 111 question 0: expected a question and an answer, got 'Who wrote it?' and ''",
    ),
    "a label beside yes and no": (
        "pope",
        lambda root: (root / "pope/coco_pope_random.json").open("a").write('{"label": "maybe"}\n'),
        "coco_pope_random.json line 3: label: expected one of ['yes', 'no'], got 'maybe'",
    ),
    "a turn that is missing": (
        "llava",
        lambda root: spoil(root / "llava/llava_v1_5_mix665k.json", lambda value: value[1]["conversations"].pop()),
        "entry 1 (id 'b'): expected every human turn to be answered",
    ),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_bad_record_is_refused_or_skipped_and_counted(root, what):
    name, break_it, said = BROKEN[what]
    data_set = SETS[name]
    whole = len(load_set(data_set, root, data_set.splits[0]))
    break_it(root)
    with pytest.raises(ValueError) as refused:
        load_set(data_set, root, data_set.splits[0])
    assert said in str(refused.value) and "\n" not in str(refused.value)
    bad = BadRecords(skip=True)
    try:
        kept = load_set(data_set, root, data_set.splits[0], bad=bad)
    except ValueError as error:
        assert "expected a usable record" in str(error)
        kept = []
    assert any(said in sentence for sentence in bad.sentences)
    assert len(bad) <= 2 and len(kept) + len(bad) in (whole, whole + 1)  # one more where the record was added


@pytest.mark.parametrize(
    "name, file, text, said",
    [
        ("vizwiz", "vizwiz/Annotations/train.json", "{}", "train.json: expected a list, got {}"),
        ("ocrvqa", "ocrvqa/dataset.json", "[]", "dataset.json: expected an object, got []"),
        ("okvqa", "okvqa/mscoco_train2014_annotations.json", "{}", "expected a field 'annotations', got none"),
        ("flickr30k", "flickr30k/dataset_flickr30k.json", "nonsense", "expected valid JSON"),
    ],
)
def test_a_file_that_is_no_set_is_refused_also_where_records_are_skipped(root, name, file, text, said):
    (root / file).write_text(text)
    with pytest.raises(ValueError) as refused:
        load_set(SETS[name], root, "train", bad=BadRecords(skip=True))
    assert said in str(refused.value) and file in str(refused.value)


def test_what_is_not_there_is_named_with_where_it_is_published(tmp_path):
    with pytest.raises(ValueError, match=r"POPE random: expected pope/coco_pope_random.json, coco/val2014 in .*github"):
        load_set(SETS["pope"], tmp_path, "random")
    with pytest.raises(ValueError, match="vizwiz: expected a split of train, val, got 'test'"):
        load_set(SETS["vizwiz"], tmp_path, "test")


def test_an_image_cut_short_is_found_by_decoding(root):
    path = root / "flickr30k/flickr30k-images/1.jpg"
    Image.effect_noise((48, 48), 90).save(path)
    path.write_bytes(path.read_bytes()[:-400])
    samples, bad = load_set(SETS["flickr30k"], root, "train"), BadRecords(skip=True)
    assert [sample.image.name for sample in decodable(samples, bad)] == ["0.jpg", "2.jpg", "3.jpg"]
    assert len(bad) == 1 and "image 1: expected a readable image" in bad.sentences[0]
    with pytest.raises(ValueError, match="image 1: expected a readable image"):
        decodable(samples, BadRecords())


def test_a_sample_that_is_too_long_is_left_out_and_never_loses_image_tokens(root, processor):
    samples = load_set(SETS["ocrvqa"], root, "train")
    lengths = [Collator(processor)([sample])["input_ids"].shape[1] for sample in samples]
    limit = min(lengths)
    assert max(lengths) > limit
    collator, bad = Collator(processor, max_length=limit), BadRecords(skip=True)
    kept = fitting(samples, collator, bad)
    assert [sample.id for sample in kept] == [samples[lengths.index(limit)].id]
    assert bad.sentences == [
        f"{samples[lengths.index(max(lengths))].source}: expected at most {limit} tokens, got {max(lengths)}"
    ]
    assert (collator(kept)["input_ids"] == processor.image_token_id).sum() == (
        Collator(processor)(kept)["input_ids"] == processor.image_token_id
    ).sum()
    with pytest.raises(ValueError, match="expected at most"):
        fitting(samples, collator, BadRecords())


def test_data_check_says_what_is_there_and_what_is_missing(root, capsys):
    assert cli.main(["study", "data", "check", str(root)]) == 0
    out = capsys.readouterr().out
    for data_set in SETS.values():
        assert data_set.published in out
    assert "  train: 4 usable samples, 0 bad records" in out
    assert "  val: missing vizwiz/Annotations/val.json, vizwiz/val" in out

    spoil(root / "scienceqa/problems.json", lambda value: value["3"].update(answer="B"))
    assert cli.main(["study", "data", "check", str(root), "--dataset", "scienceqa", "--json"]) == 1
    rows = json.loads(capsys.readouterr().out)
    assert [row["split"] for row in rows] == ["train", "val", "test"]
    assert any("answer: expected an integer, got 'B'" in sentence for sentence in rows[0]["bad"])


def test_data_check_of_nothing(tmp_path, capsys):
    assert cli.main(["study", "data", "check", str(tmp_path)]) == 1
    assert cli.main(["study", "data", "check", str(tmp_path / "no")]) == 2
    assert "expected the folder of the data sets" in capsys.readouterr().err
    assert cli.main(["study", "data", "check", str(tmp_path), "--dataset", "gqa"]) == 2
    assert "--dataset: expected one of scienceqa" in capsys.readouterr().err


def test_people_who_wrote_nothing_count_but_are_not_learnt_from(root):
    def silence(value):
        value[0]["answers"] = ten("soup", "", "", "soup", "")

    spoil(root / "vizwiz/Annotations/train.json", silence)
    (sample,) = load_set(SETS["vizwiz"], root, "train")
    assert sample.answers == ("soup",) and sample.references == ("soup", "", "", "soup", *[""] * 6)
    spoil(root / "vizwiz/Annotations/train.json", lambda value: value[0].update(answers=ten("")))
    with pytest.raises(ValueError, match="expected those of ten people"):
        load_set(SETS["vizwiz"], root, "train")
