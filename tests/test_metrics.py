"""What a monitor is told: in a form that it takes, in each phase, and with numbers that never fall."""

from __future__ import annotations

import contextlib
import http.client
import os
import signal
import socket
import subprocess
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest
from clients import Asking
from programs import BLIND
from service import PATIENCE, Service, connect

from selfupdate.exposition import CONTENT_TYPE, Counter, Histogram, by_name, gauge, series
from selfupdate.lifecycle import Phase

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from programs import Programs

REQUESTS = "selfupdate_http_requests_total"
UPGRADES = "selfupdate_upgrades_total"


@pytest.fixture
def check(tool: Callable[[str], str]) -> Callable[[str], None]:
    """Have Prometheus' own tool read a text, and find nothing to say about it."""

    def check(text: str) -> None:
        command = [tool("promtool"), "check", "metrics"]
        ran = subprocess.run(command, input=text, capture_output=True, text=True, timeout=PATIENCE, check=False)
        assert (ran.returncode, ran.stdout, ran.stderr) == (0, "", ""), text

    return check


@dataclass(frozen=True)
class Scrape:
    """What was read: each series with its value."""

    text: str
    values: dict[str, float]
    grows: dict[str, float]
    """Those that may never fall."""

    @classmethod
    def of(cls, text: str) -> Scrape:
        values, kinds = {}, {}
        for line in text.splitlines():
            if line.startswith("# TYPE "):
                name, kind = line.removeprefix("# TYPE ").split()
                kinds[name] = kind
            elif not line.startswith("#"):
                key, _, number = line.rpartition(" ")
                values[key] = float(number)
        names = [name for name, kind in kinds.items() if kind != "gauge"]
        grows = {key: value for key, value in values.items() if key.startswith(tuple(names))}
        return cls(text, values, grows)

    @property
    def phase(self) -> str:
        (phase,) = [phase for phase in Phase if self.values[series("selfupdate_phase", phase=phase)] == 1]
        return phase

    def sum(self, name: str, *labels: str) -> float:
        """Return the sum of the series of `name` that have the pairs `labels`."""
        keys = (key for key in self.values if key.partition("{")[0] == name and all(label in key for label in labels))
        return sum(self.values[key] for key in keys)


def scrape(service: Service) -> Scrape:
    answer = service.ask("GET", "/metrics")
    assert (answer.status, answer.headers["Content-Type"]) == (200, CONTENT_TYPE)
    return Scrape.of(answer.body.decode())


class Monitor:
    """Scrapes without pause, and finds each number that falls."""

    def __init__(self, service: Service) -> None:
        self.falls: list[str] = []
        self.failed = 0
        self.phases: set[str] = set()
        self.scrapes = 0
        self._service = service
        self._news = threading.Condition()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        service.line(message="serving")
        self._thread.start()

    def _run(self) -> None:
        before: dict[str, float] = {}
        while not self._stop.is_set():
            try:
                now = scrape(self._service)
            except (OSError, http.client.HTTPException):
                self.failed += 1
                continue
            grown = now.grows
            self.falls += [
                f"{key}: {value}, {grown.get(key)}" for key, value in before.items() if grown.get(key, -1) < value
            ]
            before = grown
            with self._news:
                self.scrapes += 1
                self.phases.add(now.phase)
                self._news.notify_all()

    def wait_for(self, phase: Phase) -> None:
        with self._news:
            assert self._news.wait_for(lambda: phase in self.phases, PATIENCE)

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()


@contextlib.contextmanager
def watched(service: Service) -> Iterator[tuple[Monitor, Asking]]:
    """Ask and scrape without pause: whatever happens meanwhile, no number falls."""
    monitor, asking = Monitor(service), Asking(service.address)
    try:
        yield monitor, asking
    finally:
        asking.stop()
        monitor.stop()
    assert not monitor.falls
    assert monitor.scrapes > 10


def counts_each(service: Service, monitor: Monitor, asking: Asking) -> Scrape:
    """Assert that each request was counted, once."""
    now = scrape(service)
    assert not asking.failed
    assert not monitor.failed
    assert now.sum(REQUESTS, 'route="/version"') == asking.answered
    assert now.sum("selfupdate_http_request_duration_seconds_count", 'route="/version"') == asking.answered
    assert now.sum(REQUESTS, 'route="/metrics"') == monitor.scrapes
    return now


# The text.


