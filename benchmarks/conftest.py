"""The fixtures ``race`` and ``report``, and the options that keep the results."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from . import harness

FEWEST_ROUNDS = 9
TABLES = pytest.StashKey[list[harness.Table]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("almostgpt benchmarks")
    group.addoption(
        "--save-results",
        action="store_true",
        help="keep the tables, with hardware, date and command, in <results-dir>/<device>.json",
    )
    group.addoption(
        "--results-dir",
        type=Path,
        default=Path(__file__).parent / "results",
        help="default: benchmarks/results",
    )


def pytest_configure(config: pytest.Config) -> None:
    config.stash[TABLES] = []


class _Clock:
    """What pytest-benchmark reads the time from: it moves only by the times that ours took.

    They are replayed to it after the race. So its own statistics and files speak of our work alone,
    and a race ends in time on a machine that gets busy.
    """

    now = 0.0


def clock() -> float:
    return _Clock.now


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "race" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.benchmark(timer=clock))


@pytest.fixture
def race(benchmark) -> Callable[..., harness.Race]:
    """``race(peers, timer, seconds=…)``: times peers in turns, reported as the first one's times.

    It takes about ``seconds``, and at least ``fewest`` rounds on a machine that is slow or busy, after
    ``warm_up`` rounds: compilers, allocators, caches.
    """

    def run(
        peers: dict[str, harness.Peer],
        timer: harness.Timer,
        *,
        seconds: float,
        fewest: int = FEWEST_ROUNDS,
        warm_up: int = 3,
    ) -> harness.Race:
        contest = harness.Race(peers, timer)
        ours = next(iter(peers))

        for _ in range(warm_up):
            contest.round()
        contest.restart()
        times = contest.seconds[ours]
        end = time.perf_counter() + seconds
        while len(times) < fewest or time.perf_counter() < end:
            contest.round()

        replayed = iter(times)

        def replay() -> None:
            _Clock.now += next(replayed)

        benchmark.pedantic(replay, rounds=len(times))
        return contest

    return run


@pytest.fixture
def report(request, benchmark) -> Callable[[harness.Table], None]:
    """``report(table)``: prints it after the run, and keeps it in both kinds of results files."""

    def add(table: harness.Table) -> None:
        request.config.stash[TABLES].append(table)
        benchmark.extra_info.setdefault("tables", []).append(table.as_dict())

    return add


@pytest.fixture(scope="session")
def copy_bandwidth() -> float:
    """Bytes a second, measured once in this run."""
    return harness.copy_bandwidth()


def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    tables = config.stash[TABLES]
    if not tables:
        return
    machine = harness.machine()
    terminalreporter.section(f"measured on {machine['device']}, torch {machine['torch']}")
    for table in tables:
        terminalreporter.write_line(f"{table}\n")
    if config.getoption("--save-results"):
        command = " ".join(["pytest", *map(str, config.invocation_params.args)])
        results = {**machine, "command": command, "tables": [table.as_dict() for table in tables]}
        file = config.getoption("--results-dir") / harness.file_name(machine["device"])
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
        terminalreporter.write_line(f"results: {file}")
