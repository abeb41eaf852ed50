"""Every fault's edit fits today's code, and weekly every fault is brought back and must be noticed."""

import pytest

from tests.faults.bringing_back import ROOT, Outcome, bring_back, copied, judge, with_edits
from tests.faults.reverted import FAULTS, Edit, Fault

ANY = Fault("any", (Edit("pyproject.toml", "nowhere to be found", ""),), "tests")


@pytest.mark.quick
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_an_edit_fits_the_code_and_its_tests_are_there(fault):
    for path, text in with_edits(fault, ROOT).items():
        assert text != path.read_text(encoding="utf-8")
        compile(text, path, "exec")
    files = [word for word in fault.tests.split() if word.startswith("tests/")]
    assert files
    assert all((ROOT / file).is_file() for file in files)


@pytest.mark.quick
def test_an_edit_that_does_not_fit_is_told():
    with pytest.raises(ValueError, match=r"^pyproject\.toml has 0 times, not once: 'nowhere"):
        with_edits(ANY, ROOT)


@pytest.mark.quick
@pytest.mark.parametrize(
    ("status", "printed", "outcome"),
    [
        (0, "5 passed", Outcome(False, "pytest ended with status 0: 5 passed")),
        (5, "no tests ran", Outcome(False, "pytest ended with status 5: no tests ran")),
        (2, "ERROR tests/test_a.py", Outcome(False, "pytest ended with status 2: ERROR tests/test_a.py")),
        (1, "E   NameError: x\nFAILED tests/a.py::b - N", Outcome(False, "the edit does not fit: NameError: x")),
        (1, "E   assert 1 == 2\nFAILED tests/a.py::b[c] - a", Outcome(True, "b[c] fails (assert 1 == 2)")),
        (-9, "..", Outcome(False, "pytest ended with status -9: ..")),
    ],
)  # fmt: skip
def test_only_a_test_that_fails_notices_a_fault(status, printed, outcome):
    assert judge(ANY, status, printed) == outcome


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    return copied(tmp_path_factory.mktemp("faults") / "copy")


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_fault_that_is_brought_back_is_noticed(fault, copy):
    outcome = bring_back(fault, copy)
    assert outcome.noticed, outcome.said
