"""A Hub on the loopback address, for every test that asks for one."""

import pytest

from tests.hub.hub_server import HubServer


@pytest.fixture
def hub():
    """An empty Hub with the users "maker" and "reader" and the organisation "org"."""
    with HubServer(multipart_bytes=1 << 20) as server:
        yield server
