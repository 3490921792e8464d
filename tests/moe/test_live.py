"""Checks the live report: what the server answers, and how the page renews itself in a browser."""

from __future__ import annotations

import http.client
import json
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from equimoe.launch import env, live
from equimoe.launch.live import HOST, Live, serve
from equimoe.launch.page import PLOTS
from equimoe.launch.report import build, main
from equimoe.moe.observe.metrics import to_line
from tests.helpers.chromium import CHROMIUM, Chromium
from tests.helpers.runs import made_up_run, observed
from tests.helpers.slow import slow_but
from tests.moe.test_report import Page, write_run

ROOT = Path(__file__).resolve().parents[2]
RECORDS = observed(made_up_run(steps=100, every=10, eval_every=50))


@pytest.fixture
def one_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw one figure only, which saves seconds."""
    monkeypatch.setattr(sys.modules["equimoe.launch.page"], "PLOTS", PLOTS[:1])


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Path, int]]:
    """A folder with the first half of a run, and the port of its live report."""
    monkeypatch.setattr(live, "SPARE", 0)
    folder = write_run(tmp_path / "my run", RECORDS[:7])
    ports: list[int] = []
    ready = threading.Event()

    def take(port: int) -> None:
        ports.append(port)
        ready.set()

    page = Live([folder], partial(build, [folder]))
    threading.Thread(target=serve, args=(page, 0, take), daemon=True).start()
    assert ready.wait(20)
    yield folder, ports[0]


def ask(port: int, path: str, method: str = "GET", **headers: str) -> tuple[int, str, dict[str, str]]:
    connection = http.client.HTTPConnection(HOST, port, timeout=60)
    connection.putrequest(method, path, skip_host="Host" in headers)
    for name, value in headers.items():
        connection.putheader(name, value)
    connection.endheaders()
    answer = connection.getresponse()
    return answer.status, answer.read().decode(), dict(answer.getheaders())


def more(folder: Path, records: list[dict[str, object]] = RECORDS[7:]) -> None:
    with open(folder / "metrics.jsonl", "ab") as file:
        file.write(b"".join(map(to_line, records)))


@pytest.mark.usefixtures("one_figure")
def test_the_page_is_made_anew_when_there_are_new_records(served: tuple[Path, int]) -> None:
    folder, port = served
    status, text, headers = ask(port, "/")
    assert status == 200 and headers["Content-Type"] == "text/html; charset=utf-8"
    assert headers["Cache-Control"] == "no-store" and "default-src 'none'" in headers["Content-Security-Policy"]
    first = Page(text)
    assert "step 50 of 100" in first.words and "loss" in first.figures and "my run" in first.words
    version = ask(port, "/version")[1]
    assert f'data-version="{version}"' in text
    assert ask(port, "/version")[1] == version and ask(port, "/")[1] == text
    more(folder)
    assert ask(port, "/version")[1] != version
    assert "step 100 of 100" in Page(ask(port, "/?again")[1]).words


@pytest.mark.usefixtures("one_figure")
def test_nothing_else_is_answered(served: tuple[Path, int]) -> None:
    folder, port = served
    (folder / "secret.txt").write_text("secret")
    for path in ("/metrics.jsonl", "/secret.txt", "/../secret.txt", "/%2e%2e/secret.txt", "/report.html"):
        status, text, _ = ask(port, path)
        assert status == 404 and "secret\n" not in text, path
    for method in ("POST", "PUT", "DELETE", "OPTIONS"):
        assert ask(port, "/", method)[0] == 501
    for host in ("evil.example", f"evil.example:{port}", ""):
        assert ask(port, "/", Host=host)[0] == 403
    assert ask(port, "/version", Host=f"localhost:{port}")[0] == 200
    status, text, headers = ask(port, "/", "HEAD")
    assert status == 200 and text == "" and int(headers["Content-Length"]) > 1000
    assert sorted(path.name for path in folder.iterdir()) == ["metrics.jsonl", "secret.txt"], "nothing was written"


@pytest.mark.usefixtures("one_figure")
def test_it_waits_for_the_first_records(tmp_path: Path) -> None:
    page = Live([tmp_path], partial(build, [tmp_path]))
    assert "cannot be read (No such file or directory)" in Page(page.page().decode()).words
    write_run(tmp_path, RECORDS)
    assert "step 100 of 100" in Page(page.page().decode()).words


def test_drawing_leaves_the_cores_to_the_run(tmp_path: Path) -> None:
    def build_slowly() -> tuple[str, list[str]]:
        time.sleep(0.1)
        return "a run", []

    page = Live([write_run(tmp_path, RECORDS[:7])], build_slowly)
    page.page()
    first, began = page.version(), time.monotonic()
    more(tmp_path)
    while page.version() == first:
        time.sleep(0.01)
    assert 0.8 < time.monotonic() - began < 3, "ten times as long as drawing took"


def test_wrong_arguments_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "none"), "--watch"]) == env.DATA
    assert capsys.readouterr().err == f"report: {tmp_path / 'none'}: no such folder; give the folder of a run\n"
    assert main([str(tmp_path), "--watch", "--port", "70000"]) == env.CONFIG
    for out, words in (
        (tmp_path, "is a folder; name a file in it"),
        (tmp_path / "no" / "x", "its folder does not exist"),
    ):
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main([str(tmp_path), "--out", str(out), str(tmp_path)])
        assert ended.value.code == env.CANNOT_WRITE
        assert capsys.readouterr().err.startswith(f"error: --out={out}: {words}")
    with socket.socket() as taken:
        taken.bind((HOST, 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        capsys.readouterr()
        assert main([str(tmp_path), "--watch", "--port", port]) == env.CONFIG
    assert f"report: --port={port}: cannot be used (Address already in use); choose" in capsys.readouterr().err


MODULE = ("-m", "equimoe.launch.report")
SCRIPT = ("-c", "from equimoe.launch.report import main; raise SystemExit(main())")


@pytest.mark.parametrize(
    ("start", "code"), slow_but([(MODULE, -signal.SIGINT)], [(MODULE, -signal.SIGINT), (SCRIPT, 128 + signal.SIGINT)])
)
def test_ctrl_c_ends_the_command(tmp_path: Path, start: tuple[str, str], code: int) -> None:
    """A shell shows 130 for both, as for the other commands."""
    write_run(tmp_path, RECORDS[:3])
    command = [sys.executable, *start, str(tmp_path), "--watch", "--port", "0"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stderr is not None
    line = process.stdout.readline()
    port = int(line.split(":")[3].split("/")[0])
    assert line == f"report: http://127.0.0.1:{port}/  (Ctrl-C ends it)\n"
    assert ask(port, "/version")[0] == 200
    process.send_signal(signal.SIGINT)
    assert process.wait(20) == code
    assert process.stderr.read() == ""


@pytest.mark.usefixtures("one_figure")
def test_the_page_asks_for_its_newest_version(served: tuple[Path, int]) -> None:
    """Without a browser: the script of the page uses the two addresses that the server answers, and no other."""
    text = ask(served[1], "/")[1]
    (script,) = [part.split("</script>")[0] for part in text.split("<script>")[1:]]
    assert script.count("fetch(") == 2 and 'fetch("version"' in script and 'fetch("./"' in script
    assert "scrollTo" in script


def eventually(browser: Chromium, script: str) -> Callable[[], bool]:
    return lambda: bool(browser.run(script))


@pytest.mark.skipif(CHROMIUM is None, reason="needs a Chromium or Chrome on the PATH")
@pytest.mark.slow
@pytest.mark.timeout(240)
@pytest.mark.parametrize("width", [1400, 390])
def test_in_a_browser_it_renews_itself_and_keeps_the_place(served: tuple[Path, int], width: int) -> None:
    folder, port = served
    with Chromium(width) as browser:
        browser.open(f"http://{HOST}:{port}/")
        assert browser.run("document.documentElement.scrollWidth") <= width, "nothing is cut off"
        small = json.loads(
            browser.run(
                "JSON.stringify([...document.querySelectorAll('svg text')].map(t => parseFloat(getComputedStyle(t)"
                ".fontSize) * t.ownerSVGElement.getBoundingClientRect().width"
                " / t.ownerSVGElement.viewBox.baseVal.width))"
            )
        )
        assert len(small) > 100 and min(small) > 9.5, "the words of every figure can be read"
        outside = browser.run(
            "[...document.querySelectorAll('svg text')].filter(t => {const a = t.getBoundingClientRect(),"
            " b = t.ownerSVGElement.getBoundingClientRect(); return a.left < b.left - 3 || a.right > b.right + 3})"
            ".map(t => t.textContent).join('|')"
        )
        assert outside == "", "no word leaves its panel"
        browser.run("window.scrollTo(0, 1500)")
        browser.run("window.before = document.querySelector('main')")
        time.sleep(3)
        assert browser.run("window.before === document.querySelector('main')"), "nothing new, nothing renewed"
        more(folder)
        browser.wait(eventually(browser, "document.querySelector('main').textContent.includes('step 100 of 100')"))
        assert browser.run("window.scrollY") == 1500
        assert not browser.run("document.body.classList.contains('gone')")
        assert browser.problems == []
