"""Preprocessing by several ranks: the serial run's bytes, after any kill too, and words for what goes wrong."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from data_helpers import ROOT, hashes, run_tool, sources, write_jsonl

BYTES = ("--tokenizer-type", "ByteLevelTokenizer", "--append-eod")
LAUNCHER = re.compile(r"SLURM_|PMI_|OMPI_|MV2_|MPI_LOCAL|RANK$|WORLD_SIZE$")


def start(ranks, *arguments, launcher="mpi", job=1, only=None):
    """The ranks (or ``only`` these of them) as their launcher would start them: by its variables."""
    clean = {name: value for name, value in os.environ.items() if not LAUNCHER.match(name)} | {"OMP_NUM_THREADS": "1"}
    names = ("PMI_RANK", "PMI_SIZE") if launcher == "mpi" else ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS")
    step = {"SLURM_STEP_ID": "0", "SLURM_JOB_ID": str(job)} if launcher == "slurm" else {}
    command = [sys.executable, str(ROOT / "tools/preprocess_data.py"), *map(str, arguments)]
    return [
        subprocess.Popen(
            command, env=clean | step | {names[0]: str(rank), names[1]: str(ranks)} if ranks > 1 else clean,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
        )
        for rank in (range(ranks) if only is None else only)
    ]  # fmt: skip


def outcome(processes, timeout=60):
    """[(exit code, output)] of all ranks."""
    try:
        told = [process.communicate(timeout=timeout)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, text) for process, text in zip(processes, told)]


def flags(folder, prefix="p", *more, part_mb=0.02):
    return ["--input", folder / "[ab].jsonl*", *BYTES, "--output-prefix", folder / prefix, "--part-mb", part_mb, *more]


def corpus(folder, copies=1):
    """Two files with bad lines here and there; one is compressed. The serial run's hashes and quarantine."""
    import gzip

    texts = sources(30) * copies
    lines = (folder / "a.jsonl", write_jsonl(folder / "a.jsonl", texts).read_text().splitlines())[1]
    for at in (2, len(lines) // 2, len(lines)):
        lines.insert(at, "{broken")
    (folder / "a.jsonl").write_text("\n".join(lines))
    (folder / "b.jsonl.gz").write_bytes(gzip.compress((folder / "a.jsonl").read_bytes()[:-30], 1))
    done = run_tool("preprocess_data.py", *flags(folder, "serial", "--on-bad-line", "quarantine", part_mb=100))
    assert done.returncode == 0, done.stderr
    quarantine = Path(f"{folder}/serial_quarantine.jsonl").read_text()
    expected = [index + 1 for index, line in enumerate(lines) if line == "{broken"]
    entries = [json.loads(line) for line in quarantine.splitlines()]
    assert [entry["line"] for entry in entries if entry["file"].endswith("a.jsonl")] == expected
    return hashes(f"{folder}/serial_text_document"), quarantine


@pytest.mark.parametrize(("launcher", "ranks", "workers"), [("mpi", 2, 2), ("slurm", 3, 1)])
def test_same_files_for_any_number_of_ranks(tmp_path, launcher, ranks, workers):
    whole, quarantine = corpus(tmp_path)
    more = ("--on-bad-line", "quarantine", "--workers", workers, "--log-interval", 1)
    ended = outcome(start(ranks, *flags(tmp_path, "p", *more), launcher=launcher))
    assert [code for code, _ in ended] == [0] * ranks, ended
    assert hashes(tmp_path / "p_text_document") == whole
    assert (tmp_path / "p_quarantine.jsonl").read_text() == quarantine
    assert f"{len(quarantine.splitlines())} bad lines" in ended[0][1] and "rank 1: " in ended[1][1]
    assert not (tmp_path / "p.parts").exists()


@pytest.mark.slow
def test_by_mpirun(tmp_path):
    mpirun = Path(sys.executable).parent / "mpirun"
    if not mpirun.exists():
        pytest.skip("mpirun is not installed")
    whole, _ = corpus(tmp_path)
    tool = [sys.executable, str(ROOT / "tools/preprocess_data.py")]
    command = [str(mpirun), "-n", "2", *tool, *map(str, flags(tmp_path, "p", "--on-bad-line", "quarantine"))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert hashes(tmp_path / "p_text_document") == whole


def test_a_bad_line_in_a_range_is_named_by_its_line(tmp_path):
    texts = sources(20)
    path = write_jsonl(tmp_path / "a.jsonl", texts)
    path.write_text(path.read_text() + "{broken\n")
    ended = outcome(start(2, *flags(tmp_path)))
    assert f"{path}:21: invalid JSON" in ended[1][1] and "Traceback" not in ended[1][1]
    assert re.search(rf"error: rank 1 \(pid \d+ on .*\) failed: {path}:21: invalid JSON", ended[0][1]), ended
    assert [code for code, _ in ended] == [1, 1] and not (tmp_path / "p_text_document.idx").exists()
    # what is finished serves the call that leaves bad lines out, but not as if there had been none
    done = run_tool("preprocess_data.py", *flags(tmp_path, "p", "--on-bad-line", "quarantine", "--workers", 2))
    assert done.returncode == 0 and "parts of an earlier call: going on" in done.stderr and "1 bad lines" in done.stdout


def interrupted(folder, *more):
    """A job of which some parts are finished and one is not; its directory."""
    victims = start(1, *flags(folder, "p", "--workers", 2, *more))
    wait_for_parts(folder, 3, victims)
    victims[0].send_signal(signal.SIGTERM)
    ((code, _),) = outcome(victims)
    assert code == 143 and (folder / "p.parts").is_dir()
    return folder / "p.parts"


def records(folder):
    return len(list(folder.glob("p.parts/0*[0-9].json")))


def wait_until(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def wait_for_parts(folder, count, processes):
    deadline = time.monotonic() + 60
    while records(folder) < count:
        assert time.monotonic() < deadline and any(process.poll() is None for process in processes)
        time.sleep(0.002)


@pytest.mark.slow
def test_changes_since_the_interrupted_call_are_refused(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", sources(40))
    parts = interrupted(tmp_path)
    null = ("--tokenizer-type", "NullTokenizer", "--vocab-size", "300")
    refused = {
        null: "--tokenizer-type was ByteLevelTokenizer and is NullTokenizer now",
        ("--json-keys", "title"): "--json-keys was text and is title now",
        ("--part-mb", "0.5"): "--part-mb was 0.0",
        ("--input", tmp_path / "../x.jsonl"): "--input names",
    }  # fmt: skip
    write_jsonl(tmp_path / "../x.jsonl", ["x"])
    for changed, words in refused.items():
        done = run_tool("preprocess_data.py", *flags(tmp_path, "p", *changed))
        assert done.returncode == 2 and words in done.stderr and str(parts) in done.stderr, done.stderr
    size = path.stat().st_size
    path.write_text(path.read_text() + "\n")
    done = run_tool("preprocess_data.py", *flags(tmp_path))
    assert done.returncode == 2
    assert f"{path} has changed: it had {size} bytes" in done.stderr and f"has {size + 1} of" in done.stderr
    shutil.rmtree(parts)
    assert run_tool("preprocess_data.py", *flags(tmp_path)).returncode == 0


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["bytes of tokens", "size", "record", "count in the record"])
def test_a_finished_part_that_is_damaged_is_made_again(tmp_path, damage):
    write_jsonl(tmp_path / "a.jsonl", sources(40))
    parts = interrupted(tmp_path)
    assert run_tool("preprocess_data.py", *flags(tmp_path, "whole")).returncode == 0
    number = int(sorted(parts.glob("0*[0-9].json"))[0].stem)
    record = parts / f"{number:06d}.json"
    tokens = record.with_suffix(".0.bin")
    data = bytearray(tokens.read_bytes())
    if damage == "bytes of tokens":
        data[len(data) // 2] ^= 1
        tokens.write_bytes(data)
    elif damage == "size":
        tokens.write_bytes(data[:-2])
    else:
        text = record.read_text()
        record.write_text(text[:-20] if damage == "record" else text.replace('"empty": 0', '"empty": 1'))
    done = run_tool("preprocess_data.py", *flags(tmp_path))
    assert done.returncode == 0, done.stderr
    found = f"part {number} " in done.stderr and "is damaged: it is made again" in done.stderr
    assert found == (damage == "bytes of tokens"), "the others are found before the work begins"
    assert hashes(tmp_path / "p_text_document") == hashes(tmp_path / "whole_text_document")


def test_a_dead_rank_ends_the_job_with_its_parts_named(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", sources(40) * 2)
    ranks = start(2, *flags(tmp_path))
    wait_for_parts(tmp_path, 2, ranks)
    ranks[1].kill()
    (code, told), _ = outcome(ranks)
    assert code == 1 and "Traceback" not in told
    assert re.search(
        rf"error: rank 1 \(pid {ranks[1].pid} on .*\) is gone; \d+ of its \d+ parts are missing: part ", told
    )
    ended = outcome(start(3, *flags(tmp_path, "p")))
    assert [code for code, _ in ended] == [0, 0, 0], ended
    assert "parts of an earlier call: going on with the others" in ended[0][1]


@pytest.mark.slow
def test_ranks_that_do_not_come_and_ranks_that_differ(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", sources(10))
    several = [*flags(tmp_path), "--rank-timeout", "1.5"]
    alone = start(2, *several)
    alone[1].kill()
    assert "error: rank 1 of 2 did not come to " in outcome(alone)[0][1]
    alone = start(2, *several)
    alone[0].kill()
    assert "error: rank 1 of 2 has waited 1.5 s for rank 0 in " in outcome(alone)[1][1]
    ranks = [*start(2, *flags(tmp_path)), *start(2, *flags(tmp_path, "p", "--max-line-mb", 1))]
    ranks[1].kill(), ranks[2].kill()
    (_, first), _, _, (code, second) = outcome(ranks)
    assert code == 2 and "rank 1 was started with other options than rank 0" in second
    assert re.search(r"rank 1 \(.*\) failed: rank 1 was started with other options", first)


def test_a_second_job_is_refused_and_does_not_disturb_the_first(tmp_path):
    """Also while rank 0 of the first waits for its rank 1: those of the second neither come in its place nor wait."""
    write_jsonl(tmp_path / "a.jsonl", sources(10))
    (leader,) = start(2, *flags(tmp_path), launcher="slurm", only=[0])
    wait_until(lambda: (tmp_path / "p.parts/call.json").exists())
    began = time.monotonic()
    (code, told), (other, heard) = outcome(start(2, *flags(tmp_path), launcher="slurm", job=2))
    assert code == 2 and "is being written by another process" in told
    assert other == 1 and "error: rank 0 failed: --output-prefix" in heard and time.monotonic() < began + 30
    ended = outcome([leader, *start(2, *flags(tmp_path), launcher="slurm", only=[1])])
    assert [code for code, _ in ended] == [0, 0] and not (tmp_path / "p.parts").exists(), ended


def test_a_rank_0_that_dies_before_it_shares_the_work_is_missed_at_once(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", sources(10))
    ranks = start(3, *flags(tmp_path), launcher="slurm", only=[0, 1])
    wait_until(lambda: (tmp_path / "p.parts/answer-1.json").exists())
    ranks[0].kill()
    _, (code, told) = outcome(ranks, timeout=30)
    assert code == 1 and re.search(rf"error: rank 0 \(pid {ranks[0].pid} on .*\) is gone", told), told


def test_bad_lines_that_another_rank_leaves_out_still_fail(tmp_path):
    texts = sources(20)
    path = write_jsonl(tmp_path / "a.jsonl", texts)
    path.write_text(path.read_text() + "{broken\n")
    other_flags = flags(tmp_path, "p", "--on-bad-line", "quarantine")
    (code, told), (other, _) = outcome(start(2, *flags(tmp_path), only=[0]) + start(2, *other_flags, only=[1]))
    assert (code, other) == (1, 0) and f"{path}:21: invalid JSON" in told, told
    assert not (tmp_path / "p_text_document.idx").exists()


@pytest.mark.slow
def test_a_signal_to_all_processes_is_no_death_of_a_worker(tmp_path):
    """SLURM signals workers, too; one of them may be gone before the rank has its own signal."""
    write_jsonl(tmp_path / "a.jsonl", sources(40) * 3)
    for signals, expected in ((2, 143), (1, 1)):
        (rank,) = job = start(1, *flags(tmp_path, "p", "--workers", 2))
        wait_for_parts(tmp_path, records(tmp_path) + 1, job)
        os.kill(next(pid for pid in processes_of(job) if pid != rank.pid), signal.SIGTERM)
        if signals == 2:
            time.sleep(0.3)
            rank.terminate()
        ((code, told),) = outcome(job)
        assert code == expected, told
    assert "error: a worker process was terminated" in told


def test_a_mistake_that_rank_0_finds_ends_all_ranks(tmp_path):
    began = time.monotonic()
    ended = outcome(start(2, *flags(tmp_path)))
    assert [code for code, _ in ended] == [2, 1] and time.monotonic() < began + 30
    assert "names no file" in ended[0][1] and "error: rank 0 failed: --input" in ended[1][1]
    assert list(tmp_path.iterdir()) == []


def processes_of(ranks):
    """Ranks and their workers that run."""
    pids = {process.pid for process in ranks if process.poll() is None}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            words = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(words[1]) in pids and words[0] != "Z":
            pids.add(int(stat.parent.name))
    return sorted(pids)


def killed_until_it_is_whole(folder, generator, kills):
    """Kill one process of the job at a random moment, ``kills`` times, and go on with other ranks and workers."""
    whole, quarantine = corpus(folder, copies=3)
    hit = 0
    # A rank that is killed before it answers is only missed by the time limit.
    several = flags(folder, "p", "--on-bad-line", "quarantine", "--rank-timeout", 10)
    for ranks, workers in [(2, 2), *((generator.randint(1, 3), generator.randint(1, 3)) for _ in range(kills - 1))]:
        job = start(ranks, *several, "--workers", workers)
        wanted = records(folder) + generator.randint(0, 30)
        while records(folder) < wanted and any(process.poll() is None for process in job):
            time.sleep(0.002)
        time.sleep(0.1 * generator.random())
        running = processes_of(job)
        if running:
            os.kill(generator.choice(running), signal.SIGKILL)
            hit += 1
        outcome(job)  # the others end by themselves
        if (folder / "p_text_document.idx").exists():  # what is visible is whole, whenever the kill came
            assert hashes(folder / "p_text_document")[:2] == whole[:2]
    ended = outcome(start(2, *several, "--rank-timeout", 300, "--workers", 2))
    assert [code for code, _ in ended] == [0, 0], ended
    assert hashes(folder / "p_text_document") == whole
    assert (folder / "p_quarantine.jsonl").read_text() == quarantine
    assert not (folder / "p.parts").exists()
    return hit


@pytest.mark.slow
def test_killed_at_random_and_continued(tmp_path):
    assert killed_until_it_is_whole(tmp_path, random.Random(0), kills=3)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 21))
def test_killed_at_random_in_twenty_jobs(tmp_path, seed):
    assert killed_until_it_is_whole(tmp_path, random.Random(seed), kills=2)
