"""Faults planted in architectures of many kinds: the doctor finds them, and only there."""

from __future__ import annotations

import functools
from collections import Counter
from typing import Any

import pytest

import blind
import faults
import zoo
from faults import FAULTS, MORE, OF_THE_LEDGER
from truenorm.doctor.checks.catalogue import CHECKS

PLANS = list(faults.plans())
BY_DEFAULT = 2  # hosts of a fault; make zoo takes all


def _marked() -> list[Any]:
    seen: Counter[Any] = Counter()
    made = []
    for plan in PLANS:
        seen[plan.fault] += 1
        marks = [pytest.mark.zoo] * (seen[plan.fault] > BY_DEFAULT)
        made.append(pytest.param(plan, marks=marks, id=str(plan)))
    return made


@functools.cache
def loud_when_healthy(host: str) -> set[str]:
    """Codes of more than a note before anything was planted."""
    case = faults.case(host)
    if not case.batches:  # its model comes with the fault
        return set()
    return {f.code for f in case.examine().findings if f.severity != "note"}


@pytest.mark.parametrize("plan", _marked())
def test_a_planted_fault_is_found_and_was_not_before(plan):
    diagnosis = plan.made().examine(data=plan.fault.data)
    assert faults.told(diagnosis, plan) != bool(faults.missed(plan)), str(diagnosis)
    assert plan.code not in loud_when_healthy(plan.host)


def test_every_code_has_three_faults_or_is_told_by_the_ledger():
    planted: Counter[str] = Counter(
        plan.code for plan in {(p.code, p.fault): p for p in PLANS}.values()
    )
    assert {check.code for check in CHECKS} == {*planted, *OF_THE_LEDGER}
    assert min(planted.values()) >= 3


@pytest.mark.parametrize("code", {**FAULTS, **MORE})
def test_a_code_has_patients_of_three_architectures(code):
    hosts = {p.host for p in PLANS if p.code == code and not faults.missed(p)}
    assert len(hosts) >= 3


def test_the_blind_hosts_are_none_of_those_that_rules_were_made_with():
    hosts = {plan.host for plan in PLANS}
    assert not hosts & set(blind.NAMES)
    assert not set(zoo.NAMES) & set(blind.NAMES)
    assert {plan.code for plan in faults.blind_plans()} > {"TN102", "TN103", "TN106", "TN502"}


def test_what_is_missed_is_planted():
    planted = {(p.code, p.fault.name, p.host) for p in PLANS}
    missed = {(*key, host) for key, (hosts, _) in faults.MISSED.items() for host in hosts}
    assert missed <= planted
