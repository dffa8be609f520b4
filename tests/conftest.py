"""Fixtures that tests of several folders use."""

import pytest

from tests.helpers.hub_server import FreshProcesses, HubServer


@pytest.fixture(scope="session")
def hub():
    """A Hugging Face Hub on this machine, with two owners."""
    with HubServer(tokens={"hf_ann": "ann", "hf_org": "org"}) as server:
        yield server


@pytest.fixture(scope="session")
def run(hub, tmp_path_factory):
    """Runs a function in a fresh process that talks to `hub`."""
    return FreshProcesses(hub, tmp_path_factory.mktemp("hub_home"))
