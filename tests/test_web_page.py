"""How the page is opened to others, and how it tells what went wrong."""

import errno
import socket

import pytest

gr = pytest.importorskip("gradio", reason="gradio is not installed")

from svfit_dreambooth.errors import SVFitError
from svfit_dreambooth.web import page as web
from svfit_dreambooth.web.tabs.mistakes import plainly


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device.*see whether the disk is full"),
        (MemoryError(), "the memory is full"),
        (RuntimeError("CUDA out of memory. Tried to allocate"), "the memory is full"),
        (ZeroDivisionError("secret"), r"nobody foresaw \(ZeroDivisionError\)"),
        (SVFitError("say <b>dog</b>."), "say &lt;b&gt;dog&lt;/b&gt;."),
    ],
)
def test_whatever_goes_wrong_is_said_in_words(error, sentence, capsys):
    def handler():
        raise error

    def generator():
        yield 1
        raise error

    for call in (plainly(handler), lambda: list(plainly(generator)())):
        with pytest.raises(gr.Error, match=sentence):
            call()


def test_a_port_that_is_taken_is_told(tmp_path, monkeypatch, capsys):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        monkeypatch.setattr(web, "WARM_UP_AFTER", 10_000)
        monkeypatch.setattr("svfit_dreambooth.web.rooms.queue.Queue.start", lambda self: None)
        monkeypatch.setenv("GRADIO_TEMP_DIR", "")
        assert web.main(["--data_dir", str(tmp_path), "--port", str(port)]) == 2
    assert f"cannot be opened at 127.0.0.1, port {port}: choose another" in capsys.readouterr().err


def test_the_page_is_open_to_nobody_else_unless_told(tmp_path, monkeypatch, capsys):
    launched = {}
    monkeypatch.setattr(gr.Blocks, "launch", lambda self, **options: launched.update(options) or (None, "", None))
    monkeypatch.setattr(gr.Blocks, "block_thread", lambda self: None)
    monkeypatch.setattr(web, "WARM_UP_AFTER", 10_000)
    monkeypatch.setattr("svfit_dreambooth.web.rooms.queue.Queue.start", lambda self: None)
    monkeypatch.setenv("GRADIO_SHARE", "True")
    monkeypatch.setenv("GRADIO_TEMP_DIR", "")
    assert web.main(["--data_dir", str(tmp_path)]) == 0
    assert (launched["server_name"], launched["share"], launched["allowed_paths"]) == ("127.0.0.1", False, [])
    assert capsys.readouterr().err == ""
    assert web.main(["--data_dir", str(tmp_path), "--listen"]) == 0
    assert launched["server_name"] == "0.0.0.0" and "add --auth NAME:PASSWORD" in capsys.readouterr().err
    assert web.main(["--data_dir", str(tmp_path), "--listen", "--auth", "me:word"]) == 0
    assert launched["auth"] == [("me", "word")] and capsys.readouterr().err == ""
    assert web.main(["--auth", "me"]) == 2
    assert "--auth reads NAME:PASSWORD" in capsys.readouterr().err