def test_the_values_of_labels_are_escaped(check: Callable[[str], None]) -> None:
    """What is in a name or a version can't end its line."""
    key = series("a_thing", said='a "b" \\ c\nd')
    assert key == 'a_thing{said="a \\"b\\" \\\\ c\\nd"}'
    check(gauge("a_thing", "A thing.", [(key, 1.5)]))
    counter = Counter("things_total", "Things.")
    text = counter.text(by_name({counter.key(said='a "b" \\ c\nd'): 2.0}))
    assert text.endswith('things_total{said="a \\"b\\" \\\\ c\\nd"} 2\n')
    check(text)


@pytest.mark.parametrize(
    "key",
    ["", "a b", "things_total{", "things_total{}", 'things_total{a="b}', 'things_total{a="b",}', "things_total{a=1}"],
)
def test_what_is_no_series_is_not_shown(key: str) -> None:
    """A damaged key makes no text that a monitor refuses."""
    assert by_name({key: 1.0}) == {}


def test_a_histogram_is_cumulative_whoever_counted(check: Callable[[str], None]) -> None:
    """An observation is in each bucket from its own on, and in the next one where a version had other bounds."""
    histogram = Histogram("took_seconds", "How long it took.", (0.1, 1, 10))
    other = Histogram("took_seconds", "How long it took.", (0.5, 1e3))
    totals: dict[str, float] = {}
    observed = [histogram.of(step="a").amounts(value) for value in (0.1, 0.2, 100)]
    observed += [other.of(step="a").amounts(value) for value in (0.5, 999)]
    observed += [histogram.of().amounts(2.0)]
    for key, amount in (amount for amounts in observed for amount in amounts):
        totals[key] = totals.get(key, 0.0) + amount
    text = histogram.text(by_name(totals | {'took_seconds_bucket{le="x"}': 1.0}))
    check(text)
    values = Scrape.of(text).values
    buckets = [values[f'took_seconds_bucket{{step="a",le="{bound}"}}'] for bound in ("0.1", "1", "10", "+Inf")]
    assert buckets == [1, 3, 3, 5]
    assert values['took_seconds_count{step="a"}'] == 5
    assert values['took_seconds_sum{step="a"}'] == pytest.approx(1099.8)
    assert (values['took_seconds_bucket{le="1"}'], values['took_seconds_bucket{le="10"}']) == (0, 1)
    assert (values["took_seconds_sum"], values["took_seconds_count"]) == (2.0, 1)


# A running service.


@pytest.mark.slow
def test_each_metric_is_there(start: Callable[..., Service], programs: Programs, check: Callable[[str], None]) -> None:
    """What runs, how it stands, and what was done; a scan is none that it makes itself."""
    program = programs.faulty("1.0.0", "blind", BLIND)
    service = start("-probation", "100ms", "-keep-pid=false", program=program)
    first = scrape(service)
    assert first.sum("selfupdate_build_info", 'version="1.0.0"') == 1
    assert (first.phase, first.values["selfupdate_generation"], first.values["selfupdate_draining"]) == (
        "RUNNING",
        0,
        0,
    )
    assert first.sum("selfupdate_connections", 'state="busy"') == 1
    assert first.sum(UPGRADES) == 0
    assert first.values[series(UPGRADES, kind="upgrade", outcome="rolled-back")] == 0
    assert "selfupdate_candidates" not in first.text
    (service.upgrade_dir / "new").symlink_to(programs.version("1.1.0"))
    (service.upgrade_dir / "newer").symlink_to(programs.version("1.2.0"))
    assert "selfupdate_candidates" not in scrape(service).text
    service.get("/candidates")
    found = scrape(service).values
    assert [found[series("selfupdate_candidates", eligible=text)] for text in ("true", "false")] == [1, 1]
    record = service.upgrade()
    service.status_when(lambda status: (status["phase"], status["version"]) == ("RUNNING", "1.2.0"))
    last = scrape(service)
    check(last.text)
    assert last.sum("selfupdate_build_info", 'version="1.2.0"') == 1
    assert last.values["selfupdate_generation"] == 1
    assert last.values[series(UPGRADES, kind="upgrade", outcome="committed")] == last.sum(UPGRADES) == 1
    took = "selfupdate_upgrade_phase_duration_seconds"
    phases = [entry["phase"] for entry in record["timeline"]][:-1]
    assert phases == ["CHOOSING", "STAGING", "STARTING", "PROBING", "REPLACING", "PROBATION"]
    assert [last.values[series(f"{took}_count", phase=phase)] for phase in phases] == [1] * 6
    assert last.sum(f"{took}_count") == 6
    assert last.values[series(f"{took}_bucket", phase="PROBATION", le="0.05")] == 0
    assert first.values["process_start_time_seconds"] < last.values["process_start_time_seconds"]
    committed_at = last.values["selfupdate_last_commit_timestamp_seconds"]
    assert first.values["process_start_time_seconds"] < committed_at
    assert {path.stat().st_mode & 0o777 for path in service.state_dir.glob("metrics.*")} == {0o600}


