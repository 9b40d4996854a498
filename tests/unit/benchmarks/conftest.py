"""The commands silence logging for their own process; here that is the tests'."""

import logging
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def loud() -> Iterator[None]:
    yield
    logging.disable(logging.NOTSET)
