"""What a container or a batch job may use is read off made-up machines, whatever this one is."""

import os
import resource
from collections.abc import Iterator, Mapping
from pathlib import Path

import psutil
import pytest
import torch

from ccm.cli.parser import main
from ccm.errors import NotAvailable
from ccm.models import limits, memory
from ccm.models.limits import cores, cpu_quota, memory_left
from ccm.models.memory import GIB, check_memory, free_bytes
from ccm.reporting import report
from ccm.reporting.figures import gallery
from ccm.reporting.figures.gallery import Drawn, Entry
from tests.made_runs import make_run

MIB = 1 << 20
UNLIMITED = "9223372036854771712"  # how version 1 writes that there is no limit
V2 = "30 23 0:26 {mounted} /sys/fs/cgroup rw,nosuid shared:9 - cgroup2 cgroup2 rw,nsdelegate\n"
V1 = "3{n} 23 0:2{n} {mounted} /sys/fs/cgroup/{name} rw,nosuid shared:1{n} - cgroup cgroup rw,{name}\n"
UNIFIED = "41 31 0:37 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n"
OTHERS = "22 1 8:1 / / rw - ext4 /dev/sda1 rw\n25 22 0:5 / /proc rw - proc proc rw\n"


def machine(root: Path, groups: str, mounts: str, files: Mapping[str, str]) -> Path:
    """A folder with /proc/self and /sys/fs/cgroup as Linux shows them."""
    for name, text in {
        "proc/self/cgroup": groups,
        "proc/self/mountinfo": OTHERS + mounts,
        **{f"sys/fs/cgroup/{name}": text for name, text in files.items()},
    }.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def version_2(root: Path, files: Mapping[str, str], group: str = "/", mounted: str = "/") -> Path:
    return machine(root, f"0::{group}\n", V2.format(mounted=mounted), files)


def version_1(root: Path, files: Mapping[str, str], group: str = "/", mounted: str = "/") -> Path:
    names = ("memory", "cpu,cpuacct")
    groups = "".join(f"{9 - i}:{name}:{group}\n" for i, name in enumerate(names))
    mounts = "".join(V1.format(n=i, name=name, mounted=mounted) for i, name in enumerate(names))
    return machine(root, f"{groups}1:name=systemd:{group}\n0::/\n", mounts + UNIFIED, files)


def memory_2(limit: object, used: int, *, inactive: int = 0, active: int = 0) -> dict[str, str]:
    stat = f"anon 4096\nfile 1\ninactive_anon 999999999\ninactive_file {inactive}\nactive_file {active}"
    return {"memory.max": f"{limit}\n", "memory.current": f"{used}\n", "memory.stat": stat}


def memory_1(
    limit: object, used: int, *, inactive: int = 0, above: object = UNLIMITED
) -> dict[str, str]:
    # Without `total_` these count the group alone, without those below it.
    stat = (
        f"cache 1\ninactive_file 7\nhierarchical_memory_limit {above}\ntotal_inactive_file {inactive}\n"
    )
    return {
        "memory.limit_in_bytes": f"{limit}\n",
        "memory.usage_in_bytes": f"{used}\n",
        "memory.stat": stat,
    }


def below(folder: str, files: Mapping[str, str]) -> dict[str, str]:
    return {f"{folder}/{name}": text for name, text in files.items()}


# --- memory -------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def unlimited_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever `ulimit` says where the tests run."""
    monkeypatch.setattr(resource, "getrlimit", lambda which: (resource.RLIM_INFINITY,) * 2)


