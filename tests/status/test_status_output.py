"""python -m clip_jax status: its text, page, JSON and curves."""

import fcntl
import io
import json
import os
import pathlib
import pty
import re
import signal
import struct
import subprocess
import sys
import termios

import html_page
import made_runs
import pytest

from clip_jax.status import chart, cli, page, run, text
from clip_jax.status.look import Look, of_stream

PLAIN = Look(100, colour=False, unicode=True)


@pytest.mark.parametrize("seconds", ["often", "0", "-1", "nan", "1e9"])
def test_a_wrong_interval(seconds: str, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main([".", f"--watch={seconds}"])
    assert ended.value.code == 2
    assert f"--watch: '{seconds}' is not a number of seconds" in capsys.readouterr().err


def write_three(folder: pathlib.Path) -> list[str]:
    made_runs.weekend(folder / "b32")
    made_runs.touch_lease(folder / "b32", 9005)
    for name, step, code in ("lr2", 9000, 42), ("l14", 20_000, 0):
        made_runs.write_start(
            folder / name, 1, (0, 8000), (0, step), {"train": 6000.0}, (code, "So it ended.")
        )
        made_runs.write_rows(folder / name, range(20, step + 1, 20), offset=0.4)
    return [str(folder / name) for name in ("b32", "lr2", "l14")]


def test_several(tmp_path):
    found = [run.look(name, made_runs.at(9010)) for name in write_three(tmp_path)]
    found.append(run.look(str(tmp_path / "nothing")))
    told = text.several(found, PLAIN)
    lines = [" ".join(line.split()) for line in told.replace("\xa0", " ").splitlines()]
    head = "run state step done loss score images/s MFU goodput left"
    assert lines[0] == head
    assert lines[1] == "a b32 running 12,000 60.0 % 1.233 36.4 % 3210 41.2 % 60.3 % 1h 05m"
    assert lines[2].startswith("b lr2 stopped 9,000 45.0 %")
    assert lines[3].startswith("c l14 finished 20,000 100.0 %")
    assert lines[4] == "nothing unreadable"
    assert "So it ended." in told
    assert all(len(line) <= 100 for line in told.splitlines())
    assert sum("a" in line and "b" in line and "│" in line for line in lines) >= 3  # overlaid


def test_names_leave_room_for_figures(tmp_path):
    """A long name shows its end; one that holds the word of a state is not taken for it."""
    found = []
    for name in "running", "sweep/" + "x" * 80 + "-0001":
        made_runs.write_start(tmp_path / name, 1, (0, 100), (0, 7000), {"train": 90.0}, (42, ""))
        found.append(run.look(str(tmp_path / name), made_runs.at(9010)))
    for how in Look(60, True, True), Look(100, False, False):
        lines = text.several(found, how).splitlines()
        cells = re.sub(r"\x1b\[[0-9;]*m", "", lines[1]).split()
        assert cells[:4] == ["running", "stopped", "7,000", "35.0"]
        assert "x-0001" in lines[2]
        assert "7,000" in lines[2]
    (painted,) = re.findall(r"\x1b\[33m(\w+)", text.several(found, Look(60, True, True)))[:1]
    assert painted == "stopped"


def test_page(tmp_path):
    found = [run.look(name, made_runs.at(9010)) for name in write_three(tmp_path)]
    page.write(tmp_path / "one.html", found[:1])
    one = html_page.check((tmp_path / "one.html").read_text())
    rows = one.rows("run-1")
    assert ["training", "1h 30m", "60.3 %", ""] in rows
    assert rows[-3][4:] == ["8,000", "2,000", "killed, or its host is gone"]
    page.write(tmp_path / "all.html", found)
    several = html_page.check((tmp_path / "all.html").read_text())
    assert [row[0] for row in several.rows("runs")] == ["b32", "lr2", "l14"]
    labels = [svg["attrs"].get("aria-label", "") for svg in several.find("svg")]
    assert sum("b32/train/loss" in label and "l14/train/loss" in label for label in labels) == 1
    legend = several.find("figcaption")[0]["text"].split()
    assert legend == ["b32", "1.233", "lr2", "1.96", "l14", "1.666"]


def test_json_and_exit_codes(tmp_path, capsys):
    names = write_three(tmp_path)
    for chosen, code in ((names[2:], 0), (names[1:], 1), ([*names[1:], "nothing"], 2)):
        with pytest.raises(SystemExit) as ended:
            cli.main([*chosen, "--json"])
        assert ended.value.code == code
        found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        assert [one["workdir"] for one in found] == chosen
    assert found[0]["state"] == "stopped"
    assert found[0]["starts"][0]["exit_code"] == 42
    assert found[0]["goodput"] == pytest.approx(6000 / 8000)
    assert found[1]["metrics"]["train/loss"] == pytest.approx(made_runs.loss(20_000) + 0.4)


def test_command_line(tmp_path):
    """Answers soon, without JAX; a reader that has seen enough is no error."""
    name = write_three(tmp_path)[2]
    code = "import sys; from clip_jax.status import cli; cli._exit_code = lambda found: "
    code += (
        "bool({'jax', 'matplotlib', 'orbax', 'flax'} & set(sys.modules)); cli.main(sys.argv[1:])"
    )
    subprocess.run([sys.executable, "-c", code, name], check=True, stdout=subprocess.DEVNULL)
    command = f"{sys.executable} -m clip_jax status {name} --watch=0.1 | head -3"
    piped = subprocess.run(command, shell=True, capture_output=True, text=True, check=True)
    assert (piped.stdout.splitlines()[2].split()[0], piped.stderr) == (name, "")
    ascii_only = subprocess.run(
        [sys.executable, "-m", "clip_jax", "status", name],
        env={**os.environ, "PYTHONIOENCODING": "ascii", "COLUMNS": "70"},
        capture_output=True, check=True,
    )  # fmt: skip
    told = ascii_only.stdout.decode("ascii")
    assert "* FINISHED" in told
    assert all(len(line) <= 70 for line in told.splitlines() if name not in line)


def test_watch(tmp_path):
    """Shows what has come, until Ctrl-C."""
    name = write_three(tmp_path)[2]
    process = subprocess.Popen(
        [sys.executable, "-m", "clip_jax", "status", name, "--watch=0.2"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    assert any("FINISHED" in line for line in process.stdout)
    made_runs.write_start(
        tmp_path / "l14", 2, (8100, 8200), (20_000, 20_000), {}, (42, "Storage failed.")
    )
    assert any("Storage failed." in line for line in process.stdout)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=90)
    assert process.returncode == 130
    assert "Traceback" not in errors


def test_a_terminal_is_filled_and_not_overfilled(tmp_path):
    """On a terminal of 20 lines and 72 columns --watch shows the head of the page, in colour."""
    name = write_three(tmp_path)[2]
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 20, 72, 0, 0))
    environment = {**os.environ, "TERM": "xterm", "PYTHONIOENCODING": "utf-8"}
    environment = {k: v for k, v in environment.items() if k not in ("NO_COLOR", "COLUMNS")}
    command = [sys.executable, "-m", "clip_jax", "status", name, "--watch=60"]
    process = subprocess.Popen(command, stdout=theirs, stderr=theirs, env=environment)
    shown = b""
    while b"Where" not in shown and shown.count(b"\n") < 18:
        shown += os.read(ours, 65536)
    process.send_signal(signal.SIGINT)
    process.wait()
    os.close(theirs)
    os.close(ours)
    assert b"\x1b[32m" in shown
    lines = re.sub(r"\x1b\[[0-9;]*[mJH]", "", shown.decode(errors="ignore")).splitlines()
    assert len(lines) <= 20
    assert all(len(line) <= 72 for line in lines if name not in line)
    assert any("FINISHED" in line for line in lines)


