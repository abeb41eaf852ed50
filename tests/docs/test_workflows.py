"""The jobs that GitHub runs: what they call exists, and all parts of the weekly tests are run."""

import os
import re
import subprocess

import pytest
import yaml

from tests.docs.pages import ROOT

WORKFLOWS = {path.name: yaml.safe_load(path.read_text()) for path in sorted((ROOT / ".github/workflows").glob("*.yml"))}
TARGETS = set(re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)[1].split())
every_workflow = pytest.mark.parametrize("name", WORKFLOWS)


def steps(name: str) -> list[dict]:
    return [step for job in WORKFLOWS[name]["jobs"].values() for step in job["steps"]]


def made(text: str) -> set[str]:
    """The targets of a script's calls of make."""
    return set(re.findall(r"^\s*make ([\w-]+)", text, re.MULTILINE))


def make_would_run(*arguments: str) -> str:
    return subprocess.run(["make", "-n", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout


@pytest.mark.quick
@every_workflow
def test_what_a_workflow_calls_exists(name):
    commands = [step["run"] for step in steps(name) if "run" in step]
    assert commands
    for command in commands:
        if not (targets := made(command)):
            script = ROOT / command.split()[0]
            assert os.access(script, os.X_OK)
            targets = made(script.read_text())
        assert targets
        assert targets <= TARGETS


@pytest.mark.quick
@every_workflow
def test_a_workflow_uses_released_actions_and_ends(name):
    used = [step["uses"] for step in steps(name) if "uses" in step]
    assert used
    assert all(re.fullmatch(r"actions/[\w-]+@v\d+", action) for action in used)
    assert all(job["timeout-minutes"] <= 360 for job in WORKFLOWS[name]["jobs"].values())  # GitHub's own limit


@pytest.mark.quick
def test_changes_are_tested_and_all_is_tested_weekly():
    begins = {name: workflow[True] for name, workflow in WORKFLOWS.items()}  # YAML reads the key `on` as a truth
    assert {"push", "pull_request"} <= set(begins["test.yml"])
    assert {"schedule", "workflow_dispatch"} <= set(begins["weekly.yml"])
    assert re.fullmatch(r"\d+ \d+ \* \* [0-6]", begins["weekly.yml"]["schedule"][0]["cron"])


@pytest.mark.quick
def test_every_part_of_the_weekly_tests_runs():
    weekly = WORKFLOWS["weekly.yml"]
    parts = weekly["jobs"]["test-all"]["strategy"]["matrix"]["part"]
    assert parts == list(range(1, weekly["env"]["PARTS"] + 1))
    part = make_would_run("test-all", "PARTS=8", "PART=3", "WORKERS=4")
    assert "-n 4 " in part
    assert "--splits 8 --group 3 " in part
    whole = make_would_run("test-all")
    assert "--hypothesis-profile weekly" in whole
    assert "--splits" not in whole
