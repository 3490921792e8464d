"""The wheel, the checkout and the files around them, used the way that users use them."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import stat
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement

from equimoe.launch.conclusion import command_to_continue
from equimoe.launch.env import FINAL, STOPPED, Process
from tests import side_by_side
from tests.helpers.fresh import python

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("moe", "kernels", "launch")

IMPORT = """
import equimoe.moe, equimoe.kernels, equimoe.launch, equimoe.moe.train.config, equimoe.launch.options
import importlib.util, sys
for module in (equimoe.moe, equimoe.kernels, equimoe.launch):
    print(module.__file__)
print(getattr(equimoe, "__file__", None))
"""


def pip(*arguments: object) -> None:
    command = [sys.executable, "-m", "pip", *map(str, arguments), "--no-deps", "--no-index", "-q"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel of a copy of the sources, so that nothing is written into the checkout."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in (*FOLDERS, "tests", "benchmarks"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "results"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in", "equimoe.py"):
        shutil.copy(ROOT / name, source)
    pip("wheel", "--no-build-isolation", "-w", out, source)
    (built,) = out.glob("equimoe-*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("site")
    pip("install", "--target", target, wheel)
    return target


@pytest.fixture(scope="module")
def imported(installed: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """What IMPORT prints where only the wheel is installed, then the version that it has and that it is listed with."""
    version = "import importlib.metadata as m\nprint(equimoe.moe.__version__, m.version('equimoe'), sep='\\n')"
    return python(IMPORT + version, tmp_path_factory.mktemp("anywhere"), installed)


@pytest.mark.slow
def test_the_wheel_holds_the_three_folders_and_nothing_else(wheel: Path) -> None:
    assert wheel.name.endswith("-py3-none-any.whl")
    names = zipfile.ZipFile(wheel).namelist()
    ours = {name for name in names if ".dist-info/" not in name}
    expected = {
        f"equimoe/{path.relative_to(ROOT).as_posix()}" for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")
    }
    data = {"equimoe/launch/slurm/train.sbatch", "equimoe/launch/k8s/train.yaml", "equimoe/kernels/auto.json"}
    typed = {f"equimoe/{folder}/py.typed" for folder in FOLDERS}
    assert ours == expected | data | typed


@pytest.mark.slow
def test_the_version_is_said_once(imported: list[str]) -> None:
    ours, installed_as = imported[-2:]
    assert ours == installed_as
    assert f"## {ours} " in (ROOT / "CHANGELOG.md").read_text()


def test_no_link_is_tracked() -> None:
    """A link named .venv once replaced the folder of that name in every checkout."""
    listed = subprocess.run(["git", "ls-files", "--stage"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("needs a git checkout")
    assert [line for line in listed.stdout.splitlines() if line.startswith("120000")] == []


@pytest.mark.slow
def test_the_source_distribution_holds_all_that_is_tracked(tmp_path: Path) -> None:
    """Tests, documents and benchmarks too, so that whoever has only the archive can run ``make test``."""
    if not (ROOT / ".git").exists() or shutil.which("git") is None:  # `git` alone would find a repository around ROOT
        pytest.skip("needs a git checkout: an unpacked archive has no list of its files to compare with")
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
    source = tmp_path / "source"
    for name in tracked.stdout.splitlines():
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, source / name)
    command = [sys.executable, "-m", "build", "--sdist", "--no-isolation", "-o", str(tmp_path), str(source)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (archive,) = tmp_path.glob("equimoe-*.tar.gz")
    with tarfile.open(archive) as tar:
        inside = {member.name.partition("/")[2] for member in tar.getmembers() if member.isfile()}
    expected = {path.relative_to(source).as_posix() for path in source.rglob("*") if path.is_file()}
    assert expected - inside == set()


@pytest.mark.slow
def test_the_wheel_imports_from_anywhere(installed: Path, imported: list[str]) -> None:
    *files, namespace = imported[:-2]
    assert files == [str(installed / "equimoe" / folder / "__init__.py") for folder in FOLDERS]
    assert namespace == "None", "equimoe must stay a namespace package"


@pytest.mark.slow
def test_other_packages_keep_the_names_of_our_folders(installed: Path, tmp_path: Path) -> None:
    names = (*FOLDERS, "transformers")
    for name in names:
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("theirs = True\n")
    assert not any((installed / name).exists() for name in names)
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n" + "".join(
        f"import {name}; assert {name}.theirs\n" for name in names
    )
    files = python(code + IMPORT, tmp_path, installed)[:3]
    assert all(file.startswith(str(installed)) for file in files)


def test_a_checkout_imports_from_anywhere_without_installation(tmp_path: Path) -> None:
    *files, namespace = python(IMPORT, tmp_path, ROOT)
    assert files == [str(ROOT / folder / "__init__.py") for folder in FOLDERS]
    assert namespace == str(ROOT / "equimoe.py")


EDITABLE = """
import importlib.metadata as m, json
found = list(m.distributions(name="equimoe"))
origin = json.loads(found[0].read_text("direct_url.json") or "{}") if found else {}
if origin.get("dir_info", {}).get("editable"):
    import equimoe.moe
    print(origin["url"], equimoe.moe.__file__, sep="\\n")