def test_no_terminal_is_plain():
    assert of_stream(io.StringIO(), {}) == Look(100, colour=False, unicode=False)
    assert of_stream(io.StringIO(), {"COLUMNS": "30"}).width == 60
    assert of_stream(io.StringIO(), {"COLUMNS": "9" * 5000}).width == 400


# ---- Curves ------------------------------------------------------------------------------------


def test_a_line_is_drawn_where_its_values_are():
    """A rising straight line in braille dots: decoded, each dot is where arithmetic puts it."""
    lines = chart.draw(
        [{step: step / 1000 for step in range(0, 1001, 10)}], Look(30, False, True), 10
    )
    margin = lines[0].index("┤") + 1
    width = len(lines[10]) - margin
    plot = [line[margin:] for line in lines[:10]]
    dots = set()
    for y, line in enumerate(plot):
        for x, character in enumerate(line):
            code = ord(character) - 0x2800 if character != " " else 0
            for bit, (dy, dx) in enumerate(
                [(0, 0), (1, 0), (2, 0), (0, 1), (1, 1), (2, 1), (3, 0), (3, 1)]
            ):
                if code >> bit & 1:
                    dots.add((2 * x + dx, 4 * y + dy))
    assert {x for x, _ in dots} == set(range(2 * width))
    for x, y in dots:
        assert abs(y - 39 * (1 - x / (2 * width - 1))) <= 1.5


def test_axes_name_the_range():
    lines = chart.draw([{0: 2.0, 500: 8.0}], Look(60, colour=False, unicode=False), 5)
    assert lines[0].startswith("8 |")
    assert lines[4].startswith("2 |")
    assert lines[-1].split() == ["0", "step", "500"]
    assert all(len(line) <= 60 for line in lines)
