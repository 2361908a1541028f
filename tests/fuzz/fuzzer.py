"""Damaged and hostile files for every reader of files; see test_fuzz.py.

    PYTHONPATH=.:tests/support python tests/fuzz/fuzzer.py --cases=5000 --seed=1
    PYTHONPATH=.:tests/support python tests/fuzz/fuzzer.py --only=tar --seed=1 --first=812 --cases=1

Each case copies the sound files of a target, damages one of them, and reads them all. A finding is
any error other than the package's own, a warning, a case that takes too long or too much memory,
or a file written beside the case's folder. The cases of a seed are always the same. They run in a
process of their own, which is started again after the case that crashed it.
"""

import argparse
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
import warnings

import numpy as np
from targets import TARGETS

SECONDS = 20  # of CPU
MEBIBYTES = 800


# ---- Damage ------------------------------------------------------------------------------------


def damage(data: bytes, rng: np.random.Generator, others: list[bytes]) -> bytes:
    """Damages the contents of a file, once to three times."""
    for _ in range(rng.integers(1, 4)):
        data = _WAYS[rng.integers(len(_WAYS))](data, rng, others)
    return data


def _place(data: bytes, rng: np.random.Generator) -> int:
    """Draws a byte; often among the first or last, where headers are."""
    size = max(1, len(data))
    near = int(rng.integers(min(size, 512)))
    return [near, size - 1 - near, int(rng.integers(size))][rng.integers(3)]


def _flip(data: bytes, rng: np.random.Generator, others: list[bytes]) -> bytes:
    found = bytearray(data)
    for _ in range(rng.integers(1, 9)):
        if found:
            found[_place(data, rng)] ^= 1 << int(rng.integers(8))
    return bytes(found)


def _cut(data: bytes, rng: np.random.Generator, others: list[bytes]) -> bytes:
    return data[: _place(data, rng)]


def _remove(data: bytes, rng: np.random.Generator, others: list[bytes]) -> bytes:
    place = _place(data, rng)
    return data[:place] + data[place + int(rng.integers(1, 600)) :]


def _repeat(data: bytes, rng: np.random.Generator, others: list[bytes]) -> bytes:
    first, end = sorted(_place(data, rng) for _ in range(2))
    return data[:end] + data[first:end] * int(rng.integers(1, 5)) + data[end:]


def _splice(data: bytes, rng: np.random.Generator, others: list[bytes]) -> bytes:
    other = others[rng.integers(len(others))]
    return data[: _place(data, rng)] + other[_place(other, rng) :]


def _number(data: bytes, rng: np.random.Generator, others: list[bytes]) -> bytes:
    """Writes an extreme number over some bytes, as a length field may have."""
    size = int(rng.choice([1, 2, 4, 8]))
    value = int(rng.choice([0, 1, 2**7, 2**15, 2**31 - 1, 2**31, 2**32 - 1, 2**62]))
    order = "little" if rng.random() < 0.5 else "big"
    place = _place(data, rng)
    new = (value % 2 ** (8 * size)).to_bytes(size, order)
    return data[:place] + new + data[place + size :]


_TEXTS = [b"\0", b"\xff\xfe", b"\xe2\x80\xa8", b"../../x", b"-1", b"1e999", b"NaN", b"null", b"[]"]
_TEXTS += [b"{}", b'"', b"[" * 3000, b"9" * 400, b"\n", b",", b"true", b"0.5", b"99999999999999"]


def _text(data: bytes, rng: np.random.Generator, others: list[bytes]) -> bytes:
    """Puts an odd text in place of a number or word, or somewhere."""
    new = _TEXTS[rng.integers(len(_TEXTS))]
    place = _place(data, rng)
    end = place
    while end < len(data) and data[end : end + 1].isalnum():
        end += 1
    return data[:place] + new + data[end:]


def _value(data: bytes, rng: np.random.Generator, others: list[bytes]) -> bytes:
    """Replaces a value of a JSON file."""
    try:
        record = json.loads(data)
    except (ValueError, RecursionError):
        return _text(data, rng, others)
    values = [None, -1, 0, 1.5, 2**63, "", "x", [], {}, True, [[1]], "../../x", "a" * 5000]
    at = record
    while isinstance(at, (dict, list)) and at:
        place = int(rng.integers(len(at)))
        key = list(at)[place] if isinstance(at, dict) else place
        if not isinstance(at[key], (dict, list)) or not at[key] or rng.random() < 0.3:
            if isinstance(at, dict) and rng.random() < 0.3:
                del at[key]
            else:
                at[key] = values[rng.integers(len(values))]
            break
        at = at[key]
    return json.dumps(record).encode()


