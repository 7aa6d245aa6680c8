"""What users and administrators rely on, on a real Slurm: each kind of job, each kind of failure."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import records
from rms_cluster import rms_cluster
from throwaway import Cluster

from rms.simulated import SimulatedDevice

pytestmark = pytest.mark.slurm

SHOW = 'echo "$SLURM_LOCALID ${CUDA_VISIBLE_DEVICES-unset} ${NVIDIA_VISIBLE_DEVICES-unset}"'


@pytest.fixture(scope="module")
def slurm(slurm_root: Path) -> Iterator[Cluster]:
    """One node with two GPUs, so that a test can fill it. Credentials live 5 s, the least that Slurm takes."""
    options = "LaunchParameters=use_interactive_step\n"
    options += f"HealthCheckProgram={slurm_root}/etc/healthcheck\nHealthCheckInterval=3600"
    with rms_cluster(slurm_root, nodes=1, create=0.02, destroy=0.02, settings="interactive_wait_seconds = 8",
                     cred_expire=5, extra_conf=options) as cluster:  # fmt: skip
        yield cluster


@pytest.fixture(autouse=True)
def healthy(slurm: Cluster) -> Iterator[None]:
    """After each test the node is idle, not drained, and RMS has given everything back."""
    yield
    slurm.cancel_all()
    slurm.wait(lambda: not slurm.queue(), 60, "every job is over")
    node = slurm.node_states()["n1"]
    assert node.state in ("idle", "planned") and node.reason == ""
    assert busy(slurm) == []


def busy(slurm: Cluster) -> list[str]:
    """The runs that hold something, as `rms show` says."""
    return [
        f"{a['job']}.{a['restart']}" for a in json.loads(slurm.run(*rms(slurm), "show", "--json").stdout)["allocations"]
    ]


def rms(slurm: Cluster) -> list[str]:
    program = Path(sys.executable).with_name("rms")
    return ["env", f"RMS_CONFIG={slurm.etc}/rms.toml", "SLURMD_NODENAME=n1", str(program)]


def output(slurm: Cluster, job: int | str, user: int = 0) -> str:
    return (slurm.users[user].work / f"slurm-{job}.out").read_text()


def log(slurm: Cluster) -> str:
    path = slurm.root / "n1" / "hooks.log"
    return path.read_text() if path.exists() else ""


def fill(slurm: Cluster) -> str:
    """A job of the second user that runs, until it is cancelled, and leaves one place for a 3g, and slices for two."""
    job = str(slurm.sbatch("sleep 300", "--gres=mig:2g:4", user=slurm.users[1]))
    slurm.wait(lambda: f"job {job}.0: granted" in log(slurm), 60, "it runs")
    return job


def test_batch_job_sees_exactly_its_instances(slurm: Cluster) -> None:
    job = slurm.sbatch(SHOW, "--gres=mig:3g.40gb:1,mig:1g.10gb:2", user=slurm.users[0])
    slurm.wait_all(120)
    _, cuda, nvidia = output(slurm, job).split()
    assert cuda == nvidia
    uuids = cuda.split(",")
    journal = records.journal(slurm.root / "n1" / "gpus.json.journal")
    made = {e["uuid"]: e["profile"] for e in journal if e["op"] == "create_compute_instance" and e["code"] == 0}
    assert [made[uuid] for uuid in uuids] == ["3g.40gb", "1g.10gb", "1g.10gb"]
    assert not (slurm.root / "n1" / "run" / "jobs" / str(job)).exists()


def test_no_other_user_can_open_an_instance(slurm: Cluster) -> None:
    nodes, now = slurm.root / "n1" / "nodes", slurm.root / "now"
    look = f"for node in {nodes}/*; do (: <$node) 2>&1; done"
    requests = ["--gres=mig:3g.40gb:1,mig:1g:1", "--gres=mig:1g:2"]
    jobs = [
        slurm.sbatch(f"while [ ! -e {now} ]; do sleep 0.1; done; {look}", request, user=user)
        for request, user in zip(requests, slurm.users, strict=True)
    ]
    slurm.wait(lambda: all(f"job {job}.0: granted" in log(slurm) for job in jobs), 60, "both have what they asked for")
    own = {job: set(slurm_paths(slurm, nodes, job)) for job in jobs}
    everything = {str(path) for path in nodes.iterdir()}
    now.touch()
    slurm.wait_all(60)
    for number, job in enumerate(jobs):
        said = dict(line.split(": ")[-2:] for line in output(slurm, job, number).splitlines())
        # There is no driver behind the nodes: for whom they are, that is what is found.
        opened = {text.removeprefix("cannot open ") for text, why in said.items() if why == "No such device or address"}
        refused = {text.removeprefix("cannot open ") for text, why in said.items() if why == "Permission denied"}
        assert (opened, refused) == (own[job], everything - own[job])
        assert len(opened) == 4
    for user in slurm.users:
        assert (
            slurm.run("sh", "-c", look, user=user, check=False).stdout.count("Permission denied")
            == len(everything)
            >= 8
        )


def slurm_paths(slurm: Cluster, nodes: Path, job: int) -> list[str]:
    """The device nodes of what a job has."""
    uuids = (slurm.root / "n1" / "run" / "jobs" / str(job)).read_text().splitlines()[1:]
    boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    gpus = SimulatedDevice(str(slurm.root / "n1/gpus.json"), "A100-80GB", 2, [0, 1], boot_id, nodes=str(nodes))
    there = [(gpu, i) for gpu in gpus.gpus() for i in gpus.instances(gpu) if i.uuid in uuids]
    return [capability.node for gpu, i in there for capability in gpus.capabilities(gpu, i.gi, i.ci)]


def test_the_hooks_ignore_the_environment_of_the_user(slurm: Cluster) -> None:
    """Whatever would make a program or an interpreter run the user's code leaves a file there, of whom it ran as."""
    trap = slurm.root / "trap"
    trap.mkdir()
    trap.chmod(0o777)
    (trap / "preload.c").write_text(
        "#include <fcntl.h>\n#include <stdio.h>\n#include <unistd.h>\n"
        "__attribute__((constructor)) static void ran(void) {\n"
        f'    char path[4096];\n    snprintf(path, sizeof path, "{trap}/preload.%d", geteuid());\n'
        "    close(open(path, O_CREAT | O_WRONLY, 0644));\n}\n"
    )
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", trap / "preload.so", trap / "preload.c"], check=True)
    program = f'#!/bin/sh\n: >{trap}/"${{0##*/}}.$(/usr/bin/id -u)"\n'
    for name in ("python", "python3", "logger", "timeout", "squeue", "scontrol", "mkdir", "rm", "env"):
        (trap / name).write_text(program)
        (trap / name).chmod(0o755)
    for name in ("sitecustomize", "usercustomize", "controller", "rms", "slurm"):
        (trap / f"{name}.py").write_text(f"import os\nopen('{trap}/{name}.' + str(os.geteuid()), 'w')\n")
    (trap / "startup").write_text(program)
    names = ["PYTHONPATH", "PYTHONHOME", "PYTHONUSERBASE", "LD_LIBRARY_PATH", "HOME", "TMPDIR", "CDPATH"]
    files = ["PYTHONSTARTUP", "ENV", "BASH_ENV", "RMS_CONFIG", "SLURM_CONF"]
    settings = [f"LD_PRELOAD={trap}/preload.so", f"PATH={trap}:/usr/bin:/bin"]
    settings += [f"{name}={trap}" for name in names] + [f"{name}={trap}/startup" for name in files]
    script = "#!/bin/sh\nlogger\necho $RMS_CONFIG $CUDA_VISIBLE_DEVICES\n"
    options = ("--gres=mig:3g", f"--export=ALL,{','.join(settings)}")
    job = slurm.sbatch(script, *options, user=slurm.users[0])
    slurm.wait_all(60)
    assert f"{trap}/startup MIG-" in output(slurm, job), "the job had it, and its instance"
    ran = {path.name for path in trap.iterdir()}
    user = slurm.users[0].uid
    assert {f"preload.{user}", f"logger.{user}"} <= ran, "the traps work"
    assert not [name for name in ran if name.endswith(".0")], "and root stepped into none"


