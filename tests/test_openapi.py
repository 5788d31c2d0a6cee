"""The HTTP contract, openapi.json: valid, of all routes, and held against running services by schemathesis."""

from __future__ import annotations

import ast
import copy
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jsonschema_rs
import pytest
import schemathesis
from clients import Listening
from programs import shell

import selfupdate
from selfupdate.lifecycle import Phase
from selfupdate.settings import FLAGS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from programs import Programs
    from service import Service

PACKAGE = Path(selfupdate.__file__).parent
CONTRACT: dict[str, Any] = json.loads((PACKAGE / "openapi.json").read_bytes())

TOKEN = "a-token-of-the-tests"
CANDIDATE = "self-update-1.1.0"
"""The name that the document's example of a body asks for."""

# The same data each time, none remembered, of each kind. What a schema cannot say is said here: that a body has at
# most 4096 bytes, that the candidate which is asked for may be no good, and that a GET with a body is malformed
# before it is of a wrong method. Of a stream the first event is taken. What is asked of a service in another state is
# added at the end.
CONFIG = """
max-stream-events = 1

[cache]
enabled = false

[generation]
deterministic = true
database = "none"
mode = "all"
max-examples = 5

[checks]
negative_data_rejection.expected-statuses = [400, 401, 404, 413, 414, 429]

[[operations]]
include-operation-id = "startUpgrade"
checks.positive_data_acceptance.expected-statuses = ["2xx", 401, 404, 409, 413, 422, 429, 503]
phases.coverage.unexpected-methods = ["DELETE", "OPTIONS", "PATCH", "PUT", "TRACE"]
"""
OFF = """
checks.not_a_server_error.expected-statuses = ["2xx", "4xx", 503]

[[operations]]
include-operation-id = "listCandidates"
checks.not_a_server_error.expected-statuses = ["2xx", "4xx", 503]
"""
BEARER = f"""
[auth.openapi.token]
bearer = "{TOKEN}"
"""


