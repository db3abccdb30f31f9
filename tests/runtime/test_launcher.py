"""Launchers' variables: a place among the ranks, or one error that names them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fnrecipe.errors import UsageError
from fnrecipe.runtime.launcher import VARIABLE, Launched, first_host, launched, meeting
from tests.cli.helpers import assert_usage_error, fnrecipe

TORCH = {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "gpu7", "MASTER_PORT": "29500"}
SLURM = {
    "SLURM_PROCID": "1",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
    "SLURM_JOB_ID": "750",
    "SLURM_STEP_ID": "3",
}
JOB = {"SLURM_JOB_ID": "750", "SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_JOB_NODELIST": "gpu07"}
OURS = {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1", VARIABLE: f"{os.getppid()}:/meeting"}
ONE_TASK = {**JOB, "SLURM_STEP_NUM_TASKS": "1"}
INTERACTIVE = {**SLURM, "SLURM_PTY_PORT": "40123"}
VALUES = [
    "",
    "0",
    "1",
    "2",
    "4",
    "-1",
    "4294967290",
    "9" * 5000,
    " 1",
    "1_0",
    "\u0661",
    "1.0",
    "None",
    "a\nb",
    "gpu[1",
    "70000",
]


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, Launched()),
        (TORCH, Launched(1, 4, 1, "gpu7", 29500)),
        (TORCH | SLURM, Launched(1, 4, 1, "gpu7", 29500)),
        ({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}, Launched()),
        (SLURM, Launched(1, 4, 1, "gpu07", 20003)),
        (SLURM | {"MASTER_ADDR": "gpu8", "MASTER_PORT": "1"}, Launched(1, 4, 1, "gpu8", 1)),
        (OURS, Launched(1, 4, 1)),
        (JOB, Launched()),
        (ONE_TASK, Launched()),
        (INTERACTIVE, Launched()),
    ],
)
def test_a_whole_set_of_variables_is_a_place_and_one_process_is_alone(variables: dict[str, str], expected: Launched) -> None:
    assert launched(variables.get) == expected


@pytest.mark.parametrize("name", ["RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"])
@pytest.mark.parametrize("value", [None, "", "a b"])
def test_one_of_torchs_variables_that_is_missing_empty_or_no_number_is_named_with_what_is_found(
    name: str, value: str | None
) -> None:
    variables = {key: text for key, text in (TORCH | {name: value}).items() if text is not None}
    with pytest.raises(UsageError) as caught:
        launched(variables.get)
    names, _, found = str(caught.value).partition(": expected ")
    assert name in names.split(", ")
    assert (f"{name} unset" if value is None else f"{name}={value!r}") in found


@pytest.mark.parametrize(
    ("variables", "found"),
    [
        (TORCH | {"RANK": "4"}, "found RANK='4', WORLD_SIZE='4', LOCAL_RANK='1'"),
        (TORCH | {"LOCAL_RANK": "4"}, "found RANK='1', WORLD_SIZE='4', LOCAL_RANK='4'"),
        (TORCH | {"WORLD_SIZE": "0"}, "found RANK='1', WORLD_SIZE='0', LOCAL_RANK='1'"),
        ({"WORLD_SIZE": "2"}, "found RANK unset, WORLD_SIZE='2', LOCAL_RANK unset"),
        (SLURM | {"SLURM_PROCID": "7"}, "found SLURM_PROCID='7', SLURM_STEP_NUM_TASKS='4', SLURM_LOCALID='1'"),
        ({"SLURM_STEP_NUM_TASKS": "2"}, "found SLURM_PROCID unset, SLURM_STEP_NUM_TASKS='2', SLURM_LOCALID unset"),
        (SLURM | {"SLURM_STEP_NODELIST": ""}, "SLURM_STEP_NODELIST: expected a list of hosts, found ''"),
        (SLURM | {"SLURM_JOB_ID": "a"}, "or a MASTER_PORT, found SLURM_JOB_ID='a', SLURM_STEP_ID='3'"),
        (SLURM | {"MASTER_PORT": "0"}, "MASTER_PORT: expected a port from 1 to 65535, found MASTER_PORT='0'"),
        (OURS | {VARIABLE: "1:/x"}, f"{VARIABLE}: expected the parent of this process, {os.getppid()}, found '1:/x'"),
    ],
)
def test_variables_that_contradict_each_other_are_one_error(variables: dict[str, str], found: str) -> None:
    with pytest.raises(UsageError) as caught:
        launched(variables.get)
    assert found in str(caught.value)
    assert "\n" not in str(caught.value)


CHANGES = st.dictionaries(st.sampled_from([*TORCH, *INTERACTIVE, VARIABLE]), st.sampled_from([None, *VALUES]))


@given(st.sampled_from([{}, TORCH, SLURM, INTERACTIVE]), CHANGES)
def test_any_variables_are_a_place_or_a_usage_error(variables: dict[str, str], changes: dict[str, str | None]) -> None:
    try:
        here = launched((variables | changes).get)
    except UsageError as error:
        assert any(name in str(error) for name in [*TORCH, *SLURM, VARIABLE])  # noqa: PT017
    else:
        assert max(here.rank, here.local_rank) < here.size
        assert here.size == 1 or (here.address and 0 < here.port < 2**16)


@pytest.mark.parametrize("variables", [{"WORLD_SIZE": ""}, {"RANK": "x", "WORLD_SIZE": "2"}])
def test_a_run_under_half_a_set_is_one_error_and_other_errors_are_shown(tmp_path: Path, variables: dict[str, str]) -> None:
    assert_usage_error(fnrecipe("train", "lm", "--out", "x", cwd=tmp_path, **variables), "WORLD_SIZE", "LOCAL_RANK unset")
    ended = fnrecipe("dump-config", "nope", cwd=tmp_path, **variables)
    assert_usage_error(ended, "error: nope: no such recipe")


def test_only_a_child_of_the_launcher_has_a_place_to_meet() -> None:
    assert meeting(OURS.get) == Path("/meeting")
    assert meeting({VARIABLE: "1:/meeting"}.get) is None
    assert meeting({}.get) is None


@pytest.mark.parametrize(
    ("hosts", "expected"),
    [
        ("gpu[003-010,012],cpu7", "gpu003"),
        ("node1", "node1"),
        ("a,b", "a"),
        ("n[7]", "n7"),
        ("x-1-[02,05]", "x-1-02"),
        ("r[1-2]n[03,05]-ib,x", "r1n03-ib"),
    ],
)
def test_the_first_host_of_a_slurm_list(hosts: str, expected: str) -> None:
    assert first_host(hosts) == expected


@pytest.mark.parametrize("hosts", ["", ",a", "a[1", "a]", "a b", "[]"])
def test_what_is_no_list_of_hosts_is_refused(hosts: str) -> None:
    with pytest.raises(UsageError, match="SLURM_STEP_NODELIST: expected a list of hosts"):
        first_host(hosts)