def test_job_without_mig_is_left_alone(slurm: Cluster) -> None:
    job = slurm.sbatch(SHOW, user=slurm.users[0], env={"CUDA_VISIBLE_DEVICES": "0,1"})
    slurm.wait_all(120)
    assert output(slurm, job).split() == ["0", "0,1", "unset"]
    assert f"job {job}" not in log(slurm)


def test_tasks_share_out_the_instances(slurm: Cluster) -> None:
    script = f"""#!/bin/sh
    echo "batch $CUDA_VISIBLE_DEVICES"
    srun --overlap -n4 sh -c '{SHOW}' | sort
    srun --overlap -n1 sh -c '{SHOW}'
    RMS_INSTANCES=1 srun --overlap -n1 sh -c '{SHOW}'
    RMS_INSTANCES=1,0 srun --overlap -n2 sh -c '{SHOW}' | sort
    RMS_INSTANCES=2 srun --overlap -n1 sh -c '{SHOW}'
    RMS_INSTANCES='0;id' srun --overlap -n1 sh -c '{SHOW}'
    """
    job = slurm.sbatch(script, "--gres=mig:1g:2", "--ntasks=4", user=slurm.users[0])
    slurm.wait_all(120)
    lines = [line.split() for line in output(slurm, job).splitlines()]
    a, b = lines[0][1].split(",")
    assert [line[1] for line in lines[1:5]] == [a, b, a, b]
    assert lines[5][1] == f"{a},{b}"
    assert lines[6][1] == b
    assert [line[1] for line in lines[7:9]] == [b, a]
    assert output(slurm, job).count("RMS_INSTANCES: the job has 2 instance(s), counted from 0") == 2
    assert "uid=" not in output(slurm, job)


