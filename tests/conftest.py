"""Settings that every test shares."""

from __future__ import annotations

import os

# Plans must not depend on how fast the machine of the day is.
os.environ.setdefault("BLOCKSPARSE_CALIBRATE", "0")


def pytest_addoption(parser):
    parser.addoption("--update-golden", action="store_true", help="write the golden files anew")