_WAYS = [_flip, _cut, _remove, _repeat, _splice, _number, _text, _value]


# ---- Cases -------------------------------------------------------------------------------------


def _peak() -> int:
    status = pathlib.Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) // 1024


def run_case(name: str, seeds: pathlib.Path, seed: int, number: int, where: pathlib.Path) -> str:
    """Runs a case; returns what was found, "" for nothing."""
    from clip_jax.errors import UserError

    target = TARGETS[name]
    rng = np.random.default_rng([seed, number, len(name)])
    folder = where / "case"
    shutil.copytree(seeds, folder)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    chosen = files[rng.integers(len(files))]
    stat = chosen.stat()
    chosen.write_bytes(damage(chosen.read_bytes(), rng, [path.read_bytes() for path in files[:20]]))
    os.utime(chosen, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    pathlib.Path("/proc/self/clear_refs").write_text("5")
    memory, begun, problems = _peak(), time.process_time(), []
    with warnings.catch_warnings(record=True) as warned:
        warnings.filterwarnings("always", module=r"clip_jax|numpy")
        try:
            target.read(folder)
        except UserError as error:
            if not str(error).strip():
                problems.append("an error without a text")
        except BaseException:
            problems.append(traceback.format_exc())
    problems += [f"warning: {each.message}" for each in warned[:3]]
    if (seconds := time.process_time() - begun) > SECONDS:
        problems.append(f"{seconds:.0f} s")
    if (grown := _peak() - memory) > MEBIBYTES:
        problems.append(f"{grown} MiB")
    if beside := [path.name for path in where.iterdir() if path.name != "case"]:
        problems.append(f"written beside the folder: {beside}")
    shutil.rmtree(folder)
    return "\n".join([f"{chosen.relative_to(folder)}:", *problems]) if problems else ""


def run(names: list[str], seed: int, first: int, cases: int) -> int:
    """Runs cases in turn over the targets; prints each number before, and the findings."""
    import logging

    logging.disable()
    findings = 0
    with tempfile.TemporaryDirectory() as directory:
        root = pathlib.Path(directory)
        for name in names:
            (root / "seeds" / name).mkdir(parents=True)
            TARGETS[name].make(root / "seeds" / name)
        for number in range(first, first + cases):
            name = names[number % len(names)]
            print(f"case {number} {name}", flush=True)
            where = root / "cases" / str(number)
            where.mkdir(parents=True)
            if found := run_case(name, root / "seeds" / name, seed, number, where):
                findings += 1
                print(f"FOUND by case {number} ({name}): {found}", flush=True)
            shutil.rmtree(where)
    return findings


def supervise(names: list[str], seed: int, first: int, cases: int) -> list[str]:
    """Runs cases in another process, again after each crash; returns the findings."""
    findings, end = [], first + cases
    while first < end:
        command = [sys.executable, __file__, "--inside", f"--seed={seed}", f"--first={first}"]
        command += [f"--cases={end - first}", "--only", *names]
        ran = subprocess.run(command, capture_output=True, text=True, errors="replace")
        parts = ("\n" + ran.stdout).split("\ncase ")
        findings += [part.partition("\n")[2] for part in parts if "FOUND by" in part]
        if ran.returncode == 0:
            break
        if len(parts) < 2:
            raise RuntimeError(f"No case began:\n{ran.stdout}{ran.stderr}")
        crashed = parts[-1].split("\n")[0]
        findings.append(f"FOUND by case {crashed}: exit {ran.returncode}\n{ran.stderr[-2000:]}")
        first = int(crashed.split()[0]) + 1
    return findings


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--only", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    arguments = options.only, options.seed, options.first, options.cases
    if options.inside:
        run(*arguments)
        return
    findings = supervise(*arguments)
    print("\n\n".join(findings))
    print(f"{options.cases} cases of seed {options.seed}: {len(findings)} findings")
    sys.exit(bool(findings))


if __name__ == "__main__":
    main()