"""


@pytest.mark.slow
def test_an_editable_installation_uses_the_files_of_the_checkout(tmp_path: Path) -> None:
    found = python(EDITABLE, tmp_path)
    if ROOT.as_uri() not in found:
        pytest.skip("this checkout is not installed as editable in this environment (`pip install -e .`)")
    assert found[1] == str(ROOT / "moe" / "__init__.py")


def test_every_dependency_has_a_pin_for_every_python() -> None:
    text = (ROOT / "constraints.txt").read_text()
    assert "//" not in text, "a pin must not name where it comes from"
    pins = [Requirement(line) for line in text.splitlines() if line and not line.startswith("#")]
    assert all(len(pin.specifier) == 1 and str(pin.specifier).startswith("==") for pin in pins)
    source = (
        "import setuptools\nsetuptools.setup = lambda **k: print(*k['install_requires'], *k['extras_require']['dev'],"
    )
    code = (
        f"{source} sep='\\n')\nexec(compile(open('setup.py').read(), 'setup.py', 'exec'), {{'__file__': 'setup.py'}})"
    )
    wanted = [Requirement(line) for line in python(code, ROOT)]
    assert len(wanted) > 10
    for version in ("3.10", "3.11", "3.12", "3.13"):
        here = {"python_version": version, "sys_platform": "linux"}
        for need in wanted:
            found = [
                p for p in pins if p.name.lower() == need.name.lower() and (not p.marker or p.marker.evaluate(here))
            ]
            assert len(found) == 1, f"{need.name} has {len(found)} pins for Python {version}"
            assert need.specifier.contains(str(found[0].specifier)[2:]), f"{found[0]} is not {need}"


def test_the_slurm_script_is_valid_bash() -> None:
    script = ROOT / "launch" / "slurm" / "train.sbatch"
    subprocess.run(["bash", "-n", script], check=True)
    head = [line for line in script.read_text().splitlines() if line.startswith("#SBATCH")]
    assert any("--nodes" in line for line in head) and any("--requeue" in line for line in head)


STAND_INS = {
    "scontrol": 'case "$1 $2" in requeue*) echo "scontrol $*" ;; *job) echo "  Command=/home/me/train.sbatch -x" ;; '
    "*) echo node-a; echo node-b ;; esac",
    "srun": 'echo "$1 $2"; shift 2; exec "$@"',
    "torchrun": 'echo "threads $OMP_NUM_THREADS"; echo "again $EQUIMOE_COMMAND"; echo torchrun "$@"; '
    'if [ -n "$ENDS_WITH" ]; then echo "$ENDS_WITH" > "$EQUIMOE_EXIT_FILE"; exit 1; fi',
}


def command_of(script: list[str], tmp_path: Path, **env: str) -> str:
    """What a cluster script runs on its first node: torchrun's options, then the worker's command line."""
    tools = tmp_path / "tools"
    tools.mkdir(exist_ok=True)
    for name, text in STAND_INS.items():
        (tools / name).write_text(f"#!/bin/sh\n{text}\n")
        (tools / name).chmod(stat.S_IRWXU)
    everything = os.environ | {"PATH": f"{tools}:{os.environ['PATH']}", "ENDS_WITH": ""} | env
    done = subprocess.run(["bash", *script], env=everything, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == int(env.get("ENDS_WITH", 0)), done.stderr
    return done.stdout.strip()


def slurm_job(tmp_path: Path, *options: str, **env: str) -> list[str]:
    """Return the lines that the job prints."""
    job = {"SLURM_JOB_ID": "77", "SLURM_JOB_NODELIST": "node-[a-b]", "SLURM_JOB_NUM_NODES": "2"} | env
    script = [str(ROOT / "launch" / "slurm" / "train.sbatch"), "--steps", "7", *options]
    return command_of(script, tmp_path, RUN_DIR=str(tmp_path / "a run"), SLURM_GPUS_ON_NODE="8", **job).splitlines()


def test_the_slurm_script_meets_on_the_first_node(tmp_path: Path) -> None:
    *_, first = slurm_job(tmp_path)
    for part in ("--nnodes 2", "--nproc-per-node 8", "--rdzv-backend c10d", "--rdzv-endpoint node-a:", "--rdzv-id 77"):
        assert part in first, first
    assert first.endswith(f"-m equimoe.launch.train --run-dir {tmp_path / 'a run'} --requeue --steps 7")


@pytest.mark.parametrize(
    ("given", "cores", "threads"),
    [
        ({"SLURM_CPUS_PER_TASK": "64"}, 64, 8),
        ({"SLURM_CPUS_ON_NODE": "96"}, 96, 12),
        ({"SLURM_CPUS_PER_TASK": "4"}, 4, 1),
        ({"SLURM_CPUS_PER_TASK": "8", "PROCESSES": "2"}, 8, 4),
    ],
)
def test_the_ranks_of_a_node_share_its_cores(tmp_path: Path, given: dict[str, str], cores: int, threads: int) -> None:
    without = {"OMP_NUM_THREADS": ""}
    srun, found, *_ = slurm_job(tmp_path, **without, **given)
    assert srun == f"--kill-on-bad-exit=1 --cpus-per-task={cores}" and found == f"threads {threads}"


@pytest.mark.parametrize("job", ["1", "11999", "12000", "999999999"])
def test_the_slurm_script_uses_no_port_of_outgoing_connections(tmp_path: Path, job: str) -> None:
    *_, first = slurm_job(tmp_path, SLURM_JOB_ID=job)
    assert 20000 <= int(re.search(r"node-a:(\d+)", first)[1]) < 32768


def test_the_jobs_of_an_array_have_folders_and_options_of_their_own(tmp_path: Path) -> None:
    _, _, again, last = slurm_job(tmp_path, "--seed", "%a", SLURM_ARRAY_TASK_ID="3")
    assert last.endswith(f"--run-dir {tmp_path / 'a run' / '3'} --requeue --steps 7 --seed 3")
    words = shlex.split(again)
    assert words[1] == f"RUN_DIR={tmp_path / 'a run'}" and words[2:5] == ["sbatch", "--array", "3"]


def test_the_last_lines_of_a_slurm_job_say_how_to_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    again = slurm_job(tmp_path, "--data.path", "my texts")[2].removeprefix("again ")
    monkeypatch.setenv("EQUIMOE_COMMAND", again)
    words = shlex.split(command_to_continue(["--steps", "7"], Process(world=16, local_world=8), 14))
    folder, options = f"RUN_DIR={tmp_path / 'a run'}", ["--steps", "7", "--data.path", "my texts", "--steps", "14"]
    assert words == [folder, "sbatch", "--nodes", "2", "/home/me/train.sbatch", *options]


@pytest.mark.parametrize(
    ("code", "env", "requeued"),
    [
        ("", {}, False),
        ("64", {}, False),
        ("70", {}, False),
        ("75", {}, True),
        ("1", {}, True),
        ("1", {"SLURM_RESTART_COUNT": "5"}, False),
        ("143", {}, False),  # scancel
        ("143", {"SLURM_JOB_END_TIME": "1"}, True),  # near the time limit
        ("143", {"SLURM_JOB_END_TIME": "1", "SLURM_RESTART_COUNT": "99"}, True),
        ("143", {"SLURM_JOB_END_TIME": "99999999999"}, False),
    ],
)
def test_the_slurm_script_requeues_what_may_succeed(
    tmp_path: Path, code: str, env: dict[str, str], requeued: bool
) -> None:
    ended = {"ENDS_WITH": code} if code else {}
    assert ("scontrol requeue 77" in slurm_job(tmp_path, **ended, **env)) == requeued


def pod_gpus(container: dict[str, Any]) -> int:
    return int(container["resources"]["limits"]["nvidia.com/gpu"])


def test_the_kubernetes_job_is_consistent(tmp_path: Path) -> None:
    text = (ROOT / "launch" / "k8s" / "train.yaml").read_text()
    service, job = yaml.safe_load_all(text)
    assert (service["kind"], job["kind"]) == ("Service", "Job")
    assert service["spec"]["clusterIP"] == "None"
    spec, pod = job["spec"], job["spec"]["template"]["spec"]
    assert spec["completionMode"] == "Indexed" and spec["completions"] == spec["parallelism"] > 1
    assert pod["subdomain"] == service["metadata"]["name"]
    assert service["spec"]["selector"].items() <= spec["template"]["metadata"]["labels"].items()
    (container,) = pod["containers"]
    env = {entry["name"]: entry.get("value") for entry in container["env"]}
    assert int(env["NNODES"]) == spec["completions"]
    assert spec["backoffLimitPerIndex"] > 3 and spec["maxFailedIndexes"] == 0 and "backoffLimit" not in spec
    assert env["RDZV_HOST"] == f"{job['metadata']['name']}-0.{service['metadata']['name']}"
    run_dir = tmp_path / "run"

    def command(index: str = "0", *options: str, **more: str) -> list[str]:
        given = {name: str(value) for name, value in env.items()} | {"RUN_DIR": str(run_dir), "CORES": "64"}
        script = ["-c", *container["command"][2:], *container["args"], *options]
        return command_of(script, tmp_path, **given, **more, JOB_COMPLETION_INDEX=index).splitlines()

    threads, _, started = command()
    assert threads == "threads 8"
    assert f"--nnodes 2 --nproc-per-node {pod_gpus(container)} " in started
    assert "--rdzv-backend c10d --rdzv-endpoint equimoe-train-0.equimoe:29400" in started
    assert "is_host=true" in command("0")[-1] and "is_host=false" in command("1")[-1]
    ends = f"equimoe.launch.train --run-dir {run_dir} --requeue {' '.join(container['args'])}"
    assert started.endswith(ends)
    assert command("0", ENDS_WITH="64")[-1].endswith(ends)
    # each word is an argument, whatever it contains
    (tmp_path / "tools" / "torchrun").write_text('#!/bin/sh\nfor word in "$@"; do echo "$word"; done\n')
    found = subprocess.run(
        ["bash", "-c", *container["command"][2:], "--data.path", "my texts"],
        env=os.environ
        | {"PATH": f"{tmp_path / 'tools'}:{os.environ['PATH']}", "JOB_COMPLETION_INDEX": "0"}
        | {"CORES": "4", "NNODES": "1", "NPROC_PER_NODE": "8", "RDZV_HOST": "here", "RUN_DIR": "/runs/a b"},
        capture_output=True,
        text=True,
    ).stdout.splitlines()
    assert found[-5:] == ["--run-dir", "/runs/a b", "--requeue", "--data.path", "my texts"]
    mistakes, evictions = spec["podFailurePolicy"]["rules"]
    assert pod["restartPolicy"] == "Never" and evictions["action"] == "Ignore" and mistakes["action"] == "FailJob"
    assert set(mistakes["onExitCodes"]["values"]) == {code for code in FINAL if code not in STOPPED}
    assert {mount["mountPath"] for mount in container["volumeMounts"]} >= {"/runs"} and env["RUN_DIR"].startswith(
        "/runs"
    )


def test_the_kubernetes_pods_fit_the_restricted_security_level() -> None:
    """The rules of https://kubernetes.io/docs/concepts/security/pod-security-standards/."""
    _, job = yaml.safe_load_all((ROOT / "launch" / "k8s" / "train.yaml").read_text())
    pod = job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert not {"hostNetwork", "hostPID", "hostIPC"} & pod.keys()
    assert all(volume.keys() & {"persistentVolumeClaim", "emptyDir"} for volume in pod["volumes"])
    assert pod["securityContext"]["runAsNonRoot"] is True and pod["securityContext"]["runAsUser"] > 0
    assert pod["securityContext"]["seccompProfile"]["type"] == "RuntimeDefault"
    own = container["securityContext"]
    assert own["allowPrivilegeEscalation"] is False and own["capabilities"] == {"drop": ["ALL"]}
    assert "privileged" not in own and "hostPort" not in str(container)
    assert container["resources"]["requests"].keys() == {"cpu", "memory"}
    assert int(container["resources"]["requests"]["cpu"]) >= pod_gpus(container)