@pytest.mark.slow
def test_each_request_is_counted_and_no_client_makes_a_series(start: Callable[..., Service]) -> None:
    """By the pattern of its route; what is not known is `other`, and what was refused before that `none`."""
    service = start()
    for path in ("/nothing", "/metrics/", '/"} 1', "/upgrades/", "/upgrades/a/b"):
        service.ask("GET", path.replace(" ", "%20"))
    for number in range(20):
        service.ask("GET", f"/upgrades/{number}?wait=0")
        service.ask("GET", f"/version?{number}")
        service.ask("BREW" + "X" * number, "/version")
    service.ask("HEAD", "/status")
    service.ask("GET", "/status", headers={"Host": "evil.example"})
    service.ask("POST", "/upgrade", {"name": 1})
    for raw in (b"GET\r\n\r\n", b"GET /version HTTP/1.1\r\n\r\n", b"GET / HTTP/1.1\r\nx: " + b"y" * 200_000):
        with connect(service.address) as client, contextlib.suppress(ConnectionError):
            client.sendall(raw)
            client.shutdown(socket.SHUT_WR)
            while client.recv(65536):
                pass

    def key(route: str, method: str, status: int) -> str:
        return series(REQUESTS, route=route, method=method, status=str(status))

    found = scrape(service)
    assert {name: value for name, value in found.values.items() if name.startswith(REQUESTS)} == {
        key("other", "GET", 404): 5,
        key("/upgrades/{id}", "GET", 404): 20,
        key("/version", "GET", 200): 20,
        key("/version", "other", 405): 20,
        key("/status", "HEAD", 200): 1,
        key("/status", "GET", 421): 1,
        key("/upgrade", "POST", 400): 1,
        key("none", "other", 400): 1,
        key("none", "GET", 400): 1,
        key("none", "other", 431): 1,
    }
    assert scrape(service).values[key("/metrics", "GET", 200)] == 1


@pytest.mark.slow
def test_one_without_a_state_directory_counts_in_memory(
    start: Callable[..., Service], tmp_path: Path, check: Callable[[str], None]
) -> None:
    """Nobody takes over from it."""
    (tmp_path / "state").write_bytes(b"")
    service = start()
    scrape(service)
    again = scrape(service)
    assert again.sum(REQUESTS) == 1
    check(again.text)


# What holds a process before it leaves a phase.
_HOLD = """
import os
from selfupdate import lifecycle
step = lifecycle.Lifecycle.step
def held(self, event):
    gate = os.path.join(os.environ["GATES"], self._phase)
    if os.path.exists(gate):
        open(gate).read()
    return step(self, event)
lifecycle.Lifecycle.step = held
"""
_ENDS_AT_ONCE = """
import sys
if "-upgrade" in sys.argv:
    sys.exit(3)
"""
_FAILS_ON_TRIAL = """
from selfupdate import messages, presence
health = presence.Presence._health
def answer(self, request):
    return messages.problem(500, "Out of order.") if self._lifecycle.phase == "TRIAL" else health(self, request)
presence.Presence._health = answer
"""


class Gates:
    """Pipes at which a process waits before it leaves a phase."""

    def __init__(self, directory: Path, *phases: Phase) -> None:
        directory.mkdir()
        self._paths = {phase: directory / phase for phase in phases}
        for path in self._paths.values():
            os.mkfifo(path)

    @contextlib.contextmanager
    def held(self, phase: Phase) -> Iterator[None]:
        """Wait until a process is in `phase`, and let it go on behind this."""
        with self._paths[phase].open("wb"):  # it waits at the other end
            yield
            self._paths[phase].unlink()


class Kept:
    """A connection that a process has accepted, whatever it does from then on."""

    def __init__(self, service: Service) -> None:
        self._connection = http.client.HTTPConnection(*service.address, timeout=PATIENCE)
        self._connection.request("GET", "/version")
        self._connection.getresponse().read()

    def scrape(self) -> Scrape:
        self._connection.request("GET", "/metrics")
        with contextlib.closing(self._connection):
            return Scrape.of(self._connection.getresponse().read().decode())


