"""Who comes in: names of the server, origins, the browser's word; and the brakes on passwords and uploads."""

import asyncio
import http.client
import json
from urllib.parse import urlsplit

import pytest

pytest.importorskip("gradio", reason="gradio is not installed")

from svfit_dreambooth.errors import SVFitError
from svfit_dreambooth.web import brakes
from svfit_dreambooth.web import page as web
from svfit_dreambooth.web.brakes import PasswordBrake, UploadBrake
from svfit_dreambooth.web.door import Hosts, host_name
from svfit_dreambooth.web.rooms.workspace import Workspace, network

FOREIGN = "http://evil.example"


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """Where a page with a password listens, and its folder."""
    patch, workspace = pytest.MonkeyPatch(), Workspace(tmp_path_factory.mktemp("home"))
    patch.setenv("GRADIO_TEMP_DIR", str(workspace.served))
    workspace.served.mkdir(parents=True)
    page, _ = web.build_page(workspace)
    url = web.launch(page, workspace, Hosts("127.0.0.1", ["page.example"]), quiet=True, share=False)
    yield urlsplit(url).netloc, workspace
    page.close()
    patch.undo()


def ask(address, method, path, body=None, **headers):
    """Status, headers and text of the answer, over a bare connection."""
    connection = http.client.HTTPConnection(address, timeout=60)
    headers = {name.replace("_", "-"): value for name, value in headers.items()}
    try:
        connection.request(method, path, body, headers)
        answer = connection.getresponse()
        return answer.status, dict(answer.getheaders()), answer.read().decode(errors="replace")
    finally:
        connection.close()


UPLOAD = (
    b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n' + bytes(10_000) + b"\r\n--x--\r\n"
)
FORM = {"Content_Type": "multipart/form-data; boundary=x"}


def test_only_known_names_are_answered(address):
    netloc, _ = address
    port = netloc.rpartition(":")[2]
    for host in (netloc, f"localhost:{port}", f"[::1]:{port}", "page.example", f"LOCALHOST:{port}"):
        assert ask(netloc, "GET", "/config", Host=host)[0] == 200, host
    for host in ("evil.example", f"evil.example:{port}", "localhost.evil.example", "127.0.0.1.nip.io", "10.0.0.1", "", "a b",
                 "localhost@evil.example", "page.example:http"):  # fmt: skip
        for path in ("/", "/config", "/gradio_api/file=x"):
            status, _, text = ask(netloc, "GET", path, Host=host)
            assert status in (400, 421) and "components" not in text, (host, path)


def test_other_origins_read_nothing_change_nothing_and_fill_no_disk(address):
    netloc, workspace = address
    port = netloc.rpartition(":")[2]
    there = set(workspace.served.rglob("a.png"))
    for origin in (FOREIGN, "null", "http://localhost:3000", f"https://127.0.0.1:{port}0", f"http://evil@{netloc}"):
        for method, path in (("GET", "/config"), ("OPTIONS", "/gradio_api/queue/join"), ("POST", "/gradio_api/queue/join"),
                             ("POST", "/gradio_api/call/list_adapters"), ("POST", "/login")):  # fmt: skip
            status, headers, _ = ask(netloc, method, path, b"{}", Origin=origin, Access_Control_Request_Method="POST")
            assert status == 403 and not [name for name in headers if name.lower().startswith("access-control")]
        before = sorted(workspace.served.rglob("*"))
        assert ask(netloc, "POST", "/gradio_api/upload", UPLOAD, Origin=origin, **FORM)[0] == 403
        assert sorted(workspace.served.rglob("*")) == before
    for origin, host in (
        (f"http://{netloc}", netloc),
        ("https://page.example", "page.example"),
        ("https://page.example", netloc),
    ):
        assert ask(netloc, "POST", "/gradio_api/upload", UPLOAD, Origin=origin, Host=host, **FORM)[0] == 200
    assert len(set(workspace.served.rglob("a.png")) - there) == 1


def test_other_sites_may_link_to_the_page_and_no_more(address):
    netloc, _ = address
    link = {"Sec_Fetch_Site": "cross-site", "Sec_Fetch_Mode": "navigate", "Sec_Fetch_Dest": "document"}
    status, headers, _ = ask(netloc, "GET", "/", **link)
    assert status == 200 and "frame-ancestors 'self'" in headers["content-security-policy"]
    for path, changed in (("/config", {}), ("/", {"Sec_Fetch_Dest": "iframe"}), ("/", {"Sec_Fetch_Mode": "no-cors"}),
                          ("/", {"Sec_Fetch_Site": "same-site", "Sec_Fetch_Dest": "iframe"}), ("/logout", {})):  # fmt: skip
        assert ask(netloc, "GET", path, **{**link, **changed})[0] == 403
    assert ask(netloc, "GET", "/config", Sec_Fetch_Site="same-origin", Sec_Fetch_Mode="cors")[0] == 200