def _nodes(node: object, where: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Return each object of a document, with its place."""
    if isinstance(node, dict):
        yield where, node
    if isinstance(node, dict | list):
        for key, inner in node.items() if isinstance(node, dict) else enumerate(node):
            yield from _nodes(inner, f"{where}/{key}")


def _operations(document: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    for path, item in document["paths"].items():
        for method, operation in item.items():
            yield path, method.upper(), operation


def _is_there(document: dict[str, Any], reference: str) -> bool:
    node: Any = document
    for part in reference.removeprefix("#/").split("/"):
        node = node.get(part) if isinstance(node, dict) else None
    return reference.startswith("#/") and node is not None


def _values(holder: dict[str, Any]) -> Iterator[object]:
    """Return the examples beside a schema."""
    if "example" in holder:
        yield holder["example"]
    for example in holder.get("examples", {}).values():
        yield example["value"]


def faults(document: dict[str, Any]) -> list[str]:
    """Return what is wrong with a document, as far as that can be told without a service."""
    try:
        schemathesis.openapi.from_dict(document).validate()
    except jsonschema_rs.ValidationError as error:
        return [f"{error.instance_path}: {error.message}"]
    found: list[str] = []
    known = {operation["operationId"] for _, _, operation in _operations(document)}
    for where, node in _nodes(document):
        if "$ref" in node and not _is_there(document, node["$ref"]):
            found.append(f"{where}: {node['$ref']} is not there")
        if where.count("/") == 3 and where.startswith("/components/schemas/"):  # whose examples are a list
            found += _faults_of_schema(document, where, node, node.get("examples", []))
        if node.get("additionalProperties") is False and not set(node.get("required", ())) <= node["properties"].keys():
            found.append(f"{where}: what is required is no property")
        if "schema" in node:
            found += _faults_of_schema(document, where, node["schema"], _values(node))
        if "operationId" in node and node["operationId"] not in known:
            found.append(f"{where}: no operation {node['operationId']}")
    return found


def _faults_of_schema(
    document: dict[str, Any], where: str, schema: dict[str, Any], examples: Iterable[object]
) -> Iterator[str]:
    whole = {**schema, "components": document["components"]}
    try:
        validator = jsonschema_rs.Draft202012Validator(whole, validate_formats=True, offline=True)
    except (jsonschema_rs.ValidationError, jsonschema_rs.ReferencingError) as error:
        yield f"{where}: {error}"
        return
    for example in examples:
        yield from (f"{where}: {error.message}" for error in validator.iter_errors(example))


def test_the_document_is_valid() -> None:
    """As OpenAPI 3.1, with schemas of JSON Schema 2020-12, of which each example is one."""
    assert faults(CONTRACT) == []


@pytest.mark.parametrize(
    ("place", "value"),
    [
        ("/info/title", None),
        ("/pathz", {}),
        ("/components/responses/Defect/description", None),
        ("/components/schemas/Id/type", "strng"),
        ("/components/schemas/Id/examples/0", "1"),
        ("/components/schemas/Listing/properties/candidates/items/$ref", "#/components/schemas/Candidates"),
        ("/components/responses/BadRequest/content/application~1problem+json/example/status", "400"),
        ("/components/links/upgrade/operationId", "getRecord"),
        ("/components/schemas/Health/properties/generation", None),
        ("/paths/~1version/get/responses/200/content/application~1json/schema", {"minimum": "1"}),
    ],
)
def test_a_document_that_is_not_valid(place: str, value: object) -> None:
    """It is noticed, wherever it is broken."""
    assert faults(_changed(place, value)) != []


def _changed(place: str, value: object, document: dict[str, Any] = CONTRACT) -> dict[str, Any]:
    """Return a document with another value at a JSON pointer (RFC 6901), or without that where it is None."""
    document = copy.deepcopy(document)
    *parts, last = (part.replace("~1", "/") for part in place.split("/")[1:])
    node: Any = document
    for part in parts:
        node = node[_key(node, part)]
    if value is None:
        del node[_key(node, last)]
    else:
        node[_key(node, last)] = value
    return document


def _key(node: object, part: str) -> str | int:
    return int(part) if isinstance(node, list) else part


def test_all_that_is_defined_is_used() -> None:
    """Nothing in it speaks of what is not there."""
    used = {node["$ref"] for _, node in _nodes(CONTRACT) if "$ref" in node}
    defined = {f"#/components/{kind}/{name}" for kind, all_ in CONTRACT["components"].items() for name in all_}
    assert {name for name in defined if "/securitySchemes/" not in name} == used


@pytest.mark.slow
def test_each_route_is_in_the_document_and_each_of_the_document_is_a_route(start: Callable[..., Service]) -> None:
    """The paths are those that the routes are made of; each takes the methods that the document gives it."""
    texts = {text for module in ("app", "api", "presence") for text in _texts(_tree(PACKAGE / f"{module}.py"))}
    spelled = {text for text in texts if re.fullmatch("/[a-z.]*", text)}
    assert {*spelled, "/upgrades/{id}"} == set(CONTRACT["paths"])
    service = start()
    for path, item in CONTRACT["paths"].items():
        answer = service.ask("TRACE", path.format(id="1"))
        methods = {method.upper() for method in item} | ({"HEAD"} if "get" in item else set())
        assert (answer.status, set(answer.headers["Allow"].split(", "))) == (405, methods)


def test_each_operation_has_the_answers_that_no_route_can_keep_away() -> None:
    """Framing and Host are checked before it is known what is asked for, and a defect may be anywhere."""
    for _, _, operation in _operations(CONTRACT):
        assert {"400", "408", "413", "414", "421", "431", "500", "501", "505"} <= operation["responses"].keys()


def test_the_words_that_programs_rely_on() -> None:
    """The document has each phase, and each code of a refusal that the sources spell, and no other."""
    schemas = CONTRACT["components"]["schemas"]
    assert schemas["Phase"]["enum"] == list(Phase)
    documented = set(schemas["Code"]["examples"])
    kinds = {code.partition("-")[0] for code in documented}
    trees = list(map(_tree, PACKAGE.glob("*.py")))
    of_a_kind = {text for tree in trees for text in _texts(tree) if text.partition("-")[0] in kinds}
    calls = (node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Call) and node.args[1:])
    raised = {text for call in calls if ast.unparse(call.func).endswith("Error") for text in _texts(call.args[1])}
    codes = {text for text in of_a_kind | raised if re.fullmatch("[a-z]+(-[a-z]+)+", text)}
    others = {"same-origin", *(flag.name for flag in FLAGS)}
    composed = {"blocked", "verifier-crashed", "verifier-timeout"}
    assert codes - others | composed == documented


def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def _texts(tree: ast.AST) -> set[str]:
    """Return the string constants of a syntax tree."""
    nodes = ast.walk(tree)
    return {node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)}


# Against running services.


def examine(
    service: Service, tmp_path: Path, config: str = CONFIG, document: dict[str, Any] = CONTRACT, *arguments: str
) -> dict[str, Any]:
    """Hold a document against a service, by all of schemathesis's checks; return its report."""
    place, settings, report = (tmp_path / name for name in ("contract.json", "schemathesis.toml", "report.json"))
    place.write_text(json.dumps(document), encoding="utf-8")
    settings.write_text(config, encoding="utf-8")
    host, port = service.address
    command = [
        *(Path(sys.executable).with_name("schemathesis"), "--config-file", settings, "run", place),
        *("--url", f"http://{host}:{port}", "--checks", "all", "--no-color", "--warnings", "off"),
        *("--report", "json", "--report-json-path", report, *arguments),
    ]
    ran = subprocess.run(
        list(map(str, command)),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=tmp_path,
        check=False,
    )
    print(ran.stdout)  # which pytest shows where the test fails
    found: dict[str, Any] = json.loads(report.read_bytes())
    return found


def assert_nothing_found(report: dict[str, Any]) -> None:
    """Check that all was examined, in every way, and nothing found."""
    assert (report["failures"], report["errors"], report["stop_reason"]) == ([], [], "completed")
    assert report["operations"]["tested"] == len(list(_operations(CONTRACT)))
    assert {name: phase["status"] for name, phase in report["phases"].items()} == dict.fromkeys(
        ("examples", "coverage", "fuzzing", "stateful"), "success"
    )


@pytest.mark.slow
def test_nothing_is_found_where_nothing_is_to_be_upgraded_to(start: Callable[..., Service], tmp_path: Path) -> None:
    """No candidate, no history. What is served is the document, with the version that serves."""
    service = start()
    assert service.get("/openapi.json") == _changed("/info/version", "1.0.0")
    assert_nothing_found(examine(service, tmp_path))
    assert service.get("/upgrades") == {"upgrades": []}


@pytest.mark.slow
def test_nothing_is_found_while_the_service_upgrades_and_goes_back(
    start: Callable[..., Service], programs: Programs, tmp_path: Path
) -> None:
    """Each POST that is accepted begins a handover; the document is the same in both versions but for its own."""
    service = start("-probation", "100ms", "-drain", "2s")
    (service.upgrade_dir / CANDIDATE).symlink_to(programs.version("1.1.0"))
    assert_nothing_found(examine(service, tmp_path))
    service.status_when(lambda status: status["phase"] == "RUNNING")
    ended = {(record["kind"], record["outcome"]) for record in service.get("/upgrades")["upgrades"]}
    assert {("upgrade", "committed"), ("rollback", "committed")} <= ended
    service.upgrade(CANDIDATE)  # unless it is what runs
    service.status_when(lambda status: (status["phase"], status["version"]) == ("RUNNING", "1.1.0"))
    assert service.get("/openapi.json") == _changed("/info/version", "1.1.0")


@pytest.mark.slow
def test_each_event_of_an_upgrade_is_as_the_document_says(start: Callable[..., Service], programs: Programs) -> None:
    """Of each kind at least one is told; what is in it has its schema."""
    service = start("-probation", "100ms", "-drain", "2s")
    listening = Listening(service.address, 0)
    (service.upgrade_dir / CANDIDATE).symlink_to(programs.version("1.1.0"))
    service.upgrade()
    listening.wait_for(lambda event: event.kind == "status" and event.data["version"] == "1.1.0")
    listening.stop()
    assert {event.kind for event in listening.events} == {"status", "phase", "record"}
    for event in listening.events:
        schema = CONTRACT["components"]["schemas"][f"{event.kind.title()}Event"]["properties"]["data"]["contentSchema"]
        assert list(_faults_of_schema(CONTRACT, event.kind, schema, [event.data])) == []


@pytest.mark.slow
def test_nothing_is_found_after_a_failed_upgrade(start: Callable[..., Service], tmp_path: Path) -> None:
    """Its record is there, and more fail as they are asked for by name."""
    service = start("-probation", "100ms", "-drain", "2s")
    shell(service.upgrade_dir / CANDIDATE, "1.1.0", "echo no >&2; exit 3")
    assert service.upgrade()["outcome"] == "aborted"
    assert_nothing_found(examine(service, tmp_path))
    service.status_when(lambda status: status["phase"] == "RUNNING")
    assert {record["outcome"] for record in service.get("/upgrades")["upgrades"]} == {"aborted"}


@pytest.mark.slow
def test_nothing_is_found_where_upgrades_are_off(start: Callable[..., Service], tmp_path: Path) -> None:
    """Whoever asks for a choice gets 503, and the reason; the rest is as ever."""
    service = start("-insecure-allow-unsigned=false")
    assert service.ask("GET", "/candidates").json["code"] == "no-trust-root"
    assert_nothing_found(examine(service, tmp_path, CONFIG + OFF))


@pytest.mark.slow
def test_nothing_is_found_where_a_token_is_needed(start: Callable[..., Service], tmp_path: Path) -> None:
    """Nobody passes without, or with another one: with that, the token is not optional, as the document leaves it."""
    token = tmp_path / "token"
    token.touch(0o600)
    token.write_text(TOKEN, encoding="ascii")
    service = start("-token-file", str(token))
    document = CONTRACT
    for path in ("~1upgrade", "~1rollback"):
        document = _changed(f"/paths/{path}/post/security", [{"token": []}], document)
    assert_nothing_found(examine(service, tmp_path, CONFIG + BEARER, document))


@pytest.mark.slow
def test_whatever_is_broken_in_the_document_is_found(start: Callable[..., Service], tmp_path: Path) -> None:
    """An answer, a field, a type, a header, a bound and a need that the service does not have, each by its check."""
    service = start()
    document = CONTRACT
    for place, value in (
        ("/paths/~1rollback/post/responses/409", None),
        ("/components/schemas/Health/required/3", None),
        ("/components/schemas/Health/properties/generation", None),
        ("/paths/~1app.js/get/responses/200/content", {"text/plain": {}}),
        ("/paths/~1version/get/responses/200/headers", {"Age": {"required": True, "schema": {"type": "string"}}}),
        ("/paths/~1upgrades/get/parameters/0/schema/maximum", 99),
        ("/paths/~1upgrades~1{id}/get/parameters/2/schema/maximum", 99999),
        ("/paths/~1upgrade/post/security", [{"token": []}]),
        ("/components/schemas/StatusEvent/properties/data/contentSchema", {"required": ["weather"]}),
    ):
        document = _changed(place, value, document)
    failures = examine(service, tmp_path, CONFIG, document, "--phases", "coverage")["failures"]
    assert {(failure["type"], operation) for failure in failures for operation in failure["operations"]} == {
        ("UndefinedStatusCode", "POST /rollback"),
        ("JsonSchemaError", "GET /healthz"),
        ("UndefinedContentType", "GET /app.js"),
        ("MissingHeaders", "GET /version"),
        ("AcceptedNegativeData", "GET /upgrades"),
        ("RejectedPositiveData", "GET /upgrades/{id}"),
        ("MissingHeaderNotRejected", "POST /upgrade"),
        ("JsonSchemaError", "GET /events"),
    }
