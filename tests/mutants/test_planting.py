"""The list of privacy bugs fits the code as it is, and a bug or a test that is gone is an error."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.mutants.planting import Mutant, Sources, StaleError, Tests, load_mutants

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
SOURCE = '''
LIMIT = 3


class Sum:
    def add(self, value: int) -> int:
        """One more."""
        if value > LIMIT:
            return LIMIT
        return value


def add(value: int) -> int:
    return value
'''


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    (tmp_path / "package" / "deeper").mkdir(parents=True)
    (tmp_path / "tests" / "deeper").mkdir(parents=True)
    (tmp_path / "package" / "deeper" / "sums.py").write_text(SOURCE)
    (tmp_path / "tests" / "deeper" / "test_sums.py").write_text("def test_add() -> None:\n    pass\n")
    return tmp_path


def mutant(function: str, old: str, new: str, *tests: str) -> Mutant:
    return Mutant("name", "part", function, old, new, tests, "something")


def test_every_bug_of_the_list_can_be_planted_and_its_tests_are_there() -> None:
    sources, tests, mutants = Sources(ROOT), Tests(ROOT), load_mutants(HERE)
    assert len(mutants) >= 80
    for one in mutants:
        sources.plant(one)
        assert tests.arguments(one.tests)


def test_plant_finds_a_function_wherever_it_stands_and_keeps_indentation(tree: Path) -> None:
    old = "if value > LIMIT:    return\n LIMIT"  # another layout of the same words
    path, text = Sources(tree).plant(mutant("Sum.add", old, "if value > LIMIT:\n    value = 0"))
    assert path == Path("package/deeper/sums.py")
    assert "        if value > LIMIT:\n            value = 0\n        return value\n" in text
    assert "LIMIT = 4" in Sources(tree).plant(mutant("LIMIT", "3", "4"))[1]


@pytest.mark.parametrize(
    ("function", "old", "new"),
    [
        ("Sum.take", "value", "0"),  # no such function
        ("Sum.add", "LIMIT + 1", "0"),  # no such text
        ("Sum.add", "LIMIT", "0"),  # twice
        ("Sum", "return value\n", "return ("),  # no Python
        ("Sum.add", "return value", "return value"),  # nothing changed
    ],
)
def test_plant_refuses_what_it_does_not_find_once(tree: Path, function: str, old: str, new: str) -> None:
    with pytest.raises(StaleError):
        Sources(tree).plant(mutant(function, old, new))


def test_tests_are_found_by_function_or_module_or_are_an_error(tree: Path) -> None:
    tests = Tests(tree)
    assert tests.arguments(["test_add"]) == ["tests/deeper/test_sums.py::test_add"]
    assert tests.arguments(["test_sums"]) == ["tests/deeper/test_sums.py"]
    with pytest.raises(StaleError, match="no test test_take"):
        tests.arguments(["test_take"])


def test_list_with_a_double_name_or_a_missing_field_is_refused(tmp_path: Path) -> None:
    whole = '[[mutant]]\nname = "a"\nfunction = "f"\nold = "x"\nnew = "y"\ntests = []\nbreaks = "z"\n'
    (tmp_path / "part.toml").write_text(whole)
    assert [one.part for one in load_mutants(tmp_path)] == ["part"]
    for content in (whole + whole, whole.replace('old = "x"\n', "")):
        (tmp_path / "part.toml").write_text(content)
        with pytest.raises(StaleError):
            load_mutants(tmp_path)
