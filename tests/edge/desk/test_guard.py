"""Hostile requests: other hosts, other pages, guesses, long and malformed input. None gets further."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from reviewed import count, table
from starlette.testclient import TestClient

from rbc_edge.desk.app import Review
from rbc_edge.desk.guard import MAX_BODY_BYTES, Guard, is_loopback
from rbc_edge.desk.review import Desk

TOKEN, PORT = "a-secret-of-the-server", 8017
OURS = f"http://127.0.0.1:{PORT}"
Serve = Callable[..., TestClient]


class Clock:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def out(camera: Path, tmp_path: Path) -> Path:
    (tmp_path / "out").mkdir()
    count(tmp_path / "out", camera)
    return tmp_path / "out"


@pytest.fixture
def serve(out: Path, clock: Clock) -> Iterator[Serve]:
    opened: list[TestClient] = []

    def start(*, read_only: bool = False, **options: Any) -> TestClient:
        app = Review(Desk(out, shapes=("target",)), who="user", read_only=read_only).app()
        guard = Guard(app, token=TOKEN, port=PORT, read_only=read_only, monotonic_s=clock, **options)
        client = TestClient(guard, base_url=OURS, raise_server_exceptions=False)
        client.__enter__()
        opened.append(client)
        return client

    yield start
    for each in opened:
        each.__exit__()


@pytest.fixture
def client(serve: Serve) -> TestClient:
    """A browser that has opened the address."""
    client = serve()
    assert client.get(f"/?token={TOKEN}").status_code == 200
    return client


def post(client: TestClient, path: str, **values: Any) -> Any:
    return client.post(path, json=values, headers={"origin": OURS})


def a_correction(client: TestClient, number: int = 1, what: str = "wbc", fov: str = "1") -> dict[str, Any]:
    shown = client.get("/api/field", params={"slide": "s1", "fov": fov}).json()
    box = shown["cells"][number - 1]["box"]
    about = {"slide": "s1", "fov": fov, "sha256": shown["sha256"]}
    return about | {"kind": "label", "what": what, "box": box, "who": "Ana"}


def test_the_whole_way_of_a_person(client: TestClient, out: Path) -> None:
    assert client.get("/static/review.js").headers["content-type"].startswith("text/javascript")
    assert client.get("/api/slides").json()["who"] == "user"
    about = a_correction(client)
    now = post(client, "/api/correct", **about).json()
    assert (now["n_wbc"], now["corrections"][0]["who"]) == (1, "Ana")
    shown = client.get("/picture", params={"slide": "s1", "fov": "1"})
    assert (shown.headers["content-type"], shown.content[:2]) == ("image/jpeg", b"\xff\xd8")
    key = now["corrections"][0]["key"]
    assert post(client, "/api/undo", slide="s1", fov="1", key=key, who="").json()["n_corrected"] == 0
    now = post(client, "/api/exclude", slide="s1", fov="1", sha256=about["sha256"], reason="blurred").json()
    assert now["status"] == "excluded"
    client.__exit__()  # the tables are written before the server is gone
    assert [row["status"] for row in table(out, "s1.csv")] == ["ok", "excluded", "ok"]


def test_nothing_without_the_secret(serve: Serve) -> None:
    client = serve()
    for path in (
        "/",
        "/?token=",
        "/?token=x",
        "/api/slides",
        "/picture?slide=s1&fov=1",
        "/nothing",
        "/login",
    ):
        answer = client.get(path)
        assert (answer.status_code, "set-cookie" in answer.headers) == (403, False), path
        assert "s1" not in answer.text
    assert client.get(f"/api/slides?token={TOKEN}").status_code == 403  # only the first page takes it
    assert post(client, "/api/undo", key=1).status_code == 403
    assert client.get("/", headers={"cookie": f"rbc_edge_review_{PORT}=x"}).status_code == 403
    assert client.get("/", headers={"cookie": f"rbc_edge_review_1={TOKEN}"}).status_code == 403
    assert client.get("/", headers={b"cookie": b"a=\xff; ;;="}).status_code == 403
    cookie = client.get(f"/?token={TOKEN}").headers["set-cookie"]
    assert cookie == f"rbc_edge_review_{PORT}={TOKEN}; HttpOnly; SameSite=Strict; Path=/"
    assert client.get("/").status_code == 200


HOSTS = ["evil.example:8017", "evil.example", "127.0.0.1", "127.0.0.1:80", "", "[::1", "10.0.0.1:8017"]
HOSTS += ["127.0.0.1.evil.example:8017", "localhost:8017@evil.example", "127.0.0.1:8017, evil.example"]
WRONG: list[dict[str, Any]] = [{"box": each} for each in (None, [1, 2, 3], [1, 2, 3, "4"], "1234")]
WRONG += [
    {"box": [True, 0, 9, 9]},
    {"box": [0, 0, 1e300, 9]},
    {"kind": "x"},
    {"kind": "added"},
    {"what": "x"},
]
WRONG += [{"what": None}, {"sha256": ""}, {"kind": "shape", "what": "x"}, {"fov": "9"}, {"slide": ["s1"]}]


@pytest.mark.parametrize("host", HOSTS)
def test_a_foreign_name_that_points_here_gets_nothing(client: TestClient, host: str) -> None:
    answer = client.get(f"/?token={TOKEN}", headers={"host": host})
    assert (answer.status_code, "set-cookie" in answer.headers) == (421, False)


def test_names_of_this_computer_are_ours(client: TestClient) -> None:
    for host in ("localhost:8017", "LOCALHOST:8017", "[::1]:8017", "127.0.0.1:8017"):
        assert client.get(f"/?token={TOKEN}", headers={"host": host}).status_code == 200


@pytest.mark.parametrize(
    "origin",
    [None, "null", "http://evil.example", "https://127.0.0.1:8017", "http://127.0.0.1:8018", f"{OURS}/"],
)
def test_another_page_cannot_write(client: TestClient, origin: str | None) -> None:
    headers = {} if origin is None else {"origin": origin}
    answer = client.post("/api/correct", json=a_correction(client), headers=headers)
    assert answer.status_code == 403
    assert client.get("/api/slides").json()["slides"][0]["n_corrected"] == 0


def test_another_page_cannot_send_forms_or_read(client: TestClient) -> None:
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""):
        headers = {"origin": OURS, "content-type": kind}
        assert client.post("/api/undo", content=b"{}", headers=headers).status_code == 415
    for site in ("cross-site", "same-site", "x"):
        assert client.get("/api/slides", headers={"sec-fetch-site": site}).status_code == 403
        assert client.get("/picture?slide=s1&fov=1", headers={"sec-fetch-site": site}).status_code == 403
        framed = {"sec-fetch-site": site, "sec-fetch-mode": "no-cors"}
        assert client.get(f"/?token={TOKEN}", headers=framed).status_code == 403
    # Somebody clicks the address in a mail.
    clicked = {"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate"}
    assert client.get(f"/?token={TOKEN}", headers=clicked).status_code == 200


@pytest.mark.parametrize("method", ["PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "CONNECT", "X"])
def test_other_methods_are_refused(client: TestClient, method: str) -> None:
    assert client.request(method, "/api/slides", headers={"origin": OURS}).status_code == 405


def test_every_answer_has_strict_headers(client: TestClient) -> None:
    for path in (
        "/",
        "/static/review.css",
        "/api/slides",
        "/picture?slide=s1&fov=1",
        "/nothing",
        "/api/field",
    ):
        headers = client.get(path).headers
        policy = headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "frame-ancestors 'none'" in policy
        assert "unsafe" not in policy
        about = [headers[n] for n in ("x-content-type-options", "referrer-policy", "cache-control")]
        assert about == ["nosniff", "no-referrer", "no-store"]
        assert headers["cross-origin-resource-policy"] == "same-origin"
        assert "access-control-allow-origin" not in headers
    page = client.get("/").text
    assert "<script src=" in page
    assert "<style" not in page
    assert "style=" not in page
    assert "http" not in page  # nothing from elsewhere


def test_no_path_of_a_request_reaches_the_disk(client: TestClient, out: Path, camera: Path) -> None:
    secret = out / "secret.png"
    secret.write_bytes((camera / "s1" / "1.png").read_bytes())
    for slide, fov in (
        ("s1", str(secret)),
        ("s1", "../../out/secret"),
        ("..", "out/secret"),
        (str(out), "secret"),
        ("s1", "1.png"),
        ("s1\0", "1"),
        ("", ""),
    ):
        answer = client.get("/picture", params={"slide": slide, "fov": fov})
        assert answer.status_code == 409, (slide, fov)
    for name in ("../app.py", "..%2fapp.py", "%2e%2e/desk.py", "/etc/passwd", "index.html%00", "desk.py"):
        assert client.get(f"/static/{name}").status_code == 404


def test_limits_of_size(client: TestClient) -> None:
    assert client.get(f"/api/fields?slide={'x' * 5000}").status_code == 414
    long = post(client, "/api/exclude", reason="x" * MAX_BODY_BYTES)
    assert long.status_code == 413
    about = {"origin": OURS, "content-type": "application/json"}
    for length in ("-1", "x", "9" * 40):
        answer = client.post("/api/undo", content=b"{}", headers=about | {"content-length": length})
        assert answer.status_code in (411, 413)
    lying = iter([b"x" * 10_000] * 10)  # more than the head says
    answer = client.post("/api/undo", content=lying, headers=about | {"content-length": "2"})
    assert answer.status_code == 413
    for name, value in (("who", "x" * 61), ("what", "x" * 61), ("who", "a\nb"), ("slide", "x" * 1001)):
        assert post(client, "/api/correct", **(a_correction(client) | {name: value})).status_code == 409
    assert client.get("/api/slides").json()["slides"][0]["n_corrected"] == 0


@pytest.mark.parametrize(
    "body",
    [b"", b"[]", b"null", b"{", b"\xff", b"[" * 9000, b'{"key": "1"}', b'{"key": true}', b'{"key": 1e3}'],
)
def test_malformed_requests_are_said_to_be(client: TestClient, body: bytes) -> None:
    headers = {"origin": OURS, "content-type": "application/json"}
    for path in ("/api/undo", "/api/correct", "/api/exclude"):
        answer = client.post(path, content=body, headers=headers)
        assert answer.status_code == 409, answer.text
        assert answer.json()["error"]


@pytest.mark.parametrize("values", WRONG)
def test_what_cannot_be_corrected_changes_nothing(client: TestClient, values: dict[str, Any]) -> None:
    answer = post(client, "/api/correct", **(a_correction(client) | values))
    assert answer.status_code == 409
    assert client.get("/api/slides").json()["slides"][0]["n_corrected"] == 0


def test_read_only_shows_the_same_page_and_writes_nothing(serve: Serve, out: Path) -> None:
    client = serve(read_only=True)
    client.get(f"/?token={TOKEN}")
    assert client.get("/api/slides").json()["read_only"] is True
    about = a_correction(client)
    for path in ("/api/correct", "/api/undo", "/api/exclude"):
        assert post(client, path, **about).status_code == 403
    assert client.get("/picture?slide=s1&fov=1").status_code == 200


def test_limits_of_rate(client: TestClient, clock: Clock) -> None:
    answers = [post(client, "/api/undo", slide="s1", fov="1", key=1).status_code for _ in range(60)]
    assert (answers.count(409), answers.count(429)) == (40, 20)
    answers = [client.get("/static/review.css").status_code for _ in range(400)]
    assert answers.count(429) > 100
    clock.now_s += 5.0
    assert post(client, "/api/undo", slide="s1", fov="1", key=1).status_code == 409


def test_a_password_takes_the_place_of_the_token(serve: Serve, clock: Clock) -> None:
    client = serve(host="0.0.0.0", password="correct horse battery")
    lan = {"host": f"192.168.0.7:{PORT}", "origin": f"http://192.168.0.7:{PORT}"}
    page = client.get(f"/?token={TOKEN}", headers=lan)
    assert (page.status_code, "set-cookie" in page.headers) == (401, False)
    assert 'type="password"' in page.text
    assert client.get("/", headers={"host": f"rebound.example:{PORT}"}).status_code == 421
    assert client.get("/api/slides", headers=lan).status_code == 403
    wrong: list[Any] = ["", "correct", 7, ["correct horse battery"], {"a": 1}]
    assert {client.post("/login", json=word, headers=lan).status_code for word in wrong} == {403}
    right = "correct horse battery"
    # Also the right one, after five guesses.
    assert client.post("/login", json=right, headers=lan).status_code == 429
    clock.now_s += 15.0
    no_origin = {"host": lan["host"]}
    assert client.post("/login", json=right, headers=no_origin).status_code == 403
    answer = client.post("/login", json=right, headers=lan)
    assert answer.status_code == 200
    cookie = {"cookie": answer.headers["set-cookie"].partition(";")[0]}
    assert client.get("/api/slides", headers=lan | cookie).status_code == 200


def test_no_password_no_login(serve: Serve) -> None:
    client = serve()
    for word in ("", TOKEN):
        assert client.post("/login", json=word, headers={"origin": OURS}).status_code == 404


def test_a_gone_file_and_a_lost_ledger_are_said(client: TestClient, camera: Path, out: Path) -> None:
    (camera / "s1" / "1.png").unlink()
    answer = client.get("/picture?slide=s1&fov=1")
    assert answer.status_code == 410
    (out / "ledger.sqlite3").rename(out / "away")
    answer = client.get("/api/slides")
    assert (answer.status_code, "no ledger" in answer.json()["error"]) == (503, True)


def test_loopback() -> None:
    assert all(map(is_loopback, ["127.0.0.1", "127.9.9.9", "::1", "localhost"]))
    assert not any(map(is_loopback, ["0.0.0.0", "::", "10.0.0.1", "localhost.evil.example", ""]))