def test_parallel_steps_share_or_split(slurm: Cluster) -> None:
    # Each step ends only once the other one has begun.
    meet = f": >$0.$1; while [ ! -e $0.$2 ]; do sleep 0.1; done; {SHOW}"
    script = f"""#!/bin/sh
    step() {{ srun --exact -n1 "$@" & }}
    RMS_INSTANCES=0 step --gres=mig:1g.10gb:1 sh -c '{meet}' split 0 1
    RMS_INSTANCES=1 step --gres=mig:1g.10gb:1 sh -c '{meet}' split 1 0
    wait
    step --overlap sh -c '{meet}' share 0 1
    step --overlap sh -c '{meet}' share 1 0
    wait
    """
    job = slurm.sbatch(script, "--gres=mig:1g:2", "--ntasks=2", user=slurm.users[0])
    slurm.wait_all(120)
    one, other, *shared = [line.split()[1] for line in output(slurm, job).splitlines()]
    assert one != other and "," not in one
    assert [set(seen.split(",")) for seen in shared] == [{one, other}] * 2


def test_srun_and_salloc(slurm: Cluster) -> None:
    done = slurm.run("srun", "--gres=mig:2g.20gb:1", "sh", "-c", SHOW, user=slurm.users[0])
    assert done.stdout.split()[1].startswith("MIG-")
    inside = f"{SHOW}; srun --overlap sh -c '{SHOW}'"
    done = slurm.run("salloc", "--gres=mig:2g", "sh", "-c", inside, user=slurm.users[0])
    # The command of salloc runs where it was typed, as its shell does without the interactive step; a step in it has
    # the instance.
    shell, step = (line.split()[1] for line in done.stdout.splitlines())
    assert shell == "unset" and step.startswith("MIG-")


def test_srun_pty(slurm: Cluster) -> None:
    command = "srun --gres=mig:2g.20gb:1 --pty sh -c 'echo pty=$CUDA_VISIBLE_DEVICES'"
    done = slurm.run("script", "-qec", command, "/dev/null", user=slurm.users[0])
    assert "pty=MIG-" in done.stdout


def test_interactive_step_of_salloc(slurm: Cluster) -> None:
    shell = slurm.popen("script", "-qec", "salloc --gres=mig:2g", "/dev/null", user=slurm.users[0])
    out, _ = shell.communicate("echo shell=$CUDA_VISIBLE_DEVICES; exit\n", timeout=60)
    assert "shell=MIG-" in out


def test_array_tasks_have_an_instance_each(slurm: Cluster) -> None:
    array = slurm.sbatch(SHOW, "--gres=mig:1g", "--array=1-3", user=slurm.users[0])
    slurm.wait_all(120)
    assert len({output(slurm, f"{array}_{task}").split()[1] for task in (1, 2, 3)}) == 3


