"""For pages made from the test suite: the outcome of each test."""

from __future__ import annotations


class Outcomes:
    """A plugin of pytest. tests: {node id: "passed", "failed" or "skipped"}; items: the collected tests."""

    def __init__(self) -> None:
        self.tests: dict[str, str] = {}
        self.items: list = []

    def pytest_collection_finish(self, session) -> None:
        self.items = session.items

    def pytest_runtest_logreport(self, report) -> None:
        if report.when == "call" or not report.passed:
            before = self.tests.get(report.nodeid, report.outcome)
            self.tests[report.nodeid] = report.outcome if before == "passed" else before
