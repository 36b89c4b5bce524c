"""The recipe: what is accepted, what is refused, and how the refusal reads."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from pipeline.recipe import Recipe, load_recipe, parse_recipe, write_first_recipe
from targets.errors import EdgestillError, RecipeError

MINIMAL = {
    "name": "r",
    "data": {"source": "digits"},
    "teacher": {"model": "resnet20"},
    "distill": {"model": "resnet8"},
    "targets": [{"name": "openvino-cpu"}],
}


def write(tmp_path: Path, recipe: object) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def test_a_minimal_recipe_gets_every_default(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, MINIMAL))

    assert (recipe.distill.temperature, recipe.quantize.method, recipe.targets[0].device) == (4.0, "ladder", "local")


def test_a_resolved_recipe_reads_back_as_itself(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, MINIMAL))

    assert parse_recipe(recipe.model_dump(mode="json"), "again") == recipe


def test_an_unknown_key_is_refused_with_the_nearest_known_one(tmp_path: Path) -> None:
    path = write(tmp_path, {**MINIMAL, "distill": {"model": "resnet8", "train": {"epoch": 3}}})

    with pytest.raises(RecipeError, match=r"unknown key 'distill.train.epoch'; did you mean 'epochs'\?"):
        load_recipe(path)


def test_an_unknown_key_in_a_list_names_its_place(tmp_path: Path) -> None:
    path = write(tmp_path, {**MINIMAL, "targets": [{"name": "openvino-cpu", "budget": {"p50": 2}}]})

    with pytest.raises(RecipeError, match=r"'targets\.0\.budget\.p50'; did you mean 'p50_ms'\?"):
        load_recipe(path)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("distill.train.epochs=20", 20),
        ("distill.temperature=2", 2.0),
        ("targets.0.budget.p99_ms=5.5", 5.5),
        ("seed=7", 7),
    ],
)
def test_set_overrides_one_key(tmp_path: Path, override: str, expected: object) -> None:
    value: object = load_recipe(write(tmp_path, MINIMAL), [override])
    for part in override.partition("=")[0].split("."):
        value = value[int(part)] if isinstance(value, tuple) else getattr(value, part)

    assert value == expected


@pytest.mark.parametrize(
    "override", ["distill", "=3", "a..b=1", "targets.9.name=x", "name.x=1", "seed=[", "name.0=1", "seed=2001-99-99"]
)
def test_a_set_that_sets_nothing_is_refused(tmp_path: Path, override: str) -> None:
    with pytest.raises(RecipeError):
        load_recipe(write(tmp_path, MINIMAL), [override])


@pytest.mark.parametrize(
    "change",
    [
        {"distill": {"model": "resnet8", "temperature": 0}},
        {"distill": {"model": "resnet8", "train": {"epochs": True}}},
        {"distill": {"model": "resnet8", "train": {"lr": float("nan")}}},
        {"distill": {"model": "resnet8", "train": {"schedule": "step"}}},
        {"teacher": {"model": "resnet20", "train": None}},
        {"distill": {"model": "resnet8", "train": None}},
        {"distill": {"model": "resnet8", "train": None, "checkpoint": "s.safetensors", "rounds": 2}},
        {"targets": [{"name": "openvino-cpu", "scheme": "portabel"}]},
        {"targets": []},
        {"targets": [{"name": "openvino-cpu"}, {"name": "openvino-cpu"}]},
        {"name": "../elsewhere"},
        {"data": {"source": "digits", "validation": 0}},
        {"schema_version": 2},
        {"teacher": {"model": "resnet20", "args": {"widths": [float("nan")]}}},
        {"targets": [{"name": "openvino-cpu", "options": {"num_threads": b"2"}}]},
    ],
)
def test_values_that_cannot_be_are_refused_in_three_lines(tmp_path: Path, change: dict[str, object]) -> None:
    with pytest.raises(RecipeError) as refused:
        load_recipe(write(tmp_path, {**MINIMAL, **change}))

    assert len(str(refused.value).splitlines()) <= 3
    assert refused.value.exit_code == 2


def test_a_target_or_an_option_that_does_not_exist_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="Did you mean 'openvino-cpu'"):
        load_recipe(write(tmp_path, {**MINIMAL, "targets": [{"name": "openvino"}]}))
    with pytest.raises(RecipeError, match="Did you mean 'num_threads'"):
        load_recipe(write(tmp_path, {**MINIMAL, "targets": [{"name": "openvino-cpu", "options": {"threads": 2}}]}))


@pytest.mark.parametrize("text", ["", "just words", "- a\n- b", "a: [1", "\t- x", "a: &a [*a]", "\x00"])
def test_a_file_that_is_no_recipe_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)

    with pytest.raises(RecipeError):
        load_recipe(path)


def test_a_recipe_cannot_build_python_objects(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("name: !!python/object/apply:os.getcwd []\n")

    with pytest.raises(RecipeError, match="not YAML"):
        load_recipe(path)


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(max_size=8), children, max_size=3),
    max_leaves=8,
)


@given(section=st.sampled_from(sorted(Recipe.model_fields)), value=plain)
def test_any_value_in_any_section_is_taken_or_refused_with_a_message(section: str, value: object) -> None:
    try:
        parse_recipe({**MINIMAL, section: value}, "recipe")
    except EdgestillError as refused:
        assert refused.exit_code == 2
        assert 0 < len(str(refused).splitlines()) <= 3


def test_the_first_recipe_is_valid_and_never_overwrites(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    write_first_recipe(path, "digits")

    assert load_recipe(path).data.source == "digits"
    with pytest.raises(RecipeError, match="exists"):
        write_first_recipe(path, "digits")


def test_reading_a_recipe_imports_no_torch() -> None:
    code = "import sys, pipeline.recipe; sys.exit('torch' in sys.modules)"

    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
