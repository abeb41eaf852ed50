"""Chunked backprop of every architecture that the library loads: both orders against the whole sequence at once."""

import pytest

from streamjax.models.families import FAMILIES
from tests.architectures import CASES, tiny_config
from tests.training.gradient_checks import check


def test_every_family_has_a_case():
    assert {case.split("-")[0] for case in CASES} == set(FAMILIES)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("case", CASES)
def test_both_orders_give_the_gradient(case):
    """In chunks that do not divide the sequence; half of the cases in packed rows, and with stacked layers."""
    odd = list(CASES).index(case) % 2 == 1
    check(tiny_config(case), 19, chunk_size=6, packed=odd, stacked=odd)