def test_a_browser_gets_its_word_once(address):
    netloc, _ = address
    word = ask(netloc, "GET", "/")[1]["set-cookie"]
    assert "HttpOnly" in word and "SameSite=Lax" in word
    assert "set-cookie" not in ask(netloc, "GET", "/", Cookie=word.partition(";")[0])[1]
    assert "set-cookie" not in ask(netloc, "GET", "/config")[1]


@pytest.mark.parametrize(
    ("listen", "host", "known"),
    [
        ("192.168.0.7", "192.168.0.7:7860", True), ("192.168.0.7", "192.168.0.8", False), ("0.0.0.0", "192.168.0.8", True),
        ("0.0.0.0", "evil.example", False), ("::", "[fe80::1]:80", True), ("0.0.0.0", "localhost", True),
    ],
)  # fmt: skip
def test_the_addresses_listened_on_are_names(listen, host, known):
    assert Hosts(listen).know(host) == known


@pytest.mark.parametrize("name", ["http://page.example", "page.example:80", "a b", "", "page.example/x"])
def test_a_name_to_be_allowed_is_a_name(name):
    with pytest.raises(SVFitError, match=f"allow_host is '{name}'"):
        Hosts(also=[name])
    assert host_name("[::1]:80") == host_name("::1") == "::1"


def test_networks():
    assert network(("192.0.2.7", 1)) == network(("::ffff:192.0.2.7", 2)) == "192.0.2.7"
    assert network(("2001:db8::1", 1)) == network(("2001:db8::ffff:1", 1)) != network(("2001:db8:1::1", 1))
    assert network(None) == network(("testclient", 1)) == ""


class Asked:
    """A server behind a brake: answers as told and counts."""

    def __init__(self):
        self.count, self.right = 0, False

    async def __call__(self, scope, receive, send):
        self.count += 1
        await send({"type": "http.response.start", "status": 200 if self.right else 400, "headers": []})
        await send({"type": "http.response.body", "body": b""})


def post(app, path, client, **headers):
    said = []

    async def send(message):
        said.append(message)

    scope = {
        "type": "http", "method": "POST", "path": path, "client": (client, 1),
        "headers": [(name.replace("_", "-").encode(), str(value).encode()) for name, value in headers.items()],
    }  # fmt: skip
    asyncio.run(app(scope, None, send))
    return said[0]["status"]


def test_guessing_passwords_takes_ever_longer():
    server, now = Asked(), [0.0]
    brake = PasswordBrake(server, lambda: now[0])
    assert [post(brake, "/login", "192.0.2.1") for _ in range(7)] == [400] * 5 + [429] * 2 and server.count == 5
    tried = 0
    for _ in range(600):  # ten minutes, a guess a second
        now[0] += 1
        tried += post(brake, "/login/", "192.0.2.1") == 400
    assert tried == 9  # after 1, 3, 7, 15 ... 511 s
    server.right = True
    assert post(brake, "/login", "192.0.2.2") == 200  # others come in
    now[0] += brakes.LONGEST_WAIT
    assert post(brake, "/login", "192.0.2.1") == 200
    server.right = False
    assert [post(brake, "/login", "192.0.2.1") for _ in range(6)] == [400] * 5 + [429]  # it begins anew
    assert post(brake, "/elsewhere", "192.0.2.1") == 400
    for number in range(brakes.MANY_GUESSES):  # from everywhere
        post(brake, "/login", f"198.51.{number}.1")
    assert [post(brake, "/login", "203.0.113.9") for _ in range(2)] == [400, 429]


def test_uploads_leave_room_and_have_a_length(tmp_path, monkeypatch):
    server, now = Asked(), [0.0]
    server.right = True
    brake = UploadBrake(server, tmp_path, lambda: now[0])
    path, giga = "/gradio_api/upload", 10**9
    usage = type("usage", (), {"free": 100 * giga})
    monkeypatch.setattr(brakes.shutil, "disk_usage", lambda folder: usage)
    assert post(brake, path, "192.0.2.1") == 411
    assert post(brake, "/gradio_api/component_server", "192.0.2.1") == 411
    assert [post(brake, path, "192.0.2.1", content_length=giga) for _ in range(3)] == [200, 200, 429]
    assert post(brake, path, "192.0.2.2", content_length=giga) == 200
    now[0] += brakes.HOUR
    assert post(brake, path, "192.0.2.1", content_length=giga) == 200
    usage.free = 1.5 * giga
    assert post(brake, path, "192.0.2.3", content_length=giga) == 507 and server.count == 4
    assert json.dumps(brake._brought).count("192.0.2") == 3
