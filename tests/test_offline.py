"""No test asks the network: not by itself, and not by what it starts."""

import os
import re
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.reproduction.test_options import run_pytest

ROOT = Path(__file__).parent.parent
ASK = "import urllib.request; urllib.request.urlopen('https://example.org', timeout=5)"


@pytest.mark.parametrize(
    "ask",
    [
        lambda: socket.socket(),
        lambda: socket.create_connection(("192.0.2.1", 80), timeout=1),
        lambda: socket.getaddrinfo("example.org", 443),
    ],
    ids=["a socket", "a connection", "a name"],
)
def test_a_test_gets_none(ask: Callable[[], object]) -> None:
    # Blocking warns, too, and warnings are errors here.
    with pytest.raises((UserWarning, RuntimeError), match=r"^A test tried to use socket\."):
        ask()


def test_pipes_within_the_machine_work() -> None:
    a, b = socket.socketpair(socket.AF_UNIX)
    with a, b:
        a.sendall(b"here")
        assert b.recv(4) == b"here"


def test_a_command_that_a_test_starts_is_refused_at_once() -> None:
    done = subprocess.run(
        [sys.executable, "-c", ASK], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 1
    assert "Connection refused" in done.stderr, done.stderr
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        assert os.environ[name] == os.environ[name.lower()] == "http://127.0.0.1:9"
    assert os.environ["NO_PROXY"] == os.environ["no_proxy"] == ""


def test_the_hub_is_offline() -> None:
    from huggingface_hub import constants

    assert os.environ["HF_HUB_OFFLINE"] == "1"
    assert constants.HF_HUB_OFFLINE is True


def test_the_network_has_to_be_asked_for(tmp_path: Path) -> None:
    """By an option, and by what needs it: no test of the suite enables sockets for itself."""
    for folder in ("tests", "reproduction"):
        for path in (ROOT / folder).rglob("*.py"):
            # The fixture, the mark; not the option, which is told what it is in a test of the header.
            found = re.findall(r"\benable_socket\b|socket_enabled|allow_hosts", path.read_text("utf-8"))
            assert path == Path(__file__) or not found, f"{path}: {found}"
    (tmp_path / "test_it.py").write_text(
        "import os, socket\n"
        "def test_it():\n"
        "    print('proxy:', os.environ['HTTPS_PROXY'])\n"
        "    with socket.socket(): pass\n"
    )
    given = ["-s", "-c", str(ROOT / "pyproject.toml"), "conftest.py", str(tmp_path)]
    done = run_pytest(*given, "--force-enable-socket", HTTPS_PROXY="http://own")
    assert "1 passed" in done.stdout, done.stdout + done.stderr
    assert "proxy: http://own\n" in done.stdout, "told to use the network, and cut off from it"