def test_version_2_in_a_container(tmp_path: Path) -> None:
    root = version_2(tmp_path, memory_2(4 * GIB, 3 * GIB, inactive=GIB, active=GIB // 2))
    assert memory_left(root) == 4 * GIB - (3 * GIB - GIB - GIB // 2)


def test_version_1_in_a_container(tmp_path: Path) -> None:
    root = version_1(tmp_path, below("memory", memory_1(4 * GIB, 3 * GIB, inactive=GIB)))
    assert memory_left(root) == 2 * GIB


@pytest.mark.parametrize("tightest", ["", "/slurm", "/slurm/job_2", "/slurm/job_2/step_0"])
@pytest.mark.parametrize("version", [1, 2])
def test_the_tightest_of_all_groups_above_counts(version: int, tightest: str, tmp_path: Path) -> None:
    """By what is left, not by the limit: others of the job have used some of it."""
    made, memory_of = (version_1, memory_1) if version == 1 else (version_2, memory_2)
    files: dict[str, str] = {}
    for group in ("", "/slurm", "/slurm/job_2", "/slurm/job_2/step_0"):
        of = memory_of(100 * GIB, 99 * GIB) if group == tightest else memory_of(50 * GIB, GIB)
        files |= below(("memory" if version == 1 else ".") + group, of)
    files |= below(("memory" if version == 1 else ".") + "/slurm/job_3", memory_of(MIB, 0))
    assert memory_left(made(tmp_path, files, "/slurm/job_2/step_0")) == GIB


@pytest.mark.parametrize("mounted", ["/docker/abc", "/docker"])
def test_a_container_that_sees_its_part_of_the_tree_only(mounted: str, tmp_path: Path) -> None:
    """Without a namespace of its own its path is the host's, but the file system begins below."""
    own = "memory" if mounted == "/docker/abc" else "memory/abc"
    root = version_1(tmp_path, below(own, memory_1(2 * GIB, GIB)), "/docker/abc", mounted)
    assert memory_left(root) == GIB


@pytest.mark.parametrize("group", ["/elsewhere/x", "/../../x", "/docker"])
def test_a_group_that_cannot_be_seen_is_that_at_the_top(group: str, tmp_path: Path) -> None:
    root = version_2(tmp_path, memory_2(2 * GIB, GIB), group, "/docker/abc")
    assert memory_left(root) == GIB


def test_limits_above_what_a_container_sees(tmp_path: Path) -> None:
    files = below("memory", memory_1(UNLIMITED, GIB, above=3 * GIB))
    assert memory_left(version_1(tmp_path, files)) == 2 * GIB


def test_memory_above_the_high_mark_is_not_planned_with(tmp_path: Path) -> None:
    """Beyond it a process is not killed but all but stopped."""
    files = {**memory_2(8 * GIB, GIB), "memory.high": f"{3 * GIB}\n"}
    assert memory_left(version_2(tmp_path / "a", files)) == 2 * GIB
    assert memory_left(version_2(tmp_path / "b", {**files, "memory.high": "max\n"})) == 7 * GIB


def test_both_versions_at_once(tmp_path: Path) -> None:
    """The memory controller is in one of them; the other's files are not there."""
    root = version_1(tmp_path, below("memory", memory_1(2 * GIB, GIB)))
    (root / "sys/fs/cgroup/unified").mkdir()
    assert memory_left(root) == GIB


def test_a_mount_point_with_a_blank(tmp_path: Path) -> None:
    mount = V2.format(mounted="/").replace("/sys/fs/cgroup", "/sys/fs/cgroup/my\\040groups")
    root = machine(tmp_path, "0::/\n", mount, below("my groups", memory_2(2 * GIB, GIB)))
    assert memory_left(root) == GIB


def test_more_used_than_allowed_is_nothing_left(tmp_path: Path) -> None:
    assert memory_left(version_2(tmp_path / "a", memory_2(GIB, 2 * GIB))) == 0
    # Pages of files are not of the same moment as the use.
    assert memory_left(version_2(tmp_path / "b", memory_2(GIB, MIB, inactive=GIB))) == GIB


UNREADABLE = {
    "nothing": {},
    "no limit": memory_2("max", GIB),
    "empty": dict.fromkeys(("memory.max", "memory.high", "cpu.max"), ""),
    "garbage": dict.fromkeys(("memory.max", "memory.high", "cpu.max"), "a\x00b -1 4G\n²\n"),
    "too long": dict.fromkeys(("memory.max", "cpu.max"), "9" * 5000),
    "no quota": {"cpu.max": "max 100000\n"},
}


@pytest.mark.parametrize("files", UNREADABLE.values(), ids=UNREADABLE)
def test_what_cannot_be_read_limits_nothing(files: dict[str, str], tmp_path: Path) -> None:
    root = version_2(tmp_path, files)
    assert (memory_left(root), cpu_quota(root)) == (None, None)
    root = version_1(tmp_path / "1", below("memory", memory_1(UNLIMITED, GIB)))
    assert (memory_left(root), cpu_quota(root)) == (None, None)


@pytest.mark.parametrize("text", [None, "", "garbage\n\x00\n: ::\n0:\n", "a b c d e - \n1 2 3 - x\n"])
@pytest.mark.parametrize("name", ["cgroup", "mountinfo"])
def test_a_machine_that_says_nothing_of_groups(name: str, text: str | None, tmp_path: Path) -> None:
    root = version_2(tmp_path, memory_2(2 * GIB, GIB))
    path = root / "proc/self" / name
    path.unlink()
    if text is not None:
        path.write_text(text)
    # Without its own group, a process is held to what is at the top.
    assert memory_left(root) == (GIB if name == "cgroup" else None)
    assert memory_left(tmp_path / "none") is None


def test_a_limit_without_its_use(tmp_path: Path) -> None:
    assert memory_left(version_2(tmp_path, {"memory.max": f"{GIB}\n"})) == GIB


@pytest.fixture
def held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """This process in a container of one and a half CPUs and 64 MiB, of which 63 are used."""
    files = {**memory_2(64 * MIB, 63 * MIB), "cpu.max": "150000 100000\n"}
    root = version_2(tmp_path / "machine", files)
    monkeypatch.setattr(limits, "ROOT", root)
    return root


@pytest.mark.usefixtures("held")
def test_the_containers_limit_is_what_is_planned_with() -> None:
    assert free_bytes(torch.device("cpu")) == MIB
    with pytest.raises(NotAvailable) as refused:
        check_memory("mine", 8 * MIB, torch.device("cpu"), torch.bfloat16)
    assert str(refused.value) == (
        "mine in bfloat16: needs 0.00781 GiB on cpu, free 0.000977 GiB. Use a higher memory limit for "
        "this container or job: the machine has enough."
    )


@pytest.mark.usefixtures("held")
def test_a_run_that_does_not_fit_its_container_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", "--model", "organism", "--out", str(tmp_path / "run")]) == 2
    assert "free 0.000977 GiB. Use --dtype bfloat16 or a higher memory" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_machine_with_less_than_the_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(limits, "ROOT", version_2(tmp_path, memory_2(1 << 50, 0)))
    monkeypatch.setattr(memory, "_machine_bytes", lambda: 5 * MIB)
    assert free_bytes(torch.device("cpu")) == 5 * MIB
    with pytest.raises(NotAvailable, match="Use a machine with more memory"):
        check_memory("mine", 8 * MIB, torch.device("cpu"), torch.bfloat16)


@pytest.mark.parametrize(("limit", "used"), [("RLIMIT_AS", "vms"), ("RLIMIT_DATA", "data")])
def test_what_ulimit_allows(
    limit: str, used: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "ROOT", tmp_path)
    now = getattr(psutil.Process().memory_info(), used)
    soft = {getattr(resource, limit): now + GIB}
    unlimited = resource.RLIM_INFINITY
    monkeypatch.setattr(resource, "getrlimit", lambda which: (soft.get(which, unlimited), unlimited))
    left = free_bytes(torch.device("cpu"))
    assert GIB - 64 * MIB < left <= GIB + 64 * MIB  # the process may have grown or shrunk since
    soft[getattr(resource, limit)] = now // 2
    assert free_bytes(torch.device("cpu")) == 0


# --- CPUs ---------------------------------------------------------------------------------------------


@pytest.fixture
def eight_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many as this process may run on."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)


@pytest.mark.usefixtures("eight_cpus")
@pytest.mark.parametrize(
    ("quota", "period", "cpus"),
    [("200000", "100000", 2), ("150000", "100000", 1), ("5000", "10000", 1), ("9000000", "100000", 8)],
)
def test_a_quota_of_cpus(quota: str, period: str, cpus: int, tmp_path: Path) -> None:
    files = {"cpu.cfs_quota_us": f"{quota}\n", "cpu.cfs_period_us": f"{period}\n"}
    first = version_1(tmp_path / "1", below("cpu,cpuacct", files))
    second = version_2(tmp_path / "2", {"cpu.max": f"{quota} {period}\n"})
    for root in (first, second):
        assert cpu_quota(root) == int(quota) / int(period)
        assert cores(root) == cpus


@pytest.mark.usefixtures("eight_cpus")
def test_no_quota_is_every_cpu_that_the_process_may_run_on(tmp_path: Path) -> None:
    unlimited = {"cpu.cfs_quota_us": "-1\n", "cpu.cfs_period_us": "100000\n"}
    assert cores(version_1(tmp_path / "1", below("cpu,cpuacct", unlimited))) == 8
    assert cores(version_2(tmp_path / "2", {"cpu.max": "max 100000\n"})) == 8
    assert cores(tmp_path / "none") == 8


def test_the_tightest_quota_counts(tmp_path: Path) -> None:
    files = {"cpu.max": "max 100000", "a/cpu.max": "300000 100000", "a/b/cpu.max": "400000 100000"}
    assert cpu_quota(version_2(tmp_path, files, "/a/b")) == 3
    assert cpu_quota(version_2(tmp_path / "half", {"cpu.max": "50000"})) == 0.5


@pytest.mark.usefixtures("eight_cpus", "held")
@pytest.mark.parametrize("command", ["figures", "report"])
def test_figures_are_drawn_by_as_many_processes(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = list[int]()

    def draw(entries: object, out: Path, processes: int) -> Iterator[Drawn]:
        asked.append(processes)
        return iter(())

    for module in (gallery, report):
        monkeypatch.setattr(module, "draw", draw)
    make_run(tmp_path / "run")
    assert main([command, str(tmp_path / "run")]) == 0
    assert asked == [1]


@pytest.mark.parametrize(("free", "processes"), [(100, 5), (3.5, 3), (1.5, 0), (0, 0)])
def test_figures_are_drawn_by_as_many_processes_as_memory_holds(
    free: float, processes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Below two, this process draws."""
    asked = [0]

    def draw(one: object, entries: object, n: int) -> Iterator[Drawn]:
        asked[0] = n
        yield from ()

    monkeypatch.setattr(gallery, "in_processes", draw)
    monkeypatch.setattr(gallery, "free_bytes", lambda device: int(free * gallery.WORKER_BYTES))
    monkeypatch.setattr(gallery, "_draw_one", lambda out, entry: entry)
    list(gallery.draw([Entry("a", "b", "c", lambda: None)] * 100, tmp_path, 8))
    assert asked == [processes]


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("two_threads", "held")
@pytest.mark.parametrize("wish", [None, "OMP_NUM_THREADS", "MKL_NUM_THREADS"])
def test_torch_computes_with_as_many_threads(
    wish: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each command asks before it computes; what the user wishes stays."""
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    if wish is not None:
        monkeypatch.setenv(wish, "2")
    none = ["--prompts", "no", "--stats", "no", "--neurons", "1", "--out", str(tmp_path / "a")]
    for command, *more in (
        ["run", "--out", str(tmp_path / "run")],
        ["prompts", "--out", str(tmp_path / "prompts")],
        ["measure"],
        ["ablate", *none],
        ["rehearse"],
    ):
        torch.set_num_threads(2)
        assert main([command, "--model", "organism", *more]) == 2, "refused before any work"
        assert torch.get_num_threads() == (1 if wish is None else 2), command
