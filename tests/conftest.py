"""The last lines of a test run say what it left out, and why."""

def pytest_terminal_summary(terminalreporter):
    skipped = terminalreporter.stats.get("skipped", [])
    reasons = {report.longrepr[2].removeprefix("Skipped: ") for report in skipped}
    for reason in sorted(reasons):
        terminalreporter.write_line(f"left out: {reason}")