def test_no_room_requeues_and_the_script_runs_once(slurm: Cluster) -> None:
    """Each kind, all in one go, since it takes a credential's life until they are back. Of an array only the task that
    is refused goes back."""
    filler = fill(slurm)
    kinds = [("--array=0-2%1",), (), ("--requeue",), ("--no-requeue",), ("--array=0",)]
    jobs = [slurm.sbatch(f"{SHOW}; echo ran", "--gres=mig:3g:2", *kind, user=slurm.users[0]) for kind in kinds]
    said = "no room for 3g.40gb:2 now; requeued"
    slurm.wait(lambda: all(f"job {job}.0: {said}" in log(slurm) for job in jobs[1:]), 120, "each was refused")
    for job, kind in zip(jobs[1:], kinds[1:], strict=True):
        slurm.wait(lambda job=job: slurm.job(job)["JobState"] == "PENDING", 60, "back in the queue")  # type: ignore[misc]
        assert slurm.job(job)["Requeue"] == ("0" if "--no-requeue" in kind else "1")
    slurm.run("scancel", filler)
    slurm.wait_all(120)
    tasks = [f"{jobs[0]}_{task}" for task in range(3)]
    for name in [*tasks, *jobs[1:4], f"{jobs[4]}_0"]:
        assert slurm.states()[str(name)] == "COMPLETED"
        assert output(slurm, name).count("ran") == 1 and "MIG-" in output(slurm, name)
    assert sum(int(slurm.job(task)["Restarts"]) for task in tasks) >= 1


def test_srun_waits_for_room_and_gets_it(slurm: Cluster) -> None:
    filler = fill(slurm)
    client = slurm.popen("srun", "--gres=mig:3g.40gb:2", "sh", "-c", SHOW, user=slurm.users[0])
    slurm.wait(lambda: len(slurm.queue()) == 2, 60, "it is there")
    time.sleep(1)
    slurm.run("scancel", filler)
    out, _ = client.communicate(timeout=60)
    assert out.split()[1].startswith("MIG-")


def test_srun_without_room_is_told_and_cancelled(slurm: Cluster) -> None:
    fill(slurm)
    done = slurm.run("srun", "--gres=mig:3g.40gb:2", "echo", "ran", user=slurm.users[0], timeout=90, check=False)
    assert done.returncode != 0 and "ran" not in done.stdout
    assert "no room for 3g.40gb:2" in done.stderr and "sbatch" in done.stderr


def test_a_waiting_prolog_ends_when_its_job_is_cancelled(slurm: Cluster) -> None:
    fill(slurm)
    before = len(log(slurm))
    client = slurm.popen("srun", "--gres=mig:3g.40gb:2", "echo", "ran", user=slurm.users[0])
    slurm.wait(
        lambda: any(line.split()[1] == "RUNNING" and "games" not in line for line in slurm.queue()), 60, "it waits"
    )
    time.sleep(1.5)
    client.send_signal(signal.SIGINT)
    time.sleep(0.3)
    client.send_signal(signal.SIGINT)
    slurm.wait(lambda: "the job is gone" in log(slurm)[before:], 60, "its Prolog has seen it")
    client.communicate(timeout=60)


def test_requeue_by_hand_gives_everything_back(slurm: Cluster) -> None:
    job = slurm.sbatch("echo run $SLURM_RESTART_COUNT; [ -n \"$SLURM_RESTART_COUNT\" ] || sleep 30", "--gres=mig:3g",
                       user=slurm.users[0])  # fmt: skip
    slurm.wait(lambda: f"job {job}.0: granted" in log(slurm), 60, "granted")
    slurm.run("scontrol", "requeue", str(job), user=slurm.users[0])
    slurm.wait(lambda: f"released run {job}.0" in log(slurm), 60, "released")
    slurm.wait_all(120)
    assert slurm.job(job)["JobState"] == "COMPLETED"
    assert f"job {job}.1: granted" in log(slurm)


def test_no_prolog_no_script(slurm: Cluster) -> None:
    """F1: Slurm 22.05 may start a requeued job without a Prolog. The TaskProlog sends it back; here it is told to."""
    jobs = slurm.root / "n1" / "run" / "jobs"
    for left in ("refused 0\n", ""):
        job = slurm.sbatch("echo begun; sleep 300", "--gres=mig:1g", user=slurm.users[0])
        out = slurm.users[0].work / f"slurm-{job}.out"
        slurm.wait(lambda out=out: out.exists() and "begun" in out.read_text(), 60, "the script runs")
        # What a start without Prolog would find, for the next step of the job.
        (jobs / str(job)).write_text(left) if left else (jobs / str(job)).unlink()
        step = slurm.run("srun", f"--jobid={job}", "--overlap", "echo", "step ran", user=slurm.users[0], check=False)
        assert step.returncode != 0 and "step ran" not in step.stdout
        assert "no MIG instance" in step.stdout
        slurm.run("scancel", str(job))
        slurm.wait_all(120)


