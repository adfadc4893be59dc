"""Settings come from the right place, with the right type, and a wrong one says which and why."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compress import settings
from compress.errors import UsageError
from compress.registry import METHODS, find_method, methods_for
from compress.settings import BY_KEY, BY_NAME, SETTINGS, presets, resolve


def resolved(folder: Path, *, flags: dict[str, object] | None = None, preset: str | None = None, **environment: str):
    return resolve(flags or {}, environment=environment, folder=folder, preset=preset)


def refused(folder: Path, **arguments: object) -> UsageError:
    with pytest.raises(UsageError) as caught:
        resolved(folder, **arguments)  # type: ignore[arg-type]
    return caught.value


def write(folder: Path, text: str, name: str = "hcompress.toml") -> Path:
    (folder / name).write_text(text)
    return folder


def test_flag_beats_environment_beats_config_beats_preset_beats_default(tmp_path: Path) -> None:
    write(tmp_path, '[run]\nbudget = "3bit"')
    levels = [
        ({}, None, {}, tmp_path / "empty", (None, "default")),
        ({}, "ci-gate", {}, tmp_path / "empty", ("8bit", "preset ci-gate")),
        ({}, "ci-gate", {}, tmp_path, ("3bit", "hcompress.toml")),
        ({}, "ci-gate", {"HCOMPRESS_BUDGET": "5bit"}, tmp_path, ("5bit", "environment")),
        ({"budget": "6bit"}, "ci-gate", {"HCOMPRESS_BUDGET": "5bit"}, tmp_path, ("6bit", "flag")),
    ]
    for flags, preset, environment, folder, expected in levels:
        value = resolve(flags, environment=environment, folder=folder, preset=preset)["budget"]
        assert (value.value, value.origin) == expected


def test_pyproject_is_read_where_there_is_no_hcompress_toml(tmp_path: Path) -> None:
    write(tmp_path, "[tool.hcompress.gate]\nmax_drop = 2", "pyproject.toml")
    value = resolved(tmp_path)["max_drop"]
    assert (value.value, value.origin) == (2.0, "pyproject.toml")
    write(tmp_path, "[gate]\nmax_drop = 3")
    assert resolved(tmp_path)["max_drop"].value == 3.0


def test_a_pyproject_without_our_table_changes_nothing(tmp_path: Path) -> None:
    assert resolved(write(tmp_path, "[project]\nname = 'x'", "pyproject.toml"))["max_drop"].origin == "default"


def test_parents_of_the_folder_are_not_read(tmp_path: Path) -> None:
    write(tmp_path, "[run]\nseed = 7")
    (tmp_path / "inner").mkdir()
    assert resolved(tmp_path / "inner")["seed"].value == 0


def test_paths_of_a_config_are_relative_to_it_and_names_are_not(tmp_path: Path) -> None:
    (tmp_path / "data.npz").touch()
    write(
        tmp_path,
        '[model]\nfactory = "net.py:make"\n[data]\ncalibration = "data.npz"\neval = "/abs/e.npz"\n'
        '[task]\nkind = "classification"\n',
    )
    found = resolved(tmp_path)
    assert found["model"].value == str(tmp_path / "net.py:make")
    assert found["data"].value == str(tmp_path / "data.npz")
    assert found["eval"].value == "/abs/e.npz"
    assert found["task"].value == "classification"
    assert resolved(write(tmp_path, '[model]\nfactory = "pkg.mod:make"'))["model"].value == "pkg.mod:make"


def test_types_are_the_same_from_a_flag_and_from_a_config(tmp_path: Path) -> None:
    text = {
        "num_calibration": "64",
        "max_drop": "0.5",
        "mean": "0.5, 0.25",
        "exclude": "a*,b",
        "input_shape": "3,32,32",
    }
    write(
        tmp_path,
        '[data]\nnum_calibration = 64\nmean = [0.5, 0.25]\n[gate]\nmax_drop = 0.5\n[run]\nexclude = ["a*", "b"]\n'
        "[model]\ninput_shape = [3, 32, 32]\nargs = {width = 16}\n",
    )
    from_config, from_flags = resolved(tmp_path), resolved(tmp_path, flags=dict(text))
    expected = {"num_calibration": 64, "max_drop": 0.5, "mean": (0.5, 0.25), "exclude": ("a*", "b")}
    for name, value in (expected | {"input_shape": "3,32,32"}).items():
        assert from_config[name].value == from_flags[name].value == value
    assert from_config["model_args"].value == '{"width": 16}'


def test_an_empty_list_of_words_excludes_nothing(tmp_path: Path) -> None:
    assert resolved(tmp_path, flags={"exclude": ""})["exclude"].value == ()


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("num_calibration", "many", "'many' is not a whole number"),
        ("num_calibration", "1.5", "'1.5' is not a whole number"),
        ("num_calibration", float("inf"), "inf is not a whole number"),
        ("num_calibration", "0", "'0' is below 1"),
        ("threads", "0", "'0' is below 1"),
        ("seed", "-1", "'-1' is below 0"),
        ("lr", "-1", "'-1' is below 0"),
        ("distill", "5", "'5' is above 1"),
        ("seed", True, "True is not a whole number"),
        ("max_drop", "nan", "'nan' is not a finite number"),
        ("max_drop", "one", "'one' is not a finite number"),
        ("mean", "0.5,x", "'0.5,x' is not a list of finite numbers"),
        ("std", "inf", "'inf' is not a list of finite numbers"),
        ("exclude", 5, "5 is not a list of words"),
        ("data", "", "'' is not a path or name"),
        ("budget", {"a": 1}, "{'a': 1} is not a text"),
        ("model_args", "[1]", "'[1]' is not a JSON object"),
        ("model_args", "{width", "'{width' is not a JSON object"),
        ("input_shape", "3,x", "'3,x' is not a list of sizes such as 3,32,32"),
        ("input_shape", "3,0", "'3,0' is not a list of sizes such as 3,32,32"),
        ("layout", "hwc", "'hwc' is not a choice"),
    ],
)
def test_a_wrong_value_names_flag_origin_and_what_was_right(
    tmp_path: Path, name: str, value: object, words: str
) -> None:
    error = refused(tmp_path, flags={name: value})
    assert error.message == f"{BY_NAME[name].flag} (from flag): {words}"
    assert error.hint


def test_a_wrong_environment_variable_names_its_origin(tmp_path: Path) -> None:
    assert "--seed (from environment): 'x' is not a whole number" in refused(tmp_path, HCOMPRESS_SEED="x").message


def test_an_unknown_key_shows_the_known_ones(tmp_path: Path) -> None:
    error = refused(write(tmp_path, "[gate]\nmax_dorp = 1"))
    assert "unknown key gate.max_dorp" in error.message
    assert error.hint == "keys of [gate]: gate.max_drop, gate.min_metric, gate.max_bytes, gate.max_latency"
    error = refused(write(tmp_path, "[gates]\nmax_drop = 1"))
    assert "unknown key gates.max_drop" in error.message
    assert error.hint == "tables: data, gate, measure, model, output, recover, run, task"


def test_a_value_outside_a_table_is_refused(tmp_path: Path) -> None:
    assert "budget must be a table" in refused(write(tmp_path, 'budget = "4bit"')).message


def test_a_file_that_is_not_toml_names_itself(tmp_path: Path) -> None:
    error = refused(write(tmp_path, "[gate\n"))
    assert "hcompress.toml: not readable as TOML (" in error.message
    assert "line 1" in error.message
    assert error.hint == "hcompress init writes a checked one"


def test_an_unknown_preset_shows_the_choices(tmp_path: Path) -> None:
    error = refused(tmp_path, preset="tiny")
    assert error.message == "preset 'tiny' is unknown"
    assert error.hint == "choices: ci-gate, edge-int8, smallest-file"


def test_a_preset_may_not_name_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settings, "presets", lambda: {"evil": {"model": {"factory": "x.py:f"}}})
    error = refused(tmp_path, preset="evil")
    assert error.message == "preset evil sets model, which only your own config or a flag may set"
    assert error.hint == "remove it from the preset, and pass --model"
    assert not any(BY_NAME[name].in_preset for name in ("model", "model_args", "data", "eval", "task", "out"))


@pytest.mark.parametrize("name", sorted(presets()))
def test_a_shipped_preset_is_described_and_names_a_method(tmp_path: Path, name: str) -> None:
    assert presets()[name]["description"]
    found = resolved(tmp_path, preset=name)
    method = next(method for method in METHODS if method.name == found["method"].value)
    assert find_method(method.job, method.name) is method


def test_names_keys_and_environment_names_are_unique() -> None:
    assert len(BY_NAME) == len(BY_KEY) == len({s.environment for s in SETTINGS}) == len(SETTINGS)
    assert {s.type for s in SETTINGS} <= set(settings.TYPES)


def test_every_option_of_a_method_is_a_setting() -> None:
    assert {option for method in METHODS for option in method.options} <= set(BY_NAME)


@pytest.mark.parametrize(
    ("job", "names"),
    [
        ("prune", ["layerwise", "obs", "magnitude", "gradual", "structured-obs", "hesso", "cric"]),
        ("quantize", ["output-change", "hawq", "uniform"]),
    ],
)
def test_the_first_method_of_a_command_is_its_default_and_needs_no_budget(job: str, names: list[str]) -> None:
    assert [method.name for method in methods_for(job)] == names
    assert methods_for(job)[0].searches


@pytest.mark.parametrize(
    ("job", "name", "words"),
    [
        ("prune", "nope", "method 'nope' is unknown"),
        ("prune", "uniform", "method 'uniform' is a method of hcompress quantize"),
    ],
)
def test_an_unknown_method_shows_the_choices_of_its_command(job: str, name: str, words: str) -> None:
    with pytest.raises(UsageError) as caught:
        find_method(job, name)
    assert caught.value.message == words
    assert caught.value.hint == "choices: layerwise, obs, magnitude, gradual, structured-obs, hesso, cric"


@pytest.mark.parametrize(
    ("flags", "config", "expected"),
    [
        ({"budget": "4bit"}, "", "4bit"),
        ({"sparsity": "0.5"}, "", "sparsity=0.5"),
        ({"sparsity": "0.5"}, 'budget = "4bit"', "sparsity=0.5"),
        ({"budget": "4bit"}, "sparsity = 0.5", "4bit"),
        ({}, "sparsity = 0.5", "sparsity=0.5"),
        ({}, "", "8bit"),
    ],
)
def test_the_goal_is_what_was_set_with_the_higher_precedence(
    tmp_path: Path, flags: dict[str, object], config: str, expected: str
) -> None:
    write(tmp_path, f"[run]\n{config}")
    goal = settings.chosen_budget(resolved(tmp_path, flags=flags, preset="ci-gate"))
    assert str(goal) == expected


def test_no_goal_is_none_and_two_of_one_rank_contradict(tmp_path: Path) -> None:
    assert settings.chosen_budget(resolved(tmp_path)) is None
    with pytest.raises(UsageError) as caught:
        settings.chosen_budget(resolved(tmp_path, flags={"budget": "4bit", "sparsity": "0.5"}))
    assert caught.value.message == "--budget 4bit and --sparsity 0.5 contradict each other"
    assert caught.value.hint == "give one of them"


@given(st.text())
def test_any_text_is_a_value_or_a_usage_error(text: str) -> None:
    for setting in SETTINGS:
        try:
            resolve({setting.name: text}, environment={}, folder=Path("/nonexistent"))
        except UsageError as error:
            assert setting.flag in error.message
