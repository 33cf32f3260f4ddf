"""Recipes: what they hold, what they cost, a run with faked jobs, one real cell, and the table beside the papers."""

import json
import math

import pytest
import torch
from PIL import Image

from mmpeft_fast import cli
from mmpeft_fast.data.sets import EASY_VQA_SETS, SETS
from mmpeft_fast.methods import METHODS, make_method
from mmpeft_fast.placement import PARTS
from mmpeft_fast.plan.devices import device_named
from mmpeft_fast.study import in_turn
from mmpeft_fast.study import run as study_run
from mmpeft_fast.study.base import build_base
from mmpeft_fast.study.cells import BaseSpec
from mmpeft_fast.study.inputs import prepare_inputs
from mmpeft_fast.study.metrics import METRICS
from mmpeft_fast.study.recipes import FULL, RECIPES, SCALES, SMALL, Data, RecipeCell, make_recipe
from mmpeft_fast.study.recipes.cell import _cell_of, measure
from mmpeft_fast.study.recipes.cost import Planner, cost_of
from mmpeft_fast.study.recipes.page import recipe_page
from mmpeft_fast.study.recipes.table import MEASURES, recipe_table, summary
from mmpeft_fast.train import TrainConfig


@pytest.mark.parametrize("scale", SCALES.values(), ids=SCALES)
@pytest.mark.parametrize("name", RECIPES)
def test_every_cell_can_be_meant(name, scale):
    recipe = make_recipe(name, scale)
    assert recipe.name == name and recipe.cells
    for cell in recipe.cells:
        data = [*filter(None, [cell.data]), *cell.evaluations]
        for each in data:
            data_set = {**SETS, **EASY_VQA_SETS}[each.name]
            assert each.split in data_set.splits
            assert each.num_samples > 0
            assert (each.metric or data_set.metric) in METRICS
        assert set(cell.train) <= set(PARTS)
        if cell.method != "none":
            make_method(cell.method, **cell.settings)
            TrainConfig.for_study(cell.method, "llava", seed=cell.seed, **cell.training)
        assert _cell_of(json.loads(json.dumps(vars(cell), default=vars))) == cell
    assert {each.measure for each in recipe.published} <= set(MEASURES)


def test_every_published_number_has_a_row_of_the_full_size():
    for name in RECIPES:
        recipe = make_recipe(name, FULL)
        rows = [{axis: cell.labels[axis] for axis in recipe.rows} for cell in recipe.cells]
        for published in recipe.published:
            assert any(published.labels.items() <= row.items() for row in rows), (name, published)
    assert sum(len(make_recipe(name, FULL).published) for name in RECIPES) > 60


def test_recipes_are_the_papers_experiments():
    stability, generalisation, location = (
        make_recipe(name, FULL) for name in ("stability", "generalisation", "location")
    )
    assert {cell.seed for cell in stability.cells} == {21, 42, 63}
    assert all(cell.training["epochs"] == 12 and cell.evaluate_every == 3 for cell in generalisation.cells)
    assert all(len({each.name for each in cell.evaluations}) == 3 for cell in generalisation.cells)
    assert {cell.settings["targets"] for cell in location.cells} == {"attention", "mlp", "both"}
    samples = {cell.data.limit for cell in make_recipe("data-scale", FULL).cells}
    assert samples == {1_000, 5_000, 10_000}
    sizes = [cell.settings for cell in make_recipe("size", FULL).cells if cell.method == "lora"]
    assert {(each["r"], each["alpha"]) for each in sizes} == {(16, 32), (32, 64), (64, 128), (128, 256)}
    by_word = {cell.labels["connector"]: cell.train for cell in make_recipe("connector", FULL).cells}
    assert by_word == {"frozen": (), "tuned": ("connector",)}
    assert {cell.train for cell in make_recipe("layernorm", FULL).cells if cell.method == "lora"} == {PARTS}


