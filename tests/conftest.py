"""A Hub on the loopback address, for every test that asks for one."""

import gc

import pytest
from huggingface_hub import constants, hf_api
from transformers.utils import hub as transformers_hub

from tests.hub.hub_server import HubServer
from tests.support.programs import fork_server


def pytest_configure(config) -> None:
    """Start the one server of programs; workers of pytest-xdist find it by their environment."""
    if not hasattr(config, "workerinput"):
        server = fork_server()
        server.__enter__()
        config.add_cleanup(lambda: server.__exit__(None, None, None))


def pytest_collection_finish() -> None:
    """Spare collections of garbage the libraries: every run of a trainer asks for several."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)  # tests make many small objects that live shortly


def pytest_sessionfinish() -> None:
    """Let the libraries go: some complain of what is left at the end."""
    gc.unfreeze()


@pytest.fixture
def hub(monkeypatch):
    """An empty Hub, with the users "maker" and "reader" and the organisation "org".

    This process takes it for the Hub, as the maker. Other processes do with `hub.environment`.
    """
    with HubServer(multipart_bytes=1 << 20) as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        # huggingface_hub's functions belong to an object made at import, transformers keeps another one.
        monkeypatch.setattr(hf_api.api, "endpoint", server.url)
        monkeypatch.setattr(transformers_hub, "_hf_api", None, raising=False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", server.token)
        yield server