def test_batch_script_without_prolog_goes_back_to_the_queue(slurm: Cluster) -> None:
    # A Prolog that only refuses: what the guard meets where Slurm has left the real one out.
    real = slurm.etc / "prolog"
    text = real.read_text()
    job = 0
    try:
        real.write_text(text.replace('[ "$word" = none ] && exit 0', "exit 0"))
        job = slurm.sbatch("echo ran", "--gres=mig:1g", user=slurm.users[0])
        slurm.wait(lambda: slurm.job(job)["Restarts"] == "1", 60, "sent back")
    finally:
        real.write_text(text)
    slurm.wait_all(120)
    assert slurm.job(job)["JobState"] == "COMPLETED"
    assert output(slurm, job).count("\nran") + output(slurm, job).startswith("ran") == 1


def test_a_comment_that_makes_no_sense_ends_the_job_not_the_node(slurm: Cluster) -> None:
    for comment in ("rms1:9g.99gb:1;s=1;l=0;", "rms1:;s=;", "rms1:3g.40gb:99;s=1;l=0;", "rms1:" + "x" * 900):
        job = slurm.sbatch("echo ran", "--gres=mig:1g", "--hold", user=slurm.users[0])
        slurm.run("scontrol", "update", f"jobid={job}", f"comment={comment}")
        slurm.run("scontrol", "release", str(job))
        slurm.wait_all(120)
        assert slurm.job(job)["JobState"] == "CANCELLED"
        assert not (slurm.users[0].work / f"slurm-{job}.out").exists()


@pytest.mark.parametrize("fault", ["config", "state", "python", "link", "run_dir"])
def test_the_nodes_own_fault_drains_it_and_the_job_waits(slurm: Cluster, fault: str) -> None:
    config, state, prolog = slurm.etc / "rms.toml", slurm.root / "n1" / "state" / "state.json", slurm.etc / "prolog"
    jobs = slurm.root / "n1" / "run" / "jobs"
    kept = {path: path.read_bytes() for path in (config, state, prolog) if path.exists()}
    moved = jobs.with_name("moved")
    try:
        if fault == "config":
            config.write_text("gpu = [0]\n")
        elif fault == "state":
            body = '{"schema":99}'
            state.write_text(f'{{"crc32":{zlib.crc32(body.encode())},"state":{body}}}\n')
        elif fault == "run_dir":
            config.write_text(config.read_text().replace("%n/run", "%n/moved"))
        elif fault == "python":
            prolog.write_text(prolog.read_text().replace(" -I -m slurm.hook", "-missing -I -m slurm.hook"))
        else:
            jobs.rename(moved)
            jobs.symlink_to("/tmp")
        job = slurm.sbatch("echo ran", "--gres=mig:1g", user=slurm.users[0])
        slurm.wait(lambda: slurm.node_states()["n1"].state.startswith("drain"), 60, "drained")
        slurm.wait(lambda: slurm.job(job)["JobState"] == "PENDING", 60, "back in the queue")
        reason = slurm.node_states()["n1"].reason
        assert reason.startswith("rms: ") and slurm.job(job)["Priority"] != "0"
        assert not (slurm.users[0].work / f"slurm-{job}.out").exists()
    finally:
        for path, data in kept.items():
            path.write_bytes(data)
        if jobs.is_symlink():
            jobs.unlink()
            moved.rename(jobs)
        slurm.wait(lambda: not any(" COMPLETING " in line for line in slurm.queue()), 60, "its Epilog is over")
        slurm.run("scontrol", "update", "NodeName=n1", "State=RESUME")
    slurm.wait_all(120)
    assert output(slurm, job).count("ran") == 1


def test_slurm_config_prints_what_a_site_needs(slurm: Cluster) -> None:
    printed = slurm.run(
        *rms(slurm), "slurm-config", "--model", "A100-80GB", "--gpus", "2", "--nodes", "gpu[01-02]"
    ).stdout
    assert "NodeName=gpu[01-02] Gres=mig:1g.10gb:14," in printed and "migc:14,migm:16" in printed
    for part in (
        "Prolog=",
        "TaskProlog=",
        "Epilog=",
        "GresTypes=mig,migc,migm",
        "rms_table.lua",
        "-m slurm.hook prolog",
    ):
        assert part in printed