def test_cost_counts_samples_and_asks_the_planner_once_a_step():
    cells = tuple(
        RecipeCell(
            model="llava-1.5-7b",
            labels={"model": "llava-1.5-7b", "set": str(index)},
            method="ia3",
            data=Data(name="pope", split="random", limit=100),
            training={"batch_size": 1, "epochs": 2},
            evaluations=(Data(name="pope", split="random", size=30),),
            evaluate_every=1,
        )
        for index in range(2)
    )
    recipe = make_recipe("methods", SMALL)
    recipe = type(recipe)(name="x", title="x", source="x", rows=("model",), cells=cells)
    cost = cost_of(recipe)
    assert (cost.trained_samples, cost.evaluated_samples, cost.hours) == (400, 120, None)
    planner = Planner(device_named("h100"))
    cost = cost_of(recipe, planner)
    sample_s, peak = planner.step(cells[0])
    assert cost.hours == pytest.approx(400 * sample_s / 3600) and cost.peak_gib == pytest.approx(peak / 2**30)
    assert len(planner._planned) == 1


def test_the_list_as_json(capsys):
    assert cli.main(["study", "recipes", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [each["name"] for each in found] == list(RECIPES)
    for each in found:
        assert each["cells"] and each["source"] and each["cost"]["trained_samples"] > 0
    assert cli.main(["study", "recipes", "location", "--small"]) == 0
    assert "location: location of the modules (arXiv 2406.05130)\n  9 cells" in capsys.readouterr().out
    assert cli.main(["study", "recipes", "nothing"]) == 2
    assert "recipe: expected one of methods, connector" in capsys.readouterr().err


def test_what_is_missing_is_one_sentence(tmp_path, capsys):
    (tmp_path / "llava-1.5-7b").mkdir()
    words = ["study", "--recipe", "layernorm", "--output", str(tmp_path / "out")]
    assert cli.main([*words, "--checkpoints", str(tmp_path)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    assert "expected the checkpoint folders llava-1.5-13b in" in err
    assert (
        "the data sets llava (conversation58k, instruct150k), vqav2 (val), flickr30k (test), pope (adversarial)" in err
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "words, said",
    [
        (["--recipe", "size", "--small", "--steps", "3"], "--steps: expected not beside --recipe, got 3"),
        (["--recipe", "size", "--small", "--implementations", "peft"], "--implementations: expected not beside"),
        (["--small"], "--small: expected only beside --recipe"),
        (["--datasets", "x"], "--datasets: expected only beside --recipe, got x"),
    ],
)
def test_options_of_the_study_and_of_a_recipe(words, said, capsys):
    assert cli.main(["study", *words]) == 2
    assert said in capsys.readouterr().err


def outcome(spec: dict) -> dict:
    """What a cell measures, made up: the score is 50 % and a tenth of the seed."""
    scores = [
        {"epoch": epoch, "set": each["name"], "metric": "exact_match", "accuracy": 0.5 + spec["seed"] / 1000}
        for each in spec["evaluations"]
        for epoch in (1.0, 3.0)
    ]
    measured = {"trainable_params": 10, "total_params": 1000, "step_ms_p50": 20.0, "tokens_per_s": 100.0}
    return {"status": "success", **measured, "peak_mib": 700.0, "loss_last": 1.0, "scores": scores}


@pytest.fixture
def jobs(monkeypatch) -> list[str]:
    """Jobs answer at once; the names of the cells that ran. LoRA fails."""
    names: list[str] = []

    def run_job(job, tick=lambda: None):
        module, job = job.module, job.spec
        spec = job["spec"]
        if module.endswith("study.base"):
            study_run.Path(job["folder"]).mkdir(parents=True)
            return {"status": "success"}
        names.append(f"{spec['method']} {spec['seed']}")
        assert study_run.Path(job["base"]).is_dir()
        if spec["method"] == "lora":
            return {"status": "failed", "reason": "ValueError: no"}
        return outcome(spec)

    monkeypatch.setattr(study_run, "run_job", run_job)
    monkeypatch.setattr(in_turn, "run_fitting", run_job)
    return names


def test_a_run_keeps_a_row_a_cell_and_goes_on(tmp_path, jobs, capsys):
    words = ["study", "--recipe", "stability", "--small", "--methods", "ia3", "lora", "--output", str(tmp_path)]
    assert cli.main(words) == 1
    out = capsys.readouterr().out
    assert jobs == [f"{method} {seed}" for method in ("lora", "ia3") for seed in (21, 42, 63)]
    row = next(line for line in out.splitlines() if line.startswith("tiny-llava  ia3"))
    assert row.split()[2:6] == ["easy-vqa-color", "3", "54.2", "2.1"]
    assert "3 (3 failed)" in out

    folder = tmp_path / "stability-small"
    assert len((folder / "results.jsonl").read_text().splitlines()) == 6
    (entry, _) = json.loads((folder / "summary.json").read_text())[::-1]
    assert entry["score"] == pytest.approx(54.2) and entry["deviation"] == pytest.approx(2.1)

    jobs.clear()
    cli.main(words)
    assert jobs == ["lora 21", "lora 42", "lora 63"]
    capsys.readouterr()

    assert cli.main(["study", "status", str(tmp_path)]) == 1
    told = capsys.readouterr().out
    assert (
        "3 of 6 cells done, 3 failed, 0 to come" in told and "tiny-llava lora 21 easy-vqa-color: ValueError: no" in told
    )
    assert cli.main([*words, "--models", "gpt"]) == 2
    assert "--models: recipe stability has tiny-llava, got 'gpt'" in capsys.readouterr().err


def test_published_numbers_stand_beside_ours():
    recipe = make_recipe("layernorm", FULL)
    rows = []
    for cell in recipe.cells:
        spec = {"seed": 42, "evaluations": [vars(each) for each in cell.evaluations]}
        trained = {"lora": 200, "layernorm": 100, "layernorm-simp": 1}[cell.method]
        measured = {**outcome(spec), "trainable_params": trained, "peak_mib": 1e4 + 100 * trained}
        rows.append({"labels": cell.labels, "seed": 42, **measured})
    entries = summary(recipe, rows, any_model=False)
    large = next(e for e in entries if e["labels"] == {"model": "llava-1.5-13b", "method": "LayerNorm", "data": "all"})
    ours = {each["quantity"]: (each["ours"], each["value"]) for each in large["published"]}
    assert ours["less parameters than LoRA, %"] == ("50.0", "41.9")
    assert ours["less memory than LoRA, %"] == ("33.3", "17.6")
    assert ours["trained parameters, %"] == ("10", "2.50")
    assert ours["memory of one A100, GB"][1] == "37.1"
    assert (
        "LayerNorm dialogues: memory of one A100, GB: ours 21.0, llava-1.5-7b 24.2 (arXiv 2312.11420"
        in recipe_table(recipe, entries)
    )


def test_hallucination_is_the_mean_over_epochs_of_one_metric():
    recipe = make_recipe("hallucination", SMALL)
    scores = [
        {"epoch": epoch, "set": "easy-vqa-caption", "metric": metric, "first": value, "accuracy": 0.0}
        for metric in ("shape_hallucination", "pope")
        for epoch, value in ((1.0, 0.1), (2.0, 0.3))
    ]
    row = {"labels": recipe.cells[0].labels, "seed": 42, "status": "success", "scores": scores}
    (entry,) = summary(recipe, [row], any_model=True)
    assert entry["score"] == pytest.approx(20.0)
    assert [each["value"] for each in entry["published"]] == ["13.3"]
    assert entry["published"][0]["ours"] == "20.0"
    assert "shape_hallucination 1: 10.0, 2: 30.0" in recipe_table(recipe, [entry])
    html = recipe_page(recipe, [entry])
    assert "adapter 10.0 at 1, 30.0 at 2" in html  # the curve, as it is read out
    for words in ("13.3</td>", "20.0</td>", "Scores by epoch", "The papers beside", "<li>the paper counted by hand"):
        assert words in html
    assert "http://" not in html and "https://" not in html


def test_the_page_of_failed_cells_has_no_charts():
    recipe = make_recipe("location", SMALL)
    rows = [{"labels": cell.labels, "seed": 42, "status": "failed"} for cell in recipe.cells]
    html = recipe_page(recipe, summary(recipe, rows, any_model=True))
    assert "<svg" not in html and "1 (1 failed)</td>" in html


@pytest.fixture(scope="module")
def tiny_base(tmp_path_factory):
    """A tiny LLaVA that has not been trained, on disk."""
    folder = tmp_path_factory.mktemp("base")
    inputs = prepare_inputs(data=None, images=None, eval_samples=8)
    spec = BaseSpec(model="tiny-llava", data="easy-vqa", pretrain_steps=0, seed=42)
    build_base(spec, inputs, eval_samples=8, threads=1, folder=folder / "base")
    return str(folder / "base")


def small_cell(**fields) -> RecipeCell:
    data = Data(name="easy-vqa-color", split="train", limit=16)
    test = Data(name="easy-vqa-yes-no", split="test", limit=6)
    training = {"batch_size": 4, "global_batch_size": 4, "epochs": 2, "learning_rate": 1e-3}
    fields = {"method": "ia3", "data": data, "evaluations": (test,), "training": training} | fields
    return RecipeCell(model="tiny-llava", labels={"model": "tiny-llava"}, dtype="fp32", **fields)


def test_a_cell_trains_and_is_tested_on_the_way(tiny_base):
    threads = torch.get_num_threads()
    cell = small_cell(evaluate_every=1, train=("connector", "head"))
    row = measure(cell, base=tiny_base, datasets="", threads=threads, device="cpu")
    assert row["steps"] == 8 and row["num_samples"] == 16 and row["num_bad_records"] == 0
    assert [score["epoch"] for score in row["scores"]] == [1.0, 2.0]
    assert all(0 <= score["accuracy"] <= 1 and score["metric"] == "pope" for score in row["scores"])
    assert math.isfinite(row["loss_last"]) and row["step_ms_p50"] > 0
    alone = measure(small_cell(train=()), base=tiny_base, datasets="", threads=threads, device="cpu")
    assert row["trainable_params"] > alone["trainable_params"] > 0


@pytest.mark.parametrize("implementation", ["fused", "peft"])
def test_several_questions_an_image_and_a_length(tiny_base, implementation):
    training = {"batch_size": 4, "global_batch_size": 4, "max_steps": 2, "learning_rate": 1e-3}
    data = Data(name="easy-vqa", split="test", limit=8)
    common = {"implementation": implementation, "training": training, "data": data, "evaluations": ()}
    run = {"base": tiny_base, "datasets": "", "threads": torch.get_num_threads(), "device": "cpu"}
    apart, shared = (measure(small_cell(questions_per_image=number, **common), **run) for number in (1, 4))
    assert (shared["tokens_per_step"] < apart["tokens_per_step"] / 2) == (implementation == "fused")
    assert shared["scores"] == [] and shared["num_samples"] == 8
    long = measure(small_cell(length=256, **common), **run)
    assert long["tokens_per_step"] == pytest.approx(apart["tokens_per_step"], rel=0.1)  # padding is not counted


def test_a_bad_record_is_left_out_and_counted_or_ends_the_cell(tiny_base, tmp_path):
    folder = tmp_path / "iconqa_data/iconqa/train/fill_in_blank"
    for index, answer in enumerate(("4", "5", None)):
        (folder / str(index)).mkdir(parents=True)
        (folder / str(index) / "data.json").write_text(json.dumps({"question": "(_)?", "answer": answer}))
        Image.new("RGB", (40, 40), "red").save(folder / str(index) / "image.png")
    data = Data(name="iconqa-blank", split="train", size=2)
    cell = small_cell(
        data=data, evaluations=(data,), training={"max_steps": 1, "global_batch_size": 2, "batch_size": 2}
    )
    run = {"base": tiny_base, "datasets": str(tmp_path), "threads": torch.get_num_threads(), "device": "cpu"}
    row = measure(cell, **run)
    assert row["num_samples"] == 2 and row["num_bad_records"] == 2  # in training and in the test
    assert "2/data.json: answer: expected a text, got None" in row["bad_records"][0]
    with pytest.raises(ValueError, match="answer: expected a text, got None"):
        measure(cell, **run, refuse_bad_records=True)


def test_the_base_alone_is_tested_and_not_trained(tiny_base):
    cell = small_cell(method="none")
    row = measure(cell, base=tiny_base, datasets="", threads=torch.get_num_threads(), device="cpu")
    assert row["trainable_params"] == 0 and [score["epoch"] for score in row["scores"]] == [0]
    assert METHODS.keys().isdisjoint({"none"})
