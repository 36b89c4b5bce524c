from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.matrix.recipe import MatrixRecipe, ModelEntry, load_matrix_recipe, parse_matrix_recipe, threads_of
from targets.errors import RecipeError

PUBLISHED = Path(__file__).parents[2] / "recipes" / "hardware.yaml"


def recipe(**changed: Any) -> dict[str, Any]:
    return {
        "name": "m",
        "models": [{"name": "a", "model": "timm:resnet18"}],
        "targets": [{"name": "openvino-cpu"}],
        **changed,
    }


def test_the_published_recipe_is_valid_and_wide_enough() -> None:
    published = load_matrix_recipe(PUBLISHED)

    assert published.name == PUBLISHED.stem
    assert len(published.models) >= 8
    assert published.precisions == ("fp32", "bf16", "int8")
    assert published.threads == (1, 2)
    assert {target.name for target in published.targets} == {"openvino-cpu", "onnxruntime-cpu"}
    assert (published.bench.preset, published.bench.launches) == ("smoke", 6)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"precision": ["fp32"]}, "unknown key 'precision'; did you mean 'precisions'?"),
        ({"bench": {"lanches": 6}}, "unknown key 'bench.lanches'; did you mean 'launches'?"),
        (
            {"models": [{"name": "a", "model": "timm:resnet18", "weigths": "random"}]},
            "unknown key 'models.0.weigths'; did you mean 'weights'?",
        ),
        ({"models": [{"model": "timm:resnet18"}]}, "'models.0.name' is missing"),
        ({"models": [{"name": "a"}]}, "give either model (a net by name, an ONNX file) or run (a finished run)"),
        ({"models": [{"name": "a", "model": "x.onnx", "run": "runs/a"}]}, "give either model"),
        ({"models": [{"name": "a", "model": "resnet18"}]}, "neither torchvision:NAME, timm:NAME nor a file"),
        ({"models": [{"name": "a", "model": "x.onnx", "weights": "pretrained"}]}, "an ONNX file holds its weights"),
        ({"models": [{"name": "a", "run": "runs/a", "weights": "random"}]}, "are the run's own: drop them"),
        ({"models": 2 * [{"name": "a", "model": "x.onnx"}]}, "models: a stands there twice"),
        ({"threads": [2, 2]}, "threads: 2 stands there twice"),
        ({"precisions": ["fp8"]}, "precisions.0='fp8'"),
        ({"targets": [{"name": "openvino"}]}, "Did you mean 'openvino-cpu'?"),
        ({"targets": [{"name": "openvino-cpu", "options": {"num_threads": 2}}]}, "options.num_threads is what"),
    ],
)
def test_a_fault_is_named_with_what_to_do(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError) as raised:
        parse_matrix_recipe(recipe(**changed), "m.yaml")

    assert message in str(raised.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [("- a", "holds a list, not a recipe's sections"), ("a: [", "is not YAML"), ("", "holds nothing")],
)
def test_a_file_that_is_no_recipe_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "m.yaml"
    path.write_text(text)

    with pytest.raises(RecipeError, match=message):
        load_matrix_recipe(path)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"m\.yaml cannot be read: No such file"):
        load_matrix_recipe(tmp_path / "m.yaml")


def test_nets_by_name_have_random_weights_unless_others_are_named(tmp_path: Path) -> None:
    entries = [
        {"name": "a", "model": "timm:resnet18"},
        {"name": "b", "model": "timm:resnet18", "weights": "pretrained"},
        {"name": "c", "model": "timm:resnet18", "weights": "w.safetensors"},
        {"name": "d", "model": "d.onnx"},
    ]
    models = parse_matrix_recipe(recipe(models=entries), "m.yaml").models

    assert [entry.random_weights for entry in models] == [True, False, False, False]
    assert [entry.file for entry in models] == [None, None, Path("w.safetensors"), Path("d.onnx")]


def test_a_target_without_threads_has_one_cell_a_precision() -> None:
    targets = [{"name": "openvino-cpu"}, {"name": "tensorrt"}]
    openvino, tensorrt = parse_matrix_recipe(recipe(targets=targets, threads=[1, 2]), "m.yaml").targets

    assert (threads_of(openvino, (1, 2)), threads_of(tensorrt, (1, 2))) == ((1, 2), (None,))


def test_a_recipe_survives_the_way_through_yaml(tmp_path: Path) -> None:
    published = load_matrix_recipe(PUBLISHED)
    (tmp_path / "again.yaml").write_text(yaml.safe_dump(published.model_dump(mode="json")))

    assert load_matrix_recipe(tmp_path / "again.yaml") == published


def test_the_recipe_in_the_guide_names_every_key_with_its_default() -> None:
    guide = (PUBLISHED.parents[1] / "docs" / "hardware.md").read_text(encoding="utf-8")
    (text,) = re.findall(r"^```yaml\n(.*?)^```$", guide, re.MULTILINE | re.DOTALL)
    raw = yaml.safe_load(text)
    least = {"name": "mine", "models": raw["models"], "targets": raw["targets"]}

    shown, defaults = parse_matrix_recipe(raw, "guide"), parse_matrix_recipe(least, "guide")

    assert shown == defaults
    assert {*raw, "schema_version"} == set(MatrixRecipe.model_fields)
    assert {*raw["models"][0], "run"} == set(ModelEntry.model_fields)
