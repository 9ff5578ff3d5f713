"""Prints what came of the faults, as a table, after the tests (of this process: run them with -n 0)."""

import sys


def pytest_terminal_summary(terminalreporter):
    harness = sys.modules.get("harness")
    if harness is not None and harness.OUTCOMES:
        terminalreporter.section("faults")
        for line in harness.table(harness.OUTCOMES):
            terminalreporter.line(line)