def clean_of_make() -> dict[str, str]:
    """The environment without what an outer ``make`` or its caller has set."""
    env = {key: value for key, value in os.environ.items() if not key.startswith(("MAKE", "MFLAGS"))}
    for name in ("ARGS", "RUN_DIR", "NPROC", "PYTHON", "TORCH", "PIP_ARGS"):
        env.pop(name, None)
    return env


@pytest.fixture
def make(tmp_path: Path):
    """``make`` in a copy of the build files whose set-up counts as done; returns (exit code, output)."""
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    for name in ("Makefile", "setup.py", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    os.symlink("/bin/echo", tmp_path / ".venv" / "bin" / "python")  # shows what would run
    for stamp in ("train", "dev", "bench", "engines"):
        (tmp_path / ".venv" / f".stamp-{stamp}").touch()

    def run(*arguments: str) -> tuple[int, str]:
        done = subprocess.run(["make", *arguments], cwd=tmp_path, env=clean_of_make(), capture_output=True, text=True)
        return done.returncode, done.stdout + done.stderr

    return run


def test_make_train_runs_the_quickstart(make) -> None:
    code, output = make("train", "ARGS=--steps 5")
    assert code == 0
    command = "-m equimoe.launch.train --processes 2 --recipe quickstart --run-dir runs/quickstart --steps 5"
    assert command in output


def test_make_train_says_what_to_do_with_a_run_that_exists(make, tmp_path: Path) -> None:
    (tmp_path / "runs" / "quickstart" / "checkpoints").mkdir(parents=True)
    code, output = make("train")
    assert code != 0 and "ARGS=--resume" in output and "RUN_DIR=" in output and "equimoe.launch.train" not in output
    assert make("train", "ARGS=--steps 9 --resume")[0] == 0
    assert make("train", "RUN_DIR=runs/second")[0] == 0


def test_make_train_takes_paths_with_spaces_and_other_letters(make, tmp_path: Path) -> None:
    code, output = make("train", "RUN_DIR=my runs/\u00e9", "ARGS=--data.path 'my data/\u4e2d' --steps 3")
    assert code == 0 and "--run-dir my runs/\u00e9 --data.path my data/\u4e2d --steps 3\n" in output
    # tokens that an interrupted start has left are not a run
    (tmp_path / "my runs" / "\u00e9" / "tokens").mkdir(parents=True)
    assert make("train", "RUN_DIR=my runs/\u00e9")[0] == 0
    (tmp_path / "my runs" / "\u00e9" / "metrics.jsonl").touch()
    code, output = make("train", "RUN_DIR=my runs/\u00e9", "ARGS=--data.path 'my data'")
    assert code != 0 and "my runs/\u00e9 already holds a run" in output
    assert make("train", "RUN_DIR=my runs/\u00e9", "ARGS=--data.path 'my data' --resume")[0] == 0


def test_make_runs_fast_and_slow_tests_apart(make) -> None:
    fast, slow = "not slow and not engines and not faults", "slow and not faults"
    assert f"\n-m pytest -m {fast} -k routing\n" in make("test", "ARGS=-k routing")[1]
    assert f"\n-m pytest -m {slow} -k routing\n" in make("test-slow", "ARGS=-k routing")[1]
    assert f"\ntests/side_by_side.py -m {fast}\n" in make("test")[1]
    assert "\ntests/engines/run.py -k zero\n" in make("engines", "ARGS=-k zero")[1]
    assert "\ntests/faults/run.py -k save\n" in make("faults", "ARGS=-k save")[1]
    assert "\ntests/faults/defences.py -k 13\n" in make("defences", "ARGS=-k 13")[1]
    assert f"\ntests/side_by_side.py -m {slow}\n" in make("test-slow")[1]


def test_the_processes_run_every_test_once(tmp_path: Path) -> None:
    paths = [tmp_path / path for paths in side_by_side.TESTS.values() for path in paths]
    files = [path if path.suffix else path / f"test_{i}.py" for i, path in enumerate(paths)]
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("def test_it(): pass\n")
    shutil.copy(ROOT / "tests" / "side_by_side.py", tmp_path / "tests")
    env = os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    command = [sys.executable, "tests/side_by_side.py", "-q"]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    lines = done.stdout.splitlines()
    expected = [f"{len(paths)} passed" for paths in side_by_side.TESTS.values()]
    assert [line.split(" in ")[0] for line in lines if " in " in line] == expected
    assert done.returncode == 0 and lines[-len(expected) :] == [f"{name}: passed" for name in side_by_side.TESTS]


@pytest.mark.parametrize(
    ("failing", "place"), [("pytest tests/parallel/test_parity.py", 0), ("pytest tests --ignore", -1)]
)
def test_any_process_can_fail_the_suite(
    failing: str, place: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\ncase "$*" in *"{failing}"*) exit 3 ;; esac\n')
    python.chmod(stat.S_IRWXU)
    monkeypatch.setattr(sys, "executable", str(python))
    assert side_by_side.main(["-q"]) == 3
    verdicts = [line.split(": ")[1] for line in capsys.readouterr().out.splitlines()]
    assert verdicts.pop(place) == "FAILED with exit code 3" and set(verdicts) == {"passed"}


KINDS = {
    "nothing": None,
    "-m not slow and not engines": "test",
    "-m slow": "test-slow",
    "tests/engines/run.py": "engines",
    "tests/faults/run.py": "faults",
    "ruff": "check",
    "mypy": "check",
}


@pytest.mark.parametrize("failing", KINDS)
def test_a_change_passes_if_all_kinds_of_tests_and_the_checks_do(make, tmp_path: Path, failing: str) -> None:
    python = tmp_path / ".venv" / "bin" / "python"
    python.unlink()
    python.write_text(f'#!/bin/sh\ncase " $* " in *" {failing} "*) exit 1 ;; esac\n')
    python.chmod(stat.S_IRWXU)
    (tmp_path / ".ci").mkdir()
    shutil.copy(ROOT / ".ci" / "run", tmp_path / ".ci")
    done = subprocess.run(["bash", tmp_path / ".ci" / "run"], env=clean_of_make(), capture_output=True, text=True)
    lines, failed = done.stdout.splitlines()[-5:], KINDS[failing]
    assert [line.split()[1] for line in lines] == ["test", "test-slow", "engines", "faults", "check"]
    assert [line.split()[1] for line in lines if "FAILED" in line] == ([failed] if failed else []), done.stdout
    assert (done.returncode == 0) == (failed is None)


def test_make_refuses_a_python_that_is_too_old(make, tmp_path: Path) -> None:
    shutil.rmtree(tmp_path / ".venv")
    old = tmp_path / "python3.9"
    old.write_text('#!/bin/sh\n[ "$1" = --version ] && echo Python 3.9.1 && exit 0\nexit 1\n')
    old.chmod(stat.S_IRWXU)
    code, output = make("test", f"PYTHON={old}")
    assert code != 0 and "Python 3.9.1" in output and "3.10 to 3.13" in output
    assert not (tmp_path / ".venv").exists()