@pytest.mark.slow
def test_each_phase_of_an_upgrade_can_be_read(programs: Programs, tmp_path: Path, check: Callable[[str], None]) -> None:
    """By what the incumbent answers on a connection that it has, and the successor on a new one."""
    way = (Phase.CHOOSING, Phase.STAGING, Phase.STARTING, Phase.PROBING, Phase.REPLACING, Phase.PROBATION)
    gates = Gates(tmp_path / "gates", *way, Phase.TRIAL)
    flags = ("-probation", "0", "-drain", "20s", "-keep-pid=false")
    program = programs.faulty("1.0.0", "held", _HOLD)
    with Service(program, tmp_path, *flags, environ={"GATES": str(tmp_path / "gates")}) as service:
        (service.upgrade_dir / "new").symlink_to(programs.faulty("1.1.0", "held", _HOLD))
        kept = {phase: Kept(service) for phase in (*way, Phase.RETIRED)}
        asking = threading.Thread(target=service.ask, args=("POST", "/upgrade"))
        asking.start()
        for phase in way:
            with gates.held(phase):
                found = kept[phase].scrape()
            check(found.text)
            assert found.phase == phase
            assert found.values["selfupdate_draining"] == (phase in {Phase.REPLACING, Phase.PROBATION})
        with gates.held(Phase.TRIAL):
            for phase, found in ((Phase.TRIAL, scrape(service)), (Phase.RETIRED, kept[Phase.RETIRED].scrape())):
                check(found.text)
                assert found.phase == phase
        asking.join(PATIENCE)
        service.status_when(lambda status: status["phase"] == "RUNNING")
        check(scrape(service).text)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("phase", "fault", "outcome"),
    [(Phase.ABORTING, _ENDS_AT_ONCE, "aborted"), (Phase.ROLLING_BACK, _FAILS_ON_TRIAL, "rolled-back")],
)
def test_the_ways_back_can_be_read(
    programs: Programs, tmp_path: Path, check: Callable[[str], None], phase: Phase, fault: str, outcome: str
) -> None:
    """The old version serves, and says what it does."""
    gates = Gates(tmp_path / "gates", phase)
    program = programs.faulty("1.0.0", "held", _HOLD)
    with Service(program, tmp_path, environ={"GATES": str(tmp_path / "gates")}) as service:
        (service.upgrade_dir / "new").symlink_to(programs.faulty("1.1.0", "bad", fault))
        upgrade_id = service.ask("POST", "/upgrade").json["id"]
        with gates.held(phase):
            found = scrape(service)
            check(found.text)
            assert found.phase == phase
        service.record_when(upgrade_id, lambda record: record["outcome"] is not None)
        found = scrape(service)
        check(found.text)
        assert found.values[series(UPGRADES, kind="upgrade", outcome=outcome)] == found.sum(UPGRADES) == 1
        assert found.sum("selfupdate_upgrade_phase_duration_seconds_count", f'phase="{phase}"') == 1


@pytest.mark.slow
@pytest.mark.parametrize("keeps", [True, False], ids=["keep-pid", "other-pid"])
def test_no_number_falls_when_versions_change(
    start: Callable[..., Service], programs: Programs, *, keeps: bool
) -> None:
    """Three upgrades, a rollback and a restart, with a client that scrapes without pause."""
    service = start("-probation", "100ms", "-drain", "5s", f"-keep-pid={str(keeps).lower()}")
    with watched(service) as (monitor, asking):
        for version in ("1.1.0", "1.2.0", "1.3.0"):
            (service.upgrade_dir / version).symlink_to(programs.version(version))
            assert service.upgrade()["outcome"] == "committed"
            service.status_when(lambda status: (status["version"], status["phase"]) == (version, "RUNNING"))  # noqa: B023
        assert service.roll_back()["outcome"] == "committed"
        service.status_when(lambda status: (status["version"], status["phase"]) == ("1.2.0", "RUNNING"))
    now = counts_each(service, monitor, asking)
    assert Phase.TRIAL in monitor.phases
    assert now.values[series(UPGRADES, kind="upgrade", outcome="committed")] == 3
    assert now.values[series(UPGRADES, kind="rollback", outcome="committed")] == 1
    assert now.sum("selfupdate_upgrade_phase_duration_seconds_count", 'phase="PROBATION"') == 4
    assert len(list(service.state_dir.glob("metrics.*"))) <= 3
    service.stop()
    service.restart()
    service.line(message="serving")
    after = scrape(service)
    assert all(after.grows[key] >= value for key, value in now.grows.items())


