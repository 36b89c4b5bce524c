"""What an ablation says: every figure of its tables is computed from the raw ones of its document."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from benchmarks.statistics import holm
from pipeline.ablation.figures import comparisons, doubts, gains, generalization, tuning_line
from pipeline.ablation.report import AblationReport, PlannedArm, main, markdown
from pipeline.ablation.run import looks_of
from targets.base import write_json
from targets.errors import IntegrityError, RecipeError, TrainingError

ALONE = [0.700, 0.705, 0.698, 0.702, 0.695]
KD = [0.730, 0.741, 0.729, 0.735, 0.733]
HELPS = [0.752, 0.760, 0.749, 0.757, 0.750]
HURTS = [0.700, 0.712, 0.701, 0.704, 0.702]
SAME = [0.7302, 0.7409, 0.7291, 0.7349, 0.7330]
UNCLEAR = [0.742, 0.735, 0.744, 0.729, 0.745]


def figures(top1: float, **more: Any) -> dict[str, Any]:
    scores = {"test_top1": top1, "train_top1": top1 + 0.1, "gap": 0.1, "ece": 0.03, "nll": 0.8}
    return {**scores, "shift": {"contrast 3": top1 - 0.2}, **more}


def arm(name: str, top1: list[float], same_as: str | None = None, images: int = 6000) -> dict[str, Any]:
    seeds = [
        {
            "seed": seed,
            "last": figures(value, agreement=0.9),
            "best": figures(value + 0.004, agreement=0.9),
            "best_epoch": 5,
            "validation_top1_last": value,
            "num_rounds": 1,
            "images_seen": images,
            "seconds": 36.0,
            "precision": "fp32",
        }
        for seed, value in enumerate(top1, 1)
    ]
    return {"name": name, "same_as": same_as, "config": {}, "seeds": seeds}


def document(*arms: dict[str, Any], **changes: Any) -> dict[str, Any]:
    net = {"model": "resnet8", "args": {}, "parameters": 5000, "macs": 1}
    data = {"source": "digits", "num_classes": 10, "num_train": 1000, "num_validation": 100, "num_test": 300}
    grid = [{"temperature": t, "kd_weight": 0.9, "validation_top1": 0.7 + t / 100} for t in (2.0, 4.0)]
    return {
        "schema_version": 1,
        "verb": "ablate",
        "name": "planted",
        "utc": "2026-01-01T00:00:00+00:00",
        "edgestill": "0.1.0",
        "versions": {"torch": "2.15.0"},
        "machine": {"cpu": "a CPU", "cores": 2, "python": "3.11"},
        "recipe": {"distill": {"train": {"epochs": 6}, "rounds": 1}},
        "data": {**data, "condition": {"train_share": 0.2, "label_noise": 0.4}},
        "seeds": [1, 2, 3, 4, 5],
        "tuning": {"tuned": {"temperature": 4.0, "kd_weight": 0.9}, "seed": 0, "grid": grid},
        "teacher": {**net, "scores": figures(0.8)},
        "student": net,
        "arms": list(arms) or [arm("alone", ALONE), arm("kd", KD), arm("recipe", HELPS)],
        "failed": [],
        **changes,
    }


def told(found: dict[str, Any]) -> dict[str, str]:
    return {row["arm"]: row["verdict"] for row in gains(found)}


def test_each_verdict_is_the_one_that_was_planted() -> None:
    planted = {"recipe": HELPS, "random-order": HURTS, "samples-off": SAME, "weights-off": UNCLEAR}

    found = told(document(arm("alone", ALONE), arm("kd", KD), *(arm(name, top1) for name, top1 in planted.items())))

    assert found.pop("weights-off").startswith("too few seeds: ")
    assert found == {
        "alone": "-",
        "kd": "helps",
        "recipe": "helps",
        "random-order": "hurts",
        "samples-off": "no difference",
    }


def test_intervals_and_p_values_are_those_of_paired_t_tests_with_holms_correction() -> None:
    found = document(arm("alone", ALONE), arm("kd", KD), arm("recipe", HELPS), arm("random-order", UNCLEAR))

    ours = {one.arm: one for one in comparisons(found)}

    pairs = {"kd": (KD, ALONE), "recipe": (HELPS, KD), "random-order": (UNCLEAR, KD)}
    tests = {name: stats.ttest_rel(*pair) for name, pair in pairs.items()}
    adjusted = dict(zip(tests, holm([test.pvalue for test in tests.values()]), strict=True))
    for name, test in tests.items():
        judged, interval = ours[name].verdict, test.confidence_interval(0.95)
        assert judged is not None
        assert judged.ci95 == pytest.approx((interval.low, interval.high))
        assert judged.p == pytest.approx(adjusted[name])
        assert judged.mean == pytest.approx(np.mean(np.subtract(*pairs[name])))
    assert {name: one.against for name, one in ours.items()} == {"kd": "alone", "recipe": "kd", "random-order": "kd"}


def test_seeds_are_paired_by_their_number_and_those_that_one_side_lacks_do_not_count() -> None:
    recipe = arm("recipe", HELPS)
    recipe["seeds"] = [one for one in reversed(recipe["seeds"]) if one["seed"] != 2]

    (judged,) = comparisons(document(arm("kd", KD), recipe))

    assert judged.verdict is not None
    assert judged.verdict.num_seeds == 4
    assert judged.verdict.mean == pytest.approx(
        np.mean([h - k for i, (h, k) in enumerate(zip(HELPS, KD, strict=True)) if i != 1])
    )


def test_one_training_under_two_names_is_judged_once() -> None:
    twice = document(arm("kd", KD), arm("recipe", UNCLEAR), arm("random-order", UNCLEAR, same_as="recipe"))
    once = document(arm("kd", KD), arm("recipe", UNCLEAR))

    judged = {one.arm: one for one in comparisons(twice)}

    assert (judged["random-order"].verdict, judged["random-order"].why) == (None, "the same training as recipe")
    assert judged["recipe"].verdict == comparisons(once)[0].verdict


def test_an_arm_with_fewer_than_two_seeds_is_shown_and_not_judged() -> None:
    found = document(arm("kd", KD), arm("recipe", HELPS), arm("random-order", HURTS[:1]), arm("samples-off", []))

    verdicts = told(found)

    assert verdicts["random-order"] == "1 of its seeds are kd's too"
    assert verdicts["samples-off"] == "0 of its seeds are kd's too"
    assert verdicts["recipe"] == "helps"


def test_without_the_student_alone_plain_kd_is_only_a_baseline() -> None:
    assert told(document(arm("kd", KD), arm("recipe", HELPS))) == {"kd": "-", "recipe": "helps"}


def test_a_table_shows_means_with_their_interval_and_the_share_of_images_that_an_arm_saw() -> None:
    rows = {row["arm"]: row for row in gains(document(arm("kd", KD), arm("recipe", HELPS, images=4500)))}

    reach = stats.sem(KD) * stats.t.ppf(0.975, 4)
    assert rows["kd"]["last epoch, %"] == f"{np.mean(KD):.2%} ± {reach:.2%}".replace("%", "")
    assert rows["kd"]["best epoch, %"] == f"{np.mean(KD) + 0.004:.2%}"[:-1]
    assert (rows["kd"]["images, %"], rows["recipe"]["images, %"]) == ("100", "75")


def test_generalization_stands_beside_the_teachers_for_every_arm() -> None:
    rows = generalization(document())

    assert [row["arm"] for row in rows] == ["teacher", "alone", "kd", "recipe"]
    assert rows[0] == {
        "arm": "teacher",
        "train, %": "90.00",
        "test, %": "80.00",
        "gap, points": "10.00",
        "ECE, %": "3.00",
        "NLL, nats": "0.8000",
        "contrast 3, %": "60.00",
        "as the teacher, %": "-",
    }
    assert rows[2]["contrast 3, %"] == f"{np.mean(KD) - 0.2:.2%}"[:-1]
    assert rows[2]["as the teacher, %"] == "90.00"


def test_how_plain_kd_was_tuned_is_told_and_that_the_grid_ends_where_it_is_best() -> None:
    found = document()

    assert tuning_line(found) == (
        "Plain KD: T = 4, weight 0.9, the best of 2 on validation under seed 0 (T 2 w 0.9: 72.00, T 4 w 0.9: 74.00). "
        "Its best temperature is at the edge of the grid."
    )
    given = {**found["tuning"], "grid": []}
    assert tuning_line({**found, "tuning": given}).endswith("as the recipe gives them, not tuned.")


def test_a_weight_at_the_edge_of_the_grid_is_told_but_not_one_of_1() -> None:
    def said(tuned: float, *tried: float) -> str:
        grid = [{"temperature": 4.0, "kd_weight": weight, "validation_top1": 0.7} for weight in tried]
        tuning = {"tuned": {"temperature": 4.0, "kd_weight": tuned}, "seed": 0, "grid": grid}
        return tuning_line(document(tuning=tuning))

    assert said(0.9, 0.5, 0.9).endswith("Its best weight is at the edge of the grid.")
    assert "edge" not in said(1.0, 0.5, 1.0)
    assert "edge" not in said(0.9, 0.5, 0.9, 1.0)


def test_what_weakens_the_verdicts_is_said_below_them() -> None:
    mixed = arm("recipe", HELPS)
    mixed["seeds"][2]["precision"] = "bf16"

    assert doubts(document()) == []
    assert doubts(document(arm("kd", KD), mixed)) == [
        "Some trained in bf16 and some in fp32: give one train.precision."
    ]
    assert doubts(document(seeds=[1, 2, 3])) == ["Fewer than 5 seeds: their spread is hardly known."]
    assert "hardly known" in markdown(document(seeds=[1, 2, 3]))


def test_who_adds_seeds_and_looks_again_is_told_what_it_costs() -> None:
    (again,) = doubts(document(looks=[3, 5]))

    assert again.startswith("Judged before, after 3 seeds: who chooses the number of seeds by the verdict")
    assert doubts(document(looks=[5])) == []


def test_a_look_is_one_of_the_same_question(tmp_path: Path) -> None:
    path = tmp_path / "ablation.json"
    asked = {"seed": 0, "data": {"source": "digits"}, "teacher": {}, **document()["recipe"]}
    other = {**asked, "distill": {"train": {"epochs": 7}, "rounds": 1}}

    def document_of(num_seeds: int, **changes: Any) -> dict[str, Any]:
        return document(seeds=list(range(1, num_seeds + 1)), **{"recipe": asked, **changes})

    assert looks_of(path, document_of(5)) == [5]
    write_json(path, document_of(3))
    assert looks_of(path, document_of(5)) == [3, 5]
    assert looks_of(path, document_of(5, recipe=other)) == [5]
    write_json(path, document_of(5, looks=[3, 5]))
    assert looks_of(path, document_of(7)) == [3, 5, 7]
    assert looks_of(path, document_of(5)) == [3, 5]
    assert looks_of(path, document_of(3)) == [5, 3]


@pytest.mark.parametrize("text", ["", "[1]", '{"x": 1}', '{"looks": null, "recipe": {}, "seeds": 3}'])
def test_an_earlier_result_that_cannot_be_read_is_no_look(tmp_path: Path, text: str) -> None:
    (tmp_path / "ablation.json").write_text(text)

    assert looks_of(
        tmp_path / "ablation.json", document(recipe=dict.fromkeys(("seed", "data", "teacher", "distill")))
    ) == [5]


def test_a_student_of_few_labels_that_had_fewer_steps_is_told_apart() -> None:
    alone = arm("alone", ALONE)
    for one in alone["seeds"]:
        one["images_seen"] /= 10

    (told,) = doubts(document(alone, arm("kd", KD), arm("recipe", HELPS)))

    assert told.startswith("alone is shown the images with a label, 10% of what kd is shown")


def test_the_text_the_markdown_and_the_json_say_the_same(tmp_path: Path) -> None:
    failed = [{"training": "recipe, seed 3", "error": "the loss is nan"}]
    failure = TrainingError("1 training failed")

    report = AblationReport(run_dir=tmp_path, document=document(failed=failed), failure=failure)

    as_json = json.loads(json.dumps(report.to_json()))
    for text in (report.text(), markdown(document(failed=failed))):
        assert "recipe, seed 3: the loss is nan" in text
        assert "1,000 train (20% of the train split, 40% of the labels wrong), 100 validation, 300 test" in text
        assert "resnet8 (5 K) from resnet8 (5 K), 6 epochs an arm; seeds 1 to 5" in text
        assert "15 trainings took 9 minutes" in text
    assert (as_json["exit_code"], as_json["error"]) == (3, "1 training failed")
    by_arm = {one["arm"]: one["verdict"]["verdict"] for one in as_json["comparisons"]}
    assert by_arm == {"kd": "helps", "recipe": "helps"}
    assert as_json["arms"] == document()["arms"]


def test_the_command_prints_the_tables_of_files_and_refuses_others(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, other = tmp_path / "a.json", tmp_path / "b.json"
    path.write_text(json.dumps(document()))
    other.write_text("{}")

    main([str(path)])
    alone = capsys.readouterr().out
    main([str(path), str(path)])

    assert alone.startswith("| arm | seeds | last epoch, % |")
    assert capsys.readouterr().out.count(f"**planted**\n\n{alone.strip()}") == 2
    with pytest.raises(IntegrityError, match="holds no ablation"):
        main([str(other)])
    with pytest.raises(RecipeError, match="No file is named"):
        main([])


def test_a_plan_says_what_is_finished_and_what_shares_a_training(tmp_path: Path) -> None:
    plan = (
        PlannedArm(arm="kd", num_trainings=5, num_finished=2),
        PlannedArm(arm="recipe", num_trainings=5, num_finished=0, same_as="kd"),
    )

    report = AblationReport(run_dir=tmp_path, plan=plan)

    assert report.text().splitlines() == [
        "arm     finished  to train",
        "kd      2         3",
        "recipe  0         none, the same as kd",
    ]
    assert [one["num_finished"] for one in report.to_json()["plan"]] == [2, 0]


def test_the_overview_has_a_row_a_file_with_what_was_taken_from_the_data_and_the_recipes_verdict(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = tmp_path / "a.json", tmp_path / "b.json"
    data = document()["data"]
    cifar = {**data, "source": "npz:somewhere/cifar10.npz", "condition": {"train_share": 1.0, "label_noise": 0.0}}
    first.write_text(json.dumps(document()))
    second.write_text(json.dumps(document(arm("kd", KD), arm("recipe", SAME), data=cifar)))

    main(["--overview", str(first), str(second)])

    head, _, one, other = capsys.readouterr().out.splitlines()
    assert head == "| data | alone, % | kd, % | recipe, % | recipe against kd, points (95 % CI) | verdict |"
    assert one.startswith("| digits, 20% of the train split, 40% of the labels wrong | 70.00 ± ")
    interval = stats.ttest_rel(HELPS, KD).confidence_interval(0.95)
    assert one.endswith(f" | +2.00 ({interval.low * 100:+.2f} to {interval.high * 100:+.2f}) | helps |")
    assert other.startswith("| cifar10 | - | 73.36 ± ")
    assert other.endswith(" | no difference |")


def test_a_loss_too_small_to_print_has_no_minus() -> None:
    (row,) = (
        row
        for row in gains(document(arm("kd", KD), arm("recipe", [top1 - 1e-6 for top1 in KD])))
        if row["arm"] == "recipe"
    )

    assert row["points (95 % CI)"].startswith("+0.00 (")
