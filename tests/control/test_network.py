"""Addresses and interfaces of processes, on plain data; tests/launch shows them on several hosts."""

import pytest

from mxdist.config import Config
from mxdist.control.network import address_of, interface_of, worker_variables
from mxdist.errors import UserError

FOUND = {"lo": "127.0.0.1", "eth0": "10.0.0.4", "ib0": "10.9.0.4"}


def test_the_interface_is_the_one_with_the_address_that_ray_uses() -> None:
    assert interface_of("10.0.0.4", FOUND) == "eth0"


def test_an_address_that_no_interface_has_is_refused_with_those_there_are() -> None:
    with pytest.raises(UserError, match=r"is 10\.0\.0\.5 to Ray.*eth0 10\.0\.0\.4"):
        interface_of("10.0.0.5", FOUND)


@pytest.mark.parametrize("given", ["ib0", "=ib0", "ib0,ib1"])  # all forms that NCCL takes
def test_a_chosen_interface_gives_the_address(given: str) -> None:
    assert address_of(given, FOUND) == "10.9.0.4"


def test_a_chosen_interface_that_is_not_there_is_named() -> None:
    with pytest.raises(UserError, match=r"no network interface ib7 .*cluster\.interface"):
        address_of("ib7", FOUND)


def test_one_machine_talks_over_loopback_and_a_cluster_over_what_was_chosen() -> None:
    assert worker_variables(Config()) == {"GLOO_SOCKET_IFNAME": "lo"}
    cluster = {"cluster": {"address": "auto", "interface": "ib0"}}
    assert worker_variables(Config.model_validate(cluster)) == {
        "GLOO_SOCKET_IFNAME": "ib0",
        "NCCL_SOCKET_IFNAME": "ib0",
    }
    assert worker_variables(Config.model_validate({"cluster": {"address": "auto"}})) == {}