@pytest.mark.slow
def test_no_number_falls_when_a_trial_fails(start: Callable[..., Service], programs: Programs) -> None:
    """What the successor answered is counted; the next one counts on behind it."""
    service = start("-probation", "5s", "-drain", "5s")
    (service.upgrade_dir / "bad").symlink_to(programs.faulty("1.1.0", "bad", _FAILS_ON_TRIAL))
    with watched(service) as (monitor, asking):
        for _ in range(2):
            assert service.upgrade("bad")["outcome"] == "rolled-back"
    now = counts_each(service, monitor, asking)
    assert now.values[series(UPGRADES, kind="upgrade", outcome="rolled-back")] == now.sum(UPGRADES) == 2


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["successor", "incumbent"])
def test_no_number_falls_when_a_process_is_killed_on_trial(
    start: Callable[..., Service], programs: Programs, victim: str
) -> None:
    """Whoever is left shows all that the other one had answered."""
    service = start("-probation", "20s", "-drain", "5s")
    (service.upgrade_dir / "new").symlink_to(programs.version("1.1.0"))
    with watched(service) as (monitor, asking):
        upgrade_id = service.ask("POST", "/upgrade").json["id"]
        monitor.wait_for(Phase.TRIAL)
        successor = service.line(message="started a successor")["successor"]
        os.kill({"successor": successor, "incumbent": service.process.pid}[victim], signal.SIGKILL)
        record = service.record_when(upgrade_id, lambda record: record["outcome"] is not None)
    now = scrape(service)
    expected = {"successor": "rolled-back", "incumbent": "interrupted"}[victim]
    assert record["outcome"] == expected
    assert now.values[series(UPGRADES, kind="upgrade", outcome=expected)] == now.sum(UPGRADES) == 1
    # What the process that was killed had begun to answer, nobody knows.
    assert asking.answered <= now.sum(REQUESTS, 'route="/version"') <= asking.answered + asking.failed.total()
    assert asking.failed.total() <= 2


_IS_UNHEALTHY_ON_RETURN = """
from selfupdate import incumbent, messages, presence
init, health = incumbent.Incumbent.__init__, presence.Presence.health
returned = []
def begin(self, environ):
    init(self, environ)
    returned.append(self.comes_back)
def answer(self):
    bad = returned == [True] and self._lifecycle.phase == "TRIAL"
    return messages.json_response({}, 503) if bad else health(self)
incumbent.Incumbent.__init__, presence.Presence.health = begin, answer
"""


@pytest.mark.slow
def test_no_number_falls_when_the_original_process_does_not_come_back(
    start: Callable[..., Service], programs: Programs
) -> None:
    """It serves for a moment, and stays beside the one that serves on, which hands over to the next."""
    service = start("-probation", "100ms", "-drain", "5s")
    (service.upgrade_dir / "new").symlink_to(programs.faulty("1.1.0", "unhealthy", _IS_UNHEALTHY_ON_RETURN))
    with watched(service) as (monitor, asking):
        record = service.upgrade()
        service.record_when(record["id"], lambda record: record["pid_not_kept"])
        (service.upgrade_dir / "newer").symlink_to(programs.version("1.2.0"))
        assert service.upgrade()["outcome"] == "committed"
        service.status_when(lambda status: (status["version"], status["phase"]) == ("1.2.0", "RUNNING"))
    now = counts_each(service, monitor, asking)
    assert now.values[series(UPGRADES, kind="upgrade", outcome="committed")] == now.sum(UPGRADES) == 2


@pytest.mark.slow
def test_an_upgrade_that_a_crash_interrupted_is_counted_by_the_next_start(
    start: Callable[..., Service], programs: Programs
) -> None:
    """And nothing that was counted before is missing."""
    service = start("-probation", "20s")
    (service.upgrade_dir / "new").symlink_to(programs.version("1.1.0"))
    service.ask("POST", "/upgrade")
    service.line(message="upgrade", phase="PROBATION")
    before = scrape(service)
    service.kill()
    service.restart()
    service.line(message="serving")
    after = scrape(service)
    assert after.values[series(UPGRADES, kind="upgrade", outcome="interrupted")] == 1
    assert after.values[series(REQUESTS, route="/upgrade", method="POST", status="202")] == 1
    assert all(after.grows[key] >= value for key, value in before.grows.items())