def test_the_health_check_gives_back_what_no_epilog_has(slurm: Cluster) -> None:
    """A run that Slurm never had here. slurmd runs the health check when it starts, too."""
    controller = ["env", f"RMS_CONFIG={slurm.etc}/rms.toml", "SLURMD_NODENAME=n1", sys.executable, "-m", "controller"]
    slurm.run(*controller, "acquire", "--job=900003", "--restart=0", "--uid=0", "--request=1g", "--cluster=test")
    assert busy(slurm) == ["900003.0"]
    slurm.restart_slurmd("n1")
    slurm.wait(lambda: busy(slurm) == [], 60, "the health check")
    assert slurm.node_states()["n1"].state == "idle"


def test_reconcile_takes_slurm_s_word(slurm: Cluster) -> None:
    """What has ended, or was never here, is taken back; what runs, waits in its Prolog or ends is left alone; and no
    answer is no answer."""
    job = slurm.sbatch("sleep 300", "--gres=mig:3g:1", user=slurm.users[0])
    slurm.wait(lambda: f"job {job}.0: granted" in log(slurm), 60, "it runs")
    controller = ["env", f"RMS_CONFIG={slurm.etc}/rms.toml", "SLURMD_NODENAME=n1", sys.executable, "-m", "controller"]
    for other in ("900001", str(job - 1) if job > 1 else "900002"):  # an id that Slurm never gave, and one that is over
        words = ["acquire", f"--job={other}", "--restart=7", "--uid=0", "--request=1g", "--cluster=test"]
        slurm.run(*controller, *words)
    reconcile = [*rms(slurm), "reconcile", "--slurm-conf", f"{slurm.etc}/slurm.conf"]
    pid = int((slurm.root / "run" / "slurmctld.pid").read_text())
    os.kill(pid, signal.SIGSTOP)
    try:
        silent = slurm.run(*reconcile)
    finally:
        os.kill(pid, signal.SIGCONT)
    assert "Slurm does not say what runs here" in silent.stdout
    assert len(busy(slurm)) == 3
    assert "run 900001.7 is over" in slurm.run(*reconcile, "--dry-run").stdout
    assert len(busy(slurm)) == 3
    began = time.monotonic()
    told = slurm.run(*reconcile).stdout
    assert time.monotonic() - began < 30
    assert "run 900001.7 is over" in told and f"run {job}.0" not in told
    assert busy(slurm) == [f"{job}.0"]
    assert slurm.run(*reconcile).stdout == "nothing to do\n"
    slurm.run("scontrol", "requeue", str(job))
    slurm.wait(lambda: busy(slurm) == [] or slurm.job(job)["JobState"] == "PENDING", 60, "its Epilog")
    slurm.run(*reconcile)
    slurm.run("scancel", str(job))


def test_making_ahead_holds_nobody_up(slurm_root: Path) -> None:
    """With `prewarm` a job's end is over while the instances of the next ones are still being made; one that needs the
    GPUs comes first. On GPUs of its own: what the tests before have used a moment ago would be spared."""

    def at_work() -> bool:
        shown = json.loads(slurm.run(*rms(slurm), "show", "--json").stdout)
        return any(intent["kind"] == "prewarm" and intent["alive"] for intent in shown["intents"])

    with rms_cluster(slurm_root.with_name("ahead"), nodes=1, create=1.5, destroy=0.02, settings="prewarm = true",
                     cred_expire=5) as slurm:  # fmt: skip
        job = slurm.sbatch("true", "--gres=mig:1g", user=slurm.users[0])
        slurm.wait(lambda: f"epilog: job {job}.0: released" in log(slurm), 60, "its Epilog has been there")
        slurm.wait(lambda: slurm.node_states()["n1"].state == "idle", 60, "slurmd waits for nothing")
        slurm.wait(at_work, 60, "something is made ahead")
        large = slurm.sbatch(SHOW, "--gres=mig:7g:2", user=slurm.users[0])
        slurm.wait(lambda: f"job {large}.0: released" in log(slurm), 60, "it has run")
        assert output(slurm, large).count("MIG-") >= 2
        assert f"job {large}.0: no room" not in log(slurm), "nothing that is made ahead is in its way"
        slurm.wait(lambda: not at_work(), 60, "it has ended")
